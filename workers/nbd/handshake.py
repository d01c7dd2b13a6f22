"""From nothing to an export that can be used: connect, greet, TLS, options (proto.md, "Newstyle negotiation")."""

from __future__ import annotations

import math
import socket
import ssl
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError, UsageError
from workers.nbd import wire
from workers.nbd.endpoint import Endpoint
from workers.nbd.export import Opened
from workers.nbd.wire import BlockSizes, ExportInfo, ExportSize, Option, OptionReplyKind, ProtocolError

MAX_OPTION_REPLIES = 65536
"""Answers to one option; more exports than that on one server is a peer that never stops."""
UNIX_BUFFER_BYTES = 2 * 1024 * 1024
"""A unix socket's default (208 KiB) holds a fifth of a 1 MiB request; the kernel caps this at wmem_max. TCP sizes its
own buffers, and setting them would switch that off."""
KEEPALIVE_IDLE_S = 20
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
DROP_UNSENT = struct.pack("ii", 1, 0)
"""SO_LINGER of zero: when a mover is killed because its lease has ended, the kernel must not go on delivering its
queued writes, which may be older than the next holder's (DESIGN, "Fencing writes")."""
DELIVER_UNSENT = struct.pack("ii", 0, 0)


@dataclass(frozen=True)
class Negotiated:
    """A connected socket in transmission phase and what server and client agreed on."""

    sock: socket.socket
    opened: Opened


GREETING_TIMEOUT_S = 10.0
"""An NBD server speaks first, and at once: what stays silent is another server, or one that is full."""


def negotiate(endpoint: Endpoint, contexts: Sequence[str], timeout_s: float, *, structured: bool) -> Negotiated:
    """Open `endpoint`'s export, within `timeout_s` for all of it.

    Errors as in `connection.connect`; the socket is closed on any of them.
    """
    with _haggling(endpoint, timeout_s) as haggle:
        if structured:
            structured = haggle.accepts(Option.STRUCTURED_REPLY)
        context_ids = haggle.set_meta_contexts(contexts) if contexts and structured else {}
        export, blocks = haggle.go()
        opened = Opened(export.size, export.flags, blocks, structured, context_ids)
        return Negotiated(haggle.detach(), opened)


def list_exports(endpoint: Endpoint, timeout_s: float) -> list[ExportInfo]:
    """The exports a server offers; RefusedError if it will not tell."""
    with _haggling(endpoint, timeout_s) as haggle:
        exports = haggle.list_exports()
        haggle.abort()
        return exports


@contextmanager
def _haggling(endpoint: Endpoint, timeout_s: float) -> Iterator[_Haggle]:
    """A greeted server, under TLS if the endpoint asks for it; what goes wrong is said in our own errors."""
    deadline = time.monotonic() + timeout_s
    haggle = _Haggle(endpoint, _connected(endpoint, timeout_s), deadline)
    try:
        try:
            haggle.greet()
        except TimeoutError as error:
            raise UnavailableError(
                f"{endpoint} accepted the connection but sent no NBD greeting",
                "Check that it is an NBD server, and that it lets several clients in (qemu-nbd: --shared=0)",
            ) from error
        if endpoint.tls is not None:
            haggle.start_tls()
        yield haggle
    except ProtocolError as error:
        raise RefusedError(f"{endpoint} cannot be used: {error.message}", "Check that it is an NBD server") from error
    except ssl.SSLError as error:
        raise RefusedError(
            f"the TLS handshake with {endpoint} failed: {error.reason or error}",
            "Check tls-certificates and tls-hostname against the server's certificate",
        ) from error
    except TimeoutError as error:
        raise UnavailableError(f"{endpoint} did not answer within {timeout_s:g} s", "Look at the server") from error
    except OSError as error:
        raise UnavailableError(f"{endpoint} broke off while connecting: {error.strerror or error}") from error
    finally:
        haggle.close()


def _connected(endpoint: Endpoint, timeout_s: float) -> socket.socket:
    try:
        if endpoint.socket_path is None:
            sock = socket.create_connection((endpoint.host, endpoint.port), timeout_s)
            tune_tcp(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, DROP_UNSENT)
            return sock
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(timeout_s)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNIX_BUFFER_BYTES)
            sock.connect(endpoint.socket_path)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as error:
        raise UnavailableError(
            f"nothing answers at {endpoint}: {error.strerror or error}", "Check that the NBD server runs"
        ) from error


def tune_tcp(sock: socket.socket) -> None:
    """No delay for small requests; a dead peer is noticed, also while nothing is sent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def bound_unacknowledged(sock: socket.socket, timeout_s: float) -> None:
    """Let the kernel give up on a peer that acknowledges nothing for so long, also while we only send."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))


