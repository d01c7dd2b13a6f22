"""What one client may do to the server and to others: wait, flood, stop reading, vanish, send garbage."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_client import BOTH_FLAGS, WAIT_S, RawClient, is_served, serving, unix
from served_disks import GatedDisk, MemoryDisk

from workers.nbd import server, wire
from workers.nbd.connection import connect
from workers.nbd.endpoint import Endpoint
from workers.nbd.server import Server
from workers.nbd.server_connection import Limits
from workers.nbd.server_requests import Asked
from workers.nbd.server_threads import RequestThreads
from workers.nbd.wire import Command, Option

MIB = 1 << 20
SIZE = 64 * MIB
OPEN = GatedDisk.GATED_BYTES
"""From here on a gated disk does not wait."""


@pytest.fixture
def disk() -> Iterator[GatedDisk]:
    disk = GatedDisk(SIZE)
    yield disk
    disk.gate.set()


@pytest.fixture
def endpoint(tmpfs_path: Path) -> Endpoint:
    return unix(tmpfs_path)


@pytest.fixture
def client(endpoint: Endpoint, disk: GatedDisk) -> Iterator[RawClient]:
    """In transmission with a server of default limits."""
    with serving(endpoint, disk), RawClient(endpoint) as client:
        yield client.go()
        disk.gate.set()


def eventually(reached: Callable[[], bool]) -> bool:
    """For what no event tells of; a test that waits for WAIT_S has failed."""
    deadline = time.monotonic() + WAIT_S
    while not reached() and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    return reached()


def test_answers_overtake_a_request_that_waits_for_the_disk(client: RawClient, disk: GatedDisk) -> None:
    slow = client.send(Command.READ, 0, 4096)
    slow_write = client.send(Command.WRITE, 4096, 4096, b"x" * 4096)
    assert client.ask(Command.READ, OPEN, 4096).errno == 0
    assert client.ask(Command.FLUSH).errno == 0, "it covers what was answered, and waits for nothing else"
    assert disk.calls == ["flush"]
    disk.gate.set()
    assert {client.answer()[0], client.answer()[0]} == {slow, slow_write}


def test_as_many_requests_are_with_the_disk_as_there_are_threads(endpoint: Endpoint, disk: GatedDisk) -> None:
    with serving(endpoint, disk, limits=Limits(request_threads=3)), RawClient(endpoint) as client:
        client.go()
        cookies = {client.send(Command.READ, 0, 4096) for _ in range(20)}
        for _ in range(3):
            assert disk.entered.acquire(timeout=WAIT_S)
        assert not disk.entered.acquire(timeout=0.05)
        disk.gate.set()
        assert {client.answer()[0] for _ in range(20)} == cookies


def test_no_more_is_read_than_the_budget_allows_until_it_is_answered(endpoint: Endpoint, disk: GatedDisk) -> None:
    """Four writes are read, the fifth not even begun: the client's buffers fill up."""
    with (
        serving(endpoint, disk, limits=Limits(budget_bytes=4 * MIB)),
        RawClient(endpoint) as client,
    ):
        client.go()
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for at in range(4):
            client.send(Command.WRITE, at, MIB, b"x" * MIB)
        for _ in range(4):
            assert disk.entered.acquire(timeout=WAIT_S)
        client.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.sock.sendall(wire.encode_request(0, Command.WRITE, 99, 0, 16 * MIB) + bytes(16 * MIB))
        assert not disk.entered.acquire(blocking=False)
        disk.gate.set()
        client.sock.settimeout(WAIT_S)
        for _ in range(4):
            assert client.answer()[1].errno == 0


def test_requests_that_wait_for_a_thread_are_bounded_too(endpoint: Endpoint, disk: GatedDisk) -> None:
    """With one thread held up, 2 MiB more are read, and the rest stays with the client."""
    with serving(endpoint, disk, limits=Limits(request_threads=1)), RawClient(endpoint) as client:
        client.go()
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.send(Command.WRITE, 0, MIB, b"x" * MIB)
        assert disk.entered.acquire(timeout=WAIT_S)
        held_by_sockets = 4 * MIB
        assert write_until_stuck(client) * MIB <= 2 * MIB + held_by_sockets
        disk.gate.set()


