"""Splicing between scripted peers: what breaks in mid-payload, and silence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from scripted_server import SIZE, WAIT_S, Peer, connected

from coordinator.model.errors import DiskIOError, Next
from workers.nbd.connection import Connection
from workers.nbd.splice import PEEK_BYTES, Spliced, splice_to_nbd
from workers.nbd.wire import Command

SHORT_S = 0.3


@pytest.fixture
def pair() -> Iterator[tuple[tuple[Connection, Peer], tuple[Connection, Peer]]]:
    ends = (connected(structured=False, timeout_s=SHORT_S), connected(structured=False, timeout_s=SHORT_S))
    yield ends
    for connection, peer in ends:
        connection.close()
        peer.close()


def close_in_mid_payload(source: Peer, target: Peer) -> None:
    source.simple(source.expect(Command.READ), data=b"x" * 1000)
    source.close()


def fall_silent_in_mid_payload(source: Peer, target: Peer) -> None:
    source.simple(source.expect(Command.READ), data=b"x" * 1000)


def never_answer_a_write(source: Peer, target: Peer) -> None:
    source.simple(source.expect(Command.READ), data=b"x" * 4096)
    target.expect(Command.WRITE)


def target_closes(source: Peer, target: Peer) -> None:
    target.close()
    source.simple(source.expect(Command.READ), data=b"x" * 4096)


def answer_another_read(source: Peer, target: Peer) -> None:
    seen = source.expect(Command.READ)
    source.sock.sendall(bytes.fromhex("6744669800000000") + (seen.cookie + 9).to_bytes(8, "big"))


@pytest.mark.parametrize(
    "play",
    [close_in_mid_payload, fall_silent_in_mid_payload, never_answer_a_write, target_closes, answer_another_read],
)
def test_a_failure_in_mid_stream_breaks_both_connections_in_time(
    pair: tuple[tuple[Connection, Peer], tuple[Connection, Peer]], play: Callable[[Peer, Peer], None]
) -> None:
    (source, from_peer), (target, to_peer) = pair
    with ThreadPoolExecutor(1) as pool:
        copy = pool.submit(splice_to_nbd, source, target, [(0, 4096)], depth=1)
        play(from_peer, to_peer)
        error = copy.exception(WAIT_S)
    assert isinstance(error, DiskIOError)
    assert error.next is Next.RECONNECT
    for connection in (source, target):
        with pytest.raises(DiskIOError):
            connection.read_into(0, memoryview(bytearray(512)))


def test_at_most_depth_ranges_are_on_their_way(
    pair: tuple[tuple[Connection, Peer], tuple[Connection, Peer]],
) -> None:
    (source, from_peer), (target, to_peer) = pair
    with ThreadPoolExecutor(1) as pool:
        copy = pool.submit(splice_to_nbd, source, target, [(at * 4096, 4096) for at in range(3)], depth=2)
        reads = [from_peer.expect(Command.READ), from_peer.expect(Command.READ)]
        from_peer.simple(reads[1], data=b"b" * 4096)
        write = to_peer.expect(Command.WRITE)
        assert (write.offset, write.payload) == (4096, b"b" * 4096)
        assert from_peer.silent(0.05)
        to_peer.simple(write)
        from_peer.simple(reads[0], data=b"a" * 4096)
        to_peer.simple(to_peer.expect(Command.WRITE))
        from_peer.simple(from_peer.expect(Command.READ), data=b"c" * 4096)
        to_peer.simple(to_peer.expect(Command.WRITE))
        assert copy.result(WAIT_S) == Spliced(copied=3 * 4096)


def test_a_range_past_the_end_is_refused(
    pair: tuple[tuple[Connection, Peer], tuple[Connection, Peer]],
) -> None:
    (source, _), (target, _) = pair
    with pytest.raises(ValueError, match="cannot be spliced"):
        splice_to_nbd(source, target, [(SIZE, 512)], depth=1)


def test_a_range_that_is_left_is_read_but_never_written(
    pair: tuple[tuple[Connection, Peer], tuple[Connection, Peer]],
) -> None:
    """Even with depth 1: a left range gives its place back, and its payload does not stay in the stream."""
    (source, from_peer), (target, to_peer) = pair
    ranges = [(at * 4096, 4096) for at in range(3)]
    with ThreadPoolExecutor(1) as pool:
        copy = pool.submit(splice_to_nbd, source, target, ranges, depth=1, leave=lambda head: not any(head))
        for payload in (bytes(4096), bytes(PEEK_BYTES) + b"x" * (4096 - PEEK_BYTES)):
            from_peer.simple(from_peer.expect(Command.READ), data=payload)
        from_peer.simple(from_peer.expect(Command.READ), data=b"c" * 4096)
        write = to_peer.expect(Command.WRITE)
        assert (write.offset, write.payload) == (8192, b"c" * 4096)
        to_peer.simple(write)
        assert copy.result(WAIT_S) == Spliced(4096, ranges[:2])
