"""The reply parser, fed from memory: a request ends right or in an error, or the stream is refused."""

from __future__ import annotations

import errno
import itertools
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import chunk

from coordinator.model.errors import Next
from workers.nbd import wire
from workers.nbd.replies import Covered, ReplyReader, Request, ServerError, server_error
from workers.nbd.wire import ChunkKind, Command, ProtocolError

OFFSET = 1 << 20
LENGTH = 4096


def requests() -> dict[int, Request]:
    read = Request(Command.READ, OFFSET, LENGTH, buffer=memoryview(bytearray(LENGTH)))
    status = Request(Command.BLOCK_STATUS, OFFSET, LENGTH)
    return {1: read, 2: status, 3: Request(Command.WRITE, OFFSET, LENGTH)}


def feed(pending: dict[int, Request], data: bytes, *, structured: bool = True) -> list[Request]:
    """The requests that `data` finishes; raises what the parser raises."""
    finished: list[Request] = []
    for cookie, request in pending.items():
        request.cookie = cookie

    def finish(request: Request) -> None:
        del pending[request.cookie]
        finished.append(request)

    replies = ReplyReader(pending, finish, structured=structured, context_ids={7}).run()
    wanted = next(replies)
    while len(data) >= len(wanted):
        wanted[:], data = data[: len(wanted)], data[len(wanted) :]
        wanted = next(replies)
    return finished


def data_chunk(offset: int, data: bytes, *, done: bool = False) -> bytes:
    return chunk(1, ChunkKind.OFFSET_DATA, wire.OFFSET.pack(offset) + data, done=done)


HEADS = st.builds(
    wire.CHUNK_HEAD.pack,
    st.sampled_from([wire.CHUNK_MAGIC, wire.SIMPLE_REPLY_MAGIC, 0]),
    st.integers(0, 3),
    st.sampled_from([*ChunkKind, 3, 0x8007]),
    st.integers(0, 4),
)
LENGTHS = st.integers(0, 40) | st.integers(0, wire.U32_MAX)
CHUNKS = st.builds(
    lambda head, length, tail: head + struct.pack(">I", length) + tail, HEADS, LENGTHS, st.binary(max_size=60)
)


@given(stream=st.binary(max_size=200) | st.lists(CHUNKS, max_size=6).map(b"".join), structured=st.booleans())
def test_arbitrary_replies_raise_nothing_but_protocol_error(stream: bytes, structured: bool) -> None:
    try:
        finished = feed(requests(), stream, structured=structured)
    except ProtocolError:
        return
    for request in finished:
        if request.command is Command.READ and request.error is None and structured:
            assert request.covered.is_whole(LENGTH)


@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=12), data=st.data())
def test_a_read_is_put_together_from_chunks_in_any_order(cuts: set[int], data: st.DataObject) -> None:
    content = os.urandom(LENGTH)
    edges = [0, *sorted(cuts), LENGTH]
    pieces = data.draw(st.permutations(list(itertools.pairwise(edges))))
    stream = b"".join(data_chunk(OFFSET + start, content[start:end]) for start, end in pieces)
    (request,) = feed(requests(), stream + chunk(1, ChunkKind.NONE))
    assert request.error is None
    assert request.buffer == content


