"""Disks that are copied from: one module a kind, one contract (contract.py)."""

from __future__ import annotations

from coordinator.model.errors import RefusedError
from coordinator.model.job import Sync
from coordinator.model.uri import DiskUri
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import DEFAULT_LIMITS, SessionLimits
from workers.sources.contract import Source
from workers.sources.identity import Identity
from workers.sources.nbd import NbdSource
from workers.sources.qcow2 import Qcow2Source
from workers.sources.raw import RawSource
from workers.sources.repository import RepositorySource

__all__ = ["Identity", "Source", "open_source"]


def open_source(
    uri: DiskUri, sync: Sync, bitmap: str | None, access: Access, limits: SessionLimits = DEFAULT_LIMITS
) -> Source:
    """Open a disk to be read; the caller closes it. `limits` are those of an NBD session.

    NotFoundError for what does not exist, a bitmap included; RefusedError for what must not be read or
    cannot be read with this sync mode; UnavailableError for a server that does not answer.
    """
    if uri.repository is not None:
        return RepositorySource(uri.repository, sync, access)
    if uri.kind == "nbd":
        return NbdSource(Endpoint.parse(uri.nbd_uri), sync, bitmap, access, limits)
    if uri.format == "qcow2":
        return Qcow2Source(uri.path, sync, bitmap, access, limits)
    if sync is Sync.DIRTY:
        raise RefusedError(
            f"{uri.path} is raw and has no dirty bitmaps",
            "name a qcow2 image or an NBD export with one, or compare with --sync incremental",
        )
    # A raw file is a chain of one image, so top is the same as full here.
    return RawSource(uri.path, access)
