"""Keeps the doorbells topped up: as many as there is work for, at most two a slot."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from coordinator.ledger.contract import Ledger
from coordinator.model.messages import MOVER_ROLE, Doorbell
from coordinator.settings import Settings

BELLS_PER_SLOT = 2
"""More would only pile up in the broker: a simulated doorbell per unit livelocked at 100,000 units."""


class Dispatcher:
    """`send` hands one doorbell to the broker; what it raises leaves the bell to expire, and another is rung."""

    def __init__(self, ledger: Ledger, settings: Settings, send: Callable[[Doorbell], None]) -> None:
        self._ledger = ledger
        self._ttl_ms = int(settings.doorbell_ttl_s * 1000)
        self._send = send

    def top_up(self) -> int:
        """Ring for the work that is ready; the number of doorbells sent."""
        ready = self._ledger.work_is_ready()
        if ready == 0:
            return 0
        slots = max(1, sum(self._ledger.workers().values()))
        wanted = [secrets.token_hex(8) for _ in range(min(ready, slots))]
        bells = self._ledger.ring(MOVER_ROLE, wanted, BELLS_PER_SLOT * slots, self._ttl_ms)
        for bell in bells:
            self._send(Doorbell(role=MOVER_ROLE, bell=bell))
        return len(bells)
