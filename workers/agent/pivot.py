"""A machine's part in an epoch that pivots: its disks move to images that passes have filled, all of them or none.

::

    PREPARED    the guest runs; targets are open, and views made ready to tell what changed since the point they hold
    FROZEN      it stands still; that is on the targets, and QEMU waits for one word a disk
    GO          the word is said; targets answer; the guest goes on, on them: CUT
    ABORT       or anything that fails before: it goes on where it was

Until it is FROZEN it stands under a cut like any other, so a guard that lets it run harms nobody. The guard cancels
mirror jobs before it does, and whoever comes first decides (moves.py). A guest that has run on its targets never goes
back; one whose targets do not answer is taken back by the guard, which knows whether it has run.

What fails after GO concerns this machine alone: others move meanwhile. It tells by `fail_cut`, and the next epoch finds
disks that have moved attached to their targets, and lets them be.
"""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import Awaitable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog

from coordinator.ledger.barrier import Barrier
from coordinator.model.bitmap import Owner, rotate
from coordinator.model.epoch import CutFacts, Epoch, GoKey, Phase
from coordinator.model.errors import FlushpointError, RefusedError, UnavailableError
from coordinator.model.uri import DiskUri, parse
from workers.access import Access
from workers.agent.cut import Frozen, Part, Vm
from workers.agent.feed import Feed
from workers.agent.guest import Guest, GuestDisk, look_at
from workers.agent.monitor import ANSWER_S, Command
from workers.agent.moves import (
    Move,
    NotMovedError,
    ask,
    blockdev_options,
    bring,
    close_targets,
    end_jobs,
    keep,
    open_target,
    runs_on,
    switch,
    target_node,
)
from workers.agent.muster import Moment, Muster
from workers.agent.participant import MUSTER_SHARE, AbortedError, Taken, fail, refuse_aborted, why_of, write_back
from workers.agent.room import Room
from workers.agent.views import prepare, remove
from workers.failpoint import pass_point
from workers.nbd.endpoint import Endpoint

log = structlog.get_logger()

ASK_SHARE = 0.5
"""Of what is left of the guest's deadline, for targets to answer; the rest is for going back if they do not."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A disk that is to move, once its machine has prepared."""

    move: Move
    part: Part


