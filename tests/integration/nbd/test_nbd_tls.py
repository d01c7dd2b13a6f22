"""TLS with x509 against qemu-nbd and nbdkit, over TCP and unix sockets; certificates are made for each run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from nbd_servers import MIB, run, served

from coordinator.model.errors import DiskIOError, Next, RefusedError
from workers.nbd.connection import connect, list_exports
from workers.nbd.endpoint import Endpoint, Tls
from workers.nbd.session import Session

pytestmark = pytest.mark.needs("openssl")


@contextmanager
def nbdkit(directory: Path, pki: Path, *options: str, tcp: bool = False) -> Iterator[Endpoint]:
    command = ("nbdkit", "-f", "--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer", *options)
    with served(directory, *command, tls=Tls(certificates=str(pki)), tcp=tcp) as endpoint:
        yield endpoint


@pytest.mark.needs("nbdkit")
@pytest.mark.parametrize("tcp", [True, False])
def test_many_threads_share_encrypted_connections(tmpfs_path: Path, pki: Path, tcp: bool) -> None:
    with nbdkit(tmpfs_path, pki, "memory", "64M", tcp=tcp) as endpoint, Session.open(endpoint, 2) as disk:

        def use(at: int) -> None:
            for turn in range(4):
                offset = (turn * 16 + at) * MIB
                content = os.urandom(MIB)
                disk.write(offset, content)
                back = bytearray(MIB)
                disk.read_into(offset, memoryview(back))
                assert back == content

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(use, range(16)))
        disk.flush()
        assert list_exports(endpoint)


@pytest.mark.needs("qemu-nbd", "qemu-img")
def test_qemu_nbd_is_spoken_to_encrypted(tmpfs_path: Path, pki: Path) -> None:
    image = tmpfs_path / "d.raw"
    run("qemu-img", "create", "-f", "raw", str(image), "16M")
    command = (
        "qemu-nbd", "-t", "-f", "raw", "--object",
        f"tls-creds-x509,id=t,dir={pki},endpoint=server,verify-peer=on", "--tls-creds", "t", str(image),
    )  # fmt: skip
    with (
        served(tmpfs_path, *command, tls=Tls(certificates=str(pki)), tcp=True) as endpoint,
        connect(endpoint, contexts=["base:allocation"]) as disk,
    ):
        disk.write(4096, b"\x5a" * 4096)
        disk.flush()
        assert disk.block_status("base:allocation", 0, 4096)
    assert image.read_bytes()[4096:8192] == b"\x5a" * 4096


@pytest.mark.needs("nbdkit")
def test_a_server_of_another_name_is_refused(tmpfs_path: Path, pki: Path) -> None:
    with nbdkit(tmpfs_path, pki, "memory", "1M") as endpoint:
        other = Endpoint(None, 0, endpoint.socket_path, "", Tls(certificates=str(pki), hostname="other.example"))
        with pytest.raises(RefusedError, match="TLS handshake"):
            connect(other)


@pytest.mark.needs("nbdkit")
def test_a_server_that_demands_tls_says_so_to_a_plain_client(tmpfs_path: Path, pki: Path) -> None:
    with (
        nbdkit(tmpfs_path, pki, "memory", "1M") as endpoint,
        pytest.raises(RefusedError, match="nbds://"),
    ):
        connect(Endpoint(None, 0, endpoint.socket_path, ""))


@pytest.mark.needs("nbdkit")
def test_an_encrypted_server_that_hangs_is_given_up(tmpfs_path: Path, pki: Path) -> None:
    with (
        nbdkit(tmpfs_path, pki, "--filter=delay", "memory", "1M", "rdelay=3") as endpoint,
        connect(endpoint, timeout_s=0.4) as disk,
        ThreadPoolExecutor(4) as pool,
    ):
        calls = [pool.submit(disk.read_into, 0, memoryview(bytearray(512))) for _ in range(4)]
        for call in calls:
            error = call.exception(5)
            assert isinstance(error, DiskIOError)
            assert error.next is Next.RECONNECT


@pytest.mark.needs("nbdkit")
def test_abort_breaks_encrypted_calls(tmpfs_path: Path, pki: Path) -> None:
    with (
        nbdkit(tmpfs_path, pki, "--filter=delay", "memory", "1M", "rdelay=3") as endpoint,
        connect(endpoint) as disk,
        ThreadPoolExecutor(1) as pool,
    ):
        call = pool.submit(disk.read_into, 0, memoryview(bytearray(512)))
        disk.abort()
        error = call.exception(2)
        assert isinstance(error, DiskIOError)
        assert error.next is Next.RECONNECT
