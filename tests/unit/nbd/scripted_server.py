"""The server's side of NBD, played by a test: what a peer says, byte by byte, and when."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from workers.nbd import wire
from workers.nbd.connection import Connection
from workers.nbd.endpoint import Endpoint
from workers.nbd.export import Opened
from workers.nbd.handshake import Negotiated
from workers.nbd.wire import BlockSizes, ChunkKind, Command, Option, OptionReplyKind, TransmissionFlag

SIZE = 1 << 30
WRITABLE = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
)
MULTI = WRITABLE | TransmissionFlag.CAN_MULTI_CONN
WAIT_S = 5.0
"""Far longer than anything here takes; a test that waits so long has failed."""


@dataclass(frozen=True)
class Seen:
    """A request as the server received it."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes


class Peer:
    """The server's end of one connection in transmission phase."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        self.sock = sock

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            got = self.sock.recv(length - len(data))
            if not got:
                raise EOFError
            data += got
        return data

    def request(self) -> Seen:
        magic, flags, command, cookie, offset, length = wire.REQUEST.unpack(self.receive(wire.REQUEST.size))
        assert magic == wire.REQUEST_MAGIC
        payload = self.receive(length) if command == Command.WRITE else b""
        return Seen(flags, command, cookie, offset, length, payload)

    def expect(self, command: Command) -> Seen:
        seen = self.request()
        assert seen.command == command
        return seen

    def silent(self, for_s: float = 0.1) -> bool:
        """True if nothing comes in a while: the only way to see that a client waits."""
        self.sock.settimeout(for_s)
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(WAIT_S)

    def simple(self, seen: Seen, error: int = 0, data: bytes = b"") -> None:
        self.sock.sendall(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, seen.cookie) + data)

    def chunk(self, seen: Seen, kind: int, payload: bytes = b"", *, done: bool = True) -> None:
        self.sock.sendall(chunk(seen.cookie, kind, payload, done=done))

    def data(self, seen: Seen, offset: int, data: bytes, *, done: bool = True) -> None:
        self.chunk(seen, ChunkKind.OFFSET_DATA, wire.OFFSET.pack(offset) + data, done=done)

    def close(self) -> None:
        self.sock.close()


def chunk(cookie: int, kind: int, payload: bytes = b"", *, done: bool = True) -> bytes:
    head = wire.CHUNK_HEAD.pack(wire.CHUNK_MAGIC, wire.CHUNK_DONE if done else 0, kind, cookie)
    return head + wire.CHUNK_LENGTH.pack(len(payload)) + payload


def connected(
    *,
    timeout_s: float = WAIT_S,
    structured: bool = True,
    flags: int = WRITABLE,
    max_block: int = wire.DEFAULT_MAX_BLOCK_BYTES,
    contexts: dict[str, int] | None = None,
) -> tuple[Connection, Peer]:
    """A connection past its handshake and the peer it speaks to, over a socket pair."""
    ours, theirs = socket.socketpair()
    opened = Opened(SIZE, flags, BlockSizes(1, 4096, max_block), structured, contexts or {})
    return Connection(Negotiated(ours, opened), Endpoint.parse("nbd://peer/disk"), timeout_s), Peer(theirs)


class ScriptedServer:
    """Listens on a unix socket and takes clients through the handshake; then each is a `Peer` for the test."""

    def __init__(self, path: Path, *, flags: int = MULTI, size: int = SIZE) -> None:
        self.path = path
        self.flags = flags
        self.size = size
        self._peers: SimpleQueue[Peer] = SimpleQueue()
        self._all: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint.parse(f"nbd+unix:///disk?socket={self.path}")

    def peer(self) -> Peer:
        """The next client that has finished its handshake."""
        return self._peers.get(timeout=WAIT_S)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for sock in self._all:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._all.append(sock)
            peer = Peer(sock)
            with suppress(EOFError, OSError):
                self._haggle(peer)
                self._peers.put(peer)

    def _haggle(self, peer: Peer) -> None:
        greet(peer)
        while True:
            option, _ = receive_option(peer)
            if option == Option.GO:
                info = wire.INFO_EXPORT.pack(wire.Info.EXPORT, self.size, self.flags)
                answer(peer, option, OptionReplyKind.INFO, info)
            answer(peer, option, OptionReplyKind.ACK)
            if option == Option.GO:
                return


def greet(peer: Peer) -> None:
    flags = wire.HandshakeFlag.FIXED_NEWSTYLE | wire.HandshakeFlag.NO_ZEROES
    peer.sock.sendall(wire.GREETING.pack(wire.NBDMAGIC, wire.IHAVEOPT, flags))
    peer.receive(wire.CLIENT_FLAGS.size)


def receive_option(peer: Peer) -> tuple[int, bytes]:
    magic, option, length = wire.OPTION.unpack(peer.receive(wire.OPTION.size))
    assert magic == wire.IHAVEOPT
    return option, peer.receive(length)


def answer(peer: Peer, option: int, kind: int, payload: bytes = b"") -> None:
    peer.sock.sendall(wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload)


def serve_once(path: Path, play: Callable[[Peer], None]) -> threading.Thread:
    """One client at `path`, to whom `play` speaks; the thread ends with it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def run() -> None:
        with listener:
            sock, _ = listener.accept()
        with sock, suppress(EOFError, OSError):
            play(Peer(sock))

    thread = threading.Thread(target=run)
    thread.start()
    return thread
