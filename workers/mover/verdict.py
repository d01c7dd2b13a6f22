"""What the failures of a unit mean for its job: events, and changes by the error policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from coordinator.ledger.contract import NewEvent
from coordinator.model.errors import FlushpointError, Side
from coordinator.model.events import EventName
from coordinator.model.job import JobRecord
from coordinator.model.policy import Action, act_on_error, io_status_after, policy_of, status_field
from workers.mover.engine import Failure

_GRAVITY = {Action.IGNORE: 0, Action.STOP: 1, Action.REPORT: 2}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`changes` are fields of the job record."""

    action: Action = Action.IGNORE
    changes: dict[str, object] = field(default_factory=dict)
    events: tuple[NewEvent, ...] = ()


def judge(job: JobRecord, failures: Sequence[Failure]) -> Verdict:
    """The gravest action that the policies ask for, with an event for each merged range that failed."""
    if not failures:
        return Verdict()
    judged = [(act_on_error(policy_of(job.spec, f.side), f.error.errno), f) for f in failures]
    action, failure = max(judged, key=lambda pair: _GRAVITY[pair[0]])
    message = f"{failure.side} {_disk_of(job, failure.side)}: {failure.error}"
    changes: dict[str, object] = {}
    if action is Action.REPORT:
        changes = {"fatal": True, "error": message, "error_code": failure.error.code}
    elif action is Action.STOP:
        changes = {
            "pause_requested": True,
            status_field(failure.side): io_status_after(failure.error.errno),
            "error": message,
            "error_code": failure.error.code,
        }
    return Verdict(action, changes, _events(job, failures))


def note(job: JobRecord, failures: Sequence[Failure]) -> Verdict:
    """A lost connection that will be tried again: no policy is asked yet, but every I/O error is an event."""
    return Verdict(events=_events(job, failures, Action.IGNORE))


def judge_refusal(error: FlushpointError) -> Verdict:
    """An error that no policy is asked about: a disk that is missing, too small, forbidden."""
    return Verdict(Action.REPORT, {"fatal": True, "error": str(error), "error_code": error.code})


def _disk_of(job: JobRecord, side: Side) -> str:
    return job.spec.source if side is Side.SOURCE else job.spec.target


def _events(job: JobRecord, failures: Sequence[Failure], action: Action | None = None) -> tuple[NewEvent, ...]:
    """One for each range of one kind of error, so that a dead disk is told of in a few events and not in thousands.

    `action` is the policy's unless given.
    """
    merged: list[Failure] = []
    for failure in sorted(failures, key=lambda f: (f.side, f.error.errno, f.extent.offset)):
        last = merged[-1] if merged else None
        if last is not None and _continues(last, failure):
            length = last.extent.length + failure.extent.length
            merged[-1] = replace(last, extent=replace(last.extent, length=length))
        else:
            merged.append(failure)
    return tuple(_event(job, action or act_on_error(policy_of(job.spec, f.side), f.error.errno), f) for f in merged)


def _continues(one: Failure, other: Failure) -> bool:
    alike = one.side is other.side and one.error.errno == other.error.errno
    return alike and one.extent.end == other.extent.offset


def _event(job: JobRecord, action: Action, failure: Failure) -> NewEvent:
    return NewEvent(
        EventName.BLOCK_JOB_ERROR,
        {
            "device": job.id,
            "operation": "read" if failure.side is Side.SOURCE else "write",
            "action": str(action),
            "offset": failure.extent.offset,
            "length": failure.extent.length,
            "errno": failure.error.errno,
            "error": failure.error.message,
        },
    )
