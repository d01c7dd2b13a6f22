"""`python -m workers`: a Celery worker of movers.

Started by our own command rather than by `celery -A`, which puts the current directory first on the path,
where a user's module of the same name would shadow ours.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

import structlog
from celery.platforms import EX_FAILURE

from coordinator.broker import queue_of
from coordinator.ledger import RedisLedger
from coordinator.logs import configure_logs
from coordinator.model.errors import FlushpointError
from coordinator.model.messages import MOVER_ROLE
from coordinator.settings import Settings, load_settings
from workers.app import hold_little_memory, make_worker_app, worker_name

ALIVE_EVERY_S = 2.0
ALIVE_TTL_MS = 8000
SOUND_S = 5.0
"""One that breaks sooner would do so again: who started it has to know."""

log = structlog.get_logger()


class Presence:
    """Tells the ledger, from a thread of its own, that this worker and its slots are there."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = worker_name()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        ledger = RedisLedger(self._settings.redis_url, prefix=self._settings.redis_prefix)
        slots = self._settings.worker_slots
        while not self._stop.is_set():
            try:
                ledger.worker_alive(self._name, MOVER_ROLE, slots, ALIVE_TTL_MS)
            except FlushpointError as error:
                log.warning("cannot use the ledger", error=str(error))
            self._stop.wait(ALIVE_EVERY_S)
        try:
            ledger.worker_gone(self._name)
        except FlushpointError:
            log.warning("cannot say goodbye; the worker's entry ends by itself")
        ledger.close()


def main() -> int:
    hold_little_memory()
    configure_logs("worker")
    try:
        settings = load_settings()
        RedisLedger(settings.redis_url, prefix=settings.redis_prefix).close()
    except FlushpointError as error:
        print(f"flushpoint worker: {error}", file=sys.stderr)
        return error.exit_code
    app = make_worker_app(settings)
    presence = Presence(settings)
    worker = app.Worker(
        hostname=f"mover@{socket.gethostname()}-{worker_name()}",
        concurrency=settings.worker_slots,
        queues=[queue_of(MOVER_ROLE)],
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        optimization="fair",
    )
    presence.start()
    begun = time.monotonic()
    try:
        worker.start()
    finally:
        presence.stop()
    if worker.exitcode == EX_FAILURE and time.monotonic() - begun > SOUND_S:
        # Its broker's client may break for good when a server dies in the middle of an acknowledgement (kombu 5.6:
        # "Unrecoverable error", of a connection that it has closed itself). A new one finds what there is to do.
        log.error("the worker broke, and is started anew")
        os.execv(sys.executable, [sys.executable, "-P", "-m", "workers"])
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    sys.exit(main())
