"""Several connections as one: the multi-connection flush rule, and what happens when one of them breaks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripted_server import SIZE, WAIT_S, WRITABLE, Peer, ScriptedServer

from coordinator.model.errors import DiskIOError, Next, UsageError
from workers.nbd.session import Session
from workers.nbd.wire import Command


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ScriptedServer]:
    server = ScriptedServer(tmp_path / "s")
    yield server
    server.close()


@pytest.fixture
def session(server: ScriptedServer) -> Iterator[Session]:
    with Session.open(server.endpoint, 2, timeout_s=WAIT_S) as session:
        yield session


@pytest.fixture
def peers(server: ScriptedServer, session: Session) -> list[Peer]:
    return [server.peer(), server.peer()]


def acknowledge(peer: Peer, command: Command) -> None:
    peer.simple(peer.expect(command))


def written(session: Session, peers: list[Peer], threads: ThreadPoolExecutor) -> None:
    """One write answered on each connection: both are held until both are out, so that each takes one."""
    calls = [threads.submit(session.write, at * 512, b"x" * 512) for at in range(2)]
    for peer, request in [(peer, peer.expect(Command.WRITE)) for peer in peers]:
        peer.simple(request)
    for call in calls:
        call.result(WAIT_S)


def test_calls_go_to_the_least_busy_connection(
    session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    written(session, peers, threads)


def test_flush_waits_for_every_covered_write_on_every_connection(
    session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    calls = [threads.submit(session.write, at * 512, b"x" * 512) for at in range(2)]
    writes = [peer.expect(Command.WRITE) for peer in peers]
    flush = threads.submit(session.flush)
    peers[0].simple(writes[0])
    assert all(peer.silent() for peer in peers)
    peers[1].simple(writes[1])
    for peer in peers:
        acknowledge(peer, Command.FLUSH)
    for call in (*calls, flush):
        call.result(WAIT_S)


def test_flush_goes_only_to_connections_that_wrote_since_their_last(
    session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    call = threads.submit(session.write, 0, b"x")
    acknowledge(peers[0], Command.WRITE)
    call.result(WAIT_S)
    flush = threads.submit(session.flush)
    acknowledge(peers[0], Command.FLUSH)
    flush.result(WAIT_S)
    assert peers[1].silent()


def test_a_second_flush_does_not_return_before_the_first_that_covers_its_writes(
    session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    call = threads.submit(session.write, 0, b"x")
    acknowledge(peers[0], Command.WRITE)
    call.result(WAIT_S)
    first = threads.submit(session.flush)
    held = peers[0].expect(Command.FLUSH)
    second = threads.submit(session.flush)
    assert peers[0].silent()
    assert peers[1].silent()
    assert not second.done()
    peers[0].simple(held)
    first.result(WAIT_S)
    acknowledge(peers[0], Command.FLUSH)  # nothing is left to cover, but it is asked of the server all the same
    second.result(WAIT_S)


def test_a_writable_export_without_multi_conn_gets_one_connection(tmp_path: Path) -> None:
    server = ScriptedServer(tmp_path / "one", flags=WRITABLE)
    with Session.open(server.endpoint, 4) as session:
        assert session.connections == 1
    server.close()


def test_no_connection_at_all_is_a_usage_error(server: ScriptedServer) -> None:
    with pytest.raises(UsageError):
        Session.open(server.endpoint, 0)


def test_a_broken_connection_is_replaced_by_the_next_call(
    server: ScriptedServer, session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    call = threads.submit(session.write, 0, b"x")
    peers[0].expect(Command.WRITE)
    peers[0].close()
    error = call.exception(WAIT_S)
    assert isinstance(error, DiskIOError)
    assert error.next is Next.RECONNECT
    call = threads.submit(session.write, 0, b"x")
    new = server.peer()
    acknowledge(new, Command.WRITE)
    call.result(WAIT_S)
    flush = threads.submit(session.flush)
    acknowledge(new, Command.FLUSH)
    flush.result(WAIT_S)  # the only lost write was never answered, so its caller knows


def lost(session: Session, threads: ThreadPoolExecutor, *answering: Peer) -> DiskIOError:
    """The error of a flush that `answering` answer."""
    flush = threads.submit(session.flush)
    for peer in answering:
        acknowledge(peer, Command.FLUSH)
    error = flush.exception(WAIT_S)
    assert isinstance(error, DiskIOError)
    return error


def test_unflushed_writes_of_a_broken_connection_fail_the_next_flush_once(
    server: ScriptedServer, session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    written(session, peers, threads)
    peers[0].close()
    error = lost(session, threads, peers[1])
    assert error.next is Next.GIVE_UP
    assert error.remedy
    flush = threads.submit(session.flush)
    acknowledge(server.peer(), Command.FLUSH)
    flush.result(WAIT_S)


def test_replacing_a_connection_does_not_hide_its_unflushed_writes(
    server: ScriptedServer, session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    written(session, peers, threads)
    peers[0].close()
    assert isinstance(threads.submit(session.write, 0, b"x").exception(WAIT_S), DiskIOError)
    call = threads.submit(session.write, 0, b"x")
    new = server.peer()
    acknowledge(new, Command.WRITE)
    call.result(WAIT_S)
    assert lost(session, threads, new, peers[1]).next is Next.GIVE_UP


def test_a_failed_flush_tells_the_caller_to_repeat_its_writes(
    session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    written(session, peers, threads)
    flush = threads.submit(session.flush)
    peers[0].simple(peers[0].expect(Command.FLUSH), error=5)
    acknowledge(peers[1], Command.FLUSH)
    error = flush.exception(WAIT_S)
    assert isinstance(error, DiskIOError)
    assert error.next is Next.GIVE_UP
    flush = threads.submit(session.flush)
    acknowledge(peers[0], Command.FLUSH)
    flush.result(WAIT_S)


def test_an_export_that_changed_its_size_is_not_taken_for_the_same(
    server: ScriptedServer, session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    call = threads.submit(session.write, 0, b"x")
    peers[0].expect(Command.WRITE)
    peers[0].close()
    assert call.exception(WAIT_S)
    server.size = SIZE // 2
    with pytest.raises(DiskIOError, match="no longer the export") as caught:
        session.write(0, b"x")
    assert caught.value.next is Next.GIVE_UP


def test_a_closed_session_does_not_reconnect(session: Session, peers: list[Peer]) -> None:
    session.abort()
    with pytest.raises(DiskIOError, match="closed"):
        session.write(0, b"x")


def test_a_server_that_is_gone_fails_each_call_after_one_attempt(
    server: ScriptedServer, session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    server.path.unlink()
    for peer in peers:
        peer.close()
    for _ in range(4):
        with pytest.raises(DiskIOError) as caught:
            session.write(0, b"x")
        assert caught.value.next is Next.RECONNECT


def test_a_write_stuck_on_one_connection_does_not_hold_up_the_other(
    session: Session, peers: list[Peer], threads: ThreadPoolExecutor
) -> None:
    stuck = threads.submit(session.write, 0, b"x")
    held = peers[0].expect(Command.WRITE)
    for _ in range(3):
        call = threads.submit(session.write, 512, b"y")
        acknowledge(peers[1], Command.WRITE)
        call.result(WAIT_S)
    peers[0].simple(held)
    stuck.result(WAIT_S)
