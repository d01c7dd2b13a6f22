"""What the failures of a unit come to: every I/O error is an event, whatever the policy."""

from __future__ import annotations

import errno

from coordinator.ledger import NewEvent
from coordinator.model.errors import DiskIOError, Side
from coordinator.model.extent import Extent, Status
from coordinator.model.job import ErrorPolicy, JobRecord, JobSpec
from coordinator.model.policy import Action
from workers.mover.engine import Failure
from workers.mover.verdict import judge, note

KIB = 1024


def job(on_source_error: ErrorPolicy = ErrorPolicy.IGNORE) -> JobRecord:
    return JobRecord(id="j", spec=JobSpec(source="/s", target="/t", on_source_error=on_source_error))


def failure(offset: int, number: int = errno.EIO, side: Side = Side.SOURCE) -> Failure:
    error = DiskIOError("bad", errno_=number, offset=offset, length=KIB)
    return Failure(side, error, Extent(offset, KIB, Status.DATA))


def ranges(events: tuple[NewEvent, ...]) -> list[tuple[int, int]]:
    return [(event.data["offset"], event.data["length"]) for event in events]


def test_every_range_that_failed_is_told_of() -> None:
    scattered = [failure(2 * n * KIB) for n in range(1000)]
    for verdict in (judge(job(), scattered), note(job(), scattered)):
        assert ranges(verdict.events) == [(2 * n * KIB, KIB) for n in range(1000)]


def test_ranges_that_lie_side_by_side_and_failed_alike_are_one_event() -> None:
    dead = [failure(n * KIB) for n in (3, 1, 0, 2, 7)]
    for verdict in (judge(job(), dead), note(job(), dead)):
        assert ranges(verdict.events) == [(0, 4 * KIB), (7 * KIB, KIB)]


def test_errors_of_other_sides_and_numbers_are_events_of_their_own() -> None:
    mixed = [failure(0), failure(KIB, errno.ENOSPC, Side.TARGET), failure(KIB, errno.ETIMEDOUT)]
    events = judge(job(ErrorPolicy.STOP), mixed).events
    assert {(e.data["operation"], e.data["errno"], e.data["action"]) for e in events} == {
        ("read", errno.EIO, Action.STOP),
        ("read", errno.ETIMEDOUT, Action.STOP),
        ("write", errno.ENOSPC, Action.REPORT),
    }
