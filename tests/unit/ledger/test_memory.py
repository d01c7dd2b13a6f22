"""What time alone decides, with a clock that the test moves."""

from __future__ import annotations

import pytest

from coordinator.ledger import Finished, MemoryLedger, NewUnit, Term
from coordinator.model.extent import Extent, Status
from coordinator.model.job import JobSpec, State
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


def plan(ledger: MemoryLedger) -> Term:
    """One copy unit is ready."""
    term = ledger.lead("leader", 10_000)
    assert term is not None
    ledger.adopt_run(term, 0)
    ledger.submit("job", SPEC)
    ledger.update("job", 1, {"state": State.RUNNING}, new_unit=NewUnit(UnitKind.PLAN, 1))
    claim = ledger.claim("worker", "plan", 1000)
    assert claim is not None
    unit = PlannedUnit(0, 10, (Extent(0, 10, Status.DATA),))
    assert ledger.add_units("job", claim.unit_id, "plan", UnitKind.COPY, 0, 10, [unit])
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
