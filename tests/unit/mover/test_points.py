"""What the ledger is told of recovery points: always what the repository says, read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.ledger import MemoryLedger
from coordinator.model.point import Retention
from coordinator.model.task import RepositoryTask, TaskKind
from tests.repositories import backup, local_uri, make_repository
from workers.access import Access
from workers.mover import points
from workers.repository import chores
from workers.repository.collect import prune
from workers.repository.decisions import Decisions
from workers.repository.layout import point_key, retained_prefix
from workers.repository.repository import Repository

ACCESS = Access(["/"], ["*"])
DATA = b"a disk" * 20000


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger()


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with make_repository(tmp_path / "repository") as made:
        yield made


def scan(repository: Repository, ledger: MemoryLedger, *groups: str) -> dict[str, Any]:
    task = RepositoryTask(kind=TaskKind.SCAN, repository=uri_of(repository), groups=groups)
    return points.scan(task, ledger, ACCESS, lambda: None)


def test_a_scan_teaches_a_ledger_that_knows_nothing_all_points(repository: Repository, ledger: MemoryLedger) -> None:
    made = [backup(repository, "shop", DATA), backup(repository, "shop", DATA[1:], "compare")]
    other = backup(repository, "other", DATA)
    told = scan(repository, ledger)
    assert told == {"repository": repository.id, "groups": {"shop": [1, 2], "other": [1]}, "damaged": {}, "begun": {}}
    assert ledger.points(repository.id, "shop") == [decision.record() for decision in made]
    assert ledger.points(repository.id, "other") == [other.record()]
    assert ledger.repositories()[0].scanned_at > 0
    assert ledger.events() == [], "old points are no news"


def test_a_manifest_is_read_once(repository: Repository, ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    backup(repository, "shop", DATA)
    scan(repository, ledger)
    backup(repository, "shop", DATA)
    read: list[int] = []
    whole = Decisions.decision

    def counted(self: Decisions, group: str, epoch: int) -> object:
        read.append(epoch)
        return whole(self, group, epoch)

    monkeypatch.setattr(Decisions, "decision", counted)
    assert scan(repository, ledger)["groups"] == {"shop": [1, 2]}
    assert read == [2]


def uri_of(repository: Repository) -> str:
    return str(local_uri(Path(repository.store.name.removeprefix("repo+file://"))))


def test_points_that_were_pruned_are_forgotten_whoever_removed_them(
    repository: Repository, ledger: MemoryLedger
) -> None:
    for _ in range(3):
        backup(repository, "shop", DATA)
    backup(repository, "other", DATA)
    scan(repository, ledger)
    task = RepositoryTask(
        kind=TaskKind.PRUNE, repository=uri_of(repository), groups=("shop",), retention=Retention(last=1)
    )
    result = chores.run(task, "job", ACCESS, lambda: None)  # its mover is killed here ...
    assert ledger.point_epochs(repository.id, "shop") == [1, 2, 3]
    again = chores.run(task, "job", ACCESS, lambda: None)  # ... and another does it once more
    assert (result["removed"], again["removed"]) == ({"shop": [1, 2]}, {"shop": []})
    points.learn_of(task, ledger, ACCESS, again)
    assert ledger.point_epochs(repository.id, "shop") == [3]
    assert ledger.point_epochs(repository.id, "other") == [1]


def test_a_prune_that_fails_on_its_way_tells_what_it_removed(repository: Repository, ledger: MemoryLedger) -> None:
    for _ in range(2):
        backup(repository, "shop", DATA)
    scan(repository, ledger)
    task = RepositoryTask(kind=TaskKind.PRUNE, repository=uri_of(repository), retention=Retention(last=1))
    chores.run(task, "job", ACCESS, lambda: None)
    points.learn_of(task, ledger, ACCESS, None)
    assert ledger.point_epochs(repository.id, "shop") == [2]


def test_a_dry_run_makes_nothing_forgotten(repository: Repository, ledger: MemoryLedger) -> None:
    for _ in range(2):
        backup(repository, "shop", DATA)
    scan(repository, ledger)
    task = RepositoryTask(kind=TaskKind.PRUNE, repository=uri_of(repository), retention=Retention(last=1), dry_run=True)
    points.learn_of(task, ledger, ACCESS, chores.run(task, "job", ACCESS, lambda: None))
    assert ledger.point_epochs(repository.id, "shop") == [1, 2]


def test_a_scan_of_one_group_does_not_call_the_repository_scanned(repository: Repository, ledger: MemoryLedger) -> None:
    backup(repository, "shop", DATA)
    backup(repository, "other", DATA)
    scan(repository, ledger, "shop")
    assert ledger.point_groups(repository.id) == {"shop": 1}
    assert ledger.repositories()[0].scanned_at == 0


def test_a_damaged_manifest_is_named_and_hides_no_other(
    repository: Repository, ledger: MemoryLedger, tmp_path: Path
) -> None:
    for _ in range(3):
        backup(repository, "shop", DATA)
    manifest = tmp_path / "repository" / point_key("shop", 2)
    manifest.write_bytes(manifest.read_bytes()[:-20])
    told = scan(repository, ledger)
    assert told["groups"] == {"shop": [1, 3]}
    assert list(told["damaged"]["shop"]) == [2]
    assert point_key("shop", 2) in told["damaged"]["shop"][2]
    assert ledger.point_epochs(repository.id, "shop") == [1, 3]


def test_a_published_point_is_remembered_and_told_once(repository: Repository, ledger: MemoryLedger) -> None:
    decision = backup(repository, "shop", DATA)
    for _ in range(2):
        points.published(ledger, f"{repository.store.name}?group=shop", decision, ledger.points_mark())
    assert ledger.points(repository.id, "shop") == [decision.record()]
    assert [event["event"] for event in ledger.events()] == ["RECOVERY_POINT"]


def test_a_scan_of_one_group_looks_at_no_other(repository: Repository, ledger: MemoryLedger) -> None:
    """Whatever is damaged there, this one can be listed and restored."""
    for group in ("shop", "other"):
        backup(repository, group, DATA)
        backup(repository, group, DATA[1:])
    prune(repository, None, Retention(last=1))
    repository.store.put(f"{retained_prefix('other')}0000000001.json", b"rot")
    assert scan(repository, ledger, "shop")["groups"] == {"shop": [2]}
    assert scan(repository, ledger, "none", "no name", "..", "")["groups"] == {}
