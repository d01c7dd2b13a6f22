"""The client's side of NBD, played by a test byte by byte, to say what our own client never would."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from workers.nbd import wire
from workers.nbd.endpoint import Endpoint
from workers.nbd.served import ServedDisk
from workers.nbd.server import Server, listen
from workers.nbd.server_connection import Limits
from workers.nbd.server_handshake import ServerTls
from workers.nbd.wire import ChunkKind, Command, HandshakeFlag, Option, OptionReplyKind

WAIT_S = 10.0
"""Far longer than anything here takes; a test that waits so long has failed."""
BOTH_FLAGS = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES


def unix(directory: Path, export: str = "disk") -> Endpoint:
    """Where a test's server listens."""
    return Endpoint(None, 0, str(directory / "served.sock"), export)


@contextmanager
def serving(
    endpoint: Endpoint, *disks: ServedDisk, tls: ServerTls | None = None, limits: Limits | None = None
) -> Iterator[Server]:
    """The first disk under the endpoint's name, the others as "1", "2", …"""
    exports = {endpoint.export: disks[0]} | {str(at): disk for at, disk in enumerate(disks) if at}
    with Server(exports, listen(endpoint), tls, limits) as server:
        yield server


@dataclass
class Answer:
    """A whole answer: NBD's error number, the data by offset, the holes, the descriptors of block status."""

    error: int = 0
    message: str = ""
    data: dict[int, bytes] = field(default_factory=dict)
    holes: list[tuple[int, int]] = field(default_factory=list)
    status: list[tuple[int, int]] = field(default_factory=list)
    chunks: int = 0

    @property
    def errno(self) -> int:
        return wire.posix_errno(self.error) if self.error else 0


class RawClient:
    """One connection; everything blocks for at most WAIT_S."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.export = endpoint.export
        self.structured = False
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT_S)
        assert endpoint.socket_path is not None
        try:
            self.sock.connect(endpoint.socket_path)
        except OSError:
            self.sock.close()
            raise
        self._cookie = 0
        self._lengths: dict[int, int] = {}

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            got = self.sock.recv(length - len(data))
            if not got:
                raise EOFError
            data += got
        return data

    def is_closed(self) -> bool:
        """Whether the server closes the connection without saying more."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def drain(self) -> int:
        """How many bytes come before the server closes the connection."""
        count = 0
        while True:
            try:
                got = len(self.sock.recv(1 << 16))
            except ConnectionResetError:
                return count
            if not got:
                return count
            count += got

    def greet(self, flags: int = BOTH_FLAGS) -> None:
        assert wire.parse_greeting(self.receive(wire.GREETING.size)) == BOTH_FLAGS
        self.sock.sendall(wire.CLIENT_FLAGS.pack(flags))

    def start_tls(self, context: ssl.SSLContext) -> RawClient:
        """To be called once greeted."""
        assert self.kinds(Option.STARTTLS) == [OptionReplyKind.ACK]
        self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        return self

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """(kind, payload) of every answer."""
        self.sock.sendall(wire.OPTION.pack(wire.IHAVEOPT, option, len(data)) + data)
        answers: list[tuple[int, bytes]] = []
        while not answers or not (answers[-1][0] == OptionReplyKind.ACK or answers[-1][0] & 1 << 31):
            magic, answered, kind, length = wire.OPTION_REPLY.unpack(self.receive(wire.OPTION_REPLY.size))
            assert (magic, answered) == (wire.OPTION_REPLY_MAGIC, option)
            answers.append((kind, self.receive(length)))
        return answers

    def kinds(self, option: int, data: bytes = b"") -> list[int]:
        return [kind for kind, _ in self.option(option, data)]

    def go(self, *, structured: bool = True, contexts: tuple[str, ...] = ("base:allocation",)) -> RawClient:
        """From the greeting to transmission."""
        self.greet()
        return self.open(structured=structured, contexts=contexts)

    def open(self, *, structured: bool = True, contexts: tuple[str, ...] = ("base:allocation",)) -> RawClient:
        """From there to transmission."""
        if structured:
            assert self.kinds(Option.STRUCTURED_REPLY) == [OptionReplyKind.ACK]
            self.option(Option.SET_META_CONTEXT, wire.encode_meta_contexts(self.export, contexts))
        self.structured = structured
        assert self.kinds(Option.GO, wire.encode_go(self.export, ()))[-1] == OptionReplyKind.ACK
        return self

    def send(self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0) -> int:
        """A request; returns its cookie."""
        self._cookie += 1
        self._lengths[self._cookie] = length if command == Command.READ else 0
        self.sock.sendall(wire.encode_request(flags, command, self._cookie, offset, length) + payload)
        return self._cookie

    def ask(self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0) -> Answer:
        """A request and its answer, no other being in flight."""
        cookie = self.send(command, offset, length, payload, flags)
        answered, answer = self.answer()
        assert answered == cookie
        return answer

    def answer(self) -> tuple[int, Answer]:
        """The cookie of the next request to be answered, and its whole answer. Chunks must not be interleaved."""
        answer = Answer()
        while True:
            head = self.receive(wire.REPLY_HEAD_BYTES)
            magic, flags, kind, cookie = wire.CHUNK_HEAD.unpack(head)
            if magic == wire.SIMPLE_REPLY_MAGIC:
                _, answer.error, _ = wire.SIMPLE_REPLY.unpack(head)
                if not self.structured and not answer.error:
                    answer.data[0] = self.receive(self._lengths[cookie])
                return cookie, answer
            assert magic == wire.CHUNK_MAGIC
            assert self.structured
            self._chunk(answer, kind)
            if flags & wire.CHUNK_DONE:
                return cookie, answer

    def _chunk(self, answer: Answer, kind: int) -> None:
        (length,) = wire.CHUNK_LENGTH.unpack(self.receive(wire.CHUNK_LENGTH.size))
        payload = self.receive(length)
        answer.chunks += 1
        if kind == ChunkKind.OFFSET_DATA:
            (offset,) = wire.OFFSET.unpack_from(payload)
            answer.data[offset] = payload[wire.OFFSET.size :]
        elif kind == ChunkKind.OFFSET_HOLE:
            answer.holes.append(wire.parse_hole(payload))
        elif kind == ChunkKind.BLOCK_STATUS:
            _, answer.status = wire.parse_block_status(payload)
        elif kind & wire.CHUNK_IS_ERROR:
            answer.error, _ = wire.ERROR_HEAD.unpack_from(payload)
            answer.message = wire.parse_error_chunk(kind, payload).message
        else:
            assert (kind, payload) == (ChunkKind.NONE, b"")


def is_served(endpoint: Endpoint) -> bool:
    """Whether a new client can open the export and use it."""
    with RawClient(endpoint) as client:
        return client.go().ask(Command.FLUSH).errno == 0
