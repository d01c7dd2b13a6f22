"""Our server under TLS: the clients it will meet, and what a client may do to it there."""

from __future__ import annotations

import json
import os
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from nbd_servers import MIB, run

from coordinator.model.errors import RefusedError
from tests.unit.nbd.raw_client import WAIT_S, RawClient, serving, unix
from tests.unit.nbd.served_disks import GatedDisk, MemoryDisk
from workers.nbd import wire
from workers.nbd.connection import connect
from workers.nbd.endpoint import Endpoint, Tls
from workers.nbd.server import Server, listen
from workers.nbd.server_connection import Limits
from workers.nbd.server_handshake import ServerTls
from workers.nbd.session import Session
from workers.nbd.wire import Command, Option, OptionReplyKind

pytestmark = pytest.mark.needs("openssl")
SIZE = 64 * MIB
OPEN = GatedDisk.GATED_BYTES


@pytest.fixture
def disk() -> Iterator[GatedDisk]:
    """With some data past the gate."""
    disk = GatedDisk(SIZE)
    disk.fill(OPEN, os.urandom(8 * MIB))
    yield disk
    disk.gate.set()


@pytest.fixture
def image(tmpfs_path: Path) -> Path:
    """A raw file as large as the disk, with other content."""
    image = tmpfs_path / "other.raw"
    image.write_bytes(bytes(5 * MIB) + os.urandom(6 * MIB) + bytes(SIZE - 11 * MIB))
    return image


@pytest.fixture(scope="module")
def client_context(pki: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))
    context.load_cert_chain(pki / "client-cert.pem", pki / "client-key.pem")
    return context


@contextmanager
def encrypted(pki: Path, disk: MemoryDisk, *, demand: bool = True) -> Iterator[Endpoint]:
    """The disk, over TCP."""
    listener = listen(Endpoint("127.0.0.1", 0, None, ""))
    port = listener.getsockname()[1]
    with Server({"disk": disk}, listener, ServerTls(str(pki), demand_client_certificates=demand)):
        yield Endpoint("127.0.0.1", port, None, "disk", Tls(certificates=str(pki)))


@pytest.mark.parametrize("demand", [True, False])
def test_our_own_client_uses_us_encrypted(pki: Path, disk: GatedDisk, demand: bool) -> None:
    disk.gate.set()
    expected = bytearray(disk.content)

    def use(at: int) -> None:
        offset, content, back = at * 4 * MIB + 77 * at, os.urandom(3 * MIB), bytearray(3 * MIB)
        target.write(offset, content)
        expected[offset : offset + len(content)] = content
        target.read_into(offset, memoryview(back))
        assert back == content

    with encrypted(pki, disk, demand=demand) as endpoint, Session.open(endpoint, 3) as target:
        assert target.connections == 3
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(use, range(16)))
        target.flush()
        whole = bytearray(SIZE)
        target.read_into(0, memoryview(whole))
    assert whole == disk.content == expected


def test_a_client_without_a_certificate_is_let_in_only_if_none_is_demanded(
    pki: Path, disk: GatedDisk, tmp_path: Path
) -> None:
    (tmp_path / "ca-cert.pem").symlink_to(pki / "ca-cert.pem")
    anonymous = Tls(certificates=str(tmp_path))
    with encrypted(pki, disk, demand=True) as endpoint, pytest.raises(RefusedError, match="TLS handshake"):
        connect(Endpoint("127.0.0.1", endpoint.port, None, "disk", anonymous))
    with (
        encrypted(pki, disk, demand=False) as endpoint,
        connect(Endpoint("127.0.0.1", endpoint.port, None, "disk", anonymous)) as target,
    ):
        assert target.size == SIZE


def test_a_client_in_the_clear_is_told_that_we_demand_tls(pki: Path, disk: GatedDisk) -> None:
    with encrypted(pki, disk) as endpoint, pytest.raises(RefusedError, match="demands TLS"):
        connect(Endpoint("127.0.0.1", endpoint.port, None, "disk"))


