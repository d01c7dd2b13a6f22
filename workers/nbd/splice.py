"""Copy from an NBD export to another, or to a file, without the bytes ever entering this process.

                READ ▶                     WRITE ▶
    source ◀────────────── this thread ──────────────▶ target
           payload ═══▶ pipe ═══splice═══▶ payload
                                      ◀ answers

The connections are dedicated, plain (no TLS, whose bytes must be decrypted here) and opened with structured=False:
after the header of a simple reply comes exactly the data that was asked for, so splice knows what follows.

An answer with an error has no payload: no further range is begun, what is in flight is taken to its end, and the
first error is raised with both connections usable. A failure in mid-payload breaks both connections, for
the target waits for bytes that will never come.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.model.errors import DiskIOError, Next
from workers.failpoint import pass_point
from workers.nbd import wire
from workers.nbd.channel import PlainChannel
from workers.nbd.connection import Connection
from workers.nbd.replies import Request, ServerError, lost_error, server_error
from workers.nbd.wire import Command, ProtocolError

MAX_RANGE_BYTES = 1 << 20
"""One range goes through one pipe, and 1 MiB is what the kernel gives an ordinary user (pipe-max-size)."""


WINDOW_BYTES = 2 << 20
"""Most bytes on their way: what the processor's caches hold between the four copies that servers and sockets make of
them. Eight times as much was a fifth slower on two cores; small ranges are bounded by `depth` alone."""
_LAST = int(os.SPLICE_F_MOVE)
_MORE = int(os.SPLICE_F_MOVE | os.SPLICE_F_MORE)
PEEK_BYTES = 64
"""How much of a payload `leave` is shown."""


@dataclass(slots=True)
class Spliced:
    """What became of the ranges. Bytes count when the target has answered for them."""

    copied: int = 0
    left: list[tuple[int, int]] = field(default_factory=list)
    """Ranges that `leave` chose: read and thrown away."""


def never(head: bytes) -> bool:
    """Leave no range."""
    return False


def splice_to_nbd(
    source: Connection,
    target: Connection,
    ranges: Iterable[tuple[int, int]],
    *,
    depth: int,
    leave: Callable[[bytes], bool] = never,
) -> Spliced:
    """Copy `ranges` of (offset, length <= 1 MiB), but for those whose first PEEK_BYTES make `leave` say so.

    At most `depth` ranges and WINDOW_BYTES are on their way. Nothing is flushed. Raises DiskIOError with the range,
    from the source or the target; what was copied is then unknown.
    """
    with _alone(source) as incoming, _alone(target) as outgoing:
        sink = _NbdSink(target, outgoing, depth)
        with _broken_together(source, target):
            left = _copy(source, incoming, sink, ranges, depth, leave)
            sink.settle()
        sink.raise_error()
        return Spliced(sink.copied, left)


def splice_to_file(
    source: Connection,
    fd: int,
    ranges: Iterable[tuple[int, int]],
    *,
    depth: int,
    leave: Callable[[bytes], bool] = never,
) -> Spliced:
    """As `splice_to_nbd`, to the same offsets of a regular file or block device. Nothing is synced."""
    with _alone(source) as incoming, _broken_together(source):
        sink = _FileSink(fd)
        left = _copy(source, incoming, sink, ranges, depth, leave)
    sink.raise_error()
    return Spliced(sink.copied, left)


class _Sink(Protocol):
    """Where payloads go."""

    error: DiskIOError | None
    """The first error, of either side. With it no further range is begun."""

    def room(self, length: int, *, wait: bool) -> bool:
        """Claim a place for one more range."""

    def give_back(self, length: int) -> None:
        """The place of a range that brought no payload."""

    def take(self, incoming: socket.socket, pipe: tuple[int, int], offset: int, length: int) -> None:
        """Move one payload, all of it. OSError means it stopped in the middle."""


def _copy(
    source: Connection,
    incoming: socket.socket,
    sink: _Sink,
    ranges: Iterable[tuple[int, int]],
    depth: int,
    leave: Callable[[bytes], bool],
) -> list[tuple[int, int]]:
    """Keep up to `depth` reads in flight and hand each payload to `sink`, until all are done or one failed.

    Returns the ranges that were left.
    """
    left: list[tuple[int, int]] = []
    upcoming = iter(ranges)
    todo = next(upcoming, None)
    reads: dict[int, tuple[int, int]] = {}
    reading = _Window(depth)
    cookie = 0
    with _pipe() as pipe:
        while True:
            while todo is not None and reading.fits(todo[1]) and sink.error is None:
                if not sink.room(todo[1], wait=not reads):
                    break
                reading.add(todo[1])
                cookie += 1
                _check(todo, source)
                reads[cookie] = todo
                incoming.sendall(wire.encode_request(0, Command.READ, cookie, *todo))
                todo = next(upcoming, None)
            if not reads:
                return left
            answered, number = _simple_reply(incoming)
            if answered not in reads:
                raise ProtocolError(f"a reply to request {answered}, which is not in flight")
            offset, length = reads.pop(answered)
            reading.remove(length)
            if number == 0 and leave is not never and leave(_peek(incoming, length)):
                _swallow(incoming, pipe, 0, length)
                left.append((offset, length))
                sink.give_back(length)
                continue
            if number == 0:
                sink.take(incoming, pipe, offset, length)
                continue
            sink.give_back(length)
            request = Request(Command.READ, offset, length)
            error = server_error(request, str(source.endpoint), ServerError(wire.posix_errno(number)))
            sink.error = sink.error or error


class _Window:
    """How many ranges, and how many bytes of them, are on their way; one range always fits."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._ranges = 0
        self._bytes = 0

    def fits(self, length: int) -> bool:
        within = self._ranges < self._depth and self._bytes + length <= WINDOW_BYTES
        return within or self._ranges == 0

    def add(self, length: int) -> None:
        self._ranges += 1
        self._bytes += length

    def remove(self, length: int) -> None:
        self._ranges -= 1
        self._bytes -= length


