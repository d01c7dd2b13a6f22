"""`python -m workers.agent.reader`: the only client of a guest's fleece, for one machine and one epoch.

::

    guest's QEMU ── NBD, unix socket ──> reader ── NBD, unix socket ──> movers on this host
                                           │  └─── NBD over TLS ──────> movers elsewhere
                                           └─ "watch", twice a second ──> guard

It is a process of its own so that it can be killed at any moment: by the guard when it hangs, by the kernel together
with its agent, by its agent when the epoch is over. What movers do, frozen ones too, ends at the sockets to them.

It is told what to do by a line of JSON on its standard input, and says one on its standard output when it can be read.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import structlog
from pydantic import BaseModel

from coordinator.logs import configure_logs
from coordinator.model.errors import FlushpointError, UnavailableError
from workers.agent.guard import GuardLink
from workers.agent.reader_disk import FleecedDisk, RefusedDisk
from workers.agent.watched import BEAT_S
from workers.nbd.endpoint import Endpoint
from workers.nbd.served import ServedDisk
from workers.nbd.server import Server, listen
from workers.nbd.server_connection import Limits
from workers.nbd.server_handshake import ServerTls

GUARD_GONE_S = 5.0
"""A guard that is started again is back by then. Without one nobody could kill this process if it hung."""
LIMITS = Limits(request_threads=8, connections=64, budget_bytes=8 * 1024 * 1024)
"""Of each server: what movers take is memory of the guest's host."""

log = structlog.get_logger()


class ReadDisk(BaseModel):
    """`name` and `size`, in bytes, for movers; `export` is the guest's."""

    name: str
    size: int
    export: str = ""


class Reading(BaseModel):
    """What a reader is told."""

    path: Path
    """Where movers on this host connect to."""
    host: str = ""
    port: int = 0
    """Where movers elsewhere do; "": there are none. Of port 0 the kernel takes a free one."""
    tls: str = ""
    """Directory of certificates."""
    disks: tuple[ReadDisk, ...]
    guard: Path | None = None
    guest: str = ""
    """As its guard knows it ..."""
    socket: Path | None = None
    """... and where its QEMU serves the exports."""
    bitmap: str = ""
    why: str = ""
    """Why nothing can be read any more: then no guest is connected to."""


class Ready(BaseModel):
    """What it says: where it listens, or why it does not."""

    port: int = 0
    error: str = ""


def main() -> int:
    configure_logs("reader")
    told = Reading.model_validate_json(sys.stdin.buffer.readline())
    with ExitStack() as stack:
        try:
            port = _serve(told, stack)
        except FlushpointError as error:
            print(Ready(error=error.message).model_dump_json(), flush=True)
            return error.exit_code
        print(Ready(port=port).model_dump_json(), flush=True)
        threading.Event().wait()  # until it is killed
    return 0


def _serve(told: Reading, stack: ExitStack) -> int:
    """On which port; 0: on none."""
    if told.guard is not None:
        link = GuardLink(told.guard)
        link.watch(told.guest)  # before the guest knows of us
        threading.Thread(target=_say_that_it_lives, args=(link, told.guest), daemon=True).start()
    exports = {disk.name: _disk(told, disk) for disk in told.disks}
    os.umask(0o177)  # whoever may connect to the socket reads the disks
    stack.enter_context(Server(exports, listen(Endpoint(None, 0, str(told.path), "")), limits=LIMITS))
    if not told.host:
        return 0
    listener = listen(Endpoint(told.host, told.port, None, ""))
    port = int(listener.getsockname()[1])
    tls = ServerTls(told.tls, demand_client_certificates=True) if told.tls else None
    stack.enter_context(Server(exports, listener, tls=tls, limits=LIMITS))
    return port


def _disk(told: Reading, disk: ReadDisk) -> ServedDisk:
    if told.why:
        return RefusedDisk(disk.size, told.why)
    return FleecedDisk(Endpoint(None, 0, str(told.socket), disk.export), told.bitmap)


def _say_that_it_lives(link: GuardLink, guest: str) -> None:
    heard = time.monotonic()
    while True:
        time.sleep(BEAT_S)
        try:
            link.watch(guest)
            heard = time.monotonic()
        except UnavailableError as error:
            if time.monotonic() - heard > GUARD_GONE_S:
                log.error("ends: nobody watches it", error=error.message)
                os._exit(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
