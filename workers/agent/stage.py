"""Stage: a view is copied by the guest's QEMU to an image on its host, and everybody else reads that.

What is copied is what bitmaps name, and a range of the disk. A job copies no range: for that, windows (raw nodes with
an offset) are opened over view and image.

The job reads the view, not the disk: where it fails, it alone fails. When it has ended the image is what the disk held
at the cut, the guest is free of the filter, and no reader, however slow, concerns it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.model.errors import UnavailableError
from workers.agent import views
from workers.agent.cut import Part, Vm
from workers.agent.guest import OURS
from workers.agent.monitor import GuestRefusedError, Monitor
from workers.agent.views import View, add_image, delete_node, make_image

_CHANGES = frozenset({"JOB_STATUS_CHANGE"})
_LOOK_S = 1.0
"""How long to wait for an event before the job is asked for: an event may have been among those forgotten."""
END_S = 30.0
"""A cancelled job waits for its requests in flight, so for the scratch directory's disk."""
BITMAP = f"{OURS}stage"
"""What `merge` makes."""
BY_BITMAP = {"sync": "bitmap", "bitmap": BITMAP, "bitmap-mode": "never"}
"""What a job copies after `merge`."""


@dataclass(frozen=True, slots=True)
class Staged:
    """An image of what bitmaps named, and nothing else, or of all there is; it has no backing file."""

    image: Path
    size: int
    held: int
    """How many bytes, from the beginning, of those that the disk has are in its point or here."""


async def stage(vm: Vm, part: Part, slice_bytes: Callable[[], int], timeout_s: float) -> Staged:
    """Copy what was written since the disk's point, and of what that does not have as much as `slice_bytes` says then.
    UnavailableError if the scratch image, the staged one or QEMU fails, or time is up: nothing is left then."""
    monitor, view, changed = vm.monitor, part.view, part.rotation.changed
    image, name, held, size = _image_of(view), _name_of(view), part.held, part.view.disk.size
    try:
        await make_image(monitor, image, view.disk.size)
        try:
            await add_image(monitor, name, image)
            async with asyncio.timeout(timeout_s):
                if changed:
                    await merge(monitor, view, changed)
                    await _run(vm, view, view.access, name, BY_BITMAP)
                if held < size:
                    # Of what will be forgotten each part would be the first one.
                    part_bytes = size if vm.forgets(view.disk) else slice_bytes()
                    missing = range(held, min(size, held + part_bytes))
                    source, target = await _windows(monitor, view, missing)
                    await _run(vm, view, source, target, {"sync": "full"})
                    held = missing.stop
        except TimeoutError as error:
            raise UnavailableError(
                f"{view.disk.device} was not staged within {timeout_s:g} s", "look at the scratch directory's disk"
            ) from error
        finally:
            await _release(vm, view)
    except BaseException:
        image.unlink(missing_ok=True)
        raise
    return Staged(image, size, held)


async def clear(vm: Vm, view: View) -> None:
    """What an agent that was killed while it staged has left of that."""
    await _release(vm, view)
    _image_of(view).unlink(missing_ok=True)


def forget(view: View) -> None:
    """Its guest has ended, and with it all that was done to it."""
    _image_of(view).unlink(missing_ok=True)
    views.forget(view)


async def _release(vm: Vm, view: View) -> None:
    """The guest has nothing to do with the image any more. It is looked at what there is: a command whose answer nobody
    waited for was carried out before what is asked now."""
    await _dismiss(vm, view, _name_of(view))
    there = {node["node-name"] for node in await vm.monitor.execute("query-named-block-nodes", {"flat": True})}
    for name in (*_windows_of(view), _name_of(view)):
        if name in there:
            await delete_node(vm.monitor, name)


def _name_of(view: View) -> str:
    """Of the job, and of its target's node."""
    return f"{OURS}stage-{view.mark}"


def _image_of(view: View) -> Path:
    return view.scratch.with_name(f"{view.mark}.stage.qcow2")


def _windows_of(view: View) -> tuple[str, str]:
    """Over the view and over the image."""
    return f"{OURS}from-{view.mark}", f"{OURS}to-{view.mark}"


async def _windows(monitor: Monitor, view: View, part: range) -> tuple[str, str]:
    """What a job has to copy that copies this part of the disk, and to where."""
    if len(part) == view.disk.size:
        return view.access, _name_of(view)
    source, target = _windows_of(view)
    window = {"driver": "raw", "offset": part.start, "size": len(part)}
    await monitor.execute("blockdev-add", {**window, "node-name": source, "file": view.access, "read-only": True})
    await monitor.execute("blockdev-add", {**window, "node-name": target, "file": _name_of(view)})
    return source, target


async def _run(vm: Vm, view: View, source: str, target: str, what: Mapping[str, object]) -> None:
    """A job from node to node, until it has ended and is gone."""
    job = _name_of(view)
    ends = {"auto-finalize": False, "auto-dismiss": False}
    errors = {"on-source-error": "report", "on-target-error": "report"}
    arguments = {"job-id": job, "device": source, "target": target, **what, **ends, **errors}
    await vm.monitor.execute("blockdev-backup", arguments)
    await _finish(vm, job)
    await _dismiss(vm, view, job)


async def merge(monitor: Monitor, view: View, changed: Sequence[str]) -> None:
    """One bitmap of the view for all that say what was written."""
    granularity = min(b.granularity for b in view.disk.bitmaps if b.name in changed)
    new = {"node": view.access, "name": BITMAP, "granularity": granularity, "disabled": True}
    await monitor.execute("block-dirty-bitmap-add", new)
    sources = [{"node": view.disk.node, "name": name} for name in changed]
    await monitor.execute("block-dirty-bitmap-merge", {"node": view.access, "target": BITMAP, "bitmaps": sources})


async def _finish(vm: Vm, job: str) -> None:
    """Until it has concluded without an error. It ends when told to, and not beside a stop or a cont."""
    while True:
        heard = vm.monitor.heard
        found = await _job(vm.monitor, job)
        if found is None:
            raise UnavailableError(f"the job {job} is gone", "let nobody else end jobs of Flushpoint's")
        if found["status"] == "concluded":
            if "error" in found:
                raise UnavailableError(f"the view broke: {found['error']}", "make room on the scratch directory's disk")
            return
        if found["status"] == "pending":
            async with vm.order:
                await vm.monitor.execute("job-finalize", {"id": job})
        await vm.monitor.wait_for(_CHANGES, heard, _LOOK_S)


async def _dismiss(vm: Vm, view: View, job: str) -> None:
    """However it stands; nobody waits for what it copies any more. UnavailableError for one that does not end."""
    try:
        async with asyncio.timeout(END_S):
            while (found := await _job(vm.monitor, job)) is not None:
                heard = vm.monitor.heard
                if found["status"] == "concluded":
                    await vm.monitor.execute("job-dismiss", {"id": job})
                    continue
                async with vm.order:
                    with contextlib.suppress(GuestRefusedError):  # it may just be ending by itself
                        await vm.monitor.execute("job-cancel", {"id": job})
                await vm.monitor.wait_for(_CHANGES, heard, _LOOK_S)
    except TimeoutError as error:
        raise UnavailableError(
            f"the job {job} does not end: the disk of {view.scratch.parent} hangs", "look at that disk"
        ) from error


async def _job(monitor: Monitor, job: str) -> dict[str, Any] | None:
    return next((found for found in await monitor.execute("query-jobs") if found["id"] == job), None)
