"""Disks of a recovery point as exports of our NBD server: as they are, or under an overlay on local disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from coordinator.model.errors import DiskIOError, FlushpointError, RefusedError
from coordinator.model.extent import BLOCK_BYTES, Extent, Status, merge_adjacent
from workers.repository.layout import DamageError
from workers.repository.reader import PointDisk

_SYNCED, _WRITTEN = 1, 2
_NOT_WRITTEN, _ANY_WRITTEN = re.compile(rb"\0"), re.compile(rb"[^\0]")
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
    """A point that can be written: blocks that were written are in a sparse file, with a byte each in another::

        NAME.overlay   the blocks
        NAME.blocks    for each block 0: as in the point; 1: written, and synced; 2: written since
        NAME.point     JSON: which disk of which point it lies over, and the boot of the host that wrote the 2s

    They are kept: served again over them, the disk is as it was left. A 2 becomes 1 in a flush, after the data was
    synced. What a killed server wrote is in the kernel's cache, so a 2 counts until the host boots anew: then it is
    unknown what of its block came to the disk, and nobody was promised any of it.
    """

    read_only = False
    preferred_block = BLOCK_BYTES
    finds_holes_fast = True
    zeroes_fast = False

    def __init__(self, disk: PointDisk, directory: Path, name: str, identity: str) -> None:
        """`identity` tells the disk from all others. RefusedError if the files there are of another one, or another
        server writes them; OSError."""
        self._below = ServedPoint(disk)
        self.size = disk.size
        blocks = max(1, -(-disk.size // BLOCK_BYTES))
        self._locks = [threading.Lock() for _ in range(_STRIPES)]
        self._new: set[int] = set()
        """Blocks whose byte in the file is 2."""
        self._flush_failed = False
        with contextlib.ExitStack() as opened:
            self._data = _sized(directory / f"{name}.overlay", disk.size)
            opened.callback(os.close, self._data)
            self._bits_file = _sized(directory / f"{name}.blocks", blocks)
            opened.callback(os.close, self._bits_file)
            same_boot = _claim(directory / f"{name}.point", identity)
            self._bits = bytearray(os.pread(self._bits_file, blocks, 0))
            for number in _positions(self._bits, _WRITTEN):
                if same_boot:
                    self._new.add(number)
                else:
                    self._bits[number] = 0
                    os.pwrite(self._bits_file, b"\0", number)
            if not same_boot:
                os.fsync(self._bits_file)  # before the new boot's id is there, by which they would count
                _write_whole(directory / f"{name}.point", {"of": identity, "boot": _boot_id()})
            self._files = opened.pop_all()

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
                    self._note(number)
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
        """Once it has failed it fails for ever: the kernel tells of lost writes once, and a guest that was paused would
        take the next flush's word for them."""
        if self._flush_failed:
            raise DiskIOError(
                "the overlay: an earlier flush failed, so that writes may be lost",
                remedy="mend its file system, and serve with another directory",
            )
        try:
            new = sorted(self._new.copy())
            os.fsync(self._data)
            for number in new:
                os.pwrite(self._bits_file, bytes([_SYNCED]), number)
            os.fsync(self._bits_file)
            self._new.difference_update(new)
        except OSError as error:
            self._flush_failed = True
            raise _local_error(error, -1, 0) from error

    def close(self) -> None:
        with contextlib.suppress(DiskIOError):
            self.flush()
        self._files.close()

    def _note(self, number: int) -> None:
        """The block is in the overlay from here on: also for who serves it after this server was killed."""
        try:
            os.pwrite(self._bits_file, bytes([_WRITTEN]), number)
        except OSError as error:
            raise _local_error(error, number * BLOCK_BYTES, BLOCK_BYTES) from error
        self._new.add(number)
        self._bits[number] = _WRITTEN

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """[start, end) runs of blocks that were written, and that were not."""
        end = offset + length
        while offset < end:
            number = offset // BLOCK_BYTES
            last = (end - 1) // BLOCK_BYTES
            written = bool(self._bits[number])
            look_for = _NOT_WRITTEN if written else _ANY_WRITTEN
            other = look_for.search(self._bits, number, last + 1)
            stop = end if other is None else other.start() * BLOCK_BYTES
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


def _claim(path: Path, identity: str) -> bool:
    """Whether what the overlay's files say is of this boot of the host; RefusedError if they are of another disk."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return False
    except ValueError:
        found = {}
    if found.get("of") != identity:
        raise RefusedError(f"{path.with_suffix('.overlay')} lies over another disk", "name another directory")
    return bool(found.get("boot") == _boot_id())


def _write_whole(path: Path, fields: dict[str, str]) -> None:
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        json.dump(fields, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _positions(data: bytearray, value: int) -> Iterator[int]:
    at = data.find(value)
    while at >= 0:
        yield at
        at = data.find(value, at + 1)


def _local_error(error: OSError, offset: int, length: int) -> DiskIOError:
    message = f"the overlay: {error.strerror}"
    return DiskIOError(message, errno_=error.errno or 5, offset=offset, length=length, remedy="look at its file system")


def _served_error(error: FlushpointError, offset: int, length: int) -> DiskIOError:
    what = "damaged" if isinstance(error, DamageError) else "unreadable"
    return DiskIOError(f"{what}: {error.message}", offset=offset, length=length, remedy=error.remedy)
