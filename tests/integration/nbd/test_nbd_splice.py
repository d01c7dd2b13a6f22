"""Splicing between real servers and to a file: every byte, errors of either side, and connections usable afterwards."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from nbd_servers import MIB, served

from coordinator.model.errors import DiskIOError, Next
from workers.nbd.connection import Connection, connect
from workers.nbd.splice import splice_to_file, splice_to_nbd

pytestmark = pytest.mark.needs("nbdkit")
NBDKIT = ("nbdkit", "-f")
SIZE = 64 * MIB


def ranges(step: int = MIB) -> list[tuple[int, int]]:
    """The whole disk, in pieces of `step` bytes with a shorter last one."""
    return [(offset, min(step, SIZE - offset)) for offset in range(0, SIZE, step)]


def never() -> bool:
    return False


def content(disk: Connection) -> bytes:
    buffer = bytearray(disk.size)
    disk.read_into(0, memoryview(buffer))
    return bytes(buffer)


def failing(call: str, at: int) -> tuple[str, ...]:
    """A disk of zeroes that cannot read or write the range at `at`."""
    fail = f'if [ "$4" = {at} ]; then echo EIO bad sector >&2; exit 1; fi; '
    return (
        *NBDKIT, "eval", f"get_size=echo {SIZE}", "thread_model=echo parallel", "can_write=exit 0",
        f"pread={fail if call == 'pread' else ''}head -c $3 /dev/zero",
        f"pwrite={fail if call == 'pwrite' else ''}cat >/dev/null",
    )  # fmt: skip


@pytest.mark.parametrize("tcp", [True, False])
@pytest.mark.parametrize(("step", "depth"), [(MIB, 8), (100_000, 3), (65536, 1)])
def test_every_byte_arrives_where_it_belongs(tmpfs_path: Path, tcp: bool, step: int, depth: int) -> None:
    with (
        served(tmpfs_path, *NBDKIT, "pattern", str(SIZE), tcp=tcp) as here,
        served(tmpfs_path, *NBDKIT, "memory", str(SIZE), tcp=tcp) as there,
        connect(here, structured=False) as source,
        connect(there, structured=False) as target,
    ):
        assert splice_to_nbd(source, target, ranges(step), depth=depth).copied == SIZE
        target.flush()
        assert content(target) == content(source)


def test_every_byte_arrives_in_a_file(tmpfs_path: Path) -> None:
    path = tmpfs_path / "copy.raw"
    with (
        served(tmpfs_path, *NBDKIT, "pattern", str(SIZE)) as here,
        connect(here, structured=False) as source,
        path.open("wb") as file,
    ):
        assert splice_to_file(source, file.fileno(), ranges(100_000), depth=8).copied == SIZE
        assert path.read_bytes() == content(source)


def test_only_the_ranges_handed_out_are_copied(tmpfs_path: Path) -> None:
    with (
        served(tmpfs_path, *NBDKIT, "pattern", str(SIZE)) as here,
        served(tmpfs_path, *NBDKIT, "memory", str(SIZE)) as there,
        connect(here, structured=False) as source,
        connect(there, structured=False) as target,
    ):
        assert splice_to_nbd(source, target, ranges()[:10], depth=4).copied == 10 * MIB
        assert content(target)[: 10 * MIB] == content(source)[: 10 * MIB]
        assert content(target)[10 * MIB :] == bytes(SIZE - 10 * MIB)


@pytest.mark.parametrize("call", ["pread", "pwrite"])
def test_an_error_names_its_range_and_leaves_both_connections_usable(tmpfs_path: Path, call: str) -> None:
    with (
        served(tmpfs_path, *failing(call if call == "pread" else "", 5 * MIB)) as here,
        served(tmpfs_path, *failing(call if call == "pwrite" else "", 5 * MIB)) as there,
        connect(here, structured=False) as source,
        connect(there, structured=False) as target,
    ):
        with pytest.raises(DiskIOError) as caught:
            splice_to_nbd(source, target, ranges(), depth=4)
        error = caught.value
        assert (error.errno, error.offset, error.length, error.next) == (errno.EIO, 5 * MIB, MIB, Next.RETRY)
        assert str(here if call == "pread" else there) in error.message
        assert splice_to_nbd(source, target, ranges()[6:], depth=4).copied == SIZE - 6 * MIB


def test_a_full_file_leaves_the_connection_usable(tmpfs_path: Path) -> None:
    with (
        served(tmpfs_path, *NBDKIT, "pattern", str(SIZE)) as here,
        connect(here, structured=False) as source,
        Path("/dev/full").open("wb") as full,
        (tmpfs_path / "copy.raw").open("wb") as file,
    ):
        with pytest.raises(DiskIOError) as caught:
            splice_to_file(source, full.fileno(), ranges(), depth=4)
        assert caught.value.errno in (errno.ENOSPC, errno.EINVAL)
        assert splice_to_file(source, file.fileno(), ranges(), depth=4).copied == SIZE


def test_a_structured_connection_cannot_be_spliced(tmpfs_path: Path) -> None:
    with (
        served(tmpfs_path, *NBDKIT, "memory", str(SIZE)) as here,
        connect(here) as source,
        pytest.raises(ValueError, match="structured=False"),
    ):
        splice_to_file(source, 0, ranges(), depth=4)
