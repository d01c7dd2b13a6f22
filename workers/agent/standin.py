"""Stand-ins: a QEMU of the agent's own that has the disks of a machine that is off, and never runs.

::

    prepare     qemu-system-x86_64 -S: each image under a device with the disk's name, locked as its guest would lock it
    cut, stage  as of a guest that its user has paused
    staged      quit: bitmaps that record since the cut are stored in the qcow2 image, and the locks let go
                whoever opens the image then, guest or tool, has QEMU record in them what it writes

Nobody else can write meanwhile: the machine's own QEMU refuses to start ("Failed to get "write" lock"). So a stand-in
lives no longer than it takes to stage its disks, and ends with its agent, whatever ends that. One that is killed has
stored nothing: QEMU then calls its bitmaps inconsistent, and contents are compared.

An image that is locked is run by somebody after all, whom nobody hears at the monitor. It is let be.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from coordinator.model.epoch import Participant
from coordinator.model.errors import FlushpointError, RefusedError, UnavailableError
from coordinator.model.uri import DiskUri, parse
from workers.access import Access
from workers.agent.cut import Vm
from workers.agent.guard import GuardLink
from workers.agent.guest import GuestDisk
from workers.agent.journal import Journal
from workers.agent.monitor import ALLOWED, Monitor
from workers.qemu.image import Image, inspect, refusal

QEMU = "qemu-system-x86_64"
MACHINE = ["-S", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc,accel=tcg", "-m", "32"]
START_S = 10.0
END_S = 30.0
"""It flushes the image when it ends. After that it is killed, and contents are compared."""
_PAUSE_S = 0.02
_PLACE = "off-"
_FUNCTIONS = 8
"""Of a PCI device; of those the machine has 32, of which its bridges are two."""
_FIRST_SLOT = 2

log = structlog.get_logger()


class StandIn(Vm):
    """In a machine's place. Neither guard nor journal hears of it, for it does not run before it is stopped."""

    is_off = True


class StandIns:
    """Those of one agent. Of an image there is one at a time: an epoch that was given up may just be letting go of it
    when the next one wants it."""

    def __init__(self, directory: Path, access: Access, guard: GuardLink, journal: Journal) -> None:
        """Their monitors are in directories of their own in `directory`; images are where `access` allows them."""
        self._directory = directory
        self._access = access
        self._guard = guard
        self._journal = journal
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def clear(self) -> None:
        """What those of an agent before this one have left; they themselves ended with it."""
        for place in self._directory.glob(f"{_PLACE}*"):
            shutil.rmtree(place, ignore_errors=True)

    @asynccontextmanager
    async def open(self, participant: Participant) -> AsyncIterator[Vm]:
        """Until the block ends, with all images of a participant. RefusedError for what must not be opened, or is
        open elsewhere, naming the image; UnavailableError if QEMU cannot be started."""
        images = await asyncio.to_thread(self._allowed, participant)
        async with AsyncExitStack() as held:
            for path in sorted({image.path for image in images.values()}):
                await held.enter_async_context(self._turns[path])
            await asyncio.to_thread(self._refuse_shared, participant, images)
            nodes = await asyncio.to_thread(self._nodes, images)
            place = self._place()
            held.callback(shutil.rmtree, place, ignore_errors=True)
            process = await _started(place / "qmp", nodes)
            held.push_async_callback(_killed, process)
            monitor = await _connected(place / "qmp", process, participant, images)
            held.push_async_callback(_quit, monitor, process, participant.vm)
            yield StandIn(monitor, self._guard, self._journal)

    def _place(self) -> Path:
        try:
            return Path(tempfile.mkdtemp(prefix=_PLACE, dir=self._directory))
        except OSError as error:
            raise UnavailableError(
                f"no directory can be made in {self._directory}: {error.strerror}", "make room there, or name another"
            ) from error

    def _allowed(self, participant: Participant) -> dict[str, DiskUri]:
        """By disk, where its image really is."""
        uris = {disk: parse(participant.images[disk]) for disk in participant.disks}
        return {disk: replace(u, path=self._access.check_path(u.path, must_exist=True)) for disk, u in uris.items()}

    def _nodes(self, images: Mapping[str, DiskUri]) -> dict[str, dict[str, Any]]:
        return {disk: node_of(image, self._access) for disk, image in images.items()}

    def _refuse_shared(self, participant: Participant, images: Mapping[str, DiskUri]) -> None:
        """RefusedError for a device that the machine may be using elsewhere: no lock tells."""
        devices = [image.path for image in images.values() if stat.S_ISBLK(Path(image.path).stat().st_mode)]
        if participant.qmp and devices:
            raise RefusedError(
                f"{participant.vm} may run on another host that has the device {devices[0]}, too: locks of devices"
                " do not reach there",
                "start it here; or make the disk a member without qmp, if no other host can open it",
            )


