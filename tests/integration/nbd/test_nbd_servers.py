"""The client against the servers it will meet: qemu-nbd, qemu-storage-daemon, nbdkit."""

from __future__ import annotations

import errno
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from nbd_servers import MIB, run, served, storage_daemon

from coordinator.model.errors import DiskIOError, Next, NotFoundError, RefusedError
from workers.nbd.connection import Connection, connect, list_exports
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import Session

NBDKIT = ("nbdkit", "-f")


def read(disk: Connection | Session, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def write_and_read_back_by_many(disk: Connection | Session, threads: int = 16, rounds: int = 4) -> None:
    """Each thread owns every `threads`-th MiB of the first 64 and must find there what it wrote."""

    def use(at: int) -> None:
        for turn in range(rounds):
            offset = (turn * threads + at) * MIB % (64 * MIB)
            content = os.urandom(MIB)
            disk.write(offset, content)
            assert read(disk, offset, MIB) == content

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(use, range(threads)))
    disk.flush()


@pytest.mark.needs("nbdkit")
@pytest.mark.parametrize("structured", [True, False])
def test_many_threads_share_one_connection(tmpfs_path: Path, structured: bool) -> None:
    with served(tmpfs_path, *NBDKIT, "memory", "64M") as endpoint, connect(endpoint, structured=structured) as disk:
        assert disk.structured == structured
        write_and_read_back_by_many(disk)


@pytest.mark.needs("nbdkit")
def test_many_threads_share_a_session_over_tcp(tmpfs_path: Path) -> None:
    with served(tmpfs_path, *NBDKIT, "memory", "64M", tcp=True) as endpoint, Session.open(endpoint, 4) as disk:
        assert disk.connections == 4
        write_and_read_back_by_many(disk)


@pytest.mark.needs("qemu-nbd", "qemu-img")
def test_qemu_nbd_serves_reads_writes_zeroes_and_trims(tmpfs_path: Path) -> None:
    image = tmpfs_path / "d.raw"
    run("qemu-img", "create", "-f", "raw", str(image), "64M")
    with (
        served(tmpfs_path, "qemu-nbd", "-t", "-e", "4", "-f", "raw", "-x", "vda", str(image), export="vda") as endpoint,
        Session.open(endpoint, 2, contexts=["base:allocation"]) as disk,
    ):
        assert disk.contexts == {"base:allocation"}
        write_and_read_back_by_many(disk)
        disk.write(0, b"\xaa" * MIB, fua=True)
        disk.write_zeroes(4096, 8192)
        disk.trim(MIB, MIB)
        disk.flush()
        assert read(disk, 0, 16384) == b"\xaa" * 4096 + bytes(8192) + b"\xaa" * 4096
    assert image.read_bytes()[:4096] == b"\xaa" * 4096


@pytest.mark.needs("nbdkit")
def test_every_byte_of_a_pattern_is_where_it_belongs(tmpfs_path: Path) -> None:
    with served(tmpfs_path, *NBDKIT, "pattern", "1G") as endpoint, Session.open(endpoint, 2) as disk:
        assert disk.read_only
        for offset in (0, 8 * 12345, (1 << 30) - 33 * MIB):
            data = read(disk, offset, 33 * MIB)  # longer than one request may be
            assert data == struct.pack(f">{len(data) // 8}Q", *range(offset, offset + len(data), 8))


@pytest.mark.needs("qemu-nbd")
def test_an_export_that_does_not_exist_is_named_with_those_that_do(tmpfs_path: Path) -> None:
    with served(tmpfs_path, "qemu-nbd", "-t", "-e", "9", "-f", "raw", "-x", "vda", "/dev/zero") as endpoint:
        missing = Endpoint(None, 0, endpoint.socket_path, "vdz")
        assert [export.name for export in list_exports(missing)] == ["vda"]
        with pytest.raises(NotFoundError, match=r"'vdz'.*'vda'"):
            connect(missing)


