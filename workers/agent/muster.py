"""Machines of one host that do a thing at once.

What a machine does before its stop would let another stand still that is stopped already. What it does after going on
would take the processors, and this program, from those that still stand.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

from coordinator.model.epoch import Standing


class Moment(enum.Enum):
    STOP = enum.auto()
    """All is ready for it."""
    FROZEN = enum.auto()
    """It stands still, with its views taken."""
    GONE_ON = enum.auto()
    """It runs again."""


class Muster:
    """Of one event loop."""

    def __init__(self, names: Iterable[str]) -> None:
        everybody = frozenset(names)
        self._missing = {moment: set(everybody) for moment in Moment}
        self._all_here = {moment: asyncio.Event() for moment in Moment}
        self._frozen: set[str] = set()
        self._told: dict[str, asyncio.Future[Standing]] = {}

    async def wait(self, moment: Moment, name: str, timeout_s: float) -> None:
        """Until all others are there too or have left, or time is up: whoever is slow then comes later."""
        self._note(moment, name)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_here[moment].wait()

    async def frozen(self, name: str, tell: Callable[..., Awaitable[Standing]], timeout_s: float) -> Standing:
        """What the ledger answers, told once of all that are here: by the last to come, or by whoever has waited for
        it until time was up."""
        self._frozen.add(name)
        await self.wait(Moment.FROZEN, name, timeout_s)
        if name not in self._told:
            here = sorted(self._frozen - self._told.keys())
            self._told |= dict.fromkeys(here, asyncio.ensure_future(tell(*here)))
        return await asyncio.shield(self._told[name])  # others wait for it, too

    def leave(self, name: str) -> None:
        """Nobody is to wait for it any more, or to tell of it. Any number of times."""
        self._frozen.discard(name)
        for moment in Moment:
            self._note(moment, name)

    def _note(self, moment: Moment, name: str) -> None:
        self._missing[moment].discard(name)
        if not self._missing[moment]:
            self._all_here[moment].set()
