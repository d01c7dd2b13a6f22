"""qcow2 images as sources: a qemu-nbd of our own serves the image, an NbdSource reads it."""

from __future__ import annotations

import os
from typing import Any

from coordinator.model.errors import DiskIOError, UnavailableError
from coordinator.model.job import Sync
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import SessionLimits
from workers.qemu import locks
from workers.qemu.image import Image, bitmap_for_reading, inspect
from workers.qemu.server import QemuNbd
from workers.sources.identity import Identity
from workers.sources.nbd import NbdSource
from workers.sources.rawdisk import RawDisk


class Qcow2Source(NbdSource):
    """An image and its backing chain, opened read-only.

    An image that nobody writes is locked against a writer until close(), as by qemu-img. One that a running
    QEMU writes is read beside it, hence `may_change`: what that QEMU has not flushed is not seen, and neither
    are clusters that it allocates after this source was opened, since our server keeps the tables it has
    read (tried on 7.2). A pass that has to see later writes opens the source anew.
    """

    def __init__(self, path: str, sync: Sync, bitmap: str | None, access: Access, limits: SessionLimits) -> None:
        top = RawDisk.open(path, os.O_RDONLY, access)
        try:
            in_use = locks.has_writer(top.fd)
            image = inspect(access.check_path(path, must_exist=True), access)
            if bitmap is not None:
                bitmap_for_reading(image, bitmap, in_use)
            self._image_identity = top.identity()
        finally:
            top.close()
        disks = [_look_at(i, access) for i in image.chain()]
        self._chain = frozenset(disk.identity() for disk in disks)
        self._stamp = ",".join(disk.stamp() for disk in disks)
        for disk in disks:
            disk.close()
        self._server = QemuNbd(_node(image, in_use), _options(sync, bitmap))
        try:
            super().__init__(Endpoint.parse(self._server.uri), sync, bitmap, None, limits)
        except (DiskIOError, UnavailableError) as error:
            death = self._server.death()
            self._server.close()
            raise (death or error) from error
        except BaseException:
            self._server.close()
            raise
        self.may_change = in_use

    @property
    def server_pid(self) -> int:
        return self._server.pid

    def identity(self) -> Identity:
        return self._image_identity

    def stamp(self) -> str:
        """As it was when opened: until close() nobody can write but whom `may_change` tells of."""
        return self._stamp

    def reads_from(self) -> frozenset[Identity]:
        return self._chain

    def close(self) -> None:
        super().close()
        self._server.close()


def _node(image: Image, in_use: bool) -> dict[str, Any]:
    # force-share reaches every image of the chain. Without it a writer that came now would be kept out.
    return {**image.node(), "force-share": True} if in_use else image.node()


def _options(sync: Sync, bitmap: str | None) -> list[str]:
    options = ["--read-only"]
    if sync is Sync.TOP:
        options.append("--allocation-depth")
    if bitmap is not None:
        options.append(f"--bitmap={bitmap}")
    return options


def _look_at(image: Image, access: Access) -> RawDisk:
    return RawDisk.open(image.path, os.O_RDONLY, access)
