"""Disks for the server to serve: in memory, with holes; and one whose reads a test holds back or lets fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import groupby

from coordinator.model.errors import DiskIOError
from coordinator.model.extent import Extent, Status

LAYER_BYTES = 1 << 20
UNIT_BYTES = 4096
"""Granularity of holes."""


class MemoryDisk:
    """Born as one hole. Remembers what was flushed, as a disk whose cache is lost with the power would."""

    def __init__(self, size: int, *, read_only: bool = False, preferred_block: int = UNIT_BYTES) -> None:
        self.content = bytearray(size)
        self.read_only = read_only
        self.preferred_block = preferred_block
        self.finds_holes_fast = True
        self.zeroes_fast = True
        self.calls: list[str] = []
        """Everything but reads, in the order it was begun."""
        self._units = bytearray([Status.HOLE]) * -(-size // UNIT_BYTES)
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return len(self.content)

    def fill(self, offset: int, data: bytes) -> None:
        """What was on the disk before anybody came."""
        self.content[offset : offset + len(data)] = data
        self._set(offset, len(data), Status.DATA)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(self.content)[offset : offset + len(buffer)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        with self._lock:
            units = bytes(self._units[offset // UNIT_BYTES : -(-(offset + length) // UNIT_BYTES)])
        at = offset // UNIT_BYTES * UNIT_BYTES
        for status, run in groupby(units):
            end = at + sum(1 for _ in run) * UNIT_BYTES
            first = max(at, offset)
            yield Extent(first, min(end, offset + length) - first, Status(status))
            at = end

    def write(self, offset: int, data: memoryview) -> None:
        self.calls.append(f"write {offset} {len(data)}")
        memoryview(self.content)[offset : offset + len(data)] = data
        self._set(offset, len(data), Status.DATA)

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
        self.calls.append(f"zero {offset} {length} {'trim' if may_trim else 'keep'}")
        self._clear(offset, length, Status.HOLE if may_trim else Status.ZERO)

    def trim(self, offset: int, length: int) -> None:
        self.calls.append(f"trim {offset} {length}")
        self._clear(offset, length, Status.HOLE)

    def flush(self) -> None:
        self.calls.append("flush")

    def _clear(self, offset: int, length: int, status: Status) -> None:
        memoryview(self.content)[offset : offset + length] = bytes(length)
        first, last = -(-offset // UNIT_BYTES), (offset + length) // UNIT_BYTES
        if last > first:
            self._set(first * UNIT_BYTES, (last - first) * UNIT_BYTES, status)

    def _set(self, offset: int, length: int, status: Status) -> None:
        first, last = offset // UNIT_BYTES, -(-(offset + length) // UNIT_BYTES)
        with self._lock:
            self._units[first:last] = bytes([status]) * (last - first)


class LayeredMemoryDisk(MemoryDisk):
    """Of which every second MiB, from the first on, is its own."""

    def depths(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        end = offset + length
        while offset < end:
            until = (offset // LAYER_BYTES + 1) * LAYER_BYTES
            yield until - offset, 1 - offset // LAYER_BYTES % 2
            offset = until


class GatedDisk(MemoryDisk):
    """Reads and writes below `GATED_BYTES` wait until the test opens the gate."""

    GATED_BYTES = 1 << 20

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        """Released as a read or write comes to the gate."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._wait(offset)
        super().read_into(offset, buffer)

    def write(self, offset: int, data: memoryview) -> None:
        self._wait(offset)
        super().write(offset, data)

    def _wait(self, offset: int) -> None:
        if offset < self.GATED_BYTES:
            self.entered.release()
            if not self.gate.wait(30):
                raise DiskIOError("nobody opened the gate", offset=offset)


class FailingDisk(MemoryDisk):
    """Fails every call with what `error` is set to."""

    error: Exception | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._fail()
        super().read_into(offset, buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for extent in super().extents(offset, length):
            yield extent
            self._fail()

    def write(self, offset: int, data: memoryview) -> None:
        self._fail()
        super().write(offset, data)

    def flush(self) -> None:
        self._fail()
        super().flush()

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error