def say_goodbye_on_close(sock: socket.socket) -> None:
    """From now on closing delivers what was sent, as an orderly disconnect wants."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, DELIVER_UNSENT)


class _Haggle:
    """Option haggling over one socket, until a monotonic deadline.

    One for all of it: a server that drips, a byte or an answer at a time, would satisfy any timeout of a step.
    """

    def __init__(self, endpoint: Endpoint, sock: socket.socket, deadline: float) -> None:
        self._endpoint = endpoint
        self._sock: socket.socket | None = sock
        self._deadline = deadline

    @property
    def _live(self) -> socket.socket:
        if self._sock is None:
            raise ProtocolError("the handshake is over")
        return self._sock

    def detach(self) -> socket.socket:
        """The socket, which `close` no longer closes."""
        sock = self._live
        self._sock = None
        return sock

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def greet(self) -> None:
        """TimeoutError if the server, which is to speak first, does not."""
        greeted_by = min(self._deadline, time.monotonic() + GREETING_TIMEOUT_S)
        try:
            offered = wire.parse_greeting(self._receive(wire.GREETING.size, greeted_by))
        except ProtocolError as error:
            raise RefusedError(
                f"{self._endpoint} cannot be used: {error.message}", "Check the host, the port and the server"
            ) from error
        flags = wire.HandshakeFlag.FIXED_NEWSTYLE | (offered & wire.HandshakeFlag.NO_ZEROES)
        self._send(wire.CLIENT_FLAGS.pack(flags))

    def start_tls(self) -> None:
        """Before any other option, so that neither names nor errors can be forged by someone in between."""
        kind, message = self._ask(Option.STARTTLS)
        if kind != OptionReplyKind.ACK:
            raise RefusedError(
                f"{self._endpoint} does not offer TLS{_said(message)}", "Use nbd:// if this network can be trusted"
            )
        context = tls_context(self._endpoint)
        plain = self.detach()
        try:
            plain.settimeout(_left(self._deadline))
            self._sock = context.wrap_socket(plain, server_hostname=self._endpoint.server_name)
        finally:
            if self._sock is None:
                plain.close()

    def accepts(self, option: Option) -> bool:
        """True if the server takes an option that has no data; one it may do without."""
        kind, message = self._ask(option)
        self._refuse_if_tls_required(kind, message)
        return kind == OptionReplyKind.ACK

    def set_meta_contexts(self, contexts: Sequence[str]) -> dict[str, int]:
        """Ids of the granted contexts; a server that knows none of them grants none, which is no error here."""
        data = wire.encode_meta_contexts(self._endpoint.export, tuple(contexts))
        granted: dict[str, int] = {}
        for kind, payload in self._answers(Option.SET_META_CONTEXT, data):
            if kind == OptionReplyKind.META_CONTEXT:
                context_id, name = wire.parse_meta_context(payload)
                if name in granted or context_id in granted.values():
                    raise ProtocolError(f"meta context {name!r} was granted twice")
                granted[name] = context_id
            elif kind != OptionReplyKind.ACK:
                self._refuse_if_tls_required(kind, payload)
                return {}
        return granted

    def go(self) -> tuple[ExportSize, BlockSizes]:
        export: ExportSize | None = None
        blocks = BlockSizes()
        for kind, payload in self._answers(Option.GO, wire.encode_go(self._endpoint.export, (wire.Info.BLOCK_SIZE,))):
            if kind == OptionReplyKind.INFO:
                info = wire.parse_info(payload)
                if isinstance(info, ExportSize):
                    export = info
                elif isinstance(info, BlockSizes):
                    blocks = info
            elif kind != OptionReplyKind.ACK:
                raise self._refusal(kind, payload)
        if export is None:
            raise ProtocolError("it opened the export without giving its size")
        return export, blocks

    def list_exports(self) -> list[ExportInfo]:
        exports: list[ExportInfo] = []
        for kind, payload in self._answers(Option.LIST):
            if kind == OptionReplyKind.SERVER:
                exports.append(wire.parse_server(payload))
            elif kind != OptionReplyKind.ACK:
                self._refuse_if_tls_required(kind, payload)
                raise RefusedError(f"{self._endpoint} does not list its exports{_said(payload)}")
        return exports

    def abort(self) -> None:
        """Leave politely; the server may close before we do."""
        with suppress(OSError):
            self._send(wire.encode_option(Option.ABORT))

    def _refusal(self, kind: int, payload: bytes) -> FlushpointError:
        """The error for a server that does not open the export."""
        self._refuse_if_tls_required(kind, payload)
        said = _said(payload)
        if kind == OptionReplyKind.ERR_UNKNOWN:
            return NotFoundError(
                f"there is no export {self._endpoint.export!r} at {self._endpoint}{said}", self._what_there_is()
            )
        if kind == OptionReplyKind.ERR_SHUTDOWN:
            return UnavailableError(f"{self._endpoint} is shutting down{said}")
        if kind == OptionReplyKind.ERR_UNSUP:
            return RefusedError(f"{self._endpoint} does not know NBD_OPT_GO", "Use a server of 2017 or later")
        name = OptionReplyKind(kind).name if kind in set(OptionReplyKind) else hex(kind)
        return RefusedError(f"{self._endpoint} refuses the export with {name}{said}")

    def _what_there_is(self) -> str:
        try:
            names = [repr(export.name) for export in self.list_exports()]
        except (FlushpointError, OSError):  # only a hint: whatever keeps it away must not hide the error itself
            return "The server does not say which exports it has"
        self.abort()
        return f"It has {', '.join(names)}" if names else "It has no exports"

    def _refuse_if_tls_required(self, kind: int, payload: bytes) -> None:
        if kind == OptionReplyKind.ERR_TLS_REQD:
            raise RefusedError(f"{self._endpoint} demands TLS{_said(payload)}", "Use nbds:// or nbds+unix://")

    def _ask(self, option: Option) -> tuple[int, bytes]:
        """The only answer to an option that has one."""
        *_, last = self._answers(option)
        return last

    def _answers(self, option: Option, data: bytes = b"") -> Iterator[tuple[int, bytes]]:
        """(kind, payload) of every answer to `option`, up to and with the ACK or error that is the last."""
        self._send(wire.encode_option(option, data))
        for _ in range(MAX_OPTION_REPLIES):
            kind, length = wire.parse_option_reply(self._receive(wire.OPTION_REPLY.size), option)
            yield kind, self._receive(length)
            if kind == OptionReplyKind.ACK or kind & 1 << 31:
                return
        raise ProtocolError(f"it does not stop answering option {option.name}")

    def _send(self, data: bytes) -> None:
        self._live.settimeout(_left(self._deadline))
        self._live.sendall(data)

    def _receive(self, length: int, deadline: float = math.inf) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._live.settimeout(_left(min(deadline, self._deadline)))
            got = self._live.recv(length - len(data))
            if not got:
                raise ConnectionError("the server closed the connection")
            data += got
        return bytes(data)


def _left(deadline: float) -> float:
    """Seconds until a monotonic deadline; TimeoutError when it is over."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _said(payload: bytes) -> str:
    text = payload.decode(errors="replace").strip()
    return f" ({text})" if text else ""


