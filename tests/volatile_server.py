"""An NBD server with a volatile cache, which loses writes as a kernel's page cache does.

What was written is read back at once. FLUSH makes it durable; a FLUSH that fails forgets what was dirty: it goes on
being read, is not durable, and only that one FLUSH tells. QEMU over a file behaves like that, but cannot be made to.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from workers.nbd import wire
from workers.nbd.wire import Command, Option, OptionReplyKind, TransmissionFlag

NO_FLUSH = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_WRITE_ZEROES
FLAGS = NO_FLUSH | TransmissionFlag.SEND_FLUSH | TransmissionFlag.CAN_MULTI_CONN
OVERLAP_TIMEOUT_S = 10.0


class VolatileServer:
    """One export of `size` zeroes, over any number of connections. `uri` names it."""

    def __init__(self, path: Path, size: int, flags: int = FLAGS) -> None:
        self.uri = f"nbd+unix:///?socket={path}"
        self.cache = bytearray(size)
        self.durable = bytearray(size)
        self.lost: list[tuple[int, int]] = []
        """(offset, length) of the writes that a failed flush forgot."""
        self.flush_error = 0
        """The errno that the next FLUSH answers, once."""
        self.fail_when: Callable[[list[tuple[int, int]]], bool] = lambda dirty: True
        """The FLUSH that is to fail waits until this is true of what is dirty."""
        self._flags = flags
        self._dirty: list[tuple[int, int]] = []
        self._changed = threading.Condition()
        self._flushing = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in [self._listener, *self._connections]:
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._connections.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), sock:
            if self._greet(sock):
                self._transmit(sock)

    def _greet(self, sock: socket.socket) -> bool:
        def reply(option: int, kind: OptionReplyKind, data: bytes = b"") -> None:
            sock.sendall(wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

        sock.sendall(wire.GREETING.pack(wire.NBDMAGIC, wire.IHAVEOPT, 0b11))
        _received(sock, 4)
        while True:
            _, option, length = wire.OPTION.unpack(_received(sock, wire.OPTION.size))
            _received(sock, length)
            if option == Option.GO:
                reply(option, OptionReplyKind.INFO, wire.INFO_EXPORT.pack(0, len(self.cache), self._flags))
                reply(option, OptionReplyKind.ACK)
                return True
            if option == Option.ABORT:
                return False
            reply(option, OptionReplyKind.ERR_UNSUP)  # simple replies, no block status

    def _transmit(self, sock: socket.socket) -> None:
        while True:
            _, _, command, cookie, offset, length = wire.REQUEST.unpack(_received(sock, wire.REQUEST.size))
            error, data = 0, b""
            if command == Command.DISC:
                return
            if command == Command.READ:
                with self._changed:
                    data = bytes(self.cache[offset : offset + length])
            elif command == Command.WRITE:
                self._write(offset, _received(sock, length))
            elif command == Command.WRITE_ZEROES:
                self._write(offset, bytes(length))
            elif command == Command.FLUSH:
                error = self._flush()
            sock.sendall(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie) + data)

    def _write(self, offset: int, data: bytes) -> None:
        with self._changed:
            self.cache[offset : offset + len(data)] = data
            self._dirty.append((offset, len(data)))
            self._changed.notify_all()

    def _flush(self) -> int:
        with self._flushing, self._changed:
            error, self.flush_error = self.flush_error, 0
            if error:
                self._changed.wait_for(lambda: self.fail_when(self._dirty), OVERLAP_TIMEOUT_S)
                self.lost += self._dirty
            else:
                for offset, length in self._dirty:
                    self.durable[offset : offset + length] = self.cache[offset : offset + length]
            self._dirty = []
            return error


@contextlib.contextmanager
def volatile_server(path: Path, size: int, flags: int = FLAGS) -> Iterator[VolatileServer]:
    server = VolatileServer(path, size, flags)
    try:
        yield server
    finally:
        server.close()


def _received(sock: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return bytes(data)
