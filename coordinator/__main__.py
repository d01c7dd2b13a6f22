"""`python -m coordinator`: the control loop and the API in one process."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from coordinator.api.app import make_api
from coordinator.api.feed import EventFeed
from coordinator.broker import make_app, ring
from coordinator.ledger import RedisLedger
from coordinator.logs import configure_logs
from coordinator.model.errors import FlushpointError, UnavailableError, UsageError
from coordinator.service.control import ControlLoop
from coordinator.service.dispatcher import Dispatcher, Ringer
from coordinator.settings import Settings, load_settings

BACKLOG = 512
STOP_S = 5
"""For the requests at work when the process is told to end; those that only wait are ended at once."""
RESIGN_S = 5.0
"""STOP_S and this are less than the embedded stack's patience with us (15 s)."""


def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, and resign, so that the next leader need not wait for the term to end."""
    listener = _listen(settings)  # before all else: a coordinator that cannot be talked to must not lead
    ledger = RedisLedger(settings.redis_url, prefix=settings.redis_prefix)
    celery = make_app(settings)
    ringer = Ringer(Dispatcher(ledger, settings, partial(ring, celery)).top_up)
    control = ControlLoop(ledger, settings, ringer.ask)
    feed = EventFeed(ledger)
    server = _Server(make_api(ledger, lambda: control.leads, feed), feed)
    # A daemon, for a ledger that does not answer must not hold up the end for longer than we wait below.
    loop = threading.Thread(target=control.run, name="control", daemon=True)
    server.end_on(signal.SIGTERM, signal.SIGINT)
    ringer.start()
    loop.start()
    try:
        server.run(sockets=[listener])
    finally:
        control.stop()
        loop.join(RESIGN_S)
        listener.close()
        ledger.close()
        celery.close()


class _Server(uvicorn.Server):
    """Ends in good order."""

    def __init__(self, api: FastAPI, feed: EventFeed) -> None:
        super().__init__(uvicorn.Config(api, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_S))
        self._feed = feed

    def end_on(self, *numbers: signal.Signals) -> None:
        """uvicorn's own handlers are set in `run` alone; after it they raise the signal once more, which would kill us
        before we have resigned, unless it means to us what it means to them."""

        def end(*_: object) -> None:
            self.should_exit = True

        for number in numbers:
            signal.signal(number, end)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Send those away first who wait for something to happen: for up to a minute each."""
        self._feed.close()
        await super().shutdown(sockets)


def _listen(settings: Settings) -> socket.socket:
    """The API's socket; a unix one is the owner's alone, for who may reach it may do everything."""
    try:
        if settings.api_socket:
            return _listen_unix(settings.api_socket)
        return socket.create_server((settings.api_host, settings.api_port), backlog=BACKLOG)
    except OSError as error:
        address, names = f"{settings.api_host}:{settings.api_port}", "FLUSHPOINT_API_HOST and FLUSHPOINT_API_PORT"
        if settings.api_socket:
            address, names = settings.api_socket, "FLUSHPOINT_API_SOCKET"
        message = f"the API cannot listen on {address}: {error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            raise UnavailableError(message, f"end what listens there, or set {names}") from error
        raise UsageError(message, f"set {names}") from error


def _listen_unix(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(path)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(umask)
    listener.listen(BACKLOG)
    return listener


def main() -> int:
    configure_logs("coordinator")
    try:
        serve(load_settings())
    except FlushpointError as error:
        print(f"flushpoint coordinator: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
