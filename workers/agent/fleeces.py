"""The fleeces of a host's guests, from the cut until nobody needs them, or until one can be held no longer.

::

    open ── export, reader ──> read ──┬── its epoch is over ───────────────────────────────────────> gone
                                      └── held for too long, no room, reader or guest dead ──> withdrawn ──> gone

One that is withdrawn is gone from the guest at once. In its reader's place there is one that answers every request with
the reason, so that copies end with that, and with them the round.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import structlog

from coordinator.ledger.barrier import Barrier
from coordinator.model.epoch import DiskCopy, Epoch
from coordinator.model.errors import FlushpointError, NotFoundError, UnavailableError
from workers.agent.cut import Part, Vm
from workers.agent.fleece import Fleece, end, export, export_of
from workers.agent.fleece import forget as forget_fleece
from workers.agent.guests import Guests
from workers.agent.monitor import GuestSilentError
from workers.agent.participant import fail
from workers.agent.reader import ReadDisk, Reading
from workers.agent.readers import Reader, Readers
from workers.agent.room import Room
from workers.agent.stage import forget
from workers.agent.views import View, remove

LOOK_S = 0.5
"""How often it is looked whether a guest is still there."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Open:
    epoch: Epoch
    vm: str
    fleece: Fleece
    views: tuple[View, ...]
    reader: Reader
    reading: ExitStack
    """Of what guests are not cleared meanwhile."""
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Fleeces:
    """Of one agent; in its event loop."""

    def __init__(self, barrier: Barrier, room: Room, readers: Readers, guests: Guests) -> None:
        self._barrier = barrier
        self._room = room
        self._readers = readers
        self._guests = guests
        self._uncleared: list[tuple[Fleece, tuple[View, ...]]] = []
        self._open: defaultdict[str, list[tuple[_Open, asyncio.Task[None]]]] = defaultdict(list)
        """By the names of epochs."""
        self._refused: defaultdict[str, list[Reader]] = defaultdict(list)
        """Those of epochs that an agent before this one took part in."""

    @property
    def epochs(self) -> set[str]:
        return {*self._open, *self._refused}

    async def open(self, epoch: Epoch, vm: str, monitored: Vm, fleece: Fleece, parts: Sequence[Part]) -> list[DiskCopy]:
        """Where these disks can be read from now on. After an error nothing is left in the guest. FlushpointError."""
        views = tuple(part.view for part in parts)
        with ExitStack() as reading:
            reading.enter_context(self._guests.reading(fleece, views))
            try:
                disks = []
                for part in parts:
                    await export(monitored.monitor, fleece, part.view, part.rotation.changed)
                    size, device = part.view.disk.size, part.view.disk.device
                    name = f"{epoch.name}/{vm}/{device}"
                    disks.append(ReadDisk(name=name, size=size, export=export_of(fleece, part.view)))
                reader = await self._readers.start(fleece, disks)
            except BaseException:
                await self._clear(fleece, views)
                raise
            one = _Open(epoch, vm, fleece, views, reader, reading.pop_all())
        self._open[epoch.name].append((one, asyncio.create_task(self._hold(one))))
        return [
            DiskCopy(
                disk=part.view.disk.device,
                path=reader.path_of(disk.name),
                uri=reader.uri_of(disk.name),
                size=disk.size,
                since=part.rotation.since,
                reason=part.rotation.reason,
            )
            for part, disk in zip(parts, disks, strict=True)
        ]

    async def end(self, epoch: str) -> None:
        """Nobody needs them any more. Any number of times, by several at once; they are gone when it returns."""
        while held := self._open.get(epoch):
            for one, _ in held:
                one.over.set()
            await asyncio.wait([task for _, task in held])
            self._open[epoch] = [(one, task) for one, task in self._open[epoch] if not task.done()]
        self._open.pop(epoch, None)
        for reader in self._refused.pop(epoch, []):
            await _dismiss(reader)

    async def end_all_of(self, group: str) -> None:
        """Before its next epoch: the news that it is over may be at work yet, or lost."""
        for epoch in self.epochs:
            if epoch.rpartition("@")[0] == group:
                await self.end(epoch)

    async def close(self) -> None:
        """None is left."""
        for epoch in self.epochs:
            await self.end(epoch)

    def clear(self) -> None:
        """What readers have left that ended with an agent before this one."""
        for path in self._readers.scratch.glob("*.reader"):
            path.unlink()

    async def clear_again(self) -> None:
        """What could not be taken away before."""
        uncleared, self._uncleared = self._uncleared, []
        for fleece, views in uncleared:
            await self._clear(fleece, views)

    async def refuse(self, epoch: Epoch, vm: str, why: str) -> None:
        """What that agent has offered to be read is not there: whoever reads it hears why."""
        copies = [copy for copy in epoch.reads[vm].copies if copy.disk in epoch.fleeced(vm)]
        reader = await self._refusing(self._readers.told_of(copies), why)
        if reader is not None:
            self._refused[epoch.name].append(reader)

    # -- one of them ---------------------------------------------------------------------------------------

    async def _hold(self, one: _Open) -> None:
        with one.reading:
            await self._held(one)

    async def _held(self, one: _Open) -> None:
        try:
            why = await self._why_it_ends(one)
        except Exception as error:  # a mistake of ours must not hold a view for ever
            log.exception("cannot look after what is read", epoch=one.epoch.name, vm=one.vm)
            why = f"its agent failed: {error!r}"
        await one.reader.kill()  # first: what a frozen one has not read would keep its guest from hearing anything
        if not why:
            await self._clear(one.fleece, one.views)
            one.reader.reading.path.unlink(missing_ok=True)
            return
        log.warning("a guest is not read any more", epoch=one.epoch.name, vm=one.vm, why=why)
        refused, _, _ = await asyncio.gather(
            self._refusing(one.reader.reading, why), self._clear(one.fleece, one.views), self._tell(one, why)
        )
        await one.over.wait()
        if refused is not None:
            await _dismiss(refused)

    async def _why_it_ends(self, one: _Open) -> str:
        """Waits until it does; "": its epoch is over."""
        hold_s = one.epoch.spec.hold_ms / 1000
        ends = [self._over(one), one.reader.ended(), self._no_room(one.views), self._guest_gone(one.fleece)]
        why = await _first(ends, hold_s)
        return f"views may be held for {hold_s:g} s, and those of {one.vm} were" if why is None else why

    async def _over(self, one: _Open) -> str:
        await one.over.wait()
        return ""

    async def _no_room(self, views: Sequence[View]) -> str:
        try:
            await self._room.watch([view.scratch for view in views])
        except UnavailableError as error:
            return error.message
        raise AssertionError("it watches for ever")

    async def _guest_gone(self, fleece: Fleece) -> str:
        try:
            while (await self._guests.connected(fleece.monitor)).monitor.process() == fleece.process:
                await asyncio.sleep(LOOK_S)
        except FlushpointError as error:
            return error.message
        return "its guest was started again"

    async def _refusing(self, reading: Reading, why: str) -> Reader | None:
        """None if there can be none: then who reads hears no reason."""
        try:
            return await self._readers.refuse(reading, why)
        except FlushpointError as error:
            log.warning("cannot tell who reads a view that it is gone", path=str(reading.path), error=str(error))
            return None

    async def _tell(self, one: _Open, why: str) -> None:
        """Ends the epoch, unless all can be read: then copies that fail do."""
        with suppress(FlushpointError):
            await fail(one.epoch, one.vm, self._barrier, why)

    async def _clear(self, fleece: Fleece, views: tuple[View, ...]) -> None:
        """Nothing of it is left in the guest; or it is tried again later, and by an agent that starts."""
        vm: Vm | None = None
        try:
            vm = await self._guests.connected(fleece.monitor)
            await end(vm.monitor, fleece)
            for view in views:
                await remove(vm.monitor, view)
        except NotFoundError:
            forget_fleece(fleece)
            for view in views:
                forget(view)
        except FlushpointError as error:
            log.warning("something is left in a guest", monitor=str(fleece.monitor), error=str(error))
            self._uncleared.append((fleece, views))
            if vm is not None and isinstance(error, GuestSilentError):
                await self._guests.let_go(vm)


async def _first(ends: Sequence[Coroutine[None, None, str]], timeout_s: float) -> str | None:
    """What the first of them returns; None when time is up. The others are given up."""
    tasks = [asyncio.create_task(end) for end in ends]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return next((task.result() for task in tasks if task in done), None)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _dismiss(reader: Reader) -> None:
    await reader.kill()
    reader.reading.path.unlink(missing_ok=True)
