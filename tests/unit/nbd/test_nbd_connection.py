"""One connection against a scripted peer: order, silence, lies, and what a flush waits for."""

from __future__ import annotations

import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from scripted_server import MULTI, SIZE, WAIT_S, Peer, connected

from coordinator.model.errors import DiskIOError, Next
from workers.nbd.connection import Connection
from workers.nbd.wire import ChunkKind, Command, CommandFlag, TransmissionFlag

MIB = 1 << 20


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def connect() -> Iterator[Callable[..., tuple[Connection, Peer]]]:
    opened: list[tuple[Connection, Peer]] = []

    def make(**options: object) -> tuple[Connection, Peer]:
        opened.append(connected(**options))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for connection, peer in opened:
        connection.close()
        peer.close()


Connect = Callable[..., tuple[Connection, Peer]]


def read(connection: Connection, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    connection.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def failure(future: Future[object]) -> DiskIOError:
    error = future.exception(WAIT_S)
    assert isinstance(error, DiskIOError)
    return error


def test_answers_may_come_in_any_order(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect()
    calls = {at: threads.submit(read, connection, at * MIB, 65536) for at in range(16)}
    seen = sorted((peer.expect(Command.READ) for _ in calls), key=lambda request: -request.offset)
    for request in seen:
        peer.data(request, request.offset, struct.pack(">Q", request.offset) * 8192)
    for at, call in calls.items():
        assert call.result(WAIT_S) == struct.pack(">Q", at * MIB) * 8192


def test_leadership_is_handed_over_whoever_is_answered_first(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect(structured=False)
    for _ in range(200):
        calls = [threads.submit(read, connection, at * 512, 512) for at in range(4)]
        for request in reversed([peer.expect(Command.READ) for _ in calls]):
            peer.simple(request, data=struct.pack(">Q", request.offset) * 64)
        for at, call in enumerate(calls):
            assert call.result(WAIT_S) == struct.pack(">Q", at * 512) * 64


def test_a_call_longer_than_max_block_is_split_at_its_multiples(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect(max_block=65536)
    call = threads.submit(connection.write, 65536 - 512, b"a" * (2 * 65536))
    spans = []
    for _ in range(3):
        request = peer.expect(Command.WRITE)
        spans.append((request.offset, request.length))
        peer.simple(request)
    call.result(WAIT_S)
    assert spans == [(65536 - 512, 512), (65536, 65536), (2 * 65536, 65536 - 512)]


def test_zeroing_is_split_below_32_bits_and_carries_its_flags(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect(flags=MULTI | TransmissionFlag.SEND_FAST_ZERO)
    call = threads.submit(connection.write_zeroes, 0, SIZE, no_hole=True, fast=True, fua=True)
    request = peer.expect(Command.WRITE_ZEROES)
    peer.simple(request)
    call.result(WAIT_S)
    assert request.flags == CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO | CommandFlag.FUA
    assert request.length == SIZE


def test_fua_without_server_support_is_a_flush(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect(flags=TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH)
    call = threads.submit(connection.write, 0, b"x" * 512, fua=True)
    request = peer.expect(Command.WRITE)
    assert request.flags == 0
    peer.simple(request)
    peer.simple(peer.expect(Command.FLUSH))
    call.result(WAIT_S)


def test_flush_waits_for_every_write_before_it_and_for_none_after(
    connect: Connect, threads: ThreadPoolExecutor
) -> None:
    connection, peer = connect()
    first = threads.submit(connection.write, 0, b"x" * 512)
    second = threads.submit(connection.write, 512, b"x" * 512)
    writes = [peer.expect(Command.WRITE), peer.expect(Command.WRITE)]
    flush = threads.submit(connection.flush)
    assert peer.silent()
    later = threads.submit(connection.write, 1024, b"x" * 512)
    held = peer.expect(Command.WRITE)
    peer.simple(writes[0])
    assert peer.silent()
    peer.simple(writes[1])
    peer.simple(peer.expect(Command.FLUSH))
    flush.result(WAIT_S)
    peer.simple(held)
    for call in (first, second, later):
        call.result(WAIT_S)


def test_a_server_error_leaves_the_connection_usable(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect()
    call = threads.submit(connection.write, 4096, b"x" * 512)
    peer.simple(peer.expect(Command.WRITE), error=28)
    error = failure(call)
    assert (error.errno, error.offset, error.length, error.next) == (errno.ENOSPC, 4096, 512, Next.RETRY)
    call = threads.submit(connection.write, 4096, b"x" * 512)
    peer.simple(peer.expect(Command.WRITE))
    call.result(WAIT_S)


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(lambda peer, seen: peer.data(seen, 0, b"x" * 100), id="short answer"),
        pytest.param(lambda peer, seen: peer.data(seen, 512, b"x" * 512), id="other range"),
        pytest.param(lambda peer, seen: peer.chunk(seen, ChunkKind.OFFSET_HOLE, bytes(3)), id="malformed hole"),
        pytest.param(lambda peer, seen: peer.sock.sendall(b"HTTP/1.1 200 OK\r\n"), id="not NBD"),
        pytest.param(lambda peer, seen: peer.simple(seen, data=b"x" * 512), id="simple reply"),
    ],
)
def test_a_lying_server_breaks_the_connection_for_every_call(
    connect: Connect, threads: ThreadPoolExecutor, lie: Callable[[Peer, object], None]
) -> None:
    connection, peer = connect()
    calls = [threads.submit(read, connection, 0, 512) for _ in range(4)]
    seen = [peer.expect(Command.READ) for _ in calls]
    lie(peer, seen[2])
    for call in calls:
        error = failure(call)
        assert error.next is Next.RECONNECT
        assert "broke the protocol" in error.message
    with pytest.raises(DiskIOError) as caught:
        connection.flush()
    assert caught.value.next is Next.RECONNECT


def test_an_answer_to_no_request_breaks_the_connection(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect()
    call = threads.submit(connection.write, 0, b"x")
    request = peer.expect(Command.WRITE)
    peer.sock.sendall(struct.pack(">IIQ", 0x67446698, 0, request.cookie + 77))
    assert "not in flight" in failure(call).message


def test_an_end_in_mid_payload_breaks_the_connection(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect(structured=False)
    calls = [threads.submit(read, connection, 0, MIB) for _ in range(3)]
    requests = [peer.expect(Command.READ) for _ in calls]
    peer.simple(requests[1], data=b"x" * 1000)
    peer.close()
    for call in calls:
        error = failure(call)
        assert error.next is Next.RECONNECT
        assert error.length == MIB


def test_a_silent_server_is_given_up_after_the_timeout(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect(timeout_s=0.2)
    calls = [threads.submit(read, connection, 0, 512) for _ in range(4)]
    for _ in calls:
        peer.expect(Command.READ)
    for call in calls:
        error = failure(call)
        assert error.next is Next.RECONNECT
        assert "no byte for 0.2 s" in error.message


def test_a_server_that_takes_nothing_is_given_up_after_the_timeout(
    connect: Connect, threads: ThreadPoolExecutor
) -> None:
    connection, _ = connect(timeout_s=0.2)
    error = failure(threads.submit(connection.write, 0, bytes(32 * MIB)))
    assert error.next is Next.RECONNECT


def test_abort_breaks_pending_and_later_calls(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect()
    calls = [threads.submit(read, connection, 0, 512) for _ in range(8)]
    for _ in calls:
        peer.expect(Command.READ)
    connection.abort()
    for call in calls:
        assert failure(call).next is Next.RECONNECT
    with pytest.raises(DiskIOError, match="aborted"):
        connection.write(0, b"x")


def test_close_says_goodbye_and_may_be_repeated(connect: Connect) -> None:
    connection, peer = connect()
    connection.close()
    connection.close()
    peer.expect(Command.DISC)
    with pytest.raises(DiskIOError, match="closed by this side"):
        connection.flush()


def test_block_status_is_clipped_to_the_end_of_the_export(connect: Connect, threads: ThreadPoolExecutor) -> None:
    connection, peer = connect(contexts={"base:allocation": 3, "qemu:dirty-bitmap:b": 4})
    call = threads.submit(connection.block_status, "qemu:dirty-bitmap:b", SIZE - 8192, 8192)
    request = peer.expect(Command.BLOCK_STATUS)
    peer.chunk(request, ChunkKind.BLOCK_STATUS, struct.pack(">III", 3, 4096, 0), done=False)
    peer.chunk(request, ChunkKind.BLOCK_STATUS, struct.pack(">IIIII", 4, 4096, 1, MIB, 0))
    assert call.result(WAIT_S) == [(4096, 1), (4096, 0)]


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda c: c.write(SIZE - 1, b"xx"), errno.EINVAL),
        (lambda c: c.read_into(-1, memoryview(bytearray(1))), errno.EINVAL),
        (lambda c: c.write_zeroes(0, 512, fast=True), errno.ENOTSUP),
        (lambda c: c.block_status("base:allocation", 0, 512), errno.ENOTSUP),
    ],
)
def test_what_a_server_must_refuse_is_never_sent(
    connect: Connect, call: Callable[[Connection], None], number: int
) -> None:
    connection, peer = connect()
    with pytest.raises(DiskIOError) as caught:
        call(connection)
    assert (caught.value.errno, caught.value.next) == (number, Next.GIVE_UP)
    assert peer.silent(0.01)


def test_a_read_only_export_takes_no_write_and_needs_no_flush(connect: Connect) -> None:
    connection, peer = connect(flags=TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY)
    connection.flush()
    with pytest.raises(DiskIOError) as caught:
        connection.write(0, b"x")
    assert caught.value.errno == errno.EPERM
    assert peer.silent(0.01)


def test_a_server_without_flush_cannot_promise_durability(connect: Connect) -> None:
    connection, _ = connect(flags=TransmissionFlag.HAS_FLAGS)
    with pytest.raises(DiskIOError) as caught:
        connection.flush()
    assert (caught.value.errno, caught.value.next) == (errno.ENOTSUP, Next.GIVE_UP)


def test_many_threads_each_get_their_own_bytes(connect: Connect, threads: ThreadPoolExecutor) -> None:
    """A memory disk behind the peer; 16 callers write and read back in slices of their own."""
    connection, peer = connect(max_block=8192)
    disk = bytearray(16 * 16384)

    def serve() -> None:
        while True:
            request = peer.request()
            place = slice(request.offset, request.offset + request.length)
            if request.command == Command.DISC:
                return
            if request.command == Command.WRITE:
                disk[place] = request.payload
                peer.simple(request)
            else:
                peer.data(request, request.offset, bytes(disk[place]))

    def use(at: int) -> bool:
        for _ in range(20):
            content = os.urandom(16384)
            connection.write(at * 16384, content)
            if read(connection, at * 16384, 16384) != content:
                return False
        return True

    server = threading.Thread(target=serve)
    server.start()
    try:
        assert all(threads.map(use, range(16), timeout=20))
    finally:
        connection.close()
        server.join(WAIT_S)


class Interrupted(BaseException):
    """Raised in a signal handler, as Celery's limits and Ctrl-C are."""


@pytest.mark.parametrize("leading", [True, False])
def test_an_interrupted_call_breaks_the_connection_instead_of_leaving_others_without_a_reader(
    connect: Connect, threads: ThreadPoolExecutor, leading: bool
) -> None:
    connection, peer = connect()
    others = [] if leading else [threads.submit(read, connection, 0, 512)]
    for _ in others:
        peer.expect(Command.READ)

    def interrupt(*_: object) -> None:
        others.append(threads.submit(read, connection, 512, 512))
        peer.expect(Command.READ)
        peer.expect(Command.READ)
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupted):
            connection.read_into(1024, memoryview(bytearray(512)))
    finally:
        signal.signal(signal.SIGALRM, before)
    for call in others:
        assert failure(call).next is Next.RECONNECT
