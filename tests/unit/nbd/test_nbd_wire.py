"""Parsers of what an NBD peer says: any bytes give a value or ProtocolError, and valid ones come back as sent."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.nbd import wire
from workers.nbd.wire import BlockSizes, ChunkKind, ExportInfo, ExportSize, Option, ProtocolError

PARSERS: dict[str, Callable[[bytes], object]] = {
    "greeting": wire.parse_greeting,
    "option reply": lambda data: wire.parse_option_reply(data, Option.GO),
    "server": wire.parse_server,
    "info": wire.parse_info,
    "meta context": wire.parse_meta_context,
    "hole": wire.parse_hole,
    "block status": wire.parse_block_status,
    "error": lambda data: wire.parse_error_chunk(ChunkKind.ERROR, data),
    "error with offset": lambda data: wire.parse_error_chunk(ChunkKind.ERROR_OFFSET, data),
}
U32 = st.integers(0, wire.U32_MAX)
U64 = st.integers(0, 2**64 - 1)
NAMES = st.text(max_size=40)


def plausible(data: bytes) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=40).map(lambda tail: data + tail)


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.binary(max_size=80) | plausible(struct.pack(">I", 3)) | plausible(struct.pack(">IH", 5, 4)))
def test_arbitrary_bytes_raise_nothing_but_protocol_error(name: str, data: bytes) -> None:
    with suppress(ProtocolError):
        PARSERS[name](data)


@given(flags=st.integers(0, 0xFFFF))
def test_a_greeting_gives_its_flags_only_with_fixed_newstyle(flags: int) -> None:
    data = wire.GREETING.pack(wire.NBDMAGIC, wire.IHAVEOPT, flags)
    if flags & wire.HandshakeFlag.FIXED_NEWSTYLE:
        assert wire.parse_greeting(data) == flags
    else:
        with pytest.raises(ProtocolError, match="fixed newstyle"):
            wire.parse_greeting(data)


def test_old_style_is_told_apart_from_what_is_not_nbd() -> None:
    with pytest.raises(ProtocolError, match="old-style"):
        wire.parse_greeting(wire.GREETING.pack(wire.NBDMAGIC, wire.OLDSTYLE_MAGIC, 0))
    with pytest.raises(ProtocolError, match="does not greet"):
        wire.parse_greeting(b"HTTP/1.1 400 Bad R")


@given(kind=U32, length=st.integers(0, wire.MAX_OPTION_REPLY_BYTES))
def test_option_replies_come_back(kind: int, length: int) -> None:
    data = wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, Option.LIST, kind, length)
    assert wire.parse_option_reply(data, Option.LIST) == (kind, length)
    with pytest.raises(ProtocolError, match="as if it were"):
        wire.parse_option_reply(data, Option.GO)


def test_an_option_reply_of_absurd_length_is_refused_before_it_is_read() -> None:
    data = wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, Option.LIST, 2, wire.MAX_OPTION_REPLY_BYTES + 1)
    with pytest.raises(ProtocolError, match="claims"):
        wire.parse_option_reply(data, Option.LIST)


@given(name=NAMES, description=NAMES)
def test_listed_exports_come_back(name: str, description: str) -> None:
    payload = wire.encode_string(name) + description.encode()
    assert wire.parse_server(payload) == ExportInfo(name, description)


@given(size=st.integers(0, 2**63 - 1), flags=st.integers(0, 0xFFFF))
def test_export_sizes_come_back(size: int, flags: int) -> None:
    payload = wire.INFO_EXPORT.pack(wire.Info.EXPORT, size, flags)
    assert wire.parse_info(payload) == ExportSize(size, flags)


@given(minimum=U32, preferred=U32, maximum=U32)
def test_block_sizes_are_usable_or_refused(minimum: int, preferred: int, maximum: int) -> None:
    try:
        sizes = wire.parse_info(wire.INFO_BLOCK_SIZE.pack(wire.Info.BLOCK_SIZE, minimum, preferred, maximum))
    except ProtocolError:
        return
    assert isinstance(sizes, BlockSizes)
    assert 1 <= sizes.minimum <= sizes.preferred
    assert sizes.maximum % sizes.minimum == 0
    assert sizes.maximum <= wire.DEFAULT_MAX_BLOCK_BYTES


def test_an_unlimited_maximum_is_cut_to_what_we_send() -> None:
    payload = wire.INFO_BLOCK_SIZE.pack(wire.Info.BLOCK_SIZE, 512, 4096, wire.U32_MAX)
    assert wire.parse_info(payload) == BlockSizes(512, 4096, wire.DEFAULT_MAX_BLOCK_BYTES)


@given(context=U32, extents=st.lists(st.tuples(st.integers(1, wire.U32_MAX), U32), min_size=1))
def test_block_status_comes_back(context: int, extents: list[tuple[int, int]]) -> None:
    payload = struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)
    assert wire.parse_block_status(payload) == (context, extents)


def test_an_empty_block_status_descriptor_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no length"):
        wire.parse_block_status(struct.pack(">IIIII", 1, 4096, 0, 0, 0))


@given(number=st.integers(1, wire.U32_MAX), message=NAMES, offset=U64)
def test_error_chunks_come_back_with_a_posix_errno(number: int, message: str, offset: int) -> None:
    raw = message.encode()
    payload = struct.pack(">IH", number, len(raw)) + raw
    plain = wire.parse_error_chunk(ChunkKind.ERROR, payload)
    placed = wire.parse_error_chunk(ChunkKind.ERROR_OFFSET, payload + struct.pack(">Q", offset))
    assert (plain.message, plain.offset) == (message, None)
    assert (placed.message, placed.offset) == (message, offset)
    assert plain.errno in {
        errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ENOTSUP,
        errno.ESHUTDOWN,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, errno.EPERM),
        (5, errno.EIO),
        (28, errno.ENOSPC),
        (95, errno.ENOTSUP),
        (108, errno.ESHUTDOWN),
        (7, errno.EINVAL),
    ],
)
def test_nbd_errors_are_posix_errors_and_unknown_ones_are_einval(number: int, expected: int) -> None:
    assert wire.posix_errno(number) == expected
