"""Making a target ready to be written: found, judged, and made or resized where that is needed.

============================  =====================================================================
absent file                   made with the size asked for
file that holds nothing       empty, or a hole of the size asked for: used (qcow2: made anew)
file that holds data          refused; with `overwrite` resized (qcow2: made anew); with `keep` used as
                              it is, and refused if its size differs
device, NBD export            used as it is, and refused if smaller than the source
device as qcow2               refused: an image is made in a file
============================  =====================================================================
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.errors import DiskIOError, FlushpointError, RefusedError
from coordinator.model.extent import Status
from coordinator.model.job import Sync
from workers.access import Access
from workers.nbd.session import SessionLimits
from workers.qemu import locks
from workers.qemu.image import create_qcow2, inspect
from workers.sources.qcow2 import Qcow2Source
from workers.sources.rawdisk import RawDisk

QCOW2_SECTOR_BYTES = 512
"""qemu-img rounds the size of an image up to this."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the submitter said about an existing target."""

    overwrite: bool
    """Data in it may be lost."""
    keep: bool
    """It holds an older copy of the source, which is brought up to date."""


def qcow2_size(size: int) -> int:
    """The size an image has that was made for a disk of `size` bytes."""
    return -(-size // QCOW2_SECTOR_BYTES) * QCOW2_SECTOR_BYTES


def prepare_raw(path: str, size: int, access: Access, wish: Wish) -> None:
    """RefusedError leaves everything as it was."""
    if not access.exists(path):
        _make_raw(path, size, access)
        return
    disk = RawDisk.open(path, os.O_RDWR, access)
    try:
        if disk.is_claimed():
            raise RefusedError(
                f"{path} is in use by the host: mounted, or part of a volume group or RAID", "unmount it first"
            )
        if locks.has_holder(disk.fd):  # a reader too: it may be what serves the source
            raise _in_use(path)
        if disk.is_device:
            check_size(path, disk.size, size)
            return
        if wish.keep:
            check_same_size(path, disk.size, size)
            return
        if not wish.overwrite and not _is_hole(disk):
            raise _holds_data(path)
        if not wish.overwrite and disk.size not in (0, size):
            raise RefusedError(
                f"{path} exists and has {disk.size} bytes, not the {size} bytes of the source",
                "give --overwrite to cut it to size, or name another target",
            )
        if disk.size != size:
            _resize(disk, size)
    finally:
        disk.close()


def prepare_qcow2(path: str, size: int, access: Access, wish: Wish) -> None:
    """RefusedError leaves everything as it was."""
    resolved = Path(access.check_path(path, must_exist=False))
    if access.exists(path):
        disk = RawDisk.open(path, os.O_RDWR, access)
        try:
            if disk.is_device:  # mounted or not: making an image destroys what is there
                raise RefusedError(
                    f"{path} is a block device, and qcow2 images are written to files only",
                    "name it without qcow2, to copy the disk itself to it",
                )
            empty = disk.size == 0
            in_use = locks.has_holder(disk.fd)
        finally:
            disk.close()
        if wish.keep and not empty:
            check_same_size(path, inspect(str(resolved), access).virtual_size, qcow2_size(size))
            return
        if not empty and _is_fresh_qcow2(str(resolved), qcow2_size(size), access):
            return
        if not wish.overwrite and not empty:
            raise _holds_data(path)
        if in_use:
            raise _in_use(path)
        create_qcow2(str(resolved), size)
        return
    try:
        create_qcow2(str(resolved), size)
    except BaseException:
        with contextlib.suppress(OSError):  # nothing was made where nothing can be removed
            resolved.unlink()
        raise
    _sync_directory(resolved)


def check_size(name: str, there: int, needed: int) -> None:
    if there < needed:
        raise RefusedError(
            f"{name} has {there} bytes, less than the {needed} bytes of the source", "name a larger target"
        )


def check_same_size(name: str, there: int, needed: int) -> None:
    if there != needed:
        raise RefusedError(
            f"{name} has {there} bytes and the source {needed}: it is no older copy of it",
            "make a full copy, with --overwrite",
        )


def _in_use(path: str) -> RefusedError:
    return RefusedError(f"{path} is open in a QEMU process", "stop it, or name its NBD export")


def _holds_data(path: str) -> RefusedError:
    return RefusedError(f"{path} exists and holds data", "give --overwrite to lose it, or name another target")


def _make_raw(path: str, size: int, access: Access) -> None:
    disk = RawDisk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, access)
    try:
        _resize(disk, size)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(access.check_path(path, must_exist=True)).unlink()
        raise
    finally:
        disk.close()
    _sync_directory(Path(access.check_path(path, must_exist=True)))


def _resize(disk: RawDisk, size: int) -> None:
    try:
        os.ftruncate(disk.fd, size)
        os.fsync(disk.fd)
    except OSError as error:
        raise disk.failed("resize", -1, 0, error) from error


def _is_hole(disk: RawDisk) -> bool:
    """Whether the file is empty or a hole from end to end, so that nothing in it can be lost."""
    try:
        os.lseek(disk.fd, 0, os.SEEK_DATA)
    except OSError:  # ENXIO: no data
        return True
    return disk.size == 0


def _is_fresh_qcow2(path: str, size: int, access: Access) -> bool:
    """Whether this is an image as we make them, with nothing in it yet."""
    try:
        image = inspect(path, access)
        if image.virtual_size != size or image.backing is not None or image.bitmaps:
            return False
        source = Qcow2Source(path, Sync.FULL, None, access, SessionLimits(connections=1))
    except FlushpointError:  # not an image, or not one of ours
        return False
    try:
        return all(extent.status is Status.HOLE for extent in source.extents(0, source.size))
    except DiskIOError:
        return False
    finally:
        source.close()


def _sync_directory(path: Path) -> None:
    """The name of a new file is durable too."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
