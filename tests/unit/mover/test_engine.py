"""The copy engine over disks in memory: every wanted byte arrives, failures stay, zeroes are punched."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.model.errors import DiskIOError, Side
from coordinator.model.extent import BLOCK_BYTES, Extent, Status
from workers.mover.engine import REQUEST_BYTES, Engine, Orders, Outcome, _Queue
from workers.mover.lease import Halt
from workers.mover.pace import Step, Window

KIB = 1024
SIZE = 3 * REQUEST_BYTES + 12_345


class MemoryDisk:
    """Source and target in one; fails at `bad` offsets, counts what is done to it."""

    def __init__(self, content: bytes, bad: frozenset[int] = frozenset()) -> None:
        self.content = bytearray(content)
        self.size = len(content)
        self.bad = bad
        self.zeroed: list[tuple[int, int]] = []
        self.can_zero = True
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


# -- zeroing, slow targets, the speed ---------------------------------------------------------------------------

GIB = 1024**3


class GatedDisk(MemoryDisk):
    """A target that stores nothing, so that it may be of any size; waits at the gate."""

    def __init__(self, can_zero: bool = True) -> None:
        super().__init__(b"")
        self.can_zero = can_zero
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)

    def write(self, offset: int, data: memoryview) -> None:
        self._pass()

    def write_zeroes(self, offset: int, length: int) -> None:
        with self._lock:
            self.zeroed.append((offset, length))
        self._pass()

    def _pass(self) -> None:
        self.entered.release()
        assert self.gate.wait(5)


class Admissions(NoLimit):
    """Admits the first `bytes` and remembers all that were asked for."""

    def __init__(self, bytes_: int) -> None:
        self.left = bytes_
        self.asked: list[int] = []

    def admit(self, length: int, lease: StillLease) -> bool:
        self.asked.append(length)
        self.left -= length
        return self.left >= 0


def copy_to(
    engine: Engine, target: MemoryDisk, extents: list[Extent], orders: Orders, rate: NoLimit, lease: StillLease
) -> Outcome:
    return engine.copy(MemoryDisk(b""), target, extents, orders, lease, rate)  # type: ignore[arg-type]


def test_a_target_that_zeroes_slowly_has_little_to_zero_when_the_mover_is_told_to_stop(engine: Engine) -> None:
    target, lease = GatedDisk(), StillLease()
    extents = [Extent(0, 64 * GIB, Status.ZERO)]
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(copy_to, engine, target, extents, Orders(), NoLimit(), lease)
        assert target.entered.acquire(timeout=5)
        lease.halt = Halt.YIELD
        target.gate.set()
        outcome = copying.result(5)
    done = sum(length for _, length in target.zeroed)
    assert done <= 4 * REQUEST_BYTES
    assert outcome.remaining == [Extent(done, 64 * GIB - done, Status.ZERO)]


def test_a_target_that_zeroes_quickly_is_asked_for_gigabytes(engine: Engine) -> None:
    target = GatedDisk()
    target.gate.set()
    copy_to(engine, target, [Extent(0, 1024 * GIB, Status.ZERO)], Orders(), NoLimit(), StillLease())
    assert sum(length for _, length in target.zeroed) == 1024 * GIB
    assert len(target.zeroed) < 1200


def test_no_more_than_a_step_of_zeroes_is_in_flight() -> None:
    """What was quick to zero so far may be followed by what is not."""
    window, step = Window(4), Step(GIB)
    while step.bytes < GIB:
        window.took(0)
        step.took(step.bytes, 0)
    soon = Orders(ends_at=time.monotonic() + 0.2)
    extents = [Extent(0, 4 * GIB, Status.ZERO)]
    queue = _Queue(extents, GatedDisk(), soon, window, step, StillLease())  # type: ignore[arg-type]
    first = queue.take()
    assert first == Extent(0, GIB, Status.ZERO)
    assert queue.take() is None  # it waited for the first until the slice was over
    queue.give_back(first)
    assert queue.left() == extents


def test_requests_in_flight_are_as_many_as_the_target_is_quick_for(engine: Engine) -> None:
    """The first is alone: nobody knows yet whether a second would not only wait for it."""
    target, lease = GatedDisk(), StillLease()
    source = MemoryDisk(b"d" * 8 * REQUEST_BYTES)
    extents = [Extent(0, source.size, Status.DATA)]
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(engine.copy, source, target, extents, Orders(), lease, NoLimit())  # type: ignore[arg-type]
        assert target.entered.acquire(timeout=5)
        assert not target.entered.acquire(timeout=0.2)
        target.gate.set()
        assert copying.result(5).bytes_sent == source.size


def test_zeroes_that_have_to_be_sent_are_admitted_and_count_as_sent(engine: Engine) -> None:
    target, rate = GatedDisk(can_zero=False), Admissions(100 * REQUEST_BYTES)
    target.gate.set()
    outcome = copy_to(engine, target, [Extent(0, 32 * REQUEST_BYTES, Status.ZERO)], Orders(), rate, StillLease())
    assert rate.asked == [REQUEST_BYTES] * 32
    assert outcome.bytes_sent == 32 * REQUEST_BYTES
    assert outcome.bytes_read == 0


def test_zeroes_found_in_data_count_as_sent_where_they_have_to_be_sent(engine: Engine) -> None:
    content = b"d" * BLOCK_BYTES + bytes(3 * BLOCK_BYTES)
    target = MemoryDisk(b"o" * len(content))
    target.can_zero = False
    outcome = run(engine, MemoryDisk(content), target, [Extent(0, len(content), Status.DATA)], Orders())
    assert outcome.bytes_sent == len(content)


def test_what_the_speed_does_not_admit_is_not_zeroed_and_remains(engine: Engine) -> None:
    target = GatedDisk(can_zero=False)
    target.gate.set()
    extents = [Extent(0, GIB, Status.ZERO)]
    outcome = copy_to(engine, target, extents, Orders(), Admissions(0), StillLease())
    assert target.zeroed == []
    assert outcome.remaining == extents


def test_zeroes_that_the_target_can_be_told_cost_nothing(engine: Engine) -> None:
    target = GatedDisk()
    target.gate.set()
    outcome = copy_to(engine, target, [Extent(0, GIB, Status.ZERO)], Orders(), Admissions(0), StillLease())
    assert outcome.remaining == []
    assert outcome.bytes_sent == 0


def test_a_compare_of_zeroes_pays_for_what_it_reads(engine: Engine) -> None:
    target = MemoryDisk(bytes(SIZE))
    rate = Admissions(100 * SIZE)
    copy_to(engine, target, [Extent(0, SIZE, Status.ZERO)], Orders(compare=True), rate, StillLease())
    assert sum(rate.asked) == SIZE
