"""How each request is carried out and answered: checks, the disk, the bytes of the reply. No socket here.

What a request may not ask is answered as proto.md wants it ("Error values", "Block size constraints"):

    EINVAL      unknown command or flag; a READ, TRIM or BLOCK_STATUS past the end; a READ or WRITE over 32 MiB
    ENOSPC      a WRITE or WRITE_ZEROES past the end
    EPERM       a WRITE, WRITE_ZEROES or TRIM of a read-only export
    ENOTSUP     FAST_ZERO where zeroing may be as slow as writing
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from structlog.typing import FilteringBoundLogger

from coordinator.model.errors import DiskIOError
from coordinator.model.extent import Extent, Status
from workers.nbd import server_wire, wire
from workers.nbd.served import LayeredDisk, ServedDisk
from workers.nbd.server_handshake import ALLOCATION_ID, DEPTH_ID, Agreed
from workers.nbd.server_requests import MAX_BLOCK_BYTES, STATUS_COST_BYTES, Asked, Buffers
from workers.nbd.wire import AllocationFlag, ChunkKind, Command, CommandFlag

MIN_HOLE_BYTES = 32 * 1024
"""Shorter holes are sent as data, and shorter reads are not looked through for holes: a chunk more costs as much."""
MAX_DESCRIPTORS = STATUS_COST_BYTES // wire.STATUS_DESCRIPTOR.size

# Plain integers: what the operators of IntFlag cost is seen at 4 KiB a request.
_FUA = int(CommandFlag.FUA)
_NO_HOLE = int(CommandFlag.NO_HOLE)
_DF = int(CommandFlag.DF)
_REQ_ONE = int(CommandFlag.REQ_ONE)
_FAST_ZERO = int(CommandFlag.FAST_ZERO)

_WRITES = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})
_PAYLOADS = frozenset({Command.READ, Command.WRITE})
_FLAGS_OF: dict[int, int] = {  # FUA is valid with every command, "even by ignoring the bit"
    Command.READ: _FUA,
    Command.WRITE: _FUA,
    Command.FLUSH: _FUA,
    Command.TRIM: _FUA,
    Command.WRITE_ZEROES: _FUA | _NO_HOLE | _FAST_ZERO,
    Command.BLOCK_STATUS: _FUA | _REQ_ONE,
}
_ALLOCATION = {
    Status.DATA: 0,
    Status.DIRTY: 0,
    Status.ZERO: int(AllocationFlag.ZERO),
    Status.HOLE: int(AllocationFlag.ZERO | AllocationFlag.HOLE),
}


class Reply(NamedTuple):
    """The bytes that answer a request, and what it cost."""

    parts: list[bytes | memoryview]
    cost: int
    buffer: bytearray | None = None
    """Memory of the request or under `parts` that is free once they are sent."""


class _RefusedError(Exception):
    """A request that the disk never sees. `errno` is POSIX."""

    def __init__(self, errno_: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno_
        self.message = message


class Answers:
    """The answers to one client. Thread-safe: requests are carried out in any order, many at once.

    A FLUSH needs no order either: it covers the writes answered before it was sent, and those the disk has returned.
    """

    def __init__(self, agreed: Agreed, buffers: Buffers, log: FilteringBoundLogger) -> None:
        self._disk: ServedDisk = agreed.disk
        self._writable = agreed.writable
        self._size = agreed.disk.size
        self._structured = agreed.structured
        self._contexts = agreed.contexts
        self._buffers = buffers
        self._log = log
        self._flags = dict(_FLAGS_OF)
        if self._structured:
            self._flags[Command.READ] |= _DF
        self._carry_out: dict[int, Callable[[Asked], Reply]] = {
            Command.READ: self._read,
            Command.WRITE: self._write,
            Command.WRITE_ZEROES: self._write_zeroes,
            Command.TRIM: self._trim,
            Command.FLUSH: self._flush,
            Command.BLOCK_STATUS: self._block_status,
        }

    def to(self, asked: Asked) -> Reply:
        """Carry out a request. Every error is an answer, and only those of the disk are worth a line in the log."""
        try:
            self._check(asked)
            return self._carry_out[asked.command](asked)
        except _RefusedError as refused:
            self._log.debug("refused a request", **_described(asked), reason=refused.message)
            return self._error(asked, refused.errno, refused.message)
        except DiskIOError as error:
            self._log.warning("a request failed", **_described(asked), errno=error.errno, error=error.message)
            return self._error(asked, error.errno, error.message)
        except Exception:
            self._log.exception("a request broke", **_described(asked))
            return self._error(asked, errno.EIO, "the server has a bug")

    def _check(self, asked: Asked) -> None:
        """Raises _RefusedError unless this client may ask that."""
        command = asked.command
        allowed = self._flags.get(command)
        if allowed is None:
            raise _RefusedError(errno.EINVAL, f"command {command} is not supported")
        if asked.flags & ~allowed:
            raise _RefusedError(errno.EINVAL, f"{Command(command).name} has no flags {asked.flags & ~allowed:#x}")
        if command in _WRITES and self._writable is None:
            raise _RefusedError(errno.EPERM, "the export is read-only")
        if command in _PAYLOADS and asked.length > MAX_BLOCK_BYTES:
            raise _RefusedError(errno.EINVAL, f"a request may carry {MAX_BLOCK_BYTES} bytes")
        if asked.offset + asked.length > self._size and command != Command.FLUSH:
            number = errno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else errno.EINVAL
            raise _RefusedError(number, f"the export ends at {self._size}")

    def _read(self, asked: Asked) -> Reply:
        if not self._structured:
            return self._read_flat(asked, server_wire.encode_simple_reply(asked.cookie))
        if asked.length == 0:
            return Reply([server_wire.encode_chunk(asked.cookie, ChunkKind.NONE)], asked.cost)
        whole = asked.length < MIN_HOLE_BYTES or asked.flags & _DF or not self._disk.finds_holes_fast
        pieces = [] if whole else _pieces(self._disk, asked.offset, asked.length)
        if any(is_hole for _, _, is_hole in pieces):
            return self._read_pieces(asked, pieces)
        return self._read_flat(asked, server_wire.encode_data_head(asked.cookie, asked.offset, asked.length))

    def _read_flat(self, asked: Asked, head: bytes) -> Reply:
        buffer = self._buffers.take(asked.length)
        view = memoryview(buffer)
        self._disk.read_into(asked.offset, view)
        return Reply([head, view], asked.cost, buffer)

    def _read_pieces(self, asked: Asked, pieces: list[tuple[int, int, bool]]) -> Reply:
        """Nothing is sent before all has been read, so a reply is either data or an error."""
        buffer = self._buffers.take(asked.length)
        view = memoryview(buffer)
        parts: list[bytes | memoryview] = []
        for offset, length, is_hole in pieces:
            done = offset + length == asked.offset + asked.length
            if is_hole:
                parts.append(server_wire.encode_hole(asked.cookie, offset, length, done=done))
                continue
            piece = view[offset - asked.offset : offset - asked.offset + length]
            self._disk.read_into(offset, piece)
            parts += (server_wire.encode_data_head(asked.cookie, offset, length, done=done), piece)
        return Reply(parts, asked.cost, buffer)

    def _write(self, asked: Asked) -> Reply:
        assert self._writable is not None
        if asked.buffer is not None:
            self._writable.write(asked.offset, memoryview(asked.buffer))
        return self._written(asked)

    def _write_zeroes(self, asked: Asked) -> Reply:
        assert self._writable is not None
        if asked.flags & _FAST_ZERO and not self._writable.zeroes_fast:
            raise _RefusedError(errno.ENOTSUP, "zeroing may be as slow as writing")
        if asked.length:
            may_trim = not asked.flags & _NO_HOLE
            self._writable.write_zeroes(asked.offset, asked.length, may_trim=may_trim)
        return self._written(asked)

    def _trim(self, asked: Asked) -> Reply:
        assert self._writable is not None
        if asked.length:
            self._writable.trim(asked.offset, asked.length)
        return self._written(asked)

    def _flush(self, asked: Asked) -> Reply:
        if self._writable is not None:
            self._writable.flush()
        return self._plain(asked)

    def _written(self, asked: Asked) -> Reply:
        """The answer to what changed the disk, durable first if the client wants that."""
        if asked.flags & _FUA and self._writable is not None:
            self._writable.flush()
        return self._plain(asked)

    def _plain(self, asked: Asked) -> Reply:
        return Reply([server_wire.encode_simple_reply(asked.cookie)], asked.cost, asked.buffer)

    def _block_status(self, asked: Asked) -> Reply:
        if not self._contexts:
            raise _RefusedError(errno.EINVAL, "no meta context was negotiated")
        if asked.length == 0:
            raise _RefusedError(errno.EINVAL, "block status of nothing")
        most = 1 if asked.flags & _REQ_ONE else MAX_DESCRIPTORS // len(self._contexts)
        parts: list[bytes | memoryview] = []
        for context in self._contexts:
            runs = list(islice(self._status(context, asked.offset, asked.length), most))
            if not runs:
                raise _gap(asked.offset)
            done = context == self._contexts[-1]
            parts.append(server_wire.encode_block_status(asked.cookie, context, runs, done=done))
        return Reply(parts, asked.cost)

    def _status(self, context: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
        if context == ALLOCATION_ID:
            return _runs(self._disk.extents(offset, length), offset, length)
        assert context == DEPTH_ID
        assert isinstance(self._disk, LayeredDisk)
        return _joined(self._disk.depths(offset, length), length)

    def _error(self, asked: Asked, number: int, message: str) -> Reply:
        error = wire.nbd_error(number)
        if self._structured:
            return Reply([server_wire.encode_error(asked.cookie, error, message)], asked.cost)
        return Reply([server_wire.encode_simple_reply(asked.cookie, error)], asked.cost)


def _described(asked: Asked) -> dict[str, object]:
    known = asked.command in set(Command)
    return {
        "request": Command(asked.command).name if known else asked.command,
        "offset": asked.offset,
        "length": asked.length,
    }


def _runs(extents: Iterable[Extent], offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(length, flags of base:allocation) from `offset` on, neighbours joined, at most `length` bytes in all.

    DiskIOError at a gap: every later run would be told at a wrong place, and clients leave out what reads as zeroes.
    """
    return _joined(_told(extents, offset), length)


