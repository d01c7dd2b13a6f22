"""NBD exports as targets."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from coordinator.model.errors import DiskIOError, Next, RefusedError
from coordinator.model.extent import Extent, Status, merge_adjacent
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import SessionLimits
from workers.sources.blockstatus import ALLOCATION, allocation
from workers.sources.identity import Identity, identity_of_export
from workers.sources.nbd import open_session
from workers.targets.zeroes import write_zero_bytes


class NbdTarget:
    """An export, over a session of its own. One process may write it, unless the server is multi-conn."""

    max_writers: int

    def __init__(self, endpoint: Endpoint, access: Access | None, limits: SessionLimits) -> None:
        """`access` is None for a server that we started ourselves. RefusedError for an export that is read-only or
        cannot be flushed."""
        candidates = access.check_endpoint(endpoint) if access is not None else (endpoint,)
        self._session, self._endpoint = open_session(candidates, limits, contexts=(ALLOCATION,))
        self._identity = identity_of_export(self._endpoint)
        if self._session.read_only:
            self._session.close()
            raise RefusedError(f"the export {endpoint} is read-only", "export it writable, or name another target")
        if not self._session.can_flush:  # before anything is written that nobody could ever call durable
            self._session.close()
            raise RefusedError(
                f"the server of the export {endpoint} has no flush, so what is written to it may be lost at any time",
                "let it offer flushes (nbd-server: flush = true), or name another target",
            )
        self._flushing = threading.Lock()
        self._flush_failure: DiskIOError | None = None
        self.size = self._session.size
        self.block_size = self._session.min_block
        self.max_writers = 0 if self._session.can_multi_conn else 1

    @property
    def can_zero(self) -> bool:
        return self._session.can_zero

    def write(self, offset: int, data: memoryview) -> None:
        self._session.write(offset, data)

    def write_zeroes(self, offset: int, length: int) -> None:
        if self._session.can_zero:
            self._session.write_zeroes(offset, length)
        else:
            write_zero_bytes(self._session.write, offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._session.read_into(offset, buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        if ALLOCATION not in self._session.contexts:
            return iter((Extent(offset, length, Status.DATA),))
        return merge_adjacent(allocation(self._session, offset, length))

    def flush(self) -> None:
        # One at a time, and the first failure stays: a session tells of lost writes once, to the thread that
        # flushes first, and the next flush succeeds without the writes of the others.
        with self._flushing:
            try:
                if self._flush_failure is None:
                    self._session.flush()
            except DiskIOError as error:
                self._flush_failure = error
            if self._flush_failure is not None:
                raise _again(self._flush_failure) from self._flush_failure

    def identity(self) -> Identity:
        return self._identity

    def fileno(self) -> int | None:
        return None

    def nbd_endpoint(self) -> Endpoint | None:
        return self._endpoint

    def abort(self) -> None:
        self._session.abort()

    def close(self) -> None:
        self._session.close()


def _again(failure: DiskIOError) -> DiskIOError:
    return DiskIOError(failure.message, errno_=failure.errno, next_=Next.RECONNECT, remedy=failure.remedy)
