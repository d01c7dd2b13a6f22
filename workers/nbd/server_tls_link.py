"""Requests in and replies out over TLS: the connection's own thread does both, for an SSLSocket bears only one.

Same contract as `server_link.PlainLink`; request threads only queue their replies and ring.
"""

from __future__ import annotations

import os
import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from workers.nbd.server_answers import Reply
from workers.nbd.server_requests import Buffers, InFlight

RECORD_BYTES = 16 * 1024
"""The most a TLS record carries. Replies that fit into one are joined; larger ones are not worth the copy."""
SEND_STEP_BYTES = 128 * 1024
"""At most so much is sent between two looks at what has arrived, lest both sides wait with full buffers."""
RECEIVE_STEPS = 64
"""TLS records taken between two looks at what is to be sent."""


class TlsLink:
    """One SSLSocket in transmission phase, not yet closed when `run` is over."""

    def __init__(self, sock: ssl.SSLSocket, in_flight: InFlight, buffers: Buffers, send_timeout_s: float) -> None:
        self._sock = sock
        self._in_flight = in_flight
        self._buffers = buffers
        self._send_timeout_s = send_timeout_s
        self._lock = threading.Lock()
        self._outgoing: deque[Reply] = deque()
        self._doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._reply: Reply | None = None
        self._unsent: deque[memoryview] = deque()
        self._wanted: memoryview | None = None
        sock.setblocking(False)
        in_flight.when_room_has_come(self._ring)

    def run(self, requests: Iterator[memoryview]) -> None:
        """As `PlainLink.run`."""
        try:
            self._drive(requests)
            with suppress(OSError):  # SSLWantReadError: said goodbye, and the client's need not be waited for
                self._sock.unwrap()
        finally:
            with self._lock:
                self._closed = True
                self._outgoing.clear()
                os.close(self._doorbell)

    @property
    def closed(self) -> bool:
        """Whether replies are dropped."""
        return self._closed

    def send(self, reply: Reply) -> None:
        """As `PlainLink.send`."""
        with self._lock:
            if self._closed:
                return
            self._outgoing.append(reply)
            if len(self._outgoing) == 1:
                os.eventfd_write(self._doorbell, 1)

    def _ring(self) -> None:
        """Wake the connection's thread, from any other."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._doorbell, 1)

    def _drive(self, requests: Iterator[memoryview]) -> None:
        """Move bytes until the client has said goodbye and all is answered, or until something is wrong."""
        poll = select.poll()
        poll.register(self._doorbell, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        self._wanted = next(requests, None)
        last_sent = time.monotonic()
        while self._wanted is not None or not self._in_flight.is_empty:
            received, sent = self._receive_some(requests), self._send_some()
            if sent or not self._unsent:
                last_sent = time.monotonic()
            if received or sent:
                continue
            left_s = last_sent + self._send_timeout_s - time.monotonic()
            if left_s <= 0:
                raise ConnectionError(f"the client took no byte for {self._send_timeout_s:g} s")
            poll.modify(self._sock, self._events())
            for fd, events in poll.poll(left_s * 1000 if self._unsent else None):
                self._look_at(fd, events)

    def _events(self) -> int:
        """What to wait for: requests only if there is room for one, room for replies only if there are any."""
        reading = select.POLLIN if self._wanted is not None and self._in_flight.has_room else 0
        return reading | (select.POLLOUT if self._unsent else 0)

    def _look_at(self, fd: int, events: int) -> None:
        if fd == self._doorbell:
            os.eventfd_read(self._doorbell)
        elif events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) and not events & select.POLLIN:
            raise ConnectionError("the client closed the connection")

    def _receive_some(self, requests: Iterator[memoryview]) -> bool:
        for step in range(RECEIVE_STEPS):
            if self._wanted is None or not self._in_flight.has_room:
                return step > 0
            try:
                got = self._sock.recv_into(self._wanted)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return step > 0
            if got == 0:
                raise ConnectionError("the client closed the connection")
            self._wanted = self._wanted[got:] if got < len(self._wanted) else next(requests, None)
        return True

    def _send_some(self) -> bool:
        sent = 0
        while sent < SEND_STEP_BYTES and self._has_unsent():
            part = self._unsent[0]
            try:
                count = self._sock.send(part[:SEND_STEP_BYTES])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            sent += count
            if count < len(part):
                self._unsent[0] = part[count:]
            else:
                self._unsent.popleft()
        return sent > 0

    def _has_unsent(self) -> bool:
        """With the next reply if the last one is out, whose memory is then free."""
        if self._unsent:
            return True
        if self._reply is not None:
            if self._reply.buffer is not None:
                self._buffers.give(self._reply.buffer)
            self._in_flight.sent(self._reply.cost)
            self._reply = None
        with self._lock:
            if not self._outgoing:
                return False
            self._reply = self._outgoing.popleft()
        parts = self._reply.parts
        if sum(map(len, parts)) <= RECORD_BYTES:
            parts = [b"".join(parts)]
        self._unsent.extend(map(memoryview, parts))
        return True
