"""One connection to one NBD export: synchronous calls, from as many threads at once as requests shall be in flight."""

from __future__ import annotations

import errno
import os
import ssl
from collections.abc import Iterator, Sequence
from typing import Self

from coordinator.model.errors import DiskIOError, Next
from workers.nbd import handshake
from workers.nbd.channel import PlainChannel
from workers.nbd.covered import CoveredWrites
from workers.nbd.endpoint import Endpoint
from workers.nbd.export import ExportAttributes
from workers.nbd.handshake import Negotiated
from workers.nbd.replies import Request, describe, server_error
from workers.nbd.tls_channel import TlsChannel
from workers.nbd.wire import Command, CommandFlag, ExportInfo

ZERO_STEP_BYTES = 1 << 30
"""Zeroing and trimming carry no payload and may pass the maximum block size, but not 32 bits; steps end at
multiples of this, so that a long zeroing stays aligned and is seen to make progress."""
STATUS_STEP_BYTES = (1 << 32) - 64 * 1024
"""The longest block status request of 32 bits that is aligned to any bitmap granularity in use."""
DEFAULT_TIMEOUT_S = 30.0


def connect(
    endpoint: Endpoint,
    *,
    contexts: Sequence[str] = (),
    timeout_s: float = DEFAULT_TIMEOUT_S,
    handshake_timeout_s: float | None = None,
    structured: bool = True,
) -> Connection:
    """Open an export. `contexts` are meta contexts to ask for; what was granted is in `Connection.contexts`.

    Without `structured` a read is answered by one header and its data, which splice needs; then there is no block
    status. `timeout_s` bounds the silence while requests are in flight, and the whole of the handshake unless
    `handshake_timeout_s` is given.

    Raises UnavailableError if nothing listens or the server goes away, NotFoundError if it has no such export,
    RefusedError if it is no NBD server of the fixed newstyle or demands TLS, UsageError for unusable certificates.
    """
    patience_s = timeout_s if handshake_timeout_s is None else handshake_timeout_s
    negotiated = handshake.negotiate(endpoint, contexts, patience_s, structured=structured)
    return Connection(negotiated, endpoint, timeout_s)


