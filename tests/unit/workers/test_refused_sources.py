"""Sources that are missing, wrong or forbidden: one clear refusal each, with a remedy."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.model.errors import DiskIOError, FlushpointError, NotFoundError, RefusedError, UnavailableError
from coordinator.model.job import Sync
from coordinator.model.uri import DiskUri, parse
from tests.contract.disks import (
    MIB,
    access_to,
    image_with_bitmap,
    loop_device,
    make_raw,
    nbd_uri,
    run,
    serving,
)
from workers.access import Access
from workers.sources import Source, open_source

needs_qemu = pytest.mark.needs("qemu-nbd")

Opener = Callable[..., Source]


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return access_to(tmp_path, Path("/dev"))


@pytest.fixture
def opened(access: Access) -> Iterator[Opener]:
    with ExitStack() as stack:

        def open_(uri: DiskUri) -> Source:
            source = open_source(uri, Sync.FULL, None, access)
            stack.callback(source.close)
            return source

        yield open_


def refused(access: Access, path: object, sync: Sync = Sync.FULL, bitmap: str | None = None) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        open_source(parse(str(path)), sync, bitmap, access)
    assert caught.value.remedy
    return caught.value


class TestBadInputs:
    def test_a_missing_file_is_not_found(self, tmp_path: Path, access: Access) -> None:
        assert isinstance(refused(access, tmp_path / "none.img"), NotFoundError)
        assert isinstance(refused(access, tmp_path / "none.qcow2"), NotFoundError)

    def test_an_unreadable_file_is_refused(self) -> None:
        # Not under tmp_path, whose parents are closed to the user that root becomes here.
        with tempfile.TemporaryDirectory() as name:
            Path(name).chmod(0o755)
            path = make_raw(Path(name) / "secret.img", b"x")
            path.chmod(0)
            me = os.geteuid()
            os.seteuid(65534 if me == 0 else me)
            try:
                assert "cannot be read" in refused(access_to(Path(name)), path).message
            finally:
                os.seteuid(me)

    def test_a_directory_and_a_fifo_are_refused_at_once(self, tmp_path: Path, access: Access) -> None:
        os.mkfifo(tmp_path / "fifo")
        assert "neither" in refused(access, tmp_path / "fifo").message
        (tmp_path / "directory").mkdir()
        assert "neither" in refused(access, tmp_path / "directory").message

    @needs_qemu
    def test_what_is_no_qcow2_image_is_refused(self, tmp_path: Path, access: Access) -> None:
        path = make_raw(tmp_path / "wrong.qcow2", b"x" * MIB)
        assert "not in qcow2 format" in refused(access, path).message

    def test_a_bitmap_of_a_raw_file_is_refused(self, tmp_path: Path, access: Access) -> None:
        path = make_raw(tmp_path / "disk.img", b"x")
        remedy = refused(access, path, Sync.DIRTY, "b0").remedy
        assert "qcow2 image or an NBD export" in remedy
        assert "--sync incremental" in remedy

    @needs_qemu
    def test_a_missing_bitmap_is_not_found_and_the_others_are_named(self, tmp_path: Path, access: Access) -> None:
        error = refused(access, image_with_bitmap(tmp_path), Sync.DIRTY, "b7")
        assert isinstance(error, NotFoundError)
        assert "b0" in error.message

    @needs_qemu
    def test_a_bitmap_whose_writer_died_is_refused(self, tmp_path: Path, opened: Opener, access: Access) -> None:
        path = image_with_bitmap(tmp_path)
        with serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-f", "qcow2", str(path)) as server:
            opened(nbd_uri(tmp_path / "s"))
            assert "open for writing" in refused(access, path, Sync.DIRTY, "b0").message
            server.kill()
        error = refused(access, path, Sync.DIRTY, "b0")
        assert "inconsistent" in error.message
        assert "--sync incremental" in error.remedy

    @needs_qemu
    def test_an_external_data_file_is_refused(self, tmp_path: Path, access: Access) -> None:
        path = tmp_path / "external.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw", str(path), "1M")
        assert "external file" in refused(access, path).message

    @needs_qemu
    def test_a_backing_file_outside_the_roots_is_refused(self, tmp_path: Path) -> None:
        inside, outside = tmp_path / "inside", tmp_path / "outside"
        inside.mkdir()
        outside.mkdir()
        base = make_raw(outside / "base.raw", b"x" * MIB)
        path = inside / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(path))
        assert "FLUSHPOINT_ALLOWED_ROOTS" in refused(access_to(inside), path).remedy

    @needs_qemu
    @pytest.mark.parametrize("backing", ["nbd://127.0.0.1:1/x", "json:{}", "ssh://host/x"])
    def test_a_backing_file_that_is_no_path_is_refused(self, backing: str, tmp_path: Path, access: Access) -> None:
        path = tmp_path / "top.qcow2"
        make_raw(tmp_path / "base.raw", b"x" * MIB)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", backing, str(path), "1M")
        assert "no plain path" in refused(access, path).message

    @needs_qemu
    def test_a_backing_file_without_a_format_is_refused(self, tmp_path: Path, access: Access) -> None:
        path = tmp_path / "top.qcow2"
        make_raw(tmp_path / "base.raw", b"x" * MIB)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", str(path))
        _forget_format(path)
        assert "without a format" in refused(access, path).message

    @needs_qemu
    def test_a_backing_file_that_is_gone_is_named(self, tmp_path: Path, access: Access) -> None:
        base = make_raw(tmp_path / "base.raw", b"x" * MIB)
        path = tmp_path / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(path))
        base.unlink()
        error = refused(access, path)
        assert isinstance(error, NotFoundError)
        assert str(path) in error.message
        assert str(base) in error.message

    @needs_qemu
    def test_a_backing_chain_that_comes_back_to_itself_is_refused(self, tmp_path: Path, access: Access) -> None:
        path = tmp_path / "ring.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", path.name, str(path), "1M")
        assert "comes back" in refused(access, path).message

    @needs_qemu
    def test_an_encrypted_image_is_refused(self, tmp_path: Path, access: Access) -> None:
        path = tmp_path / "secret.qcow2"
        options = "encrypt.format=aes,encrypt.key-secret=s"
        run(
            *("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=hunter2"),
            *("-o", options, str(path), "1M"),
        )
        assert "encrypted" in refused(access, path).message

    def test_a_server_that_does_not_speak_nbd_is_an_error(self, tmp_path: Path, access: Access) -> None:
        with serving(tmp_path / "s", "sh", "-c", "exec cat <&3"), pytest.raises(FlushpointError):
            open_source(nbd_uri(tmp_path / "s"), Sync.FULL, None, access)

    def test_nobody_listening_is_unavailable(self, access: Access) -> None:
        with pytest.raises((UnavailableError, DiskIOError)):
            open_source(parse("nbd://127.0.0.1:1/x"), Sync.FULL, None, access)

    @pytest.mark.needs("losetup")
    def test_a_device_outside_the_roots_is_refused(self, tmp_path: Path) -> None:
        with loop_device(make_raw(tmp_path / "loop.img", b"x" * MIB)) as device:
            assert "allowed roots" in refused(access_to(tmp_path), device).message


def _forget_format(path: Path) -> None:
    """Overwrite the header extension that names the backing format (type 0xE2792ACA) with an unknown one."""
    data = bytearray(path.read_bytes())
    at = data.index(bytes.fromhex("e2792aca"))
    data[at : at + 4] = bytes.fromhex("12345678")
    path.write_bytes(data)
