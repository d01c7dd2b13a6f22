"""Our own NBD server: disks of this process, served to any NBD client from threads with blocking sockets.

    Server               listens, one thread per connection, request threads for all of them
      Connection         one client from its first byte to its last (server_connection)
        Haggle           options, TLS, until an export is open (server_handshake)
        RequestReader    requests, parsed without I/O (server_requests)
        Answers          checks, the disk, the bytes of the reply (server_answers)
        PlainLink        sockets and who sends (server_link); TlsLink where one thread must do both (server_tls_link)
      RequestThreads     carry requests out; connections take turns (server_threads)

    connection's thread ── read ─▶ lane ─▶ turns ─▶ request thread ── disk ─▶ Reply ── send ─▶ socket

What one client does, nothing or garbage or a flood, ends at its own connection: bytes in flight are bounded, a
client's lane yields its turn after every request, nobody waits for a client but its own threads, and every
exception of a connection ends there.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import structlog

from coordinator.model.errors import RefusedError, UnavailableError, UsageError
from workers.nbd import wire
from workers.nbd.endpoint import Endpoint
from workers.nbd.served import ServedDisk
from workers.nbd.server_connection import Connection, Limits, Serving
from workers.nbd.server_handshake import ServerTls, tls_context
from workers.nbd.server_requests import MAX_BLOCK_BYTES
from workers.nbd.server_threads import RequestThreads

log = structlog.get_logger()

BACKLOG = 64
CLOSE_TIMEOUT_S = 10.0
"""How long `Server.close` waits for requests that the disks are carrying out."""
ACCEPT_RETRY_S = 0.2
"""Pause after the kernel could not give a socket: descriptors may come free."""
MIN_PREFERRED_BYTES = 512


def listen(endpoint: Endpoint) -> socket.socket:
    """A socket that listens where clients of `endpoint` connect; of TCP port 0 the kernel makes a free one.

    A unix socket that nobody listens on any more is replaced. RefusedError if somebody does, UnavailableError if the
    kernel refuses the address. The path of a unix socket stays when the server is closed, for the next to replace.
    """
    try:
        if endpoint.socket_path is not None:
            return _listen_unix(endpoint.socket_path)
        family = socket.AF_INET6 if ":" in (endpoint.host or "") else socket.AF_INET
        return socket.create_server((endpoint.host or "", endpoint.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen at {endpoint}: {error.strerror or error}", "Choose another address, or free this one"
        ) from error


def _listen_unix(path: str) -> socket.socket:
    _remove_if_dead(Path(path))
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_if_dead(path: Path) -> None:
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise RefusedError(f"a server listens on {path} already", "Stop it, or choose another socket")


class Server:
    """Serves `exports` by name to whoever connects to `listener`, which it closes in the end. No global state.

    `exports` must not change while it serves. UsageError if an export cannot be served or certificates are unusable.
    """

    def __init__(
        self,
        exports: Mapping[str, ServedDisk],
        listener: socket.socket,
        tls: ServerTls | None = None,
        limits: Limits | None = None,
    ) -> None:
        for name, disk in exports.items():
            _check_export(name, disk)
        limits = limits or Limits()
        self._threads = RequestThreads(limits.request_threads)
        self._serving = Serving(exports, None if tls is None else tls_context(tls), limits, self._threads)
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, name="nbd-server-accept", daemon=True)
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._accepted = 0
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def connections(self) -> int:
        """How many clients are connected, those in handshake among them."""
        with self._lock:
            return len(self._connections)

    def start(self) -> None:
        """Serve from now on, in threads of its own. Once."""
        self._threads.start()
        self._acceptor.start()

    def close(self) -> None:
        """Let nobody in, end all connections, wait for what the disks are carrying out. Harmless when repeated.

        Requests that no thread has begun are dropped without an answer. Returns after CLOSE_TIMEOUT_S even if a disk
        hangs; its thread then still runs.
        """
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        self._closing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        if self._acceptor.ident is not None:
            self._acceptor.join()
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.abort()
        for connection in connections:
            connection.join(deadline)
        if not self._threads.close(deadline):
            log.warning("a disk has not come back from a request", waited_s=CLOSE_TIMEOUT_S)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    log.warning("cannot accept an NBD client", error=str(error))
                    self._closing.wait(ACCEPT_RETRY_S)
                continue
            peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "unix"
            self._admit(sock, peer)

    def _admit(self, sock: socket.socket, peer: str) -> None:
        self._accepted += 1
        bound = log.bind(client=self._accepted, peer=peer)
        if self.connections >= self._serving.limits.connections:
            bound.warning("turned an NBD client away", connections=self._serving.limits.connections)
            sock.close()
            return
        try:
            connection = Connection(self._serving, sock, bound, self._forget)
            with self._lock:
                self._connections.add(connection)
            connection.start()
        except (OSError, RuntimeError) as error:  # no descriptor, no thread, or a client that has gone again
            bound.warning("cannot serve an NBD client", error=str(error))

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


def _check_export(name: str, disk: ServedDisk) -> None:
    if len(name.encode()) > wire.MAX_STRING_BYTES:
        raise UsageError(f"the export name {name[:40]!r}… is too long", f"NBD allows {wire.MAX_STRING_BYTES} bytes")
    if not 0 <= disk.size < 1 << 63:
        raise UsageError(f"export {name!r} has {disk.size} bytes", "NBD's offsets have 63 bits")
    block = disk.preferred_block
    if block & (block - 1) or not MIN_PREFERRED_BYTES <= block <= MAX_BLOCK_BYTES:
        raise UsageError(f"export {name!r} prefers blocks of {block} bytes", "Choose a power of two, 512 to 32 MiB")
