"""What a doorbell does: wake a mover, which claims until nothing is ready or its time is up."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import structlog
from pydantic import ValidationError

from coordinator.ledger import RedisLedger
from coordinator.model.errors import FlushpointError
from coordinator.model.messages import MESSAGE_VERSION, Doorbell
from coordinator.settings import Settings
from workers.mover.loop import Mover

log = structlog.get_logger()


class Doorman:
    """Answers doorbells in a worker's child process; keeps its mover, with its open disks, between them."""

    def __init__(self, settings: Settings, closing: Callable[[], bool]) -> None:
        self._settings = settings
        self._closing = closing
        self._mover: Mover | None = None
        self._pid = 0

    def answer(self, message: dict[str, object]) -> None:
        """A message that is no doorbell of a version we know is dropped with a word: the next one will do."""
        try:
            bell = Doorbell.model_validate(message)
        except ValidationError as error:
            log.warning("dropped a message that is no doorbell", problem=str(error.errors()[0]["msg"]))
            return
        if bell.version != MESSAGE_VERSION:
            log.warning("dropped a doorbell of an unknown version", version=bell.version)
            return
        mover = self._mover_of_this_process()
        try:
            mover.work(bell)
        except FlushpointError as error:
            log.warning("cannot use the ledger; another doorbell will come", error=str(error))

    def _mover_of_this_process(self) -> Mover:
        """Celery forks its children after this object is made: each has a mover of its own."""
        if self._mover is None or self._pid != os.getpid():
            self._pid = os.getpid()
            ledger = RedisLedger(self._settings.redis_url, prefix=self._settings.redis_prefix)
            self._mover = Mover(ledger, self._settings, f"{socket.gethostname()}-{self._pid}", self._closing)
        return self._mover