@pytest.mark.needs("nbdkit")
def test_an_error_of_the_server_names_range_and_errno_and_leaves_the_connection(tmpfs_path: Path) -> None:
    """The eval plugin fails reads and writes at 1 MiB only; 8 threads around it are not disturbed."""
    command = (
        *NBDKIT, "eval", "get_size=echo 16M", "thread_model=echo parallel", "can_write=exit 0", "can_flush=exit 0",
        'pread=if [ "$4" = 1048576 ]; then echo EIO bad sector >&2; exit 1; fi; head -c "$3" /dev/zero',
        'pwrite=if [ "$4" = 1048576 ]; then echo ENOSPC full >&2; exit 1; fi; cat >/dev/null', "flush=exit 0",
    )  # fmt: skip
    with served(tmpfs_path, *command) as endpoint, connect(endpoint) as disk:

        def outcome(at: int) -> DiskIOError | None:
            try:
                disk.read_into(at * MIB, memoryview(bytearray(4096)))
            except DiskIOError as error:
                return error
            return None

        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(outcome, range(8)))
        error = outcomes.pop(1)
        assert outcomes == [None] * 7
        assert error is not None
        assert (error.errno, error.offset, error.length, error.next) == (errno.EIO, MIB, 4096, Next.RETRY)
        with pytest.raises(DiskIOError) as caught:
            disk.write(MIB, b"x" * 512)
        assert caught.value.errno == errno.ENOSPC
        disk.write(2 * MIB, b"x" * 512)
        disk.flush()


@pytest.mark.needs("nbdkit")
def test_requests_of_many_threads_overlap(tmpfs_path: Path) -> None:
    """16 reads of 100 ms each, one after another, would take 1.6 s."""
    command = (*NBDKIT, "--filter=delay", "memory", "16M", "rdelay=100ms")
    with served(tmpfs_path, *command) as endpoint, connect(endpoint) as disk, ThreadPoolExecutor(16) as pool:
        started = time.monotonic()
        list(pool.map(lambda at: read(disk, at * 4096, 4096), range(16)))
        assert time.monotonic() - started < 0.8


@pytest.mark.needs("nbdkit")
def test_a_server_that_hangs_is_given_up(tmpfs_path: Path) -> None:
    command = (*NBDKIT, "--filter=delay", "memory", "16M", "rdelay=3")
    with served(tmpfs_path, *command) as endpoint, connect(endpoint, timeout_s=0.3) as disk:
        with pytest.raises(DiskIOError, match="no byte for") as caught:
            read(disk, 0, 512)
        assert caught.value.next is Next.RECONNECT


@pytest.mark.needs("nbdkit")
def test_errors_at_random_never_pass_for_data(tmpfs_path: Path) -> None:
    command = (*NBDKIT, "--filter=error", "pattern", "64M", "error-pread-rate=30%", "error=ENOMEM")
    with served(tmpfs_path, *command) as endpoint, connect(endpoint) as disk, ThreadPoolExecutor(8) as pool:

        def outcome(at: int) -> bool:
            try:
                return read(disk, at * 4096, 4096)[:8] == struct.pack(">Q", at * 4096)
            except DiskIOError as error:
                return error.errno == errno.ENOMEM

        assert all(pool.map(outcome, range(400)))


@pytest.mark.needs("nbdkit")
def test_the_servers_block_sizes_are_kept(tmpfs_path: Path) -> None:
    command = (
        *NBDKIT, "--filter=blocksize-policy", "memory", "16M", "blocksize-error-policy=error",
        "blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=256K",
    )  # fmt: skip
    with served(tmpfs_path, *command) as endpoint, connect(endpoint) as disk:
        assert (disk.min_block, disk.preferred_block, disk.max_block) == (4096, 65536, 256 * 1024)
        content = os.urandom(2 * MIB)
        disk.write(4096, content)
        assert read(disk, 4096, 2 * MIB) == content


@pytest.mark.needs("nbdkit")
def test_without_multi_conn_a_session_of_a_writable_export_has_one_connection(tmpfs_path: Path) -> None:
    command = (*NBDKIT, "--filter=multi-conn", "memory", "64M", "multi-conn-mode=disable")
    with served(tmpfs_path, *command) as endpoint, Session.open(endpoint, 4) as disk:
        assert not disk.can_multi_conn
        assert disk.connections == 1
        write_and_read_back_by_many(disk)


@pytest.mark.needs("qemu-nbd", "qemu-img")
def test_a_server_that_lets_only_one_client_in_is_used_by_one_connection(tmpfs_path: Path) -> None:
    image = tmpfs_path / "d.raw"
    run("qemu-img", "create", "-f", "raw", str(image), "64M")
    with (
        served(tmpfs_path, "qemu-nbd", "-t", "-r", "-f", "raw", str(image)) as endpoint,
        Session.open(endpoint, 4, timeout_s=0.5) as disk,
    ):
        assert disk.connections == 1
        assert read(disk, 0, 4096) == bytes(4096)


@pytest.mark.needs("qemu-nbd", "qemu-img")
def test_a_read_only_export_is_not_written(tmpfs_path: Path) -> None:
    image = tmpfs_path / "d.raw"
    run("qemu-img", "create", "-f", "raw", str(image), "16M")
    with served(tmpfs_path, "qemu-nbd", "-t", "-r", "-f", "raw", str(image)) as endpoint, connect(endpoint) as disk:
        assert disk.read_only
        with pytest.raises(DiskIOError) as caught:
            disk.write(0, b"x")
        assert (caught.value.errno, caught.value.next) == (errno.EPERM, Next.GIVE_UP)


