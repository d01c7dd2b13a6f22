"""`flushpoint serve` over TLS: an export of somebody's disk on a network is for those who may have it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repositories import backup, local_uri, make_repository

pytestmark = pytest.mark.needs("openssl", "nbdcopy")
DATA = b"somebody's disk\n" * 100_000


@pytest.fixture
def repository(tmpfs_path: Path) -> str:
    with make_repository(tmpfs_path / "r") as made:
        backup(made, "shop", DATA)
    return str(local_uri(tmpfs_path / "r"))


@contextlib.contextmanager
def serving(repository: str, *options: str) -> Iterator[str]:
    command = [sys.executable, "-P", "-m", "flushpoint", "serve", "shop", "-r", repository, *options]
    command += ["--listen", "127.0.0.1:0"]
    env = {**os.environ, "FLUSHPOINT_ALLOWED_ROOTS": "/"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(15) == 0


def copy(uri: str, to: Path) -> int:
    command = ["nbdcopy", uri, str(to)]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode


def test_a_point_is_read_over_tls_and_not_without(repository: str, pki: Path, tmpfs_path: Path) -> None:
    with serving(repository, "--tls-certificates", str(pki)) as uri:
        assert uri.startswith("nbds://127.0.0.1:")
        assert copy(f"{uri}?tls-certificates={pki}", tmpfs_path / "copy") == 0
        assert (tmpfs_path / "copy").read_bytes() == DATA
        assert copy(uri.replace("nbds:", "nbd:"), tmpfs_path / "plain") != 0


def test_a_client_without_a_certificate_is_sent_away_where_one_is_demanded(
    repository: str, pki: Path, tmpfs_path: Path
) -> None:
    stranger = tmpfs_path / "stranger"
    stranger.mkdir()
    (stranger / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    with serving(repository, "--tls-certificates", str(pki), "--tls-verify-peer") as uri:
        assert copy(f"{uri}?tls-certificates={stranger}", tmpfs_path / "stolen") != 0
        assert copy(f"{uri}?tls-certificates={pki}", tmpfs_path / "copy") == 0
        assert (tmpfs_path / "copy").read_bytes() == DATA


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--tls-verify-peer"], 2, "--tls-certificates"),
        (["--tls-certificates", "/nowhere"], 3, "/nowhere"),
        (["--tls-certificates", "/tmp"], 2, "server-cert.pem"),
    ],
)
def test_unusable_certificates_are_told_before_anything_is_served(
    repository: str, options: list[str], code: int, says: str
) -> None:
    command = [sys.executable, "-P", "-m", "flushpoint", "serve", "shop", "-r", repository, *options]
    env = {**os.environ, "FLUSHPOINT_ALLOWED_ROOTS": "/"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
