"""A host's guests, each under one connection to its monitor, for all that takes part in anything there.

It is made when it is needed, and anew once a guest was started again or did not answer. Whoever connects anew sees to
it that the guest runs, if it was stopped and nobody has heard it say so since; then takes away what is left in it of
views: none of them is an epoch's, but for those that are read.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from coordinator.model.errors import FlushpointError, NotFoundError
from workers.agent import fleece as fleeces
from workers.agent.cut import Vm, resume
from workers.agent.feed import AGAIN_S
from workers.agent.fleece import Fleece
from workers.agent.guard import GuardLink
from workers.agent.journal import Journal
from workers.agent.monitor import GuestRefusedError, Monitor
from workers.agent.moves import close_targets, end_jobs
from workers.agent.stage import clear, forget
from workers.agent.views import View, remembered, remove

log = structlog.get_logger()


class Guests:
    """In one event loop. `scratch` has the records of what was done to guests."""

    def __init__(self, guard: GuardLink, journal: Journal, scratch: Path) -> None:
        self._guard = guard
        self._journal = journal
        self._scratch = scratch
        self._vms: dict[Path, Vm] = {}
        self._connecting: defaultdict[Path, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._resuming: set[asyncio.Task[None]] = set()
        self._read: list[tuple[Fleece, tuple[str, ...]]] = []
        """With the marks of its views."""

    async def connected(self, path: Path) -> Vm:
        """Never by two epochs at once: a monitor does not greet a second client. NotFoundError for a guest that has
        ended; RefusedError, UnavailableError."""
        async with self._connecting[path]:
            if path in self._vms and not self._vms[path].monitor.is_open:
                await self._vms.pop(path).close()
            if path not in self._vms:
                self._vms[path] = await self._connected(path)
            return self._vms[path]

    async def _connected(self, path: Path) -> Vm:
        guard = await asyncio.to_thread(self._guard.another)
        try:
            vm = Vm(await Monitor.connect(path), guard, self._journal)
        except BaseException:
            guard.close()
            raise
        try:
            await self._see_to(vm)
            await self._clear(vm)
        except BaseException:
            await vm.close()
            raise
        return vm

    async def _see_to(self, vm: Vm) -> None:
        """First of all: its guard may have ended before it listened."""
        path = vm.monitor.path
        if self._journal.has(path):
            if self._journal.is_of(path, vm.monitor.process()):
                log.warning("lets a guest run that has not said that it does", monitor=str(path))
                with suppress(GuestRefusedError):  # it is shut down, say, and there is nothing to let run
                    await resume(vm.monitor)
            await asyncio.to_thread(self._journal.erase, path)

    async def let_go(self, vm: Vm) -> None:
        """Of a monitor that broke or is silent; who needs it next connects anew, if nobody has by now."""
        path = vm.monitor.path
        async with self._connecting[path]:
            if self._vms.get(path) is vm:
                await self._vms.pop(path).close()
        task = asyncio.create_task(self._see_it_run(path))
        self._resuming.add(task)
        task.add_done_callback(self._resuming.discard)

    async def _see_it_run(self, path: Path) -> None:
        """The guard lets it run, but may end before the guest listens."""
        while self._journal.has(path):
            try:
                await self.connected(path)
            except NotFoundError:
                await asyncio.to_thread(self._journal.erase, path)
            except FlushpointError:
                await asyncio.sleep(AGAIN_S)
            else:
                return  # an entry that is there now is that of the next stop

    async def close(self) -> None:
        for task in self._resuming:
            task.cancel()
        await asyncio.gather(*self._resuming, return_exceptions=True)
        for vm in self._vms.values():
            await vm.close()

    # -- what was left in them -----------------------------------------------------------------------------

    @contextmanager
    def reading(self, fleece: Fleece, views: tuple[View, ...]) -> Iterator[None]:
        """Until the block ends nobody takes these away but who reads them."""
        entry = (fleece, tuple(view.mark for view in views))
        self._read.append(entry)
        try:
            yield
        finally:
            self._read.remove(entry)

    async def clear(self) -> None:
        """Of what an agent before this one has left, or a guest that has ended since."""
        monitors = {path for path, _ in remembered(self._scratch)}
        monitors |= {fleece.monitor for fleece in fleeces.remembered(self._scratch)}
        for path in monitors:
            try:
                await self.connected(path)  # which clears it, if it is connected to anew
            except NotFoundError:
                for fleece in self._left(path):
                    fleeces.forget(fleece)
                for view in [view for at, view in remembered(self._scratch) if at == path]:
                    forget(view)
            except FlushpointError as error:  # other guests' epochs are not to wait for this one
                log.warning("cannot take views away", monitor=str(path), error=str(error))

    async def _clear(self, vm: Vm) -> None:
        path = vm.monitor.path
        for fleece in self._left(path):
            try:
                await fleeces.end(vm.monitor, fleece)
                log.warning("took away what was left to be read", monitor=str(path))
            except FlushpointError as error:  # nor can its view be, which is told
                log.warning("cannot end what is read", monitor=str(path), error=str(error))
        read = {mark for _, marks in self._read for mark in marks}
        for view in [view for at, view in remembered(self._scratch) if at == path and view.mark not in read]:
            try:
                await end_jobs(vm.monitor, view.mark)
                await clear(vm, view)
                await remove(vm.monitor, view)
                await close_targets(vm.monitor)
                log.warning("took away a view that was left", monitor=str(path), disk=view.disk.device)
            except FlushpointError as error:  # what it hinders, the guest refuses
                log.warning("cannot take a view away", monitor=str(path), error=str(error))

    def _left(self, monitor: Path) -> list[Fleece]:
        read = [fleece for fleece, _ in self._read]
        known = fleeces.remembered(self._scratch)
        return [fleece for fleece in known if fleece.monitor == monitor and fleece not in read]
