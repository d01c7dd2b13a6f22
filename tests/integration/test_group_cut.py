"""Two guests that write in causal order are cut together: no effect is on a disk without its cause."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, closing, suppress
from pathlib import Path

import pytest

from coordinator.ledger import RedisLedger, open_barrier
from coordinator.model.epoch import Epoch, EpochSpec, GoKey, Participant, Phase
from coordinator.model.errors import RefusedError, UnavailableError
from tests.contract.conftest import running_valkey
from tests.guards import serving_guard
from tests.guest import GuestKit
from tests.live_guest import LiveDisk, LiveGuest, first_number, running_pair
from workers.agent.cut import Frozen, Vm
from workers.agent.feed import Feed
from workers.agent.guard import GuardLink
from workers.agent.guest import OURS, look_at
from workers.agent.journal import Journal
from workers.agent.monitor import Monitor
from workers.agent.muster import Muster
from workers.agent.participant import AbortedError, Machine, Taken
from workers.agent.room import Room
from workers.agent.sockets import Sockets
from workers.agent.stage import stage
from workers.agent.views import remove

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc")

EPOCHS = 24
HOUR_MS = 3_600_000
DEADLINE_MS = 10_000
"""Long enough for a busy machine."""
STAGE_S = 60.0
HOST = "here"
_numbers = itertools.count(1)
"""For the names of groups: the guests keep the bitmaps of those before."""


@pytest.fixture(scope="module")
def pair(guest_kit: GuestKit, module_tmpfs_path: Path) -> Iterator[tuple[LiveGuest, LiveGuest]]:
    with running_pair(guest_kit, module_tmpfs_path / "pair", LiveDisk("a"), LiveDisk("b", iothread=True)) as guests:
        yield guests


class Group:
    """The two guests under one guard, and a ledger of their own in which the coordinator's part is done by the test."""

    def __init__(self, guests: Sequence[LiveGuest], directory: Path) -> None:
        self._guests = guests
        self._directory = directory
        self._name = f"group{next(_numbers)}"
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Group:
        self._open.enter_context(serving_guard(self._directory / "guard"))
        url = self._open.enter_context(running_valkey()).url
        self._ledger = self._open.enter_context(closing(RedisLedger(url)))
        term = self._ledger.lead("leader", HOUR_MS)
        assert term is not None
        self._ledger.adopt_run(term, 0)
        self._term = term
        self._barrier = await self._open.enter_async_context(aclosing(open_barrier(url)))
        self._feed = Feed(self._barrier, HOST)
        listening = asyncio.create_task(self._feed.listen(await self._barrier.last_news(HOST), lambda news: None))
        self._open.push_async_callback(_ended, listening)
        self._vms = {guest.directory.name: await self._vm(guest) for guest in self._guests}
        self.machines = self._musters()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    def _musters(self) -> list[Machine]:
        """For one epoch."""
        room, muster = Room(self._directory, 0), Muster(self._vms)
        return [Machine(name, vm, room, Sockets(()), muster) for name, vm in self._vms.items()]

    async def _vm(self, guest: LiveGuest) -> Vm:
        monitor = await Monitor.connect(guest.monitor)
        self._open.push_async_callback(monitor.close)
        link = GuardLink(self._directory / "guard")
        self._open.callback(link.close)
        return Vm(monitor, link, Journal(self._directory / "journal"))

    def opened(self, *, freeze_ms: int = DEADLINE_MS, parent: int = 0) -> Epoch:
        parts = [
            Participant(vm=guest.directory.name, host=HOST, disks=tuple(disk.name for disk in guest.disks))
            for guest in self._guests
        ]
        times = {"prepare_ms": DEADLINE_MS, "freeze_ms": freeze_ms, "hold_ms": HOUR_MS}
        disks = [f"{part.vm}/{disk}" for part in parts for disk in part.disks]
        parents = dict.fromkeys(disks, parent) if parent else {}
        spec = EpochSpec(participants=tuple(parts), repository="0a1b", parents=parents, **times)
        return self._ledger.open_epoch(self._term, self._name, spec)

    def standing(self) -> Epoch:
        epoch = self._ledger.newest_epoch(self._name)
        assert epoch is not None
        return epoch

    async def taken(self, epoch: Epoch) -> list[Taken | BaseException]:
        """What each machine made of the epoch."""
        self.machines = self._musters()
        parts = [machine.take_part(epoch, self._barrier, self._feed) for machine in self.machines]
        return await asyncio.gather(*parts, return_exceptions=True)

    async def numbers(self) -> list[int]:
        """The number each guest had written last, by what its disk held at the cut of an epoch."""
        epoch = self.opened()
        found = []
        for machine, taken in zip(self.machines, await self.taken(epoch), strict=True):
            assert isinstance(taken, Taken), taken
            found.append(await number_in(machine, taken))
        assert self.standing().phase is Phase.TAKEN
        self._ledger.give_up_epoch(self._term, self._name, epoch.number, "the test has read what it wanted")
        return found


