"""A recovery point as NBD exports, read and written by other people's clients."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.model.extent import BLOCK_BYTES
from tests.repositories import backup, local_uri, make_repository
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import Session
from workers.repository.repository import Repository

pytestmark = pytest.mark.needs("nbdinfo", "nbdcopy", "qemu-img", "qemu-io")

SIZE = 300 * BLOCK_BYTES + 512 * 5


def content() -> bytes:
    """Data with holes, of a size that is a multiple of sectors only."""
    data = bytearray(SIZE)
    dice = random.Random(7)
    for block in (0, 1, 2, 40, 127, 128, 129, 299):
        data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = dice.randbytes(BLOCK_BYTES)
    data[-1000:] = b"e" * 1000
    return bytes(data)


@pytest.fixture(params=["plain", "encrypted"])
def repository(request: pytest.FixtureRequest, tmpfs_path: Path) -> str:
    """The URI of a repository with one point."""
    (tmpfs_path / "key").write_text("a passphrase")
    key = f"file:{tmpfs_path}/key" if request.param == "encrypted" else ""
    with make_repository(tmpfs_path / "r", key) as made:
        backup(made, "shop", content())
    return str(local_uri(tmpfs_path / "r", key))


def serve_command(repository: str, *options: str) -> list[str]:
    uri = f"{repository}{'&' if '?' in repository else '?'}group=shop"
    return [sys.executable, "-P", "-m", "workers.repository.serve", uri, *options]


@pytest.fixture(autouse=True)
def every_root_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUSHPOINT_ALLOWED_ROOTS", "/")


def serve_to_the_end(repository: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A server that is expected to refuse."""
    command = serve_command(repository, *options)
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@contextlib.contextmanager
def serving(repository: str, directory: Path, *options: str, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """What it prints: the URI of the one export."""
    command = serve_command(repository, *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=directory) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline().strip()
            assert line.startswith(("nbd", "[")), line
            yield line
        finally:
            server.send_signal(end)
            assert server.wait(15) == (0 if end is signal.SIGTERM else -end)
        assert server.stdout.read() == "", "standard output is for URIs"


def write_unflushed(uri: str, offset: int, data: bytes) -> None:
    """QEMU's tools flush when they end, whatever they are told."""
    with Session.open(Endpoint.parse(uri), 1) as session:
        session.write(offset, data)


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_point_is_read_whole_by_any_client(repository: str, tmpfs_path: Path) -> None:
    with serving(repository, tmpfs_path) as uri:
        info = json.loads(run("nbdinfo", "--json", uri))["exports"][0]
        assert info["export-size"] == SIZE
        assert info["is_read_only"]
        run("nbdcopy", uri, tmpfs_path / "by-nbdcopy")
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmpfs_path / "by-qemu-img")
    for name in ("by-nbdcopy", "by-qemu-img"):
        assert (tmpfs_path / name).read_bytes() == content()


def test_block_status_comes_from_the_maps(repository: str, tmpfs_path: Path) -> None:
    with serving(repository, tmpfs_path) as uri:
        extents = json.loads(run("nbdinfo", "--map", "--json", uri))
    data = sum(e["length"] for e in extents if e["type"] == 0)
    assert data == 8 * BLOCK_BYTES + 512 * 5  # the last block is short
    assert sum(e["length"] for e in extents) == SIZE


def test_an_overlay_takes_writes_and_keeps_them(repository: str, tmpfs_path: Path) -> None:
    expected = bytearray(content())
    expected[100 : 100 + 4096] = b"\x55" * 4096
    expected[50 * BLOCK_BYTES : 51 * BLOCK_BYTES] = b"\x66" * BLOCK_BYTES
    expected[0 * BLOCK_BYTES + 8192 : 12288] = bytes(4096)
    writes = ["-c", "write -P 0x55 100 4096", "-c", f"write -P 0x66 {50 * BLOCK_BYTES} 64k", "-c", "write -z 8k 4k"]
    with serving(repository, tmpfs_path, "--writable", str(tmpfs_path / "overlay")) as uri:
        run("qemu-io", "-f", "raw", *writes, "-c", "flush", uri)
        run("nbdcopy", uri, tmpfs_path / "written")
    assert (tmpfs_path / "written").read_bytes() == expected
    with serving(repository, tmpfs_path, "--writable", str(tmpfs_path / "overlay")) as uri:
        run("nbdcopy", uri, tmpfs_path / "again")
    assert (tmpfs_path / "again").read_bytes() == expected
    with serving(repository, tmpfs_path) as uri:
        run("nbdcopy", uri, tmpfs_path / "point")
    assert (tmpfs_path / "point").read_bytes() == content()


