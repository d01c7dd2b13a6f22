"""How epochs of a host stand, by the ledger's news: one waiting call for all that its machines take part in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from coordinator.ledger.barrier import Barrier, News
from coordinator.model.epoch import Epoch, Standing
from coordinator.model.errors import UnavailableError

WAIT_S = 5.0
"""One waiting call."""
AGAIN_S = 0.5
"""After a ledger that did not answer."""
REMEMBERED = 256
"""Epochs whose standing is remembered; one that is forgotten is asked for."""


class Feed:
    """The news of one host. `listen` runs beside those who wait."""

    def __init__(self, barrier: Barrier, host: str) -> None:
        self._barrier = barrier
        self._host = host
        self._latest: dict[tuple[str, int], Standing] = {}
        self._changed = asyncio.Condition()
        self.missed = asyncio.Event()
        """Set when the ledger answers again: news may have gone by. Whoever has looked after them clears it."""

    async def listen(self, after: str, told: Callable[[News], None]) -> None:
        """For ever: hand every piece of news after the one with this id to `told`, and to those who wait."""
        was_away = False
        while True:
            try:
                news = await self._barrier.news(self._host, after, WAIT_S)
            except UnavailableError:  # whoever waits has a time-out of his own
                was_away = True
                await asyncio.sleep(AGAIN_S)
                continue
            if was_away:
                was_away = False
                self.missed.set()
            async with self._changed:
                for one in news:
                    after = one.id
                    self._latest.pop((one.group, one.number), None)
                    self._latest[one.group, one.number] = one.standing
                while len(self._latest) > REMEMBERED:
                    self._latest.pop(next(iter(self._latest)))
                self._changed.notify_all()
            for one in news:
                told(one)

    async def until(self, epoch: Epoch, standing: Standing, is_reached: Callable[[Standing], bool]) -> Standing:
        """How it stands when `is_reached` says so; `standing` is how it does now. Bounded by the ledger's own
        time-outs, for which it is asked when they are over. LedgerUnavailableError."""
        while not is_reached(standing):
            heard = await self._heard(epoch, is_reached, max(standing.left_ms, 1) / 1000)
            standing = heard or await self._barrier.time_out(epoch)
        return standing

    async def _heard(self, epoch: Epoch, is_reached: Callable[[Standing], bool], wait_s: float) -> Standing | None:
        name = (epoch.group, epoch.number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                while name not in self._latest or not is_reached(self._latest[name]):
                    await self._changed.wait()
                return self._latest[name]
        return None
