"""Options: what is granted, what is refused and how, and that a refusal is not the end."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from raw_client import BOTH_FLAGS, WAIT_S, RawClient, is_served, serving, unix
from served_disks import MemoryDisk

from coordinator.model.errors import NotFoundError, RefusedError, UsageError
from workers.nbd import server_wire, wire
from workers.nbd.connection import connect, list_exports
from workers.nbd.endpoint import Endpoint
from workers.nbd.server_connection import Limits
from workers.nbd.server_handshake import Haggle, ServerTls, tls_context
from workers.nbd.wire import (
    BlockSizes,
    Command,
    ExportSize,
    HandshakeFlag,
    Info,
    Option,
    OptionReplyKind,
    TransmissionFlag,
)

SIZE = 1 << 20
ACK = [OptionReplyKind.ACK]
GO = wire.encode_go("disk", ())


@pytest.fixture
def endpoint(tmpfs_path: Path) -> Iterator[Endpoint]:
    """A writable disk and, as "1", one that is served read-only."""
    endpoint = unix(tmpfs_path)
    with serving(endpoint, MemoryDisk(SIZE, preferred_block=65536), MemoryDisk(2 * SIZE, read_only=True)):
        yield endpoint


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[RawClient]:
    """Greeted."""
    with RawClient(endpoint) as client:
        client.greet()
        yield client


def test_our_client_sees_every_export_as_it_is(endpoint: Endpoint) -> None:
    assert [export.name for export in list_exports(endpoint)] == ["disk", "1"]
    with connect(endpoint, contexts=["base:allocation", "qemu:allocation-depth"]) as disk:
        assert (disk.size, disk.read_only, disk.preferred_block) == (SIZE, False, 65536)
        assert (disk.min_block, disk.max_block) == (1, 32 << 20)
        assert disk.can_flush
        assert disk.can_fua
        assert disk.can_trim
        assert disk.can_zero
        assert disk.can_fast_zero
        assert disk.can_multi_conn
        assert disk.contexts == {"base:allocation"}
    with connect(Endpoint(None, 0, endpoint.socket_path, "1")) as disk:
        assert (disk.size, disk.read_only, disk.can_multi_conn) == (2 * SIZE, True, True)


def test_an_export_that_does_not_exist_is_unknown_and_those_that_do_are_told(endpoint: Endpoint) -> None:
    with pytest.raises(NotFoundError, match=r"'absent'.*'disk', '1'"):
        connect(Endpoint(None, 0, endpoint.socket_path, "absent"))


def test_options_are_refused_one_by_one_and_the_handshake_goes_on(client: RawClient) -> None:
    unknown = wire.encode_go("absent", ())
    assert client.kinds(99, b"whatever") == [OptionReplyKind.ERR_UNSUP]
    assert client.kinds(Option.GO, unknown) == [OptionReplyKind.ERR_UNKNOWN]
    assert client.kinds(Option.INFO, unknown) == [OptionReplyKind.ERR_UNKNOWN]
    assert client.kinds(Option.LIST, b"x") == [OptionReplyKind.ERR_INVALID]
    assert client.kinds(Option.STRUCTURED_REPLY, b"x") == [OptionReplyKind.ERR_INVALID]
    assert client.kinds(Option.GO, b"\xff\xff\xff\xff") == [OptionReplyKind.ERR_INVALID]
    assert client.kinds(Option.GO, GO[:-1]) == [OptionReplyKind.ERR_INVALID]
    assert client.kinds(Option.STARTTLS) == [OptionReplyKind.ERR_POLICY]
    assert client.kinds(Option.GO, bytes(server_wire.MAX_OPTION_BYTES + 1)) == [OptionReplyKind.ERR_TOO_BIG]
    assert client.kinds(Option.GO, GO)[-1:] == ACK
    assert client.ask(Command.READ, 0, 512).data == {0: bytes(512)}


def test_info_tells_what_go_would_and_opens_nothing(client: RawClient) -> None:
    data = wire.encode_go("disk", (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE))
    infos = [payload for kind, payload in client.option(Option.INFO, data) if kind == OptionReplyKind.INFO]
    told = [wire.parse_info(payload) for payload in infos]
    assert BlockSizes(1, 65536, 32 << 20) in told
    assert any(isinstance(info, ExportSize) and info.size == SIZE for info in told)
    assert struct.pack(">H", Info.NAME) + b"disk" in infos
    assert client.kinds(Option.LIST) == [OptionReplyKind.SERVER, OptionReplyKind.SERVER, *ACK]


def test_dont_fragment_is_offered_with_structured_replies_only(client: RawClient) -> None:
    def flags() -> int:
        told = [wire.parse_info(payload) for kind, payload in client.option(Option.INFO, GO) if payload]
        (export,) = (info for info in told if isinstance(info, ExportSize))
        return export.flags & TransmissionFlag.SEND_DF

    assert not flags()
    client.kinds(Option.STRUCTURED_REPLY)
    assert flags()


@pytest.mark.parametrize(("flags", "zeroes"), [(BOTH_FLAGS, 0), (HandshakeFlag.FIXED_NEWSTYLE, 124)])
def test_export_name_opens_with_zeroes_unless_they_are_not_wanted(endpoint: Endpoint, flags: int, zeroes: int) -> None:
    with RawClient(endpoint) as client:
        client.greet(flags)
        client.sock.sendall(wire.OPTION.pack(wire.IHAVEOPT, Option.EXPORT_NAME, 4) + b"disk")
        size, _ = wire.EXPORT_NAME_ANSWER.unpack(client.receive(wire.EXPORT_NAME_ANSWER.size))
        assert size == SIZE
        assert client.receive(zeroes) == bytes(zeroes)
        assert client.ask(Command.READ, 0, 512).data == {0: bytes(512)}


@pytest.mark.parametrize("name", [b"absent", b"\xff\xfe", bytes(5000)])
def test_export_name_of_what_there_is_not_ends_the_connection(client: RawClient, name: bytes) -> None:
    client.sock.sendall(wire.OPTION.pack(wire.IHAVEOPT, Option.EXPORT_NAME, len(name)) + name)
    assert client.is_closed()


@pytest.mark.parametrize("flags", [0, HandshakeFlag.NO_ZEROES, BOTH_FLAGS | 4, 0xFFFFFFFF])
def test_client_flags_that_were_not_offered_or_no_fixed_newstyle_end_the_connection(
    endpoint: Endpoint, flags: int
) -> None:
    with RawClient(endpoint) as client:
        client.greet(flags)
        assert client.is_closed()
    assert is_served(endpoint)


def test_what_is_no_option_ends_the_connection_alone(endpoint: Endpoint, client: RawClient) -> None:
    with RawClient(endpoint) as other:
        other.go()
        client.sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert client.is_closed()
        assert other.ask(Command.READ, 0, 512).errno == 0


def test_abort_is_acknowledged_and_ends_the_connection(client: RawClient) -> None:
    assert client.kinds(Option.ABORT, b"ignored") == ACK
    assert client.is_closed()


def query(client: RawClient, option: Option, *queries: str, export: str = "disk") -> list[int]:
    return client.kinds(option, wire.encode_meta_contexts(export, queries))


def test_meta_contexts_need_structured_replies(client: RawClient) -> None:
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        assert query(client, option, "base:allocation") == [OptionReplyKind.ERR_INVALID]


def test_meta_contexts_are_listed_without_a_query_and_set_by_their_whole_name(client: RawClient) -> None:
    granted = [OptionReplyKind.META_CONTEXT, *ACK]
    client.kinds(Option.STRUCTURED_REPLY)
    for queries in [(), ("base:",), ("base:allocation",), ("x:", "base:")]:
        assert query(client, Option.LIST_META_CONTEXT, *queries) == granted
    assert query(client, Option.LIST_META_CONTEXT, "qemu:") == ACK
    for queries in [(), ("base:",), ("base:allocation2",), ("qemu:dirty-bitmap:b",)]:
        assert query(client, Option.SET_META_CONTEXT, *queries) == ACK
    assert query(client, Option.SET_META_CONTEXT, "qemu:", "base:allocation") == granted
    assert query(client, Option.SET_META_CONTEXT, export="absent") == [OptionReplyKind.ERR_UNKNOWN]


@pytest.mark.parametrize(
    "last",
    [
        wire.encode_meta_contexts("disk", ()),
        wire.encode_meta_contexts("1", ("base:allocation",)),
        wire.encode_meta_contexts("absent", ()),
        b"rubbish",
    ],
)
def test_only_the_last_set_counts_and_for_its_own_export(client: RawClient, last: bytes) -> None:
    client.structured = True
    client.kinds(Option.STRUCTURED_REPLY)
    query(client, Option.SET_META_CONTEXT, "base:allocation")
    client.option(Option.SET_META_CONTEXT, last)
    client.option(Option.GO, GO)
    assert client.ask(Command.BLOCK_STATUS, 0, 512).error == 22


@pytest.mark.parametrize("drip", [b"", wire.CLIENT_FLAGS.pack(BOTH_FLAGS)])
def test_a_client_that_is_silent_or_slow_in_the_handshake_is_dropped(tmpfs_path: Path, drip: bytes) -> None:
    endpoint = unix(tmpfs_path)
    with (
        serving(endpoint, MemoryDisk(SIZE), limits=Limits(handshake_timeout_s=0.2)),
        RawClient(endpoint) as other,
        RawClient(endpoint) as client,
    ):
        other.go()
        client.receive(wire.GREETING.size)
        client.sock.sendall(drip)
        assert client.is_closed()
        assert other.ask(Command.READ, 0, 512).errno == 0, "an idle client in transmission is welcome"


def test_bytes_that_come_one_by_one_do_not_prolong_the_handshake() -> None:
    """The deadline is of the whole handshake, not of each receive."""
    ours, theirs = socket.socketpair()
    haggle = Haggle(ours, {}, None, timeout_s=0.3)
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            haggle.run()
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    with ours, theirs:
        thread.start()
        theirs.settimeout(WAIT_S)
        theirs.recv(wire.GREETING.size)
        theirs.sendall(wire.CLIENT_FLAGS.pack(BOTH_FLAGS) + wire.OPTION.pack(wire.IHAVEOPT, Option.GO, 1 << 16))
        while thread.is_alive():
            theirs.sendall(b"x")
            thread.join(0.02)
    assert [type(error) for error in outcome] == [TimeoutError]


def test_a_server_with_tls_refuses_all_but_starttls_before_it(tmpfs_path: Path) -> None:
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    haggle = Haggle(ours, {"disk": MemoryDisk(SIZE)}, context, timeout_s=WAIT_S)
    thread = threading.Thread(target=haggle.run)
    client = RawClient.__new__(RawClient)
    client.sock = theirs
    theirs.settimeout(WAIT_S)
    with ours, theirs:
        thread.start()
        client.greet()
        for option, data in [
            (Option.LIST, b""),
            (Option.GO, GO),
            (Option.INFO, GO),
            (Option.STRUCTURED_REPLY, b""),
            (Option.SET_META_CONTEXT, wire.encode_meta_contexts("disk", ())),
            (99, b""),
        ]:
            assert client.kinds(option, data) == [OptionReplyKind.ERR_TLS_REQD]
        assert client.kinds(Option.STARTTLS, b"x") == [OptionReplyKind.ERR_INVALID]
        assert client.kinds(Option.ABORT) == ACK
        thread.join(WAIT_S)
    assert not thread.is_alive()


def test_certificates_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"server-cert\.pem"):
        tls_context(ServerTls(str(tmp_path)))


def test_our_client_says_that_a_plain_server_has_no_tls(endpoint: Endpoint) -> None:
    with pytest.raises(RefusedError, match="does not offer TLS"):
        connect(Endpoint.parse(f"nbds+unix:///disk?socket={endpoint.socket_path}"))
