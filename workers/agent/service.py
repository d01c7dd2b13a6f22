"""The agent of a host: hears of epochs, drives the host's machines through them, and keeps what was staged.

::

    news ──> take_part (every machine of ours) ──┬> stage (a disk) ──> SCRATCH/GROUP@EPOCH/VM/DISK.qcow2 ─┬> readable
                                                 └> fleece, its reader ───────────────────────────────────┘
    news: retired or aborted ──> images, fleeces and readers go, and bitmaps that the point covers
    now and then, and when the ledger was away ──> images of epochs that are over go, if that was never heard

An agent that starts first lets run what one before it left stopped, then takes away what that one left in guests, then
gives up the epochs that one took part in, but for those whose disks it had staged: movers read them without an agent.
Everything it needs for that is on the host's own disk.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

import structlog

from coordinator.ledger.barrier import Barrier, News
from coordinator.model.bitmap import Owner, Tracking, all_of, leftovers
from coordinator.model.epoch import OVER, DiskCopy, Epoch, Participant, Phase, ReadFacts, ViewKind
from coordinator.model.errors import FlushpointError, NotFoundError, UnavailableError
from workers.access import Access
from workers.agent.cut import Part, Vm, let_run
from workers.agent.feed import AGAIN_S, Feed
from workers.agent.files import thaw_left
from workers.agent.fleeces import Fleeces
from workers.agent.guard import GuardLink
from workers.agent.guest import look_at
from workers.agent.guests import Guests
from workers.agent.journal import Journal
from workers.agent.monitor import GuestSilentError
from workers.agent.muster import Muster
from workers.agent.participant import AGAIN, AbortedError, Machine, Taken, fail, recover, why_of
from workers.agent.pivot import PivotingMachine
from workers.agent.probe import Probe
from workers.agent.readers import Readers
from workers.agent.relay import Relay
from workers.agent.room import Room
from workers.agent.sockets import Sockets
from workers.agent.stage import stage
from workers.agent.standin import StandIns
from workers.agent.views import remove
from workers.failpoint import pass_point

STAGE_S = 3600.0
"""How long one disk may take to be staged; the coordinator gives a longer epoch up."""
LOOK_S = 300.0
"""How often to look for what was staged for epochs whose end was not heard: the news of it is lost."""

log = structlog.get_logger()


class Agent:
    """Runs in one event loop until it is cancelled."""

    def __init__(
        self,
        host: str,
        barrier: Barrier,
        guard: GuardLink,
        journal: Journal,
        room: Room,
        sockets: Sockets,
        access: Access,
        readers: Readers,
        relay: Relay | None = None,
    ) -> None:
        """`access` tells where guests may be moved to. Without a `relay` movers have to read the scratch directory
        themselves."""
        self._host = host
        self._barrier = barrier
        self._guard = guard
        self._journal = journal
        self._room = room
        self._scratch = room.directory
        self._sockets = sockets
        self._access = access
        self._relay = relay
        self._standins = StandIns(room.directory, access, guard, journal)
        self._guests = Guests(guard, journal, room.directory)
        self._fleeces = Fleeces(barrier, room, readers, self._guests)
        self._probe = Probe()
        self._feed = Feed(barrier, host)
        self._at_work: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._staging: dict[tuple[str, int], list[asyncio.Task[tuple[DiskCopy, ...]]]] = {}

    async def run(self, ready: Callable[[], None]) -> None:
        """`ready` is called when what was left behind is cleared up."""
        for sentence in [*await let_run(self._journal), *await thaw_left(self._journal, self._guard)]:
            log.warning(sentence)
        await asyncio.to_thread(self._standins.clear)
        await asyncio.to_thread(self._fleeces.clear)
        await self._guests.clear()
        if self._relay is not None:
            await self._relay.start()
        position = await self._barrier.last_news(self._host)
        places = self._places()
        staged = set()
        for epoch in await self._barrier.epochs_on(self._host):
            recovered = [await recover(epoch, mine.vm, self._barrier) for mine in epoch.on(self._host)]
            if all(recovered):
                staged.add(epoch.name)
                for mine in epoch.on(self._host):
                    await self._offer_again(epoch, mine.vm)
        await self._clear_places(places - staged)
        ready()
        looking = asyncio.create_task(self._look_after_places())
        try:
            await self._feed.listen(position, self._told)
        finally:
            tasks = [looking, *self._at_work.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._fleeces.close()
            await self._guests.close()
            if self._relay is not None:
                await self._relay.close()

    def _told(self, news: News) -> None:
        name = (news.group, news.number)
        if news.standing.phase is Phase.PREPARING and name not in self._at_work:
            task = asyncio.create_task(self._take_part(*name))
            self._at_work[name] = task
            task.add_done_callback(lambda _: self._at_work.pop(name, None))
        elif news.standing.phase in OVER:
            for staging in self._staging.pop(name, ()):
                _cancel(staging)  # nobody will read it, and the guest pays for its view
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
        await self._fleeces.end_all_of(group)
        ours = epoch.on(self._host)
        muster = Muster(participant.vm for participant in ours)
        await asyncio.gather(*(self._drive(epoch, participant, muster) for participant in ours))

    async def _drive(self, epoch: Epoch, participant: Participant, muster: Muster) -> None:
        said, off = log.bind(epoch=epoch.name, vm=participant.vm), AsyncExitStack()
        try:
            self._room.refuse_unless_enough()
            vm = await self._guest(epoch, participant, off)
            machine: Machine | PivotingMachine
            if epoch.spec.pivots:
                machine = PivotingMachine(participant.vm, vm, self._room, self._access, muster)
            else:
                machine = Machine(participant.vm, vm, self._room, self._sockets, muster, self._probe)
        except Exception as error:  # a mistake of ours must not let others wait either
            said.warning("cannot take part", error=str(error), exc_info=not isinstance(error, FlushpointError))
            muster.leave(participant.vm)
            await off.aclose()
            await self._fail(epoch, participant.vm, error)
            return
        try:
            async with off:
                taken = await machine.take_part(epoch, self._barrier, self._feed)
                said.info("moved" if epoch.spec.pivots else "cut", freeze_ms=round(taken.facts.freeze_ms, 1))
                if taken.facts.fallback:
                    said.warning("crash-consistent only", why=taken.facts.fallback)
                for view in taken.facts.views:
                    if view.why:
                        said.info("a disk is staged", disk=view.disk, why=view.why)
                copies = await self._copies(epoch, participant, vm, taken)
            await self._make_readable(epoch, participant, taken, copies)
            said.info("readable")
        except AbortedError as error:
            said.info(error.message)
        except FlushpointError as error:
            said.warning("nothing comes of this machine's part", error=str(error))
            if isinstance(error, GuestSilentError):
                await self._guests.let_go(vm)
            await self._fail(epoch, participant.vm, error)
        except Exception as error:  # a mistake of ours must not let others wait either
            said.exception("nothing comes of this machine's part")
            await self._fail(epoch, participant.vm, error)

    async def _fail(self, epoch: Epoch, vm: str, error: Exception) -> None:
        """The ledger hears of it, however long it is away: nobody is to wait until the views' time is over."""
        ends_at = time.monotonic() + epoch.spec.hold_ms / 1000
        while time.monotonic() < ends_at:
            try:
                await fail(epoch, vm, self._barrier, why_of(error))
            except UnavailableError:
                await asyncio.sleep(AGAIN_S)
            except FlushpointError:  # it is over, or lost
                return
            else:
                return

    async def _make_readable(
        self, epoch: Epoch, participant: Participant, taken: Taken, copies: tuple[DiskCopy, ...]
    ) -> None:
        """Whatever fails here ends the epoch; a ledger that is away is waited for."""
        pass_point("between-stage-and-readable")
        give_up_at = time.monotonic() + STAGE_S
        standing = taken.standing
        while standing.phase in (Phase.CUTTING, Phase.TAKEN):
            try:
                # What was written is little, and another machine may still be cut.
                standing = await self._feed.until(epoch, standing, lambda s: s.phase is not Phase.CUTTING)
                if standing.phase is Phase.TAKEN:
                    standing = await self._barrier.readable(epoch, participant.vm, ReadFacts(copies=copies))
                    if standing.phase is not Phase.ABORTED:
                        return
            except UnavailableError:
                if time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(AGAIN_S)
        raise AbortedError(f"epoch {epoch.name} was aborted: {standing.why}")

    async def _copies(self, epoch: Epoch, participant: Participant, vm: Vm, taken: Taken) -> tuple[DiskCopy, ...]:
        """AbortedError if the epoch is, meanwhile. After an error no view is left."""
        staged = [part for part in taken.parts if part.kind is ViewKind.STAGE]
        if taken.fleece is None:
            return await self._staged(epoch, participant, vm, staged)
        read = [part for part in taken.parts if part.kind is ViewKind.FLEECE]
        try:
            there = await self._fleeces.open(epoch, participant.vm, vm, taken.fleece, read)
        except BaseException:
            for part in staged:
                with suppress(FlushpointError):  # the guest is gone, or an agent that starts finds what is left
                    await remove(vm.monitor, part.view)
            raise
        try:
            return (*there, *await self._staged(epoch, participant, vm, staged))
        except BaseException:
            await self._fleeces.end(epoch.name)
            raise

    async def _staged(
        self, epoch: Epoch, participant: Participant, vm: Vm, parts: Sequence[Part]
    ) -> tuple[DiskCopy, ...]:
        place = self._place(epoch.group, epoch.number) / participant.vm
        sharers = sum(len(one.disks) for one in epoch.on(self._host))
        slice_bytes = partial(self._room.slice, epoch.spec.slice_bytes, sharers)
        staging = asyncio.create_task(stage_all(vm, parts, place, slice_bytes))
        self._staging.setdefault((epoch.group, epoch.number), []).append(staging)
        watching = asyncio.create_task(self._room.watch([part.view.scratch for part in parts]))
        try:
            await asyncio.wait({staging, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not staging.done():
                await watching
            return tuple([await self._offered(epoch, participant.vm, copy) for copy in await staging])
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise AbortedError(f"epoch {epoch.name} was aborted while it was staged") from None
        finally:
            _cancel(staging)
            watching.cancel()
            await asyncio.gather(staging, watching, return_exceptions=True)

    async def _offered(self, epoch: Epoch, vm: str, copy: DiskCopy) -> DiskCopy:
        """Where movers elsewhere can read it, too."""
        if self._relay is None:
            return copy
        uri = await self._relay.offer(f"{epoch.name}/{vm}/{copy.disk}", Path(copy.path))
        return copy.model_copy(update={"uri": uri})

    async def _offer_again(self, epoch: Epoch, vm: str) -> None:
        """What an agent before this one has offered, as far as it is still there."""
        fleeced = epoch.fleeced(vm)
        for copy in epoch.reads[vm].copies:
            if copy.disk not in fleeced:
                await self._offered(epoch, vm, copy)
        if fleeced:
            await self._fleeces.refuse(epoch, vm, AGAIN)

    async def _tidy(self, group: str, number: int, phase: Phase, after: asyncio.Task[None] | None) -> None:
        """Once it is over, and this host has ended its part."""
        if after is not None:
            await asyncio.wait([after])
        await self._fleeces.end(self._place(group, number).name)
        if phase is Phase.RETIRED:
            with suppress(FlushpointError):  # what is left does no harm; of members it goes with the next point
                await self._remove_bitmaps(await self._barrier.epoch(group, number))
        await self._clear_places({self._place(group, number).name})

    async def _remove_bitmaps(self, point: Epoch) -> None:
        """Those that nobody needs beside the ones that record since this point."""
        for one in point.on(self._host):
            if one.qmp:
                with suppress(NotFoundError):  # it is off by now, and they go with its next point, as of bare disks
                    vm = await self._guests.connected(self._sockets.checked(one.qmp))
                    await self._remove(vm, point, one, lambda tracking, owner: leftovers(tracking, owner, point.number))
        for one in point.spec.leaving:
            if one.host == self._host:
                with suppress(FlushpointError):  # a machine that is gone keeps no other from being tidied
                    async with AsyncExitStack() as off:
                        await self._remove(await self._guest(point, one, off), point, one, all_of)

    async def _remove(
        self,
        vm: Vm,
        point: Epoch,
        participant: Participant,
        which: Callable[[Sequence[Tracking], Owner], Sequence[str]],
    ) -> None:
        async with vm.turn:  # the next epoch may just have looked at them
            guest = await look_at(vm.monitor)
            for device in participant.disks:
                disk = guest.disk(device)
                owner = Owner(point.spec.repository, point.group, f"{participant.vm}/{device}")
                for name in which(disk.tracking(), owner):
                    await vm.monitor.execute("block-dirty-bitmap-remove", {"node": disk.node, "name": name})

    # -- what was staged -----------------------------------------------------------------------------------

    def _place(self, group: str, number: int) -> Path:
        return self._scratch / f"{group}@{number}"

    def _places(self) -> set[str]:
        """Names of the epochs that have one."""
        return {place.name for place in self._scratch.glob("*@*")}

    async def _clear_places(self, names: set[str]) -> None:
        """Of epochs that are over, or that the ledger does not know: nobody reads them."""
        for name in names:
            await self._fleeces.end(name)
            if self._relay is not None:
                await self._relay.withdraw(f"{name}/")
            await asyncio.to_thread(shutil.rmtree, self._scratch / name, ignore_errors=True)

    async def _look_after_places(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._feed.missed.wait(), LOOK_S)
            self._feed.missed.clear()
            try:
                await self._clear_unheard()
                await self._fleeces.clear_again()
                await self._guests.clear()
            except FlushpointError as error:
                log.warning("cannot look which epochs are over", error=str(error))
            except Exception:  # whatever it is, it is tried again
                log.exception("cannot clear up")

    async def _clear_unheard(self) -> None:
        """What is there before the ledger is asked belongs to epochs that were opened before: those it does not name
        are over, or lost with all that could read them. What is at work has its own end."""
        places = self._places() | self._fleeces.epochs
        needed = {epoch.name for epoch in await self._barrier.epochs_on(self._host)}
        at_work = {self._place(group, abs(number)).name for group, number in self._at_work}
        unheard = places - needed - at_work
        if unheard:
            log.warning("clears up after epochs whose end was not heard", epochs=sorted(unheard))
        await self._clear_places(unheard)

    # -- guests --------------------------------------------------------------------------------------------

    async def _guest(self, epoch: Epoch, participant: Participant, off: AsyncExitStack) -> Vm:
        """The machine itself or, if it is off and its images are named, a stand-in until `off` is closed; what was not
        removed from these while nobody had them is gone then. NotFoundError for one that is off and is to move to its
        targets: nobody would go on there."""
        if participant.qmp:
            try:
                return await self._guests.connected(self._sockets.checked(participant.qmp))
            except NotFoundError:
                if not participant.images or epoch.spec.pivots:
                    raise
        vm = await off.enter_async_context(self._standins.open(participant))
        points = epoch.spec.parents
        await self._remove(
            vm, epoch, participant, lambda all_, owner: leftovers(all_, owner, points.get(owner.disk, 0))
        )
        return vm


def _cancel(task: asyncio.Task[tuple[DiskCopy, ...]]) -> None:
    """Once: cancelled again while it takes away what it has made, it would leave that in the guest."""
    if not task.cancelling():
        task.cancel()


async def stage_all(vm: Vm, parts: Sequence[Part], place: Path, slice_bytes: Callable[[], int]) -> tuple[DiskCopy, ...]:
    """Every disk as PLACE/DISK.qcow2, durable: what was written, and of what its point does not have yet as much as
    `slice_bytes` says. No view is left, whatever fails and whose turn had not come."""
    copies = []
    async with AsyncExitStack() as left:
        for part in parts:
            left.push_async_callback(remove, vm.monitor, part.view)
        for part in parts:
            pass_point("before-stage")
            disk, rotation = part.view.disk, part.rotation
            staged = await stage(vm, part, slice_bytes, STAGE_S)
            await remove(vm.monitor, part.view)  # the guest is rid of the filter as soon as may be
            path = place / f"{disk.device}.qcow2"
            await asyncio.to_thread(_put, staged.image, path)
            copies.append(
                DiskCopy(
                    disk=disk.device,
                    path=str(path),
                    size=staged.size,
                    since=rotation.since,
                    reason=rotation.reason,
                    seeded=staged.held if staged.held < staged.size else 0,
                )
            )
    return tuple(copies)


def _put(image: Path, path: Path) -> None:
    """Durable: a host that crashes and comes back has the image as movers were told that it is, or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(image, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        image.replace(path)
    except OSError as error:
        image.unlink(missing_ok=True)
        raise UnavailableError(
            f"the staged image {path} cannot be written: {error.strerror}", "look at the scratch directory's disk"
        ) from error
