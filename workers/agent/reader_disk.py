"""What a reader serves: a view in a guest's QEMU, or nothing but why it cannot be read any more."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from coordinator.model.errors import DiskIOError, RefusedError
from coordinator.model.extent import Extent
from workers.nbd.connection import Connection, connect
from workers.nbd.endpoint import Endpoint
from workers.sources.blockstatus import ALLOCATION, BITMAP, allocation, walk

GUEST_S = 20.0
"""How long a guest's QEMU may be silent: longer than any scratch directory's disk keeps it waiting (`cbw-timeout`)."""
_BLOCK = 65536
_DIRTY = 1


class FleecedDisk:
    """A view, over one connection to the guest's QEMU. Whatever the readers of it do, every reply is taken off that
    connection as it comes: a call waits for nothing but its own answer.

    What a bitmap names is told as the topmost image of a chain would be, like what is staged (`LayeredDisk`).
    """

    read_only = True
    preferred_block = _BLOCK
    finds_holes_fast = False

    def __init__(self, endpoint: Endpoint, bitmap: str) -> None:
        """UnavailableError, NotFoundError; RefusedError if the export does not tell what has changed."""
        self._selector = f"{BITMAP}{bitmap}"
        wanted = (ALLOCATION, self._selector)
        self._connection: Connection = connect(endpoint, contexts=wanted, timeout_s=GUEST_S)
        if missing := set(wanted) - self._connection.contexts:
            self._connection.close()
            raise RefusedError(f"{endpoint} does not tell {', '.join(sorted(missing))}")
        self.size = self._connection.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with _told():
            self._connection.read_into(offset, buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        with _told():
            yield from allocation(self._connection, offset, length)

    def depths(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        with _told():
            for _, run, flags in walk(self._connection, self._selector, offset, length):
                yield run, flags & _DIRTY


class RefusedDisk:
    """Answers every request with why there is nothing to read."""

    read_only = True
    preferred_block = _BLOCK
    finds_holes_fast = False

    def __init__(self, size: int, why: str) -> None:
        self.size = size
        self._why = why

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise self._error()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        raise self._error()

    def depths(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        raise self._error()

    def _error(self) -> DiskIOError:
        """Of a number that nobody takes for a reason to try again."""
        return DiskIOError(self._why, errno_=errno.EPERM)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except DiskIOError as error:
        why = f"the view broke, or its guest has ended: {error.message}"
        raise DiskIOError(why, offset=error.offset, length=error.length) from error