@pytest.mark.needs("nbdkit")
def test_a_session_goes_on_after_its_server_was_restarted(tmpfs_path: Path) -> None:
    """Answered but unflushed writes went down with the first server, so the flush must not succeed."""
    path = tmpfs_path / "again.sock"
    with served(tmpfs_path, *NBDKIT, "memory", "64M") as first:
        path.symlink_to(str(first.socket_path))
        session = Session.open(Endpoint(None, 0, str(path), ""), 1)
        session.write(0, b"x" * 4096)
    with session, served(tmpfs_path, *NBDKIT, "memory", "64M") as second:
        path.unlink()
        path.symlink_to(str(second.socket_path))
        with pytest.raises(DiskIOError):
            session.write(4096, b"y" * 4096)
        session.write(4096, b"y" * 4096)
        with pytest.raises(DiskIOError) as caught:
            session.flush()
        assert caught.value.next is Next.GIVE_UP
        session.write(0, b"x" * 4096)
        session.flush()
        assert read(session, 0, 8192) == b"x" * 4096 + b"y" * 4096


@pytest.mark.needs("qemu-storage-daemon", "qemu-img", "qemu-io")
def test_bitmap_depth_and_allocation_are_read_over_one_connection(tmpfs_path: Path) -> None:
    base, image = tmpfs_path / "base.qcow2", tmpfs_path / "top.qcow2"
    run("qemu-img", "create", "-f", "qcow2", str(base), "64M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 32M 1M", str(base))
    run("qemu-img", "create", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(image))
    run("qemu-img", "bitmap", "--add", str(image), "b0")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 64k", "-c", "write -P 3 63M 1M", str(image))
    contexts = ["base:allocation", "qemu:dirty-bitmap:b0", "qemu:allocation-depth", "qemu:dirty-bitmap:absent"]
    options = (
        "--blockdev", f"qcow2,node-name=d,file.driver=file,file.filename={image}",
        "--export", '{"type":"nbd","id":"e","node-name":"d","name":"d","bitmaps":["b0"],'
        '"allocation-depth":true,"writable":true}',
    )  # fmt: skip
    with storage_daemon(tmpfs_path, *options, export="d") as endpoint, connect(endpoint, contexts=contexts) as disk:
        assert disk.contexts == set(contexts[:3])
        assert whole(disk, "qemu:dirty-bitmap:b0") == [(MIB, 0), (65536, 1), (62 * MIB - 65536, 0), (MIB, 1)]
        assert whole(disk, "qemu:allocation-depth") == [
            (MIB, 0), (65536, 1), (31 * MIB - 65536, 0), (MIB, 2), (30 * MIB, 0), (MIB, 1),
        ]  # fmt: skip
        assert [span for span, flags in whole(disk, "base:allocation") if not flags & 1] == [65536, MIB, MIB]


@pytest.mark.needs("qemu-nbd", "qemu-img", "qemu-io")
def test_qemu_nbd_tells_a_persistent_bitmap(tmpfs_path: Path) -> None:
    image = tmpfs_path / "d.qcow2"
    run("qemu-img", "create", "-f", "qcow2", str(image), "8G")
    run("qemu-img", "bitmap", "--add", "-g", "64k", str(image), "b0")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 5G 64k", str(image))
    context = "qemu:dirty-bitmap:b0"
    with (
        served(tmpfs_path, "qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", "b0", str(image)) as endpoint,
        connect(endpoint, contexts=[context]) as disk,
    ):
        assert whole(disk, context) == [(5 << 30, 0), (65536, 1), ((3 << 30) - 65536, 0)]


def whole(disk: Connection, context: str) -> list[tuple[int, int]]:
    """The status of the whole export; neighbours joined."""
    joined: list[tuple[int, int]] = []
    offset = 0
    while offset < disk.size:
        for span, flags in disk.block_status(context, offset, disk.size - offset):
            if joined and joined[-1][1] == flags:
                span += joined.pop()[0]
            joined.append((span, flags))
        offset = sum(span for span, _ in joined)
    return joined


@pytest.mark.needs("nbdkit")
def test_a_server_that_is_no_nbd_server_is_refused(tmpfs_path: Path) -> None:
    with (
        served(tmpfs_path, *NBDKIT, "--oldstyle", "memory", "1M") as endpoint,
        pytest.raises(RefusedError, match="old"),
    ):
        connect(endpoint, timeout_s=5)