@pytest.mark.needs("nbdcopy", "nbdinfo")
def test_libnbd_uses_us_encrypted(pki: Path, disk: GatedDisk, image: Path, tmpfs_path: Path) -> None:
    disk.gate.set()
    with encrypted(pki, disk) as endpoint:
        uri = f"nbds://127.0.0.1:{endpoint.port}/disk?tls-certificates={quote(str(pki))}"
        assert json.loads(run("nbdinfo", "--json", uri))["TLS"]
        run("nbdcopy", uri, str(tmpfs_path / "copy.raw"))
        assert (tmpfs_path / "copy.raw").read_bytes() == disk.content
        run("nbdcopy", "--flush", str(image), uri)
    assert disk.content == image.read_bytes()
    assert disk.calls[-1] == "flush"


@pytest.mark.needs("qemu-img")
def test_qemu_uses_us_encrypted(pki: Path, disk: GatedDisk, image: Path) -> None:
    disk.gate.set()
    credentials = ("--object", f"tls-creds-x509,id=t,dir={pki},endpoint=client")
    file = f"driver=raw,file.driver=file,file.filename={image}"
    with encrypted(pki, disk) as endpoint:
        us = f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={endpoint.port},export=disk,tls-creds=t"
        run("qemu-img", "convert", "-n", *credentials, "--image-opts", "--target-image-opts", file, us)
        assert disk.content == image.read_bytes()
        run("qemu-img", "compare", *credentials, "--image-opts", us, file)


@contextmanager
def raw(
    directory: Path, pki: Path, context: ssl.SSLContext, disk: MemoryDisk, limits: Limits | None = None
) -> Iterator[tuple[RawClient, RawClient]]:
    """Two clients under TLS, in transmission."""
    endpoint = unix(directory)
    with (
        serving(endpoint, disk, tls=ServerTls(str(pki)), limits=limits),
        RawClient(endpoint) as first,
        RawClient(endpoint) as second,
    ):
        for client in (first, second):
            client.greet()
            client.start_tls(context).open()
        yield first, second


def test_a_second_starttls_is_refused(
    tmpfs_path: Path, pki: Path, client_context: ssl.SSLContext, disk: GatedDisk
) -> None:
    endpoint = unix(tmpfs_path)
    with serving(endpoint, disk, tls=ServerTls(str(pki))), RawClient(endpoint) as client:
        client.greet()
        client.start_tls(client_context)
        assert client.kinds(Option.STARTTLS) == [OptionReplyKind.ERR_INVALID]
        assert client.kinds(Option.LIST) == [OptionReplyKind.SERVER, OptionReplyKind.ACK]


@pytest.mark.parametrize("said", [b"", wire.encode_option(Option.LIST), b"\x16\x03\x01\x02\x00\x01"])
def test_a_client_that_does_not_finish_the_tls_handshake_is_dropped(
    tmpfs_path: Path, pki: Path, disk: GatedDisk, said: bytes
) -> None:
    endpoint = unix(tmpfs_path)
    limits = Limits(handshake_timeout_s=0.3)
    with serving(endpoint, disk, tls=ServerTls(str(pki)), limits=limits), RawClient(endpoint) as client:
        client.greet()
        client.kinds(Option.STARTTLS)
        client.sock.sendall(said)
        client.drain()


def test_garbage_ends_its_own_connection_alone(
    tmpfs_path: Path, pki: Path, client_context: ssl.SSLContext, disk: GatedDisk
) -> None:
    with raw(tmpfs_path, pki, client_context, disk) as (client, other):
        client.sock.sendall(b"\xff" * 64)
        client.drain()
        assert other.ask(Command.READ, OPEN, 4096).data == {OPEN: bytes(disk.content[OPEN : OPEN + 4096])}


