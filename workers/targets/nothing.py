"""Nowhere: what `verify` copies a recovery point to, so that every block of it is read and compared with its digest."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.model.extent import Extent, Status
from workers.nbd.endpoint import Endpoint
from workers.sources.identity import Identity


class NoTarget:
    """Takes everything and keeps nothing."""

    block_size = 1
    max_writers = 0
    can_zero = True

    def __init__(self, size: int) -> None:
        self.size = size

    def write(self, offset: int, data: memoryview) -> None:
        return

    def write_zeroes(self, offset: int, length: int) -> None:
        return

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, Status.HOLE)

    def flush(self) -> None:
        return

    def identity(self) -> Identity:
        return ("nothing", id(self))

    def fileno(self) -> int | None:
        return None

    def nbd_endpoint(self) -> Endpoint | None:
        return None

    def abort(self) -> None:
        return

    def close(self) -> None:
        return
