"""The next step of a job, and what a verb does to it: the control loop's decisions, without its I/O.

A pass runs ``plan -> copy or compare units -> settle``: the plan unit splits the disk, movers take the units,
and the settle unit verifies suspect ranges and flushes a last time. A source that cannot change is in sync
after one pass. One that can (an NBD export, an image in use) is compared again when the job is told to complete,
until a comparing pass finds nothing that differs. Such a job is ready after its first pass, but `synced` only then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.model.errors import DiskIOError, RefusedError, Side, UsageError
from coordinator.model.events import EventName
from coordinator.model.job import IoStatus, JobRecord, State, Sync, Verb, transition_is_legal, verb_is_legal
from coordinator.model.policy import MAY_STOP, Action, act_on_quarantine, policy_of, status_field
from coordinator.model.units import QuarantinedUnit, UnitKind

MAX_COMPLETE_PASSES = 8
"""Comparing passes before a complete is refused: a source that still changes then needs to be frozen."""
PLACES_TOLD = 4
"""Ranges of given-up units that an error message names; the events have them all, up to EVENTS_OF_GIVEN_UP."""
EVENTS_OF_GIVEN_UP = 100

Events = tuple[tuple[EventName, Mapping[str, Any]], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One atomic change of a job; `sentence` is what the control loop logs."""

    sentence: str
    changes: Mapping[str, Any]
    events: Events = ()
    new_unit: UnitKind | None = None
    drop_units: bool = False
    retry_quarantined: bool = False
    """Given-up units are ready again, and their attempts are counted from the start."""


@dataclass(frozen=True, slots=True)
class VerbArguments:
    speed: int | None = None
    force: bool = False
    pivot: bool = False


def next_step(job: JobRecord, now: float, given_up: Sequence[QuarantinedUnit] = ()) -> Step | None:
    """What the control loop does next with a job, some of whose units are `given_up`; None: wait for units or user."""
    if job.state is State.CONCLUDED:
        return None
    if job.state is State.ABORTING:
        return _conclude_abort(job, now)
    if job.fatal or job.cancel_requested:
        return _to(job, State.ABORTING, "stops: " + (job.error if job.fatal else "cancelled by its user"))
    if job.pause_requested:
        return _pause(job)
    if job.units_quarantined and (step := _on_quarantine(job, given_up)) is not None:
        return step
    return _STEPS[job.state](job, now)


def apply_verb(job: JobRecord, verb: Verb, arguments: VerbArguments) -> Step:
    """What a user's verb changes. RefusedError if the job's state does not allow it."""
    if job.fatal and verb in (Verb.RESUME, Verb.COMPLETE):
        raise RefusedError(f"job {job.id} has failed: {job.error}", "submit it again once that is mended")
    if not verb_is_legal(job.state, verb):
        raise RefusedError(
            f"job {job.id} is {job.state}: {verb} is not possible", _REMEDIES.get(verb, "look at it with 'job'")
        )
    match verb:
        case Verb.PAUSE:
            return Step("pause asked for", {"pause_requested": True})
        case Verb.RESUME:
            return Step("resumed", _resumed(job), retry_quarantined=job.units_quarantined > 0)
        case Verb.SET_SPEED:
            if arguments.speed is None or arguments.speed < 0:
                raise UsageError("set-speed needs a speed in bytes per second", "0 means unlimited")
            return Step(f"speed set to {arguments.speed} bytes/s", {"speed": arguments.speed})
        case Verb.COMPLETE:
            if arguments.pivot:
                raise RefusedError(
                    f"job {job.id} mirrors no live guest, so there is nothing to pivot", "complete it without pivot"
                )
            return Step(
                "complete asked for",
                {"complete_requested": True, "complete_passes": 0, "error": "", "error_code": ""},
            )
        case Verb.CANCEL:
            force = arguments.force or job.cancel_requested == "force"
            return Step("cancel asked for", {"cancel_requested": "force" if force else "soft"})
        case Verb.FINALIZE:
            return Step("finalize asked for", {"finalize_requested": True})
        case Verb.DISMISS:
            return Step("dismissed", {})


_REMEDIES = {
    Verb.COMPLETE: "wait until it is ready",
    Verb.FINALIZE: "wait until it is pending",
    Verb.DISMISS: "wait until it has concluded, or cancel it",
}


def _resumed(job: JobRecord) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "pause_requested": False,
        "io_status": IoStatus.OK,
        "target_io_status": IoStatus.OK,
        "error": "",
        "error_code": "",
    }
    if job.state is State.PAUSED:
        changes["state"] = State.RUNNING if job.pass_number else State.CREATED
    elif job.state is State.STANDBY:
        changes["state"] = State.READY
    return changes


def _to(job: JobRecord, state: State, sentence: str) -> Step:
    if not transition_is_legal(job.state, state):
        raise AssertionError(f"job {job.id}: {job.state} to {state} is no transition")
    return Step(sentence, {"state": state})


