"""A mirror from and to servers that demand TLS with x509, on both sides, through a whole stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_servers import served

from tests.stack import MIB, Stack, make_disk, random_disk, running_stack, same_bytes
from workers.nbd.endpoint import Tls

pytestmark = pytest.mark.needs("openssl", "nbdkit", "qemu-nbd")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


def qemu_nbd(image: Path, pki: Path) -> tuple[str, ...]:
    credentials = f"tls-creds-x509,id=t,dir={pki},endpoint=server,verify-peer=on"
    options = ("-t", "--shared=0", "-f", "raw", "--object", credentials, "--tls-creds", "t")
    return ("qemu-nbd", *options, str(image))


def nbdkit(image: Path, pki: Path) -> tuple[str, ...]:
    return ("nbdkit", "-f", "--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer", "file", str(image))


@pytest.mark.parametrize("sync", ["full", "incremental"])
def test_a_mirror_is_encrypted_on_both_sides(stack: Stack, tmpfs_path: Path, pki: Path, sync: str) -> None:
    source = random_disk(tmpfs_path / "source.img", 24 * MIB)
    target = make_disk(tmpfs_path / "target.img", 24 * MIB, {MIB: b"old" * 1000})
    tls = Tls(certificates=str(pki))
    with (
        served(tmpfs_path, *qemu_nbd(source, pki), tls=tls, tcp=True) as origin,
        served(tmpfs_path, *nbdkit(target, pki), tls=tls, tcp=True) as goal,
    ):
        assert str(origin).startswith("nbds://127.0.0.1:")
        job = stack.mirror(origin, goal, sync=sync)
    assert job.error == "", stack.logs()
    assert job.bytes_sent == 24 * MIB
    assert same_bytes(source, target)


def test_a_server_that_demands_tls_ends_a_plain_job_with_what_to_do(stack: Stack, tmpfs_path: Path, pki: Path) -> None:
    source = random_disk(tmpfs_path / "source.img", MIB)
    with served(tmpfs_path, *nbdkit(source, pki), tcp=True) as plain:
        job = stack.mirror(plain, tmpfs_path / "target.img")
    assert job.error_code == "refused"
    assert "nbds://" in job.error
    assert not (tmpfs_path / "target.img").exists()