def test_an_overlay_is_served_by_one_server_at_a_time(repository: str, tmpfs_path: Path) -> None:
    overlay = str(tmpfs_path / "overlay")
    with serving(repository, tmpfs_path, "--writable", overlay) as uri:
        second = serve_to_the_end(repository, "--writable", overlay)
        assert second.returncode == 3
        assert f"{overlay}/shop@1-disk.overlay is being served already" in second.stderr
        run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", "-c", "flush", uri)
    with serving(repository, tmpfs_path, "--writable", overlay) as uri:
        run("qemu-io", "-f", "raw", "-c", "read -P 1 0 64k", uri)


def test_an_overlay_that_cannot_be_made_is_refused_by_name(repository: str, tmpfs_path: Path) -> None:
    file = tmpfs_path / "file"
    file.touch()
    done = serve_to_the_end(repository, "--writable", str(file))
    assert done.returncode == 3
    assert f"cannot keep writes in {file}: File exists" in done.stderr


def test_an_overlay_lies_over_the_disk_it_was_made_for_and_no_other(repository: str, tmpfs_path: Path) -> None:
    overlay = str(tmpfs_path / "overlay")
    with serving(repository, tmpfs_path, "--writable", overlay):
        pass
    with make_repository(tmpfs_path / "other") as made:
        backup(made, "shop", content())
    done = serve_to_the_end(str(local_uri(tmpfs_path / "other")), "--writable", overlay)
    assert done.returncode == 3
    assert f"{overlay}/shop@1-disk.overlay lies over another disk" in done.stderr


def test_what_was_written_survives_a_killed_server_unflushed(repository: str, tmpfs_path: Path) -> None:
    overlay = tmpfs_path / "overlay"
    with serving(repository, tmpfs_path, "--writable", str(overlay), end=signal.SIGKILL) as uri:
        write_unflushed(uri, 0, b"\7" * 102_400)
        assert (overlay / "shop@1-disk.blocks").read_bytes()[:3] == b"\2\2\0"
    with serving(repository, tmpfs_path, "--writable", str(overlay)) as uri:
        run("qemu-io", "-f", "raw", "-c", "read -P 7 0 100k", uri)
    assert (overlay / "shop@1-disk.blocks").read_bytes()[:3] == b"\1\1\0"


def test_what_was_not_flushed_is_not_trusted_after_the_host_booted_anew(repository: str, tmpfs_path: Path) -> None:
    overlay = tmpfs_path / "overlay"
    with serving(repository, tmpfs_path, "--writable", str(overlay), end=signal.SIGKILL) as uri:
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", "-c", "flush", uri)
        write_unflushed(uri, BLOCK_BYTES, b"\x08" * BLOCK_BYTES)
    point = overlay / "shop@1-disk.point"
    point.write_text(json.dumps({**json.loads(point.read_text()), "boot": "an earlier one"}))
    expected = bytearray(content())
    expected[:BLOCK_BYTES] = b"\7" * BLOCK_BYTES
    with serving(repository, tmpfs_path, "--writable", str(overlay)) as uri:
        run("nbdcopy", uri, tmpfs_path / "copy")
    assert (tmpfs_path / "copy").read_bytes() == expected


def test_json_tells_all_exports_in_one_line(repository: str, tmpfs_path: Path) -> None:
    with serving(repository, tmpfs_path, "--json") as line:
        [one] = json.loads(line)
        assert (one["disk"], one["size"], one["read_only"]) == ("disk", SIZE, True)
        assert json.loads(run("nbdinfo", "--json", one["uri"]))["exports"][0]["export-size"] == SIZE


def test_a_served_point_is_held_until_the_server_ends(tmpfs_path: Path) -> None:
    with make_repository(tmpfs_path / "r") as made:
        backup(made, "shop", content())
    uri = str(local_uri(tmpfs_path / "r"))
    with serving(uri, tmpfs_path), Repository.open(local_uri(tmpfs_path / "r"), Access(["/"], [])) as seen:
        assert [hold.points for hold in seen.decisions.holds()] == [(1,)]
    with Repository.open(local_uri(tmpfs_path / "r"), Access(["/"], [])) as seen:
        assert seen.decisions.holds() == []


def test_a_point_that_does_not_exist_is_refused_with_those_that_do(repository: str) -> None:
    done = serve_to_the_end(f"{repository}{'&' if '?' in repository else '?'}point=9")
    assert done.returncode == 3
    assert "no recovery point 9" in done.stderr
    assert "the newest are: 1" in done.stderr


@pytest.mark.parametrize("address", ["localhost", ":1", "localhost:65536", "localhost:²"])
def test_what_is_no_address_to_listen_on_is_refused(repository: str, address: str) -> None:
    done = serve_to_the_end(repository, "--listen", address)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{address!r} is no address to listen on. Write HOST:PORT" in done.stderr
