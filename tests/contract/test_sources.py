"""What every source promises, asked of every kind; then what is particular to one."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from coordinator.model.errors import DiskIOError, FlushpointError, NotFoundError, UnavailableError
from coordinator.model.extent import Extent, Status
from coordinator.model.job import Sync
from coordinator.model.uri import DiskUri, parse
from tests.contract.disks import (
    MIB,
    Disk,
    Maker,
    access_to,
    block_device,
    image_with_bitmap,
    kind,
    make_chain,
    make_raw,
    nbd_by_nbdkit,
    nbd_by_qemu,
    nbd_single_connection,
    nbd_uri,
    open_descriptors,
    qcow2_chain,
    qemu_io,
    raw_file,
    run,
    sample_content,
    serving,
)
from workers.access import Access
from workers.nbd.session import SessionLimits
from workers.sources import Source, open_source
from workers.sources.qcow2 import Qcow2Source

KINDS = [
    raw_file,
    kind(block_device, "losetup"),
    kind(qcow2_chain, "qemu-nbd"),
    kind(nbd_by_qemu, "qemu-nbd"),
    kind(nbd_by_nbdkit, "nbdkit"),
    kind(nbd_single_connection, "nbdkit"),
]
needs_qemu = pytest.mark.needs("qemu-nbd")

Opener = Callable[..., Source]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return access_to(tmp_path, Path("/dev"))


@pytest.fixture
def opened(access: Access, stack: ExitStack) -> Opener:
    def open_(uri: DiskUri, sync: Sync = Sync.FULL, bitmap: str | None = None) -> Source:
        source = open_source(uri, sync, bitmap, access)
        stack.callback(source.close)
        return source

    return open_


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> Disk:
    maker: Maker = request.param
    return maker(tmp_path, stack)


def read(source: Source, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def assert_gapless(extents: list[Extent], offset: int, length: int) -> None:
    for extent in extents:
        assert extent.offset == offset
        assert extent.length > 0
        offset = extent.end
        length -= extent.length
    assert length == 0


class TestEverySource:
    def test_has_the_size_of_the_disk_and_a_block_size_that_divides_it(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        assert source.size == len(disk.content)
        assert source.size % source.block_size == 0

    def test_reads_what_the_disk_holds(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        assert read(source, 0, source.size) == disk.content

    def test_reads_the_odd_tail(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        assert read(source, source.size - 777, 777) == disk.content[-777:]

    def test_extents_cover_the_disk_without_gap_or_overlap(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        assert_gapless(list(source.extents(0, source.size)), 0, source.size)

    def test_extents_cover_an_odd_range_exactly(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        assert_gapless(list(source.extents(12_345, 1_234_567)), 12_345, 1_234_567)

    def test_what_is_called_zero_or_hole_reads_as_zeroes(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        for extent in source.extents(0, source.size):
            if extent.reads_as_zeroes:
                assert not any(read(source, extent.offset, extent.length)), extent

    def test_neighbouring_extents_differ_in_status(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        statuses = [e.status for e in source.extents(0, source.size)]
        assert all(a != b for a, b in pairwise(statuses))

    def test_may_be_read_by_many_threads_at_once(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        step = 50_021
        offsets = list(range(0, source.size - step, step)) * 2
        with ThreadPoolExecutor(16) as pool:
            pieces = list(pool.map(lambda o: read(source, o, step), offsets))
        assert all(p == disk.content[o : o + step] for o, p in zip(offsets, pieces, strict=True))

    def test_a_read_past_the_end_is_an_error_and_no_zeroes(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        with pytest.raises(DiskIOError):
            read(source, source.size - 10, 20)

    def test_an_abort_ends_what_waits_for_a_server(self, disk: Disk, opened: Opener) -> None:
        source = opened(disk.uri)
        source.abort()
        if source.nbd_endpoint() is not None:
            with pytest.raises(DiskIOError):
                read(source, 0, 512)

    def test_is_one_disk_however_often_it_is_opened(self, disk: Disk, opened: Opener) -> None:
        one, other = opened(disk.uri), opened(disk.uri)
        assert one.identity() == other.identity()
        assert one.identity() in one.reads_from()

    def test_closes_twice_and_leaves_no_descriptor(self, disk: Disk, access: Access) -> None:
        open_source(disk.uri, Sync.FULL, None, access).close()  # what is loaded once is loaded now
        before = open_descriptors()
        source = open_source(disk.uri, Sync.FULL, None, access)
        list(source.extents(0, source.size))
        source.close()
        source.close()
        assert open_descriptors() == before


class TestRaw:
    def test_an_empty_file_has_no_extents(self, tmp_path: Path, opened: Opener) -> None:
        source = opened(parse(str(make_raw(tmp_path / "empty.img", b""))))
        assert source.size == 0
        assert list(source.extents(0, 0)) == []
        source.read_into(0, memoryview(bytearray()))

    def test_holes_of_the_file_system_are_holes(self, tmp_path: Path, opened: Opener) -> None:
        source = opened(parse(str(make_raw(tmp_path / "disk.img", sample_content()))))
        holes = sum(e.length for e in source.extents(0, source.size) if e.status is Status.HOLE)
        assert holes > 2 * MIB

    def test_eight_tebibytes_with_little_data_take_no_time(self, tmp_path: Path, opened: Opener) -> None:
        path = tmp_path / "huge.img"
        with path.open("wb") as file:
            file.truncate(8 << 40)
            file.seek(5 << 40)
            file.write(b"x" * 4096)
        source = opened(parse(str(path)))
        extents = list(source.extents(0, source.size))
        assert_gapless(extents, 0, 8 << 40)
        assert [e.status for e in extents] == [Status.HOLE, Status.DATA, Status.HOLE]

    def test_a_link_names_the_same_disk(self, tmp_path: Path, opened: Opener) -> None:
        path = make_raw(tmp_path / "disk.img", b"x" * 4096)
        (tmp_path / "soft").symlink_to(path)
        (tmp_path / "hard").hardlink_to(path)
        names = [path, tmp_path / "soft", tmp_path / "hard"]
        assert len({opened(parse(str(n))).identity() for n in names}) == 1

    def test_a_file_cut_short_while_it_is_read_is_an_error(self, tmp_path: Path, opened: Opener) -> None:
        path = make_raw(tmp_path / "disk.img", b"x" * MIB)
        source = opened(parse(str(path)))
        os.truncate(path, MIB // 2)
        with pytest.raises(DiskIOError, match="shorter than when it was opened"):
            read(source, 0, MIB)
        with pytest.raises(DiskIOError):
            list(source.extents(MIB // 2, MIB // 2))

    @needs_qemu
    def test_may_change_when_a_qemu_process_writes_it(self, tmp_path: Path, opened: Opener) -> None:
        path = make_raw(tmp_path / "disk.img", b"x" * MIB)
        assert not opened(parse(str(path))).may_change
        with serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-f", "raw", str(path)):
            opened(nbd_uri(tmp_path / "s"))  # answered: so the image is open
            assert opened(parse(str(path))).may_change

    @needs_qemu
    def test_does_not_change_when_a_qemu_process_reads_it(self, tmp_path: Path, opened: Opener) -> None:
        path = make_raw(tmp_path / "disk.img", b"x" * MIB)
        with serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-r", "-f", "raw", str(path)):
            opened(nbd_uri(tmp_path / "s"))
            assert not opened(parse(str(path))).may_change


@needs_qemu
class TestQcow2:
    def test_top_is_what_the_topmost_image_holds_and_its_zeroes(self, tmp_path: Path, opened: Opener) -> None:
        top, _ = make_chain(tmp_path)
        source = opened(parse(str(top)), Sync.TOP)
        assert list(source.extents(0, source.size)) == [
            Extent(1 * MIB, 64 * 1024, Status.DATA),
            Extent(2 * MIB, 64 * 1024, Status.ZERO),
        ]

    def test_reads_from_every_image_of_its_chain(self, tmp_path: Path, opened: Opener) -> None:
        top, _ = make_chain(tmp_path)
        below = [opened(parse(f"{tmp_path}/middle.qcow2")), opened(parse(f"{tmp_path}/base.raw"))]
        assert {s.identity() for s in below} < opened(parse(str(top))).reads_from()

    def test_dirty_is_what_the_bitmap_says_with_zeroes_to_be_zeroed(self, tmp_path: Path, opened: Opener) -> None:
        path = image_with_bitmap(tmp_path)
        source = opened(parse(str(path)), Sync.DIRTY, "b0")
        assert list(source.extents(0, source.size)) == [
            Extent(1 * MIB, 128 * 1024, Status.DIRTY),
            Extent(2 * MIB, 64 * 1024, Status.ZERO),
        ]
        assert list(source.extents(1 * MIB + 100, 1000)) == [Extent(1 * MIB + 100, 1000, Status.DIRTY)]

    def test_sixteen_tebibytes_with_little_data_take_no_time(self, tmp_path: Path, opened: Opener) -> None:
        path = tmp_path / "huge.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", str(path), "16T")
        qemu_io(path, "write -P 1 9T 2M")
        source = opened(parse(str(path)))
        extents = list(source.extents(0, source.size))
        assert_gapless(extents, 0, 16 << 40)
        assert Extent(9 << 40, 2 * MIB, Status.DATA) in extents

    def test_an_image_in_use_is_read_and_may_change(self, tmp_path: Path, opened: Opener) -> None:
        top, content = make_chain(tmp_path)
        with serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-f", "qcow2", str(top)):
            opened(nbd_uri(tmp_path / "s"))
            source = opened(parse(str(top)))
            assert source.may_change
            assert read(source, 0, source.size) == content

    def test_an_idle_image_is_kept_from_a_writer_until_closed(self, tmp_path: Path, access: Access) -> None:
        top, _ = make_chain(tmp_path)
        source = open_source(parse(str(top)), Sync.FULL, None, access)
        write = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(top)]
        assert b"lock" in subprocess.run(write, capture_output=True, timeout=30, check=False).stderr
        source.close()
        subprocess.run(write, capture_output=True, timeout=30, check=True)

    def test_a_name_with_commas_and_colons_is_only_a_name(self, tmp_path: Path, opened: Opener) -> None:
        path = tmp_path / "a,file.driver=null-co:b.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M")
        qemu_io(path, "write -P 5 0 64k")
        assert read(opened(parse(str(path))), 0, 65536) == b"\x05" * 65536

    def test_its_server_ends_with_it(self, tmp_path: Path, access: Access) -> None:
        top, _ = make_chain(tmp_path)
        source = open_source(parse(str(top)), Sync.FULL, None, access)
        assert isinstance(source, Qcow2Source)
        pid = source.server_pid
        os.kill(pid, 0)
        source.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_a_server_that_dies_is_an_io_error(self, tmp_path: Path, access: Access) -> None:
        top, _ = make_chain(tmp_path)
        source = open_source(parse(str(top)), Sync.FULL, None, access)
        assert isinstance(source, Qcow2Source)
        os.kill(source.server_pid, signal.SIGKILL)
        with pytest.raises((DiskIOError, UnavailableError)):
            read(source, 0, source.size)
        source.close()


@needs_qemu
class TestNbd:
    def test_dirty_by_an_exported_bitmap(self, tmp_path: Path, opened: Opener) -> None:
        path = image_with_bitmap(tmp_path)
        with serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-r", "-f", "qcow2", "-B", "b0", str(path)):
            source = opened(nbd_uri(tmp_path / "s"), Sync.DIRTY, "b0")
            dirty = list(source.extents(0, source.size))
        assert [(e.offset, e.length) for e in dirty] == [(1 * MIB, 128 * 1024), (2 * MIB, 64 * 1024)]

    def test_a_bitmap_that_is_not_offered_is_not_found(self, tmp_path: Path, opened: Opener) -> None:
        path = image_with_bitmap(tmp_path)
        with (
            serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-r", "-f", "qcow2", str(path)),
            pytest.raises(NotFoundError, match="'b0'"),
        ):
            opened(nbd_uri(tmp_path / "s"), Sync.DIRTY, "b0")

    def test_top_of_an_export_that_cannot_tell_is_not_found(self, tmp_path: Path, opened: Opener) -> None:
        path = image_with_bitmap(tmp_path)
        with (
            serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-r", "-f", "qcow2", str(path)),
            pytest.raises(NotFoundError, match="qemu-nbd -A"),
        ):
            opened(nbd_uri(tmp_path / "s"), Sync.TOP)

    @pytest.mark.parametrize("options", [(), ("-r",)])
    def test_any_export_may_change(self, tmp_path: Path, opened: Opener, options: tuple[str, ...]) -> None:
        """A read-only one too: it keeps us from writing, not the guest whose disk it shows."""
        path = make_raw(tmp_path / "disk.img", b"x" * MIB)
        with serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", *options, "-f", "raw", str(path)):
            assert opened(nbd_uri(tmp_path / "s")).may_change

    def test_a_server_that_lets_one_client_in_has_one_reader(self, tmp_path: Path, access: Access) -> None:
        path = make_raw(tmp_path / "disk.img", b"x" * MIB)
        limits = SessionLimits(connections=2, timeout_s=0.5)
        for shared, readers in ((1, 1), (2, 0)):
            command = ("qemu-nbd", "-t", "-r", "-f", "raw", f"--shared={shared}", str(path))
            with serving(tmp_path / "s", *command):
                source = open_source(nbd_uri(tmp_path / "s"), Sync.FULL, None, access, limits)
                assert source.max_readers == readers
                source.close()

    def test_a_missing_export_is_named(self, tmp_path: Path, opened: Opener) -> None:
        path = make_raw(tmp_path / "disk.img", b"x" * MIB)
        with (
            serving(tmp_path / "s", "qemu-nbd", "-t", "-e", "0", "-x", "there", "-f", "raw", str(path)),
            pytest.raises(FlushpointError, match="nowhere"),
        ):
            opened(nbd_uri(tmp_path / "s", "nowhere"))
