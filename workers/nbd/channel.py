"""Requests and replies over one plain socket, with as many requests in flight as there are calling threads.

There is no receiver thread. Of the threads that wait for an answer one leads: it reads replies, each straight into the
buffer it belongs to, wakes its owner, and stops when its own answer has come; then another waiter leads.

    call A   send ──▶ lead: recv B's answer ─ wake B ─ recv A's answer ─ hand over to C ──▶ return
    call B   send ──▶ wait .................. woken ──▶ return
    call C   send ──▶ wait ............................................ woken ─▶ lead ...

No wake-up is lost, because under `_lock`: a thread that finds `_receive` taken marks itself as waiting; whoever
releases `_receive` wakes one that waits. A thread that is still sending is never chosen, since the server may
stop taking bytes until someone reads its replies; it looks for itself when it comes to wait.

A buffer belongs to the leader until its request is done, so only the holder of `_receive` fails requests: a thread
that finds the connection broken shuts the socket down, at which the leader wakes up and fails them all.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from workers.nbd.handshake import Negotiated, say_goodbye_on_close
from workers.nbd.replies import ReplyReader, Request, lost_error
from workers.nbd.wire import Command, ProtocolError

CLOSED_HERE = "it was closed by this side"


class PlainChannel:
    """One socket of its own; thread-safe. `export` is how messages name the other end."""

    def __init__(self, negotiated: Negotiated, export: str, timeout_s: float) -> None:
        self._sock = negotiated.sock
        self._export = export
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._send = threading.Lock()
        self._receive = threading.Lock()
        self._broken: str | None = None
        self._next_cookie = 1
        self._pending: dict[int, Request] = {}
        self._waiting: dict[int, Request] = {}
        reader = ReplyReader(
            self._pending,
            self._finish,
            structured=negotiated.opened.structured,
            context_ids=frozenset(negotiated.opened.context_ids.values()),
        )
        self._replies = reader.run()
        self._wanted = next(self._replies)
        # Timeouts by the kernel instead of settimeout(), which would poll before every call
        # and make MSG_WAITALL impossible: 1 MiB arrives in one call without the interpreter's lock.
        self._sock.settimeout(None)
        timeval = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1_000_000))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    @property
    def broken(self) -> str | None:
        """Why no further call can succeed; None while the connection stands."""
        return self._broken

    @contextmanager
    def exclusive(self) -> Iterator[socket.socket]:
        """The socket for one who sends requests and takes their answers by himself (splice); other calls wait.

        Raises DiskIOError (RECONNECT) if the connection is broken, RuntimeError if requests are in flight. Whoever
        leaves an answer untaken has to `abort`.
        """
        with self._send:
            self._receive.acquire()
            try:
                if self._broken is not None:
                    raise lost_error(Request(Command.READ), self._export, self._broken)
                if self._pending:
                    raise RuntimeError(f"{self._export} has requests in flight")
                yield self._sock
            finally:
                self._let_go()

    def call(self, request: Request, payload: memoryview | None = None) -> None:
        """Send and wait for the answer, which is in `request` afterwards.

        Raises DiskIOError (RECONNECT) if the connection is or becomes broken. An error of the server's is in
        `request.error`, not raised.
        """
        with self._lock:
            if self._broken is None:
                request.cookie = self._next_cookie
                self._next_cookie += 1
                self._pending[request.cookie] = request
            else:
                raise lost_error(request, self._export, self._broken)
        try:
            self._send_request(request, payload)
            self._await(request)
        finally:
            if not request.done:  # this thread was interrupted: nobody will take the answer
                self.abort("a call on it was interrupted")
        if request.lost:
            raise lost_error(request, self._export, self._broken or "")

    def abort(self, reason: str = "it was aborted") -> None:
        """Break the connection: every pending and later call fails. From any thread."""
        with self._lock:
            self._break(reason)
            if self._receive.acquire(blocking=False):
                self._fail_pending()
                self._receive.release()

    def close(self) -> None:
        """Say goodbye if nothing is in flight, then close the socket. Idempotent; pending calls fail."""
        with self._lock:
            quiet = self._broken is None and not self._pending
        if quiet:
            with self._send, suppress(OSError):
                say_goodbye_on_close(self._sock)
                self._sock.sendmsg([Request(Command.DISC).header()])
        self.abort(CLOSED_HERE)
        with self._send, self._receive:  # no thread is inside a system call on the descriptor any more
            self._sock.close()

    def _break(self, reason: str) -> None:
        """With `_lock` held. The shutdown wakes a leader and a sender out of their system calls."""
        if self._broken is None:
            self._broken = reason
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _send_request(self, request: Request, payload: memoryview | None) -> None:
        """Header and payload in one call. A failure breaks the connection: part of the request may be out."""
        parts = [memoryview(request.header())]
        if payload is not None:
            parts.append(payload)
        with self._send:
            try:
                while parts and self._broken is None:
                    parts = unsent(parts, self._sock.sendmsg(parts))
            except BlockingIOError:
                self.abort(f"the server took no byte for {self.timeout_s:g} s")
            except OSError as error:
                self.abort(f"sending failed: {error.strerror}")

    def _await(self, request: Request) -> None:
        while True:
            with self._lock:
                if request.done:
                    return
                leading = self._receive.acquire(blocking=False)
                if not leading:
                    if request.wake is None:
                        request.wake = threading.Lock()
                        request.wake.acquire()
                    request.waiting = True
                    self._waiting[request.cookie] = request
            if leading:
                self._lead(request)
            elif request.wake is not None:
                request.wake.acquire()  # bounded: the leader times out, and then fails everyone

    def _lead(self, own: Request) -> None:
        """Read replies until that to `own` has come. Enters with `_receive` held, leaves with it released."""
        reason: str | None = "the thread that read its replies was interrupted"
        try:
            while not own.done:
                self._fill(self._wanted)
                self._wanted = next(self._replies)
            reason = None
        except ProtocolError as error:
            reason = f"the server broke the protocol: {error.message}"
        except BlockingIOError:
            reason = f"the server sent no byte for {self.timeout_s:g} s"
        except OSError as error:
            reason = f"receiving failed: {error.strerror or error}"
        finally:
            if reason is not None:
                with self._lock:
                    self._break(reason)
            self._let_go()

    def _let_go(self) -> None:
        """Release `_receive`: no buffer is written to any more, so a broken connection's calls fail now."""
        with self._lock:
            if self._broken is not None:
                self._fail_pending()
            self._receive.release()
            if self._waiting:
                self._wake(next(iter(self._waiting.values())))

    def _fill(self, view: memoryview) -> None:
        while view:
            got = self._sock.recv_into(view, 0, socket.MSG_WAITALL)
            if got == 0:
                raise ConnectionError("the server closed the connection")
            view = view[got:]

    def _finish(self, request: Request) -> None:
        with self._lock:
            del self._pending[request.cookie]
            request.done = True
            self._wake(request)

    def _fail_pending(self) -> None:
        """With `_lock` and `_receive` held."""
        for request in self._pending.values():
            request.done = request.lost = True
            self._wake(request)
        self._pending.clear()

    def _wake(self, request: Request) -> None:
        """With `_lock` held. Only who waits is woken, and once: releasing twice would be an error."""
        if request.waiting and request.wake is not None:
            request.waiting = False
            del self._waiting[request.cookie]
            request.wake.release()


def unsent(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of `parts` after `sent` bytes of them."""
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(0, sent - len(part))
    return left
