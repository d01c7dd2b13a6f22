"""What a client says, parsed by the server: any bytes give a value or ProtocolError, and ours come back as sent."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.nbd import server_wire, wire
from workers.nbd.server_requests import Asked, Buffers, RequestReader
from workers.nbd.wire import BlockSizes, ChunkKind, Command, ExportSize, Info, ProtocolError

PARSERS: dict[str, Callable[[bytes], object]] = {
    "go": server_wire.parse_go,
    "meta contexts": server_wire.parse_meta_contexts,
}
HEADS: dict[str, tuple[int, Callable[[bytes], object]]] = {
    "client flags": (wire.CLIENT_FLAGS.size, server_wire.parse_client_flags),
    "option": (wire.OPTION.size, server_wire.parse_option),
}
NAMES = st.text(max_size=40)
U32 = st.integers(0, wire.U32_MAX)


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.binary(max_size=80) | st.binary(max_size=40).map(lambda tail: struct.pack(">I", 3) + tail))
def test_arbitrary_data_of_an_option_raises_nothing_but_protocol_error(name: str, data: bytes) -> None:
    with suppress(ProtocolError):
        PARSERS[name](data)


@pytest.mark.parametrize("name", HEADS)
@given(data=st.data())
def test_arbitrary_heads_raise_nothing_but_protocol_error(name: str, data: st.DataObject) -> None:
    length, parse = HEADS[name]
    with suppress(ProtocolError):
        parse(data.draw(st.binary(min_size=length, max_size=length)))


@given(export=NAMES, infos=st.frozensets(st.sampled_from(Info)))
def test_what_our_client_opens_comes_back(export: str, infos: frozenset[Info]) -> None:
    data = wire.encode_go(export, tuple(infos))
    assert server_wire.parse_go(data) == server_wire.GoRequest(export, infos)
    with pytest.raises(ProtocolError):
        server_wire.parse_go(data + b"x")


@given(export=NAMES, queries=st.lists(NAMES, max_size=5))
def test_what_our_client_queries_comes_back(export: str, queries: list[str]) -> None:
    data = wire.encode_meta_contexts(export, tuple(queries))
    assert server_wire.parse_meta_contexts(data) == server_wire.MetaContextRequest(export, tuple(queries))
    with pytest.raises(ProtocolError):
        server_wire.parse_meta_contexts(data + b"x")


def test_more_queries_than_bytes_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(ProtocolError, match="4294967295 queries"):
        server_wire.parse_meta_contexts(wire.encode_string("") + wire.LENGTH.pack(wire.U32_MAX) + bytes(4096))


@given(size=st.integers(0, 2**63 - 1), flags=st.integers(0, 0xFFFF))
def test_our_client_reads_the_export_we_tell(size: int, flags: int) -> None:
    assert wire.parse_info(server_wire.encode_export_info(size, flags)) == ExportSize(size, flags)
    sizes = BlockSizes(1, 65536, wire.DEFAULT_MAX_BLOCK_BYTES)
    assert wire.parse_info(server_wire.encode_block_size_info(sizes)) == sizes
    assert wire.parse_info(server_wire.encode_name_info("n")) is None


@given(number=st.sampled_from([1, 5, 12, 22, 28, 75, 95, 108]), message=st.text(max_size=6000))
def test_our_client_reads_the_errors_we_tell(number: int, message: str) -> None:
    chunk = server_wire.encode_error(7, number, message)
    magic, flags, kind, cookie = wire.CHUNK_HEAD.unpack_from(chunk)
    assert (magic, flags, kind, cookie) == (wire.CHUNK_MAGIC, wire.CHUNK_DONE, ChunkKind.ERROR, 7)
    payload = chunk[wire.CHUNK_HEAD.size + wire.CHUNK_LENGTH.size :]
    error = wire.parse_error_chunk(kind, payload)
    assert error.errno == wire.posix_errno(number)
    assert message.startswith(error.message)
    assert len(error.message.encode()) > wire.MAX_STRING_BYTES - 4 or error.message == message


@given(posix=st.integers(1, 200))
def test_every_posix_error_has_an_nbd_error_our_client_knows(posix: int) -> None:
    assert wire.posix_errno(wire.nbd_error(posix)) in {1, 5, 12, 22, 28, 75, 95, 108}
    if posix in {1, 5, 12, 22, 28, 75, 95, 108}:
        assert wire.posix_errno(wire.nbd_error(posix)) == posix


def feed(stream: bytes) -> list[Asked]:
    """What a reader takes from a stream, in whatever pieces it asks for."""
    taken: list[Asked] = []
    requests = RequestReader(taken.append, Buffers()).run()
    for view in requests:
        if len(stream) < len(view):
            break
        view[:] = stream[: len(view)]
        stream = stream[len(view) :]
    return taken


@given(
    requests=st.lists(
        st.tuples(st.sampled_from([c for c in Command if c != Command.DISC]), st.integers(0, 0xFFFF), U32, U32),
        max_size=8,
    ),
    payload=st.binary(max_size=64),
)
def test_requests_come_back_with_their_payload(requests: list[tuple[int, int, int, int]], payload: bytes) -> None:
    stream = b""
    for command, flags, offset, length in requests:
        length = len(payload) if command == Command.WRITE else length
        stream += wire.encode_request(flags, command, offset, offset, length)
        stream += payload if command == Command.WRITE else b""
    taken = feed(stream)
    assert [(asked.command, asked.flags, asked.cookie) for asked in taken] == [r[:3] for r in requests]
    for asked in taken:
        assert (asked.buffer or b"") == (payload if asked.command == Command.WRITE else b"")
        assert asked.cost >= asked.length or asked.command != Command.WRITE


@given(stream=st.binary(max_size=200) | st.binary(max_size=100).map(lambda tail: struct.pack(">I", 0x25609513) + tail))
def test_an_arbitrary_stream_of_requests_raises_nothing_but_protocol_error(stream: bytes) -> None:
    with suppress(ProtocolError):
        feed(stream)


def test_the_payload_of_a_write_that_is_too_long_is_swallowed_in_small_pieces() -> None:
    length = wire.DEFAULT_MAX_BLOCK_BYTES + 1
    stream = wire.encode_request(0, Command.WRITE, 1, 0, length) + bytes(length)
    taken = feed(stream + wire.encode_request(0, Command.FLUSH, 2, 0, 0))
    assert [(asked.cookie, asked.buffer) for asked in taken] == [(1, None), (2, None)]
