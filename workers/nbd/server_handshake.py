"""The server's side of the handshake: greet, TLS, answer options, until one opens an export.

    ┌── EXPORT_NAME, GO ──▶ Agreed (transmission)
    ├── ABORT ────────────▶ None
    ├── broken protocol ──▶ ProtocolError
    └── any other option ─▶ answered, and the next is read

With TLS configured every option but STARTTLS and ABORT is refused before TLS (proto.md, "FORCEDTLS mode").
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.errors import UsageError
from workers.nbd import server_wire, wire
from workers.nbd.served import LayeredDisk, ServedDisk, WritableDisk
from workers.nbd.wire import (
    ALLOCATION_CONTEXT,
    DEPTH_CONTEXT,
    BlockSizes,
    HandshakeFlag,
    Info,
    Option,
    OptionReplyKind,
    ProtocolError,
    TransmissionFlag,
)

ALLOCATION_ID = 1
"""The id of base:allocation in block status."""
DEPTH_ID = 2
"""And that of qemu:allocation-depth."""
_READ_ONLY_FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.CAN_MULTI_CONN
_WRITABLE_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_FAST_ZERO
    | TransmissionFlag.CAN_MULTI_CONN
)
_SKIP_BYTES = 64 * 1024


@dataclass(frozen=True)
class ServerTls:
    """`certificates` is a directory with server-cert.pem and server-key.pem, as QEMU and nbdkit name them.

    With `demand_client_certificates` a client has to show one that ca-cert.pem of the directory has signed.
    """

    certificates: str
    demand_client_certificates: bool = False


def tls_context(tls: ServerTls) -> ssl.SSLContext:
    """UsageError if a file is missing or unusable."""
    directory = Path(tls.certificates)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(directory / "server-cert.pem", directory / "server-key.pem")
        if tls.demand_client_certificates:
            context.load_verify_locations(directory / "ca-cert.pem")
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise UsageError(
            f"the TLS certificates in {directory} cannot be used: {error.strerror or error}",
            "It must hold server-cert.pem and server-key.pem, and ca-cert.pem if clients shall show certificates",
        ) from error
    return context


@dataclass(frozen=True, slots=True)
class Agreed:
    """What a client has opened, and how it is to be answered. `structured` and `contexts` are its choices."""

    export: str
    disk: ServedDisk
    structured: bool
    contexts: tuple[int, ...]
    """Ids of the meta contexts that every block status is told by."""

    @property
    def writable(self) -> WritableDisk | None:
        """The disk, if this client may write to it."""
        return _writable(self.disk)

    @property
    def transmission_flags(self) -> TransmissionFlag:
        flags = _READ_ONLY_FLAGS if self.writable is None else _WRITABLE_FLAGS
        return flags | TransmissionFlag.SEND_DF if self.structured else flags


def _writable(disk: ServedDisk) -> WritableDisk | None:
    return disk if isinstance(disk, WritableDisk) and not disk.read_only else None


class _OptionRefusedError(Exception):
    """An option that is answered with an error, after which the next may come."""

    def __init__(self, kind: OptionReplyKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class Haggle:
    """The handshake with one client on `sock`, which becomes an SSLSocket on the way if TLS is agreed on.

    All of it has to be over `timeout_s` after it began, however it is drawn out.
    """

    def __init__(
        self,
        sock: socket.socket,
        exports: Mapping[str, ServedDisk],
        tls: ssl.SSLContext | None,
        timeout_s: float,
    ) -> None:
        self.sock = sock
        """The caller's to close, whatever happens."""
        self._exports = exports
        self._tls = tls
        self._deadline = time.monotonic() + timeout_s
        self._structured = False
        self._no_zeroes = False
        self._contexts: tuple[str, tuple[int, ...]] = ("", ())
        """Which were set for an export: they hold for no other (proto.md, NBD_OPT_SET_META_CONTEXT)."""

    def run(self) -> Agreed | None:
        """None if the client leaves politely. Raises ProtocolError, TimeoutError or another OSError."""
        self._send(server_wire.GREETING)
        flags = server_wire.parse_client_flags(self._receive(wire.CLIENT_FLAGS.size))
        self._no_zeroes = HandshakeFlag.NO_ZEROES in flags
        while True:
            option, length = server_wire.parse_option(self._receive(wire.OPTION.size))
            if option == Option.EXPORT_NAME:
                return self._open_by_name(length)
            try:
                agreed = self._take_option(option, self._data(length))
            except _OptionRefusedError as refused:
                self._send(server_wire.encode_option_error(option, refused.kind, refused.message))
                continue
            except ProtocolError as error:
                self._send(server_wire.encode_option_error(option, OptionReplyKind.ERR_INVALID, error.message))
                continue
            self._answer(option, OptionReplyKind.ACK)
            if option == Option.STARTTLS:
                self._start_tls()
            if option == Option.ABORT:
                return None
            if agreed is not None:
                return agreed

    def _open_by_name(self, length: int) -> Agreed:
        """NBD_OPT_EXPORT_NAME, which has no answer for "no": the connection ends instead."""
        if self._needs_tls():
            raise ProtocolError("the client opened an export without TLS")
        if length > wire.MAX_STRING_BYTES:
            raise ProtocolError(f"an export name of {length} bytes")
        name = wire.text(self._receive(length), "an export name")
        if name not in self._exports:
            raise ProtocolError(f"the client opened the export {name!r}, which there is not")
        agreed = self._agreed(name)
        head = wire.EXPORT_NAME_ANSWER.pack(agreed.disk.size, agreed.transmission_flags)
        self._send(head if self._no_zeroes else head + wire.EXPORT_NAME_ZEROES)
        return agreed

    def _take_option(self, option: int, data: bytes) -> Agreed | None:
        """Answer all of an option but its last ACK, which is due if this returns."""
        if option == Option.ABORT:
            return None
        if option == Option.STARTTLS:
            self._check_tls_can_start(data)
            return None
        if self._needs_tls():
            raise _OptionRefusedError(OptionReplyKind.ERR_TLS_REQD, "this server demands TLS")
        if option == Option.LIST:
            self._list(data)
        elif option == Option.STRUCTURED_REPLY:
            _check_empty(data)
            self._structured = True
        elif option in (Option.GO, Option.INFO):
            agreed = self._inform(option, data)
            return agreed if option == Option.GO else None
        elif option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            self._meta_contexts(option, data)
        else:
            raise _OptionRefusedError(OptionReplyKind.ERR_UNSUP, f"option {option} is not supported")
        return None

    def _needs_tls(self) -> bool:
        return self._tls is not None and not isinstance(self.sock, ssl.SSLSocket)

    def _check_tls_can_start(self, data: bytes) -> None:
        _check_empty(data)
        if self._tls is None:
            raise _OptionRefusedError(OptionReplyKind.ERR_POLICY, "this server has no TLS")
        if isinstance(self.sock, ssl.SSLSocket):
            raise _OptionRefusedError(OptionReplyKind.ERR_INVALID, "TLS has been started already")

    def _start_tls(self) -> None:
        """No byte was read ahead, so none sent in the clear can slip in behind the client's certificate."""
        assert self._tls is not None
        self.sock = self._tls.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        self.sock.settimeout(self._left_s())
        self.sock.do_handshake()  # the timeout bounds all of it

    def _list(self, data: bytes) -> None:
        _check_empty(data)
        for name in self._exports:
            self._answer(Option.LIST, OptionReplyKind.SERVER, wire.encode_string(name))

    def _inform(self, option: int, data: bytes) -> Agreed:
        """The block sizes are told unasked, as QEMU does: a client may ignore what it does not want to know."""
        asked = server_wire.parse_go(data)
        agreed = self._agreed(self._known(asked.export))
        sizes = BlockSizes(minimum=1, preferred=agreed.disk.preferred_block)
        infos = [
            server_wire.encode_export_info(agreed.disk.size, agreed.transmission_flags),
            server_wire.encode_block_size_info(sizes),
        ]
        if Info.NAME in asked.infos:
            infos.append(server_wire.encode_name_info(asked.export))
        for info in infos:
            self._answer(option, OptionReplyKind.INFO, info)
        return agreed

    def _meta_contexts(self, option: int, data: bytes) -> None:
        """A SET replaces what was set before even if it fails."""
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._contexts = ("", ())
        if not self._structured:
            raise _OptionRefusedError(OptionReplyKind.ERR_INVALID, "meta contexts need structured replies")
        asked = server_wire.parse_meta_contexts(data)
        offered = _offered(self._exports[self._known(asked.export)])
        chosen = {name: number for name, number in offered.items() if _is_asked(name, asked.queries, setting=setting)}
        if setting:
            self._contexts = (asked.export, tuple(chosen.values()))
        for name, number in chosen.items():
            payload = server_wire.encode_meta_context(number if setting else 0, name)
            self._answer(option, OptionReplyKind.META_CONTEXT, payload)

    def _known(self, export: str) -> str:
        if export not in self._exports:
            raise _OptionRefusedError(OptionReplyKind.ERR_UNKNOWN, f"there is no export {export!r}")
        return export

    def _agreed(self, export: str) -> Agreed:
        of, contexts = self._contexts
        return Agreed(export, self._exports[export], self._structured, contexts if of == export else ())

    def _data(self, length: int) -> bytes:
        if length <= server_wire.MAX_OPTION_BYTES:
            return self._receive(length)
        while length:
            length -= len(self._receive(min(length, _SKIP_BYTES)))
        raise _OptionRefusedError(
            OptionReplyKind.ERR_TOO_BIG, f"an option may have {server_wire.MAX_OPTION_BYTES} bytes"
        )

    def _answer(self, option: int, kind: OptionReplyKind, payload: bytes = b"") -> None:
        self._send(server_wire.encode_option_reply(option, kind, payload))

    def _send(self, data: bytes) -> None:
        self.sock.settimeout(self._left_s())
        self.sock.sendall(data)

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self.sock.settimeout(self._left_s())
            got = self.sock.recv(length - len(data))
            if not got:
                raise ConnectionError("the client closed the connection")
            data += got
        return bytes(data)

    def _left_s(self) -> float:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


def _offered(disk: ServedDisk) -> dict[str, int]:
    """Meta contexts by name, with their ids."""
    depth = {DEPTH_CONTEXT: DEPTH_ID} if isinstance(disk, LayeredDisk) else {}
    return {ALLOCATION_CONTEXT: ALLOCATION_ID, **depth}


def _is_asked(name: str, queries: Sequence[str], *, setting: bool) -> bool:
    """Set by its whole name alone; listed by that, by its namespace, and where nothing is asked for."""
    if setting:
        return name in queries
    return not queries or name in queries or f"{name.partition(':')[0]}:" in queries


def _check_empty(data: bytes) -> None:
    if data:
        raise ProtocolError(f"{len(data)} bytes of data with an option that has none")
