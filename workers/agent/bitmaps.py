"""`python -m workers.agent.bitmaps enable|query|fill|disable|remove DISK [NAME]`: dirty bitmaps of a qcow2 image, or of
a live guest's disk, for `flushpoint bitmap`.

Prints the bitmaps that the disk then has, as JSON. DISK is a path, or qemu+unix:///DEVICE?qmp=PATH, whose monitor
nobody else may hold meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

from coordinator.model.errors import FlushpointError, NotFoundError, UsageError
from coordinator.model.guest_uri import is_guest_disk, parse_guest_disk
from workers.access import Access
from workers.agent.guest import OURS, GuestDisk, look_at
from workers.agent.image_bitmaps import (
    FILL,
    Bitmaps,
    DirtyBitmap,
    ImageBitmaps,
    allocated_above,
    refuse_ours,
    scratch_of,
)
from workers.agent.monitor import Monitor
from workers.agent.views import add_image, delete_node, lend
from workers.qemu.image import inspect

_NODE = f"{OURS}fill"


class GuestBitmaps:
    """Those of a running guest's disk. It stands still only while QEMU flushes what it has of the image's allocation,
    for `fill`: both commands are sent at once, so that nothing of ours can keep it stopped."""

    def __init__(self, monitor: Monitor, device: str) -> None:
        self._monitor = monitor
        self._device = device

    async def all(self) -> list[DirtyBitmap]:
        return [
            DirtyBitmap(b.name, b.granularity, b.is_recording, b.is_persistent, b.is_inconsistent, b.count)
            for b in (await self._disk()).bitmaps
        ]

    async def add(self, name: str, granularity: int) -> None:
        disk = await self._disk()
        size = {"granularity": granularity} if granularity else {}
        await self._do("block-dirty-bitmap-add", name, persistent=disk.keeps_bitmaps, **size)

    async def enable(self, name: str) -> None:
        await self._do("block-dirty-bitmap-enable", name)

    async def disable(self, name: str) -> None:
        await self._do("block-dirty-bitmap-disable", name)

    async def remove(self, name: str) -> None:
        await self._do("block-dirty-bitmap-remove", name)

    async def fill(self, name: str, base: str) -> None:
        disk = await self._disk()
        (granularity,) = [b.granularity for b in disk.bitmaps if b.name == name]
        await self._flush()
        image = inspect(disk.file, Access(["/"], []))
        with scratch_of(allocated_above(image, base), disk.size, granularity) as scratch:
            lend(self._monitor, scratch.parent)
            lend(self._monitor, scratch)
            await add_image(self._monitor, _NODE, scratch)
            try:
                sources = [{"node": _NODE, "name": FILL}]
                merge = {"node": disk.node, "target": name, "bitmaps": sources}
                await self._monitor.execute("block-dirty-bitmap-merge", merge)
            finally:
                await delete_node(self._monitor, _NODE)

    async def _flush(self) -> None:
        status = await self._monitor.execute("query-status")
        if status["running"]:
            await asyncio.gather(self._monitor.execute("stop"), self._monitor.execute("cont"))

    async def _disk(self) -> GuestDisk:
        return (await look_at(self._monitor)).disk(self._device)

    async def _do(self, command: str, name: str, **more: object) -> None:
        disk = await self._disk()
        await self._monitor.execute(command, {"node": disk.node, "name": name, **more})


async def act(action: str, disk: str, name: str, granularity: int, base: str) -> list[DirtyBitmap]:
    """What the disk has afterwards."""
    if action in ("enable", "fill", "disable"):
        refuse_ours(name)
    if not is_guest_disk(disk):
        return await _act(ImageBitmaps(disk), action, name, granularity, base)
    guest = parse_guest_disk(disk)
    if guest.host:
        raise UsageError(f"{disk!r} names a host", "run this on that host, and leave it out")
    monitor = await Monitor.connect(Path(guest.qmp))
    try:
        return await _act(GuestBitmaps(monitor, guest.device), action, name, granularity, base)
    finally:
        await monitor.close()


async def _act(bitmaps: Bitmaps, action: str, name: str, granularity: int, base: str) -> list[DirtyBitmap]:
    there = {bitmap.name: bitmap for bitmap in await bitmaps.all()}
    if action not in ("query", "enable") and name not in there:
        names = ", ".join(there) or "none"
        raise NotFoundError(f"there is no bitmap {name!r}; there are: {names}", "enable it first, or name one of these")
    match action:
        case "enable" if name not in there:
            await bitmaps.add(name, granularity)
        case "enable":
            await bitmaps.enable(name)
        case "disable":
            await bitmaps.disable(name)
        case "remove":
            await bitmaps.remove(name)
        case "fill":
            await bitmaps.fill(name, base)
    return await bitmaps.all()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["enable", "query", "fill", "disable", "remove"])
    parser.add_argument("disk")
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--granularity", type=int, default=0)
    parser.add_argument("--base", default="")
    asked = parser.parse_args()
    try:
        found = asyncio.run(act(asked.action, asked.disk, asked.name, asked.granularity, asked.base))
    except FlushpointError as error:
        told = {"code": error.code, "message": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
        print(json.dumps({"error": told}))
        return error.exit_code
    print(json.dumps({"bitmaps": [asdict(bitmap) for bitmap in found]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