def write_until_stuck(client: RawClient) -> int:
    """How many writes of 1 MiB the server takes."""
    client.sock.settimeout(0.2)
    sent = 0
    with suppress(TimeoutError):
        while sent < 100:
            client.send(Command.WRITE, 0, MIB, b"x" * MIB)
            sent += 1
    return sent


def test_memory_of_answered_reads_is_used_again(endpoint: Endpoint) -> None:
    used: list[object] = []
    disk = MemoryDisk(SIZE)
    disk.finds_holes_fast = False
    disk.read_into = lambda offset, buffer: used.append(buffer.obj)  # type: ignore[method-assign]
    with serving(endpoint, disk), RawClient(endpoint) as client:
        client.go()
        for _ in range(20):
            client.ask(Command.READ, 0, MIB)
    assert len({id(memory) for memory in used}) <= 2, "the answer may come before its memory is free"


def stall(client: RawClient, disk: MemoryDisk, reads: int = 64) -> None:
    """Ask for far more than any socket holds, and read none of it."""
    disk.fill(OPEN, b"d" * MIB)
    for _ in range(reads):
        client.send(Command.READ, OPEN, MIB)


def test_a_client_that_reads_no_reply_holds_no_thread_of_others(endpoint: Endpoint, disk: GatedDisk) -> None:
    with (
        serving(endpoint, disk, limits=Limits(request_threads=1)),
        RawClient(endpoint) as first,
        RawClient(endpoint) as second,
        RawClient(endpoint) as other,
    ):
        for client in (first, second):
            stall(client.go(), disk)
        other.go()
        for _ in range(100):
            assert other.ask(Command.READ, OPEN, 4096).data == {OPEN: b"d" * 4096}
        for client in (first, second):
            for _ in range(64):
                assert client.answer()[1].data == {OPEN: b"d" * MIB}, "whoever reads at last misses nothing"


def test_a_client_that_reads_no_reply_for_too_long_is_dropped(endpoint: Endpoint, disk: GatedDisk) -> None:
    with (
        serving(endpoint, disk, limits=Limits(send_timeout_s=0.2)) as served,
        RawClient(endpoint) as client,
        RawClient(endpoint) as other,
    ):
        other.go()
        stall(client.go(), disk)
        assert eventually(lambda: served.connections == 1)
        assert client.drain() < 64 * MIB
        assert other.ask(Command.READ, OPEN, 4096).errno == 0


def test_clients_take_turns_however_many_requests_one_of_them_has() -> None:
    order: list[str] = []
    over = threading.Event()

    def carry_out(asked: Asked) -> None:
        order.append(f"flood {asked.cookie}")
        if asked.cookie == 3:
            over.set()

    threads = RequestThreads(1)
    flood, other = threads.lane(carry_out), threads.lane(lambda asked: order.append(f"other {asked.cookie}"))
    for cookie in range(4):
        flood.put(Asked(Command.FLUSH, 0, cookie, 0, 0, None, 4096))
    for cookie in range(2):
        other.put(Asked(Command.FLUSH, 0, cookie, 0, 0, None, 4096))
    threads.start()
    assert over.wait(WAIT_S)
    assert threads.close(time.monotonic() + WAIT_S)
    assert order == ["flood 0", "other 0", "flood 1", "other 1", "flood 2", "flood 3"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 28,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        wire.encode_request(0, Command.READ, 1, OPEN, 4096) + b"\xff" * 64,
    ],
)
def test_garbage_ends_its_own_connection_alone(client: RawClient, endpoint: Endpoint, garbage: bytes) -> None:
    with RawClient(endpoint) as other:
        other.go().sock.sendall(garbage)
        other.drain()
        assert client.ask(Command.READ, OPEN, 4096).errno == 0
    assert is_served(endpoint)


