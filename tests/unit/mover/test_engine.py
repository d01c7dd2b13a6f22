"""The copy engine over disks in memory: every wanted byte arrives, failures stay, zeroes are punched."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.model.errors import DiskIOError, Side
from coordinator.model.extent import BLOCK_BYTES, Extent, Status
from workers.mover.engine import REQUEST_BYTES, Engine, Orders, Outcome
from workers.mover.lease import Halt

KIB = 1024
SIZE = 3 * REQUEST_BYTES + 12_345


class MemoryDisk:
    """Source and target in one; fails at `bad` offsets, counts what is done to it."""

    def __init__(self, content: bytes, bad: frozenset[int] = frozenset()) -> None:
        self.content = bytearray(content)
        self.size = len(content)
        self.bad = bad
        self.zeroed: list[tuple[int, int]] = []
        self.written = 0
        self._lock = threading.Lock()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, Status.DATA)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._fail(offset, len(buffer))
        buffer[:] = self.content[offset : offset + len(buffer)]

    def write(self, offset: int, data: memoryview) -> None:
        self._fail(offset, len(data))
        with self._lock:
            self.content[offset : offset + len(data)] = data
            self.written += len(data)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._fail(offset, length)
        with self._lock:
            self.content[offset : offset + length] = bytes(length)
            self.zeroed.append((offset, length))

    def _fail(self, offset: int, length: int) -> None:
        for bad in self.bad:
            if offset <= bad < offset + length:
                raise DiskIOError(f"bad at {bad}", errno_=errno.EIO, offset=offset, length=length)


class StillLease:
    """A lease that is simply held, or halted."""

    def __init__(self, halt: Halt | None = None) -> None:
        self.halt = halt
        self.speed = 0


class NoLimit:
    def admit(self, length: int, lease: StillLease) -> bool:
        return True


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(4)
    yield engine
    engine.close()


def run(
    engine: Engine,
    source: MemoryDisk,
    target: MemoryDisk,
    extents: list[Extent],
    orders: Orders,
    halt: Halt | None = None,
) -> Outcome:
    return engine.copy(source, target, extents, orders, StillLease(halt), NoLimit())  # type: ignore[arg-type]


@st.composite
def disks(draw: st.DrawFn) -> bytes:
    """Blocks of zeroes and of data that begins or ends with zeroes."""
    blocks = []
    for _ in range(SIZE // BLOCK_BYTES + 1):
        kind = draw(st.sampled_from(["zero", "data", "late", "early"]))
        blocks.append(
            {
                "zero": bytes(BLOCK_BYTES),
                "data": b"d" * BLOCK_BYTES,
                "late": bytes(BLOCK_BYTES - 1) + b"x",
                "early": b"x" + bytes(BLOCK_BYTES - 1),
            }[kind]
        )
    return b"".join(blocks)[:SIZE]


@given(content=disks(), old=st.sampled_from([0, 7]), compare=st.booleans())
def test_a_copy_equals_its_source_whatever_the_target_held(
    engine: Engine, content: bytes, old: int, compare: bool
) -> None:
    source, target = MemoryDisk(content), MemoryDisk(bytes([old]) * SIZE)
    outcome = run(engine, source, target, [Extent(0, SIZE, Status.DATA)], Orders(compare=compare))
    assert target.content == source.content
    assert outcome.remaining == []
    assert outcome.bytes_read == SIZE


@given(content=disks())
def test_only_blocks_that_differ_are_sent_when_comparing(engine: Engine, content: bytes) -> None:
    target = MemoryDisk(content)
    target.content[BLOCK_BYTES * 5 + 3] ^= 1
    outcome = run(engine, MemoryDisk(content), target, [Extent(0, SIZE, Status.DATA)], Orders(compare=True))
    assert target.content == content
    assert outcome.bytes_sent <= BLOCK_BYTES
    assert target.written + sum(n for _, n in target.zeroed) == BLOCK_BYTES


def test_zeroes_in_data_are_zeroed_and_on_a_zeroed_target_left_alone(engine: Engine) -> None:
    content = b"d" * BLOCK_BYTES + bytes(BLOCK_BYTES * 3) + b"d" * BLOCK_BYTES
    whole = [Extent(0, len(content), Status.DATA)]
    target = MemoryDisk(b"o" * len(content))
    run(engine, MemoryDisk(content), target, whole, Orders())
    assert target.zeroed == [(BLOCK_BYTES, 3 * BLOCK_BYTES)]
    fresh = MemoryDisk(bytes(len(content)))
    outcome = run(engine, MemoryDisk(content), fresh, whole, Orders(target_zeroed=True))
    assert fresh.zeroed == []
    assert fresh.content == content
    assert outcome.bytes_sent == 2 * BLOCK_BYTES


@given(st.sets(st.integers(0, SIZE - 1), max_size=3), st.sampled_from(Side))
def test_what_failed_remains_and_all_else_is_copied(engine: Engine, bad: set[int], side: Side) -> None:
    content = b"d" * SIZE
    source = MemoryDisk(content, frozenset(bad) if side is Side.SOURCE else frozenset())
    target = MemoryDisk(bytes(SIZE), frozenset(bad) if side is Side.TARGET else frozenset())
    outcome = run(engine, source, target, [Extent(0, SIZE, Status.DATA)], Orders())
    assert all(any(e.offset <= b < e.end for e in outcome.remaining) for b in bad)
    assert {f.side for f in outcome.failures} <= {side}
    left = sum(e.length for e in outcome.remaining)
    assert outcome.bytes_sent == SIZE - left
    for extent in outcome.remaining:
        target.content[extent.offset : extent.end] = b"d" * extent.length
    assert target.content == content


def test_a_halted_lease_starts_nothing_and_everything_remains(engine: Engine) -> None:
    extents = [Extent(0, SIZE, Status.DATA)]
    target = MemoryDisk(bytes(SIZE))
    outcome = run(engine, MemoryDisk(b"d" * SIZE), target, extents, Orders(), Halt.YIELD)
    assert outcome.remaining == extents
    assert target.written == 0


@given(content=disks())
def test_a_digest_tells_any_changed_byte(engine: Engine, content: bytes) -> None:
    extents = [
        Extent(0, 2 * REQUEST_BYTES, Status.DATA),
        Extent(2 * REQUEST_BYTES, SIZE - 2 * REQUEST_BYTES, Status.ZERO),
    ]
    target = MemoryDisk(b"o" * SIZE)
    outcome = run(engine, MemoryDisk(content), target, extents, Orders(digest=True))
    assert engine.digest_of(target.read_into, extents) == outcome.digest
    for place in (0, REQUEST_BYTES, SIZE - 1):
        target.content[place] ^= 1
        assert engine.digest_of(target.read_into, extents) != outcome.digest
        target.content[place] ^= 1


def test_memory_is_bounded_by_depth_and_not_by_the_unit(engine: Engine) -> None:
    buffers = {id(engine._buffer("source", 1).obj)}
    with ThreadPoolExecutor(1) as other:
        buffers.add(other.submit(lambda: id(engine._buffer("source", 1).obj)).result())
    assert len(buffers) == 2  # one a thread, of one request each
    assert len(engine._buffer("source", REQUEST_BYTES)) == REQUEST_BYTES
