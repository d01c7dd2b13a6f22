"""Extents of a disk, and how a list of them is packed for the ledger."""

from __future__ import annotations

import base64
import enum
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = 64 * 1024
"""Unit of dirty tracking unless a bitmap says otherwise (QEMU's default granularity for qcow2)."""
SEGMENT_BYTES = 8 * 1024 * 1024
"""Aligned range of a disk that only one work unit of a pass may touch."""


class Status(enum.IntEnum):
    """What is known about an extent before it is read."""

    DATA = 0
    ZERO = 1
    """Reads as zeroes; may or may not be allocated."""
    HOLE = 2
    """Not allocated, and reads as zeroes."""
    DIRTY = 3
    """Changed since the bitmap was started; may hold data or zeroes."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes from byte `offset` of a disk, all of one status."""

    offset: int
    length: int
    status: Status

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def reads_as_zeroes(self) -> bool:
        return self.status in (Status.ZERO, Status.HOLE)


_RECORD = struct.Struct("<QQB")  # offset, length, status


def pack_extents(extents: Iterable[Extent]) -> str:
    """Extents as text that fits a Redis field: base64 of deflated (u64 offset, u64 length, u8 status)."""
    raw = b"".join(_RECORD.pack(e.offset, e.length, e.status) for e in extents)
    return base64.b64encode(zlib.compress(raw, 1)).decode("ascii")


def unpack_extents(text: str) -> list[Extent]:
    """The inverse of `pack_extents`."""
    raw = zlib.decompress(base64.b64decode(text))
    return [Extent(o, n, Status(s)) for o, n, s in _RECORD.iter_unpack(raw)]


def merge_adjacent(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours of one status. Input must be sorted by offset; O(1) memory."""
    held: Extent | None = None
    for extent in extents:
        if extent.length == 0:
            continue
        if held is not None and held.end == extent.offset and held.status == extent.status:
            held = Extent(held.offset, held.length + extent.length, held.status)
            continue
        if held is not None:
            yield held
        held = extent
    if held is not None:
        yield held


def split_extents(extents: Iterable[Extent], step: int) -> Iterator[Extent]:
    """Cut extents so that none crosses a multiple of `step` bytes."""
    for extent in extents:
        offset = extent.offset
        while offset < extent.end:
            end = min(extent.end, (offset // step + 1) * step)
            yield Extent(offset, end - offset, extent.status)
            offset = end
