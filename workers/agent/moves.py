"""What QEMU is told when disks of a guest move to other images (QEMU.md, "The pivot").

::

    the guest runs      open_target()   the target as a node of its own, which nothing uses yet
    it stands still     bring()         what its view says was written since the point goes to the target, by a job
                                        that fails alone; the view goes; a mirror job with nothing to copy: PENDING
    after GO            switch()        job-finalize: the device is attached to the target
                        ask()           whether targets still answer: a mirror job asks nobody when it is finalized
    or                  keep()          job-cancel: the device stays where it is
    the guest runs      end_jobs()      they go, however they stand
                        close_targets() those that nobody uses

**A pending job is what agent and guard can both decide on, and QEMU decides between them**: `job-finalize` and
`job-cancel` take effect at once, and whichever comes second is refused (7.2.22; 14,000 jobs of disks with IOThreads
were cancelled READY or PENDING just before a `cont`, and no guest was harmed). So all of one side is said in one write:
nothing of the other's comes in between, and of a guest's disks all move or none.

While a job is pending the guest's writes wait, if it runs.

A server of a target that hangs holds up QEMU's main loop as soon as one waits for its requests, as `job-finalize` does.
`yank` is heard even then, and breaks the connection.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

from coordinator.model.errors import FlushpointError, RefusedError, UnavailableError, UsageError
from coordinator.model.uri import DiskUri, parse
from workers.agent.cut import MIRROR
from workers.agent.guest import OURS, GuestDisk, look_at
from workers.agent.monitor import ANSWER_S, GuestRefusedError, GuestSilentError, Monitor
from workers.agent.stage import BY_BITMAP, merge
from workers.agent.views import View, delete_node, take_out_still
from workers.nbd.endpoint import Endpoint

_TARGET = f"{OURS}target-"
_CHANGES = frozenset({"JOB_STATUS_CHANGE"})
_LOOK_S = 0.2
"""How long to wait for an event before jobs are asked for: an event may have been among those forgotten."""
_PAUSE_S = 0.001
HUNG_S = 0.25
"""Silence of a monitor after which it is not taken for busy any more, but for held up by a target's server."""
END_S = 5.0
"""A cancelled job waits for its requests in flight; then the connection to the target is broken."""
_ENDS = {"auto-finalize": False, "auto-dismiss": False}
_ERRORS = {"on-source-error": "report", "on-target-error": "report"}


@dataclass(frozen=True, slots=True)
class Move:
    """Of one disk. `disk.node` is what its device was attached to, and `node` is the target."""

    disk: GuestDisk
    node: str
    mark: str
    """Of its view, which is remembered: what tells its jobs from those of other attempts."""
    is_remote: bool
    """The target is an NBD server's."""

    @property
    def mirror(self) -> str:
        return f"{MIRROR}{self.mark}"

    @property
    def delta(self) -> str:
        return f"{OURS}delta-{self.mark}"

    @property
    def ask(self) -> str:
        """A job, and the node that it copies to."""
        return f"{OURS}ask-{self.mark}"


class NotMovedError(UnavailableError):
    """The guest's jobs were cancelled before they were finalized: it goes on where it was."""


def target_node(uri: str) -> str:
    """The same for every attempt, so that a disk is known which has moved there before. QEMU takes 31 characters."""
    return f"{_TARGET}{sha256(uri.encode()).hexdigest()[:16]}"


def runs_on(disk: GuestDisk, target: str) -> bool:
    """Whether the guest writes to this target, by a move of ours or since its user started it there."""
    if disk.node == target_node(target):
        return True
    uri = parse(target)
    if uri.kind == "file":
        return os.path.realpath(disk.file) == os.path.realpath(uri.path)
    with suppress(UsageError):  # QEMU tells "json:…" of what no URI can say
        return replace(Endpoint.parse(disk.file), tls=None) == replace(Endpoint.parse(uri.nbd_uri), tls=None)
    return False


def blockdev_options(uri: DiskUri, node: str, driver: Literal["file", "host_device"]) -> dict[str, object]:
    """For `blockdev-add` (QAPI BlockdevOptions), of a node that may be written; `driver` is that of a path.
    RefusedError for what QEMU cannot go on with."""
    if uri.kind == "nbd":
        return {"driver": "nbd", "node-name": node, **_nbd_options(uri.nbd_uri), "discard": "unmap"}
    if uri.kind != "file":
        raise RefusedError(f"a guest cannot go on with {uri}", "name an image, a block device or an NBD export")
    file = {"driver": driver, "filename": uri.path, "discard": "unmap"}
    return {"driver": uri.format, "node-name": node, "file": file, "discard": "unmap"}


def _nbd_options(uri: str) -> dict[str, object]:
    endpoint = Endpoint.parse(uri)
    if endpoint.tls is not None:
        raise RefusedError("a guest's QEMU is given no TLS credentials", "name an export without, or one on this host")
    inet = {"type": "inet", "host": endpoint.host, "port": str(endpoint.port)}
    unix = {"type": "unix", "path": endpoint.socket_path}
    return {"server": inet if endpoint.socket_path is None else unix, "export": endpoint.export}


