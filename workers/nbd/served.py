"""What our NBD server serves: the contract a disk keeps to be an export."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from coordinator.model.extent import Extent


class ServedDisk(Protocol):
    """A disk to be read. All sizes and offsets are in bytes.

    Every method may be called from many threads at once and by many clients, with ranges that lie within the disk.
    What goes wrong is a DiskIOError, whose errno and message the client is told. Nothing here may change while the
    disk is served but its content.
    """

    @property
    def size(self) -> int: ...

    @property
    def read_only(self) -> bool:
        """False only for a `WritableDisk`; one of those may still be served read-only."""

    @property
    def preferred_block(self) -> int:
        """Requests of multiples of this are served best: a power of two from 512 bytes to 32 MiB."""

    @property
    def finds_holes_fast(self) -> bool:
        """Whether `extents` costs far less than reading the range; then reads are answered with holes, not zeroes."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer, or raise. The buffer is not to be kept."""

    def extents(self, offset: int, length: int) -> Iterable[Extent]:
        """The extents of [offset, offset + length), sorted and gapless from `offset` on; may end early."""


@runtime_checkable
class LayeredDisk(ServedDisk, Protocol):
    """A disk of which only a part is its own, as of an image with a backing file."""

    def depths(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """(length, depth) of consecutive ranges from `offset` on, with depths as in qemu:allocation-depth: 1 is the
        disk's own, 0 nobody's; may end early, or reach past the range."""


@runtime_checkable
class WritableDisk(ServedDisk, Protocol):
    """A disk to be read and written. A flush on behalf of one client covers the writes of all (CAN_MULTI_CONN)."""

    @property
    def zeroes_fast(self) -> bool:
        """Whether `write_zeroes` is always faster than `write`; else requests with FAST_ZERO fail with ENOTSUP."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`, which is not to be kept. Durable only after `flush`."""

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool) -> None:
        """The range reads as zeroes afterwards; it stays allocated unless `may_trim`. Up to 4 GiB at once."""

    def trim(self, offset: int, length: int) -> None:
        """The range is not needed any more; what it reads as afterwards is the disk's choice. Up to 4 GiB at once."""

    def flush(self) -> None:
        """Every write, zeroing and trim that returned before this call is durable when it returns."""
