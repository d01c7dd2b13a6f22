"""The mover's part in backups, where it has to refuse, and where it keeps others from being harmed."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.ledger import MemoryLedger, NewUnit
from coordinator.model.errors import RefusedError
from coordinator.model.job import JobRecord, JobSpec, State, Sync
from coordinator.model.messages import Doorbell
from coordinator.model.point import Retention
from coordinator.model.task import RepositoryTask, TaskKind
from coordinator.model.units import UnitKind
from coordinator.settings import Settings
from tests.repositories import backup, local_uri, make_repository
from workers.access import Access
from workers.mover.backup import Backups
from workers.mover.loop import Mover
from workers.repository import decisions
from workers.repository.epochs import open_epoch, renew
from workers.repository.layout import point_key
from workers.repository.repository import Repository


def test_a_point_whose_parent_is_gone_is_refused_and_not_filled_with_zeroes(tmp_path: Path) -> None:
    make_repository(tmp_path / "r").close()
    with Repository.open(local_uri(tmp_path / "r"), Access(["/"], [])) as repository:
        backup(repository, "g", b"x" * 100_000)
        open_epoch(repository, "g", "disk", "job j on a-host", lambda owner: False)
        repository.store.delete([point_key("g", 1)])
    spec = JobSpec(source="/s", target=f"repo+file://{tmp_path}/r?group=g", sync=Sync.DIRTY, bitmap="b")
    job = JobRecord(
        id="j",
        spec=spec,
        state=State.RUNNING,
        group="g",
        disk="disk",
        epoch=2,
        parent_epoch=1,
        on_parent=True,
        disk_size=100_000,
        pass_number=1,
    )
    backups = Backups(MemoryLedger(), Settings(), Access(["/"], []))
    try:
        with pytest.raises(RefusedError, match="which this job builds on, is gone"):
            backups.settle(job, [])
    finally:
        backups.close()


def test_a_prune_ends_silent_epochs_but_not_that_of_a_job_that_may_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = MemoryLedger()
    term = ledger.lead("me", 10**9)
    assert term is not None
    ledger.adopt_run(term, 0)

    def bring(job: str, *states: State) -> None:
        ledger.submit(job, JobSpec(source="/s", target=f"repo+file://{tmp_path}/r?group={job}"))
        for state in states:
            ledger.update(job, ledger.job(job).version, {"state": state})

    bring("paused", State.PAUSED)
    bring("over", State.ABORTING, State.CONCLUDED)
    with make_repository(tmp_path / "r") as repository:
        epochs = {
            job: open_epoch(repository, job, "disk", f"job {job} on a-host", lambda owner: False)
            for job in ("paused", "over", "elsewhere")
        }
        retention = Retention(last=1)
        task = RepositoryTask(kind=TaskKind.PRUNE, repository=f"repo+file://{tmp_path}/r", retention=retention)
        ledger.submit("prune", JobSpec(task=task))
        running = {"state": State.RUNNING, "pass_number": 1, "pass_kind": "task", "plan_done": True}
        ledger.update("prune", ledger.job("prune").version, running, new_unit=NewUnit(UnitKind.TASK, 1))
        with monkeypatch.context() as patched:
            patched.setattr(decisions, "HOLD_TTL_S", 0.0)
            mover = Mover(ledger, Settings(allowed_roots=["/"], allowed_endpoints=["*"]), "m", lambda: False)
            mover.work(Doorbell(role="mover", bell="b"))
        assert ledger.job("prune").job.error == ""
        assert [hold.owner for hold in repository.decisions.holds()] == ["job paused on a-host"]
        renew(repository, epochs["paused"])
        for job in ("over", "elsewhere"):
            with pytest.raises(RefusedError, match="was given up"):
                renew(repository, epochs[job])
