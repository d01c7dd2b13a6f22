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
from workers.mover.rate import RateLimit
from workers.sources.contract import Source
from workers.targets.contract import Target

REQUEST_BYTES = 1024 * 1024
"""One read or write. Larger ones do not go faster on loopback, and hold more memory."""
ZERO_REQUEST_BYTES = 1024 * 1024 * 1024
"""One write-zeroes; servers may take long over it, and NBD lengths end below 4 GiB."""
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
    """Zeroed bytes count as sent: after a comparing pass 0 bytes sent means that nothing differed."""
    digest: bool = False
    ends_at: float = math.inf
    """Monotonic time after which no new request is started."""


class Engine:
    """Owns the threads and the buffers of a mover; one unit at a time."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pool = ThreadPoolExecutor(depth, thread_name_prefix="copy")
        self._buffers = threading.local()

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
        queue = _Queue(extents, orders.ends_at, lease)
        digests: dict[int, bytes] = {}
        lock = threading.Lock()

        def work() -> None:
            while (chunk := queue.take()) is not None:
                if not chunk.reads_as_zeroes and not rate.admit(chunk.length, lease):
                    queue.give_back(chunk)
                    return
                try:
                    read, sent, digest = self._move(source, target, chunk, orders)
                except _SideError as failed:
                    with lock:
                        outcome.failures.append(Failure(failed.side, failed.error, chunk))
                    queue.give_back(chunk)
                    if failed.error.offset < 0:
                        return  # the connection is gone: the others will find out as well
                    continue
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
        """The digest `copy` would give for what a disk holds at `extents` now. DiskIOError if it cannot be read."""

        def one(chunk: Extent) -> bytes:
            if chunk.reads_as_zeroes:
                return self._digest_zero_range(read_into, chunk)
            buffer = self._buffer("source", chunk.length)
            read_into(chunk.offset, buffer)
            return blake3.blake3(buffer).digest()

        parts = self._pool.map(one, _chunks(extents))
        return blake3.blake3(b"".join(parts)).hexdigest()

    def _digest_zero_range(self, read_into: Callable[[int, memoryview], None], chunk: Extent) -> bytes:
        """Equal to `_ZERO_DIGEST` exactly if the range reads as zeroes."""
        for offset in range(chunk.offset, chunk.end, REQUEST_BYTES):
            buffer = self._buffer("source", min(REQUEST_BYTES, chunk.end - offset))
            read_into(offset, buffer)
            if not _ZEROES.startswith(buffer):
                return b"not zeroes"
        return _ZERO_DIGEST

    def _buffer(self, name: str, length: int) -> memoryview:
        buffer: bytearray | None = getattr(self._buffers, name, None)
        if buffer is None:
            buffer = bytearray(REQUEST_BYTES)
            setattr(self._buffers, name, buffer)
        return memoryview(buffer)[:length]

    def _move(self, source: Source, target: Target, chunk: Extent, orders: Orders) -> tuple[int, int, bytes]:
        """Bytes read, bytes sent, digest."""
        if chunk.reads_as_zeroes and not orders.compare:
            with _blame(Side.TARGET):
                target.write_zeroes(chunk.offset, chunk.length)
            return 0, chunk.length if orders.count_zeroes else 0, _ZERO_DIGEST
        if chunk.reads_as_zeroes:
            return self._compare_zeroes(target, chunk)
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

    def _compare_zeroes(self, target: Target, chunk: Extent) -> tuple[int, int, bytes]:
        """Zero what does not read as zeroes; what was zeroed counts as sent, for it differed.

        What the target knows to be zeroes is not read, or a sparse disk would take as long as a full one.
        """
        changed = 0
        with _blame(Side.TARGET):
            known = list(target.extents(chunk.offset, chunk.length))
            for piece in _chunks(extent for extent in known if not extent.reads_as_zeroes):
                old = self._buffer("target", piece.length)
                target.read_into(piece.offset, old)
                if not _ZEROES.startswith(old):
                    target.write_zeroes(piece.offset, piece.length)
                    changed += piece.length
        return 0, changed, _ZERO_DIGEST


_ZERO_DIGEST = blake3.blake3(b"zeroes").digest()
"""Stands for a zero extent of any length: where it lies is in the unit's extents."""


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


class _Queue:
    """Chunks of a unit, handed out one by one until the lease halts or the time slice is over."""

    def __init__(self, extents: Iterable[Extent], ends_at: float, lease: Lease) -> None:
        self._chunks = _chunks(extents)
        self._lock = threading.Lock()
        self._given_back: list[Extent] = []
        self._ends_at = ends_at
        self._lease = lease

    def close(self) -> None:
        """Hand out no more."""
        with self._lock:
            self._ends_at = -math.inf

    def take(self) -> Extent | None:
        with self._lock:
            if self._lease.halt is not None or time.monotonic() >= self._ends_at:
                return None
            return next(self._chunks, None)

    def give_back(self, chunk: Extent) -> None:
        with self._lock:
            self._given_back.append(chunk)

    def left(self) -> list[Extent]:
        """What was not copied, sorted."""
        left = sorted([*self._given_back, *self._chunks], key=lambda e: e.offset)
        return list(merge_adjacent(left))


def _chunks(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Requests: data of at most REQUEST_BYTES, aligned to it; zeroes of at most ZERO_REQUEST_BYTES."""
    for extent in extents:
        step = ZERO_REQUEST_BYTES if extent.reads_as_zeroes else REQUEST_BYTES
        offset = extent.offset
        while offset < extent.end:
            end = min(extent.end, (offset // step + 1) * step)
            yield Extent(offset, end - offset, extent.status)
            offset = end


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
            sent += stop - run if orders.count_zeroes else 0
        run = stop
    return sent


def _is_zero(data: memoryview, start: int, end: int) -> bool:
    block = data[start : min(start + BLOCK_BYTES, end)]
    return block[0] == 0 and _ZEROES.startswith(block)
