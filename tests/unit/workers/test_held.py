"""What a guard says on connections it holds, how often, and what it takes for an answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from workers.agent.held import GUEST_AGENT, MONITOR, Held, Words, attaching, cancelling

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(5)
    yield ours, theirs
    ours.close()
    theirs.close()


def held(connection: socket.socket, words: Words) -> Held:
    return Held("db", 0, words, connection, ends_at=0.0)


@pytest.mark.parametrize("words", [MONITOR, GUEST_AGENT])
def test_nothing_is_said_again_while_it_is_unread(pair: Pair, words: Words) -> None:
    ours, theirs = pair
    freeze = held(ours, words)
    assert freeze.tell()
    freeze.is_told = True
    assert not freeze.tell()
    once = theirs.recv(4096)
    assert freeze.tell()
    assert theirs.recv(4096) == once.replace(b"guard-1", b"guard-2")


def test_a_guest_agent_is_told_to_thaw_on_a_line_of_its_own_and_asked_whether_it_has(pair: Pair) -> None:
    ours, theirs = pair
    held(ours, GUEST_AGENT).tell()
    before, *lines = theirs.recv(4096).replace(b"\xff", b"\xff\n").split(b"\n")
    assert before == b"\xff"
    assert [json.loads(line)["execute"] for line in lines if line] == ["guest-fsfreeze-thaw", "guest-fsfreeze-status"]


@pytest.mark.parametrize(
    ("said", "is_done"),
    [
        (b'{"return": "thawed", "id": "flushpoint-guard-2"}\n', True),
        (b'{"id": "flushpoint-guard-2", "return": "thawed"}\n', True),
        (b'{"return": "thawed", "id": "flushpoint-guard-2"}', False),
        (b'{"return": "thawed", "id": "flushpoint-guard-1"}\n', False),
        (b'{"return": "frozen", "id": "flushpoint-guard-2"}\n', False),
        (b'{"return": 1, "id": "flushpoint-guard"}\n{"return": "thawed", "id": "another"}\n', False),
    ],
)
def test_only_the_answer_to_what_was_said_last_tells_that_it_is_thawed(pair: Pair, said: bytes, is_done: bool) -> None:
    ours, theirs = pair
    freeze = held(ours, GUEST_AGENT)
    freeze.tell()
    freeze.tell()
    theirs.sendall(said[:20])
    assert not freeze.is_done()
    theirs.sendall(said[20:])
    assert freeze.is_done() == is_done


def test_who_has_ended_needs_no_thaw(pair: Pair) -> None:
    ours, theirs = pair
    freeze = held(ours, GUEST_AGENT)
    theirs.close()
    assert freeze.tell()
    assert freeze.is_done()


@pytest.mark.parametrize(("words", "is_left"), [(MONITOR, True), (GUEST_AGENT, False)])
def test_answers_that_a_sleeping_agent_does_not_read_do_not_hold_a_guest_up(
    pair: Pair, words: Words, is_left: bool
) -> None:
    """QEMU keeps for itself what it cannot say; a guest agent has no other place for it. From the second time on: at
    the deadline the agent may be just about to read."""
    ours, theirs = pair
    freeze = held(ours, words)
    theirs.sendall(b"{}\n")
    freeze.drop_answers()
    assert ours.recv(4096, socket.MSG_PEEK)
    freeze.is_told = True
    freeze.drop_answers()
    if is_left:
        assert ours.recv(4096)
    else:
        with pytest.raises(BlockingIOError):
            ours.recv(4096)


def test_jobs_are_cancelled_and_devices_attached_before_a_guest_runs(pair: Pair) -> None:
    ours, theirs = pair
    freeze = held(ours, MONITOR)
    freeze.before = cancelling(["j1", "j2"]) + attaching({"/machine/peripheral/vda": "n0"})
    assert freeze.tell()
    said = [json.loads(line) for line in theirs.recv(4096).splitlines()]
    assert [one["execute"] for one in said] == ["job-cancel", "job-cancel", "qom-set", "cont"]
    assert [one["arguments"].get("id") for one in said] == ["j1", "j2", None, None]
    assert said[2]["arguments"] == {"path": "/machine/peripheral/vda", "property": "drive", "value": "n0"}
    theirs.send(b'{"return": {}, "id": "flushpoint-guard"}\n')
    assert not freeze.is_done()
    theirs.send(b'{"return": {}, "id": "flushpoint-guard-1"}\n')
    assert freeze.is_done()