def test_answers_overtake_and_a_disconnect_waits_for_the_rest(
    tmpfs_path: Path, pki: Path, client_context: ssl.SSLContext, disk: GatedDisk
) -> None:
    with raw(tmpfs_path, pki, client_context, disk) as (client, _):
        slow = client.send(Command.READ, 0, 4096)
        assert disk.entered.acquire(timeout=WAIT_S)
        assert client.ask(Command.READ, OPEN, 4096).errno == 0
        client.send(Command.DISC)
        disk.gate.set()
        assert client.answer()[0] == slow
        assert client.is_closed()


def test_no_more_is_read_than_the_budget_allows_until_it_is_answered(
    tmpfs_path: Path, pki: Path, client_context: ssl.SSLContext, disk: GatedDisk
) -> None:
    with raw(tmpfs_path, pki, client_context, disk, Limits(budget_bytes=4 * MIB)) as (client, other):
        for at in range(4):
            client.send(Command.WRITE, at, MIB, b"x" * MIB)
        for _ in range(4):
            assert disk.entered.acquire(timeout=WAIT_S)
        client.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.send(Command.WRITE, OPEN, 32 * MIB, b"x" * 32 * MIB)
        assert other.ask(Command.READ, OPEN, 4096).errno == 0
        assert disk.calls == []
        disk.gate.set()


def test_a_client_that_was_held_up_is_read_again_when_its_requests_begin(
    tmpfs_path: Path, pki: Path, client_context: ssl.SSLContext, disk: GatedDisk
) -> None:
    """All threads are with another disk while the client sends as much as may wait for one, and a read more."""
    endpoint = unix(tmpfs_path)
    elsewhere = GatedDisk(SIZE)
    limits = Limits(request_threads=3)
    with (
        serving(endpoint, disk, elsewhere, tls=ServerTls(str(pki)), limits=limits),
        RawClient(Endpoint(None, 0, endpoint.socket_path, "1")) as other,
        RawClient(endpoint) as client,
    ):
        for each in (other, client):
            each.greet()
            each.start_tls(client_context).open()
        for _ in range(3):
            other.send(Command.READ, 0, 512)
            assert elsewhere.entered.acquire(timeout=WAIT_S)
        for _ in range(2):
            client.send(Command.WRITE, 0, MIB, b"x" * MIB)
        read = client.send(Command.READ, OPEN, 512)
        assert not disk.entered.acquire(timeout=0.2)
        elsewhere.gate.set()
        assert client.answer()[0] == read
        disk.gate.set()


def test_a_client_that_reads_no_reply_for_too_long_is_dropped(
    tmpfs_path: Path, pki: Path, client_context: ssl.SSLContext, disk: GatedDisk
) -> None:
    limits = Limits(send_timeout_s=0.3, request_threads=1)
    with raw(tmpfs_path, pki, client_context, disk, limits) as (client, other):
        for _ in range(8):
            client.send(Command.READ, OPEN, 8 * MIB)
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            assert other.ask(Command.READ, OPEN, 4096).errno == 0
        assert client.drain() < 64 * MIB


def test_close_ends_clients_wherever_they_are(
    tmpfs_path: Path, pki: Path, client_context: ssl.SSLContext, disk: GatedDisk
) -> None:
    endpoint = unix(tmpfs_path)
    with (
        serving(endpoint, disk, tls=ServerTls(str(pki))) as server,
        RawClient(endpoint) as haggling,
        RawClient(endpoint) as idle,
        RawClient(endpoint) as busy,
        RawClient(endpoint) as stalled,
    ):
        haggling.greet()
        haggling.kinds(Option.STARTTLS)
        for client in (idle, busy, stalled):
            client.greet()
            client.start_tls(client_context).open()
        stalled.send(Command.READ, OPEN, 8 * MIB)
        busy.send(Command.READ, 0, 4096)
        busy.send(Command.DISC)
        assert disk.entered.acquire(timeout=WAIT_S)
        threading.Timer(0.1, disk.gate.set).start()
        server.close()
        assert server.connections == 0
        for client in (haggling, idle, busy, stalled):
            client.drain()