def list_exports(endpoint: Endpoint, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[ExportInfo]:
    """The exports of the server at `endpoint`, whatever export it names. Errors as in `connect`."""
    return handshake.list_exports(endpoint, timeout_s)


class Connection(ExportAttributes):
    """One NBD connection in transmission phase. Thread-safe; each call is one request in flight.

    Every call raises DiskIOError: with the server's errno and Next.RETRY or GIVE_UP if the server answered with an
    error, with Next.RECONNECT if the connection broke (closed, silent for `timeout_s`, or against the protocol),
    after which every call does. Offsets and lengths are bytes.
    """

    def __init__(self, negotiated: Negotiated, endpoint: Endpoint, timeout_s: float) -> None:
        super().__init__(negotiated.opened)
        self.endpoint = endpoint
        self._name = str(endpoint)
        self._writes = CoveredWrites()
        handshake.bound_unacknowledged(negotiated.sock, timeout_s)
        self._channel: PlainChannel | TlsChannel
        if isinstance(negotiated.sock, ssl.SSLSocket):
            self._channel = TlsChannel(negotiated, negotiated.sock, self._name, timeout_s)
        else:
            self._channel = PlainChannel(negotiated, self._name, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def broken(self) -> str | None:
        """Why every further call fails; None while the connection stands."""
        return self._channel.broken

    @property
    def channel(self) -> PlainChannel | TlsChannel:
        """What is below, for splice, which needs the socket itself."""
        return self._channel

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` from `offset`, in requests of at most `max_block`, one after the other."""
        view = memoryview(buffer).cast("B")
        self._check(Command.READ, offset, len(view))
        for start, length in _steps(offset, len(view), self.max_block):
            piece = view[start - offset : start - offset + length]
            self._call(Request(Command.READ, start, length, buffer=piece))

    def write(self, offset: int, data: memoryview | bytes, *, fua: bool = False) -> None:
        """Write all of `data`; with `fua` it is durable on return, by a flush where the server has no FUA."""
        view = memoryview(data).cast("B")
        self._check(Command.WRITE, offset, len(view), writes=True)
        with self._writes.write():
            for start, length in _steps(offset, len(view), self.max_block):
                request = Request(Command.WRITE, start, length, flags=self._fua_flag(fua=fua))
                self._call(request, view[start - offset : start - offset + length])
        if fua and not self.can_fua:
            self.flush()

    def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False, fua: bool = False
    ) -> None:
        """Make a range read as zeroes. `no_hole` keeps it allocated.

        With `fast` it fails with ENOTSUP where zeroing would be no faster than writing; ENOTSUP (GIVE_UP) also if
        the server cannot zero at all, or not fast.
        """
        self._check(Command.WRITE_ZEROES, offset, length, writes=True)
        if not self.can_zero or (fast and not self.can_fast_zero):
            raise self._unsupported(Command.WRITE_ZEROES, offset, length)
        flags = self._fua_flag(fua=fua)
        flags |= (CommandFlag.NO_HOLE if no_hole else 0) | (CommandFlag.FAST_ZERO if fast else 0)
        with self._writes.write():
            for start, step in _steps(offset, length, ZERO_STEP_BYTES):
                self._call(Request(Command.WRITE_ZEROES, start, step, flags=flags))
        if fua and not self.can_fua:
            self.flush()

    def trim(self, offset: int, length: int) -> None:
        """Tell the server that a range is not needed; what it reads as afterwards is undefined."""
        self._check(Command.TRIM, offset, length, writes=True)
        if not self.can_trim:
            raise self._unsupported(Command.TRIM, offset, length)
        with self._writes.write():
            for start, step in _steps(offset, length, ZERO_STEP_BYTES):
                self._call(Request(Command.TRIM, start, step))

    def flush(self) -> None:
        """Make durable every write of this connection that began before; waits until they have been answered.

        A write that failed is its caller's to repeat. On a read-only export there is nothing to do; ENOTSUP
        (GIVE_UP) if the server has no flush, since then it promises nothing.
        """
        if self.read_only:
            return
        if not self.can_flush:
            raise self._unsupported(Command.FLUSH, 0, 0)
        self._writes.wait()
        self._call(Request(Command.FLUSH))

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) of consecutive ranges from `offset`, at least one.

        They may end before `offset + length` (ask again from there) or after it, never past the export's end. The
        meaning of the flags is the context's.
        """
        self._check(Command.BLOCK_STATUS, offset, length)
        context_id = self.opened.context_ids.get(context)
        if context_id is None or length == 0:
            raise self._unsupported(Command.BLOCK_STATUS, offset, length, f" in {context}, which was not granted")
        request = Request(Command.BLOCK_STATUS, offset, min(length, STATUS_STEP_BYTES))
        self._call(request)
        extents = request.status[context_id]
        beyond = offset + sum(span for span, _ in extents) - self.size
        if beyond > 0:  # only the last may reach past the range, which `ReplyReader` has checked
            span, flags = extents[-1]
            extents[-1] = (span - beyond, flags)
        return extents

    def abort(self) -> None:
        """Break the connection from another thread: every pending and later call raises DiskIOError (RECONNECT)."""
        self._channel.abort()

    def close(self) -> None:
        """Disconnect. Flushes nothing: a write is durable after `flush` only."""
        self._channel.close()

    def _call(self, request: Request, payload: memoryview | None = None) -> None:
        self._channel.call(request, payload)
        if request.error is not None:
            raise server_error(request, self._name, request.error)

    def _fua_flag(self, *, fua: bool) -> int:
        return CommandFlag.FUA if fua and self.can_fua else 0

    def _check(self, command: Command, offset: int, length: int, *, writes: bool = False) -> None:
        """Refuse here what a server must refuse, so that no malformed request is ever sent."""
        if writes and self.read_only:
            raise self._refused(command, offset, length, errno.EPERM, "the export is read-only")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self._refused(command, offset, length, errno.EINVAL, f"the export ends at {self.size}")

    def _unsupported(self, command: Command, offset: int, length: int, what: str = "") -> DiskIOError:
        return self._refused(
            command, offset, length, errno.ENOTSUP, f"{os.strerror(errno.ENOTSUP)} by the server{what}"
        )

    def _refused(self, command: Command, offset: int, length: int, number: int, why: str) -> DiskIOError:
        described = describe(Request(command, offset, length), self._name)
        return DiskIOError(
            f"{described} failed: {why}", errno_=number, offset=offset, length=length, next_=Next.GIVE_UP
        )


def _steps(offset: int, length: int, step: int) -> Iterator[tuple[int, int]]:
    """(offset, length) pieces of a range, none longer than `step`, ending at multiples of it."""
    end = offset + length
    while offset < end:
        stop = min(end, (offset // step + 1) * step)
        yield offset, stop - offset
        offset = stop
