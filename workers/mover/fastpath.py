"""Faster ways for a pair of kinds than reading into a buffer and writing it.

=====================  ==========================================================================
NBD to NBD             `os.splice`, socket to socket, on connections of their own
NBD to raw file        `os.splice`, socket to file
raw file to raw file   `copy_file_range`: in the kernel, or by sharing blocks where it can
recovery point to any  streams of many blocks, each checked and written while it is in the cache
=====================  ==========================================================================

But for the last, a fast path sees no data, so it cannot find zeroes. It looks at the first bytes of each range: one
that starts with zeroes is left to the copy engine, which looks at all of it. (A point has no data there.) When it
fails, nothing of the call counts: the engine copies the unit again and finds out which extent is to blame. Of streams
what was written counts, and the engine is left the rest.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from coordinator.model.errors import DiskIOError, FlushpointError
from coordinator.model.extent import BLOCK_BYTES, Extent, Status, merge_adjacent, split_extents
from workers.failpoint import pass_point
from workers.mover.lease import Halt, Lease
from workers.mover.rate import RateLimit
from workers.nbd.connection import Connection, connect
from workers.nbd.endpoint import Endpoint
from workers.nbd.splice import PEEK_BYTES, Spliced, splice_to_file, splice_to_nbd
from workers.repository.reader import STREAM_BYTES
from workers.sources.contract import Source
from workers.sources.repository import RepositorySource
from workers.targets.contract import Target

SPLICE_DEPTH = 64
"""Ranges on their way; large ones are bounded by splice's window of bytes before that."""
RANGE_BYTES = 512 * 1024
"""Half as much to wait for at either end as 1 MiB, at no more CPU (measured on two cores over unix sockets)."""
FIRST_STREAMS, MOST_STREAMS = 4, 8
"""Of a recovery point, at once."""
MOSTLY_WAITS, HARDLY_WAITS = 0.25, 0.4
"""Shares of the time in which a mover computes. With a server on the same two processors it is about 0.6."""
BATCH_S = 0.2
"""Ranges that come more slowly, for a job's speed, are streamed as they come."""
_ZERO_HEAD = bytes(PEEK_BYTES)
log = structlog.get_logger(__name__)

Ranges = Iterable[tuple[int, int]]
Halted = Callable[[], Halt | None]


def starts_with_zeroes(head: bytes) -> bool:
    """Whether a range that starts with `head` is left to the copy engine."""
    return _ZERO_HEAD.startswith(head)


class FastPath(Protocol):
    """One pair of open disks. Not thread-safe."""

    def copy(self, ranges: Ranges, halted: Halted) -> Spliced:
        """Copy ranges of at most RANGE_BYTES, all that are handed out. Who has much on the way at once asks `halted` in
        between, and leaves the rest. DiskIOError: none of it counts."""

    def flush(self) -> None:
        """Writes that were not made through the target itself are durable when it returns."""

    def abort(self) -> None:
        """Break off, from another thread. `close` is still to be called."""

    def close(self) -> None: ...


def open_fast_path(source: Source, target: Target, timeout_s: float) -> FastPath | None:
    """The fast path of a pair, None where there is none or where its connections cannot be had."""
    if isinstance(source, RepositorySource):
        return PointToDisk(source, target)
    from_fd, to_fd = source.fileno(), target.fileno()
    if from_fd is not None and to_fd is not None:
        return FileToFile(from_fd, to_fd)
    origin, goal = _plain(source.nbd_endpoint()), _plain(target.nbd_endpoint())
    if origin is None or (to_fd is None and (goal is None or target.max_writers != 0)):
        return None  # without CAN_MULTI_CONN a second connection might not see, or flush, what the first wrote
    incoming: Connection | None = None
    try:
        incoming = connect(origin, timeout_s=timeout_s, structured=False)
        if incoming.size == source.size and to_fd is not None:
            return NbdToFile(incoming, to_fd)
        if incoming.size == source.size and goal is not None:
            outgoing = connect(goal, timeout_s=timeout_s, structured=False)
            if outgoing.size == target.size:
                return NbdToNbd(incoming, outgoing)
            outgoing.close()
    except FlushpointError:  # a server that lets no more clients in: the ordinary way is open
        pass
    if incoming is not None:
        incoming.close()
    return None


