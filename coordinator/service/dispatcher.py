"""Keeps the doorbells topped up: as many as there is work for, at most two a slot."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

import structlog
from kombu.exceptions import OperationalError

from coordinator.ledger.contract import Ledger
from coordinator.model.errors import UnavailableError
from coordinator.model.messages import MOVER_ROLE, Doorbell
from coordinator.settings import Settings

log = structlog.get_logger()

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


class Ringer:
    """Rings in a thread of its own whenever it is asked to: a broker that hangs holds up doorbells and no decision.

    `top_up` looks for itself at what is due, so whatever was asked for while it hung is one ringing afterwards.
    """

    def __init__(self, top_up: Callable[[], int]) -> None:
        self._top_up = top_up
        self._asked = threading.Event()
        self._is_broken = False
        # A daemon, for a broker that hangs must not hold up the end of the process either.
        self._thread = threading.Thread(target=self._run, name="ringer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self) -> None:
        """Returns at once."""
        self._asked.set()

    def _run(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            self._ring()

    def _ring(self) -> None:
        try:
            if self._top_up() and self._is_broken:
                self._is_broken = False
                log.info("the broker takes doorbells again")
        except (UnavailableError, OperationalError, OSError) as error:
            if not self._is_broken:
                self._is_broken = True
                log.warning("cannot ring for workers; those at work go on", error=str(error))
        except Exception:
            log.exception("cannot ring for workers")
