"""What every target of a copy can do. The copy engine knows nothing else about one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from coordinator.model.extent import Extent
from workers.nbd.endpoint import Endpoint
from workers.sources.identity import Identity


class Target(Protocol):
    """A disk that is written. All sizes and offsets are in bytes.

    Every method but `close` may be called from many threads at once. Errors of the disk are DiskIOErrors
    that carry the errno (ENOSPC for a full one).
    """

    @property
    def size(self) -> int:
        """May be larger than the source: a device or export is used from its start."""

    @property
    def block_size(self) -> int:
        """Any offset and length may be written; multiples of this are not read first."""

    @property
    def max_writers(self) -> int:
        """How many processes may hold this target open for writing at once; 0 is unlimited."""

    @property
    def can_zero(self) -> bool:
        """False where `write_zeroes` has to write them, as far as is known: it then costs what a write costs."""

    def write(self, offset: int, data: memoryview) -> None:
        """All of `data`, or DiskIOError. Durable only after `flush`."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeroes afterwards; space is given back where that is possible."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from `offset`, to compare."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is known of [offset, offset + length): gapless, ZERO or HOLE where it reads as zeroes, else DATA."""

    def flush(self) -> None:
        """Every write that returned before this call is durable when it returns.

        After one failed flush every later one fails too (DiskIOError, Next.RECONNECT): kernel and server tell of
        lost writes once, to whoever asks first. So nobody who wrote since his last good flush is told that all
        is well; close the target, open it anew, and write again what was not flushed.
        """

    def identity(self) -> Identity:
        """Which disk this is, whatever it was called."""

    def fileno(self) -> int | None:
        """A descriptor to copy_file_range into; None unless a regular raw file."""

    def nbd_endpoint(self) -> Endpoint | None:
        """Where the same bytes are served; None for a file. Valid until `close`.

        Writes over a connection of the caller's own are covered by `flush` only under CAN_MULTI_CONN.
        """

    def abort(self) -> None:
        """Break off, from another thread: calls that wait for a server fail at once (DiskIOError), and so does every
        later one. Nothing where nobody is waited for but the kernel. `close` is still to be called."""

    def close(self) -> None:
        """Give everything back; does not flush. Harmless when repeated."""