class _NbdSink:
    """Another export. Its answers are taken whenever they are there, and waited for only when there is no room.

    They cannot pile up: an answer is 16 bytes, and no more are on their way than the window has ranges. So the
    target never waits for us to read one, and one thread is enough.
    """

    def __init__(self, target: Connection, outgoing: socket.socket, depth: int) -> None:
        self.copied = 0
        self.error: DiskIOError | None = None
        self._target = target
        self._outgoing = outgoing
        self._window = _Window(depth)
        self._writes: dict[int, tuple[int, int]] = {}
        self._cookie = 0

    def room(self, length: int, *, wait: bool) -> bool:
        """Bounded: the socket's timeout ends a wait for a silent target."""
        while self._writes and self._answer_is_there():
            self._take_answer()
        while wait and not self._window.fits(length):
            self._take_answer()
        if not self._window.fits(length):
            return False
        self._window.add(length)
        return True

    def give_back(self, length: int) -> None:
        self._window.remove(length)

    def take(self, incoming: socket.socket, pipe: tuple[int, int], offset: int, length: int) -> None:
        self._cookie += 1
        self._writes[self._cookie] = (offset, length)
        header = wire.encode_request(0, Command.WRITE, self._cookie, offset, length)
        self._outgoing.sendall(header, socket.MSG_MORE)
        while length:
            got = _fill(incoming, pipe, length)
            pass_point("between-read-and-write")
            length -= got
            while got:
                got -= os.splice(pipe[0], self._outgoing.fileno(), got, flags=_MORE if length else _LAST)

    def settle(self) -> None:
        """Wait for the answers that are still to come."""
        while self._writes:
            self._take_answer()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _answer_is_there(self) -> bool:
        try:
            return self._outgoing.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lost(error) from error

    def _take_answer(self) -> None:
        try:
            cookie, number = _simple_reply(self._outgoing)
            if cookie not in self._writes:
                raise ProtocolError(f"a reply to request {cookie}, which is not in flight")
        except (OSError, ProtocolError) as error:
            raise self._lost(error) from error
        offset, length = self._writes.pop(cookie)
        self._window.remove(length)
        if number == 0:
            self.copied += length
            return
        request = Request(Command.WRITE, offset, length)
        failure = server_error(request, str(self._target.endpoint), ServerError(wire.posix_errno(number)))
        self.error = self.error or failure

    def _lost(self, error: OSError | ProtocolError) -> DiskIOError:
        return lost_error(Request(Command.WRITE), str(self._target.endpoint), _reason(error))


