"""Stage: a view is copied by the guest's QEMU to an image on its host, and everybody else reads that.

The job reads the view, not the disk: where it fails, it alone fails. When it has ended the image is what the disk held
at the cut, the guest is free of the filter, and no reader, however slow, concerns it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.model.errors import UnavailableError
from workers.agent.cut import Vm
from workers.agent.guest import OURS
from workers.agent.monitor import GuestRefusedError, Monitor
from workers.agent.views import View, add_image, delete_node, make_image

_CHANGES = frozenset({"JOB_STATUS_CHANGE"})
_LOOK_S = 1.0
"""How long to wait for an event before the job is asked for: an event may have been among those forgotten."""
END_S = 30.0
"""A cancelled job waits for its requests in flight, so for the scratch directory's disk."""
_BITMAP = f"{OURS}stage"


@dataclass(frozen=True, slots=True)
class Staged:
    """An image of what bitmaps named, and nothing else, or of all there is; it has no backing file."""

    image: Path
    size: int


async def stage(vm: Vm, view: View, changed: Sequence[str], timeout_s: float) -> Staged:
    """Copy what the bitmaps `changed` (of the view's disk, disabled) say together, or everything if there are none.
    UnavailableError if the scratch image, the staged one or QEMU fails, or time is up: nothing is left then."""
    monitor, image, name = vm.monitor, _image_of(view), _name_of(view)
    try:
        await make_image(monitor, image, view.disk.size)
        try:
            await add_image(monitor, name, image)
            arguments = {"job-id": name, "device": view.access, "target": name, **await _what(monitor, view, changed)}
            ends = {"auto-finalize": False, "auto-dismiss": False}
            errors = {"on-source-error": "report", "on-target-error": "report"}
            await monitor.execute("blockdev-backup", {**arguments, **ends, **errors})
            async with asyncio.timeout(timeout_s):
                await _finish(vm, name)
        except TimeoutError as error:
            raise UnavailableError(
                f"{view.disk.device} was not staged within {timeout_s:g} s", "look at the scratch directory's disk"
            ) from error
        finally:
            await _release(vm, view)
    except BaseException:
        image.unlink(missing_ok=True)
        raise
    return Staged(image, view.disk.size)


async def clear(vm: Vm, view: View) -> None:
    """What an agent that was killed while it staged has left of that."""
    await _release(vm, view)
    _image_of(view).unlink(missing_ok=True)


async def _release(vm: Vm, view: View) -> None:
    """The guest has nothing to do with the image any more. It is looked at what there is: a command whose answer nobody
    waited for was carried out before what is asked now."""
    name = _name_of(view)
    await _dismiss(vm, view, name)
    nodes = await vm.monitor.execute("query-named-block-nodes", {"flat": True})
    if any(node["node-name"] == name for node in nodes):
        await delete_node(vm.monitor, name)


def _name_of(view: View) -> str:
    """Of the job, and of its target's node."""
    return f"{OURS}stage-{view.mark}"


def _image_of(view: View) -> Path:
    return view.scratch.with_name(f"{view.mark}.stage.qcow2")


async def _what(monitor: Monitor, view: View, changed: Sequence[str]) -> dict[str, object]:
    if not changed:
        return {"sync": "full"}
    granularity = min(b.granularity for b in view.disk.bitmaps if b.name in changed)
    new = {"node": view.access, "name": _BITMAP, "granularity": granularity, "disabled": True}
    await monitor.execute("block-dirty-bitmap-add", new)
    sources = [{"node": view.disk.node, "name": name} for name in changed]
    await monitor.execute("block-dirty-bitmap-merge", {"node": view.access, "target": _BITMAP, "bitmaps": sources})
    return {"sync": "bitmap", "bitmap": _BITMAP, "bitmap-mode": "never"}


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
