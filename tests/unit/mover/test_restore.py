"""A restore by several movers, one after the other, while backups go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.ledger import MemoryLedger, NewUnit
from coordinator.model.job import JobRecord, JobSpec, State
from coordinator.model.messages import Doorbell
from coordinator.model.units import UnitKind
from coordinator.settings import Settings
from tests.repositories import backup, make_repository
from workers.mover.loop import Mover

OLD, NEW = b"old " * 50_000, b"new " * 50_000


def work_on_units(ledger: MemoryLedger, number: int) -> JobRecord:
    """A mover of its own that ends after so many units."""
    before = ledger.job("j").job.units_done
    settings = Settings(allowed_roots=["/"], allowed_endpoints=["*"])
    mover = Mover(ledger, settings, "m", lambda: ledger.job("j").job.units_done - before >= number)
    mover.work(Doorbell(role="mover", bell="b"))
    mover._engine.close()
    return ledger.job("j").job


@pytest.mark.parametrize("group", ["g", "g&point=latest"])
def test_all_movers_of_a_restore_read_the_point_that_was_the_newest_when_it_began(tmp_path: Path, group: str) -> None:
    ledger = MemoryLedger()
    term = ledger.lead("me", 10**9)
    assert term is not None
    ledger.adopt_run(term, 0)
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", OLD)
        spec = JobSpec(source=f"repo+file://{tmp_path}/r?group={group}", target=f"{tmp_path}/back")
        ledger.submit("j", spec)
        running = {"state": State.RUNNING, "pass_number": 1, "pass_kind": "copy"}
        ledger.update("j", ledger.job("j").version, running, new_unit=NewUnit(UnitKind.PLAN, 1))
        assert work_on_units(ledger, 1).plan_done
        backup(repository, "g", NEW)
    job = work_on_units(ledger, 1)
    assert (job.units_done, job.error) == (2, "")
    assert (tmp_path / "back").read_bytes() == OLD
