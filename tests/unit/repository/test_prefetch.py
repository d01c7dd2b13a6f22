"""What is asked for ahead of its consumer: in order, side by side, and never much."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from workers.repository.prefetch import Prefetcher

AT_ONCE = 4


@pytest.fixture
def prefetcher() -> Iterator[Prefetcher]:
    with Prefetcher(AT_ONCE) as opened:
        yield opened


def test_answers_come_in_order_and_errors_in_their_place(prefetcher: Prefetcher) -> None:
    def call(number: int) -> int:
        if number == 3:
            raise ValueError(number)
        return number * 2

    numbers = []
    for number, future in prefetcher.each(call, range(10)):
        numbers.append(number)
        if number == 3:
            with pytest.raises(ValueError, match="3"):
                future.result()
        else:
            assert future.result() == number * 2
    assert numbers == list(range(10))


def test_calls_are_made_side_by_side(prefetcher: Prefetcher) -> None:
    meeting = threading.Barrier(AT_ONCE, timeout=10)
    for future in [future for _, future in prefetcher.each(lambda _: meeting.wait(), range(AT_ONCE))]:
        future.result()


def test_whoever_stops_at_the_first_has_asked_for_one(prefetcher: Prefetcher) -> None:
    items = iter(range(10))
    next(prefetcher.each(lambda number: number, items))
    assert next(items) == 1


def test_no_more_is_read_ahead_than_is_on_its_way(prefetcher: Prefetcher) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    assert max(len(taken) - number for number, _ in prefetcher.each(abs, items())) == AT_ONCE


def test_what_nobody_waits_for_any_more_is_not_called(prefetcher: Prefetcher) -> None:
    """The threads are all busy when the consumer leaves."""
    busy, go_on, called = threading.Semaphore(0), threading.Event(), []

    def call(number: int) -> None:
        called.append(number)
        busy.release()
        assert go_on.wait(10)

    others = [future for _, future in prefetcher.each(call, range(AT_ONCE))]
    for _ in range(AT_ONCE):
        assert busy.acquire(timeout=10)
    asked = prefetcher.each(call, [100, 101, 102])
    next(asked)
    next(asked)
    asked.close()  # type: ignore[attr-defined]
    go_on.set()
    for future in others:
        future.result()
    prefetcher.close()
    assert 102 not in called