class PivotingMachine:
    """One machine, its monitor, where its scratch images go, and what of its host it may be moved to."""

    def __init__(self, name: str, vm: Vm, room: Room, access: Access, muster: Muster) -> None:
        """With the others of `muster` it is stopped at once."""
        self.name = name
        self.vm = vm
        self._room = room
        self._access = access
        self._muster = muster

    async def take_part(self, epoch: Epoch, barrier: Barrier, feed: Feed) -> Taken:
        """From the preparation until the guest runs on its targets. AbortedError where nothing comes of it; whatever
        else fails ends the epoch too, and is raised. Nothing of ours is left in the guest but the nodes of targets that
        it is attached to."""
        async with self.vm.turn:
            ready: list[_Ready] = []
            try:
                await self._prepare(epoch, ready)
                if ready:
                    await self.vm.arm()
                pass_point("between-prepare-and-prepared")
                standing = await barrier.prepared(epoch, self.name)
                standing = await feed.until(epoch, standing, lambda s: s.phase is not Phase.PREPARING)
                refuse_aborted(epoch, standing)
                facts = await self._moved(epoch, ready, barrier, feed)
                standing = await barrier.cut(epoch, self.name, facts)
                if standing.phase is Phase.ABORTED:
                    raise AbortedError(f"{self.name} runs on its targets, and others do not: {standing.why}")
            except BaseException as error:
                self._muster.leave(self.name)
                await asyncio.gather(self._tell(epoch, barrier, error), self._clear(ready))  # others stand still
                await self._try(self.vm.disarm())
                raise
            await self._clear(ready)
        return Taken((), facts, standing)

    async def _tell(self, epoch: Epoch, barrier: Barrier, error: BaseException) -> None:
        if not isinstance(error, AbortedError):
            with suppress(FlushpointError):  # its agent says it again
                await fail(epoch, self.name, barrier, why_of(error))

    # -- while the guest runs ------------------------------------------------------------------------------

    async def _prepare(self, epoch: Epoch, ready: list[_Ready]) -> None:
        """Adds to `ready` what is there, so that it can be taken away after an error. Disks that have moved to their
        targets before are none of it."""
        guest = await look_at(self.vm.monitor)
        for name in epoch.participant(self.name).disks:
            disk = guest.disk(name)
            uri = epoch.spec.pivots[f"{self.name}/{name}"]
            if not runs_on(disk, uri):
                await self._prepare_disk(epoch, guest, disk, uri, ready)

    async def _prepare_disk(self, epoch: Epoch, guest: Guest, disk: GuestDisk, uri: str, ready: list[_Ready]) -> None:
        spec = epoch.spec
        owner = Owner(spec.repository, epoch.group, f"{self.name}/{disk.device}")
        rotation = rotate(disk.tracking(), owner, spec.parent(self.name, disk.device), epoch.number)
        why = rotation.compare
        if spec.sizes.get(owner.disk, disk.size) != disk.size:
            why = "the disk has changed its size"
        if spec.seeded.get(owner.disk, disk.size) < disk.size:
            why = "not all of it was copied yet"
        if why:
            raise RefusedError(f"the target of {disk.device} has to be filled by another pass: {why}", "make one")
        target = await asyncio.to_thread(_allowed, parse(uri), self._access)
        view = await prepare(self.vm.monitor, guest, disk, self._room.directory)
        move = Move(disk, target_node(uri), view.mark, target.kind == "nbd")
        ready.append(_Ready(move, Part(view, rotation, disk.size)))
        options = blockdev_options(target, move.node, await asyncio.to_thread(_driver_of, target))
        await open_target(self.vm.monitor, move, options)
        await asyncio.to_thread(write_back, disk.file)

    async def _clear(self, ready: Sequence[_Ready]) -> None:
        """Of all that moves the guest nowhere any more. What cannot be taken away is found by the next attempt, and by
        an agent that starts."""
        for one in ready:
            await self._try(self._end_jobs(one.move))
            await self._try(remove(self.vm.monitor, one.part.view))
        if ready:
            await self._try(close_targets(self.vm.monitor))

    async def _end_jobs(self, move: Move) -> None:
        async with self.vm.order:
            await end_jobs(self.vm.monitor, move.mark)

    async def _try(self, step: Awaitable[None]) -> None:
        try:
            await step
        except FlushpointError as error:
            log.warning("something is left in the guest", vm=self.name, error=str(error))

    # -- while it stands still -----------------------------------------------------------------------------

    async def _moved(self, epoch: Epoch, ready: Sequence[_Ready], barrier: Barrier, feed: Feed) -> CutFacts:
        try:
            return await self._move(epoch, ready, barrier, feed)
        except TimeoutError as error:  # the guest runs by now, so there is time to ask why
            refuse_aborted(epoch, await barrier.time_out(epoch))
            raise UnavailableError(
                f"the ledger told nothing while {self.name} stood still", "look at the ledger's server and the network"
            ) from error

    async def _move(self, epoch: Epoch, ready: Sequence[_Ready], barrier: Barrier, feed: Feed) -> CutFacts:
        """Until the guest runs again, on its targets, or where it was and an error tells why."""
        if not ready:  # it has moved before, and has nothing to stop for
            self._muster.leave(self.name)
            await self._hear_go(epoch, barrier, feed)
            return _facts(time.time(), 0.0)
        moves = [one.move for one in ready]
        deadline_s = epoch.spec.freeze_ms / 1000
        async with self.vm.order:
            together = partial(self._muster.wait, Moment.STOP, self.name, MUSTER_SHARE * deadline_s)
            frozen = await self.vm.freeze(deadline_s, together, [move.mirror for move in moves])
            try:
                await self._until_go(epoch, ready, frozen, barrier, feed)
                pass_point("between-go-and-switch")
                moved_at = time.time()
                await self._switch(moves, frozen)
            except BaseException:
                with suppress(FlushpointError):  # it hangs, and the guard goes on with it
                    await keep(self.vm.monitor, moves)
                raise
            finally:
                stood_s = await self.vm.thaw(frozen)
        return _facts(moved_at, stood_s)

    async def _until_go(
        self, epoch: Epoch, ready: Sequence[_Ready], frozen: Frozen, barrier: Barrier, feed: Feed
    ) -> None:
        """All mirror jobs are PENDING, and the guest has not run: from here on one word decides, whoever says it.
        TimeoutError if the ledger does not tell in time whether it may be said."""
        left_s = frozen.ends_at - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                pass_point("between-stop-and-delta")
                await self.vm.take(frozen, [one.part for one in ready])
                changed = [(one.part.view, one.part.rotation.changed) for one in ready]
                await bring(self.vm.monitor, [one.move for one in ready], changed)
                await self.vm.confirm(frozen)
        except TimeoutError as error:
            raise UnavailableError(
                f"what was written last was not copied within {left_s:.2g} s",
                "make another pass before, or give it a longer deadline",
            ) from error
        pass_point("between-pending-and-frozen")
        async with asyncio.timeout(frozen.ends_at - time.monotonic()):
            await self._hear_go(epoch, barrier, feed)

    async def _hear_go(self, epoch: Epoch, barrier: Barrier, feed: Feed) -> None:
        standing = await barrier.frozen(epoch, self.name)
        standing = await feed.until(epoch, standing, lambda s: s.key is not GoKey.OPEN)
        refuse_aborted(epoch, standing)

    async def _switch(self, moves: Sequence[Move], frozen: Frozen) -> None:
        """NotMovedError: the guard was faster. UnavailableError: its targets do not answer, and where it runs now."""
        try:
            await switch(self.vm.monitor, moves)
            pass_point("between-switch-and-ask")
            if not await self.vm.has_run(frozen, ANSWER_S):  # or it runs on them, and needs no more than that
                left_s = (frozen.ends_at - time.monotonic()) * ASK_SHARE
                await ask(self.vm.monitor, moves, left_s)
        except NotMovedError:
            raise
        except FlushpointError as error:
            where = "where it was" if await _to_its_end(self._go_back(moves, frozen)) else "on its targets"
            raise UnavailableError(f"it runs {where}, since {error.message}", error.remedy) from error

    async def _go_back(self, moves: Sequence[Move], frozen: Frozen) -> bool:
        """Whether it runs, or will, on what it was attached to before. A guest that runs already stays there: only
        the guard knows, so it is the guard who says it, or nobody but us is left who says anything."""
        drives = {move.disk.path: move.disk.node for move in moves}
        try:
            await asyncio.to_thread(self.vm.guard.revert, str(self.vm.monitor.path), drives)
        except UnavailableError:
            if await self.vm.has_run(frozen, ANSWER_S):
                return False
            sets = [{"path": path, "property": "drive", "value": node} for path, node in drives.items()]
            again: list[Command] = [("cont", {})] if frozen.was_running else []
            self.vm.monitor.say([*(("qom-set", one) for one in sets), *again])
        return True


async def _to_its_end(step: Coroutine[Any, Any, bool]) -> bool:
    """Though the agent is told to end meanwhile: it would let the guest run beside what the guard was told."""
    at_work = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(at_work)
    except asyncio.CancelledError:
        await asyncio.wait([at_work])
        raise


def _facts(moved_at: float, stood_s: float) -> CutFacts:
    return CutFacts(cut_at=moved_at, freeze_ms=stood_s * 1000, filesystem_consistent=False, views=())


def _allowed(uri: DiskUri, access: Access) -> DiskUri:
    """Where it really is. RefusedError for what the agent's settings do not allow: QEMU is about to write there."""
    if uri.kind == "file":
        return replace(uri, path=access.check_path(uri.path, must_exist=True))
    if uri.kind == "nbd":
        return replace(uri, nbd_uri=str(access.check_endpoint(Endpoint.parse(uri.nbd_uri))[0]))
    return uri


def _driver_of(uri: DiskUri) -> Literal["file", "host_device"]:
    return "host_device" if uri.path and stat.S_ISBLK(Path(uri.path).stat().st_mode) else "file"
