"""Several connections to one export used as one.

A connection that breaks is replaced by the next call that would use it. What the session never does is to hide
that writes may be gone: a server that was restarted has forgotten what it answered but had not flushed, and a flush
on the new connection would succeed without it. So after a connection with unflushed writes has broken, the session's
next `flush` fails (Next.GIVE_UP), and whoever wrote since the last good flush has to write it again.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from coordinator.model.errors import DiskIOError, FlushpointError, Next, UnavailableError, UsageError
from workers.nbd.connection import DEFAULT_TIMEOUT_S, Connection, connect
from workers.nbd.covered import CoveredWrites
from workers.nbd.endpoint import Endpoint
from workers.nbd.export import ExportAttributes

EXTRA_CONNECT_TIMEOUT_S = 5.0
"""qemu-nbd without `--shared` leaves a second client waiting in the backlog; one connection does as well."""
REPEAT_REMEDY = "Repeat every write made since the last flush that succeeded"


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How many connections a session may use, and how long, in seconds, its peer may be silent."""

    connections: int = 2
    timeout_s: float = DEFAULT_TIMEOUT_S


DEFAULT_LIMITS = SessionLimits()


class _Member:
    """One connection of a session. All fields but `connection` belong to the session's lock."""

    def __init__(self, connection: Connection, busy: int = 0) -> None:
        self.connection = connection
        self.busy = busy
        """Calls under way."""
        self.wrote = False
        """Holds writes that were answered and not flushed since."""
        self.retired = False
        """Broken, and replaced by another member."""