def _plain(endpoint: Endpoint | None) -> Endpoint | None:
    return endpoint if endpoint is not None and endpoint.tls is None else None


@dataclass(slots=True)
class NbdToNbd:
    incoming: Connection
    outgoing: Connection

    def copy(self, ranges: Ranges, halted: Halted) -> Spliced:
        return splice_to_nbd(self.incoming, self.outgoing, ranges, depth=SPLICE_DEPTH, leave=starts_with_zeroes)

    def flush(self) -> None:
        self.outgoing.flush()

    def abort(self) -> None:
        self.incoming.abort()
        self.outgoing.abort()

    def close(self) -> None:
        self.incoming.close()
        self.outgoing.close()


@dataclass(slots=True)
class NbdToFile:
    incoming: Connection
    fd: int

    def copy(self, ranges: Ranges, halted: Halted) -> Spliced:
        return splice_to_file(self.incoming, self.fd, ranges, depth=SPLICE_DEPTH, leave=starts_with_zeroes)

    def flush(self) -> None:
        """The target's own flush syncs the same descriptor."""

    def abort(self) -> None:
        self.incoming.abort()

    def close(self) -> None:
        self.incoming.close()


@dataclass(slots=True)
class FileToFile:
    from_fd: int
    to_fd: int

    def copy(self, ranges: Ranges, halted: Halted) -> Spliced:
        done = Spliced()
        for offset, length in ranges:
            if starts_with_zeroes(self._peek(offset, length)):
                done.left.append((offset, length))
            else:
                self._copy_range(offset, length)
                done.copied += length
        return done

    def flush(self) -> None:
        """The target's own flush syncs the same descriptor."""

    def abort(self) -> None:
        """The kernel lets nobody out of a copy between files; a range is short."""

    def close(self) -> None:
        """Both descriptors belong to the disks."""

    def _peek(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self.from_fd, min(PEEK_BYTES, length), offset)
        except OSError as error:
            raise _failed(error, offset, length) from error

    def _copy_range(self, offset: int, length: int) -> None:
        end = offset + length
        pass_point("between-read-and-write")
        while offset < end:
            try:
                copied = os.copy_file_range(self.from_fd, self.to_fd, end - offset, offset, offset)
            except OSError as error:
                raise _failed(error, offset, end - offset) from error
            if copied == 0:
                raise DiskIOError(f"the source ends at {offset}", offset=offset, length=end - offset)
            offset += copied


