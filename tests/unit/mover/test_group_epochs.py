"""What an epoch of a mirror group builds on: what its targets hold, as far as all that was decided tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from coordinator.model.errors import RefusedError
from coordinator.model.point import PIVOT, Decision, MirroredDisk
from coordinator.model.task import AbandonEpoch, OpenedEpoch, OpenEpoch
from tests.repositories import make_repository
from workers.mover import group_epochs
from workers.repository.repository import Repository

A, B = "/t/a", "/t/b"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with make_repository(tmp_path / "r") as made:
        yield made


def opened(repository: Repository, targets: Mapping[str, str]) -> OpenedEpoch:
    task = OpenEpoch(repository="r", group="g", owner="o", at_least=1, disks=tuple(targets), targets=dict(targets))
    return group_epochs._open(repository, task, lambda owner: True)


def mirrored(disk: str, target: str, sync: str = "full") -> MirroredDisk:
    return MirroredDisk(disk=disk, target=target, size=100, sync=sync)


def decide(repository: Repository, number: int, *mirrors: MirroredDisk, aborted: bool = False) -> None:
    """As the last job of a round does."""
    if aborted:
        task = AbandonEpoch(repository="r", group="g", owner="o", number=number, why="because", mirrors=tuple(mirrors))
        group_epochs._abandon(repository, task)
        return
    manifest = Decision(
        decision="manifest", repository=repository.id, group="g", epoch=number, job="o", mirrors=tuple(mirrors)
    )
    repository.decisions.decide(manifest)
    repository.decisions.let_go(f"epoch-g-{number:010d}")


def test_a_target_is_added_to_where_it_holds_the_disk(repository: Repository) -> None:
    number = opened(repository, {"vm/a": A, "vm/b": B}).number
    decide(repository, number, mirrored("vm/a", A), mirrored("vm/b", B))
    again = opened(repository, {"vm/a": A, "vm/b": "/t/other"})
    assert (again.parents, again.sizes) == ({"vm/a": number}, {"vm/a": 100})
    decide(repository, again.number, mirrored("vm/a", A), aborted=True)
    assert opened(repository, {"vm/a": A}).parents == {"vm/a": number}, "its own pass that failed is written again"


@pytest.mark.parametrize("aborted", [True, False])
def test_a_target_that_another_disk_was_written_to_since_is_written_anew(repository: Repository, aborted: bool) -> None:
    number = opened(repository, {"vm/a": A, "vm/b": B}).number
    decide(repository, number, mirrored("vm/a", A), mirrored("vm/b", B))
    later = opened(repository, {"vm/a": B}).number
    decide(repository, later, mirrored("vm/a", B), aborted=aborted)
    assert opened(repository, {"vm/a": A, "vm/b": B}).parents == {"vm/a": number}


def test_a_target_that_a_guest_runs_on_is_refused_until_it_has_gone_elsewhere(repository: Repository) -> None:
    """Also where nobody remembers but the repository."""
    number = opened(repository, {"vm/a": A}).number
    decide(repository, number, mirrored("vm/a", A, PIVOT))
    with pytest.raises(RefusedError, match="runs on /t/a"):
        opened(repository, {"vm/a": A})
    moved = opened(repository, {"vm/a": B}).number
    decide(repository, moved, mirrored("vm/a", B, PIVOT))
    with pytest.raises(RefusedError, match="runs on /t/b"):
        opened(repository, {"vm/a": B})
    assert opened(repository, {"vm/a": A}).number > moved