async def number_in(machine: Machine, taken: Taken) -> int:
    (part,) = taken.parts
    staged = await stage(machine.vm, part, lambda: part.view.disk.size, STAGE_S)
    await remove(machine.vm.monitor, part.view)
    number = first_number(staged.image)
    staged.image.unlink()
    return number


Together = Callable[[], Awaitable[object]]


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def test_no_effect_is_on_a_disk_without_its_cause(pair: tuple[LiveGuest, LiveGuest], tmpfs_path: Path) -> None:
    async def check() -> None:
        async with Group(pair, tmpfs_path) as group:
            last = 0
            for number in range(1, EPOCHS + 1):
                lead, follow = await group.numbers()
                assert follow <= lead <= follow + 1, number
                assert lead > last, "the guests write between two cuts, or this proves nothing"
                last = lead

    asyncio.run(check())


def test_guests_that_are_cut_apart_are_caught(pair: tuple[LiveGuest, LiveGuest], tmpfs_path: Path) -> None:
    """So that the test above is known to see. Each is a group of its own here."""

    async def check() -> None:
        found = []
        for guest in pair:
            directory = tmpfs_path / f"{guest.directory.name}-group"
            directory.mkdir()
            async with Group((guest,), directory) as group:
                found += await group.numbers()
        lead, follow = found
        assert not follow <= lead <= follow + 1

    asyncio.run(check())


def test_an_epoch_that_one_machine_cannot_freeze_for_is_aborted_for_all(
    pair: tuple[LiveGuest, LiveGuest], tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others run again as soon as they hear of it; the next epoch is taken."""

    async def check() -> None:
        async with Group(pair, tmpfs_path) as group:
            lead, follow = group.machines

            async def cannot(deadline_s: float, together: Together) -> Frozen:
                raise UnavailableError("its disk hangs")

            with monkeypatch.context() as patched:
                patched.setattr(follow.vm, "freeze", cannot)
                first, second = await group.taken(group.opened())
            assert isinstance(first, AbortedError)
            assert "follow: its disk hangs" in first.message
            assert isinstance(second, UnavailableError)
            assert group.standing().key is GoKey.ABORT
            for guest, machine in zip(pair, (lead, follow), strict=True):
                guest.wait_until_it_writes()
                nodes = await machine.vm.monitor.execute("query-named-block-nodes", {"flat": True})
                assert [node for node in nodes if node["node-name"].startswith(OURS)] == []
            await group.numbers()

    asyncio.run(check())


def test_a_machine_that_is_not_frozen_in_time_aborts_the_epoch_and_nobody_stands_still(
    pair: tuple[LiveGuest, LiveGuest], tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with Group(pair, tmpfs_path) as group:
            _, follow = group.machines
            freeze = follow.vm.freeze

            async def late(deadline_s: float, together: Together) -> Frozen:
                await asyncio.sleep(2 * deadline_s)
                return await freeze(deadline_s, together)

            with monkeypatch.context() as patched:
                patched.setattr(follow.vm, "freeze", late)
                outcomes = await group.taken(group.opened(freeze_ms=500))
            assert [type(outcome) for outcome in outcomes] == [AbortedError, AbortedError]
            assert group.standing().why == "not frozen in time: follow"
            for guest in pair:
                guest.wait_until_it_writes()
            await group.numbers()

    asyncio.run(check())


def test_a_bitmap_that_somebody_disables_before_the_cut_is_not_believed(
    pair: tuple[LiveGuest, LiveGuest], tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with Group(pair, tmpfs_path) as group:
            await group.numbers()  # its bitmaps record from here on
            vm = group.machines[1].vm
            freeze = vm.freeze

            async def disabled(deadline_s: float, together: Together) -> Frozen:
                disk = (await look_at(vm.monitor)).disk("b")
                (name,) = [b.name for b in disk.bitmaps if b.name.endswith(f"{group.standing().group}:follow/b:1")]
                await vm.monitor.execute("block-dirty-bitmap-disable", {"node": disk.node, "name": name})
                return await freeze(deadline_s, together)

            with monkeypatch.context() as patched:
                patched.setattr(vm, "freeze", disabled)
                first, second = await group.taken(group.opened(parent=1))
            assert isinstance(second, RefusedError)
            if isinstance(first, Taken):  # it was cut before the other one had refused
                await remove(group.machines[0].vm.monitor, first.parts[0].view)
            assert "somebody has changed the bitmaps of b" in group.standing().why
            lead, follow = await group.taken(group.opened(parent=1))
            assert isinstance(lead, Taken)
            assert isinstance(follow, Taken)
            assert (lead.parts[0].rotation.since, follow.parts[0].rotation.since) == (1, 0)
            for machine, taken in zip(group.machines, (lead, follow), strict=True):
                await remove(machine.vm.monitor, taken.parts[0].view)

    asyncio.run(check())
