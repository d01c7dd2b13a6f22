"""The mover's part in backups, where it has to refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.ledger import MemoryLedger
from coordinator.model.errors import RefusedError
from coordinator.model.job import JobRecord, JobSpec, State, Sync
from coordinator.settings import Settings
from tests.repositories import backup, local_uri, make_repository
from workers.access import Access
from workers.mover.backup import Backups
from workers.repository.epochs import open_epoch
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
