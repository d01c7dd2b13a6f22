"""What every source of a copy can do. The copy engine knows nothing else about one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from coordinator.model.extent import Extent
from workers.nbd.endpoint import Endpoint
from workers.sources.identity import Identity


class Source(Protocol):
    """A disk that is only read. All sizes and offsets are in bytes.

    Every method but `close` may be called from many threads at once.
    """

    @property
    def size(self) -> int: ...

    @property
    def block_size(self) -> int:
        """Offsets and lengths of reads are multiples of this, and so are those of extents that hold data; 1 where any
        byte can be addressed."""

    @property
    def max_readers(self) -> int:
        """How many processes may hold this source open at once, as far as is known; 0 is unlimited."""

    @property
    def may_change(self) -> bool:
        """Somebody may write this disk while it is read, so one pass over it need not be a point in time. True where
        nothing tells, as of an export of any kind."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The extents of [offset, offset + length), sorted, in bounded memory. Both are multiples of `block_size`.

        sync=full and incremental: gapless. top: only what the topmost image holds. dirty: only what the
        bitmap calls dirty. ZERO and HOLE read as zeroes. In a top or dirty answer such an extent is ZERO,
        and has to be zeroed on the target, which may hold older data there. DiskIOError, also half way.
        """

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer from `offset`, or raise DiskIOError."""

    def identity(self) -> Identity:
        """Which disk this is, whatever it was called."""

    def reads_from(self) -> frozenset[Identity]:
        """`identity()` and everything under it, such as backing files: none of it may be, or lie under, the target."""

    def stamp(self) -> str:
        """Another string than before when somebody has written the files that this disk is read from; "" for
        disks that do not tell. Times of modification are the kernel's, with its granularity."""

    def fileno(self) -> int | None:
        """A descriptor whose bytes are the disk's, for copy_file_range; None unless a regular raw file."""

    def nbd_endpoint(self) -> Endpoint | None:
        """Where the same bytes are served, for splice; None for a file. Valid until `close`."""

    def abort(self) -> None:
        """Break off, from another thread: calls that wait for a server fail at once (DiskIOError), and so does every
        later one. Nothing where nobody is waited for but the kernel. `close` is still to be called."""

    def close(self) -> None:
        """Give everything back. Harmless when repeated."""
