"""What a client asks for in transmission, parsed without I/O, and the memory its requests live in."""

from __future__ import annotations

from collections.abc import Callable, Generator
from threading import Condition, Lock
from typing import NamedTuple

from workers.nbd import wire
from workers.nbd.wire import Command, ProtocolError

MAX_BLOCK_BYTES = wire.DEFAULT_MAX_BLOCK_BYTES
"""The maximum block size this server names, and the longest READ or WRITE it carries out."""
MIN_COST_BYTES = 4096
"""What a request without payload counts for, so that their number is bounded too."""
STATUS_COST_BYTES = 256 * 1024
"""What a block status request counts for: the longest answer to one."""
_SWALLOW_BYTES = 64 * 1024


class Asked(NamedTuple):
    """One request with its payload, of which nothing has been checked. A tuple, because so many are made."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    buffer: bytearray | None
    """The payload of a WRITE of 1 to MAX_BLOCK_BYTES bytes; None for everything else."""
    cost: int
    """Bytes of memory to count for it until it has been answered."""


def cost_of(command: int, length: int) -> int:
    """The bytes a request counts for, its payload or that of its answer; a WRITE or READ too long has none."""
    if command == Command.BLOCK_STATUS:
        return STATUS_COST_BYTES
    if command in (Command.READ, Command.WRITE) and length <= MAX_BLOCK_BYTES:
        return max(length, MIN_COST_BYTES)
    return MIN_COST_BYTES


class Buffers:
    """Memory for payloads, used again and again: fresh memory is zeroed and mapped page by page. Thread-safe.

    For one connection only, so that no byte of one client's can ever show up in another's reply.
    """

    MIN_BYTES = 32 * 1024
    """Smaller ones cost less to make than to keep."""
    MAX_KEPT_BYTES = 8 * 1024 * 1024

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: dict[int, list[bytearray]] = {}
        self._kept_bytes = 0

    def take(self, length: int) -> bytearray:
        """A buffer of exactly `length` bytes with anything in it."""
        if length >= self.MIN_BYTES:
            with self._lock:
                fitting = self._kept.get(length)
                if fitting:
                    self._kept_bytes -= length
                    return fitting.pop()
        return bytearray(length)

    def give(self, buffer: bytearray) -> None:
        """Whoever gives it must not look at it again."""
        length = len(buffer)
        if not self.MIN_BYTES <= length <= self.MAX_KEPT_BYTES:
            return
        with self._lock:
            if self._kept_bytes + length > self.MAX_KEPT_BYTES:  # lengths nobody asks for any more may fill it
                self._kept.clear()
                self._kept_bytes = 0
            self._kept.setdefault(length, []).append(buffer)
            self._kept_bytes += length


class InFlight:
    """The bytes of a connection's requests from when they were read until they are answered. Thread-safe.

        read ── add ─▶ waits ── begin ─▶ with the disk ── end ─▶ answer waits ── sent ─▶ gone

    All of them are held against a budget, and those that are not with the disk against QUEUED_BYTES: a slow disk gets
    as many requests as there are threads, and a fast one works within the processor's caches. One request may exceed
    what is left of either, so memory is bounded by the budget and MAX_BLOCK_BYTES.
    """

    QUEUED_BYTES = 2 * 1024 * 1024
    """With 32 MiB instead, nbdcopy read at three quarters of the speed on two cores."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._all = 0
        self._queued = 0
        self._closed = False
        self._has_come: Callable[[], None] | None = None

    def when_room_has_come(self, has_come: Callable[[], None]) -> None:
        """Call it, from any thread, whenever there is room again; for a reader that cannot wait here."""
        self._has_come = has_come

    @property
    def has_room(self) -> bool:
        """Whether more may be read from the client."""
        return self._queued < self.QUEUED_BYTES and self._all < self._budget

    @property
    def is_empty(self) -> bool:
        return self._all == 0

    def add(self, cost: int) -> None:
        with self._lock:
            self._all += cost
            self._queued += cost

    def begin(self, cost: int) -> None:
        self._subtract(queued=cost)

    def end(self, cost: int) -> None:
        with self._lock:
            self._queued += cost

    def sent(self, cost: int) -> None:
        self._subtract(queued=cost, answered=cost)

    def _subtract(self, queued: int, answered: int = 0) -> None:
        with self._lock:
            had_room = self.has_room
            self._queued -= queued
            self._all -= answered
            room_has_come = self.has_room and not had_room
            if room_has_come or self.is_empty:
                self._changed.notify()  # at most one waits: the thread that reads
        if room_has_come and self._has_come is not None:
            self._has_come()

    def wait_for_room(self) -> None:
        """Raises ConnectionAbortedError if it is closed meanwhile."""
        if not self.has_room:
            self._wait(lambda: self.has_room)

    def wait_until_empty(self) -> None:
        """Raises ConnectionAbortedError if it is closed meanwhile."""
        self._wait(lambda: self.is_empty)

    def close(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self._closed = True
            self._changed.notify()

    def _wait(self, reached: Callable[[], bool]) -> None:
        with self._lock:
            self._changed.wait_for(lambda: self._closed or reached())
            if not reached():
                raise ConnectionAbortedError("the connection was closed by this side")


class RequestReader:
    """Takes the stream of requests apart; `take` is called with each as soon as it is complete."""

    def __init__(self, take: Callable[[Asked], None], buffers: Buffers) -> None:
        self._take = take
        self._buffers = buffers
        self._head = memoryview(bytearray(wire.REQUEST.size))

    def run(self) -> Generator[memoryview, None, None]:
        """Yields the memory the next bytes belong to, and is resumed when all of it has been filled.

        Ends when the client disconnects (NBD_CMD_DISC). Raises ProtocolError where no request begins.
        """
        while True:
            yield self._head
            magic, flags, command, cookie, offset, length = wire.REQUEST.unpack(self._head)
            if magic != wire.REQUEST_MAGIC:
                raise ProtocolError(f"a request starts with the unknown magic {magic:#x}")
            if command == Command.DISC:
                return
            buffer = None
            if command == Command.WRITE and length:
                if length <= MAX_BLOCK_BYTES:
                    buffer = self._buffers.take(length)
                    yield memoryview(buffer)
                else:
                    yield from self._swallow(length)
            self._take(Asked(command, flags, cookie, offset, length, buffer, cost_of(command, length)))

    @staticmethod
    def _swallow(length: int) -> Generator[memoryview, None, None]:
        """The payload of a WRITE that will be refused: what follows it can still be understood."""
        rubbish = memoryview(bytearray(min(length, _SWALLOW_BYTES)))
        while length:
            piece = rubbish[: min(length, len(rubbish))]
            yield piece
            length -= len(piece)