def node_of(image: DiskUri, access: Access) -> dict[str, Any]:
    """An image that may be opened (QAPI BlockdevOptions), whose header names no file that may not. RefusedError."""
    found = Path(image.path).stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        raise RefusedError(f"{image.path} is neither a file nor a block device", "correct the group")
    if stat.S_ISREG(found.st_mode) and found.st_size == 0:
        raise RefusedError(f"the image {image.path} is empty", "make it with qemu-img create, or correct the group")
    if image.format == "qcow2":
        node = inspect(image.path, access).node()
    else:
        node = Image(image.path, "raw", found.st_size).node()
    # Where a file system has no locks QEMU would go without, and an image with two writers is lost.
    return {**node, "file": {**node["file"], "locking": "on"}}


def refuse_other_image(disk: GuestDisk, image: str) -> None:
    """RefusedError if a running guest's disk is in another image than the group says: it is what would be taken for
    the disk as soon as the guest is off."""
    named = parse(image).path
    if disk.file.startswith("/") and os.path.realpath(disk.file) != os.path.realpath(named):
        raise RefusedError(
            f"the guest's disk {disk.device} is in {disk.file}, and not in {named}, where the group has its image",
            "correct the group, or let QEMU commit a snapshot that was taken of the disk",
        )


def command_of(monitor: Path, nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    words = ["setpriv", "--pdeathsig", "KILL", "--", QEMU, *MACHINE]
    words += ["-chardev", f"socket,id=m,path={monitor},server=on,wait=off", "-mon", "chardev=m,mode=control"]
    for number, (disk, node) in enumerate(nodes.items()):
        slot, function = divmod(number, _FUNCTIONS)
        words += ["-blockdev", json.dumps({**node, "node-name": f"disk{number}"})]
        device = {"driver": "virtio-blk-pci", "id": disk, "drive": f"disk{number}"}
        place = {"addr": f"{_FIRST_SLOT + slot:x}.{function}", "multifunction": True}
        words += ["-device", json.dumps({**device, **place})]
    return words


async def _started(monitor: Path, nodes: Mapping[str, Mapping[str, Any]]) -> asyncio.subprocess.Process:
    if shutil.which(QEMU) is None:
        raise UnavailableError(f"{QEMU} is not on the agent's PATH", "install qemu-system-x86")
    return await asyncio.create_subprocess_exec(
        *command_of(monitor, nodes),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
    )


async def _connected(
    path: Path, process: asyncio.subprocess.Process, participant: Participant, images: Mapping[str, DiskUri]
) -> Monitor:
    """Its monitor greets once all images are open."""
    ends_at = asyncio.get_running_loop().time() + START_S
    while True:
        try:
            return await Monitor.connect(path, allowed=ALLOWED | {"quit"})
        except FlushpointError as error:
            if process.returncode is not None:
                assert process.stderr is not None
                said = (await process.stderr.read()).decode(errors="replace")
                raise refused(said, participant, [image.path for image in images.values()]) from error
            if asyncio.get_running_loop().time() > ends_at:
                raise UnavailableError(
                    f"the stand-in for {participant.vm} has not started within {START_S:g} s: {error.message}",
                    "look at what its host is busy with",
                ) from error
            await asyncio.sleep(_PAUSE_S)


def refused(said: str, participant: Participant, images: Sequence[str]) -> FlushpointError:
    """What a QEMU said that did not start, as an error with a remedy."""
    words = " ".join(said.split()).rpartition("}: ")[2]  # before that it repeats the option
    if '" lock' in words:
        image = next((path for path in images if f"[{path}]" in words), ", ".join(images))
        silent = f", and nobody listens at {participant.qmp}" if participant.qmp else ""
        return RefusedError(
            f"another process has the image {image} open{silent}",
            "name the monitor of the guest that runs on it, or end that process",
        )
    error = refusal(words, [QEMU])
    return RefusedError(f"no stand-in for {participant.vm} ({', '.join(images)}): {error.message}", error.remedy)


async def _quit(monitor: Monitor, process: asyncio.subprocess.Process, vm: str) -> None:
    """Bitmaps are stored when it is gone."""
    with suppress(FlushpointError):  # it may be gone before it has answered
        await monitor.execute("quit")
    try:
        async with asyncio.timeout(END_S):
            await process.wait()
    except TimeoutError:
        log.warning("a stand-in does not end: it is killed, and contents will be compared", vm=vm)
    await monitor.close()


async def _killed(process: asyncio.subprocess.Process) -> None:
    """However it stands."""
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()
