"""The map of a segment: which run holds each of its blocks.

    version u8 = 1 | blocks u16 | packs u16
    pack ids, 16 bytes each
    for each block: u16, the number of its pack in this list, or 0xFFFF: it reads as zeroes
    for each block that does not: offset u32, length u32 (bit 31: not compressed), digest 32 bytes

All numbers are little-endian. A map is named by `MapRef` in the root's pages.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.model.extent import BLOCK_BYTES
from workers.repository.keyring import TAG_BYTES
from workers.repository.layout import BLOCKS_A_SEGMENT, DIGEST_BYTES, ID_BYTES
from workers.repository.runs import Run
from workers.repository.store.contract import Buffer

_HEAD = struct.Struct("<BHH")
_RUN = struct.Struct(f"<II{DIGEST_BYTES}s")
_ZERO = 0xFFFF
_RAW_BIT = 1 << 31
MAP_DIGEST_BYTES = 16
"""Of a map's plain bytes, truncated: enough to notice any damage, and to find two maps equal."""

MAX_MAP_BYTES = 16 * 1024
"""Of a stored map: twice what the longest needs."""
MAX_RUN_BYTES = BLOCK_BYTES + TAG_BYTES

SegmentMap = tuple[Run | None, ...]
"""A run for each block of a segment, None for one that reads as zeroes; shorter for the end of a disk."""


@dataclass(frozen=True, slots=True)
class MapRef:
    """Where the map of `segment` is stored: `length` bytes at `offset` of `pack`; length 0: all of it reads as zeroes.

    `packs` are those that its runs are in, so that what is alive can be told without reading maps.
    """

    segment: int
    pack: bytes
    offset: int
    length: int
    digest: bytes
    packs: tuple[bytes, ...]

    @property
    def is_zero(self) -> bool:
        return self.length == 0


def zero_ref(segment: int) -> MapRef:
    return MapRef(segment, bytes(ID_BYTES), 0, 0, bytes(MAP_DIGEST_BYTES), ())


def packs_of(runs: Sequence[Run | None]) -> tuple[bytes, ...]:
    return tuple(dict.fromkeys(run.pack for run in runs if run is not None))


def encode(runs: Sequence[Run | None]) -> bytes:
    packs = packs_of(runs)
    numbers = {pack: number for number, pack in enumerate(packs)}
    present = [run for run in runs if run is not None]
    indexes = [_ZERO if run is None else numbers[run.pack] for run in runs]
    parts = [_HEAD.pack(1, len(runs), len(packs)), *packs, struct.pack(f"<{len(runs)}H", *indexes)]
    parts += [_RUN.pack(r.offset, r.length | (_RAW_BIT if r.raw else 0), r.digest) for r in present]
    return b"".join(parts)


def decode(data: Buffer) -> SegmentMap:
    """ValueError for anything that `encode` did not make."""
    try:
        version, blocks, packs = _HEAD.unpack_from(data, 0)
        if version != 1 or blocks > BLOCKS_A_SEGMENT or packs > blocks:
            raise ValueError("the head of a map makes no sense")
        at = _HEAD.size + packs * ID_BYTES
        ids = [bytes(data[o : o + ID_BYTES]) for o in range(_HEAD.size, at, ID_BYTES)]
        indexes = struct.unpack_from(f"<{blocks}H", data, at)
        at += 2 * blocks
        present = sum(index != _ZERO for index in indexes)
        if len(data) != at + present * _RUN.size:
            raise ValueError("a map is longer or shorter than its runs")
        stored = _RUN.iter_unpack(data[at:])
        return tuple(None if index == _ZERO else _run(ids[index], *next(stored)) for index in indexes)
    except (struct.error, IndexError) as error:
        raise ValueError(f"a map cannot be read: {error}") from error


def _run(pack: bytes, offset: int, length: int, digest: bytes) -> Run:
    if not 0 < length & ~_RAW_BIT <= MAX_RUN_BYTES:
        raise ValueError("a run that is longer than a block")
    return Run(pack, offset, length & ~_RAW_BIT, bool(length & _RAW_BIT), digest)