def _pause(job: JobRecord) -> Step | None:
    if job.units_leased:
        return None  # movers see the flag at their next renewal, drain and release
    if job.state in (State.CREATED, State.RUNNING):
        return _to(job, State.PAUSED, "paused")
    if job.state is State.READY:
        return _to(job, State.STANDBY, "on standby")
    return None


def _start(job: JobRecord, now: float) -> Step:
    if job.spec.task is not None:
        changes = {"state": State.RUNNING, "started_at": now, "pass_number": 1, "pass_kind": "task", "plan_done": True}
        return Step(f"starts its task, {job.spec.task.kind}", changes, new_unit=UnitKind.TASK, drop_units=True)
    kind = "compare" if job.spec.sync is Sync.INCREMENTAL else "copy"
    return Step(
        f"starts with a {kind} pass",
        {"state": State.RUNNING, "started_at": now, **_new_pass(job, kind)},
        new_unit=UnitKind.PLAN,
        drop_units=True,
    )


def _new_pass(job: JobRecord, kind: str) -> dict[str, Any]:
    return {
        "pass_number": job.pass_number + 1,
        "pass_kind": kind,
        "compared": kind == "compare",
        "plan_cursor": 0,
        "plan_done": False,
        "pass_sent": 0,
        "settled": False,
        "source_written": False,
    }


def _run_pass(job: JobRecord, now: float) -> Step | None:
    """Drive the pass to its settled end; None while units are out."""
    if job.units_ready or job.units_leased:
        return None
    if job.pass_kind == "task":
        return Step("tries its task once more", {}, new_unit=UnitKind.TASK)
    if job.pass_kind == "settle":
        return Step("settles once more", {"settled": False}, new_unit=UnitKind.SETTLE)
    if not job.plan_done:
        return Step("plans once more", {}, new_unit=UnitKind.PLAN)
    return Step("everything is copied, settles", {"pass_kind": "settle"}, new_unit=UnitKind.SETTLE)


def _on_quarantine(job: JobRecord, given_up: Sequence[QuarantinedUnit]) -> Step | None:
    """Ask the error policies; None while all else is to be copied first."""
    action = act_on_quarantine(job.spec, [unit.error for unit in given_up])
    if action is Action.IGNORE and (job.units_ready or job.units_leased):
        return None
    remedy = f"Mend the cause (see the workers' logs, and flushpoint events --job {job.id})"
    changes: dict[str, Any] = {"error_code": DiskIOError.code}
    if action is Action.STOP:
        changes |= {"pause_requested": True, "error": f"{_given_up_text(job, given_up)}. {remedy}"}
        changes |= {status_field(side): IoStatus.FAILED for side in Side if policy_of(job.spec, side) in MAY_STOP}
        return Step("pauses: units were given up", changes, _given_up_events(job, given_up, action))
    changes |= {"fatal": True, "error": f"{_given_up_text(job, given_up)}. {remedy}, then submit the job again"}
    return Step("cannot copy everything", changes, _given_up_events(job, given_up, Action.REPORT))


def _given_up_text(job: JobRecord, given_up: Sequence[QuarantinedUnit]) -> str:
    count = job.units_quarantined
    attempts = max((unit.failures for unit in given_up), default=0)
    error = next((unit.error for unit in given_up if unit.error), "")
    cause = f"failed: {error}" if error else "ended without a word: a worker died, or met what only its log tells"
    return (
        f"{count} work {'unit was' if count == 1 else 'units were'} given up after {attempts} attempts"
        f" ({_places(given_up)}). The last attempt {cause.rstrip('.')}"
    )


def _places(given_up: Sequence[QuarantinedUnit]) -> str:
    """Where the units lie: neighbours as one range."""
    ranges: list[tuple[int, int]] = []
    for unit in sorted(given_up):
        if ranges and ranges[-1][1] == unit.start:
            ranges[-1] = (ranges[-1][0], unit.end)
        elif unit.end > unit.start:
            ranges.append((unit.start, unit.end))
    names = {
        UnitKind.PLAN: "the plan",
        UnitKind.SETTLE: "the last check",
        UnitKind.PUBLISH: "the publication",
        UnitKind.TASK: "the task",
    }
    places = [names[unit.kind] for unit in given_up if unit.kind in names]
    places += [f"{end - start} bytes at {start}" for start, end in ranges]
    more = len(places) - PLACES_TOLD
    return ", ".join(places[:PLACES_TOLD]) + (f" and {more} more" if more > 0 else "")


def _given_up_events(job: JobRecord, given_up: Sequence[QuarantinedUnit], action: Action) -> Events:
    """For attempts that ended without a word: all else was told of when it happened.

    They lack `operation` and `errno` of QAPI's event, since nobody knows them.
    """
    silent = [unit for unit in given_up if not unit.error]
    return tuple(
        (
            EventName.BLOCK_JOB_ERROR,
            {
                "device": job.id,
                "action": str(action),
                "offset": unit.start,
                "length": unit.end - unit.start,
                "error": f"given up after {unit.failures} attempts",
            },
        )
        for unit in silent[:EVENTS_OF_GIVEN_UP]
    )