def test_a_client_that_vanishes_in_mid_request_harms_nobody(endpoint: Endpoint, disk: GatedDisk) -> None:
    with serving(endpoint, disk) as served:
        with RawClient(endpoint) as client:
            client.go().send(Command.WRITE, 0, 4096, b"x" * 4096)
            assert disk.entered.acquire(timeout=WAIT_S)
            client.send(Command.WRITE, OPEN, MIB, b"half a payload")
        assert eventually(lambda: served.connections == 0)
        disk.gate.set()
        with connect(endpoint) as target:
            target.write(OPEN, b"y" * 512)
    assert disk.calls[-1] == f"write {OPEN} 512"
    assert f"write {OPEN} {MIB}" not in disk.calls


def test_what_no_thread_has_begun_is_dropped_with_its_client(endpoint: Endpoint, disk: GatedDisk) -> None:
    with serving(endpoint, disk, limits=Limits(request_threads=1)):
        with RawClient(endpoint) as client:
            client.go().send(Command.READ, 0, 4096)
            assert disk.entered.acquire(timeout=WAIT_S)
            client.send(Command.WRITE, OPEN, 4096, b"x" * 4096)
            client.sock.sendall(b"garbage, read after the write" + bytes(28))
            client.drain()
        disk.gate.set()
    assert disk.calls == []


def test_a_disconnect_waits_for_what_is_in_flight(client: RawClient, disk: GatedDisk) -> None:
    cookie = client.send(Command.WRITE, 0, 4096, b"x" * 4096)
    client.send(Command.DISC)
    assert disk.entered.acquire(timeout=WAIT_S)
    disk.gate.set()
    assert client.answer()[0] == cookie
    assert client.is_closed()


def test_close_ends_every_client_wherever_it_is(endpoint: Endpoint, disk: GatedDisk) -> None:
    with (
        serving(endpoint, disk) as served,
        RawClient(endpoint) as silent,
        RawClient(endpoint) as haggling,
        RawClient(endpoint) as idle,
        RawClient(endpoint) as stalled,
        RawClient(endpoint) as leaving,
    ):
        haggling.greet()
        idle.go()
        stall(stalled.go(), disk)
        leaving.go().send(Command.READ, 0, 4096)
        leaving.send(Command.DISC)
        assert disk.entered.acquire(timeout=WAIT_S)
        threading.Timer(0.1, disk.gate.set).start()
        served.close()
        served.close()
        assert served.connections == 0
        for client in (silent, haggling, idle, stalled, leaving):
            client.drain()
        with pytest.raises(ConnectionRefusedError):
            RawClient(endpoint)


