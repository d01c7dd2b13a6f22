"""What time alone decides, with a clock that the test moves."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.ledger import Finished, MemoryBarrier, MemoryLedger, NewUnit, Term
from coordinator.ledger.redis_epochs import EPOCH_KEPT_MS
from coordinator.model.epoch import EpochSpec, Participant
from coordinator.model.errors import NotFoundError
from coordinator.model.extent import Extent, Status
from coordinator.model.job import JobRecord, JobSpec, State
from coordinator.model.progress import RATE_WINDOW_S, eta_of, rate_of
from coordinator.model.units import PlannedUnit, UnitKind

SPEC = JobSpec(source="/a", target="/b")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> MemoryLedger:
    return MemoryLedger(clock)


def plan(ledger: MemoryLedger, size: int = 10) -> Term:
    """One copy unit of `size` bytes is ready."""
    term = ledger.lead("leader", 10_000)
    assert term is not None
    ledger.adopt_run(term, 0)
    ledger.submit("job", SPEC)
    ledger.update("job", 1, {"state": State.RUNNING}, new_unit=NewUnit(UnitKind.PLAN, 1))
    claim = ledger.claim("worker", "plan", 1000)
    assert claim is not None
    unit = PlannedUnit(0, size, (Extent(0, size, Status.DATA),))
    assert ledger.add_units("job", claim.unit_id, "plan", UnitKind.COPY, 0, size, [unit])
    assert ledger.finish("job", claim.unit_id, "plan") is Finished.DONE
    return term


def test_a_lease_ends_when_its_time_is_over(ledger: MemoryLedger, clock: Clock) -> None:
    term = plan(ledger)
    assert ledger.claim("worker", "token", 5000) is not None
    clock.now_s += 4.999
    assert ledger.reap(term, 0) == []
    clock.now_s += 0.001
    assert len(ledger.reap(term, 0)) == 1


def test_another_leads_when_the_term_is_over(ledger: MemoryLedger, clock: Clock) -> None:
    assert ledger.lead("one", 5000) is not None
    clock.now_s += 4.999
    assert ledger.lead("two", 5000) is None
    clock.now_s += 0.001
    assert ledger.lead("two", 5000) == Term(2, "two")


def test_a_repeated_finish_is_known_for_an_hour(ledger: MemoryLedger, clock: Clock) -> None:
    plan(ledger)
    claim = ledger.claim("worker", "token", 1000)
    assert claim is not None
    assert ledger.finish("job", claim.unit_id, "token") is Finished.DONE
    clock.now_s += 3599
    assert ledger.finish("job", claim.unit_id, "token") is Finished.ALREADY
    clock.now_s += 1
    assert ledger.finish("job", claim.unit_id, "token") is Finished.STALE


def test_a_suspects_quarantine_counts_from_when_its_lease_was_taken_back(ledger: MemoryLedger, clock: Clock) -> None:
    term = plan(ledger)
    assert ledger.claim("worker", "late", 1000) is not None
    clock.now_s += 11
    ledger.reap(term, 0)  # ten seconds after the lease ended
    again = ledger.claim("worker", "again", 1000)
    assert again is not None
    ledger.finish("job", again.unit_id, "again")
    ledger.update("job", ledger.job("job").version, {}, new_unit=NewUnit(UnitKind.SETTLE, 1))
    settle = ledger.claim("worker", "settle", 1000)
    assert settle is not None
    (suspect,) = ledger.suspects("job", settle.unit_id, "settle", 15_000)
    assert suspect.quarantine_ms == 15_000  # a clock that jumped may have ended the lease early


def test_the_bucket_fills_at_its_speed_up_to_the_burst(ledger: MemoryLedger, clock: Clock) -> None:
    assert ledger.take("job", 1500, 100, 1000) == 5000
    clock.now_s += 5
    assert ledger.take("job", 0, 100, 1000) == 0
    assert ledger.take("job", 1, 100, 1000) == 10
    clock.now_s += 1000
    assert ledger.take("job", 1100, 100, 1000) == 1000


def test_speed_changed_by_a_take_counts_from_that_take(ledger: MemoryLedger, clock: Clock) -> None:
    assert ledger.take("job", 1100, 100, 1000) == 1000
    clock.now_s += 0.5  # at 100 bytes/s: 50 bytes of the debt are paid
    assert ledger.take("job", 0, 1000, 1000) == 50


def mover(ledger: MemoryLedger, clock: Clock, seconds: int, bytes_per_s: int) -> JobRecord:
    """One that reports each second, as a mover that is at its slice's end does; the job as it is then."""
    claim = ledger.claim("worker", f"{clock.now_s}", 10**9)
    assert claim is not None
    for _ in range(seconds):
        clock.now_s += 1
        assert ledger.release(
            "job",
            claim.unit_id,
            claim.token,
            remaining=claim.extents,
            done_bytes=bytes_per_s,
            bytes_read=bytes_per_s,
            bytes_sent=bytes_per_s,
            count_attempt=False,
        )
        claim = ledger.claim("worker", f"{clock.now_s}", 10**9)
        assert claim is not None
    ledger.release(
        "job",
        claim.unit_id,
        claim.token,
        remaining=claim.extents,
        done_bytes=0,
        bytes_read=0,
        bytes_sent=0,
        count_attempt=False,
    )
    return ledger.job("job").job