def tls_context(endpoint: Endpoint) -> ssl.SSLContext:
    """x509, or a pre-shared key where Python's ssl has it. UsageError if a file is missing or unusable."""
    if endpoint.tls is None:
        raise UsageError(f"{endpoint} asks for no TLS", "Use nbds://")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if endpoint.tls.psk_file is not None:
        _use_psk(context, endpoint.tls.psk_file, endpoint.tls.username)
        return context
    if endpoint.tls.certificates is None:
        context.load_default_certs()
        return context
    directory = Path(endpoint.tls.certificates)
    certificate = directory / "client-cert.pem"
    try:
        context.load_verify_locations(directory / "ca-cert.pem")
        if certificate.exists():
            context.load_cert_chain(certificate, directory / "client-key.pem")
    except OSError as error:
        raise UsageError(
            f"the TLS certificates in {directory} cannot be used: {error.strerror or error}",
            "It must hold ca-cert.pem, and client-cert.pem with client-key.pem if the server asks for them",
        ) from error
    return context


def _use_psk(context: ssl.SSLContext, psk_file: str, username: str | None) -> None:
    """Keys as lines of USER:HEX (gnutls psktool). There is no certificate to check: the key vouches for the server."""
    if sys.version_info < (3, 13):
        raise UsageError("TLS with a pre-shared key needs Python 3.13", "Use x509: tls-certificates=DIRECTORY")
    try:
        lines = Path(psk_file).read_text().split()
    except OSError as error:
        raise UsageError(f"the key file {psk_file} cannot be read: {error.strerror}") from error
    keys = dict(line.split(":", 1) for line in lines if ":" in line)
    user = username or next(iter(keys), "")
    if user not in keys:
        raise UsageError(f"the key file {psk_file} has no key for {user!r}", "Set tls-username to a user it has")
    key = bytes.fromhex(keys[user])
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_psk_client_callback(lambda _hint: (user, key))
