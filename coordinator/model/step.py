"""The next step of a job, and what a verb does to it: the control loop's decisions, without its I/O.

A pass runs ``plan -> copy or compare units -> settle``: the plan unit splits the disk, movers take the units,
and the settle unit verifies suspect ranges and flushes a last time. A source that cannot change is in sync
after one pass. One that can (a writable NBD export, an image in use) is compared again when the job is told
to complete, until a comparing pass finds nothing that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.model.errors import RefusedError, UsageError
from coordinator.model.events import EventName
from coordinator.model.job import IoStatus, JobRecord, State, Sync, Verb, transition_is_legal, verb_is_legal
from coordinator.model.units import UnitKind

MAX_COMPLETE_PASSES = 8
"""Comparing passes before a complete is refused: a source that still changes then needs to be frozen."""


@dataclass(frozen=True, slots=True)
class Step:
    """One atomic change of a job; `sentence` is what the control loop logs."""

    sentence: str
    changes: Mapping[str, Any]
    events: tuple[tuple[EventName, Mapping[str, Any]], ...] = ()
    new_unit: UnitKind | None = None
    drop_units: bool = False


@dataclass(frozen=True, slots=True)
class VerbArguments:
    speed: int | None = None
    force: bool = False
    pivot: bool = False


def next_step(job: JobRecord, now: float) -> Step | None:
    """What the control loop does next with a job; None: wait for its units or its user."""
    if job.state is State.CONCLUDED:
        return None
    if job.state is State.ABORTING:
        return _conclude_abort(job, now)
    if job.fatal or job.cancel_requested:
        return _to(job, State.ABORTING, "stops: " + (job.error if job.fatal else "cancelled by its user"))
    if job.pause_requested:
        return _pause(job)
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
            return Step("resumed", _resumed(job))
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
    if job.units_quarantined:
        return Step(
            "cannot copy everything",
            {
                "fatal": True,
                "error": job.error
                or f"{job.units_quarantined} work units of job {job.id} failed again and again and were given up",
                "error_code": job.error_code or "io-error",
            },
        )
    if job.pass_kind == "settle":
        return Step("settles once more", {"settled": False}, new_unit=UnitKind.SETTLE)
    if not job.plan_done:
        return Step("plans once more", {}, new_unit=UnitKind.PLAN)
    return Step("everything is copied, settles", {"pass_kind": "settle"}, new_unit=UnitKind.SETTLE)


def _running(job: JobRecord, now: float) -> Step | None:
    if not job.settled:
        return _run_pass(job, now)
    return Step(
        "ready",
        {"state": State.READY},
        (
            (EventName.MIRROR_STATE_CHANGE, {"synced": True}),
            (EventName.BLOCK_JOB_READY, _figures(job)),
        ),
    )


def _ready(job: JobRecord, now: float) -> Step | None:
    """Nothing, until told to complete; then comparing passes until one finds nothing that differs."""
    if not job.settled:
        return _run_pass(job, now)
    if not (job.complete_requested or job.spec.auto_complete):
        return None
    compared_clean = job.complete_passes > 0 and job.pass_sent == 0 and not job.source_written
    if not job.source_may_change or compared_clean:
        return Step("in sync and flushed, completes", {"state": State.WAITING})
    if job.complete_passes < MAX_COMPLETE_PASSES:
        return Step(
            "the source may have changed, compares once more",
            {**_new_pass(job, "compare"), "complete_passes": job.complete_passes + 1},
            new_unit=UnitKind.PLAN,
            drop_units=True,
        )
    return _refuse_complete(job)


def _waiting(job: JobRecord, now: float) -> Step:
    return Step("has nothing left to do", {"state": State.PENDING})


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
        ((EventName.MIRROR_STATE_CHANGE, {"synced": False}),),
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
    name = EventName.BLOCK_JOB_COMPLETED if job.fatal else EventName.BLOCK_JOB_CANCELLED
    figures = {**_figures(job), "error": job.error} if job.fatal else _figures(job)
    return Step(
        "failed: " + job.error if job.fatal else "cancelled",
        {"state": State.CONCLUDED, "concluded_at": now},
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
