"""What is asked of the store: everything once, side by side where there is much, and nothing that is not needed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES, Extent, Status
from coordinator.model.point import Decision
from tests.repositories import (
    DISK,
    BytesSource,
    backup,
    make_repository,
    publish_epoch,
    publish_members,
    write_epoch,
)
from workers.repository.check import check
from workers.repository.compact import compact
from workers.repository.epochs import open_epoch
from workers.repository.reader import Fetcher, PointDisk
from workers.repository.repository import Repository
from workers.repository.segment_map import MapRef, SegmentMap
from workers.repository.store.contract import Buffer, ObjectInfo
from workers.repository.store.local import LocalStore

POINTS = 5


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with make_repository(tmp_path / "r") as made:
        yield made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often an object is read, whole or in part, and how often listed, by key and prefix."""
    found: Counter[str] = Counter()
    get, get_range, listing = LocalStore.get, LocalStore.get_range, LocalStore.list

    def counted_get(store: LocalStore, key: str) -> bytes:
        found[key] += 1
        return get(store, key)

    def counted_get_range(store: LocalStore, key: str, offset: int, length: int) -> bytes:
        found[key] += 1
        return get_range(store, key, offset, length)

    def counted_list(store: LocalStore, prefix: str) -> Iterator[ObjectInfo]:
        found[prefix] += 1
        return listing(store, prefix)

    monkeypatch.setattr(LocalStore, "get", counted_get)
    monkeypatch.setattr(LocalStore, "get_range", counted_get_range)
    monkeypatch.setattr(LocalStore, "list", counted_list)
    return found


def named_again(repository: Repository, point: Decision) -> Decision:
    """A point that names the same roots."""
    epoch = open_epoch(repository, point.group, DISK, "job", lambda owner: True)
    return publish_members(repository, epoch, point.members)


