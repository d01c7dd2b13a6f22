"""qcow2 images as targets: a qemu-nbd of our own serves the image writable, an NbdTarget writes it."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator

from coordinator.model.errors import DiskIOError, FlushpointError
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import SessionLimits
from workers.qemu import locks
from workers.qemu.image import Image, ImageInUseError, inspect
from workers.qemu.server import QemuNbd
from workers.sources.identity import Identity
from workers.sources.rawdisk import RawDisk
from workers.targets.nbd import NbdTarget

LOCK_TIMEOUT_S = 10.0
"""The last writer's qemu-nbd is given this long to flush and unlock the image."""
LOCK_POLL_S = 0.02
"""OFD locks can only be asked for, or waited for without a bound."""

# Discards and zeroes give clusters back; zeroes are found by the copy engine, once, and not here again.
_OPTIONS = ("--discard=unmap", "--detect-zeroes=off", "--cache=writeback")


class Qcow2Target(NbdTarget):
    """An existing image. QEMU's locks let one process write it, so one worker holds it at a time."""

    def __init__(self, path: str, access: Access, limits: SessionLimits) -> None:
        """Waits up to LOCK_TIMEOUT_S for the last holder, then ImageInUseError."""
        self._path = path
        disk = RawDisk.open(path, os.O_RDWR, access)
        try:
            image = inspect(access.check_path(path, must_exist=True), access)
            self._image_identity = disk.identity()
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            while True:
                try:
                    self._serve(image, limits)
                    break
                except ImageInUseError:
                    if not _unlocked(disk.fd, deadline):
                        raise
        finally:
            disk.close()
        self.max_writers = 1

    def identity(self) -> Identity:
        return self._image_identity

    def write(self, offset: int, data: memoryview) -> None:
        with self._named():
            super().write(offset, data)

    def write_zeroes(self, offset: int, length: int) -> None:
        with self._named():
            super().write_zeroes(offset, length)

    def flush(self) -> None:
        with self._named():
            super().flush()

    def close(self) -> None:
        super().close()
        self._server.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors name the image, and not the private socket it is written through."""
        try:
            yield
        except DiskIOError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DiskIOError(
                error.message.replace(self._server.uri, self._path),
                errno_=error.errno,
                offset=error.offset,
                length=error.length,
                next_=error.next,
                remedy="make room for it" if full else error.remedy,
            ) from error

    def _serve(self, image: Image, limits: SessionLimits) -> None:
        self._server = QemuNbd(image.node(), _OPTIONS)
        try:
            super().__init__(Endpoint.parse(self._server.uri), None, limits)
        except FlushpointError as error:
            death = self._server.death()
            self._server.close()
            raise (death or error) from error
        except BaseException:
            self._server.close()
            raise


def _unlocked(fd: int, deadline: float) -> bool:
    """Wait until no QEMU process holds the file; False at the deadline."""
    while time.monotonic() < deadline:
        if not locks.has_holder(fd):
            return True
        time.sleep(LOCK_POLL_S)
    return False
