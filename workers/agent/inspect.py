"""`python -m workers.agent.inspect guest|guest-agent PATH`: what can be done with the guest of a QMP socket, or through
a guest's own agent, for `flushpoint doctor`.

Prints a JSON list of findings. Only asks: nothing is changed in the guest.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from coordinator.model.errors import FlushpointError, RefusedError
from coordinator.model.finding import Finding
from coordinator.model.point import TRACKING
from workers.agent.guest import Guest, GuestDisk, look_at
from workers.agent.guest_agent import GuestAgent
from workers.agent.monitor import Monitor
from workers.agent.views import opens_when_stopped, refuse_unless_able

_MIB = 1024 * 1024


async def inspect(path: Path) -> list[Finding]:
    name = f"guest {path}"
    try:
        monitor = await Monitor.connect(path)
        try:
            guest = await look_at(monitor)
        finally:
            await monitor.close()
    except FlushpointError as error:
        return [Finding(name, False, True, error.message, error.remedy)]
    version = ".".join(map(str, guest.version))
    disks = len(guest.disks)
    there = Finding(
        name,
        disks > 0,
        True,
        f"QEMU {version}, {guest.status}, {disks} disk{'' if disks == 1 else 's'}",
        "attach its disks to devices that have ids",
    )
    return [there, *(found for disk in guest.disks for found in _disk(name, guest, disk))]


async def inspect_agent(path: Path) -> list[Finding]:
    name = f"guest agent {path}"
    try:
        agent = await GuestAgent.connect(path)
        with closing(agent):
            await agent.greet()
            status = await agent.execute("guest-fsfreeze-status")
    except FlushpointError as error:
        remedy = "run qemu-guest-agent in the guest; of others that use this socket, one at a time is heard"
        return [Finding(name, False, True, error.message, error.remedy or remedy)]
    if status != "thawed":
        return [Finding(name, False, True, "answers, but somebody has frozen file systems", "thaw them, or wait")]
    return [Finding(name, True, True, "answers, and no file system is frozen")]


def _disk(name: str, guest: Guest, disk: GuestDisk) -> list[Finding]:
    """Whether it can be cut and how, then what each recovery point of it costs."""
    title = f"{name} {disk.device}"
    what = f"{disk.driver}, {disk.size // _MIB} MiB, {_served_by(disk)}"
    try:
        refuse_unless_able(guest, disk)
    except RefusedError as error:
        return [Finding(title, False, True, f"{what}: {error.message}", error.remedy)]
    if disk.is_read_only:
        return [Finding(title, True, False, f"{what}, read-only: never changes")]
    when = "while the guest is stopped" if opens_when_stopped(guest, disk) else "before the guest is stopped"
    return [
        Finding(title, True, True, f"{what}: staged on this host, its filter opened {when}"),
        _bitmaps(f"{title} bitmaps", disk),
    ]


def _served_by(disk: GuestDisk) -> str:
    return f"IOThread {disk.iothread.rpartition('/')[2]}" if disk.iothread else "main loop"


def _bitmaps(title: str, disk: GuestDisk) -> Finding:
    ours = [bitmap for bitmap in disk.bitmaps if bitmap.name.startswith(TRACKING)]
    lost = [bitmap.name for bitmap in ours if bitmap.is_inconsistent]
    told = f"{len(ours)} of ours, {len(disk.bitmaps) - len(ours)} of others"
    if lost:
        why = f"{told}; not usable since the guest was killed: {', '.join(lost)}"
        return Finding(title, False, False, why, "the next recovery point of the group compares contents, by itself")
    if not disk.keeps_bitmaps:
        return Finding(
            title,
            False,
            False,
            f"{told}; the guest's end ends them",
            "the first recovery point after each start of the guest reads all of the disk; a qcow2 image (compat=1.1) "
            "keeps them",
        )
    return Finding(title, True, False, f"{told}; they outlive a clean end of the guest")


def main() -> int:
    kind, path = sys.argv[1:]
    findings = asyncio.run({"guest": inspect, "guest-agent": inspect_agent}[kind](Path(path)))
    print(json.dumps([asdict(finding) for finding in findings]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