class _FileSink:
    """A file descriptor, written at the offsets of the source."""

    def __init__(self, fd: int) -> None:
        self.copied = 0
        self.error: DiskIOError | None = None
        self._fd = fd

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def room(self, length: int, *, wait: bool) -> bool:
        return True  # a payload is in the file before the next is asked for

    def give_back(self, length: int) -> None:
        return

    def take(self, incoming: socket.socket, pipe: tuple[int, int], offset: int, length: int) -> None:
        """A full disk is noticed with bytes in the pipe and in the socket: both are emptied, to keep the connection."""
        start, todo = offset, length
        while todo:
            got = _fill(incoming, pipe, todo)
            pass_point("between-read-and-write")
            todo -= got
            while got:
                try:
                    moved = os.splice(pipe[0], self._fd, got, offset_dst=start)
                except OSError as error:
                    self.error = self.error or _file_error(error, offset, length)
                    _swallow(incoming, pipe, got, todo)
                    return
                got -= moved
                start += moved
        self.copied += length


def _file_error(error: OSError, offset: int, length: int) -> DiskIOError:
    number = error.errno or errno.EIO
    message = f"write of {length} bytes at {offset} of the file failed: {os.strerror(number)}"
    return DiskIOError(message, errno_=number, offset=offset, length=length)


def _swallow(incoming: socket.socket, pipe: tuple[int, int], in_pipe: int, in_socket: int) -> None:
    """Take the rest of a payload that has nowhere to go."""
    while in_pipe:
        in_pipe -= len(os.read(pipe[0], in_pipe))
    while in_socket:
        got = incoming.recv(in_socket)
        if not got:
            raise ConnectionError("the server closed the connection")
        in_socket -= len(got)


def _peek(incoming: socket.socket, length: int) -> bytes:
    """The first bytes of a payload, which stay in the socket."""
    head = incoming.recv(min(PEEK_BYTES, length), socket.MSG_PEEK | socket.MSG_WAITALL)
    if not head:
        raise ConnectionError("the server closed the connection")
    return head


def _fill(incoming: socket.socket, pipe: tuple[int, int], length: int) -> int:
    """Bytes moved from the socket into the empty pipe: at least one, at most what fits."""
    got = os.splice(incoming.fileno(), pipe[1], length)
    if got == 0:
        raise ConnectionError("the server closed the connection")
    return got


def _simple_reply(sock: socket.socket) -> tuple[int, int]:
    """(cookie, error) of the next reply."""
    head = memoryview(bytearray(wire.SIMPLE_REPLY.size))
    left = head
    while left:
        got = sock.recv_into(left, 0, socket.MSG_WAITALL)
        if got == 0:
            raise ConnectionError("the server closed the connection")
        left = left[got:]
    magic, error, cookie = wire.SIMPLE_REPLY.unpack(head)
    if magic != wire.SIMPLE_REPLY_MAGIC:
        raise ProtocolError(f"a simple reply starts with the unknown magic {magic:#x}")
    return cookie, error


def _check(span: tuple[int, int], source: Connection) -> None:
    offset, length = span
    if not 0 < length <= MAX_RANGE_BYTES or offset < 0 or offset + length > source.size:
        raise ValueError(f"{length} bytes at {offset} cannot be spliced")


def _reason(error: OSError | ProtocolError) -> str:
    if isinstance(error, BlockingIOError):
        return "no byte moved within the timeout"
    if isinstance(error, ProtocolError):
        return f"the server broke the protocol: {error.message}"
    return error.strerror or str(error)


@contextmanager
def _alone(connection: Connection) -> Iterator[socket.socket]:
    """The socket of a connection that can be spliced from or to."""
    channel = connection.channel
    if connection.structured or not isinstance(channel, PlainChannel):
        raise ValueError(f"{connection.endpoint} was not opened for splicing: plain, with structured=False")
    with channel.exclusive() as sock:
        yield sock


@contextmanager
def _broken_together(*connections: Connection) -> Iterator[None]:
    """Whatever leaves the block by an exception leaves payloads in mid-stream: the connections are of no more use."""
    with ExitStack() as undo:
        for connection in connections:
            undo.callback(connection.abort)
        try:
            yield
        except (OSError, ProtocolError) as error:
            name = " and ".join(str(connection.endpoint) for connection in connections)
            raise DiskIOError(f"copying between {name} broke off: {_reason(error)}", next_=Next.RECONNECT) from error
        undo.pop_all()


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        with suppress(OSError):  # a system with less for ordinary users: slower, not wrong
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, MAX_RANGE_BYTES)
        yield ends
    finally:
        for end in ends:
            os.close(end)