def test_close_does_not_wait_for_ever_for_a_disk_that_hangs(
    endpoint: Endpoint, disk: GatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLOSE_TIMEOUT_S", 0.2)
    with serving(endpoint, disk), RawClient(endpoint) as client:
        client.go().send(Command.READ, 0, 4096)
        assert disk.entered.acquire(timeout=WAIT_S)
    assert not disk.gate.is_set(), "closed although the read still hangs"


def test_a_server_that_was_never_started_can_be_closed(endpoint: Endpoint) -> None:
    Server({}, server.listen(endpoint)).close()


def test_clients_past_the_limit_are_turned_away_until_another_leaves(endpoint: Endpoint) -> None:
    with serving(endpoint, MemoryDisk(SIZE), limits=Limits(connections=2)) as served:
        with RawClient(endpoint) as first, RawClient(endpoint) as second, RawClient(endpoint) as third:
            first.go()
            second.go()
            assert third.is_closed()
        assert eventually(lambda: served.connections == 0)
        assert is_served(endpoint)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One server that has to survive all of it."""
    endpoint = unix(tmp_path_factory.mktemp("f"))
    disk = MemoryDisk(4 * MIB)
    disk.fill(0, b"precious" * 64)
    with serving(endpoint, disk, MemoryDisk(MIB, read_only=True)) as served:
        yield endpoint
        assert eventually(lambda: served.connections == 0)


def shout(endpoint: Endpoint, data: bytes) -> None:
    """Send it, say no more, and see the server close: it neither waits for more nor crashes."""
    with RawClient(endpoint) as client:
        try:
            client.sock.sendall(data)
            client.sock.shutdown(socket.SHUT_WR)
        except OSError:  # it had enough before it had all
            return
        client.drain()


U16, U32, U64 = st.integers(0, 0xFFFF), st.integers(0, wire.U32_MAX), st.integers(0, 2**64 - 1)
NAMES = st.sampled_from(["disk", "1", "", "absent"]) | st.text(max_size=20)
OPTION_DATA = (
    st.binary(max_size=60)
    | st.builds(lambda name, infos: wire.encode_go(name, infos), NAMES, st.lists(U16, max_size=3).map(tuple))
    | st.builds(lambda name, queries: wire.encode_meta_contexts(name, queries), NAMES, st.lists(NAMES).map(tuple))
)


@st.composite
def options(draw: st.DrawFn) -> bytes:
    """An option, mostly well-formed."""
    option = draw(st.sampled_from(Option) | st.integers(0, 12) | U32)
    data = draw(OPTION_DATA)
    length = draw(st.just(len(data)) | st.just(len(data)) | U32)
    return wire.OPTION.pack(draw(st.just(wire.IHAVEOPT) | U64), option, length) + data


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request, mostly well-formed, with small and with absurd ranges."""
    command = draw(st.sampled_from(Command) | U16)
    offset, length = draw(st.integers(0, 5 * MIB) | U64), draw(st.integers(0, 1 << 17) | U32)
    payload = b""
    if command == Command.WRITE:
        payload = draw(st.binary(max_size=64))
        length = draw(st.just(len(payload)) | st.just(length))
    magic = draw(st.just(wire.REQUEST_MAGIC) | st.just(wire.REQUEST_MAGIC) | U32)
    return wire.REQUEST.pack(magic, draw(U16), command, draw(U64), offset, length) + payload


GREETED = wire.CLIENT_FLAGS.pack(BOTH_FLAGS)
OPENED = (
    GREETED
    + wire.encode_option(Option.STRUCTURED_REPLY)
    + wire.encode_option(Option.SET_META_CONTEXT, wire.encode_meta_contexts("1", ("base:allocation",)))
    + wire.encode_option(Option.GO, wire.encode_go("1", ()))
)


@settings(max_examples=150)
@given(
    data=st.binary(max_size=200)
    | st.binary(max_size=200).map(lambda tail: GREETED + tail)
    | st.lists(options(), max_size=6).map(lambda some: GREETED + b"".join(some))
)
def test_no_bytes_in_the_handshake_hang_or_crash_the_server(fuzzed: Endpoint, data: bytes) -> None:
    shout(fuzzed, data)
    assert_precious(fuzzed)


@settings(max_examples=150)
@given(
    data=st.binary(max_size=200) | st.lists(requests(), max_size=8).map(b"".join),
)
def test_no_bytes_in_transmission_hang_or_crash_the_server(fuzzed: Endpoint, data: bytes) -> None:
    shout(fuzzed, OPENED + data)
    assert_precious(fuzzed)


def assert_precious(endpoint: Endpoint) -> None:
    with RawClient(endpoint) as client:
        assert client.go().ask(Command.READ, 0, 512).data == {0: b"precious" * 64}
        client.send(Command.DISC)
        assert client.is_closed()


def test_every_length_of_a_whole_conversation_may_be_the_last(fuzzed: Endpoint) -> None:
    """Cut off after each of its bytes."""
    whole = OPENED + wire.encode_request(0, Command.READ, 1, 0, 4096)
    for end in range(len(whole)):
        shout(fuzzed, whole[:end])
    assert_precious(fuzzed)
