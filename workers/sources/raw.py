"""Raw files and block devices as sources."""

from __future__ import annotations

import os
from collections.abc import Iterator

from coordinator.model.extent import Extent, merge_adjacent
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.qemu import locks
from workers.sources.identity import Identity
from workers.sources.rawdisk import RawDisk


class RawSource:
    """A regular file or block device, read as it is. Holes are what the file system calls holes."""

    may_change: bool
    max_readers = 0

    def __init__(self, path: str, access: Access) -> None:
        self._disk = RawDisk.open(path, os.O_RDONLY, access)
        self.size = self._disk.size
        self.block_size = self._disk.block_size
        self.may_change = locks.has_writer(self._disk.fd) or self._disk.is_claimed()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return merge_adjacent(self._disk.extents(offset, length))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._disk.read_into(offset, buffer)

    def identity(self) -> Identity:
        return self._disk.identity()

    def reads_from(self) -> frozenset[Identity]:
        return self._disk.lies_on()

    def stamp(self) -> str:
        return self._disk.stamp()

    def fileno(self) -> int | None:
        return None if self._disk.is_device else self._disk.fd

    def nbd_endpoint(self) -> Endpoint | None:
        return None

    def abort(self) -> None:
        """The kernel lets nobody out of a read of a file."""

    def close(self) -> None:
        self._disk.close()
