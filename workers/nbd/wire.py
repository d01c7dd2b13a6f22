"""The NBD protocol as bytes: constants, formats, and parsers that trust nothing the peer says. No I/O here.

Here are all the formats, what a client says, and how it reads what a server says; the server's half is `server_wire`.
All numbers are big-endian; all offsets and lengths are bytes. Source: nbd/doc/proto.md.

Option haggling, one answer or many, the last being ACK or an error:

    request  | IHAVEOPT 8 | option 4 | length 4 | data ...
    reply    | 0x3e889045565a9 8 | option 4 | kind 4 | length 4 | payload ...

Transmission. Both kinds of reply share the place of the cookie, so 16 bytes can always be read first:

    request  | 25609513 4 | flags 2 | command 2 | cookie 8 | offset 8 | length 4 | payload of WRITE ...
    simple   | 67446698 4 |      error 4        | cookie 8 | payload of a READ without error ...
    chunk    | 668e33ef 4 | flags 2 |  kind 2   | cookie 8 | length 4 | payload ...   (again until flag DONE)

    chunk payloads   NONE          (nothing; always DONE)
                     OFFSET_DATA   | offset 8 | data ...
                     OFFSET_HOLE   | offset 8 | length 4
                     BLOCK_STATUS  | context 4 | (length 4, flags 4) ...
                     ERROR         | errno 4 | message length 2 | message
                     ERROR_OFFSET  | errno 4 | message length 2 | message | offset 8

With structured replies negotiated a READ is answered in chunks, while QEMU still answers WRITE_ZEROES simply.
"""

from __future__ import annotations

import enum
import errno
import struct
from dataclasses import dataclass

from coordinator.model.errors import FlushpointError

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

GREETING = struct.Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")  # IHAVEOPT, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, kind, length
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK_HEAD = struct.Struct(">IHHQ")  # magic, flags, kind, cookie; a length follows
CHUNK_LENGTH = struct.Struct(">I")
OFFSET = struct.Struct(">Q")
HOLE = struct.Struct(">QI")  # offset, length
STATUS_DESCRIPTOR = struct.Struct(">II")  # length, flags
ERROR_HEAD = struct.Struct(">IH")  # errno, message length
INFO_KIND = struct.Struct(">H")
INFO_EXPORT = struct.Struct(">HQH")  # kind, size, transmission flags
INFO_BLOCK_SIZE = struct.Struct(">HIII")  # kind, minimum, preferred, maximum
LENGTH = struct.Struct(">I")

EXPORT_NAME_ANSWER = struct.Struct(">QH")  # size, transmission flags; EXPORT_NAME_ZEROES follow without NO_ZEROES

EXPORT_NAME_ZEROES = bytes(124)
REPLY_HEAD_BYTES = 16
U32_MAX = 0xFFFFFFFF

MAX_STRING_BYTES = 4096
"""The longest export name, query or message proto.md allows."""
MAX_OPTION_REPLY_BYTES = 64 * 1024
"""More than a name, a description and their lengths; what is longer is a hostile or confused peer."""
MAX_STATUS_PAYLOAD_BYTES = 16 * 1024 * 1024
"""nbdkit answers with at most 1 Mi descriptors (8 MiB), QEMU with 128 Ki; twice the larger."""
DEFAULT_MAX_BLOCK_BYTES = 32 * 1024 * 1024
"""The request every server must take when it names no maximum (proto.md, "Block size constraints")."""
DEFAULT_PREFERRED_BLOCK_BYTES = 4096


ALLOCATION_CONTEXT = "base:allocation"
DEPTH_CONTEXT = "qemu:allocation-depth"
"""QEMU docs/interop/nbd.txt: 0 unallocated, 1 in the topmost image, more: deeper."""


class ProtocolError(FlushpointError):
    """The peer broke the NBD protocol: nothing it sends after this can be trusted."""

    code = "nbd-protocol"


