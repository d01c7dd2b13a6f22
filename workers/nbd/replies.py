"""Requests in flight, and the peer's replies to them, parsed without I/O.

`ReplyReader.run` is a generator that yields the memory the next bytes of the stream belong to, and is resumed
when all of it has been filled. So the data of a read goes from the socket straight into the caller's buffer, and the
same parser serves the blocking sockets of `channel` and the non-blocking one of `tls_channel`.
"""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from threading import Lock

from coordinator.model.errors import DiskIOError, Next
from workers.nbd import wire
from workers.nbd.wire import ChunkKind, Command, ProtocolError

_NEXT_OF_ERRNO = {
    errno.EIO: Next.RETRY,
    errno.ENOMEM: Next.RETRY,
    errno.ENOSPC: Next.RETRY,
    errno.ESHUTDOWN: Next.RECONNECT,
}

MAX_ERROR_PAYLOAD_BYTES = wire.ERROR_HEAD.size + wire.MAX_STRING_BYTES + wire.OFFSET.size


@dataclass(frozen=True, slots=True)
class ServerError:
    """A request the server answered with an error: a POSIX errno and the server's own words, if any."""

    errno: int
    message: str = ""


class Covered:
    """Which bytes of a read have come, so that a server can neither leave a gap nor answer a byte twice."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Raises ProtocolError if any of [start, end) has come before."""
        at = bisect.bisect_right(self._starts, start)
        if (at > 0 and self._ends[at - 1] > start) or (at < len(self._starts) and self._starts[at] < end):
            raise ProtocolError(f"bytes {start} to {end} of a read were answered twice")
        joins_before = at > 0 and self._ends[at - 1] == start
        joins_after = at < len(self._starts) and self._starts[at] == end
        if joins_before and joins_after:
            self._ends[at - 1] = self._ends.pop(at)
            del self._starts[at]
        elif joins_before:
            self._ends[at - 1] = end
        elif joins_after:
            self._starts[at] = start
        else:
            self._starts.insert(at, start)
            self._ends.insert(at, end)

    def is_whole(self, length: int) -> bool:
        return self._starts == [0] and self._ends == [length]


