"""NBD exports as sources: what a meta context says becomes extents."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.model.errors import DiskIOError, NotFoundError, RefusedError, UnavailableError
from coordinator.model.extent import Extent, Status, merge_adjacent
from coordinator.model.job import Sync
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import Session, SessionLimits
from workers.sources.blockstatus import (
    ALLOCATION,
    StatusReader,
    WholeBlockStatus,
    allocation,
    in_whole_blocks,
    selected,
    selected_with_zeroes,
    selecting_context,
)
from workers.sources.identity import Identity, beneath_export, identity_of_export


class NbdSource:
    """An export, over a session of its own."""

    def __init__(
        self, endpoint: Endpoint, sync: Sync, bitmap: str | None, access: Access | None, limits: SessionLimits
    ) -> None:
        """`access` is None for a server that we started ourselves on a socket of our own."""
        candidates = access.check_endpoint(endpoint) if access is not None else (endpoint,)
        self._selector = selecting_context(sync, bitmap)
        wanted = (ALLOCATION,) if self._selector is None else (ALLOCATION, self._selector)
        self._session, self._endpoint = open_session(candidates, limits, wanted)
        self._identity = identity_of_export(self._endpoint)
        try:
            self._check_selector(bitmap)
        except BaseException:
            self._session.close()
            raise
        self.size = self._session.size
        self.block_size = self._session.min_block
        self.max_readers = 1 if self._session.is_full else 0
        # A read-only export keeps us from writing, not the guest whose disk it shows: QEMU exports so by default.
        self.may_change = access is not None

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return merge_adjacent(self._unmerged(offset, length))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._session.read_into(offset, buffer)

    def stamp(self) -> str:
        return ""

    def identity(self) -> Identity:
        return self._identity

    def reads_from(self) -> frozenset[Identity]:
        return beneath_export(self._endpoint) | {self._identity}

    def fileno(self) -> int | None:
        return None

    def nbd_endpoint(self) -> Endpoint | None:
        return self._endpoint

    def abort(self) -> None:
        self._session.abort()

    def close(self) -> None:
        self._session.close()

    def _check_selector(self, bitmap: str | None) -> None:
        if self._selector is None or self._selector in self._session.contexts:
            return
        if bitmap is not None:
            raise NotFoundError(
                f"the export {self._endpoint} does not offer the dirty bitmap {bitmap!r}",
                f"export it (qemu-nbd -B {bitmap}), or compare with --sync incremental",
            )
        raise NotFoundError(
            f"the export {self._endpoint} does not tell which image of a chain holds what",
            "export it with qemu-nbd -A, or copy with --sync full",
        )

    def _unmerged(self, offset: int, length: int) -> Iterator[Extent]:
        if self.block_size == 1:
            return self._extents_by(self._session, offset, length)
        reader = WholeBlockStatus(self._session, self.block_size)
        return in_whole_blocks(self._extents_by(reader, offset, length), self.block_size)

    def _extents_by(self, reader: StatusReader, offset: int, length: int) -> Iterator[Extent]:
        known = ALLOCATION in self._session.contexts
        if self._selector is None:
            if not known:
                return iter((Extent(offset, length, Status.DATA),))
            return allocation(reader, offset, length)
        if not known:
            return selected(reader, self._selector, offset, length)
        return selected_with_zeroes(reader, self._selector, offset, length)


def open_session(
    candidates: tuple[Endpoint, ...], limits: SessionLimits, contexts: tuple[str, ...]
) -> tuple[Session, Endpoint]:
    """A session with the first address of a server that answers. RefusedError for a size of no whole blocks."""
    for candidate in candidates[:-1]:
        try:
            return _open_session(candidate, limits, contexts), candidate
        except (UnavailableError, DiskIOError):
            continue  # a host with several addresses need not listen on all; the last one's error is told
    return _open_session(candidates[-1], limits, contexts), candidates[-1]


def _open_session(endpoint: Endpoint, limits: SessionLimits, contexts: tuple[str, ...]) -> Session:
    session = Session.open(endpoint, limits.connections, contexts=contexts, timeout_s=limits.timeout_s)
    if session.size % session.min_block:
        session.close()
        raise RefusedError(
            f"the export {endpoint} has {session.size} bytes, no multiple of its block size of {session.min_block}: its"
            " end can be neither read nor written",
            "serve it with another size or a smaller minimum block size",
        )
    return session
