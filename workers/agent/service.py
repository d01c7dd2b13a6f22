"""The agent of a host: hears of epochs, drives the host's machines through them, and keeps what was staged.

::

    news ──> take_part (every machine of ours) ──> stage (every disk) ──> SCRATCH/GROUP@EPOCH/VM/DISK.qcow2
    news: retired or aborted ──> the images go, and bitmaps that the point covers

An agent that starts first lets run what one before it left stopped, then takes away what that one left in guests, then
gives up the epochs that one took part in. Everything it needs for that is on the host's own disk.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import structlog

from coordinator.ledger.barrier import Barrier, News
from coordinator.model.bitmap import leftovers
from coordinator.model.epoch import OVER, Epoch, Participant, Phase
from coordinator.model.errors import FlushpointError, NotFoundError
from workers.agent.cut import Part, Vm, let_run
from workers.agent.feed import Feed
from workers.agent.guard import GuardLink
from workers.agent.guest import look_at
from workers.agent.journal import Journal
from workers.agent.monitor import GuestSilentError, Monitor
from workers.agent.participant import AbortedError, Machine, recover
from workers.agent.stage import clear, stage
from workers.agent.views import forget, remembered, remove
from workers.failpoint import pass_point

STAGE_S = 3600.0
"""How long one disk may take to be staged; the coordinator gives a longer epoch up."""

log = structlog.get_logger()


class Agent:
    """Runs in one event loop until it is cancelled."""

    def __init__(self, host: str, barrier: Barrier, guard: GuardLink, journal: Journal, scratch: Path) -> None:
        self._host = host
        self._barrier = barrier
        self._guard = guard
        self._journal = journal
        self._scratch = scratch
        self._feed = Feed(barrier, host)
        self._vms: dict[Path, Vm] = {}
        self._at_work: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def run(self, ready: Callable[[], None]) -> None:
        """`ready` is called when what was left behind is cleared up."""
        for sentence in await let_run(self._journal):
            log.warning(sentence)
        await self._clear_up()
        position = await self._barrier.last_news(self._host)
        for epoch in await self._barrier.epochs_on(self._host):
            for participant in epoch.on(self._host):
                await recover(epoch, participant.vm, self._barrier)
        ready()
        try:
            await self._feed.listen(position, self._told)
        finally:
            for task in self._at_work.values():
                task.cancel()
            await asyncio.gather(*self._at_work.values(), return_exceptions=True)
            for vm in self._vms.values():
                await vm.monitor.close()

    def _told(self, news: News) -> None:
        name = (news.group, news.number)
        if news.standing.phase is Phase.PREPARING and name not in self._at_work:
            task = asyncio.create_task(self._take_part(*name))
            self._at_work[name] = task
            task.add_done_callback(lambda _: self._at_work.pop(name, None))
        elif news.standing.phase in OVER:
            after = self._at_work.get(name)
            task = asyncio.create_task(self._tidy(*name, news.standing.phase, after))
            self._at_work[news.group, -news.number] = task
            task.add_done_callback(lambda _: self._at_work.pop((news.group, -news.number), None))

    # -- an epoch ------------------------------------------------------------------------------------------

    async def _take_part(self, group: str, number: int) -> None:
        try:
            epoch = await self._barrier.epoch(group, number)
        except FlushpointError as error:
            log.warning("cannot take part", epoch=f"{group}@{number}", error=str(error))
            return
        await asyncio.gather(*(self._drive(epoch, participant) for participant in epoch.on(self._host)))

    async def _drive(self, epoch: Epoch, participant: Participant) -> None:
        said = log.bind(epoch=epoch.name, vm=participant.vm)
        try:
            vm = await self._vm(Path(participant.qmp))
            machine = Machine(participant.vm, vm, self._scratch)
        except FlushpointError as error:
            said.warning("cannot take part", error=str(error))
            with suppress(FlushpointError):  # the ledger's own time-out ends the epoch then
                await self._barrier.abort(epoch, participant.vm, error.message)
            return
        try:
            taken = await machine.take_part(epoch, self._barrier, self._feed)
            said.info("cut", freeze_ms=round(taken.facts.freeze_ms, 1))
            await stage_all(vm, taken.parts, self._place(epoch.group, epoch.number) / participant.vm)
            said.info("staged")
        except AbortedError as error:
            said.info(error.message)
        except FlushpointError as error:
            said.warning("nothing comes of this machine's part", error=str(error))
            if isinstance(error, GuestSilentError):
                await self._let_go(Path(participant.qmp))

    async def _tidy(self, group: str, number: int, phase: Phase, after: asyncio.Task[None] | None) -> None:
        """Once it is over, and this host has ended its part."""
        if after is not None:
            await asyncio.wait([after])
        if phase is Phase.RETIRED:
            with suppress(FlushpointError):  # what is left goes with the next point
                await self._remove_bitmaps(await self._barrier.epoch(group, number))
        await asyncio.to_thread(shutil.rmtree, self._place(group, number), ignore_errors=True)

    async def _remove_bitmaps(self, point: Epoch) -> None:
        """Those that nobody needs beside the one that records since this point."""
        for participant in point.on(self._host):
            vm = await self._vm(Path(participant.qmp))
            guest = await look_at(vm.monitor)
            for disk in map(guest.disk, participant.disks):
                for name in leftovers(disk.tracking(), point.spec.repository, point.group, point.number):
                    await vm.monitor.execute("block-dirty-bitmap-remove", {"node": disk.node, "name": name})

    def _place(self, group: str, number: int) -> Path:
        return self._scratch / f"{group}@{number}"

    # -- guests --------------------------------------------------------------------------------------------

    async def _vm(self, path: Path) -> Vm:
        if path not in self._vms:
            self._vms[path] = Vm(await Monitor.connect(path), self._guard, self._journal)
        return self._vms[path]

    async def _let_go(self, path: Path) -> None:
        """Of a monitor that broke or is silent; the next epoch connects anew."""
        vm = self._vms.pop(path, None)
        if vm is not None:
            await vm.monitor.close()

    async def _clear_up(self) -> None:
        """Views that an agent before this one left in guests, and what it had staged."""
        for path, view in list(remembered(self._scratch)):
            try:
                vm = await self._vm(path)
                await clear(vm, view)
                await remove(vm.monitor, view)
                log.warning("took away what an agent before this one left", monitor=str(path), disk=view.disk.device)
            except NotFoundError:
                forget(view)
        for place in self._scratch.glob("*@*"):
            await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)


async def stage_all(vm: Vm, parts: Sequence[Part], place: Path) -> None:
    """Every disk as PLACE/DISK.qcow2. No view is left, also of disks whose turn did not come after an error."""
    async with AsyncExitStack() as left:
        for part in parts:
            left.push_async_callback(remove, vm.monitor, part.view)
        place.mkdir(parents=True, exist_ok=True)
        for part in parts:
            pass_point("before-stage")
            staged = await stage(vm, part.view, part.rotation.changed, STAGE_S)
            staged.image.replace(place / f"{part.view.disk.device}.qcow2")
            await remove(vm.monitor, part.view)  # the guest is rid of the filter as soon as may be
