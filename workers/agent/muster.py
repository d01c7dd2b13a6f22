"""Machines of one host that are stopped at once.

Before a guest is stopped its monitor is asked, its host's journal is written and the guard told. If one machine did
that while another is stopped already, that one would stand still for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress


class Muster:
    """Of one event loop."""

    def __init__(self, names: Iterable[str]) -> None:
        self._missing = set(names)
        self._all_here = asyncio.Event()

    async def wait(self, name: str, timeout_s: float) -> None:
        """Ready; until all others are or have left, or time is up: whoever is slow then comes later."""
        self.leave(name)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_here.wait()

    def leave(self, name: str) -> None:
        """Nobody is to wait for it any more. Any number of times."""
        self._missing.discard(name)
        if not self._missing:
            self._all_here.set()