@pytest.fixture
def copying(ledger: MemoryLedger, clock: Clock) -> JobRecord:
    """After a minute of 10 MB/s of a job of one GB."""
    plan(ledger, 10**9)
    job = mover(ledger, clock, 60, 10**7)
    assert rate_of(job, clock.now_s) == pytest.approx(10**7)
    assert eta_of(job, clock.now_s) == pytest.approx(40)
    return job


def change(ledger: MemoryLedger, **changes: object) -> None:
    ledger.update("job", ledger.job("job").version, changes)


@pytest.mark.usefixtures("copying")
def test_a_pause_counts_neither_for_the_rate_nor_for_the_eta(ledger: MemoryLedger, clock: Clock) -> None:
    change(ledger, state=State.PAUSED)
    clock.now_s += 3600
    assert rate_of(ledger.job("job").job, clock.now_s) == 0
    change(ledger, state=State.RUNNING)
    assert eta_of(ledger.job("job").job, clock.now_s) is None
    job = mover(ledger, clock, 1, 10**7)
    assert rate_of(job, clock.now_s) == pytest.approx(10**7)
    assert eta_of(job, clock.now_s) == pytest.approx(39)
    change(ledger, state=State.CONCLUDED, concluded_at=clock.now_s)
    assert rate_of(ledger.job("job").job, clock.now_s) == pytest.approx(10**7), "of the time in which it copied"


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("speed", [10**6, 10**8])
def test_a_changed_speed_is_followed_by_the_eta_with_the_next_units(
    ledger: MemoryLedger, clock: Clock, speed: int
) -> None:
    change(ledger, speed=speed)
    job = mover(ledger, clock, 2, speed)
    assert rate_of(job, clock.now_s) == pytest.approx(speed)
    assert eta_of(job, clock.now_s) == pytest.approx((job.len - job.offset) / speed)


@pytest.mark.usefixtures("copying")
def test_what_was_under_way_when_the_speed_changed_is_forgotten_within_two_windows(
    ledger: MemoryLedger, clock: Clock
) -> None:
    change(ledger, speed=10**6)
    mover(ledger, clock, 1, 3 * 10**7)  # a slice at the old speed
    job = mover(ledger, clock, int(2 * RATE_WINDOW_S), 10**6)
    assert rate_of(job, clock.now_s) == pytest.approx(10**6)


@pytest.mark.usefixtures("copying")
def test_a_peer_that_becomes_slow_is_followed_within_two_windows(ledger: MemoryLedger, clock: Clock) -> None:
    job = mover(ledger, clock, int(2 * RATE_WINDOW_S), 10**6)
    assert rate_of(job, clock.now_s) == pytest.approx(10**6)
    clock.now_s += 1000
    assert rate_of(job, clock.now_s) < 10**4, "one that says nothing any more"


def test_an_epoch_and_its_news_are_forgotten_an_hour_after_it_was_over(ledger: MemoryLedger, clock: Clock) -> None:
    spec = EpochSpec(
        participants=(Participant(vm="db", host="hv1", disks=("vda",)),),
        prepare_ms=EPOCH_KEPT_MS * 2,
        freeze_ms=1,
        hold_ms=1,
    )
    term, barrier = plan(ledger), MemoryBarrier(ledger)
    ledger.open_epoch(term, "shop", spec)
    clock.now_s += EPOCH_KEPT_MS / 1000 - 1
    ledger.give_up_epoch(term, "shop", 1, "why")
    clock.now_s += EPOCH_KEPT_MS / 1000 - 1
    assert asyncio.run(barrier.epoch("shop", 1)).is_over
    assert len(asyncio.run(barrier.news("hv1", "0", 0))) == 2, "since the last of them"
    clock.now_s += 1
    with pytest.raises(NotFoundError):
        asyncio.run(barrier.epoch("shop", 1))
    assert asyncio.run(barrier.news("hv1", "0", 0)) == []
    assert ledger.open_epoch(term, "shop", spec).number == 2
