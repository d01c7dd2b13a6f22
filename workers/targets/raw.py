"""Raw files and block devices as targets."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Iterator

from coordinator.model.errors import DiskIOError, Next
from coordinator.model.extent import Extent, merge_adjacent
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.sources.identity import Identity
from workers.sources.rawdisk import RawDisk
from workers.targets.zeroes import write_zero_bytes

_FALLOC_FL_KEEP_SIZE = 0x01  # <linux/falloc.h>
_FALLOC_FL_PUNCH_HOLE = 0x02
_FALLOC_FL_ZERO_RANGE = 0x10
_ZERO_MODES = (_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, _FALLOC_FL_ZERO_RANGE | _FALLOC_FL_KEEP_SIZE)
"""Best first; a file system or device that has neither gets zeroes written."""
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int


class RawTarget:
    """A regular file or block device, of which the first `size` bytes are written."""

    max_writers = 0

    def __init__(self, path: str, access: Access) -> None:
        """Open what exists. RefusedError if it may not be written."""
        self._disk = RawDisk.open(path, os.O_RDWR, access)
        self.size = self._disk.size
        self.block_size = self._disk.block_size
        self._zero_modes: tuple[int, ...] = _ZERO_MODES
        self._writing = contextlib.nullcontext() if self._disk.is_device else threading.Lock()
        """The kernel lets one writer at a time into a file, and the others burn their time in waiting for it."""
        self._flushing = threading.Lock()
        self._flush_failure: OSError | None = None

    @property
    def can_zero(self) -> bool:
        return bool(self._zero_modes)  # until the first attempt nothing tells what a file system can

    def write(self, offset: int, data: memoryview) -> None:
        self._check_range(offset, len(data))
        done = 0
        while done < len(data):
            try:
                with self._writing:
                    done += os.pwrite(self._disk.fd, data[done:], offset + done)
            except OSError as error:
                raise self._disk.failed("write", offset + done, len(data) - done, error) from error

    def write_zeroes(self, offset: int, length: int) -> None:
        self._check_range(offset, length)
        # A device zeroes whole sectors only; a file any bytes.
        start = -(-offset // self.block_size) * self.block_size
        end = (offset + length) // self.block_size * self.block_size
        if start >= end:
            write_zero_bytes(self.write, offset, length)
            return
        write_zero_bytes(self.write, offset, start - offset)
        self._zero_sectors(start, end - start)
        write_zero_bytes(self.write, end, offset + length - end)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._disk.read_into(offset, buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return merge_adjacent(self._disk.extents(offset, length))

    def flush(self) -> None:
        # One at a time, and the first failure stays: the kernel tells only one caller that a write-back
        # failed, and the next fsync of the same descriptor succeeds without the lost pages.
        with self._flushing:
            try:
                if self._flush_failure is None:
                    os.fsync(self._disk.fd)
            except OSError as error:
                self._flush_failure = error
            if self._flush_failure is not None:
                failure = self._flush_failure
                raise self._disk.failed("flush the writes", -1, 0, failure, Next.RECONNECT) from failure

    def identity(self) -> Identity:
        return self._disk.identity()

    def fileno(self) -> int | None:
        return None if self._disk.is_device else self._disk.fd

    def nbd_endpoint(self) -> Endpoint | None:
        return None

    def abort(self) -> None:
        """The kernel lets nobody out of a write to a file."""

    def close(self) -> None:
        self._disk.close()

    def _check_range(self, offset: int, length: int) -> None:
        # A write past the end would make a file longer without a word.
        if offset < 0 or offset + length > self.size:
            raise DiskIOError(
                f"{length} bytes at {offset} are not within the {self.size} bytes of {self._disk.path}",
                errno_=errno.EINVAL,
                offset=offset,
                length=length,
                next_=Next.GIVE_UP,
            )

    def _zero_sectors(self, offset: int, length: int) -> None:
        for mode in self._zero_modes:
            if _libc.fallocate(self._disk.fd, mode, offset, length) == 0:
                return
            number = ctypes.get_errno()
            if number == errno.EINTR:
                break  # zeroing by hand is right whatever was done before
            if number not in _UNSUPPORTED:
                error = OSError(number, os.strerror(number))
                raise self._disk.failed("zero", offset, length, error)
            self._zero_modes = tuple(m for m in self._zero_modes if m != mode)
        write_zero_bytes(self.write, offset, length)