class Request:
    """One request from the moment it is registered until it is answered. Owned by the thread that makes the call."""

    __slots__ = (
        "buffer",
        "command",
        "cookie",
        "covered",
        "done",
        "error",
        "flags",
        "length",
        "lost",
        "offset",
        "status",
        "waiting",
        "wake",
    )

    def __init__(
        self, command: Command, offset: int = 0, length: int = 0, *, flags: int = 0, buffer: memoryview | None = None
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.flags = flags
        self.buffer = buffer
        self.cookie = 0
        self.covered = Covered()
        self.status: dict[int, list[tuple[int, int]]] = {}
        self.error: ServerError | None = None
        self.done = False
        self.lost = False
        """Done because the connection broke, so nobody knows whether the server did it."""
        self.waiting = False
        self.wake: Lock | None = None

    def header(self) -> bytes:
        return wire.encode_request(self.flags, self.command, self.cookie, self.offset, self.length)


def describe(request: Request, export: str) -> str:
    """The request as a message names it: what, which range in bytes, and of which export."""
    name = request.command.name.lower().replace("_", " ")
    if request.command is Command.FLUSH:
        return f"flush of {export}"
    return f"{name} of {request.length} bytes at {request.offset} of {export}"


def lost_error(request: Request, export: str, reason: str) -> DiskIOError:
    """The error of a call whose connection has broken."""
    return DiskIOError(
        f"{describe(request, export)} failed, the connection is broken: {reason}",
        offset=-1 if request.command is Command.FLUSH else request.offset,
        length=request.length,
        next_=Next.RECONNECT,
    )


def server_error(request: Request, export: str, error: ServerError) -> DiskIOError:
    """The error of a call that the server answered with `error`.

    A flush that failed is never to be retried: the kernel behind the server reports a failed writeback once and
    forgets it, so the next flush would succeed without the data. Its writes have to be repeated.
    """
    is_flush = request.command is Command.FLUSH
    said = f" (the server says: {error.message})" if error.message else ""
    return DiskIOError(
        f"{describe(request, export)} failed: {os.strerror(error.errno)}{said}",
        errno_=error.errno,
        offset=-1 if is_flush else request.offset,
        length=request.length,
        next_=Next.GIVE_UP if is_flush else _NEXT_OF_ERRNO.get(error.errno, Next.GIVE_UP),
    )


class ReplyReader:
    """Takes the stream of replies apart; `finish` is called with each request as its answer is complete.

    `pending` maps cookies to requests in flight; `context_ids` are the meta contexts the server granted.
    """

    def __init__(
        self,
        pending: dict[int, Request],
        finish: Callable[[Request], None],
        *,
        structured: bool,
        context_ids: Collection[int],
    ) -> None:
        self._pending = pending
        self._finish = finish
        self._structured = structured
        self._context_ids = context_ids
        self._head = memoryview(bytearray(wire.REPLY_HEAD_BYTES))
        self._word = memoryview(bytearray(wire.CHUNK_LENGTH.size))
        self._place = memoryview(bytearray(wire.OFFSET.size))

    def run(self) -> Generator[memoryview, None, None]:
        """Endless. Raises ProtocolError at the first thing the peer must not send; unusable afterwards."""
        while True:
            yield self._head
            magic, flags, kind, cookie = wire.CHUNK_HEAD.unpack(self._head)
            request = self._pending.get(cookie)
            if magic == wire.SIMPLE_REPLY_MAGIC:
                yield from self._simple(self._known(request, cookie))
            elif magic == wire.CHUNK_MAGIC:
                yield from self._chunk(self._known(request, cookie), flags, kind)
            else:
                raise ProtocolError(f"a reply starts with the unknown magic {magic:#x}")

    @staticmethod
    def _known(request: Request | None, cookie: int) -> Request:
        if request is None:
            raise ProtocolError(f"a reply to request {cookie}, which is not in flight")
        return request

    def _simple(self, request: Request) -> Generator[memoryview, None, None]:
        if request.command is Command.BLOCK_STATUS or (request.command is Command.READ and self._structured):
            raise ProtocolError(f"a simple reply to a {request.command.name} on a connection with structured replies")
        _, error, _ = wire.SIMPLE_REPLY.unpack(self._head)
        if error:
            request.error = ServerError(wire.posix_errno(error))
        elif request.buffer is not None:
            yield request.buffer
        self._finish(request)

    def _chunk(self, request: Request, flags: int, kind: int) -> Generator[memoryview, None, None]:
        if not self._structured:
            raise ProtocolError("a structured reply, which was not negotiated")
        yield self._word
        (length,) = wire.CHUNK_LENGTH.unpack(self._word)
        if kind == ChunkKind.OFFSET_DATA:
            yield from self._data(request, length)
        elif kind == ChunkKind.OFFSET_HOLE:
            yield from self._hole(request, length)
        elif kind == ChunkKind.BLOCK_STATUS:
            yield from self._status(request, length)
        elif kind & wire.CHUNK_IS_ERROR:
            yield from self._error(request, kind, length)
        elif kind != ChunkKind.NONE:
            raise ProtocolError(f"a chunk of the unknown kind {kind}")
        elif length or not flags & wire.CHUNK_DONE:
            raise ProtocolError("an empty chunk that has a payload or is not the last")
        if flags & wire.CHUNK_DONE:
            self._check_whole(request)
            self._finish(request)

    def _data(self, request: Request, length: int) -> Generator[memoryview, None, None]:
        if length <= wire.OFFSET.size:
            raise ProtocolError(f"a data chunk of {length} bytes holds no data")
        yield self._place
        (offset,) = wire.OFFSET.unpack(self._place)
        yield self._destination(request, offset, length - wire.OFFSET.size)

    def _hole(self, request: Request, length: int) -> Generator[memoryview, None, None]:
        if length != wire.HOLE.size:
            raise ProtocolError(f"a hole chunk has {length} bytes instead of {wire.HOLE.size}")
        payload = bytearray(length)
        yield memoryview(payload)
        offset, zeroes = wire.parse_hole(payload)
        self._destination(request, offset, zeroes)[:] = bytes(zeroes)

    def _destination(self, request: Request, offset: int, length: int) -> memoryview:
        """The part of the caller's buffer that a chunk fills; checked against the request and earlier chunks."""
        if request.buffer is None:
            raise ProtocolError(f"data in the answer to a {request.command.name}")
        start = offset - request.offset
        if start < 0 or start + length > request.length:
            raise ProtocolError(
                f"{length} bytes at {offset} in the answer to a read of {request.length} at {request.offset}"
            )
        request.covered.add(start, start + length)
        return request.buffer[start : start + length]

    def _status(self, request: Request, length: int) -> Generator[memoryview, None, None]:
        if request.command is not Command.BLOCK_STATUS:
            raise ProtocolError(f"block status in the answer to a {request.command.name}")
        if length > wire.MAX_STATUS_PAYLOAD_BYTES:
            raise ProtocolError(f"a block status chunk claims {length} bytes")
        payload = bytearray(length)
        yield memoryview(payload)
        context_id, extents = wire.parse_block_status(payload)
        if context_id not in self._context_ids:
            raise ProtocolError(f"block status of context {context_id}, which was not negotiated")
        if context_id in request.status:
            raise ProtocolError(f"block status of context {context_id} came twice")
        if sum(span for span, _ in extents[:-1]) >= request.length:
            raise ProtocolError("a block status descriptor that starts past the range asked for")
        request.status[context_id] = extents

    def _error(self, request: Request, kind: int, length: int) -> Generator[memoryview, None, None]:
        if length > MAX_ERROR_PAYLOAD_BYTES:
            raise ProtocolError(f"an error chunk claims {length} bytes")
        payload = bytearray(length)
        yield memoryview(payload)
        error = wire.parse_error_chunk(kind, payload)
        place = "" if error.offset is None else f"{' ' if error.message else ''}at byte {error.offset}"
        if request.error is None:  # the first is the cause
            request.error = ServerError(error.errno, error.message + place)

    def _check_whole(self, request: Request) -> None:
        """A short answer without an error must never pass for a read (or a status) that succeeded."""
        if request.error is not None:
            return
        if request.command is Command.READ and not request.covered.is_whole(request.length):
            raise ProtocolError(f"a read of {request.length} bytes at {request.offset} was answered in part only")
        if request.command is Command.BLOCK_STATUS and len(request.status) != len(self._context_ids):
            raise ProtocolError("block status without every context that was negotiated")