class HandshakeFlag(enum.IntFlag):
    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReplyKind(enum.IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9


class Info(enum.IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class AllocationFlag(enum.IntFlag):
    """The flags of a descriptor in base:allocation."""

    HOLE = 1 << 0
    ZERO = 1 << 1


CHUNK_DONE = 1 << 0
"""The flag of a request's last chunk."""
CHUNK_IS_ERROR = 1 << 15
"""The bit every error chunk carries, also those of kinds we do not know."""


class ChunkKind(enum.IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = CHUNK_IS_ERROR + 1
    ERROR_OFFSET = CHUNK_IS_ERROR + 2


_POSIX_OF_NBD = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.ENOTSUP,
    108: errno.ESHUTDOWN,
}


_NBD_OF_POSIX = {posix: nbd for nbd, posix in _POSIX_OF_NBD.items()} | {
    errno.EROFS: 1,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
}
_NBD_EIO = 5


def posix_errno(nbd_error: int) -> int:
    """The POSIX number of an NBD error; unknown ones count as EINVAL (proto.md, "Error values")."""
    return _POSIX_OF_NBD.get(nbd_error, errno.EINVAL)


def nbd_error(posix: int) -> int:
    """The NBD error of a POSIX number; what NBD has no word for is EIO."""
    return _NBD_OF_POSIX.get(posix, _NBD_EIO)


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """An export as a server lists it."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class ExportSize:
    """Size in bytes and transmission flags of the export that was opened."""

    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """What one request may be aligned to and carry, in bytes."""

    minimum: int = 1
    preferred: int = DEFAULT_PREFERRED_BLOCK_BYTES
    maximum: int = DEFAULT_MAX_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class ChunkError:
    """What an error chunk says. `offset` in bytes of the export, where the server gave one."""

    errno: int
    message: str
    offset: int | None


def encode_option(option: Option, data: bytes = b"") -> bytes:
    """One option request."""
    return OPTION.pack(IHAVEOPT, option, len(data)) + data


def encode_string(text: str) -> bytes:
    """Length and UTF-8 bytes, as options carry names and queries."""
    raw = text.encode()
    return LENGTH.pack(len(raw)) + raw


def encode_go(export: str, infos: tuple[Info, ...]) -> bytes:
    """Data of NBD_OPT_GO and NBD_OPT_INFO."""
    return encode_string(export) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def encode_meta_contexts(export: str, queries: tuple[str, ...]) -> bytes:
    """Data of NBD_OPT_SET_META_CONTEXT and NBD_OPT_LIST_META_CONTEXT."""
    return encode_string(export) + LENGTH.pack(len(queries)) + b"".join(encode_string(q) for q in queries)


def encode_request(flags: int, command: int, cookie: int, offset: int, length: int) -> bytes:
    """Header of one request; the payload of a WRITE follows it."""
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def parse_greeting(data: bytes) -> int:
    """Handshake flags from a server's first 18 bytes."""
    if len(data) != GREETING.size:
        raise ProtocolError(f"its greeting has {len(data)} bytes instead of {GREETING.size}")
    magic, style, flags = GREETING.unpack(data)
    if magic != NBDMAGIC:
        raise ProtocolError("it does not greet as an NBD server")
    if style == OLDSTYLE_MAGIC:
        raise ProtocolError("it speaks the old-style NBD protocol, which has no exports by name")
    if style != IHAVEOPT:
        raise ProtocolError(f"its greeting holds the unknown magic {style:#x}")
    if not flags & HandshakeFlag.FIXED_NEWSTYLE:
        raise ProtocolError("it does not offer the fixed newstyle handshake")
    return int(flags)


def parse_option_reply(data: bytes, option: Option) -> tuple[int, int]:
    """(kind, payload length) of an answer to `option`; kinds with bit 31 are errors."""
    if len(data) != OPTION_REPLY.size:
        raise ProtocolError(f"an option reply header has {len(data)} bytes instead of {OPTION_REPLY.size}")
    magic, answered, kind, length = OPTION_REPLY.unpack(data)
    if magic != OPTION_REPLY_MAGIC:
        raise ProtocolError(f"an option reply starts with the unknown magic {magic:#x}")
    if answered != option:
        raise ProtocolError(f"option {option.name} was answered as if it were option {answered}")
    if length > MAX_OPTION_REPLY_BYTES:
        raise ProtocolError(f"an option reply claims {length} bytes, more than {MAX_OPTION_REPLY_BYTES}")
    return kind, length


def text(raw: bytes | bytearray, what: str) -> str:
    """A string of the peer's; ProtocolError names it by `what` if it is too long or no UTF-8."""
    if len(raw) > MAX_STRING_BYTES:
        raise ProtocolError(f"{what} has {len(raw)} bytes, more than {MAX_STRING_BYTES}")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{what} is not UTF-8") from error


def parse_server(payload: bytes) -> ExportInfo:
    """One export of a NBD_OPT_LIST answer; the description may be empty."""
    if len(payload) < LENGTH.size:
        raise ProtocolError(f"an entry of the export list has only {len(payload)} bytes")
    (length,) = LENGTH.unpack_from(payload)
    end = LENGTH.size + length
    if end > len(payload):
        raise ProtocolError(f"an export name claims {length} bytes of {len(payload) - LENGTH.size}")
    return ExportInfo(text(payload[LENGTH.size : end], "an export name"), text(payload[end:], "a description"))


def parse_info(payload: bytes) -> ExportSize | BlockSizes | None:
    """One NBD_REP_INFO of NBD_OPT_GO; None for kinds that were not asked for."""
    if len(payload) < INFO_KIND.size:
        raise ProtocolError(f"an information reply has only {len(payload)} bytes")
    (kind,) = INFO_KIND.unpack_from(payload)
    if kind == Info.EXPORT:
        if len(payload) != INFO_EXPORT.size:
            raise ProtocolError(f"the export's size came in {len(payload)} bytes instead of {INFO_EXPORT.size}")
        _, size, flags = INFO_EXPORT.unpack(payload)
        if size >= 1 << 63:
            raise ProtocolError(f"the export claims {size} bytes, more than a 63-bit offset reaches")
        return ExportSize(size, flags)
    if kind == Info.BLOCK_SIZE:
        if len(payload) != INFO_BLOCK_SIZE.size:
            raise ProtocolError(f"block sizes came in {len(payload)} bytes instead of {INFO_BLOCK_SIZE.size}")
        return _block_sizes(*INFO_BLOCK_SIZE.unpack(payload)[1:])
    return None


def _block_sizes(minimum: int, preferred: int, maximum: int) -> BlockSizes:
    """Checked by proto.md's "Block size constraints"; a maximum past 32 MiB is more than we ever send at once."""
    if minimum == 0 or minimum & (minimum - 1) or minimum > 64 * 1024:
        raise ProtocolError(f"a minimum block size of {minimum} is not a power of two up to 65536")
    if preferred & (preferred - 1) or preferred < minimum:
        raise ProtocolError(f"a preferred block size of {preferred} is not a power of two of at least {minimum}")
    if maximum < minimum or (maximum != U32_MAX and maximum % minimum):
        raise ProtocolError(f"a maximum block size of {maximum} is no multiple of the minimum, {minimum}")
    return BlockSizes(minimum, preferred, min(maximum, DEFAULT_MAX_BLOCK_BYTES))


def parse_meta_context(payload: bytes) -> tuple[int, str]:
    """(id, name) of one granted or listed meta context."""
    if len(payload) < LENGTH.size:
        raise ProtocolError(f"a meta context has only {len(payload)} bytes")
    (context_id,) = LENGTH.unpack_from(payload)
    return context_id, text(payload[LENGTH.size :], "the name of a meta context")


def parse_hole(payload: bytes | bytearray) -> tuple[int, int]:
    """(offset, length) of an OFFSET_HOLE chunk."""
    if len(payload) != HOLE.size:
        raise ProtocolError(f"a hole chunk has {len(payload)} bytes instead of {HOLE.size}")
    offset, length = HOLE.unpack(payload)
    if length == 0:
        raise ProtocolError("a hole chunk of no length")
    return offset, length


def parse_block_status(payload: bytes | bytearray) -> tuple[int, list[tuple[int, int]]]:
    """(context id, [(length, flags), ...]) of a BLOCK_STATUS chunk: at least one, none empty."""
    descriptors = len(payload) - LENGTH.size
    if descriptors < STATUS_DESCRIPTOR.size or descriptors % STATUS_DESCRIPTOR.size:
        raise ProtocolError(f"a block status chunk has {len(payload)} bytes, which holds no whole descriptors")
    (context_id,) = LENGTH.unpack_from(payload)
    extents = list(STATUS_DESCRIPTOR.iter_unpack(memoryview(payload)[LENGTH.size :]))
    if any(length == 0 for length, _ in extents):
        raise ProtocolError("a block status descriptor of no length")
    return context_id, extents


def parse_error_chunk(kind: int, payload: bytes | bytearray) -> ChunkError:
    """What an error chunk says; the errno is POSIX. Unknown error kinds are read as ERROR, as proto.md asks."""
    if len(payload) < ERROR_HEAD.size:
        raise ProtocolError(f"an error chunk has only {len(payload)} bytes")
    number, length = ERROR_HEAD.unpack_from(payload)
    end = ERROR_HEAD.size + length
    if end > len(payload):
        raise ProtocolError(f"an error message claims {length} bytes of {len(payload) - ERROR_HEAD.size}")
    if number == 0:
        raise ProtocolError("an error chunk with error 0")
    message = text(payload[ERROR_HEAD.size : end], "an error message")
    if kind != ChunkKind.ERROR_OFFSET:
        return ChunkError(posix_errno(number), message, None)
    if len(payload) != end + OFFSET.size:
        raise ProtocolError(f"an error chunk with an offset has {len(payload)} bytes instead of {end + OFFSET.size}")
    return ChunkError(posix_errno(number), message, OFFSET.unpack_from(payload, end)[0])
