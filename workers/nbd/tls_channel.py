"""Requests and replies over TLS: one thread owns the SSLSocket, callers queue requests to it.

An SSLSocket must be driven by one thread (sending in one and receiving in another broke in 8 of 8 runs), so the
leader and followers of `channel` cannot be used; the calls and their guarantees are the same.
"""

from __future__ import annotations

import os
import selectors
import ssl
import threading
import time
from collections import deque

from workers.nbd.channel import CLOSED_HERE
from workers.nbd.handshake import Negotiated, say_goodbye_on_close
from workers.nbd.replies import ReplyReader, Request, lost_error
from workers.nbd.wire import Command, ProtocolError

SEND_STEP_BYTES = 128 * 1024
"""At most so much is sent between two looks at what has arrived, lest both sides wait with full buffers."""
RECEIVE_STEPS = 64
"""TLS records (of at most 16 KiB) taken between two looks at what is to be sent."""


class TlsChannel:
    """One SSLSocket of its own; thread-safe. Same contract as `PlainChannel`."""

    def __init__(self, negotiated: Negotiated, sock: ssl.SSLSocket, export: str, timeout_s: float) -> None:
        self._sock = sock
        self._export = export
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._broken: str | None = None
        self._closing = False
        self._next_cookie = 1
        self._pending: dict[int, Request] = {}
        self._outgoing: deque[memoryview] = deque()
        reader = ReplyReader(
            self._pending,
            self._finish,
            structured=negotiated.opened.structured,
            context_ids=frozenset(negotiated.opened.context_ids.values()),
        )
        self._replies = reader.run()
        self._wanted = next(self._replies)
        self._sock.setblocking(False)
        self._doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="nbd-tls", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> str | None:
        """Why no further call can succeed; None while the connection stands."""
        return self._broken

    def call(self, request: Request, payload: memoryview | None = None) -> None:
        """As `PlainChannel.call`."""
        wake = request.wake = threading.Lock()
        wake.acquire()
        with self._lock:
            if self._broken is not None:
                raise lost_error(request, self._export, self._broken)
            request.cookie = self._next_cookie
            self._next_cookie += 1
            self._pending[request.cookie] = request
            self._outgoing.append(memoryview(request.header()))
            if payload is not None:
                self._outgoing.append(payload)
            os.eventfd_write(self._doorbell, 1)
        try:
            wake.acquire()  # bounded: the thread times out, and then fails everyone
        finally:
            if not request.done:
                self.abort("a call on it was interrupted")
        if request.lost:
            raise lost_error(request, self._export, self._broken or "")

    def abort(self, reason: str = "it was aborted") -> None:
        """Break the connection: every pending and later call fails. From any thread."""
        with self._lock:
            if self._broken is None:
                self._broken = reason
                os.eventfd_write(self._doorbell, 1)

    def close(self) -> None:
        """Say goodbye if nothing is in flight, then close the socket. Idempotent; pending calls fail."""
        with self._lock:
            if self._broken is None and not self._pending and not self._closing:
                self._outgoing.append(memoryview(Request(Command.DISC).header()))
                say_goodbye_on_close(self._sock)
                self._closing = True
                os.eventfd_write(self._doorbell, 1)
        if not self._closing:
            self.abort(CLOSED_HERE)
        self._thread.join(self._timeout_s)
        self.abort(CLOSED_HERE)
        self._thread.join()
        with self._lock:
            if self._doorbell >= 0:
                self._sock.close()
                os.close(self._doorbell)
                self._doorbell = -1

    def _run(self) -> None:
        reason = "the thread that drives it ended"
        try:
            reason = self._drive()
        except ProtocolError as error:
            reason = f"the server broke the protocol: {error.message}"
        except TimeoutError:
            reason = f"the server sent no byte for {self._timeout_s:g} s"
        except OSError as error:
            reason = f"TLS failed: {error.strerror or error}"
        finally:
            with self._lock:
                if self._broken is None:
                    self._broken = reason
                for request in self._pending.values():
                    request.lost = True
                    self._wake(request)
                self._pending.clear()

    def _drive(self) -> str:
        """Move bytes until the connection is broken or closed; returns why it ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._doorbell, selectors.EVENT_READ)
            last_moved = time.monotonic()
            while self._broken is None:
                moved = self._receive_some() | self._send_some()
                idle = not self._pending
                if moved or idle:
                    last_moved = time.monotonic()
                if moved:
                    continue
                if self._closing and not self._outgoing:
                    return CLOSED_HERE
                left_s = last_moved + self._timeout_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                writing = selectors.EVENT_WRITE if self._outgoing else 0
                selector.modify(self._sock, selectors.EVENT_READ | writing)
                selector.select(None if idle and not writing else left_s)
                self._take_doorbell()
                if idle:  # silence counts from the first request on
                    last_moved = time.monotonic()
        return self._broken

    def _take_doorbell(self) -> None:
        try:
            os.eventfd_read(self._doorbell)
        except BlockingIOError:
            return

    def _receive_some(self) -> bool:
        for step in range(RECEIVE_STEPS):
            try:
                got = self._sock.recv_into(self._wanted)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return step > 0
            if got == 0:
                raise ConnectionError("the server closed the connection")
            self._wanted = self._wanted[got:]
            if not self._wanted:
                self._wanted = next(self._replies)
        return True

    def _send_some(self) -> bool:
        """Only this thread takes from the queue, so its head needs no lock."""
        if not self._outgoing:
            return False
        part = self._outgoing[0]
        try:
            sent = self._sock.send(part[:SEND_STEP_BYTES])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        if sent < len(part):
            self._outgoing[0] = part[sent:]
        else:
            self._outgoing.popleft()
        return True

    def _finish(self, request: Request) -> None:
        with self._lock:
            del self._pending[request.cookie]
            self._wake(request)

    @staticmethod
    def _wake(request: Request) -> None:
        request.done = True
        if request.wake is not None:
            request.wake.release()
