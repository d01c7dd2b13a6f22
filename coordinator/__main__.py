"""`python -m coordinator`: the control loop and the API in one process."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from coordinator.api.app import make_api
from coordinator.broker import make_app, ring
from coordinator.ledger import RedisLedger
from coordinator.logs import configure_logs
from coordinator.model.errors import FlushpointError
from coordinator.service.control import ControlLoop
from coordinator.service.dispatcher import Dispatcher
from coordinator.settings import Settings, load_settings


def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    ledger = RedisLedger(settings.redis_url, prefix=settings.redis_prefix)
    celery = make_app(settings)
    control = ControlLoop(ledger, settings, Dispatcher(ledger, settings, partial(ring, celery)))
    api = make_api(ledger, lambda: control.leads)
    loop = threading.Thread(target=control.run, name="control")
    loop.start()
    listener = _listen(settings)
    try:
        uvicorn.Server(_config(api)).run(sockets=[listener])
    finally:
        listener.close()
        control.stop()
        loop.join(timeout=10)
        ledger.close()
        celery.close()


def _listen(settings: Settings) -> socket.socket:
    """The API's socket; a unix one is the owner's alone, for who may reach it may do everything."""
    if not settings.api_socket:
        return socket.create_server((settings.api_host, settings.api_port), backlog=512)
    with contextlib.suppress(FileNotFoundError):
        Path(settings.api_socket).unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(settings.api_socket)
    finally:
        os.umask(umask)
    listener.listen(512)
    return listener


def _config(api: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(api, log_level="warning", access_log=False, timeout_graceful_shutdown=5)


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
