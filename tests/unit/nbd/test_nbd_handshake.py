"""Before an export stands: what a server may answer, and what the operator is told about it."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_server import Peer, answer, greet, receive_option, serve_once

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError, UsageError
from workers.nbd import wire
from workers.nbd.connection import connect, list_exports
from workers.nbd.endpoint import Endpoint, Tls
from workers.nbd.wire import ExportInfo, Option, OptionReplyKind

INFO_EXPORT = wire.INFO_EXPORT.pack(wire.Info.EXPORT, 4096, 1)


def endpoint(path: Path, tls: Tls | None = None) -> Endpoint:
    return Endpoint(None, 0, str(path), "disk", tls)


def refuse(kind: OptionReplyKind) -> Callable[[Peer], None]:
    """A server that answers GO with an error and lists two exports."""

    def play(peer: Peer) -> None:
        greet(peer)
        while True:
            option, _ = receive_option(peer)
            if option == Option.GO:
                answer(peer, option, kind, b"because")
            elif option == Option.LIST:
                for name in ("vda", "vdb"):
                    answer(peer, option, OptionReplyKind.SERVER, wire.encode_string(name) + b"a disk")
                answer(peer, option, OptionReplyKind.ACK)
            else:
                answer(peer, option, OptionReplyKind.ERR_UNSUP)

    return play


def greet_and_fall_silent(peer: Peer) -> None:
    greet(peer)
    while True:  # until the client gives up
        peer.receive(1)


@pytest.mark.parametrize(
    ("play", "error", "message"),
    [
        (lambda peer: peer.sock.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"), RefusedError, "does not greet"),
        (
            lambda peer: peer.sock.sendall(wire.GREETING.pack(wire.NBDMAGIC, wire.OLDSTYLE_MAGIC, 0)),
            RefusedError,
            "old-style",
        ),
        (lambda peer: None, UnavailableError, "closed the connection"),
        (lambda peer: peer.receive(1), UnavailableError, "sent no NBD greeting.*--shared=0"),
        (greet_and_fall_silent, UnavailableError, "did not answer within"),
        (refuse(OptionReplyKind.ERR_UNKNOWN), NotFoundError, "no export 'disk'.*It has 'vda', 'vdb'"),
        (refuse(OptionReplyKind.ERR_TLS_REQD), RefusedError, "nbds://"),
        (refuse(OptionReplyKind.ERR_SHUTDOWN), UnavailableError, "shutting down"),
        (refuse(OptionReplyKind.ERR_POLICY), RefusedError, "ERR_POLICY .because"),
        (refuse(OptionReplyKind.ERR_UNSUP), RefusedError, "NBD_OPT_GO"),
    ],
)
def test_a_refusal_says_why_and_what_to_do(
    tmp_path: Path, play: Callable[[Peer], None], error: type[FlushpointError], message: str
) -> None:
    server = serve_once(tmp_path / "s", play)
    with pytest.raises(error, match=message):
        connect(endpoint(tmp_path / "s"), timeout_s=0.3)
    server.join()


def drip_answers(peer: Peer) -> None:
    """For 6 seconds; each of them would satisfy any timeout of one step."""
    greet(peer)
    option, _ = receive_option(peer)
    for _ in range(60):
        if peer.silent(0.1):
            answer(peer, option, OptionReplyKind.INFO, struct.pack(">H", 99))


def drip_bytes(peer: Peer) -> None:
    greet(peer)
    option, _ = receive_option(peer)
    for byte in wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, OptionReplyKind.ACK, 0):
        if peer.silent(0.15):
            peer.sock.sendall(bytes([byte]))


@pytest.mark.parametrize("play", [drip_answers, drip_bytes])
def test_a_server_that_drips_its_handshake_is_given_up_in_time(tmp_path: Path, play: Callable[[Peer], None]) -> None:
    server = serve_once(tmp_path / "s", play)
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="did not answer within"):
        connect(endpoint(tmp_path / "s"), timeout_s=0.3, structured=False)
    assert time.monotonic() - begun < 2  # byte by byte one answer takes 3 s
    server.join()


def test_a_server_without_tls_is_refused_when_tls_was_asked_for(tmp_path: Path) -> None:
    server = serve_once(tmp_path / "s", refuse(OptionReplyKind.ERR_UNKNOWN))
    with pytest.raises(RefusedError, match="does not offer TLS"):
        connect(endpoint(tmp_path / "s", Tls()), timeout_s=1)
    server.join()


def test_unusable_certificates_are_named(tmp_path: Path) -> None:
    def play(peer: Peer) -> None:
        greet(peer)
        answer(peer, receive_option(peer)[0], OptionReplyKind.ACK)
        peer.receive(1)

    server = serve_once(tmp_path / "s", play)
    with pytest.raises(UsageError, match=r"ca-cert\.pem"):
        connect(endpoint(tmp_path / "s", Tls(certificates=str(tmp_path))), timeout_s=1)
    server.join()


@pytest.mark.parametrize("target", [Endpoint(None, 0, "/nonexistent/s", "x"), Endpoint("127.0.0.1", 1, None, "x")])
def test_nothing_that_listens_is_unavailable(target: Endpoint) -> None:
    with pytest.raises(UnavailableError, match="nothing answers"):
        connect(target, timeout_s=1)


def test_contexts_that_are_not_granted_are_left_to_the_caller(tmp_path: Path) -> None:
    asked: list[bytes] = []

    def play(peer: Peer) -> None:
        greet(peer)
        while True:
            option, data = receive_option(peer)
            if option == Option.SET_META_CONTEXT:
                asked.append(data)
                answer(peer, option, OptionReplyKind.META_CONTEXT, wire.LENGTH.pack(5) + b"base:allocation")
            elif option == Option.GO:
                answer(peer, option, OptionReplyKind.INFO, wire.INFO_KIND.pack(wire.Info.DESCRIPTION) + b"text")
                answer(peer, option, OptionReplyKind.INFO, INFO_EXPORT)
                answer(peer, option, OptionReplyKind.ACK)
                return
            answer(peer, option, OptionReplyKind.ACK)

    server = serve_once(tmp_path / "s", play)
    contexts = ("base:allocation", "qemu:dirty-bitmap:b")
    with connect(endpoint(tmp_path / "s"), contexts=contexts, timeout_s=1) as connection:
        assert connection.contexts == {"base:allocation"}
        assert connection.size == 4096
    server.join()
    assert asked == [wire.encode_meta_contexts("disk", contexts)]


def test_exports_are_listed_with_their_descriptions(tmp_path: Path) -> None:
    server = serve_once(tmp_path / "s", refuse(OptionReplyKind.ERR_UNKNOWN))
    assert list_exports(endpoint(tmp_path / "s"), timeout_s=1) == [
        ExportInfo("vda", "a disk"),
        ExportInfo("vdb", "a disk"),
    ]
    server.join()


REPLIES = st.builds(
    lambda option, kind, payload: wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload,
    st.sampled_from([Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.GO, Option.LIST]),
    st.sampled_from([*OptionReplyKind, 0, 99]),
    st.binary(max_size=30) | st.just(INFO_EXPORT),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.binary(max_size=60) | st.lists(REPLIES, max_size=6).map(b"".join))
def test_an_arbitrary_handshake_raises_nothing_but_our_errors(tmp_path: Path, script: bytes) -> None:
    path = tmp_path / "s"
    path.unlink(missing_ok=True)

    def play(peer: Peer) -> None:
        greet(peer)
        peer.sock.sendall(script)

    server = serve_once(path, play)
    with suppress(FlushpointError):
        connect(endpoint(path), contexts=["base:allocation"], timeout_s=1).close()
    server.join()
