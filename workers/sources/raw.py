"""Raw files and block devices as sources."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from coordinator.model.errors import DiskIOError, Next
from coordinator.model.extent import Extent, Status, merge_adjacent
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.qemu import locks
from workers.sources.contract import Identity
from workers.sources.rawdisk import RawDisk


class RawSource:
    """A regular file or block device, read as it is. Holes are what the file system calls holes."""

    may_change: bool

    def __init__(self, path: str, access: Access) -> None:
        self._disk = RawDisk.open(path, os.O_RDONLY, access)
        self.size = self._disk.size
        self.block_size = self._disk.block_size
        self.may_change = locks.has_writer(self._disk.fd) or self._disk.is_claimed()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        if self._disk.is_device:  # lseek knows no holes there
            return merge_adjacent([Extent(offset, length, Status.DATA)])
        return merge_adjacent(self._seek_extents(offset, offset + length))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._disk.read_into(offset, buffer)

    def identity(self) -> Identity:
        return self._disk.identity()

    def reads_from(self) -> frozenset[Identity]:
        return frozenset({self.identity()})

    def fileno(self) -> int | None:
        return None if self._disk.is_device else self._disk.fd

    def nbd_endpoint(self) -> Endpoint | None:
        return None

    def close(self) -> None:
        self._disk.close()

    def _seek_extents(self, offset: int, end: int) -> Iterator[Extent]:
        # The position that lseek leaves behind is shared between threads, but nothing here reads by it.
        while offset < end:
            data = min(self._seek(offset, os.SEEK_DATA, end), end)
            yield Extent(offset, data - offset, Status.HOLE)
            if data == end:
                return
            # At least one byte, or a file that is changed between the two calls would hold us here.
            hole = min(max(self._seek(data, os.SEEK_HOLE, end), data + 1), end)
            yield Extent(data, hole - data, Status.DATA)
            offset = hole

    def _seek(self, offset: int, whence: int, end: int) -> int:
        try:
            return os.lseek(self._disk.fd, offset, whence)
        except OSError as error:
            # ENXIO: nothing but a hole up to the end of the file, provided that the file still ends there.
            if error.errno == errno.ENXIO and os.fstat(self._disk.fd).st_size >= self.size:
                return end
            raise DiskIOError(
                f"cannot look for holes of {self._disk.path}: {error.strerror}",
                errno_=error.errno or errno.EIO,
                offset=offset,
                length=end - offset,
                next_=Next.RETRY,
            ) from error
