"""Disks that are copied to: one module a kind, one contract (contract.py)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

from coordinator.model.job import Sync
from coordinator.model.uri import DiskUri
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import DEFAULT_LIMITS, SessionLimits
from workers.qemu.image import inspect
from workers.sources.contract import Source
from workers.sources.identity import Identity, is_export_of_this_host, process_that_has_open
from workers.sources.nbd import NbdSource
from workers.sources.rawdisk import RawDisk
from workers.targets.aligned import AlignedTarget
from workers.targets.contract import Target
from workers.targets.nbd import NbdTarget
from workers.targets.nothing import NoTarget
from workers.targets.prepare import Wish, check_size, prepare_qcow2, prepare_raw
from workers.targets.qcow2 import Qcow2Target
from workers.targets.raw import RawTarget

CLOSE_TIMEOUT_S = 3.0
CLOSE_POLL_S = 0.1

__all__ = ["ExistingTarget", "Identity", "Target", "existing_target", "existing_target_size", "open_target"]


def open_target(
    uri: DiskUri,
    size: int,
    access: Access,
    overwrite: bool,
    create: bool,
    limits: SessionLimits = DEFAULT_LIMITS,
    keep: bool = False,
) -> Target:
    """Open a disk of at least `size` bytes to be written; the caller closes it.

    `create` makes or resizes a file first (see prepare.py) and is for the plan unit; without it the target
    must exist. `keep`: the target holds an older copy that is updated. RefusedError or NotFoundError leaves
    everything as it was. Ask `existing_target` before: this may destroy what the source reads.
    """
    if uri.kind in ("nothing", "repository"):  # a repository is written by mover/backup.py, epoch by epoch
        return NoTarget(size)
    if uri.kind == "file" and create:
        prepare = prepare_qcow2 if uri.format == "qcow2" else prepare_raw
        prepare(uri.path, size, access, Wish(overwrite=overwrite, keep=keep))
    target = _open(uri, access, limits)
    try:
        check_size(str(uri), target.size, size)
    except BaseException:
        target.close()
        raise
    return AlignedTarget(target) if target.block_size > 1 else target


def existing_target_size(uri: DiskUri, access: Access) -> int | None:
    """Size in bytes of the disk at `uri`, None for a file that does not exist. Changes nothing."""
    if uri.kind == "nbd":
        export = _read_export(uri, access, DEFAULT_LIMITS)
        export.close()
        return export.size
    if not access.exists(uri.path):
        return None
    resolved = access.check_path(uri.path, must_exist=True)
    disk = RawDisk.open(uri.path, os.O_RDONLY, access)
    disk.close()
    if uri.format == "qcow2" and disk.size > 0:
        return inspect(resolved, access).virtual_size
    return disk.size


@dataclass(frozen=True, slots=True)
class ExistingTarget:
    """What is there before anything is touched. `lies_on` is what a source must not be read from."""

    identity: Identity
    lies_on: frozenset[Identity]

    def is_read_by(self, source: Source) -> bool:
        """Whether writing this target would change `source`.

        Of two exports only the exports are compared: one server may well serve both, with all their files open.
        """
        if self.identity[0] == "nbd" and source.identity()[0] == "nbd":
            return self.identity == source.identity()
        return not self.lies_on.isdisjoint(source.reads_from())

    def user_beside(self, source: Source) -> int | None:
        """A process that has this file open while `source` is an export of this host, so that it may be what the
        source is read from by a way that `is_read_by` does not see: a proxy, a server that nobody may look into.

        Waits up to CLOSE_TIMEOUT_S for it to close the file, as movers of a job that has just ended do.
        """
        if not is_export_of_this_host(source.identity()):
            return None
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while (user := process_that_has_open(self.identity)) is not None and time.monotonic() < deadline:
            time.sleep(CLOSE_POLL_S)
        return user


def existing_target(uri: DiskUri, access: Access, limits: SessionLimits = DEFAULT_LIMITS) -> ExistingTarget | None:
    """The disk at `uri`, None for a file that does not exist. Changes nothing."""
    if uri.kind in ("nothing", "repository"):
        return None
    if uri.kind == "nbd":
        export = _read_export(uri, access, limits)
        there = ExistingTarget(
            export.identity(), export.reads_from()
        )  # while open: a server may hold files for us alone
        export.close()
        return there
    if not access.exists(uri.path):
        return None
    disk = RawDisk.open(uri.path, os.O_RDONLY, access)
    disk.close()
    return ExistingTarget(disk.identity(), disk.lies_on())


def _open(uri: DiskUri, access: Access, limits: SessionLimits) -> Target:
    if uri.kind == "nbd":
        return NbdTarget(Endpoint.parse(uri.nbd_uri), access, limits)
    if uri.format == "qcow2":
        return Qcow2Target(uri.path, access, limits)
    return RawTarget(uri.path, access)


def _read_export(uri: DiskUri, access: Access, limits: SessionLimits) -> NbdSource:
    return NbdSource(Endpoint.parse(uri.nbd_uri), Sync.FULL, None, access, replace(limits, connections=1))
