"""Copies the extents of one unit from a source to a target: many requests in flight, bounded memory.

`depth` threads share one list of chunks; each reads a chunk into a buffer of its own and writes it, so at most
depth x REQUEST_BYTES (twice that when comparing) are held, whatever the disk's size.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import blake3

from coordinator.model.errors import DiskIOError, Side
from coordinator.model.extent import BLOCK_BYTES, Extent, merge_adjacent
from workers.failpoint import pass_point
from workers.mover.lease import Lease
from workers.mover.pace import Step, Window
from workers.mover.rate import RateLimit
from workers.sources.contract import Source
from workers.targets.contract import Target

REQUEST_BYTES = 1024 * 1024
"""One read or write. Larger ones do not go faster on loopback, and hold more memory."""
ZERO_REQUEST_BYTES = 1024 * 1024 * 1024
"""The longest write-zeroes, for a target that is quick about it; NBD lengths end below 4 GiB."""
LOOK_S = 0.05
"""How often a thread that waits for its turn looks whether it is to stop."""
_ZEROES = bytes(REQUEST_BYTES)


@dataclass(frozen=True, slots=True)
class Failure:
    """An I/O error at an extent; the extent stays to be copied."""

    side: Side
    error: DiskIOError
    extent: Extent


@dataclass(slots=True)
class Outcome:
    """What became of a unit. Bytes count when done, not when asked for."""

    bytes_read: int = 0
    bytes_sent: int = 0
    failures: list[Failure] = field(default_factory=list)
    remaining: list[Extent] = field(default_factory=list)
    digest: str = ""

    def add(self, read: int, sent: int) -> None:
        self.bytes_read += read
        self.bytes_sent += sent


@dataclass(frozen=True, slots=True)
class Orders:
    """How a unit is to be copied."""

    compare: bool = False
    """Read the target too and write only what differs."""
    target_zeroed: bool = False
    """Zeroes need not be written: the target reads as zeroes where nothing was written."""
    count_zeroes: bool = False
    """Zeroed bytes count as sent: after a comparing pass 0 bytes sent means that nothing differed. They always do
    where the target cannot zero, since there they are sent."""
    digest: bool = False
    ends_at: float = math.inf
    """Monotonic time after which no new request is started."""


class Engine:
    """Owns the threads and the buffers of a mover; one unit at a time."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="copy")
        self._buffers = threading.local()
        self._paced: Target | None = None
        """The target whose pace is known."""
        self._window = Window(depth)
        self._zero_step = Step(ZERO_REQUEST_BYTES)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def copy(
        self, source: Source, target: Target, extents: Iterable[Extent], orders: Orders, lease: Lease, rate: RateLimit
    ) -> Outcome:
        """Copy `extents` (sorted); returns when nothing is in flight any more. Does not flush."""
        outcome = Outcome()
        extents = list(extents)
        if not extents:
            return outcome
        if self._paced is not target:
            self._paced, self._window, self._zero_step = target, Window(self._depth), Step(ZERO_REQUEST_BYTES)
        queue = _Queue(extents, target, orders, self._window, self._zero_step, lease)
        digests: dict[int, bytes] = {}
        lock = threading.Lock()

        def admit(length: int) -> None:
            if length and not rate.admit(length, lease):
                raise _HaltedError

        def work() -> None:
            while (chunk := queue.take()) is not None:
                try:
                    admit(_cost(target, chunk, orders))
                    begun = time.monotonic()
                    read, sent, digest = self._move(source, target, chunk, orders, admit)
                except _HaltedError:
                    queue.give_back(chunk)
                    return
                except _SideError as failed:
                    with lock:
                        outcome.failures.append(Failure(failed.side, failed.error, chunk))
                    queue.give_back(chunk)
                    if failed.error.offset < 0:
                        return  # the connection is gone: the others will find out as well
                    continue
                queue.done(chunk, time.monotonic() - begun)
                with lock:
                    outcome.add(read, sent)
                    if orders.digest:
                        digests[chunk.offset] = digest

        futures = [self._pool.submit(work) for _ in range(self._depth)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            queue.close()  # whatever happened: nobody writes any more when this returns
            wait(futures)
        for future in futures:
            future.result()
        outcome.remaining = queue.left()
        if orders.digest:
            outcome.digest = blake3.blake3(b"".join(digests[offset] for offset in sorted(digests))).hexdigest()
        return outcome

    def digest_of(self, read_into: Callable[[int, memoryview], None], extents: Iterable[Extent]) -> str:
        """The digest `copy` would give for what a disk holds at `extents` now. DiskIOError if it cannot be read.

        A range of zeroes adds nothing to it, so that it does not matter in which steps it was zeroed.
        """

        def one(chunk: Extent) -> bytes:
            if chunk.reads_as_zeroes:
                return b"" if self._is_zero_range(read_into, chunk) else b"not zeroes"
            buffer = self._buffer("source", chunk.length)
            read_into(chunk.offset, buffer)
            return blake3.blake3(buffer).digest()

        parts = self._pool.map(one, _chunks(extents))
        return blake3.blake3(b"".join(parts)).hexdigest()

    def _is_zero_range(self, read_into: Callable[[int, memoryview], None], chunk: Extent) -> bool:
        for offset in range(chunk.offset, chunk.end, REQUEST_BYTES):
            buffer = self._buffer("source", min(REQUEST_BYTES, chunk.end - offset))
            read_into(offset, buffer)
            if not _ZEROES.startswith(buffer):
                return False
        return True

    def _buffer(self, name: str, length: int) -> memoryview:
        buffer: bytearray | None = getattr(self._buffers, name, None)
        if buffer is None:
            buffer = bytearray(REQUEST_BYTES)
            setattr(self._buffers, name, buffer)
        return memoryview(buffer)[:length]

    def _move(
        self, source: Source, target: Target, chunk: Extent, orders: Orders, admit: Callable[[int], None]
    ) -> tuple[int, int, bytes]:
        """Bytes read, bytes sent, digest. `admit` waits until more bytes than the chunk's may go, or _HaltedError."""
        if chunk.reads_as_zeroes and orders.compare:
            return 0, self._compare_zeroes(target, chunk, admit), b""
        if chunk.reads_as_zeroes:
            with _blame(Side.TARGET):
                target.write_zeroes(chunk.offset, chunk.length)
            return 0, _zeroes_sent(target, chunk.length, orders), b""
        data = self._buffer("source", chunk.length)
        with _blame(Side.SOURCE):
            source.read_into(chunk.offset, data)
        digest = blake3.blake3(data).digest() if orders.digest else b""
        pass_point("between-read-and-write")
        if orders.compare:
            old = self._buffer("target", chunk.length)
            with _blame(Side.TARGET):
                target.read_into(chunk.offset, old)
            runs = _differing(data, old)
        else:
            runs = [(0, chunk.length)]
        sent = 0
        with _blame(Side.TARGET):
            for start, end in runs:
                sent += _write_run(target, chunk.offset, data, start, end, orders)
        return chunk.length, sent, digest

    def _compare_zeroes(self, target: Target, chunk: Extent, admit: Callable[[int], None]) -> int:
        """Zero what does not read as zeroes; returns how much that was, which counts as sent: it differed.

        What the target knows to be zeroes is not read, or a sparse disk would take as long as a full one.
        """
        changed = 0
        with _blame(Side.TARGET):
            unknown = [e for e in target.extents(chunk.offset, chunk.length) if not e.reads_as_zeroes]
            admit(sum(extent.length for extent in unknown))  # all at once: a change, once made, is to be counted
            for piece in _chunks(unknown):
                old = self._buffer("target", piece.length)
                target.read_into(piece.offset, old)
                if not _ZEROES.startswith(old):
                    target.write_zeroes(piece.offset, piece.length)
                    changed += piece.length
        return changed


class _HaltedError(Exception):
    """The mover is to stop, and has written nothing of the chunk."""


class _SideError(Exception):
    def __init__(self, side: Side, error: DiskIOError) -> None:
        super().__init__(str(error))
        self.side = side
        self.error = error


class _blame:  # reads as a statement
    """Marks a DiskIOError with the side it came from."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DiskIOError):
            raise _SideError(self._side, error) from error


def _cost(target: Target, chunk: Extent, orders: Orders) -> int:
    """Bytes that the rate must admit before a chunk is begun. A compare of zeroes asks for what it has to read."""
    if chunk.reads_as_zeroes and (target.can_zero or orders.compare):
        return 0
    return chunk.length


class _Queue:
    """Chunks of a unit, handed out one by one until the lease halts or the time slice is over.

    Requests in flight are bounded by `window`, and zeroes also in bytes: a target that has been quick to zero may come
    to a range where it is not.
    """

    def __init__(
        self,
        extents: Iterable[Extent],
        target: Target,
        orders: Orders,
        window: Window,
        zero_step: Step,
        lease: Lease,
    ) -> None:
        self._extents = iter(extents)
        self._rest: Extent | None = None
        """What is still to be handed out of the extent that is being cut up."""
        self._changed = threading.Condition()
        self._given_back: list[Extent] = []
        self._in_flight: set[Extent] = set()
        self._target = target
        self._comparing = orders.compare
        self._ends_at = orders.ends_at
        self._window = window
        self._zero_step = zero_step
        self._lease = lease

    def close(self) -> None:
        """Hand out no more."""
        with self._changed:
            self._ends_at = -math.inf
            self._changed.notify_all()

    def take(self) -> Extent | None:
        """The next chunk, which ends with `done` or `give_back`; None at the end."""
        with self._changed:
            while self._lease.halt is None and time.monotonic() < self._ends_at:
                self._rest = self._rest or next(self._extents, None)
                if self._rest is None:
                    return None
                chunk, rest = _cut(self._rest, self._step(self._rest))
                if self._has_room(chunk):
                    self._rest = rest
                    self._in_flight.add(chunk)
                    self._changed.notify()  # who waits may find room for one more
                    return chunk
                self._changed.wait(LOOK_S)
            return None

    def done(self, chunk: Extent, seconds: float) -> None:
        with self._changed:
            self._in_flight.discard(chunk)
            if chunk.reads_as_zeroes:
                self._zero_step.took(chunk.length, seconds)
            if chunk.length <= REQUEST_BYTES:
                self._window.took(seconds)
            self._changed.notify()

    def give_back(self, chunk: Extent) -> None:
        with self._changed:
            self._in_flight.discard(chunk)
            self._given_back.append(chunk)
            self._changed.notify()

    def left(self) -> list[Extent]:
        """What was not copied, sorted."""
        rest = [] if self._rest is None else [self._rest]
        left = sorted([*self._given_back, *rest, *self._extents], key=lambda e: e.offset)
        return list(merge_adjacent(left))

    def _step(self, extent: Extent) -> int:
        """Zeroes that have to be sent go in requests of the size of others."""
        return self._zero_step.bytes if extent.reads_as_zeroes and self._target.can_zero else REQUEST_BYTES

    def _has_room(self, chunk: Extent) -> bool:
        if not self._in_flight:
            return True
        if len(self._in_flight) >= self._window.size:
            return False
        if self._comparing or not chunk.reads_as_zeroes:  # a compare reads first, a request at a time
            return True
        zeroes = chunk.length + sum(other.length for other in self._in_flight if other.reads_as_zeroes)
        return zeroes <= max(self._zero_step.bytes, self._window.size * REQUEST_BYTES)


def _cut(extent: Extent, step: int) -> tuple[Extent, Extent | None]:
    """The part of an extent up to the next multiple of `step`, and the rest."""
    end = (extent.offset // step + 1) * step
    if extent.end <= end:
        return extent, None
    return Extent(extent.offset, end - extent.offset, extent.status), Extent(end, extent.end - end, extent.status)


def _chunks(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Requests that read: of at most REQUEST_BYTES, aligned to it; zeroes of at most ZERO_REQUEST_BYTES."""
    for extent in extents:
        rest: Extent | None = extent
        while rest is not None:
            chunk, rest = _cut(rest, ZERO_REQUEST_BYTES if extent.reads_as_zeroes else REQUEST_BYTES)
            yield chunk


def _differing(new: memoryview, old: memoryview) -> list[tuple[int, int]]:
    """[start, end) runs of blocks that differ, in bytes from the chunk's start."""
    runs: list[tuple[int, int]] = []
    whole = old.obj
    assert isinstance(whole, bytearray)
    for start in range(0, len(new), BLOCK_BYTES):
        end = min(start + BLOCK_BYTES, len(new))
        if whole.startswith(new[start:end], start):  # memcmp; comparing memoryviews goes item by item
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def _write_run(target: Target, base: int, data: memoryview, start: int, end: int, orders: Orders) -> int:
    """Write [start, end) of `data` at `base` + start, blocks of zeroes as such; returns the bytes sent."""
    sent = 0
    run = start
    while run < end:
        zero = _is_zero(data, run, end)
        stop = run
        while stop < end and _is_zero(data, stop, end) == zero:
            stop = min(stop + BLOCK_BYTES, end)
        if not zero:
            target.write(base + run, data[run:stop])
            sent += stop - run
        elif not orders.target_zeroed:
            target.write_zeroes(base + run, stop - run)
            sent += _zeroes_sent(target, stop - run, orders)
        run = stop
    return sent


def _zeroes_sent(target: Target, length: int, orders: Orders) -> int:
    return length if orders.count_zeroes or not target.can_zero else 0


def _is_zero(data: memoryview, start: int, end: int) -> bool:
    block = data[start : min(start + BLOCK_BYTES, end)]
    return block[0] == 0 and _ZEROES.startswith(block)
