"""Machines of one host that do a thing at once, without machines."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.model.epoch import GoKey, Phase, Standing
from workers.agent.muster import Moment, Muster

GO = Standing(phase=Phase.CUTTING, key=GoKey.GO)
LONG_S = 60.0
SHORT_S = 0.05


class Ledger:
    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    async def frozen(self, *vms: str) -> Standing:
        self.told.append(vms)
        await asyncio.sleep(0)
        return GO


class Broken(Ledger):
    async def frozen(self, *vms: str) -> Standing:
        self.told.append(vms)
        raise ConnectionError


def test_those_who_stand_still_together_are_told_of_once() -> None:
    async def run() -> None:
        muster, ledger = Muster(["a", "b", "c"]), Ledger()
        answers = await asyncio.gather(*(muster.frozen(name, ledger.frozen, LONG_S) for name in "cab"))
        assert answers == [GO] * 3
        assert ledger.told == [("a", "b", "c")]

    asyncio.run(run())


def test_who_has_waited_long_enough_tells_of_those_who_are_there() -> None:
    async def run() -> None:
        muster, ledger = Muster(["a", "b", "c"]), Ledger()
        await asyncio.gather(*(muster.frozen(name, ledger.frozen, SHORT_S) for name in "ab"))
        await muster.frozen("c", ledger.frozen, LONG_S)
        assert ledger.told == [("a", "b"), ("c",)]

    asyncio.run(run())


def test_nobody_is_told_of_who_has_left() -> None:
    """It runs again, or is about to."""

    async def run() -> None:
        muster, ledger = Muster(["a", "b"]), Ledger()
        waiting = asyncio.create_task(muster.frozen("a", ledger.frozen, LONG_S))
        await asyncio.sleep(0)
        waiting.cancel()
        muster.leave("a")
        await muster.frozen("b", ledger.frozen, LONG_S)
        assert ledger.told == [("b",)]

    asyncio.run(run())


def test_who_is_cancelled_does_not_take_the_answer_from_others() -> None:
    async def run() -> None:
        muster, ledger = Muster(["a", "b"]), Ledger()
        waiting = [asyncio.create_task(muster.frozen(name, ledger.frozen, LONG_S)) for name in "ab"]
        while not ledger.told:
            await asyncio.sleep(0)
        waiting[1].cancel()
        assert await waiting[0] == GO

    asyncio.run(run())


def test_an_error_is_everybodys() -> None:
    async def run() -> None:
        muster, ledger = Muster(["a", "b"]), Broken()
        asked = (muster.frozen(name, ledger.frozen, LONG_S) for name in "ab")
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [ConnectionError] * 2
        assert len(ledger.told) == 1

    asyncio.run(run())


@pytest.mark.parametrize("moment", Moment)
def test_nobody_waits_for_who_has_left(moment: Moment) -> None:
    async def run() -> None:
        muster = Muster(["a", "b"])
        muster.leave("b")
        async with asyncio.timeout(LONG_S / 2):
            await muster.wait(moment, "a", LONG_S)

    asyncio.run(run())
