"""Views: what a disk of a running guest held at one instant, kept by QEMU's copy-before-write filter.

::

    prepared            cut                         what a write of the guest does then
    device              device
      │                   │ drive
      │                  cbw ── target ── scratch   an old block goes to the scratch image first
      │ drive             │ file  │
      node <── cbw       node     acc               acc (snapshot-access) reads a block from the scratch image if it
               │                                    is there, and from the node if not
            scratch

A scratch image that fails, hangs or is full breaks the view and not the guest: `on-cbw-error: break-snapshot`, and a
write waits at most CBW_TIMEOUT_S for it. The filter is put under the device by the property `drive`, while the guest is
stopped, and taken away without stopping it. Tried on QEMU 7.2; the filter has had what is used here since 7.1.

**Nothing is opened over a busy node of an IOThread.** QEMU before 9.0 then drains the node without holding the lock
that waiting releases, and aborts (`blockdev-add`, bdrv_open, blk_unref, blk_drain, qemu_mutex_unlock_impl): eight
guests of eight that wrote all the time were dead within three cuts (7.2.22). So the filter over such a disk is added
while the guest is stopped, when nothing is in flight; over others it is added beforehand, since that costs a
millisecond or two of the stop.

**A user may take a snapshot of the disk meanwhile.** Taken of the disk's node, its overlay comes between that and the
filter, and is what the device gets back. Taken of the node that the device is attached to, it comes above the filter,
which is then a backing file and stays one: what takes it out of there (`block-stream`, with nothing to copy) rewrites
the header of an image that is the user's, beside jobs that are the user's, so it is left to him. `blockdev-reopen` with
another backing file is no way either: a guest's writes stood still for good after it (7.2.22).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from coordinator.model.errors import RefusedError, UnavailableError
from workers.agent.guest import OURS, Guest, GuestDisk, look_at
from workers.agent.monitor import Command, GuestRefusedError, Monitor

OLDEST = (7, 1, 0)
_OPENS_UNDER_LOAD = (9, 0, 0)
"""Without the lock of contexts there is nothing to release (QEMU's change log of 9.0)."""
CBW_TIMEOUT_S = 2
"""How long one write of the guest may wait for the scratch image, once: then the view is broken."""
IN_USE_S = 5.0
"""How long a node may be called in use after the job or the reader that used it is gone."""
_IN_USE_PAUSE_S = 0.05
_RECORD = ".view.json"


@dataclass(frozen=True, slots=True)
class View:
    """The nodes of one disk's view. It is there from `prepare` on, and readable at `access` after the cut."""

    disk: GuestDisk
    scratch: Path
    mark: str
    """What tells its nodes from those of other views."""
    opens_when_stopped: bool
    """Whether the filter can only be added while the guest is stopped."""

    @property
    def scratch_node(self) -> str:
        return f"{OURS}scratch-{self.mark}"

    @property
    def filter_node(self) -> str:
        return f"{OURS}cbw-{self.mark}"

    @property
    def access(self) -> str:
        return f"{OURS}acc-{self.mark}"


def refuse_unless_able(guest: Guest, disk: GuestDisk) -> None:
    """RefusedError for a disk of which no view can be taken."""
    if guest.version < OLDEST:
        version, oldest = (".".join(map(str, numbers)) for numbers in (guest.version, OLDEST))
        raise RefusedError(
            f"the guest's QEMU is {version}, and views need {oldest}", "restart the guest on a newer QEMU"
        )
    if disk.driver.startswith("copy-before-write"):
        raise RefusedError(
            f"{disk.device} has a copy-before-write filter already", "let whoever put it there take it away"
        )


def opens_when_stopped(guest: Guest, disk: GuestDisk) -> bool:
    """Whether the filter over this disk can only be added while the guest is stopped."""
    return bool(disk.iothread) and guest.version < _OPENS_UNDER_LOAD


async def prepare(monitor: Monitor, guest: Guest, disk: GuestDisk, directory: Path) -> View:
    """What of a view can be there before the cut: nothing of the guest's goes through it yet. `directory` has the
    scratch image. RefusedError for a disk of which no view can be taken."""
    refuse_unless_able(guest, disk)
    mark = secrets.token_hex(4)
    view = View(disk, directory / f"{mark}.scratch.qcow2", mark, opens_when_stopped(guest, disk))
    await asyncio.to_thread(_remember, monitor.path, view)
    try:
        await make_image(monitor, view.scratch, disk.size)
        await add_image(monitor, view.scratch_node, view.scratch)
        if not view.opens_when_stopped:
            await monitor.execute(*_adding_filter(view))
    except BaseException:
        await remove(monitor, view)
        raise
    return view


def _adding_filter(view: View) -> Command:
    return "blockdev-add", {
        "driver": "copy-before-write",
        "node-name": view.filter_node,
        "file": view.disk.node,
        "target": view.scratch_node,
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": CBW_TIMEOUT_S,
    }


def inserting(view: View) -> Iterator[Command]:
    """What puts the filter of a stopped guest's disk in place, in this order. What was inserted before an error
    `remove` takes away again."""
    if view.opens_when_stopped:
        yield _adding_filter(view)
    yield "qom-set", {"path": view.disk.path, "property": "drive", "value": view.filter_node}
    yield "blockdev-add", {"driver": "snapshot-access", "node-name": view.access, "file": view.filter_node}


async def take_out_still(monitor: Monitor, view: View) -> None:
    """In the stop in which it was inserted, so that nobody looks whether somebody has built upon it. The scratch image
    stays until `remove`."""
    await delete_node(monitor, view.access)
    await monitor.execute("qom-set", {"path": view.disk.path, "property": "drive", "value": view.disk.node})
    await delete_node(monitor, view.filter_node)


async def remove(monitor: Monitor, view: View) -> None:
    """Take a view away, however much of it is there; the guest may run. RefusedError if something holds on to it: then
    it is still remembered, and an agent that starts tries again."""
    nodes = {str(node["node-name"]) for node in await monitor.execute("query-named-block-nodes", {"flat": True})}
    if view.access in nodes:
        await delete_node(monitor, view.access)
    if view.filter_node in nodes:
        await _take_out(monitor, view)
        await delete_node(monitor, view.filter_node)
    if view.scratch_node in nodes:
        await delete_node(monitor, view.scratch_node)
    view.scratch.unlink(missing_ok=True)
    _record_of(view).unlink(missing_ok=True)


async def _take_out(monitor: Monitor, view: View) -> None:
    """Nothing reads or writes through the filter any more."""
    graph = await monitor.execute("x-debug-query-block-graph")  # nothing else tells what is below a filter
    names = {node["id"]: str(node["name"]) for node in graph["nodes"] if node["type"] == "block-driver"}
    edges = [(names.get(edge["parent"]), edge["name"], names[edge["child"]]) for edge in graph["edges"]]
    (below,) = [child for parent, name, child in edges if (parent, name) == (view.filter_node, "file")]
    above = ", ".join(parent for parent, _, child in edges if parent and child == view.filter_node)
    if above:
        raise RefusedError(
            f"{view.disk.device} has {above} above the filter {view.filter_node}, by somebody's snapshot or job",
            f"wait for the job, or let QEMU leave the filter out (block-stream, device {above}, base-node {below}); "
            "then start the agent anew",
        )
    for now in (await look_at(monitor)).disks:  # or its device was unplugged
        if now.path == view.disk.path and now.node == view.filter_node:
            await monitor.execute("qom-set", {"path": now.path, "property": "drive", "value": below})


def remembered(directory: Path) -> Iterator[tuple[Path, View]]:
    """(monitor, view) of all whose scratch images are in a directory: an agent that was killed has left them. One whose
    guest has ended since is to be forgotten (`forget`)."""
    for path in sorted(directory.glob(f"*{_RECORD}")):
        try:
            record = _Record.model_validate_json(path.read_bytes())
        except ValueError:  # cut off by a crash: nothing was done to the guest yet
            path.unlink()
        else:
            yield record.monitor, record.view


def forget(view: View) -> None:
    """Once its guest has ended."""
    view.scratch.unlink(missing_ok=True)
    _record_of(view).unlink(missing_ok=True)


class _Record(BaseModel):
    """What an agent that starts has to know of a view."""

    monitor: Path
    view: View


def _record_of(view: View) -> Path:
    return view.scratch.with_name(f"{view.mark}{_RECORD}")


def _remember(monitor: Path, view: View) -> None:
    """Durable before anything is done to the guest."""
    write_durably(_record_of(view), _Record(monitor=monitor, view=view).model_dump_json())


def write_durably(path: Path, text: str) -> None:
    """A new file of the scratch directory. UnavailableError."""
    try:
        being_written = path.with_suffix(".new")
        with being_written.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        being_written.replace(path)
    except OSError as error:
        raise UnavailableError(
            f"nothing can be written to the scratch directory {path.parent}: {error.strerror}",
            "make room there, or name another",
        ) from error


async def delete_node(monitor: Monitor, node: str) -> None:
    """A job that was dismissed, or a reader that left, may hold on to it for a moment."""
    ends_at = asyncio.get_running_loop().time() + IN_USE_S
    while True:
        try:
            await monitor.execute("blockdev-del", {"node-name": node})
        except GuestRefusedError as error:
            if "in use" not in error.message or asyncio.get_running_loop().time() > ends_at:
                raise
            await asyncio.sleep(_IN_USE_PAUSE_S)
        else:
            return


async def add_image(monitor: Monitor, node: str, path: Path) -> None:
    file = {"driver": "file", "filename": str(path)}
    await monitor.execute("blockdev-add", {"driver": "qcow2", "node-name": node, "file": file})


async def make_image(monitor: Monitor, path: Path, size: int) -> None:
    """An empty qcow2 image that the guest's QEMU may write, and nobody else may read."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)]
    made = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, said = await made.communicate()
    except BaseException:  # or it would make the image when nobody expects it any more
        made.kill()
        await made.wait()
        raise
    if made.returncode != 0:
        raise UnavailableError(
            f"no scratch image can be made at {path}: {said.decode(errors='replace').strip()}",
            "make room there, or name another scratch directory",
        )
    path.chmod(0o600)
    lend(monitor, path)


def lend(monitor: Monitor, path: Path) -> None:
    """Give a file, or a directory, to the user of the guest's QEMU."""
    uid, gid = monitor.user_of_qemu()
    if uid != os.geteuid():
        with contextlib.suppress(PermissionError):  # then QEMU says that it cannot open it
            os.chown(path, uid, gid)
