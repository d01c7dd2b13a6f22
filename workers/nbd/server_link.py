"""Requests in and replies out over one plain socket.

    reader    the connection's thread: takes requests off the socket, and stops while too many bytes are in flight
    sender    at any time at most one thread, the one that set `_sending`. It is a request thread as long as the socket
              takes bytes at once; else it leaves the rest to the writer thread, for a client that does not read its
              replies must never hold a request thread, of which there are few for all clients

        request thread ── send ─▶ outgoing ─▶ sendmsg ─┬─ all taken ─▶ next reply, or done
                                                       └─ full ─▶ writer: sendmsg, waits ─▶ ... ─▶ done

Replies that come while somebody sends are left in the queue, and go out together.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from workers.nbd.channel import unsent
from workers.nbd.server_answers import Reply
from workers.nbd.server_requests import Buffers, InFlight

AHEAD_BYTES = 16 * 1024
"""Read ahead of the request that is parsed, so that many small ones come with one system call. Longer payloads are
received where they belong; what is copied of them is at most this."""
BATCH_BYTES = 256 * 1024
"""So much goes out in one call, and no reply more: memory of replies that were sent is used again while in cache."""
BATCH_PARTS = 64
MAX_PARTS = 1024
"""IOV_MAX: what one sendmsg takes."""


class PlainLink:
    """One socket in transmission phase, not yet closed when `run` is over."""

    def __init__(self, sock: socket.socket, in_flight: InFlight, buffers: Buffers, send_timeout_s: float) -> None:
        self._sock = sock
        self._in_flight = in_flight
        self._buffers = buffers
        self._send_timeout_s = send_timeout_s
        self._changed = threading.Condition(threading.Lock())
        self._outgoing: deque[Reply] = deque()
        self._batch: list[Reply] = []
        self._unsent: list[memoryview] = []
        self._sending = False
        self._closed = False
        self._broken = ""
        self._wake_writer = threading.Semaphore(0)
        self._lookahead = memoryview(bytearray(AHEAD_BYTES))
        self._ahead = self._lookahead[:0]
        # A timeout of the kernel's: settimeout() would poll before every call and forbid MSG_WAITALL.
        sock.settimeout(None)
        timeval = struct.pack("@ll", int(send_timeout_s), int(send_timeout_s % 1 * 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def run(self, requests: Iterator[memoryview]) -> None:
        """Fill what `requests` yields until it ends and all is answered, or until the client or its time is gone.

        Raises OSError with the reason, or what `requests` raises. No thread touches the socket afterwards.
        """
        writer = threading.Thread(target=self._write, name="nbd-server-writer", daemon=True)
        writer.start()
        try:
            for view in requests:
                self._in_flight.wait_for_room()
                self._fill(view)
            self._in_flight.wait_until_empty()
        except OSError as error:
            raise ConnectionError(self._broken or error.strerror or str(error)) from error
        finally:
            self._close()
            self._wake_writer.release()
            writer.join()

    @property
    def closed(self) -> bool:
        """Whether replies are dropped."""
        return self._closed

    def send(self, reply: Reply) -> None:
        """Queue a reply, and send it if nobody is sending. Never waits for the client. From any thread."""
        with self._changed:
            if self._closed:
                return
            self._outgoing.append(reply)
            if self._sending:
                return
            self._sending = True
        self._drain(socket.MSG_DONTWAIT)

    def _fill(self, view: memoryview) -> None:
        while view:
            if self._ahead:
                count = min(len(view), len(self._ahead))
                view[:count] = self._ahead[:count]
                self._ahead = self._ahead[count:]
            elif len(view) < AHEAD_BYTES:
                count = 0
                self._ahead = self._lookahead[: self._got(self._sock.recv_into(self._lookahead))]
            else:
                count = self._got(self._sock.recv_into(view, 0, socket.MSG_WAITALL))
            view = view[count:]

    @staticmethod
    def _got(count: int) -> int:
        if count == 0:
            raise ConnectionError("the client closed the connection")
        return count

    def _write(self) -> None:
        """The writer thread: sends what the client did not take at once."""
        while True:
            self._wake_writer.acquire()
            if not self._sending:  # woken by `run`, which waits until nobody sends
                return
            self._drain(0)

    def _drain(self, flags: int) -> None:
        """Send all there is. Enters with `_sending` set for this thread; clears it, or leaves it to the writer."""
        while self._next_batch():
            try:
                self._unsent = unsent(self._unsent, self._sock.sendmsg(self._unsent[:MAX_PARTS], (), flags))
            except BlockingIOError:
                if flags:
                    self._wake_writer.release()
                    return
                self._break(f"the client took no byte for {self._send_timeout_s:g} s")
            except OSError as error:
                self._break(f"sending failed: {error.strerror}")

    def _next_batch(self) -> bool:
        """Whether there is something to send. Without, `_sending` is cleared."""
        if self._unsent:
            return True
        for reply in self._batch:
            if reply.buffer is not None:
                self._buffers.give(reply.buffer)
        if self._batch:
            self._in_flight.sent(sum(reply.cost for reply in self._batch))
            self._batch = []
        with self._changed:
            if not self._outgoing or self._closed:
                self._sending = False
                self._changed.notify_all()
                return False
            length = 0
            while self._outgoing and length < BATCH_BYTES and len(self._unsent) < BATCH_PARTS:
                reply = self._outgoing.popleft()
                self._batch.append(reply)
                self._unsent += map(memoryview, reply.parts)
                length += reply.cost
        return True

    def _break(self, reason: str) -> None:
        """By the sender: part of a reply may be out, so nothing can follow it. Wakes the reader, which ends it all."""
        with self._changed:
            self._broken = self._broken or reason
            self._closed = True
            self._unsent = []
            self._batch = []
        self._in_flight.close()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _close(self) -> None:
        """By the reader: no reply is begun any more, and a sender that waits for the client is woken."""
        with self._changed:
            self._closed = True
            self._outgoing.clear()
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._sending)