def test_manifests_are_read_side_by_side(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first, whose answer may be all that is wanted, each waits for another to be on its way."""
    first = backup(repository, "g", b"a" * 1000)
    for _ in range(POINTS - 1):
        named_again(repository, first)
    meeting, get = threading.Barrier(2, timeout=10), LocalStore.get

    def met(store: LocalStore, key: str) -> bytes:
        if not key.endswith("/0000000001.json"):
            meeting.wait()
        return get(store, key)

    group = repository.decisions.group("g")
    monkeypatch.setattr(LocalStore, "get", met)
    assert [point.epoch for point in repository.decisions.points(group)] == list(range(1, POINTS + 1))


def test_a_named_point_is_opened_without_a_list_of_the_others(repository: Repository, asked: Counter[str]) -> None:
    first = backup(repository, "g", b"a" * 1000)
    named_again(repository, first)
    asked.clear()
    point, _ = repository.decisions.hold_point("g", 1, "hold", "test")
    assert point.epoch == first.epoch
    assert asked.keys() == {"groups/g/retained/", "groups/g/points/0000000001.json"}


def test_the_newest_point_is_found_without_reading_older_ones(repository: Repository, asked: Counter[str]) -> None:
    first = backup(repository, "g", b"a" * 1000)
    newest = named_again(repository, named_again(repository, first))
    asked.clear()
    assert repository.decisions.point("g", 0).epoch == newest.epoch
    assert [key for key in asked if "/points/" in key] == ["groups/g/points/0000000003.json"]


def test_a_root_that_many_points_name_is_checked_once(repository: Repository, asked: Counter[str]) -> None:
    first = backup(repository, "g", b"a" * 1000)
    for _ in range(POINTS):
        named_again(repository, first)
    asked.clear()
    assert check(repository).damage == []
    assert asked[first.members[0].root] == 3, "as a whole, its directory, its one page"


@pytest.mark.parametrize("look", [check, partial(compact, live_share=0.0)], ids=["check", "compact"])
def test_a_map_that_many_pages_name_is_read_once(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, look: Callable[[Repository], object]
) -> None:
    data = bytearray(b"a" * SEGMENT_BYTES + b"b" * BLOCK_BYTES)
    backup(repository, "g", data)
    for number in range(POINTS):
        data[-1] = number
        changed = [Extent(SEGMENT_BYTES, BLOCK_BYTES, Status.DIRTY)]
        publish_epoch(repository, write_epoch(repository, "g", BytesSource(data), "dirty", extents=changed))
    read: list[MapRef] = []
    whole = Fetcher.map

    def counted(fetcher: Fetcher, disk: str, ref: MapRef, stored: Buffer | None = None) -> SegmentMap:
        read.append(ref)
        return whole(fetcher, disk, ref, stored)

    monkeypatch.setattr(Fetcher, "map", counted)
    look(repository)
    assert len(set(read)) == len(read) == 2 + POINTS


def test_all_between_two_segments_that_hold_data_is_one_hole(repository: Repository) -> None:
    data = bytearray(5 * SEGMENT_BYTES + 1000)
    data[:10] = data[-10:] = b"0123456789"
    disk = repository.disk(backup(repository, "g", data), DISK)
    found = list(disk.extents(0, len(data)))
    last = 5 * SEGMENT_BYTES
    assert [extent for extent in found if extent.status is Status.DATA] == [
        Extent(0, BLOCK_BYTES, Status.DATA),
        Extent(last, 1000, Status.DATA),
    ]
    assert Extent(SEGMENT_BYTES, last - SEGMENT_BYTES, Status.HOLE) in found
    assert list(disk.extents(SEGMENT_BYTES + 5, 10)) == [Extent(SEGMENT_BYTES + 5, 10, Status.HOLE)]
    assert list(disk.extents(last + 5, 10**6)) == [Extent(last + 5, 995, Status.DATA)]


def test_maps_are_fetched_ahead_of_the_extents_that_are_asked_for(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each segment's newest map is in another pack, as after many epochs; after the first, two are on their way."""
    data = bytearray(b"a" * (4 * SEGMENT_BYTES + BLOCK_BYTES))
    point = backup(repository, "g", data)
    for segment in range(5):
        data[segment * SEGMENT_BYTES] = 0
        changed = [Extent(segment * SEGMENT_BYTES, BLOCK_BYTES, Status.DIRTY)]
        point = publish_epoch(repository, write_epoch(repository, "g", BytesSource(data), "dirty", extents=changed))
    meeting, whole = threading.Barrier(2, timeout=10), Fetcher.map

    def met(fetcher: Fetcher, disk: str, ref: MapRef, stored: Buffer | None = None) -> SegmentMap:
        if ref.segment:
            meeting.wait()
        return whole(fetcher, disk, ref, stored)

    disk = repository.disk(point, DISK)
    monkeypatch.setattr(Fetcher, "map", met)
    assert sum(extent.length for extent in disk.extents(0, len(data))) == len(data)


def test_maps_of_neighbours_in_different_packs_cost_a_request_a_pack(
    repository: Repository, asked: Counter[str]
) -> None:
    """As after some epochs that each wrote here and there: a request a map would grow with every epoch."""
    epochs, segments = 4, 32
    data = bytearray(segments * SEGMENT_BYTES)
    starts = [segment * SEGMENT_BYTES for segment in range(segments)]
    for start in starts:
        data[start] = 1
    point = backup(repository, "g", data)
    for number in range(epochs):
        dirty = starts[number :: epochs + 1]
        for start in dirty:
            data[start] = 2
        changed = [Extent(start, BLOCK_BYTES, Status.DIRTY) for start in dirty]
        point = publish_epoch(repository, write_epoch(repository, "g", BytesSource(data), "dirty", extents=changed))
    disk = repository.disk(point, DISK)
    asked.clear()
    assert [extent.offset for extent in disk.extents(0, len(data)) if extent.status is Status.DATA] == starts
    assert sorted(count for key, count in asked.items() if key.startswith("packs/")) == [1] * (epochs + 1)
    assert bytes(data[starts[-1] :][:10]) == disk_bytes(disk, starts[-1], 10)


def disk_bytes(disk: PointDisk, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)