async def open_target(monitor: Monitor, move: Move, options: Mapping[str, object]) -> None:
    """Its target, and where nothing that is read to ask for it goes; nothing of the guest's is touched. RefusedError
    unless the target is as large as the disk and can be written."""
    if any(node["node-name"] == move.node for node in await _nodes(monitor)):
        await delete_node(monitor, move.node)  # an attempt before this one could not close it
    await monitor.execute("blockdev-add", options)
    for node in await _nodes(monitor):
        if node["node-name"] != move.node:
            continue
        size = int(node["image"]["virtual-size"])
        if size != move.disk.size:
            raise RefusedError(
                f"the target of {move.disk.device} has {size} bytes, and the disk has {move.disk.size}",
                "let another pass fill one of the same size",
            )
        if node["ro"]:
            raise RefusedError(f"the target of {move.disk.device} cannot be written", "let QEMU's user write it")
    nowhere = {"driver": "null-co", "node-name": move.ask, "size": move.disk.size}
    await monitor.execute("blockdev-add", nowhere)


# -- while the guest stands still ---------------------------------------------------------------------------------


async def bring(monitor: Monitor, moves: Sequence[Move], changed: Sequence[tuple[View, Sequence[str]]]) -> None:
    """Until the mirror jobs of all are PENDING. `changed` has the view of each, and the bitmaps that tell what was
    written since the point that its target holds. UnavailableError. Whoever calls sets a limit."""
    for move, (view, bitmaps) in zip(moves, changed, strict=True):
        await merge(monitor, view, bitmaps)
        arguments = {"job-id": move.delta, "device": view.access, "target": move.node, **BY_BITMAP, **_ENDS, **_ERRORS}
        await monitor.execute("blockdev-backup", arguments)
    deltas = [move.delta for move in moves]
    await _until(monitor, deltas, "pending")
    await _each(monitor, "job-finalize", deltas)
    await _until(monitor, deltas, "concluded")
    await _each(monitor, "job-dismiss", deltas)
    for move, (view, _) in zip(moves, changed, strict=True):
        await take_out_still(monitor, view)
        arguments = {"job-id": move.mirror, "device": move.disk.node, "target": move.node}
        what = {"sync": "none", "copy-mode": "write-blocking"}
        await monitor.execute("blockdev-mirror", {**arguments, **what, **_ENDS, **_ERRORS})
    mirrors = [move.mirror for move in moves]
    await _until(monitor, mirrors, "ready")
    await _each(monitor, "job-complete", mirrors)
    await _until(monitor, mirrors, "pending")


async def _each(monitor: Monitor, verb: str, jobs: Sequence[str]) -> None:
    await monitor.execute_all([(verb, {"id": job}) for job in jobs], ANSWER_S)


async def switch(monitor: Monitor, moves: Sequence[Move]) -> None:
    """All devices are attached to their targets when this returns. NotMovedError if none is; UnavailableError if some
    are, for which QEMU has its reasons."""
    monitor.say([("job-finalize", {"id": move.mirror}) for move in moves])
    found = await _jobs_despite_servers(monitor, moves)
    errors = {move.disk.device: _outcome(found.get(move.mirror)) for move in moves}
    told = "; ".join(f"{device}: {error}" for device, error in errors.items() if error)
    if all(errors.values()):
        raise NotMovedError(f"it was let run before it could move ({told})", "give it a longer deadline")
    if told:
        raise UnavailableError(f"not all of its disks have moved ({told})", "look at QEMU's log")


async def ask(monitor: Monitor, moves: Sequence[Move], timeout_s: float) -> None:
    """Whether a block of each target can be read. UnavailableError. A job can copy no part of a disk, and a window over
    a node that a device writes is refused; but one that may copy a byte a second copies its first piece at once."""
    ends_at = time.monotonic() + timeout_s
    for move in moves:
        arguments = {"job-id": move.ask, "device": move.node, "target": move.ask, "sync": "full", "speed": 1}
        await monitor.execute("blockdev-backup", {**arguments, **_ENDS, **_ERRORS}, timeout_s)
    while True:
        found = await _jobs(monitor, timeout_s)
        asked = {move.disk.device: found.get(move.ask, {}) for move in moves}
        failed = "; ".join(f"{device}: {job['error']}" for device, job in asked.items() if "error" in job)
        if failed:
            raise UnavailableError(f"its target cannot be read ({failed})", "look at what holds it")
        if all(job.get("current-progress", 0) > 0 for job in asked.values()):
            break
        if time.monotonic() > ends_at:
            raise UnavailableError(f"its target was not read within {timeout_s:.2g} s", "look at what holds it")
        await asyncio.sleep(_PAUSE_S)
    await _end(monitor, [move.ask for move in moves])


