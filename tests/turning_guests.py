"""Guests that write in turns (`running_pair`), and what is on the disks that they are attached to now."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from coordinator.model.uri import parse
from tests.hosts import Host
from tests.live_guest import LiveGuest
from workers.agent.guest import OURS, look_at
from workers.agent.monitor import Monitor

BLOCK = 4096
T = TypeVar("T")


def name_of(host: Host) -> str:
    return host.guest.directory.name


def disk_of(host: Host) -> str:
    return host.guest.disks[0].name


def asked(guest: LiveGuest, ask: Callable[[Monitor], Awaitable[T]]) -> T:
    """By the guest's user, since its agent holds the other monitor."""

    async def connected() -> T:
        monitor = await Monitor.connect(guest.user)
        try:
            return await ask(monitor)
        finally:
            await monitor.close()

    return asyncio.run(connected())


def at(guest: LiveGuest) -> tuple[str, str]:
    """The node that its disk is attached to, and the file that is."""

    async def look(monitor: Monitor) -> tuple[str, str]:
        (disk,) = (await look_at(monitor)).disks
        return disk.node, disk.file

    return asked(guest, look)


def ours_in(guest: LiveGuest) -> tuple[list[str], set[str]]:
    async def look(monitor: Monitor) -> tuple[list[str], set[str]]:
        nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
        jobs = [str(job["id"]) for job in await monitor.execute("query-jobs")]
        return jobs, {str(node["node-name"]) for node in nodes if node["node-name"].startswith(OURS)}

    return asked(guest, look)


@contextmanager
def standing_still(guest: LiveGuest) -> Iterator[None]:
    asked(guest, lambda monitor: monitor.execute("stop"))
    try:
        yield
    finally:
        asked(guest, lambda monitor: monitor.execute("cont"))


def newest_of(host: Host, uri: str) -> int:
    """The number of the guest's newest write. AssertionError unless all that it wrote before is there as well, too: the
    writer puts number n into a place that follows from it, and then into the first block."""
    copy = host.scratch / "copy"
    where = ["-f", parse(uri).format, uri]
    subprocess.run(["qemu-img", "convert", "-U", *where, "-O", "raw", str(copy)], check=True, timeout=30)
    data = copy.read_bytes()
    copy.unlink()
    numbers = [int.from_bytes(data[place : place + 8], "little") for place in range(0, len(data), BLOCK)]
    newest, places = numbers[0], numbers[1:]
    count = len(places)
    for place, number in enumerate(places):
        last = newest - (newest - place) % count
        expected = {max(0, last)} | ({newest + 1} if (newest + 1) % count == place else set())
        assert number in expected, f"{uri}: {number} at {place}, not one of {expected}, and {newest} is the newest"
    return newest


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