def test_a_hole_chunk_reads_as_zeroes() -> None:
    pending = requests()
    buffer = pending[1].buffer
    assert buffer is not None
    buffer[:] = b"\xff" * LENGTH
    stream = chunk(1, ChunkKind.OFFSET_HOLE, wire.HOLE.pack(OFFSET, 1024), done=False)
    stream += data_chunk(OFFSET + 1024, b"x" * (LENGTH - 1024), done=True)
    feed(pending, stream)
    assert buffer == bytes(1024) + b"x" * (LENGTH - 1024)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (data_chunk(OFFSET, b"x" * (LENGTH - 1), done=True), "in part only"),
        (chunk(1, ChunkKind.NONE), "in part only"),
        (data_chunk(OFFSET, b"x" * 10) + data_chunk(OFFSET + 9, b"x"), "answered twice"),
        (data_chunk(OFFSET - 1, b"xx"), "in the answer to a read"),
        (data_chunk(OFFSET + LENGTH - 1, b"xx"), "in the answer to a read"),
        (chunk(1, ChunkKind.OFFSET_HOLE, wire.HOLE.pack(OFFSET, LENGTH + 1)), "in the answer to a read"),
        (chunk(1, ChunkKind.OFFSET_DATA, bytes(8)), "holds no data"),
        (chunk(3, ChunkKind.OFFSET_DATA, bytes(9)), "data in the answer to a WRITE"),
        (chunk(1, ChunkKind.BLOCK_STATUS, struct.pack(">III", 7, 1, 0)), "block status in the answer to a READ"),
        (chunk(2, ChunkKind.BLOCK_STATUS, struct.pack(">III", 8, 1, 0)), "not negotiated"),
        (chunk(2, ChunkKind.BLOCK_STATUS, struct.pack(">III", 7, 1, 0), done=False) * 2, "came twice"),
        (chunk(2, ChunkKind.BLOCK_STATUS, struct.pack(">IIIII", 7, LENGTH, 0, 1, 0)), "past the range"),
        (chunk(2, ChunkKind.NONE), "without every context"),
        (chunk(1, ChunkKind.NONE, done=False), "empty chunk"),
        (chunk(1, 3), "unknown kind"),
        (chunk(9, ChunkKind.NONE), "not in flight"),
        (wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 1), "simple reply to a READ"),
        (wire.SIMPLE_REPLY.pack(0xBAD, 0, 1), "unknown magic"),
    ],
)
def test_what_a_server_must_not_send_is_refused(stream: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        feed(requests(), stream)


@pytest.mark.parametrize("kind", [ChunkKind.OFFSET_HOLE, ChunkKind.BLOCK_STATUS, ChunkKind.ERROR, 0x8FFF])
def test_an_absurd_length_is_refused_before_memory_is_taken_for_it(kind: int) -> None:
    cookie = 2 if kind == ChunkKind.BLOCK_STATUS else 1
    head = wire.CHUNK_HEAD.pack(wire.CHUNK_MAGIC, wire.CHUNK_DONE, kind, cookie)
    with pytest.raises(ProtocolError):
        feed(requests(), head + struct.pack(">I", wire.U32_MAX))


def test_a_simple_reply_to_a_write_is_accepted_with_structured_replies_negotiated() -> None:
    (request,) = feed(requests(), wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, 3))
    assert request.error is None


def test_an_error_chunk_ends_a_read_with_the_servers_words_and_the_place() -> None:
    said = b"bad sector"
    payload = struct.pack(">IH", 5, len(said)) + said + struct.pack(">Q", OFFSET + 512)
    stream = data_chunk(OFFSET, b"x" * 512) + chunk(1, ChunkKind.ERROR_OFFSET, payload)
    (request,) = feed(requests(), stream)
    assert request.error == ServerError(errno.EIO, f"bad sector at byte {OFFSET + 512}")


@pytest.mark.parametrize(
    ("command", "number", "expected"),
    [
        (Command.READ, errno.EIO, Next.RETRY),
        (Command.WRITE, errno.ENOSPC, Next.RETRY),
        (Command.WRITE, errno.EPERM, Next.GIVE_UP),
        (Command.READ, errno.ESHUTDOWN, Next.RECONNECT),
        (Command.FLUSH, errno.EIO, Next.GIVE_UP),
    ],
)
def test_an_error_says_what_may_be_done_next_and_a_flush_is_never_retried(
    command: Command, number: int, expected: Next
) -> None:
    error = server_error(Request(command, OFFSET, LENGTH), "nbd://h/disk", ServerError(number, "said"))
    assert error.next is expected
    assert error.errno == number
    assert "nbd://h/disk" in error.message
    assert "said" in error.message


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 8)), max_size=20))
def test_covered_ranges_agree_with_a_set_of_bytes(ranges: list[tuple[int, int]]) -> None:
    covered, model = Covered(), set[int]()
    for start, length in ranges:
        new = set(range(start, start + length))
        if new & model:
            with pytest.raises(ProtocolError):
                covered.add(start, start + length)
        else:
            covered.add(start, start + length)
            model |= new
    whole = model == set(range(len(model)))
    assert covered.is_whole(len(model)) == (whole and bool(model))