async def keep(monitor: Monitor, moves: Sequence[Move]) -> None:
    """The guest is to run where it is, and its writes are not to wait for jobs: they are cancelled, and have ended if
    they can. GuestSilentError."""
    jobs = [job for move in moves for job in (move.delta, move.mirror)]
    monitor.say([("job-cancel", {"id": job}) for job in jobs])
    with suppress(TimeoutError):
        async with asyncio.timeout(HUNG_S):
            while at_work := _at_work(await _jobs(monitor, HUNG_S), jobs):
                monitor.say([("job-cancel", {"id": job}) for job in at_work])  # begun since, by a command on its way
                await asyncio.sleep(_PAUSE_S)


# -- while it runs ------------------------------------------------------------------------------------------------


async def end_jobs(monitor: Monitor, mark: str) -> None:
    """With this mark, however they stand. UnavailableError for one that does not end."""
    jobs = [f"{MIRROR}{mark}", f"{OURS}delta-{mark}", f"{OURS}ask-{mark}"]
    try:
        await _end(monitor, jobs)
    except UnavailableError:
        unused = await _targets(monitor)
        await _break_off(monitor, [str(node["node-name"]) for node in unused if node["drv"] == "nbd"])
        await _end(monitor, jobs)
    there = {node["node-name"] for node in await _nodes(monitor)}
    for job in jobs:
        if job in there:
            await delete_node(monitor, job)


async def close_targets(monitor: Monitor) -> None:
    """Those that nobody uses, once jobs and views are gone. GuestRefusedError."""
    graph = await monitor.execute("x-debug-query-block-graph")
    used = {edge["child"] for edge in graph["edges"]}
    unused = {str(node["name"]) for node in graph["nodes"] if node["id"] not in used}
    for node in await _targets(monitor):
        if node["node-name"] in unused:
            await delete_node(monitor, str(node["node-name"]))


async def _nodes(monitor: Monitor) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await monitor.execute("query-named-block-nodes", {"flat": True})
    return found


async def _targets(monitor: Monitor) -> list[dict[str, Any]]:
    """That no device is attached to."""
    attached = {disk.node for disk in (await look_at(monitor)).disks}
    nodes = [node for node in await _nodes(monitor) if str(node["node-name"]).startswith(_TARGET)]
    return [node for node in nodes if node["node-name"] not in attached]


async def _jobs(monitor: Monitor, timeout_s: float = END_S) -> dict[str, dict[str, Any]]:
    return {str(job["id"]): job for job in await monitor.execute("query-jobs", timeout_s=timeout_s)}


async def _jobs_despite_servers(monitor: Monitor, moves: Sequence[Move]) -> dict[str, dict[str, Any]]:
    """As they stand after what was said last."""
    try:
        return await _jobs(monitor, HUNG_S)
    except GuestSilentError:
        if not any(move.is_remote for move in moves):
            raise
    await _break_off(monitor, [move.node for move in moves if move.is_remote])
    return await _jobs(monitor, HUNG_S)


async def _break_off(monitor: Monitor, nodes: Sequence[str]) -> None:
    """Connections to targets: what waits for their servers fails at once."""
    with suppress(FlushpointError):  # a QEMU that was built without it, or it is gone
        await monitor.yank(nodes)


async def _until(monitor: Monitor, jobs: Collection[str], status: str) -> None:
    """All of them are there. UnavailableError if one has failed, or is gone. Whoever calls sets a limit."""
    while True:
        heard = monitor.heard
        found = await _jobs(monitor)
        for job in jobs:
            if job not in found:
                raise UnavailableError(f"the job {job} is gone", "let nobody else end jobs of Flushpoint's")
            if "error" in found[job]:
                raise UnavailableError(f"the target cannot be written: {found[job]['error']}", "look at what holds it")
        if all(found[job]["status"] == status for job in jobs):
            return
        await monitor.wait_for(_CHANGES, heard, _LOOK_S)


def _outcome(job: Mapping[str, Any] | None) -> str:
    """Why the job has not moved its disk; "" if it has."""
    if job is None:
        return "its job is gone"
    if job["status"] == "concluded":
        return str(job.get("error", ""))
    return f"its job is {job['status']}"


def _at_work(found: Mapping[str, Mapping[str, Any]], jobs: Collection[str]) -> list[str]:
    return [job for job in jobs if job in found and found[job]["status"] != "concluded"]


async def _end(monitor: Monitor, jobs: Collection[str]) -> None:
    """However they stand, none is left. UnavailableError for one that does not end."""
    try:
        async with asyncio.timeout(END_S):
            found = await _jobs(monitor)
            for job in _at_work(found, jobs):
                with suppress(GuestRefusedError):  # it may just be ending by itself
                    await monitor.execute("job-cancel", {"id": job})
            while _at_work(found, jobs):
                await asyncio.sleep(_PAUSE_S)
                found = await _jobs(monitor)
            for job in jobs:
                if job in found:
                    await monitor.execute("job-dismiss", {"id": job})
    except TimeoutError as error:
        raise UnavailableError("a job does not end: what its target is on hangs", "look at that") from error
