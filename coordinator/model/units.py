"""Work units: what a mover claims and copies at a time, and how a disk is split into them."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from coordinator.model.extent import SEGMENT_BYTES, Extent, split_extents

UNIT_BYTES = 64 * 1024 * 1024
"""A unit holds about this much to read: long enough to amortise a claim, short enough to lose."""
UNIT_EXTENTS = 4096
"""Bounds the memory and the record of a unit of scattered extents."""


class UnitKind(enum.StrEnum):
    PLAN = "plan"
    """Open source and target, check them, and split a pass into units."""
    COPY = "copy"
    """Copy the extents."""
    COMPARE = "compare"
    """Read the extents on both sides and write what differs."""
    SETTLE = "settle"
    """Read suspect units again against their digests, then flush the target a last time."""
    PUBLISH = "publish"
    """Decide the epoch of a job whose target is a repository by its manifest."""
    ABANDON = "abandon"
    """Decide it by a tombstone."""
    TASK = "task"
    """All of a job on a repository as a whole."""


@dataclass(frozen=True, slots=True)
class PlannedUnit:
    """Extents of whole consecutive segments; [start, end) in bytes covers them all."""

    start: int
    end: int
    extents: tuple[Extent, ...]

    @property
    def bytes(self) -> int:
        return sum(e.length for e in self.extents)


def plan_units(extents: Iterable[Extent], size: int) -> Iterator[PlannedUnit]:
    """Split sorted extents of a disk of `size` bytes into units that share no segment; O(one unit) memory.

    Zero extents cost nothing to send, so they count as one extent and no bytes: an empty disk of 16 TiB
    is a handful of units. A long zero extent is therefore not cut at segments; the unit that holds its
    start holds all of it that lies in whole segments.
    """
    held: list[Extent] = []
    weight = 0
    for piece in _pieces(extents):
        starts_segment = not held or piece.offset // SEGMENT_BYTES > (held[-1].end - 1) // SEGMENT_BYTES
        if held and starts_segment and (weight >= UNIT_BYTES or len(held) >= UNIT_EXTENTS):
            yield _unit(held, size)
            held, weight = [], 0
        held.append(piece)
        weight += 0 if piece.reads_as_zeroes else piece.length
    if held:
        yield _unit(held, size)


def _pieces(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Cut data at segments; cut a zero extent only into its partial head, whole middle and partial tail."""
    for extent in extents:
        if not extent.reads_as_zeroes:
            yield from split_extents([extent], SEGMENT_BYTES)
            continue
        head = min(extent.end, -(-extent.offset // SEGMENT_BYTES) * SEGMENT_BYTES)
        tail = max(head, extent.end // SEGMENT_BYTES * SEGMENT_BYTES)
        for start, end in ((extent.offset, head), (head, tail), (tail, extent.end)):
            if end > start:
                yield Extent(start, end - start, extent.status)


def _unit(extents: list[Extent], size: int) -> PlannedUnit:
    start = extents[0].offset // SEGMENT_BYTES * SEGMENT_BYTES
    end = min(size, -(-extents[-1].end // SEGMENT_BYTES) * SEGMENT_BYTES)
    return PlannedUnit(start, end, tuple(extents))


@dataclass(frozen=True, slots=True)
class Claim:
    """A unit as it is handed to the worker that claimed it."""

    job_id: str
    unit_id: str
    kind: UnitKind
    pass_number: int
    token: str
    lease_ms: int
    start: int
    end: int
    extents: str
    """Packed, see `coordinator.model.extent`; "" for plan and settle units."""
    failures: int
    """How many attempts at this unit have failed; pauses and time slices are none."""
    expired: int
    """How many of its leases ran out without a word: a zombie may still be writing."""
    rewrite: bool
    """A flush failed over it: what the target shows of it may not be durable, and comparing proves nothing."""


@dataclass(frozen=True, slots=True, order=True)
class QuarantinedUnit:
    """A unit that was given up; [start, end) in bytes, nothing for a plan or settle unit."""

    start: int
    end: int
    kind: UnitKind
    failures: int
    error: str
    """Of its last attempt, as its holder told it; "" if that ended without a word."""


@dataclass(frozen=True, slots=True)
class Directive:
    """What a lease renewal tells the holder."""

    held: bool
    """False: the lease is lost, stop writing at once."""
    run: bool
    """False: the job is paused or cancelled; drain, flush, release."""
    speed: int
    force: bool = False
    """True: the job is cancelled by force; break off instead of draining, and release."""
