"""Disks of a recovery point as exports of our NBD server: as they are, or under an overlay on local disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from coordinator.model.errors import DiskIOError, FlushpointError, RefusedError
from coordinator.model.extent import BLOCK_BYTES, Extent, Status, merge_adjacent
from workers.repository.layout import DamageError
from workers.repository.reader import PointDisk

_STRIPES = 64
"""Locks for first writes of blocks: so many of them at once, and no lock for each block of a huge disk."""


class ServedPoint:
    """Read-only: nothing is on local disk but what the reader holds in memory."""

    read_only = True
    preferred_block = BLOCK_BYTES
    finds_holes_fast = True

    def __init__(self, disk: PointDisk) -> None:
        self._disk = disk
        self.size = disk.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        try:
            self._disk.read_into(offset, buffer)
        except FlushpointError as error:
            raise _served_error(error, offset, len(buffer)) from error

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        try:
            yield from merge_adjacent(self._disk.extents(offset, length))
        except FlushpointError as error:
            raise _served_error(error, offset, length) from error


class Overlay:
    """A point that can be written: blocks that were written are in a sparse file, with a bit each in another.

    Both files are kept: served again over them, the disk is as it was left. Bits reach their file in a flush, after the
    data was synced, so a block whose bit survives a power failure is whole.
    """

    read_only = False
    preferred_block = BLOCK_BYTES
    finds_holes_fast = True
    zeroes_fast = False

    def __init__(self, disk: PointDisk, directory: Path, name: str) -> None:
        """RefusedError if the files there are of another disk, or another server writes them."""
        self._below = ServedPoint(disk)
        self.size = disk.size
        blocks = -(-disk.size // BLOCK_BYTES)
        self._locks = [threading.Lock() for _ in range(_STRIPES)]
        data, bits = directory / f"{name}.overlay", directory / f"{name}.blocks"
        self._data = _sized(data, disk.size)
        try:
            self._bits_file = _sized(bits, max(1, blocks))
        except BaseException:
            os.close(self._data)
            raise
        self._bits = bytearray(os.pread(self._bits_file, max(1, blocks), 0))
        self._new: set[int] = set()
        """Blocks whose bit is not in the file yet."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for start, end, written in self._pieces(offset, len(buffer)):
            piece = buffer[start - offset : end - offset]
            if written:
                self._pread(start, piece)
            else:
                self._below.read_into(start, piece)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for start, end, written in self._pieces(offset, length):
            if written:
                yield Extent(start, end - start, Status.DATA)
            else:
                yield from self._below.extents(start, end - start)

    def write(self, offset: int, data: memoryview) -> None:
        """A block that is not there yet is fetched from below first, unless all of it is written."""
        end = offset + len(data)
        at = offset
        while at < end:
            number = at // BLOCK_BYTES
            stop = min(end, (number + 1) * BLOCK_BYTES)
            with self._locks[number % _STRIPES]:
                first = not self._bits[number]
                if first:
                    self._bring_up(number, whole=stop - at == self._length_of(number))
                self._pwrite(at, data[at - offset : stop - offset])
                if first:
                    self._bits[number] = 1
                    self._new.add(number)
            at = stop

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
        zeroes = memoryview(bytes(min(length, BLOCK_BYTES * 16)))
        end = offset + length
        while offset < end:
            step = min(end - offset, len(zeroes))
            self.write(offset, zeroes[:step])
            offset += step

    def trim(self, offset: int, length: int) -> None:
        """A trimmed range may read as anything: it keeps what it has."""

    def flush(self) -> None:
        try:
            new = sorted(self._new.copy())
            os.fsync(self._data)
            for number in new:
                os.pwrite(self._bits_file, b"\1", number)
            os.fsync(self._bits_file)
            self._new.difference_update(new)
        except OSError as error:
            raise _local_error(error, -1, 0) from error

    def close(self) -> None:
        with contextlib.suppress(DiskIOError):
            self.flush()
        os.close(self._bits_file)
        os.close(self._data)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """[start, end) runs of blocks that were written, and that were not."""
        end = offset + length
        while offset < end:
            number = offset // BLOCK_BYTES
            last = (end - 1) // BLOCK_BYTES
            written = bool(self._bits[number])
            other = self._bits.find(b"\0" if written else b"\1", number, last + 1)
            stop = end if other < 0 else other * BLOCK_BYTES
            yield offset, stop, written
            offset = stop

    def _bring_up(self, number: int, *, whole: bool) -> None:
        if whole:
            return
        block = memoryview(bytearray(self._length_of(number)))
        self._below.read_into(number * BLOCK_BYTES, block)
        self._pwrite(number * BLOCK_BYTES, block)

    def _length_of(self, number: int) -> int:
        return min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)

    def _pread(self, offset: int, buffer: memoryview) -> None:
        done = 0
        try:
            while done < len(buffer):
                got = os.preadv(self._data, [buffer[done:]], offset + done)
                if got == 0:
                    raise DiskIOError("the overlay has become shorter", offset=offset, length=len(buffer))
                done += got
        except OSError as error:
            raise _local_error(error, offset, len(buffer)) from error

    def _pwrite(self, offset: int, data: memoryview) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._data, data[done:], offset + done)
        except OSError as error:
            raise _local_error(error, offset, len(data)) from error


def _sized(path: Path, size: int) -> int:
    """A descriptor of a file of just `size` bytes, made if it is absent, and locked: two servers would not know of each
    other's blocks.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_size not in (0, size):
            raise RefusedError(f"{path} is the overlay of another disk", "name another directory, or remove it")
        os.ftruncate(fd, size)
    except BlockingIOError as error:
        os.close(fd)
        raise RefusedError(f"{path} is being served already", "name another directory, or stop that server") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _local_error(error: OSError, offset: int, length: int) -> DiskIOError:
    message = f"the overlay: {error.strerror}"
    return DiskIOError(message, errno_=error.errno or 5, offset=offset, length=length, remedy="look at its file system")


def _served_error(error: FlushpointError, offset: int, length: int) -> DiskIOError:
    what = "damaged" if isinstance(error, DamageError) else "unreadable"
    return DiskIOError(f"{what}: {error.message}", offset=offset, length=length, remedy=error.remedy)
