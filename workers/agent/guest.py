"""What a monitor tells of a guest (QAPI: query-version, query-status, query-block, qom-get).

A disk is called by the id of its device, or by the device's path in QEMU's object model if it has none. What is done to
a disk is done to its device's property `drive`, which names the node the guest reads and writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.model.bitmap import Tracking
from coordinator.model.errors import NotFoundError
from workers.agent.monitor import GuestRefusedError, Monitor

OURS = "fp-"
"""How names of nodes that we add begin. Short, since QEMU takes at most 31 characters."""
_BACKEND = "/virtio-backend"
_PERIPHERAL = "/machine/peripheral/"


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap of a disk's node. `count` and `granularity` in bytes; `is_inconsistent`: only good for removal."""

    name: str
    count: int
    granularity: int
    is_recording: bool
    is_persistent: bool
    is_busy: bool
    is_inconsistent: bool


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """A disk of a running guest. `node` is what its device is attached to now; `size` in bytes."""

    device: str
    path: str
    """Of the device in QEMU's object model."""
    node: str
    driver: str
    """Of the node: qcow2, raw, or that of a filter of ours that was left behind."""
    file: str
    size: int
    is_read_only: bool
    keeps_bitmaps: bool
    """Whether bitmaps can outlive the guest: in qcow2 of version 3 alone."""
    iothread: str
    """Its path; "" if the disk is served by the main loop."""
    bitmaps: tuple[Bitmap, ...]

    def dirty(self, names: Sequence[str]) -> int:
        """Bytes that these bitmaps of it say, at most."""
        return sum(bitmap.count for bitmap in self.bitmaps if bitmap.name in names)

    def tracking(self) -> list[Tracking]:
        """Its bitmaps, as the rules of coordinator.model.bitmap want them."""
        return [Tracking(b.name, b.is_recording, not b.is_inconsistent) for b in self.bitmaps]


@dataclass(frozen=True, slots=True)
class Guest:
    """`status` as query-status has it: running, paused, prelaunch, io-error …"""

    version: tuple[int, int, int]
    status: str
    is_running: bool
    disks: tuple[GuestDisk, ...]

    def disk(self, device: str) -> GuestDisk:
        """NotFoundError names those there are."""
        for disk in self.disks:
            if device in (disk.device, disk.path):
                return disk
        there = ", ".join(disk.device for disk in self.disks) or "none"
        raise NotFoundError(f"the guest has no disk {device!r}", f"name one of these: {there}")


async def look_at(monitor: Monitor) -> Guest:
    """All of it. GuestSilentError, GuestRefusedError."""
    version = (await monitor.execute("query-version"))["qemu"]
    status = await monitor.execute("query-status")
    disks = []
    for block in await monitor.execute("query-block"):
        inserted = block.get("inserted")
        if inserted and block.get("qdev"):  # neither an empty drive nor one that no device uses
            disks.append(await _disk(monitor, str(block["qdev"]), inserted))
    return Guest(
        version=(version["major"], version["minor"], version["micro"]),
        status=str(status["status"]),
        is_running=bool(status["running"]),
        disks=tuple(disks),
    )


async def _disk(monitor: Monitor, device: str, inserted: Mapping[str, Any]) -> GuestDisk:
    path = device.removesuffix(_BACKEND) if device.startswith("/") else f"{_PERIPHERAL}{device}"
    return GuestDisk(
        device=path.removeprefix(_PERIPHERAL),
        path=path,
        node=str(inserted["node-name"]),
        driver=str(inserted["drv"]),
        file=str(inserted["file"]),
        size=int(inserted["image"]["virtual-size"]),
        is_read_only=bool(inserted["ro"]),
        keeps_bitmaps=_keeps_bitmaps(inserted["image"]),
        iothread=await _iothread(monitor, path),
        bitmaps=tuple(_bitmap(found) for found in inserted.get("dirty-bitmaps", ())),
    )


def _keeps_bitmaps(image: Mapping[str, Any]) -> bool:
    specific = image.get("format-specific", {})
    return bool(specific.get("type") == "qcow2" and specific["data"]["compat"] != "0.10")


async def _iothread(monitor: Monitor, path: str) -> str:
    """Of the device itself (virtio-blk), or of the controller it hangs on (virtio-scsi)."""
    for owner in (path, await _property(monitor, path, "parent_bus")):
        while owner.startswith("/machine/"):
            found = await _property(monitor, owner, "iothread")
            if found:
                return found
            if owner == path:
                break
            owner = str(Path(owner).parent)
    return ""


async def _property(monitor: Monitor, path: str, name: str) -> str:
    """ "" where the object has none of that name."""
    with contextlib.suppress(GuestRefusedError):
        return str(await monitor.execute("qom-get", {"path": path, "property": name}) or "")
    return ""


def _bitmap(found: Mapping[str, Any]) -> Bitmap:
    return Bitmap(
        name=str(found.get("name", "")),
        count=int(found["count"]),
        granularity=int(found["granularity"]),
        is_recording=bool(found["recording"]),
        is_persistent=bool(found["persistent"]),
        is_busy=bool(found["busy"]),
        is_inconsistent=bool(found.get("inconsistent", False)),
    )