class Session(ExportAttributes):
    """Same calls and errors as `Connection`; a call goes to the connection with the fewest calls under way.

    One flush answers for all writes of the session: threads that share a session share the outcome of its flushes.
    """

    def __init__(self, first: Connection, contexts: Sequence[str], timeout_s: float) -> None:
        super().__init__(first.opened)
        self.endpoint = first.endpoint
        self._asked = tuple(contexts)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._replacing = threading.Lock()
        self._flushing = threading.Lock()
        self._writes = CoveredWrites()
        self._members = [_Member(first)]
        self.is_full = False
        """The server let in fewer connections than were asked for: another client would wait in vain."""
        self._closed = False
        self._failed_at = 0.0
        self._lost = 0
        """How often unflushed writes were lost with their connection, or a flush failed."""
        self._told = 0
        """The value of `_lost` a flush has raised an error for."""

    @classmethod
    def open(
        cls,
        endpoint: Endpoint,
        connections: int,
        *,
        contexts: Sequence[str] = (),
        timeout_s: float = DEFAULT_TIMEOUT_S,
        structured: bool = True,
    ) -> Self:
        """Up to `connections` connections; one if the export is writable and not CAN_MULTI_CONN.

        Such a server may give every connection a cache of its own (proto.md, NBD_FLAG_CAN_MULTI_CONN). It goes on
        with fewer if the server lets no more in. Errors as in `connection.connect`.
        """
        if connections < 1:
            raise UsageError(f"{connections} connections are too few", "Ask for one at least")
        session = cls(
            connect(endpoint, contexts=contexts, timeout_s=timeout_s, structured=structured), contexts, timeout_s
        )
        if session.read_only or session.can_multi_conn:
            session._open_more(connections - 1)
        return session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def connections(self) -> int:
        """How many connections it has, broken ones that were not replaced yet among them."""
        return len(self._members)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `Connection.read_into`."""
        with self._member() as member:
            member.connection.read_into(offset, buffer)

    def write(self, offset: int, data: memoryview | bytes, *, fua: bool = False) -> None:
        """As `Connection.write`."""
        with self._writing() as connection:
            connection.write(offset, data, fua=fua)

    def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False, fua: bool = False
    ) -> None:
        """As `Connection.write_zeroes`."""
        with self._writing() as connection:
            connection.write_zeroes(offset, length, no_hole=no_hole, fast=fast, fua=fua)

    def trim(self, offset: int, length: int) -> None:
        """As `Connection.trim`."""
        with self._writing() as connection:
            connection.trim(offset, length)

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        """As `Connection.block_status`."""
        with self._member() as member:
            return member.connection.block_status(context, offset, length)

    def flush(self) -> None:
        """Make durable every write of the session that began before; waits until all have been answered.

        With CAN_MULTI_CONN one FLUSH on any connection covers all of them, by the letter. It is sent on each
        connection that wrote since its last one nevertheless: that is right even with a server that promises more
        than it keeps, and costs nothing where it keeps it.

        Raises DiskIOError with Next.GIVE_UP if a FLUSH failed, or if a connection broke after writes on it were
        answered and before they were flushed; they may be lost. Every flush under way then raises it, and the next
        one if there is none.
        """
        if self.read_only:
            return
        with self._lock:
            told = self._told
        self._writes.wait()
        with self._flushing:  # a second flush must not return while the first is still on its way
            cause = self._flush_members(told)
            with self._lock:
                if self._lost == told:
                    return
                self._told = self._lost
        raise DiskIOError(
            f"unflushed writes to {self.endpoint} may be lost{f': {cause.message}' if cause else ''}",
            errno_=cause.errno if cause else errno.EIO,
            next_=Next.GIVE_UP,
            remedy=REPEAT_REMEDY,
        ) from cause

    def abort(self) -> None:
        """Break all connections from another thread; no call reconnects afterwards."""
        with self._lock:
            self._closed = True
            members = list(self._members)
        for member in members:
            member.connection.abort()

    def close(self) -> None:
        """Disconnect everywhere. Flushes nothing."""
        with self._lock:
            self._closed = True
            members = list(self._members)
        for member in members:
            member.connection.close()

    def _open_more(self, connections: int) -> None:
        """Raises what `connect` raises, with all connections closed, unless there is just no room for more."""
        try:
            for _ in range(connections):
                self._members.append(_Member(self._connect(min(self._timeout_s, EXTRA_CONNECT_TIMEOUT_S))))
        except UnavailableError:
            self.is_full = True
        except FlushpointError:
            self.close()
            raise

    def _connect(self, handshake_timeout_s: float) -> Connection:
        connection = connect(
            self.endpoint,
            contexts=self._asked,
            timeout_s=self._timeout_s,
            handshake_timeout_s=handshake_timeout_s,
            structured=self.structured,
        )
        if (connection.size, connection.read_only, connection.contexts) != (self.size, self.read_only, self.contexts):
            connection.close()
            raise DiskIOError(f"{self.endpoint} is no longer the export it was when opened", next_=Next.GIVE_UP)
        return connection

    @contextmanager
    def _member(self) -> Iterator[_Member]:
        member = self._take()
        try:
            yield member
        finally:
            with self._lock:
                member.busy -= 1

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A connection for a write, which the next flush has to cover once it has been answered."""
        with self._writes.write(), self._member() as member:
            yield member.connection
            with self._lock:
                if member.retired:  # it broke after the answer, and no flush will come on it
                    self._lost += 1
                member.wrote = True

    def _take(self) -> _Member:
        """The least busy member, on a new connection if its own is broken; one attempt to connect per call."""
        started = time.monotonic()
        with self._lock:
            self._check_open()
            place = min(range(len(self._members)), key=lambda at: self._members[at].busy)
            member = self._members[place]
            member.busy += 1
        if member.connection.broken is None:
            return member
        with self._lock:
            member.busy -= 1
        with self._replacing:
            return self._replaced(place, started)

    def _replaced(self, place: int, started: float) -> _Member:
        """With `_replacing` held."""
        with self._lock:
            self._check_open()
            old = self._members[place]
            if old.connection.broken is None:  # another call has replaced it meanwhile
                old.busy += 1
                return old
        if self._failed_at > started:
            raise self._unreachable("reconnecting has just failed")
        try:
            new = _Member(self._connect(self._timeout_s), busy=1)
        except DiskIOError:
            raise
        except UnavailableError as error:
            self._failed_at = time.monotonic()
            raise self._unreachable(error.message) from error
        except FlushpointError as error:  # it no longer has the export, or no longer wants us
            raise DiskIOError(error.message, next_=Next.GIVE_UP, remedy=error.remedy) from error
        with self._lock:
            self._members[place] = new
            old.retired = True
            if old.wrote:
                self._lost += 1
            closed = self._closed
        old.connection.close()
        if closed:  # the session was closed while this call connected
            new.connection.close()
        return new

    def _flush_members(self, told: int) -> DiskIOError | None:
        """FLUSH on every connection that wrote; returns the first failure, all of them counted as lost."""
        with self._lock:
            self._check_open()
            wrote = [member for member in self._members if member.wrote]
            for member in wrote:
                member.wrote = False  # writes answered from here on belong to the next flush
            nothing_to_do = not wrote and self._lost == told
        if nothing_to_do:  # still asked of the server: a caller may mean writes of an earlier session
            with self._member() as member:
                member.connection.flush()
        cause: DiskIOError | None = None
        for member in wrote:
            try:
                member.connection.flush()
            except DiskIOError as error:
                cause = cause or error
                with self._lock:
                    self._lost += 1
        return cause

    def _check_open(self) -> None:
        if self._closed:
            raise self._unreachable("the session is closed")

    def _unreachable(self, why: str) -> DiskIOError:
        return DiskIOError(f"{self.endpoint} cannot be reached: {why}", next_=Next.RECONNECT)
