from __future__ import annotations

from bisect import bisect_right

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.model.errors import DiskIOError
from coordinator.model.extent import Extent, Status
from workers.sources.blockstatus import (
    ALLOCATION,
    BITMAP,
    DEPTH,
    MAX_STATUS_BYTES,
    WholeBlockStatus,
    allocation,
    in_whole_blocks,
    selected,
    selected_with_zeroes,
    walk,
)

TIB = 1024**4
BLOCK = 64 * 1024
STEP = 16 * 1024**2
DIRTY = BITMAP + "b0"


class Server:
    """Answers from lists of (length, flags) that describe a whole disk; at most `most` runs an answer."""

    def __init__(self, runs: dict[str, list[tuple[int, int]]], most: int = 1000, overshoots: bool = False) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self._most = most
        self._overshoots = overshoots
        self._starts: dict[str, list[int]] = {}
        self._flags: dict[str, list[int]] = {}
        for context, listed in runs.items():
            at, starts = 0, []
            for length, _ in listed:
                starts.append(at)
                at += length
            self._starts[context] = [*starts, at]
            self._flags[context] = [f for _, f in listed]

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        self.asked.append((context, offset, length))
        starts, flags = self._starts[context], self._flags[context]
        first = bisect_right(starts, offset) - 1
        answer = []
        for i in range(first, min(len(flags), first + self._most)):
            if starts[i] >= offset + length:
                break
            end = starts[i + 1] if self._overshoots else min(starts[i + 1], offset + length)
            answer.append((end - max(offset, starts[i]), flags[i]))
        return answer


def test_a_hole_reads_as_zeroes_only_if_the_server_says_so() -> None:
    server = Server({ALLOCATION: [(10, 0), (10, 1), (10, 2), (10, 3)]})
    statuses = [e.status for e in allocation(server, 0, 40)]
    assert statuses == [Status.DATA, Status.DATA, Status.ZERO, Status.HOLE]


def test_only_the_topmost_image_is_selected() -> None:
    server = Server({DEPTH: [(10, 0), (10, 1), (10, 2), (10, 1)]})
    assert list(selected(server, DEPTH, 0, 40)) == [Extent(10, 10, Status.DATA), Extent(30, 10, Status.DATA)]


def test_an_unknown_flag_beside_dirty_changes_nothing() -> None:
    server = Server({DIRTY: [(10, 3), (10, 2)]})
    assert list(selected(server, DIRTY, 0, 20)) == [Extent(0, 10, Status.DIRTY)]


def test_a_server_that_answers_nothing_is_an_error_and_no_endless_loop() -> None:
    class Mute:
        def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
            return [(0, 0)]

    with pytest.raises(DiskIOError):
        list(walk(Mute(), ALLOCATION, 0, 100))


def test_no_question_is_longer_than_32_bits_allow() -> None:
    server = Server({ALLOCATION: [(16 * TIB, 3)]})
    assert sum(e.length for e in allocation(server, 0, 16 * TIB)) == 16 * TIB
    assert max(length for _, _, length in server.asked) == MAX_STATUS_BYTES < 2**32


def test_a_million_dirty_extents_are_streamed_window_by_window() -> None:
    class Scattered:
        """One dirty block in every 16 MiB of 16 TiB, all of it data; builds only what is asked for."""

        asked = 0

        def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
            self.asked += 1
            if context == ALLOCATION:
                return [(length, 0)]
            gap = -offset % STEP
            count = (length - gap + STEP - 1) // STEP
            return [(gap, 0), *[(BLOCK, 1), (STEP - BLOCK, 0)] * count]

    server = Scattered()
    extents = selected_with_zeroes(server, DIRTY, 0, 16 * TIB)
    assert next(extents) == Extent(0, BLOCK, Status.DIRTY)
    assert server.asked == 2  # one window of each context, and no more before it is wanted
    assert sum(1 for _ in extents) == 16 * TIB // STEP - 1


runs = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=40)


@given(dirty=runs, known=runs, most=st.integers(1, 5), overshoots=st.booleans(), data=st.data())
def test_the_intersection_says_of_every_byte_what_the_contexts_say(
    dirty: list[tuple[int, int]],
    known: list[tuple[int, int]],
    most: int,
    overshoots: bool,
    data: st.DataObject,
) -> None:
    dirty_flags = [f for n, f in dirty for _ in range(n)]
    known_flags = [f for n, f in known for _ in range(n)]
    size = min(len(dirty_flags), len(known_flags))
    offset = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - offset))
    server = Server({DIRTY: dirty, ALLOCATION: known}, most, overshoots)
    found: dict[int, Status] = {}
    at = offset
    for extent in selected_with_zeroes(server, DIRTY, offset, length):
        assert extent.offset >= at
        at = extent.end
        found.update(dict.fromkeys(range(extent.offset, extent.end), extent.status))
    assert at <= offset + length
    assert found == {
        i: Status.ZERO if known_flags[i] & 2 else Status.DIRTY
        for i in range(offset, offset + length)
        if dirty_flags[i] & 1
    }


# -- servers with a minimum block size --------------------------------------------------------------------------

UNIT = 8
"""The minimum block size of the servers below."""


class StrictServer(Server):
    """Refuses questions that are not whole blocks."""

    def block_status(self, context: str, offset: int, length: int) -> list[tuple[int, int]]:
        assert offset % UNIT == length % UNIT == 0
        return super().block_status(context, offset, length)


@given(runs=runs, most=st.integers(UNIT, 2 * UNIT), overshoots=st.booleans(), data=st.data())
def test_whole_blocks_are_asked_for_and_the_answer_is_that_of_the_range(
    runs: list[tuple[int, int]], most: int, overshoots: bool, data: st.DataObject
) -> None:
    flags = [f for n, f in runs for _ in range(n)]
    flags += [0] * (-len(flags) % UNIT)
    server = StrictServer({ALLOCATION: [(1, f) for f in flags]}, most, overshoots)
    offset = data.draw(st.integers(0, len(flags) - 1))
    length = data.draw(st.integers(1, len(flags) - offset))
    found = [f for _, run, f in walk(WholeBlockStatus(server, UNIT), ALLOCATION, offset, length) for _ in range(run)]
    assert found == flags[offset : offset + length]


@given(st.lists(st.tuples(st.integers(1, 20), st.sampled_from([*Status, None])), max_size=20))
def test_data_is_rounded_to_whole_blocks_and_zeroes_give_way(runs: list[tuple[int, Status | None]]) -> None:
    """None: not selected by a bitmap."""
    before: dict[int, Status] = {}
    extents = []
    at = 0
    for length, status in runs:
        if status is not None:
            extents.append(Extent(at, length, status))
            before.update(dict.fromkeys(range(at, at + length), status))
        at += length
    after: dict[int, Status] = {}
    end = 0
    for extent in in_whole_blocks(extents, UNIT):
        assert extent.offset >= end
        assert extent.length > 0
        end = extent.end
        if not extent.reads_as_zeroes:
            assert extent.offset % UNIT == extent.end % UNIT == 0
        after.update(dict.fromkeys(range(extent.offset, extent.end), extent.status))
    zeroes = (Status.ZERO, Status.HOLE)
    with_data = {byte // UNIT for byte, status in before.items() if status not in zeroes}
    for byte in range(end + UNIT):
        if byte // UNIT in with_data:
            assert after[byte] not in zeroes
        else:
            assert after.get(byte) == before.get(byte)