def _told(extents: Iterable[Extent], at: int) -> Iterator[tuple[int, int]]:
    for extent in extents:
        if extent.offset > at:
            raise _gap(at)
        if extent.end > at:
            yield extent.end - at, _ALLOCATION[extent.status]
            at = extent.end


def _joined(runs: Iterable[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """Neighbours of the same flags as one, at most `length` bytes in all."""
    held, held_flags = 0, 0
    for whole, flags in runs:
        run = min(whole, length)
        length -= run
        if flags == held_flags:
            held += run
        elif run:
            if held:
                yield held, held_flags
            held, held_flags = run, flags
    if held:
        yield held, held_flags


def _gap(offset: int) -> DiskIOError:
    return DiskIOError(f"the disk does not say what there is at byte {offset}", offset=offset)


def _pieces(disk: ServedDisk, offset: int, length: int) -> list[tuple[int, int, bool]]:
    """(offset, length, whether it is a hole) of all of a range; short holes count as data."""
    pieces: list[tuple[int, int, bool]] = []
    at, end = offset, offset + length
    for run, flags in _runs(disk.extents(offset, length), offset, length):
        is_hole = bool(flags & AllocationFlag.ZERO) and run >= MIN_HOLE_BYTES
        _append(pieces, at, run, is_hole)
        at += run
    _append(pieces, at, end - at, False)  # what the disk says nothing about is read
    return pieces


def _append(pieces: list[tuple[int, int, bool]], offset: int, length: int, is_hole: bool) -> None:
    """Joined to the last piece if that is of the same kind."""
    if pieces and pieces[-1][2] == is_hole:
        before, so_far, _ = pieces.pop()
        offset, length = before, so_far + length
    if length:
        pieces.append((offset, length, is_hole))
