"""Whether a QEMU outlives being read, as it is found out on a real one."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.stack import Process, wait_until
from workers.agent.monitor import Monitor
from workers.agent.probe import Probe

pytestmark = pytest.mark.needs("qemu-system-x86_64", "setpriv")

NOBODY_ID = 65534
NOBODY = ("setpriv", "--reuid", str(NOBODY_ID), "--regid", str(NOBODY_ID), "--clear-groups", "--")


@contextmanager
def qemu(directory: Path, prefix: Sequence[str] = ()) -> Iterator[Path]:
    """The monitor of one that is in nobody's way."""
    path = directory / "qmp"
    words = ["-accel", "tcg", "-machine", "none", "-S", "-nodefaults", "-display", "none"]
    command = [*prefix, "qemu-system-x86_64", *words, "-qmp", f"unix:{path},server=on,wait=off"]
    process = Process(command, directory / "log")
    try:
        wait_until(path.exists, "its monitor")
        yield path
    finally:
        process.kill()


async def why_not(path: Path, *, iothread: bool) -> str:
    monitor = await Monitor.connect(path)
    try:
        told = await Probe().why_not(monitor, iothread=iothread)
        assert (await monitor.execute("query-status"))["status"] == "prelaunch", "it was another one that was tried"
    finally:
        await monitor.close()
    return told


def test_a_disk_without_an_iothread_can_be_read(tmpfs_path: Path) -> None:
    with qemu(tmpfs_path) as path:
        assert asyncio.run(why_not(path, iothread=False)) == ""


def test_a_qemu_that_dies_of_being_read_is_found_out(tmpfs_path: Path) -> None:
    """Debian 12's does with an IOThread. Of others it is not known here."""
    version = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    if " 7.2." not in version:
        pytest.skip(f"of {version.splitlines()[0]} it is not known what it does")
    with qemu(tmpfs_path) as path:
        told = asyncio.run(why_not(path, iothread=True))
    assert told == "its QEMU died (SIGABRT) when a disk with an IOThread was read"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root")
def test_a_program_is_tried_as_the_user_of_its_guest(tmpfs_path: Path) -> None:
    """And not as whoever tries it: what a process says to be its program is no more to be trusted than the process."""
    tmpfs_path.chmod(0o777)
    with qemu(tmpfs_path, NOBODY) as path:
        users = asyncio.run(users_seen(path))
    assert len(users) == 2, "the guest's, and the one that is tried"
    assert set(users.values()) == {NOBODY_ID}


async def users_seen(path: Path) -> dict[int, int]:
    """Of all QEMUs that we have started, by their process ids, while one is tried."""
    monitor, users = await Monitor.connect(path), {}
    trying = asyncio.create_task(Probe().why_not(monitor, iothread=False))
    while not trying.done():
        for process in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if "qemu" in process.exe():
                    users[process.pid] = process.uids().real
        await asyncio.sleep(0)
    assert await trying == ""
    await monitor.close()
    return users
