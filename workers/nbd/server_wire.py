"""The server's half of `wire`: what a client says, parsed without trust, and what a server answers. No I/O here.

The formats are defined in `wire`. Everything a client can get wrong raises ProtocolError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.nbd import wire
from workers.nbd.wire import BlockSizes, ChunkKind, HandshakeFlag, Info, ProtocolError

MAX_OPTION_BYTES = 64 * 1024
"""Data of one option: a name, and more queries than there are meta contexts."""
GREETING = wire.GREETING.pack(
    wire.NBDMAGIC, wire.IHAVEOPT, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
)  # all a server says before its client does


@dataclass(frozen=True, slots=True)
class GoRequest:
    """Data of NBD_OPT_GO and NBD_OPT_INFO; unknown kinds of information are left in."""

    export: str
    infos: frozenset[int]


@dataclass(frozen=True, slots=True)
class MetaContextRequest:
    """Data of NBD_OPT_SET_META_CONTEXT and NBD_OPT_LIST_META_CONTEXT."""

    export: str
    queries: tuple[str, ...]


def parse_client_flags(data: bytes) -> HandshakeFlag:
    """What the client takes of the handshake flags offered to it. It must take fixed newstyle."""
    (flags,) = wire.CLIENT_FLAGS.unpack(data)
    if flags & ~int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES):  # ~ of a flag keeps to known bits
        raise ProtocolError(f"the client flags {flags:#x} were not offered")
    if not flags & HandshakeFlag.FIXED_NEWSTYLE:
        raise ProtocolError("the client does not speak fixed newstyle")
    return HandshakeFlag(flags)


def parse_option(data: bytes) -> tuple[int, int]:
    """(option, length of its data), neither of them checked."""
    magic, option, length = wire.OPTION.unpack(data)
    if magic != wire.IHAVEOPT:
        raise ProtocolError(f"an option starts with the unknown magic {magic:#x}")
    return option, length


def parse_go(data: bytes) -> GoRequest:
    """Raises ProtocolError unless the data is used up exactly."""
    export, rest = _string(data, "an export name")
    if len(rest) < wire.INFO_KIND.size:
        raise ProtocolError("the number of information requests is missing")
    (count,) = wire.INFO_KIND.unpack_from(rest)
    kinds = rest[wire.INFO_KIND.size :]
    if len(kinds) != count * wire.INFO_KIND.size:
        raise ProtocolError(f"{count} information requests in {len(kinds)} bytes")
    return GoRequest(export, frozenset(kind for (kind,) in wire.INFO_KIND.iter_unpack(kinds)))


def parse_meta_contexts(data: bytes) -> MetaContextRequest:
    """Raises ProtocolError unless the data is used up exactly."""
    export, rest = _string(data, "an export name")
    if len(rest) < wire.LENGTH.size:
        raise ProtocolError("the number of queries is missing")
    (count,) = wire.LENGTH.unpack_from(rest)
    rest = rest[wire.LENGTH.size :]
    if count > len(rest) // wire.LENGTH.size:
        raise ProtocolError(f"{count} queries in {len(rest)} bytes")
    queries = []
    for _ in range(count):
        query, rest = _string(rest, "a query")
        queries.append(query)
    if rest:
        raise ProtocolError(f"{len(rest)} bytes after the last query")
    return MetaContextRequest(export, tuple(queries))


def _string(data: bytes, what: str) -> tuple[str, bytes]:
    """A string with its length before it, and what follows it."""
    if len(data) < wire.LENGTH.size:
        raise ProtocolError(f"{what} is missing")
    (length,) = wire.LENGTH.unpack_from(data)
    end = wire.LENGTH.size + length
    if end > len(data):
        raise ProtocolError(f"{what} claims {length} bytes of {len(data) - wire.LENGTH.size}")
    return wire.text(data[wire.LENGTH.size : end], what), data[end:]


def encode_option_reply(option: int, kind: int, payload: bytes = b"") -> bytes:
    """One answer to one option."""
    return wire.OPTION_REPLY.pack(wire.OPTION_REPLY_MAGIC, option, kind, len(payload)) + payload


def encode_option_error(option: int, kind: int, message: str) -> bytes:
    """The answer to an option that is refused; a long message is cut."""
    return encode_option_reply(option, kind, _cut(message))


def encode_export_info(size: int, flags: int) -> bytes:
    """NBD_INFO_EXPORT."""
    return wire.INFO_EXPORT.pack(Info.EXPORT, size, flags)


def encode_name_info(name: str) -> bytes:
    """NBD_INFO_NAME."""
    return wire.INFO_KIND.pack(Info.NAME) + name.encode()


def encode_block_size_info(sizes: BlockSizes) -> bytes:
    """NBD_INFO_BLOCK_SIZE."""
    return wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, sizes.minimum, sizes.preferred, sizes.maximum)


def encode_meta_context(context_id: int, name: str) -> bytes:
    """Payload of one NBD_REP_META_CONTEXT."""
    return wire.LENGTH.pack(context_id) + name.encode()


def encode_simple_reply(cookie: int, error: int = 0) -> bytes:
    """`error` is NBD's number. The data of a READ without error follows it."""
    return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie)


def encode_chunk(cookie: int, kind: ChunkKind, payload: bytes = b"", *, done: bool = True) -> bytes:
    """One whole chunk of a structured reply."""
    return _chunk_head(cookie, kind, len(payload), done=done) + payload


def encode_data_head(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    """All of an OFFSET_DATA chunk but its `length` bytes of data, which follow it."""
    head = _chunk_head(cookie, ChunkKind.OFFSET_DATA, wire.OFFSET.size + length, done=done)
    return head + wire.OFFSET.pack(offset)


def encode_hole(cookie: int, offset: int, length: int, *, done: bool = True) -> bytes:
    """An OFFSET_HOLE chunk."""
    return encode_chunk(cookie, ChunkKind.OFFSET_HOLE, wire.HOLE.pack(offset, length), done=done)


def encode_error(cookie: int, error: int, message: str) -> bytes:
    """An ERROR chunk, the last of its reply. `error` is NBD's number; a long message is cut."""
    raw = _cut(message)
    return encode_chunk(cookie, ChunkKind.ERROR, wire.ERROR_HEAD.pack(error, len(raw)) + raw)


def encode_block_status(
    cookie: int, context_id: int, descriptors: Sequence[tuple[int, int]], *, done: bool = True
) -> bytes:
    """A BLOCK_STATUS chunk of (length, flags) descriptors; a reply has one for each context."""
    packed = b"".join(wire.STATUS_DESCRIPTOR.pack(*descriptor) for descriptor in descriptors)
    return encode_chunk(cookie, ChunkKind.BLOCK_STATUS, wire.LENGTH.pack(context_id) + packed, done=done)


def _chunk_head(cookie: int, kind: ChunkKind, length: int, *, done: bool) -> bytes:
    head = wire.CHUNK_HEAD.pack(wire.CHUNK_MAGIC, wire.CHUNK_DONE if done else 0, kind, cookie)
    return head + wire.CHUNK_LENGTH.pack(length)


def _cut(message: str) -> bytes:
    """UTF-8 of as much of it as a string may have."""
    return message.encode()[: wire.MAX_STRING_BYTES].decode(errors="ignore").encode()
