"""A machine's part in epochs, without a guest: what it does with two of them at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coordinator.model.epoch import CutFacts, GoKey, Phase, Standing, ViewKind
from workers.agent.choice import Choice
from workers.agent.cut import Part
from workers.agent.files import FileSystems
from workers.agent.journal import Journal
from workers.agent.muster import Muster
from workers.agent.participant import Machine, Taken
from workers.agent.sockets import Sockets

SPEC = SimpleNamespace(prepare_ms=1000, views=ViewKind.STAGE)
GONE_ON = Standing(phase=Phase.FREEZING, key=GoKey.OPEN, why="", left_ms=1000)


async def _nothing() -> None:
    pass


class Told(Machine):
    """Tells what it does, and cuts when it is let."""

    def __init__(self) -> None:
        vm = SimpleNamespace(turn=asyncio.Lock(), arm=_nothing, disarm=_nothing, monitor=None, is_off=False)
        room = SimpleNamespace(directory=Path())
        super().__init__("db", vm, room, Sockets(()), Muster(["db"]))  # type: ignore[arg-type]
        self.did: list[str] = []
        self.may_cut = asyncio.Event()

    async def _prepare(self, epoch: Any, parts: list[Part], choice: Choice) -> None:
        self.did.append(f"{epoch.number} looks")

    async def _file_systems(self, epoch: Any) -> FileSystems:
        return FileSystems(None, SimpleNamespace(), Journal(Path()))  # type: ignore[arg-type]

    async def _cut(self, epoch: Any, parts: Sequence[Part], files: FileSystems, barrier: Any, feed: Any) -> Taken:
        await self.may_cut.wait()
        self.did.append(f"{epoch.number} rotates")
        return Taken(parts, CutFacts(cut_at=0, freeze_ms=0, filesystem_consistent=False, views=()), GONE_ON)


class Barrier:
    async def prepared(self, epoch: Any, vm: str) -> Standing:
        return GONE_ON


class Feed:
    async def until(self, epoch: Any, standing: Standing, is_reached: Any) -> Standing:
        return standing


def test_no_epoch_looks_at_the_bitmaps_while_another_is_about_to_rotate_them() -> None:
    """7 had its go and was then aborted by another machine: 8 may be opened before 7 has cut here."""

    async def run() -> list[str]:
        machine = Told()
        epochs: list[Any] = [SimpleNamespace(number=number, spec=SPEC) for number in (7, 8)]
        parts = [machine.take_part(epoch, Barrier(), Feed()) for epoch in epochs]  # type: ignore[arg-type]
        begun = asyncio.gather(*parts)
        while not machine.did:
            await asyncio.sleep(0)
        machine.may_cut.set()
        await begun
        return machine.did

    assert asyncio.run(run()) == ["7 looks", "7 rotates", "8 looks", "8 rotates"]
