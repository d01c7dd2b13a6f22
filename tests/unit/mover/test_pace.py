"""Small at first, more while answers are quick, less while they are slow."""

from __future__ import annotations

from workers.mover.pace import LEAST_BYTES, QUICK_S, SLOW_S, Step, Window

QUICK, SLOW = QUICK_S / 2, SLOW_S * 2


def test_a_step_doubles_while_answers_are_quick_up_to_the_most() -> None:
    step = Step(4 * LEAST_BYTES)
    seen = []
    for _ in range(4):
        seen.append(step.bytes)
        step.took(step.bytes, QUICK)
    assert seen == [LEAST_BYTES, 2 * LEAST_BYTES, 4 * LEAST_BYTES, 4 * LEAST_BYTES]


def test_a_step_halves_while_larger_ones_are_slow_down_to_the_least() -> None:
    step = Step(4 * LEAST_BYTES)
    step.took(LEAST_BYTES, QUICK)
    for _ in range(3):
        step.took(step.bytes, SLOW)
    assert step.bytes == LEAST_BYTES


def test_a_step_grows_where_each_answer_takes_its_time_anyway() -> None:
    """Or 16 TiB would be asked about in 16 million questions, over a line with a long round trip."""
    step = Step(64 * LEAST_BYTES)
    for _ in range(6):
        step.took(step.bytes, SLOW)
    assert step.bytes == 64 * LEAST_BYTES


def test_a_step_settles_at_what_takes_a_fraction_of_a_second() -> None:
    """A server that zeroes 64 MiB a second."""
    step = Step(1024 * LEAST_BYTES)
    for _ in range(50):
        step.took(step.bytes, step.bytes / (64 * LEAST_BYTES))
    assert step.bytes in (16 * LEAST_BYTES, 32 * LEAST_BYTES)


def test_answers_to_older_and_to_shorter_requests_do_not_count() -> None:
    """Of 16 requests on their way the first quick answer doubles the step; the other 15 are of the old one."""
    step = Step(64 * LEAST_BYTES)
    for _ in range(16):
        step.took(LEAST_BYTES, QUICK)
    assert step.bytes == 2 * LEAST_BYTES


def test_a_window_opens_while_answers_are_quick() -> None:
    window = Window(4)
    for _ in range(10):
        window.took(QUICK)
    assert window.size == 4


def test_a_window_closes_where_requests_wait_for_one_another() -> None:
    """A line of 2 MiB/s: each request more makes all take half a second longer."""
    window = Window(16)
    for _ in range(50):
        window.took(0.5 * window.size)
    assert window.size <= 2


def test_a_window_stays_open_where_each_answer_takes_its_time_anyway() -> None:
    window = Window(16)
    for _ in range(50):
        window.took(SLOW)
    assert window.size == 16
