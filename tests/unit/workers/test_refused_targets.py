"""Targets that must not be written: refused, and left as they were."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.job import Sync
from coordinator.model.uri import DiskUri, parse
from tests.contract.disks import (
    MIB,
    access_to,
    loop_device,
    make_raw,
    nbd_uri,
    run,
    serving,
    small_tmpfs,
)
from tests.volatile_server import NO_FLUSH, volatile_server
from workers.access import Access
from workers.sources import open_source
from workers.targets import Target, open_target

needs_qemu = pytest.mark.needs("qemu-nbd")


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return access_to(tmp_path, Path("/dev"))


def make(uri: DiskUri, size: int, access: Access, overwrite: bool = False, keep: bool = False) -> Target:
    target = open_target(uri, size, access, overwrite=overwrite, create=True, keep=keep)
    target.close()
    return target


class TestRefused:
    @pytest.mark.needs("losetup")
    def test_a_read_only_device(self, tmp_path: Path, access: Access) -> None:
        with (
            loop_device(make_raw(tmp_path / "loop.img", b"x" * MIB), "--read-only") as device,
            pytest.raises(RefusedError, match="cannot be written"),
        ):
            make(parse(str(device)), MIB, access)

    @needs_qemu
    def test_a_read_only_export(self, tmp_path: Path, access: Access) -> None:
        path = make_raw(tmp_path / "disk.img", b"x" * MIB)
        with (
            serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-r", "-f", "raw", str(path)),
            pytest.raises(RefusedError, match="read-only"),
        ):
            make(nbd_uri(tmp_path / "s"), MIB, access)

    def test_a_file_on_a_read_only_file_system(self, tmp_path: Path) -> None:
        with small_tmpfs(tmp_path, "1m") as mounted:
            make_raw(mounted / "disk.img", b"")
            run("mount", "-o", "remount,ro", str(mounted))
            with pytest.raises(RefusedError, match="cannot be written"):
                make(parse(f"{mounted}/disk.img"), MIB, access_to(tmp_path))

    @pytest.mark.needs("losetup", "qemu-img")
    @pytest.mark.parametrize("keep", [False, True])
    def test_a_device_as_a_qcow2_image(self, tmp_path: Path, access: Access, keep: bool) -> None:
        with loop_device(make_raw(tmp_path / "loop.img", b"x" * MIB)) as device:
            with pytest.raises(RefusedError, match="block device"):
                make(parse(f"file://{device}?format=qcow2"), MIB, access, overwrite=True, keep=keep)
            assert device.read_bytes() == b"x" * MIB

    @pytest.mark.needs("losetup")
    @pytest.mark.parametrize("image_format", ["raw", "qcow2"])
    def test_a_device_with_a_mounted_file_system(self, tmp_path: Path, access: Access, image_format: str) -> None:
        image = make_raw(tmp_path / "loop.img", bytes(4 * MIB))
        mount_point = tmp_path / "mounted"
        mount_point.mkdir()
        with loop_device(image) as device:
            made = subprocess.run(["mkfs.ext4", "-q", str(device)], capture_output=True, timeout=30, check=False)
            if made.returncode != 0:
                pytest.skip("no mkfs.ext4")
            run("mount", "-o", "ro", str(device), str(mount_point))  # or the file system writes, whenever it likes
            try:
                before = device.read_bytes()
                with pytest.raises(RefusedError, match=r"mounted|block device"):
                    make(parse(f"file://{device}?format={image_format}"), MIB, access, overwrite=True)
                assert device.read_bytes() == before
            finally:
                run("umount", str(mount_point))

    def test_an_export_that_cannot_be_flushed(self, tmp_path: Path, access: Access) -> None:
        with (
            volatile_server(tmp_path / "s", MIB, flags=NO_FLUSH) as server,
            pytest.raises(RefusedError, match="no flush"),
        ):
            make(parse(server.uri), MIB, access)

    @needs_qemu
    @pytest.mark.parametrize("image_format", ["raw", "qcow2"])
    def test_a_file_that_a_qemu_process_reads(self, image_format: str, tmp_path: Path, access: Access) -> None:
        path = tmp_path / f"disk.{image_format}"
        run("qemu-img", "create", "-q", "-f", image_format, str(path), "1M")
        before = path.read_bytes()
        with serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-r", "-f", image_format, str(path)):
            open_source(nbd_uri(tmp_path / "s"), Sync.FULL, None, access).close()
            with pytest.raises(RefusedError, match="open in a QEMU process"):
                make(parse(str(path)), 2 * MIB, access, overwrite=True)
        assert path.read_bytes() == before

    @needs_qemu
    @pytest.mark.parametrize("image_format", ["raw", "qcow2"])
    def test_a_file_that_a_qemu_process_writes(self, image_format: str, tmp_path: Path, access: Access) -> None:
        path = tmp_path / f"disk.{image_format}"
        run("qemu-img", "create", "-q", "-f", image_format, str(path), "1M")
        with serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-f", image_format, str(path)):
            open_source(nbd_uri(tmp_path / "s"), Sync.FULL, None, access).close()
            with pytest.raises(RefusedError):
                make(parse(str(path)), 2 * MIB, access, overwrite=True)

    def test_a_target_outside_the_roots(self, tmp_path: Path) -> None:
        inside = tmp_path / "inside"
        inside.mkdir()
        (inside / "link").symlink_to(tmp_path / "outside.img")
        for name in ("../outside.img", "link"):
            with pytest.raises(RefusedError, match="allowed roots"):
                make(parse(f"{inside}/{name}"), MIB, access_to(inside))
        assert not (tmp_path / "outside.img").exists()

    def test_a_target_in_a_directory_that_is_not_there(self, tmp_path: Path, access: Access) -> None:
        with pytest.raises(NotFoundError, match="directory"):
            make(parse(f"{tmp_path}/none/new.img"), MIB, access)

    def test_an_empty_file_of_another_size_is_cut_only_if_told_to(self, tmp_path: Path, access: Access) -> None:
        path = make_raw(tmp_path / "sparse.img", bytes(2 * MIB))
        with pytest.raises(RefusedError, match="--overwrite"):
            make(parse(str(path)), MIB, access)
        assert path.stat().st_size == 2 * MIB
        make(parse(str(path)), MIB, access, overwrite=True)
        assert path.stat().st_size == MIB
