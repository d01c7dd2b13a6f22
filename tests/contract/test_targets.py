"""What every target promises, asked of every kind; then how a target is made ready, and what is refused."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.model.errors import DiskIOError, Next, NotFoundError, RefusedError
from coordinator.model.extent import Status
from coordinator.model.job import Sync
from coordinator.model.uri import DiskUri, parse
from tests.contract.disks import (
    MIB,
    ODD_SIZE,
    Disk,
    Maker,
    access_to,
    block_device,
    kind,
    loop_device,
    make_chain,
    make_raw,
    nbd_by_nbdkit,
    nbd_by_qemu,
    nbd_single_connection,
    nbd_uri,
    open_descriptors,
    padded,
    qcow2_chain,
    raw_file,
    serving,
    small_tmpfs,
)
from workers.access import Access
from workers.sources import open_source
from workers.targets import Target, existing_target, existing_target_size, open_target

KINDS = [
    raw_file,
    kind(block_device, "losetup"),
    kind(qcow2_chain, "qemu-nbd"),
    kind(nbd_by_qemu, "qemu-nbd"),
    kind(nbd_by_nbdkit, "nbdkit"),
    kind(nbd_single_connection, "nbdkit"),
]
needs_qemu = pytest.mark.needs("qemu-nbd")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return access_to(tmp_path, Path("/dev"))


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> Disk:
    maker: Maker = request.param
    return maker(tmp_path, stack)


@pytest.fixture
def target(disk: Disk, access: Access, stack: ExitStack) -> Target:
    """An existing disk of every kind, full of older data, open to be updated."""
    target = open_target(disk.uri, len(disk.content), access, overwrite=False, create=True, keep=True)
    stack.callback(target.close)
    return target


def read(target: Target, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    target.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def read_again(uri: DiskUri, access: Access) -> bytes:
    """What somebody else reads who opens the disk now."""
    source = open_source(uri, Sync.FULL, None, access)
    try:
        buffer = bytearray(source.size)
        source.read_into(0, memoryview(buffer))
        return bytes(buffer)
    finally:
        source.close()


class TestEveryTarget:
    def test_holds_what_was_written_after_it_was_flushed_and_closed(
        self, disk: Disk, target: Target, access: Access
    ) -> None:
        data = os.urandom(200_003)
        target.write(777_777, memoryview(data))
        target.flush()
        target.close()
        expected = bytearray(disk.content)
        expected[777_777 : 777_777 + len(data)] = data
        assert read_again(disk.uri, access) == expected

    def test_zeroes_replace_data_and_nothing_beside_it(self, disk: Disk, target: Target, access: Access) -> None:
        target.write(0, memoryview(b"\xaa" * MIB))
        target.write_zeroes(12_345, 700_001)
        target.flush()
        target.close()
        found = read_again(disk.uri, access)
        assert found[:MIB] == b"\xaa" * 12_345 + bytes(700_001) + b"\xaa" * (MIB - 12_345 - 700_001)
        assert found[MIB:] == disk.content[MIB:]

    def test_reads_back_what_was_written(self, target: Target) -> None:
        target.write(5, memoryview(b"flushpoint"))
        assert read(target, 4, 12)[1:11] == b"flushpoint"

    def test_writes_the_odd_tail(self, disk: Disk, target: Target, access: Access) -> None:
        target.write(target.size - 1001, memoryview(b"\x99" * 1001))
        target.write_zeroes(target.size - 500, 500)
        target.flush()
        target.close()
        assert read_again(disk.uri, access)[-1001:] == b"\x99" * 501 + bytes(500)

    def test_zeroes_a_whole_disk_in_one_call(self, disk: Disk, target: Target, access: Access) -> None:
        target.write_zeroes(0, target.size)
        target.flush()
        target.close()
        assert read_again(disk.uri, access) == bytes(len(disk.content))

    def test_nothing_is_written_past_the_end(self, target: Target) -> None:
        size = target.size
        with pytest.raises(DiskIOError):
            target.write(size - 1, memoryview(b"ab"))
        with pytest.raises(DiskIOError):
            target.write_zeroes(size - 1, 2)
        assert target.size == size

    def test_may_be_written_by_many_threads_at_once(self, disk: Disk, target: Target, access: Access) -> None:
        step = 50_021
        offsets = list(range(0, target.size - step, step))
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda o: target.write(o, memoryview(o.to_bytes(8, "big") * (step // 8))), offsets))
            list(pool.map(lambda _: target.flush(), range(4)))
        target.close()
        found = read_again(disk.uri, access)
        assert all(found[o : o + 8] == o.to_bytes(8, "big") for o in offsets)

    def test_a_server_gets_nothing_more_after_an_abort(self, disk: Disk, target: Target, access: Access) -> None:
        target.abort()
        if target.nbd_endpoint() is not None:
            with pytest.raises(DiskIOError):
                target.write(0, memoryview(b"late"))
            with pytest.raises(DiskIOError):
                target.flush()
        target.close()
        assert read_again(disk.uri, access) == disk.content

    def test_says_whether_zeroes_have_to_be_sent(self, disk: Disk, target: Target) -> None:
        target.write_zeroes(0, 4096)  # of a file nothing is known before
        assert target.can_zero == (not disk.uri.nbd_uri.endswith("single.sock"))

    def test_is_the_same_disk_as_a_source_of_the_same_name(self, disk: Disk, target: Target, access: Access) -> None:
        there = existing_target(disk.uri, access)
        assert there is not None
        assert there.identity == target.identity()
        target.close()
        source = open_source(disk.uri, Sync.FULL, None, access)
        assert source.identity() == target.identity()
        source.close()

    def test_closes_twice_and_leaves_no_descriptor(self, disk: Disk, target: Target, access: Access) -> None:
        target.close()
        before = open_descriptors()
        again = open_target(disk.uri, len(disk.content), access, overwrite=False, create=False)
        again.write(0, memoryview(b"x"))
        again.close()
        again.close()
        assert open_descriptors() == before

    def test_refuses_to_be_smaller_than_the_source(self, disk: Disk, access: Access) -> None:
        needed = len(disk.content) + MIB
        with pytest.raises(RefusedError, match=rf"{len(disk.content)} bytes.* {needed}"):
            open_target(disk.uri, needed, access, overwrite=False, create=True, keep=True)


class TestManyWriters:
    def test_files_and_multi_conn_exports_take_any_number(self, tmp_path: Path, access: Access) -> None:
        target = open_target(parse(f"{tmp_path}/new.img"), MIB, access, overwrite=False, create=True)
        assert target.max_writers == 0
        target.close()

    @pytest.mark.needs("nbdkit")
    def test_an_export_without_multi_conn_takes_one(self, tmp_path: Path, access: Access, stack: ExitStack) -> None:
        disk = nbd_single_connection(tmp_path, stack)
        target = open_target(disk.uri, len(disk.content), access, overwrite=False, create=True)
        assert target.max_writers == 1
        target.close()

    @needs_qemu
    def test_the_next_writer_of_an_image_waits_for_the_last(self, tmp_path: Path, access: Access) -> None:
        uri = parse(f"{tmp_path}/new.qcow2")
        first = open_target(uri, MIB, access, overwrite=False, create=True)
        assert first.max_writers == 1
        first.write(0, memoryview(b"first"))
        first.flush()
        closing = threading.Timer(0.2, first.close)
        closing.start()
        second = open_target(uri, MIB, access, overwrite=False, create=False)
        closing.join()
        assert read(second, 0, 5) == b"first"
        second.close()


def make(uri: DiskUri, size: int, access: Access, overwrite: bool = False, keep: bool = False) -> Target:
    target = open_target(uri, size, access, overwrite=overwrite, create=True, keep=keep)
    target.close()
    return target


class TestMadeReady:
    @pytest.mark.parametrize("name", ["new.img", pytest.param("new.qcow2", marks=needs_qemu)])
    def test_an_absent_file_is_made_and_holds_nothing(self, name: str, tmp_path: Path, access: Access) -> None:
        uri = parse(str(tmp_path / name))
        assert existing_target_size(uri, access) is None
        assert existing_target(uri, access) is None
        make(uri, ODD_SIZE, access)
        rounded = len(padded(bytes(ODD_SIZE))) if name.endswith("qcow2") else ODD_SIZE
        assert existing_target_size(uri, access) == rounded
        source = open_source(uri, Sync.FULL, None, access)
        assert {e.status for e in source.extents(0, source.size)} == {Status.HOLE}
        source.close()

    @pytest.mark.parametrize("name", ["new.img", pytest.param("new.qcow2", marks=needs_qemu)])
    def test_what_was_just_made_may_be_made_again(self, name: str, tmp_path: Path, access: Access) -> None:
        uri = parse(str(tmp_path / name))
        make(uri, ODD_SIZE, access)
        identity = existing_target(uri, access)
        make(uri, ODD_SIZE, access)
        assert existing_target(uri, access) == identity

    @pytest.mark.parametrize("name", ["old.img", pytest.param("old.qcow2", marks=needs_qemu)])
    def test_data_is_lost_only_when_told_so(self, name: str, tmp_path: Path, access: Access) -> None:
        path = tmp_path / name
        uri = parse(str(path))
        target = open_target(uri, MIB, access, overwrite=False, create=True)
        target.write(0, memoryview(b"precious"))
        target.flush()
        target.close()
        before = path.read_bytes()
        with pytest.raises(RefusedError, match="--overwrite"):
            make(uri, MIB, access)
        assert path.read_bytes() == before
        make(uri, 2 * MIB, access, overwrite=True)
        assert existing_target_size(uri, access) == 2 * MIB

    def test_a_larger_file_is_cut_to_the_size_when_overwritten(self, tmp_path: Path, access: Access) -> None:
        path = make_raw(tmp_path / "old.img", b"x" * MIB)
        make(parse(str(path)), 1001, access, overwrite=True)
        assert path.stat().st_size == 1001

    def test_zeroes_give_the_space_of_a_file_back(self, tmp_path: Path, access: Access) -> None:
        path = make_raw(tmp_path / "old.img", b"x" * MIB)
        target = open_target(parse(str(path)), MIB, access, overwrite=True, create=True)
        target.write_zeroes(0, MIB)
        target.flush()
        target.close()
        assert path.stat().st_blocks == 0

    @pytest.mark.parametrize("name", ["old.img", pytest.param("old.qcow2", marks=needs_qemu)])
    def test_an_older_copy_of_another_size_is_refused(self, name: str, tmp_path: Path, access: Access) -> None:
        uri = parse(str(tmp_path / name))
        make(uri, 2 * MIB, access)
        with pytest.raises(RefusedError, match="no older copy"):
            make(uri, MIB, access, keep=True)
        make(uri, 2 * MIB, access, keep=True)

    def test_a_missing_target_is_not_made_by_a_copy_unit(self, tmp_path: Path, access: Access) -> None:
        uri = parse(f"{tmp_path}/none.img")
        with pytest.raises(NotFoundError):
            open_target(uri, MIB, access, overwrite=True, create=False)
        assert not (tmp_path / "none.img").exists()

    @pytest.mark.needs("losetup")
    def test_a_larger_device_is_used_from_its_start(self, tmp_path: Path, access: Access) -> None:
        with loop_device(make_raw(tmp_path / "loop.img", b"x" * 2 * MIB)) as device:
            target = open_target(parse(str(device)), MIB, access, overwrite=False, create=True)
            assert target.size == 2 * MIB
            target.write_zeroes(0, MIB)
            target.flush()
            assert read(target, MIB - 4, 8) == bytes(4) + b"xxxx"
            target.close()

    @needs_qemu
    def test_a_new_image_does_not_depend_on_the_old_ones_chain(self, tmp_path: Path, access: Access) -> None:
        top, content = make_chain(tmp_path)
        make(parse(str(top)), len(content), access, overwrite=True)
        assert read_again(parse(str(top)), access) == bytes(len(content))


class TestNoSpace:
    @pytest.mark.parametrize("name", ["new.img", pytest.param("new.qcow2", marks=needs_qemu)])
    def test_a_full_file_system_is_enospc_and_goes_on_when_there_is_room(self, name: str, tmp_path: Path) -> None:
        with small_tmpfs(tmp_path, "4m") as mounted:
            ballast = make_raw(mounted / "ballast", b"x" * 2 * MIB)
            access = access_to(tmp_path)
            target = open_target(parse(f"{mounted}/{name}"), 8 * MIB, access, overwrite=False, create=True)
            try:
                data = memoryview(b"y" * 3 * MIB)
                with pytest.raises(DiskIOError) as caught:
                    target.write(0, data)
                assert caught.value.errno == errno.ENOSPC
                assert f"{mounted}/{name}" in caught.value.message
                assert "make room" in caught.value.remedy
                ballast.unlink()
                target.write(0, data)
                target.flush()
                assert read(target, 0, 3 * MIB) == data
            finally:
                target.close()

    @needs_qemu
    def test_an_image_that_finds_no_room_is_not_left_half_made(self, tmp_path: Path) -> None:
        with small_tmpfs(tmp_path, "64k") as mounted:
            with pytest.raises(DiskIOError) as caught:
                make(parse(f"{mounted}/new.qcow2"), 8 * MIB, access_to(tmp_path))
            assert caught.value.errno == errno.ENOSPC
            assert list(mounted.iterdir()) == []


class TestFailedFlush:
    def test_of_a_file_is_not_forgotten(self, tmp_path: Path, access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
        target = open_target(parse(f"{tmp_path}/new.img"), MIB, access, overwrite=False, create=True)
        target.write(0, memoryview(b"lost"))
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing_fsync)
            with pytest.raises(DiskIOError):
                target.flush()
        with pytest.raises(DiskIOError, match="Input/output error"):
            target.flush()
        target.close()

    @pytest.mark.needs("nbdkit")
    def test_of_an_export_is_not_forgotten(self, tmp_path: Path, access: Access) -> None:
        once = tmp_path / "once"
        once.touch()
        server = (
            *("nbdkit", "-f", "eval", "get_size=echo 1M", "can_write=exit 0", "can_flush=exit 0", "pwrite=cat >&2"),
            *("pread=dd if=/dev/zero count=$3 iflag=count_bytes", f"flush=rm {once} || exit 0; echo EIO >&2; exit 1"),
        )
        with serving(tmp_path / "s", *server):
            target = open_target(nbd_uri(tmp_path / "s"), MIB, access, overwrite=False, create=True)
            target.write(0, memoryview(b"lost"))
            for _ in range(2):
                with pytest.raises(DiskIOError, match="may be lost") as caught:
                    target.flush()
                assert caught.value.next is Next.RECONNECT
            assert not once.exists()
            target.close()
            again = open_target(nbd_uri(tmp_path / "s"), MIB, access, overwrite=False, create=False)
            again.write(0, memoryview(b"kept"))
            again.flush()
            again.close()


def failing_fsync(_: int) -> None:
    raise OSError(errno.EIO, "Input/output error")
