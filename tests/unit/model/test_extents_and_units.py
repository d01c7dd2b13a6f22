"""Extents survive packing; units cover every wanted byte once and share no segment."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from coordinator.model.extent import (
    SEGMENT_BYTES,
    Extent,
    Status,
    merge_adjacent,
    pack_extents,
    split_extents,
    unpack_extents,
)
from coordinator.model.units import UNIT_BYTES, UNIT_EXTENTS, plan_units

TIB = 1024**4


@st.composite
def sorted_extents(draw: st.DrawFn) -> list[Extent]:
    offset = 0
    extents = []
    for _ in range(draw(st.integers(0, 40))):
        offset += draw(st.integers(0, 3 * SEGMENT_BYTES))
        length = draw(st.integers(1, 5 * SEGMENT_BYTES))
        extents.append(Extent(offset, length, draw(st.sampled_from(Status))))
        offset += length
    return extents


def covered(extents: list[Extent]) -> list[Extent]:
    return list(merge_adjacent(extents))


@given(sorted_extents())
def test_packing_keeps_every_extent(extents: list[Extent]) -> None:
    assert unpack_extents(pack_extents(extents)) == extents


@given(sorted_extents(), st.integers(1, SEGMENT_BYTES))
def test_splitting_covers_the_same_bytes(extents: list[Extent], step: int) -> None:
    step = max(step, SEGMENT_BYTES // 64)
    pieces = list(split_extents(extents, step))
    assert covered(pieces) == covered(extents)
    assert all(piece.offset // step == (piece.end - 1) // step for piece in pieces)


@given(sorted_extents())
def test_units_hold_every_extent_once_and_share_no_segment(extents: list[Extent]) -> None:
    size = extents[-1].end if extents else 0
    units = list(plan_units(extents, size))
    assert covered([e for unit in units for e in unit.extents]) == covered(extents)
    for unit in units:
        assert unit.start % SEGMENT_BYTES == 0
        assert unit.end % SEGMENT_BYTES == 0 or unit.end == size
        assert all(unit.start <= e.offset and e.end <= unit.end for e in unit.extents)
    for left, right in itertools.pairwise(units):
        assert left.end <= right.start


def test_a_unit_is_bounded_in_bytes_and_extents() -> None:
    dense = list(plan_units([Extent(0, TIB // 64, Status.DATA)], TIB // 64))
    assert max(unit.bytes for unit in dense) <= UNIT_BYTES + SEGMENT_BYTES
    blocks = (Extent(n * 2 * 65536, 65536, Status.DIRTY) for n in range(50_000))
    scattered = list(plan_units(blocks, 50_000 * 2 * 65536))
    assert max(len(unit.extents) for unit in scattered) <= UNIT_EXTENTS + SEGMENT_BYTES // 65536


def test_an_empty_disk_of_16_tib_is_one_unit() -> None:
    (unit,) = plan_units([Extent(0, 16 * TIB, Status.HOLE)], 16 * TIB)
    assert unit.extents == (Extent(0, 16 * TIB, Status.HOLE),)


def test_units_stream_as_the_extents_come() -> None:
    asked = 0

    def extents() -> Iterator[Extent]:
        nonlocal asked
        for n in range(1000):
            asked += 1
            yield Extent(n * UNIT_BYTES, UNIT_BYTES, Status.DATA)

    next(plan_units(extents(), 1000 * UNIT_BYTES))
    assert asked <= 3