class PointToDisk:
    """Long streams, and several side by side while this process mostly waits for them: a store far away answers late,
    and each of its connections has a pace of its own. One from nearby keeps a processor busy, and others beside it
    would only wait for that, and for each other at the file they write."""

    def __init__(self, source: RepositorySource, target: Target) -> None:
        self._source = source
        self._target = target
        self._side_by_side = FIRST_STREAMS
        self._threads = ThreadPoolExecutor(MOST_STREAMS, thread_name_prefix="stream")

    def copy(self, ranges: Ranges, halted: Halted) -> Spliced:
        done = Spliced()
        begun_s, cpu_s = time.monotonic(), time.process_time()
        flying: deque[Future[Spliced]] = deque()

        def land() -> None:
            landed = flying.popleft().result()
            done.left += landed.left
            done.copied += landed.copied

        try:
            for batch in self._batches(ranges):
                while len(flying) >= self._side_by_side:
                    land()
                flying.append(self._threads.submit(self._stream, batch, halted))
            while flying:
                land()
        finally:
            wait(flying)  # whatever happened: nobody writes any more when this returns
        done.left.sort()
        if done.copied >= STREAM_BYTES / MOST_STREAMS:
            self._adapt((time.process_time() - cpu_s) / (time.monotonic() - begun_s))
        return done

    def flush(self) -> None:
        """All was written through the target itself."""

    def abort(self) -> None:
        """The lease that says so is asked before every piece."""

    def close(self) -> None:
        self._threads.shutdown(wait=True)

    def _batches(self, ranges: Ranges) -> Iterator[list[tuple[int, int]]]:
        """What is streamed at once: much, but no more than comes within a moment where a job's speed is limited."""
        batch: list[tuple[int, int]] = []
        begun = total = 0.0
        for offset, length in ranges:
            if not batch:
                begun = time.monotonic()
            batch.append((offset, length))
            total += length
            if total >= STREAM_BYTES / self._side_by_side or time.monotonic() - begun >= BATCH_S:
                yield batch
                batch, total = [], 0.0
        if batch:
            yield batch

    def _stream(self, batch: list[tuple[int, int]], halted: Halted) -> Spliced:
        """What a stream that fails or is halted has not written is left to the engine, which starts nothing after a
        halt. Before a pause something is written of every batch, or a slow job would get nowhere."""
        written: set[int] = set()

        def write(offset: int, data: memoryview) -> None:
            halt = halted()
            if halt in (Halt.LOST, Halt.ABORT) or (halt is Halt.YIELD and written):
                raise _HaltedError("the mover is to stop")
            pass_point("between-read-and-write")
            self._target.write(offset, data)
            written.update(range(offset // BLOCK_BYTES, -(-(offset + len(data)) // BLOCK_BYTES)))

        try:
            left = self._source.stream(batch, write)
        except FlushpointError as error:
            if not isinstance(error, _HaltedError):
                log.info("a stream failed", error=str(error))
            left = [
                (extent.offset, extent.length)
                for extent in split_extents((Extent(at, length, Status.DATA) for at, length in batch), BLOCK_BYTES)
                if extent.offset // BLOCK_BYTES not in written
            ]
        return Spliced(sum(length for _, length in batch) - sum(length for _, length in left), left)

    def _adapt(self, busy: float) -> None:
        """`busy` is the processor time of this process by the time that went by."""
        if busy < MOSTLY_WAITS:
            self._side_by_side = min(MOST_STREAMS, 2 * self._side_by_side)
        elif busy > HARDLY_WAITS:
            self._side_by_side = max(1, self._side_by_side // 2)


class _HaltedError(FlushpointError):
    """Nothing is written any more."""


def _failed(error: OSError, offset: int, length: int) -> DiskIOError:
    number = error.errno or errno.EIO
    message = f"copying {length} bytes at {offset} failed: {os.strerror(number)}"
    return DiskIOError(message, errno_=number, offset=offset, length=length)


@dataclass(slots=True)
class _Feed:
    """Hands out the ranges of extents as the job's rate admits them, and remembers what it did not hand out.

    Whether to stop is asked before a range is admitted and not after (but by streams, which have much on their way):
    what is admitted is copied, so a unit makes progress however low the speed is.
    """

    extents: list[Extent]
    rate: RateLimit
    lease: Lease
    ends_at: float
    rest: list[Extent] = field(default_factory=list)

    def ranges(self) -> Iterator[tuple[int, int]]:
        for position, extent in enumerate(self.extents):
            offset = extent.offset
            while offset < extent.end:
                length = min(extent.end, (offset // RANGE_BYTES + 1) * RANGE_BYTES) - offset
                self.rest = [Extent(offset, extent.end - offset, extent.status), *self.extents[position + 1 :]]
                if self.lease.halt is not None or time.monotonic() >= self.ends_at:
                    return
                if not self.rate.admit(length, self.lease):
                    return
                yield offset, length
                offset += length
        self.rest = []


@dataclass(frozen=True, slots=True)
class CopiedFast:
    """What a fast path did of a unit: bytes copied, ranges it left for their zeroes, extents it did not come to."""

    copied: int
    left: list[Extent]
    rest: list[Extent]


def copy_fast(path: FastPath, extents: list[Extent], lease: Lease, rate: RateLimit, ends_at: float) -> CopiedFast:
    """Copy what a fast path can of `extents`, none of which reads as zeroes.

    Starts nothing after a halt of the lease or monotonic time `ends_at`. DiskIOError: nothing of it counts.
    """
    feed = _Feed(extents, rate, lease, ends_at)
    done = path.copy(feed.ranges(), lambda: lease.halt)
    left = merge_adjacent(Extent(offset, length, Status.DATA) for offset, length in done.left)
    return CopiedFast(done.copied, list(left), feed.rest)
