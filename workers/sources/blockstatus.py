"""NBD block status turned into extents.

base:allocation says what reads as zeroes. A selecting context, a dirty bitmap or the allocation depth, says
which ranges a sync mode copies at all; the two are intersected window by window, so that a disk with a
million dirty extents needs the memory of one window::

    dirty       ──██████────██──────██──────        windows of just under 4 GiB
    allocation  ▒▒▒▒▒▒······▒▒▒▒▒▒··········        ▒ data, · zeroes
    extents       DDDDzz    DD      zz              D dirty, z zero

A server with a minimum block size wants to be asked, and read, in whole blocks, whatever its answers end at::

    blocks        |       |       |       |
    answer         ▒▒▒····▒▒▒·············          ▒ data, · zeroes
    extents       ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒zzzzzzz           (`WholeBlockStatus` asks, `in_whole_blocks` rounds)
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from coordinator.model.errors import DiskIOError, Next
from coordinator.model.extent import Extent, Status
from coordinator.model.job import Sync

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
BITMAP = "qemu:dirty-bitmap:"

MAX_STATUS_BYTES = 4 * 1024**3 - 64 * 1024
"""Most to ask block status for at once: its length is 32 bits, and a multiple of the block keeps extents whole."""

_STATE_HOLE = 1  # NBD proto.md, base:allocation
_STATE_ZERO = 2
_STATE_DIRTY = 1  # QEMU docs/interop/nbd.txt
_TOPMOST_DEPTH = 1


class StatusReader(Protocol):
    """The part of a Session that extents are read with."""

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        """[(length, flags), …] from `offset`; may end early or late."""


@dataclass(frozen=True, slots=True)
class WholeBlockStatus:
    """A StatusReader that asks another one for whole blocks only; the disk ends at a multiple of `block`."""

    reader: StatusReader
    block: int

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        lead = offset % self.block
        whole = -(-(lead + length) // self.block) * self.block
        answer = []
        for run, flags in self.reader.block_status(context, offset - lead, whole):
            skipped = min(lead, run)
            lead -= skipped
            if run > skipped:
                answer.append((run - skipped, flags))
        return answer


def selecting_context(sync: Sync, bitmap: str | None) -> str | None:
    """The meta context that says which extents a sync mode copies; None when it copies all."""
    if sync is Sync.TOP:
        return DEPTH
    if sync is Sync.DIRTY:
        assert bitmap is not None  # JobSpec lets no dirty job pass without one
        return BITMAP + bitmap
    return None


def walk(reader: StatusReader, context: str, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(offset, length, flags) of one context, sorted and gapless over the range, asked for step by step."""
    end = offset + length
    while offset < end:
        asked = offset
        for run, flags in reader.block_status(context, offset, min(MAX_STATUS_BYTES, end - offset)):
            clipped = min(run, end - offset)  # a server may answer for more than was asked
            if clipped > 0:
                yield offset, clipped, flags
                offset += clipped
        if offset == asked:
            raise DiskIOError(
                f"the NBD server does not say anything about {context} at byte {offset}",
                errno_=errno.EPROTO,
                offset=offset,
                length=length,
                next_=Next.GIVE_UP,
            )


def in_whole_blocks(extents: Iterable[Extent], block: int) -> Iterator[Extent]:
    """Sorted extents with data rounded outward to multiples of `block`, so that it can be read.

    Zeroes are not read. They keep their bounds, but for what lies in a block of data.
    """
    held: list[Extent] = []  # zeroes in the last block so far: data in it would take them in
    end = 0
    for extent in extents:
        block_start = extent.offset // block * block
        for zeroes in held:
            if zeroes.offset < block_start:
                yield _part(zeroes, zeroes.offset, min(zeroes.end, block_start))
        held = [_part(z, max(z.offset, block_start), z.end) for z in held if z.end > block_start]
        if extent.reads_as_zeroes:
            if extent.end > end:
                held.append(_part(extent, max(extent.offset, end), extent.end))
            continue
        held.clear()
        start, end = max(block_start, end), max(end, -(-extent.end // block) * block)
        if end > start:
            yield Extent(start, end - start, extent.status)
    yield from held


def _part(extent: Extent, start: int, end: int) -> Extent:
    return Extent(start, end - start, extent.status)


def allocation(reader: StatusReader, offset: int, length: int) -> Iterator[Extent]:
    """Extents by base:allocation. A hole that is not said to read as zeroes may read as anything: data."""
    for start, run, flags in walk(reader, ALLOCATION, offset, length):
        if not flags & _STATE_ZERO:
            yield Extent(start, run, Status.DATA)
        else:
            yield Extent(start, run, Status.HOLE if flags & _STATE_HOLE else Status.ZERO)


def selected(reader: StatusReader, context: str, offset: int, length: int) -> Iterator[Extent]:
    """What the selecting context picks from the range: DIRTY for a bitmap, DATA for the topmost image."""
    dirty = context.startswith(BITMAP)
    for start, run, flags in walk(reader, context, offset, length):
        if dirty and flags & _STATE_DIRTY:
            yield Extent(start, run, Status.DIRTY)
        elif not dirty and flags == _TOPMOST_DEPTH:
            yield Extent(start, run, Status.DATA)


def selected_with_zeroes(reader: StatusReader, context: str, offset: int, length: int) -> Iterator[Extent]:
    """`selected`, with ZERO for what is known to read as zeroes (to be zeroed: the target may hold older data)."""
    end = offset + length
    while offset < end:
        window_end = min(end, offset + MAX_STATUS_BYTES)
        picked = list(selected(reader, context, offset, window_end - offset))
        if picked:
            known = allocation(reader, picked[0].offset, picked[-1].end - picked[0].offset)
            yield from _intersected(picked, known)
        offset = window_end


def _intersected(picked: list[Extent], known: Iterator[Extent]) -> Iterator[Extent]:
    """`picked` cut where `known`, gapless over the same range, changes between zeroes and data."""
    current = next(known)
    for extent in picked:
        offset = extent.offset
        while offset < extent.end:
            while current.end <= offset:
                current = next(known)
            end = min(extent.end, current.end)
            yield Extent(offset, end - offset, Status.ZERO if current.reads_as_zeroes else extent.status)
            offset = end
