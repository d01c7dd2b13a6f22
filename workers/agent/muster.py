"""Machines of one host that do a thing at once.

What a machine does before its stop would let another stand still that is stopped already. What it does after going on
would take the processors, and this program, from those that still stand.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterable
from contextlib import suppress


class Moment(enum.Enum):
    STOP = enum.auto()
    """All is ready for it."""
    GONE_ON = enum.auto()
    """It runs again."""


class Muster:
    """Of one event loop."""

    def __init__(self, names: Iterable[str]) -> None:
        everybody = frozenset(names)
        self._missing = {moment: set(everybody) for moment in Moment}
        self._all_here = {moment: asyncio.Event() for moment in Moment}

    async def wait(self, moment: Moment, name: str, timeout_s: float) -> None:
        """Until all others are there too or have left, or time is up: whoever is slow then comes later."""
        self._note(moment, name)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_here[moment].wait()

    def leave(self, name: str) -> None:
        """Nobody is to wait for it any more. Any number of times."""
        for moment in Moment:
            self._note(moment, name)

    def _note(self, moment: Moment, name: str) -> None:
        self._missing[moment].discard(name)
        if not self._missing[moment]:
            self._all_here[moment].set()
