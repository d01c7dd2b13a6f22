"""One client of the server, from its first byte to its last."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from structlog.typing import FilteringBoundLogger

from workers.nbd.handshake import UNIX_BUFFER_BYTES, bound_unacknowledged, tune_tcp
from workers.nbd.served import ServedDisk
from workers.nbd.server_answers import Answers
from workers.nbd.server_handshake import Agreed, Haggle
from workers.nbd.server_link import PlainLink
from workers.nbd.server_requests import Asked, Buffers, InFlight, RequestReader
from workers.nbd.server_threads import RequestThreads
from workers.nbd.server_tls_link import TlsLink
from workers.nbd.wire import ProtocolError


@dataclass(frozen=True)
class Limits:
    """What clients may take. `budget_bytes` of requests per connection; one more request may come on top."""

    request_threads: int = 16
    connections: int = 256
    budget_bytes: int = 32 * 1024 * 1024
    handshake_timeout_s: float = 30.0
    """For the whole handshake."""
    send_timeout_s: float = 30.0
    """How long a client may take no byte while replies wait for it. Only that is bounded; it may be idle for ever."""


@dataclass(frozen=True)
class Serving:
    """What all connections of a server share."""

    exports: Mapping[str, ServedDisk]
    tls: ssl.SSLContext | None
    limits: Limits
    threads: RequestThreads


class Connection:
    """One client, in a thread of its own. `over` is called with it when that ends.

    Owns `sock` from here on, also if it cannot be made (OSError).
    """

    def __init__(
        self, serving: Serving, sock: socket.socket, log: FilteringBoundLogger, over: Callable[[Connection], None]
    ) -> None:
        self._serving = serving
        self._log = log
        self._over = over
        self._in_flight = InFlight(serving.limits.budget_bytes)
        self._aborted = False
        self._haggle = Haggle(sock, serving.exports, serving.tls, serving.limits.handshake_timeout_s)
        try:
            _tune(sock, serving.limits.send_timeout_s)
            self._hangup = sock.dup()
            """For `abort` from another thread: of the same connection, but never wrapped in TLS or closed elsewhere."""
        except OSError:
            sock.close()
            raise
        self._hangup_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="nbd-server-connection", daemon=True)

    def start(self) -> None:
        """Raises RuntimeError if there can be no more threads; the connection is closed then."""
        try:
            self._thread.start()
        except RuntimeError:
            self._close()
            self._over(self)
            raise

    def abort(self) -> None:
        """End it now, from another thread. What the disk is carrying out goes on, unanswered."""
        with self._hangup_lock, suppress(OSError):
            self._aborted = True
            self._hangup.shutdown(socket.SHUT_RDWR)
        self._in_flight.close()

    def join(self, deadline: float) -> None:
        """Wait until it has ended, or until `deadline` (monotonic)."""
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        try:
            reason = self._serve()
        except ProtocolError as error:
            reason = f"the client broke the protocol: {error.message}"
        except ssl.SSLError as error:
            reason = f"TLS failed: {error.reason or error}"
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception:
            self._log.exception("an NBD connection broke")
            reason = "the server has a bug"
        finally:
            self._close()
        self._log.info("an NBD client is gone", reason="it was closed by this side" if self._aborted else reason)
        self._over(self)

    def _close(self) -> None:
        self._haggle.sock.close()
        with self._hangup_lock:
            self._hangup.close()

    def _serve(self) -> str:
        """Returns why it ended in an orderly way."""
        try:
            agreed = self._haggle.run()
        except TimeoutError as error:
            timeout_s = self._serving.limits.handshake_timeout_s
            raise ConnectionError(f"the handshake took longer than {timeout_s:g} s") from error
        if agreed is None:
            return "it left before it opened an export"
        self._log = self._log.bind(export=agreed.export)
        self._log.info("an NBD client has opened an export", writable=agreed.writable is not None)
        self._transmit(agreed)
        return "it disconnected"

    def _transmit(self, agreed: Agreed) -> None:
        buffers = Buffers()
        answers = Answers(agreed, buffers, self._log)
        link = self._link(buffers)

        def carry_out(asked: Asked) -> None:
            if link.closed:
                return
            self._in_flight.begin(asked.cost)
            reply = answers.to(asked)
            self._in_flight.end(asked.cost)
            link.send(reply)

        lane = self._serving.threads.lane(carry_out)

        def take(asked: Asked) -> None:
            self._in_flight.add(asked.cost)
            lane.put(asked)

        link.run(RequestReader(take, buffers).run())

    def _link(self, buffers: Buffers) -> PlainLink | TlsLink:
        sock, timeout_s = self._haggle.sock, self._serving.limits.send_timeout_s
        if isinstance(sock, ssl.SSLSocket):
            return TlsLink(sock, self._in_flight, buffers, timeout_s)
        return PlainLink(sock, self._in_flight, buffers, timeout_s)


def _tune(sock: socket.socket, send_timeout_s: float) -> None:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNIX_BUFFER_BYTES)
    else:
        tune_tcp(sock)
        bound_unacknowledged(sock, send_timeout_s)