def _shows_sync(job: JobRecord) -> bool:
    """Whether the settled pass has shown that the target equals the source."""
    found_nothing = job.compared and job.pass_sent == 0 and not job.source_written
    return not job.source_may_change or found_nothing


def _to_synced(job: JobRecord, synced: bool) -> tuple[dict[str, Any], Events]:
    """The change, and its event, if it is one."""
    if synced == job.synced:
        return {}, ()
    return {"synced": synced}, ((EventName.MIRROR_STATE_CHANGE, {"synced": synced}),)


def _running(job: JobRecord, now: float) -> Step | None:
    if not job.settled:
        return _run_pass(job, now)
    changes, events = _to_synced(job, _shows_sync(job))
    ready = (EventName.BLOCK_JOB_READY, _figures(job))
    return Step("ready", {"state": State.READY, **changes}, (*events, ready))


def _ready(job: JobRecord, now: float) -> Step | None:
    """Nothing, until told to complete; then comparing passes until one finds nothing that differs."""
    if not job.settled:
        return _run_pass(job, now)
    changes, events = _to_synced(job, _shows_sync(job))
    if changes:
        return Step("in sync" if changes["synced"] else "not in sync any more", changes, events)
    if not (job.complete_requested or job.spec.auto_complete):
        return None
    # What was compared before complete was asked for is in the past.
    if not job.source_may_change or (job.complete_passes > 0 and job.synced):
        return Step("in sync and flushed, completes", {"state": State.WAITING})
    if job.complete_passes < MAX_COMPLETE_PASSES:
        return Step(
            "the source may have changed, compares once more",
            {**_new_pass(job, "compare"), "complete_passes": job.complete_passes + 1},
            new_unit=UnitKind.PLAN,
            drop_units=True,
        )
    return _refuse_complete(job)


def _waiting(job: JobRecord, now: float) -> Step | None:
    if _decides(job) and not job.published:
        if job.units_ready or job.units_leased:
            return None
        return Step("publishes its recovery point", {}, new_unit=UnitKind.PUBLISH)
    return Step("has nothing left to do", {"state": State.PENDING})


def _decides(job: JobRecord) -> bool:
    """Whether it has opened an epoch of its own. That of a group is decided by the group's coordinator."""
    return job.epoch > 0 and job.spec.part is None


def _refuse_complete(job: JobRecord) -> Step:
    why = f"the source {job.spec.source} still changes after {MAX_COMPLETE_PASSES} passes. Stop its writer, then "
    if job.spec.auto_complete:
        return Step(
            "cannot become a clean copy",
            {"fatal": True, "error": why + "submit the job again with --sync incremental", "error_code": "refused"},
        )
    return Step(
        "refuses to complete",
        {
            "complete_requested": False,
            "complete_passes": 0,
            "error": why + "complete it again",
            "error_code": "refused",
        },
    )


def _pending(job: JobRecord, now: float) -> Step | None:
    if not (job.finalize_requested or job.spec.auto_finalize):
        return None
    return Step(
        "concluded",
        {"state": State.CONCLUDED, "concluded_at": now},
        ((EventName.BLOCK_JOB_COMPLETED, _figures(job)),),
        drop_units=True,
    )


def _conclude_abort(job: JobRecord, now: float) -> Step | None:
    if job.units_leased:
        return None  # nobody may still write when the job says it is over; a dead mover's lease runs out
    if _decides(job) and not job.published and not job.closing:
        return Step("abandons its epoch", {"closing": True}, new_unit=UnitKind.ABANDON, drop_units=True)
    if job.closing and not job.abandoned and job.units_ready and job.cancel_requested != "force":
        return None  # until it is given up: then the epoch's hold goes stale by itself
    name = EventName.BLOCK_JOB_COMPLETED if job.fatal else EventName.BLOCK_JOB_CANCELLED
    figures = {**_figures(job), "error": job.error} if job.fatal else _figures(job)
    changes: dict[str, Any] = {"state": State.CONCLUDED, "concluded_at": now}
    if job.published and not job.fatal:
        changes["error"] = f"recovery point {job.group}@{job.epoch} was published before the cancel came"
    return Step(
        "failed: " + job.error if job.fatal else "cancelled",
        changes,
        ((name, figures),),
        drop_units=True,
    )


def _wait(job: JobRecord, now: float) -> Step | None:
    return None


_STEPS = {
    State.CREATED: _start,
    State.RUNNING: _running,
    State.PAUSED: _wait,
    State.READY: _ready,
    State.STANDBY: _wait,
    State.WAITING: _waiting,
    State.PENDING: _pending,
}


def _figures(job: JobRecord) -> dict[str, Any]:
    """The members that QAPI's BLOCK_JOB_* events share."""
    return {"type": "mirror", "device": job.id, "len": job.len, "offset": job.offset, "speed": job.speed}
