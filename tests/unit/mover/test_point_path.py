"""The fast path of a restore: streams of a recovery point, straight into the target."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.model.errors import DiskIOError
from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES, Extent, Status
from coordinator.model.job import Sync
from coordinator.model.repository_uri import parse_repository
from tests.repositories import DISK, BytesSource, backup, make_repository, publish_epoch, write_epoch
from workers.access import Access
from workers.mover.fastpath import FIRST_STREAMS, MOST_STREAMS, RANGE_BYTES, PointToDisk, open_fast_path
from workers.mover.lease import Halt
from workers.repository.index import SqliteIndex
from workers.repository.reader import PIECE_BLOCKS, Fetcher
from workers.repository.store.contract import ReadNext
from workers.repository.store.local import LocalStore
from workers.sources.repository import RepositorySource
from workers.targets.nothing import NoTarget

SEGMENTS = 8


class Memory(NoTarget):
    """A target that remembers."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.data = bytearray(size)

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


class Full(Memory):
    def write(self, offset: int, data: memoryview) -> None:
        raise DiskIOError("no room")


@pytest.fixture(scope="module")
def disk() -> bytes:
    """Data that does not shrink, data that does, equal blocks, zeroes, and an end in mid-block."""
    noise = random.Random(1)
    blocks = [noise.randbytes(BLOCK_BYTES) for _ in range(SEGMENTS * SEGMENT_BYTES // BLOCK_BYTES)]
    for index in range(0, len(blocks), 7):
        blocks[index] = noise.randbytes(BLOCK_BYTES // 2).ljust(BLOCK_BYTES, b"a")
    for index in range(3, len(blocks), 50):
        blocks[index] = bytes(BLOCK_BYTES)
        blocks[index + 1] = blocks[index + 2]
    return b"".join(blocks) + noise.randbytes(1000)


@pytest.fixture
def where(tmp_path: Path, disk: bytes) -> Path:
    """A repository with a full copy, and an increment that lies over it in one segment and in single blocks."""
    older = bytearray(disk)
    dirty = [Extent(SEGMENT_BYTES, SEGMENT_BYTES, Status.DIRTY)]
    dirty += [Extent(n * SEGMENT_BYTES, BLOCK_BYTES, Status.DIRTY) for n in range(3, SEGMENTS, 2)]
    for extent in dirty:
        older[extent.offset : extent.end] = b"o" * extent.length
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", older)
        publish_epoch(repository, write_epoch(repository, "g", BytesSource(disk), "dirty", extents=dirty))
    return tmp_path / "r"


@pytest.fixture
def source(where: Path) -> Iterator[RepositorySource]:
    uri = parse_repository(f"repo+file://{where}?group=g&disk=disk")
    with closing(RepositorySource(uri, Sync.FULL, Access(["/"], ["*"]))) as opened:
        yield opened


def on() -> Halt | None:
    return None


def ranges(source: RepositorySource) -> Iterator[tuple[int, int]]:
    for extent in source.extents(0, source.size):
        if extent.status is Status.DATA:
            for at in range(extent.offset, extent.end, RANGE_BYTES):
                yield at, min(RANGE_BYTES, extent.end - at)


def test_all_that_lies_side_by_side_is_streamed_and_the_rest_left(source: RepositorySource, disk: bytes) -> None:
    target = Memory(source.size)
    with closing(PointToDisk(source, target)) as path:
        done = path.copy(ranges(source), on)
    assert done.copied + sum(length for _, length in done.left) == sum(length for _, length in ranges(source))
    assert {offset for offset, _ in done.left} == {n * SEGMENT_BYTES for n in range(3, SEGMENTS, 2)}
    for offset, length in done.left:
        assert not any(target.data[offset : offset + length])
        source.read_into(offset, memoryview(target.data)[offset : offset + length])
    assert target.data == disk


def test_a_restore_to_anything_has_a_fast_path(source: RepositorySource) -> None:
    path = open_fast_path(source, Memory(source.size), 1.0)
    assert isinstance(path, PointToDisk)
    path.close()


@pytest.mark.parametrize("target_fails", [False, True])
def test_a_stream_that_fails_leaves_its_ranges_to_the_engine(
    source: RepositorySource, where: Path, disk: bytes, target_fails: bool
) -> None:
    target = Full(source.size) if target_fails else Memory(source.size)
    if not target_fails:
        for pack in (where / "packs").iterdir():
            whole = bytearray(pack.read_bytes())
            whole[200_000] ^= 1
            pack.write_bytes(whole)
    with closing(PointToDisk(source, target)) as path:
        done = path.copy(iter([(0, SEGMENT_BYTES)]), on)
    assert done.copied + sum(length for _, length in done.left) == SEGMENT_BYTES
    if target_fails:
        assert done.copied == 0
    else:  # what came before the damaged run was written, and counts
        assert done.left[0][0] < SEGMENT_BYTES
        assert target.data[: done.left[0][0]] == disk[: done.left[0][0]]
        assert not any(any(target.data[offset : offset + length]) for offset, length in done.left)


@pytest.mark.parametrize("halt", list(Halt))
def test_a_halt_is_felt_before_the_next_piece(source: RepositorySource, disk: bytes, halt: Halt) -> None:
    """Of a pause each batch that was begun writes one piece more, so that there is progress however low the speed."""
    asked: list[Halt | None] = []

    def halted() -> Halt | None:
        asked.append(halt if len(asked) >= 3 else None)
        return asked[-1]

    target = Memory(source.size)
    with closing(PointToDisk(source, target)) as path:
        done = path.copy(ranges(source), halted)
    assert 0 < done.copied <= (3 + (MOST_STREAMS if halt is Halt.YIELD else 0)) * RANGE_BYTES
    assert done.copied + sum(length for _, length in done.left) == sum(length for _, length in ranges(source))
    for offset, length in done.left:
        assert not any(target.data[offset : offset + length])


def test_a_range_of_parts_of_blocks_is_left_at_its_ends(source: RepositorySource, disk: bytes) -> None:
    target = Memory(source.size)
    with closing(PointToDisk(source, target)) as path:
        done = path.copy(iter([(2 * SEGMENT_BYTES + 100, 40 * BLOCK_BYTES)]), on)
    ends = [(2 * SEGMENT_BYTES + 100, BLOCK_BYTES - 100), (2 * SEGMENT_BYTES + 40 * BLOCK_BYTES, 100)]
    assert [left for left in done.left if left[1] != BLOCK_BYTES] == ends
    inner = slice(2 * SEGMENT_BYTES + BLOCK_BYTES, 2 * SEGMENT_BYTES + 2 * BLOCK_BYTES)
    assert target.data[inner] == disk[inner]


def test_who_waits_for_the_store_opens_more_streams(source: RepositorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lock = LocalStore.stream_range, threading.Lock()
    now = most = 0

    def slow(store: LocalStore, key: str, offset: int, length: int, consume: Callable[[ReadNext], None]) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.2)  # what is tried is that a process which waits is seen to
        whole(store, key, offset, length, consume)
        with lock:
            now -= 1

    monkeypatch.setattr(LocalStore, "stream_range", slow)
    with closing(PointToDisk(source, Memory(source.size))) as path:
        path.copy(ranges(source), on)
        assert 1 < most <= FIRST_STREAMS
        path.copy(ranges(source), on)
    assert FIRST_STREAMS < most <= MOST_STREAMS


@pytest.mark.parametrize("kept", [100, BLOCK_BYTES], ids=["shrinks", "does not"])
@pytest.mark.parametrize("times", [2, 3])
def test_blocks_that_share_what_is_stored_are_all_written(tmp_path: Path, kept: int, times: int) -> None:
    """A segment holds the blocks of another, several times and in the wrong order: none of it is stored again."""
    noise = random.Random(2)
    blocks = [noise.randbytes(kept).ljust(BLOCK_BYTES, b"a") for _ in range(SEGMENT_BYTES // BLOCK_BYTES)]
    first = b"".join(blocks)
    data = first + b"".join(block * times for block in reversed(blocks[: len(blocks) // times]))
    with make_repository(tmp_path / "r") as repository:
        with closing(SqliteIndex(tmp_path / "index", frozenset(), lambda pack: True)) as index:
            publish_epoch(repository, write_epoch(repository, "first", BytesSource(first), "full", index=index))
            written = write_epoch(repository, "g", BytesSource(data), "full", index=index)
            assert written.sent == 0
            point = publish_epoch(repository, written)
        target = Memory(len(data))
        assert repository.disk(point, DISK).stream([(0, len(data))], target.write) == []
        assert target.data == data


def test_a_block_that_fills_a_disk_is_opened_once_and_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"\xff" * 2 * SEGMENT_BYTES
    with make_repository(tmp_path / "r") as repository:
        with closing(SqliteIndex(tmp_path / "index", frozenset(), lambda pack: True)) as index:
            one = BytesSource(data[:BLOCK_BYTES])
            publish_epoch(repository, write_epoch(repository, "one", one, "full", index=index))
            point = publish_epoch(repository, write_epoch(repository, "g", BytesSource(data), "full", index=index))
        opened, block = [], Fetcher.block
        monkeypatch.setattr(Fetcher, "block", lambda *args: opened.append(args[2]) or block(*args))
        lengths: list[int] = []
        assert repository.disk(point, DISK).stream([(0, len(data))], lambda _, piece: lengths.append(len(piece))) == []
    assert sum(lengths) == len(data)
    assert max(lengths) == PIECE_BLOCKS * BLOCK_BYTES
    assert len(opened) == len(set(opened)) == 1
