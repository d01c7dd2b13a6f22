"""A disk of a recovery point as a source: a restore is a mirror with the arrow turned round."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator

from coordinator.model.errors import DamagedError, DiskIOError, FlushpointError, Next, RefusedError
from coordinator.model.extent import Extent, merge_adjacent
from coordinator.model.job import Sync
from coordinator.model.repository_uri import RepositoryUri
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.repository.decisions import HOLD_RENEW_S
from workers.repository.layout import DamageError
from workers.repository.reader import PointDisk, Write
from workers.repository.repository import Repository
from workers.sources.identity import Identity


class DamagedDiskError(DiskIOError):
    """A block of the repository is not what was written; the message names its object and where in it."""

    exit_code = DamagedError.exit_code
    code = DamagedError.code


class RepositorySource:
    """One disk of one recovery point; never changes. While it is open, a hold keeps the point from being pruned."""

    max_readers = 0
    may_change = False
    block_size = 1

    def __init__(self, uri: RepositoryUri, sync: Sync, access: Access) -> None:
        """NotFoundError for a point or disk that there is not; errors of `Repository.open` otherwise."""
        if sync is Sync.DIRTY or (sync is Sync.TOP) != (uri.since > 0):
            raise RefusedError(
                f"a recovery point has no {'bitmaps' if sync is Sync.DIRTY else 'backing files'}"
                if not uri.since
                else "what differs from another point goes with sync top",
                "use --sync full, or incremental to write only what differs",
            )
        if not uri.group:
            raise RefusedError(f"{uri} names no group", "add ?group=NAME, or name the point as GROUP@POINT")
        self._repository = Repository.open(uri.repository, access)
        try:
            point, self._hold = self._repository.decisions.hold_point(
                uri.group, uri.point, f"read-{secrets.token_hex(8)}", f"a reader on {socket.gethostname()}"
            )
        except BaseException:
            self._repository.close()
            raise
        try:
            self._disk = self._repository.disk(point, uri.disk)
            self._since = self._older(uri) if uri.since else None
        except BaseException:
            self._leave()
            raise
        self.point = point.epoch
        """The one that was named, or that was the newest."""
        self._identity = ("repository", self._repository.id, uri.group, point.epoch, self._disk.name)
        self._renewing = threading.Lock()
        self._closed = False

    @property
    def size(self) -> int:
        return self._disk.size

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        try:
            if self._since is not None:
                yield from merge_adjacent(self._disk.changes(self._since, offset, length))
            else:
                yield from merge_adjacent(self._disk.extents(offset, length))
        except FlushpointError as error:
            raise _read_error(error, offset, length) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        try:
            self._renew()
            self._disk.read_into(offset, buffer)
        except FlushpointError as error:
            raise _read_error(error, offset, len(buffer)) from error

    def stream(self, ranges: Iterable[tuple[int, int]], write: Write) -> list[tuple[int, int]]:
        """See `PointDisk.stream`; its errors."""
        self._renew()
        return self._disk.stream(ranges, write)

    def identity(self) -> Identity:
        return self._identity

    def reads_from(self) -> frozenset[Identity]:
        return frozenset({self._identity})

    def stamp(self) -> str:
        return ""

    def fileno(self) -> int | None:
        return None

    def nbd_endpoint(self) -> Endpoint | None:
        return None

    def abort(self) -> None:
        """Every request to a store is bounded by itself."""

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._leave()

    def _older(self, uri: RepositoryUri) -> PointDisk:
        """The disk as it was at the point that is told by what differs from it, held as well."""
        self._hold = self._hold.model_copy(update={"points": (uri.since, *self._hold.points)})
        self._repository.decisions.hold(self._hold)
        older = self._repository.disk(self._repository.decisions.point(uri.group, uri.since), self._disk.name)
        if older.size != self._disk.size:
            raise RefusedError(f"{self._disk.name} had another size at point {uri.since}", "copy all of it")
        return older

    def _leave(self) -> None:
        with contextlib.suppress(FlushpointError):  # it goes stale by itself
            self._repository.decisions.let_go(self._hold.id)
        self._repository.close()

    def _renew(self) -> None:
        if time.time() - self._hold.renewed_at < HOLD_RENEW_S or not self._renewing.acquire(blocking=False):
            return
        try:
            self._hold = self._hold.model_copy(update={"renewed_at": time.time()})
            self._repository.decisions.hold(self._hold)
        finally:
            self._renewing.release()


def _read_error(error: FlushpointError, offset: int, length: int) -> DiskIOError:
    """Damage stays where it is; a store may answer later."""
    if isinstance(error, DamageError):
        return DamagedDiskError(
            error.message, errno_=errno.EIO, offset=offset, length=length, next_=Next.GIVE_UP, remedy=error.remedy
        )
    return DiskIOError(
        error.message, errno_=errno.EIO, offset=offset, length=length, next_=Next.RETRY, remedy=error.remedy
    )
