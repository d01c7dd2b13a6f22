"""A repository with very many points of many disks is opened, listed, planned and checked in bounded memory."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.model.repository_uri import RepositoryUri
from tests.bench.many_points import ACCESS, CHANGED, DISK_BYTES, GROUP, Shape, make, measure_apart
from tests.repositories import local_uri, make_repository
from workers.repository.repository import Repository

SHAPE = Shape(points=300, disks=100, changed=CHANGED)
GROWTH_MIB = 20
"""Of a process that has imported everything. All manifests at once would take 45."""
MIB = 1024**2


@pytest.fixture(scope="module")
def uri() -> Iterator[RepositoryUri]:
    """Written by the project's own writers, in some ten seconds; in memory where that is possible."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="flushpoint-", dir=shm if shm.is_dir() else None) as directory:
        path = Path(directory) / "repository"
        with make_repository(path) as repository:
            make(repository, SHAPE)
        yield local_uri(path)


def bounded(what: str, uri: RepositoryUri) -> dict[str, Any]:
    """What was found; the memory it took does not depend on how many points there are."""
    measured = measure_apart(what, uri)
    assert measured["growth_bytes"] < GROWTH_MIB * MIB, measured
    found: dict[str, Any] = measured["found"]
    return found


def test_all_points_are_listed_with_all_their_disks(uri: RepositoryUri) -> None:
    assert bounded("list", uri) == {"points": SHAPE.points, "disks": SHAPE.points * SHAPE.disks}


def test_every_disk_of_the_newest_point_is_planned(uri: RepositoryUri) -> None:
    found = bounded("plan", uri)
    assert found["disks"] == SHAPE.disks
    assert found["units"] >= SHAPE.disks


def test_a_check_finds_it_sound(uri: RepositoryUri) -> None:
    found = bounded("check", uri)
    assert (found["points"], found["damage"], found["orphans"]) == (SHAPE.points, 0, 0)


def test_a_dry_prune_names_all_but_the_last(uri: RepositoryUri) -> None:
    assert bounded("prune", uri) == {"kept": 10, "removed": SHAPE.points - 10}


def test_any_disk_of_any_point_is_restored_byte_for_byte(uri: RepositoryUri) -> None:
    dice = random.Random(0)
    chosen = [(1, 0), (SHAPE.points, SHAPE.disks - 1)]
    chosen += [(dice.randint(1, SHAPE.points), dice.randrange(SHAPE.disks)) for _ in range(10)]
    buffer = bytearray(DISK_BYTES)
    with Repository.open(uri, ACCESS) as repository:
        for epoch, disk in chosen:
            point = repository.decisions.point(GROUP, epoch)
            repository.disk(point, SHAPE.name(disk)).read_into(0, memoryview(buffer))
            assert buffer == SHAPE.content(disk, epoch), f"{SHAPE.name(disk)} at {epoch}"
