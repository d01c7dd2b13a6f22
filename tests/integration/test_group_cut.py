"""Two guests that write in causal order are cut together: no effect is on a disk without its cause."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coordinator.model.bitmap import rotate
from coordinator.model.job import Sync
from coordinator.model.uri import parse
from tests.guest import GuestKit
from tests.live_guest import LiveDisk, LiveGuest, running_pair
from workers.access import Access
from workers.agent.cut import Part, Vm
from workers.agent.guard import Guard, GuardLink
from workers.agent.guest import look_at
from workers.agent.journal import Journal
from workers.agent.monitor import Monitor
from workers.agent.stage import stage
from workers.agent.views import prepare, remove
from workers.sources import open_source

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc")

EPOCHS = 24
DEADLINE_S = 10.0
STAGE_S = 60.0
APART_S = 0.2
"""Between the cuts of a group that is not one."""


@pytest.fixture
def pair(guest_kit: GuestKit, tmpfs_path: Path) -> Iterator[tuple[LiveGuest, LiveGuest]]:
    with running_pair(guest_kit, tmpfs_path / "pair", LiveDisk("a"), LiveDisk("b", iothread=True)) as guests:
        yield guests


class Group:
    """The two guests under one guard, with a barrier in this process in the place of the ledger's."""

    def __init__(self, guests: tuple[LiveGuest, LiveGuest], directory: Path) -> None:
        self._guests = guests
        self._directory = directory
        self._barrier = asyncio.Barrier(len(guests))
        self._vms: list[Vm] = []
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Group:
        guard = Guard(self._directory / "guard", print)
        ends = threading.Event()
        serving = threading.Thread(target=guard.run, args=(ends.is_set,))
        serving.start()
        self._open.callback(guard.close)
        self._open.callback(serving.join)
        self._open.callback(ends.set)
        for guest in self._guests:
            monitor = await Monitor.connect(guest.monitor)
            self._open.push_async_callback(monitor.close)
            link = GuardLink(self._directory / "guard")
            self._open.callback(link.close)
            self._vms.append(Vm(monitor, link, Journal(self._directory / "journal")))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def epoch(self, number: int, *, is_group: bool = True) -> list[int]:
        """The number each guest had written last, by what its disk held at the cut."""
        cuts = [self._cut(vm, guest, number, place, is_group) for place, (vm, guest) in enumerate(self._each())]
        parts = await asyncio.gather(*cuts)
        found = []
        for (vm, _), part in zip(self._each(), parts, strict=True):
            staged = await stage(vm, part.view, (), STAGE_S)
            await remove(vm.monitor, part.view)
            found.append(first_number(staged.image))
            staged.image.unlink()
        return found

    async def _cut(self, vm: Vm, guest: LiveGuest, number: int, place: int, is_group: bool) -> Part:
        found = await look_at(vm.monitor)
        disk = found.disk(guest.disks[0].name)
        view = await prepare(vm.monitor, found, disk, self._directory)
        part = Part(view, rotate(disk.tracking(), "0a1b", "shop", 0, number))
        async with vm.order:
            if not is_group:
                await asyncio.sleep(place * APART_S)
            frozen = await vm.freeze(DEADLINE_S)
            try:
                if is_group:
                    await self._barrier.wait()
                await vm.take(frozen, [part])
            finally:
                await vm.thaw(frozen)
        return part

    def _each(self) -> Iterator[tuple[Vm, LiveGuest]]:
        yield from zip(self._vms, self._guests, strict=True)


def first_number(image: Path) -> int:
    """What the first block of a staged image holds over and over."""
    source = open_source(parse(str(image)), Sync.FULL, None, Access(["/"], []))
    try:
        block = bytearray(4096)
        source.read_into(0, memoryview(block))
    finally:
        source.close()
    numbers = {int.from_bytes(block[at : at + 8], "little") for at in range(0, len(block), 8)}
    assert len(numbers) == 1, f"a block is half written: {numbers}"
    return numbers.pop()


def test_no_effect_is_on_a_disk_without_its_cause(pair: tuple[LiveGuest, LiveGuest], tmpfs_path: Path) -> None:
    async def check() -> None:
        async with Group(pair, tmpfs_path) as group:
            last = 0
            for number in range(1, EPOCHS + 1):
                lead, follow = await group.epoch(number)
                assert follow <= lead <= follow + 1, number
                assert lead > last, "the guests write between two cuts, or this proves nothing"
                last = lead

    asyncio.run(check())


def test_guests_that_are_cut_apart_are_caught(pair: tuple[LiveGuest, LiveGuest], tmpfs_path: Path) -> None:
    """So that the test above is known to see."""

    async def check() -> None:
        async with Group(pair, tmpfs_path) as group:
            lead, follow = await group.epoch(1, is_group=False)
            assert not follow <= lead <= follow + 1

    asyncio.run(check())
