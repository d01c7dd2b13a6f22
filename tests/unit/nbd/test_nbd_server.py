"""Requests and how they are answered, with our own client and byte by byte."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from raw_client import RawClient, serving, unix
from served_disks import FailingDisk, LayeredMemoryDisk, MemoryDisk
from structlog.testing import capture_logs

from coordinator.model.errors import DiskIOError, Next, RefusedError, UnavailableError, UsageError
from coordinator.model.extent import Extent, Status
from workers.nbd.connection import Connection, connect
from workers.nbd.endpoint import Endpoint
from workers.nbd.server import Server, listen
from workers.nbd.server_answers import MAX_DESCRIPTORS, MIN_HOLE_BYTES
from workers.nbd.session import Session
from workers.nbd.wire import Command, CommandFlag

MIB = 1 << 20
SIZE = 64 * MIB
HOLE_AND_ZERO, ZERO, DATA = 3, 2, 0


@pytest.fixture
def disk() -> MemoryDisk:
    return FailingDisk(SIZE)


@pytest.fixture
def endpoint(tmpfs_path: Path, disk: MemoryDisk) -> Iterator[Endpoint]:
    """The disk, and as "1" one that must not be written."""
    endpoint = unix(tmpfs_path)
    with serving(endpoint, disk, MemoryDisk(SIZE, read_only=True)):
        yield endpoint


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[RawClient]:
    """In transmission, with structured replies and base:allocation."""
    with RawClient(endpoint) as client:
        yield client.go()


@pytest.fixture
def read_only(endpoint: Endpoint) -> Iterator[RawClient]:
    with RawClient(Endpoint(None, 0, endpoint.socket_path, "1")) as client:
        yield client.go()


def read(disk: Connection | Session, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def use_by_many(target: Session, disk: MemoryDisk) -> None:
    """16 threads write, zero and trim ranges of any length in MiBs of their own; then all of it is compared."""
    expected = bytearray(SIZE)

    def use(thread: int) -> None:
        rng = random.Random(thread)
        for turn in range(4):
            offset = (thread * 4 + turn) * MIB + rng.randrange(100_000)
            length = rng.choice([1, 511, 4096, 65536, 300_000, 900_000])
            content = os.urandom(length)
            target.write(offset, content, fua=rng.random() < 0.2)
            expected[offset : offset + length] = content
            assert read(target, offset, length) == content
            cleared = rng.randrange(length)
            (target.trim if turn == 0 else target.write_zeroes)(offset, cleared)
            expected[offset : offset + cleared] = bytes(cleared)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(16)))
    target.flush()
    assert disk.content == expected
    assert read(target, 0, SIZE) == expected


@pytest.mark.parametrize("structured", [True, False])
def test_many_threads_on_many_connections_find_what_they_wrote(
    endpoint: Endpoint, disk: MemoryDisk, structured: bool
) -> None:
    with Session.open(endpoint, 3, structured=structured) as target:
        assert target.connections == 3
        use_by_many(target, disk)


def test_many_threads_find_what_they_wrote_over_tcp() -> None:
    disk = MemoryDisk(SIZE)
    listener = listen(Endpoint("127.0.0.1", 0, None, ""))
    endpoint = Endpoint("127.0.0.1", listener.getsockname()[1], None, "")
    with Server({"": disk}, listener), Session.open(endpoint, 2) as target:
        use_by_many(target, disk)


def test_holes_are_told_and_not_sent(client: RawClient, disk: MemoryDisk) -> None:
    disk.fill(MIB, b"a" * MIB)
    disk.fill(3 * MIB, b"b" * 4096)
    disk.fill(3 * MIB + 4096 + MIN_HOLE_BYTES - 4096, b"c" * 4096)
    answer = client.ask(Command.READ, 512, 4 * MIB)
    assert answer.holes == [
        (512, MIB - 512),
        (2 * MIB, MIB),
        (3 * MIB + 4096 + MIN_HOLE_BYTES, MIB - 4096 - MIN_HOLE_BYTES + 512),
    ]
    assert answer.data == {
        MIB: b"a" * MIB,
        3 * MIB: b"b" * 4096 + bytes(MIN_HOLE_BYTES - 4096) + b"c" * 4096,
    }
    unfragmented = client.ask(Command.READ, 512, 4 * MIB, flags=CommandFlag.DF)
    assert unfragmented.chunks == 1
    assert unfragmented.data == {512: bytes(disk.content[512 : 512 + 4 * MIB])}


def test_a_read_with_more_holes_than_one_sendmsg_takes_is_whole(client: RawClient, disk: MemoryDisk) -> None:
    for at in range(0, 32 * MIB, 2 * MIN_HOLE_BYTES):
        disk.fill(at, at.to_bytes(4, "big") * (MIN_HOLE_BYTES // 4))
    answer = client.ask(Command.READ, 0, 32 * MIB)
    assert answer.chunks == 32 * MIB // MIN_HOLE_BYTES
    back = bytearray(b"\xee") * (32 * MIB)
    for offset, data in answer.data.items():
        back[offset : offset + len(data)] = data
    for offset, length in answer.holes:
        back[offset : offset + length] = bytes(length)
    assert back == disk.content[: 32 * MIB]


def test_without_quick_lookups_holes_are_sent_as_data(client: RawClient, disk: MemoryDisk) -> None:
    disk.finds_holes_fast = False
    assert client.ask(Command.READ, 0, MIB).data == {0: bytes(MIB)}


@pytest.mark.parametrize(
    ("command", "offset", "length", "expected"),
    [
        (Command.READ, SIZE - 1, 2, errno.EINVAL),
        (Command.READ, 2**64 - 1, 1, errno.EINVAL),
        (Command.READ, 0, 32 * MIB + 1, errno.EINVAL),
        (Command.WRITE, SIZE - 1, 2, errno.ENOSPC),
        (Command.WRITE, 0, 32 * MIB + 1, errno.EINVAL),
        (Command.WRITE_ZEROES, SIZE - 1, 2, errno.ENOSPC),
        (Command.TRIM, SIZE - 1, 2, errno.EINVAL),
        (Command.BLOCK_STATUS, SIZE - 1, 2, errno.EINVAL),
        (Command.BLOCK_STATUS, 0, 0, errno.EINVAL),
        (Command.CACHE, 0, 512, errno.EINVAL),
        (99, 0, 512, errno.EINVAL),
    ],
)
def test_what_cannot_be_is_answered_and_changes_nothing(
    client: RawClient, disk: MemoryDisk, command: int, offset: int, length: int, expected: int
) -> None:
    payload = b"x" * length if command == Command.WRITE else b""
    answer = client.ask(command, offset, length, payload)
    assert answer.errno == expected
    assert answer.message
    assert client.ask(Command.READ, 0, 4096).data == {0: bytes(4096)}, "what follows is understood"
    assert disk.calls == []


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (Command.READ, CommandFlag.NO_HOLE),
        (Command.WRITE, CommandFlag.DF),
        (Command.FLUSH, CommandFlag.REQ_ONE),
        (Command.TRIM, CommandFlag.FAST_ZERO),
        (Command.WRITE_ZEROES, 1 << 15),
        (Command.BLOCK_STATUS, CommandFlag.DF),
    ],
)
def test_a_flag_its_command_has_not_is_refused(
    client: RawClient, disk: MemoryDisk, command: Command, flags: int
) -> None:
    payload = b"x" * 512 if command == Command.WRITE else b""
    assert client.ask(command, 0, 512, payload, flags).errno == errno.EINVAL
    assert disk.calls == []


def test_dont_fragment_is_refused_where_it_was_not_offered(endpoint: Endpoint) -> None:
    with RawClient(endpoint) as client:
        client.go(structured=False)
        assert client.ask(Command.READ, 0, 512, flags=CommandFlag.DF).errno == errno.EINVAL


def test_a_read_only_export_is_not_written_and_its_flush_does_nothing(read_only: RawClient) -> None:
    assert read_only.ask(Command.WRITE, 0, 4096, b"x" * 4096).errno == errno.EPERM
    assert read_only.ask(Command.WRITE_ZEROES, 0, 4096).errno == errno.EPERM
    assert read_only.ask(Command.TRIM, 0, 4096).errno == errno.EPERM
    assert read_only.ask(Command.FLUSH).errno == 0
    assert read_only.ask(Command.READ, 0, 4096).data == {0: bytes(4096)}


def test_requests_of_no_length_succeed_without_the_disk(client: RawClient, disk: MemoryDisk) -> None:
    for command in (Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM):
        assert client.ask(command, SIZE, 0).errno == 0
    assert disk.calls == []


def test_an_answer_with_fua_comes_after_a_flush(client: RawClient, disk: MemoryDisk) -> None:
    client.ask(Command.WRITE, 0, 512, b"x" * 512)
    client.ask(Command.WRITE, 0, 512, b"x" * 512, CommandFlag.FUA)
    client.ask(Command.WRITE_ZEROES, 0, 512, flags=CommandFlag.FUA)
    client.ask(Command.TRIM, 0, 512, flags=CommandFlag.FUA)
    client.ask(Command.READ, 0, 512, flags=CommandFlag.FUA)
    assert disk.calls == ["write 0 512", "write 0 512", "flush", "zero 0 512 trim", "flush", "trim 0 512", "flush"]


def test_zeroes_stay_allocated_if_asked_for_and_fast_or_not_at_all(client: RawClient, disk: MemoryDisk) -> None:
    disk.fill(0, b"x" * 8192)
    assert client.ask(Command.WRITE_ZEROES, 0, 4096, flags=CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO).errno == 0
    disk.zeroes_fast = False
    assert client.ask(Command.WRITE_ZEROES, 4096, 4096, flags=CommandFlag.FAST_ZERO).errno == errno.ENOTSUP
    assert disk.calls == ["zero 0 4096 keep"]
    assert client.ask(Command.READ, 0, 8192).data == {0: bytes(4096) + b"x" * 4096}


def test_block_status_is_what_the_disk_says_neighbours_joined(client: RawClient, disk: MemoryDisk) -> None:
    disk.fill(MIB, b"a" * MIB)
    disk.fill(2 * MIB, b"b" * MIB)
    disk.write_zeroes(3 * MIB, MIB, may_trim=False)
    everything = [(MIB, HOLE_AND_ZERO), (2 * MIB, DATA), (MIB, ZERO), (SIZE - 4 * MIB, HOLE_AND_ZERO)]
    assert client.ask(Command.BLOCK_STATUS, 0, SIZE).status == everything
    assert client.ask(Command.BLOCK_STATUS, 0, SIZE, flags=CommandFlag.REQ_ONE).status == everything[:1]
    assert client.ask(Command.BLOCK_STATUS, 512, 1024).status == [(1024, HOLE_AND_ZERO)]


def test_block_status_stops_early_and_is_continued(endpoint: Endpoint, disk: MemoryDisk) -> None:
    disk.extents = lambda offset, length: (  # type: ignore[method-assign]
        Extent(at, 1024, Status.DIRTY if at & 1024 else Status.HOLE) for at in range(offset, offset + length, 1024)
    )
    with connect(endpoint, contexts=["base:allocation"]) as target:
        first = target.block_status("base:allocation", 0, SIZE)
        told = MAX_DESCRIPTORS * 1024
        rest = target.block_status("base:allocation", told, SIZE - told)
    assert first == [(1024, HOLE_AND_ZERO), (1024, DATA)] * (MAX_DESCRIPTORS // 2)
    assert sum(length for length, _ in first + rest) == SIZE


def test_a_disk_of_layers_tells_its_own_beside_what_it_holds(tmpfs_path: Path) -> None:
    disk, endpoint = LayeredMemoryDisk(4 * MIB, read_only=True), unix(tmpfs_path)
    disk.fill(0, b"a" * MIB)
    allocation, depth = "base:allocation", "qemu:allocation-depth"
    with serving(endpoint, disk), connect(endpoint, contexts=[allocation, depth]) as both:
        assert both.contexts == {allocation, depth}
        assert both.block_status(depth, 0, 4 * MIB) == [(MIB, 1), (MIB, 0)] * 2
        assert both.block_status(depth, MIB // 2, MIB) == [(MIB // 2, 1), (MIB // 2, 0)]
        assert both.block_status(allocation, 0, 4 * MIB) == [(MIB, DATA), (3 * MIB, HOLE_AND_ZERO)]
        with connect(endpoint, contexts=[depth]) as alone:
            assert alone.block_status(depth, 0, 2 * MIB) == [(MIB, 1), (MIB, 0)]


@pytest.mark.parametrize("extents", [[], [Extent(4096, SIZE, Status.HOLE)]])
def test_a_disk_that_leaves_a_gap_is_not_believed(client: RawClient, disk: MemoryDisk, extents: list[Extent]) -> None:
    disk.extents = lambda offset, length: iter(extents)  # type: ignore[method-assign]
    assert client.ask(Command.BLOCK_STATUS, 0, SIZE).errno == errno.EIO


def test_what_the_disk_says_nothing_about_is_read(client: RawClient, disk: MemoryDisk) -> None:
    disk.fill(MIB, b"a" * MIB)
    disk.extents = lambda offset, length: iter([Extent(0, MIB, Status.HOLE)])  # type: ignore[method-assign]
    answer = client.ask(Command.READ, 0, 2 * MIB)
    assert (answer.holes, answer.data) == ([(0, MIB)], {MIB: b"a" * MIB})


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (DiskIOError("full", errno_=errno.ENOSPC), errno.ENOSPC),
        (DiskIOError("over quota", errno_=errno.EDQUOT), errno.ENOSPC),
        (DiskIOError("remounted", errno_=errno.EROFS), errno.EPERM),
        (DiskIOError("gone", errno_=errno.ESHUTDOWN), errno.ESHUTDOWN),
        (DiskIOError("odd", errno_=errno.ENXIO), errno.EIO),
        (RuntimeError("a secret"), errno.EIO),
    ],
)
@pytest.mark.parametrize("structured", [True, False])
def test_an_error_of_the_disk_is_answered_and_logged_and_the_connection_goes_on(
    endpoint: Endpoint, disk: FailingDisk, raised: Exception, expected: int, structured: bool
) -> None:
    with RawClient(endpoint) as client, capture_logs() as lines:
        client.go(structured=structured)
        commands = [Command.READ, Command.WRITE, Command.FLUSH] + [Command.BLOCK_STATUS] * structured
        for command in commands:
            payload = b"x" * 4096 if command == Command.WRITE else b""
            length = 0 if command == Command.FLUSH else 4096
            disk.error = raised
            answer = client.ask(command, 0, length, payload)
            assert answer.errno == expected
            if structured:
                assert answer.message == getattr(raised, "message", "the server has a bug")
            disk.error = None
            assert client.ask(command, 0, length, payload).errno == 0
    failed = [line for line in lines if line["log_level"] in ("warning", "error")]
    assert [line["request"] for line in failed] == [command.name for command in commands]


def test_a_read_that_fails_half_way_gives_no_data(client: RawClient, disk: FailingDisk) -> None:
    disk.fill(MIB, b"a" * MIB)
    disk.fill(3 * MIB, b"b" * MIB)
    disk.error = DiskIOError("bad sector", errno_=errno.EIO)
    disk.extents = lambda offset, length: MemoryDisk.extents(disk, offset, length)  # type: ignore[method-assign]
    answer = client.ask(Command.READ, 0, 4 * MIB)
    assert (answer.errno, answer.data, answer.holes) == (errno.EIO, {}, [])


def test_our_client_hears_the_disks_errno_and_words(endpoint: Endpoint, disk: FailingDisk) -> None:
    disk.error = DiskIOError("the pool is full", errno_=errno.ENOSPC)
    with connect(endpoint) as target:
        with pytest.raises(DiskIOError, match="the pool is full") as caught:
            target.write(0, b"x" * 512)
        assert (caught.value.errno, caught.value.next) == (errno.ENOSPC, Next.RETRY)
        disk.error = None
        target.write(0, b"x" * 512)


def test_a_dead_socket_is_replaced_and_a_live_one_is_not(tmpfs_path: Path) -> None:
    endpoint = unix(tmpfs_path)
    with pytest.raises(UnavailableError, match="cannot listen"):
        listen(unix(tmpfs_path / "absent"))
    with serving(endpoint, MemoryDisk(MIB)), pytest.raises(RefusedError, match="already"):
        listen(endpoint)
    assert Path(str(endpoint.socket_path)).is_socket(), "left behind"
    with serving(endpoint, MemoryDisk(MIB)), connect(endpoint) as target:
        assert target.size == MIB


def test_what_is_no_socket_is_not_replaced(tmpfs_path: Path) -> None:
    (tmpfs_path / "served.sock").write_text("precious")
    with pytest.raises(UnavailableError):
        listen(unix(tmpfs_path))
    assert (tmpfs_path / "served.sock").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "disk"),
    [
        ("n" * 4097, MemoryDisk(MIB)),
        ("", MemoryDisk(MIB, preferred_block=3000)),
        ("", MemoryDisk(MIB, preferred_block=256)),
    ],
)
def test_an_export_that_nbd_cannot_offer_is_refused_at_once(tmpfs_path: Path, name: str, disk: MemoryDisk) -> None:
    with listen(unix(tmpfs_path)) as listener, pytest.raises(UsageError):
        Server({name: disk}, listener)
