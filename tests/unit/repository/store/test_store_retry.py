"""When a request is sent again, and how a busy server is spared: without any server."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from coordinator.model.errors import FlushpointError, RefusedError, UnavailableError
from workers.repository.store import retry
from workers.repository.store.retry import Again, Effort, Pace, Retrier
from workers.repository.store.s3_errors import retry_after_s

FAILED = Again("the store failed", "look at it")
BUSY = Again("the store is busy", "spare it", busy=True)


class Trouble(Exception):
    """Carries what it means."""

    def __init__(self, meaning: FlushpointError | Again | None) -> None:
        super().__init__()
        self.meaning = meaning


def explain(error: Exception, _: str) -> FlushpointError | Again | None:
    assert isinstance(error, Trouble)
    return error.meaning


class Script:
    """A request that fails as written down, then succeeds."""

    def __init__(self, *meanings: FlushpointError | Again | None) -> None:
        self._meanings = list(meanings)
        self.calls_s: list[float] = []

    def __call__(self) -> str:
        self.calls_s.append(time.monotonic())
        if self._meanings:
            raise Trouble(self._meanings.pop(0))
        return "answer"


@pytest.fixture
def pace() -> Pace:
    return Pace(8)


@pytest.fixture
def retrier(pace: Pace) -> Retrier:
    return Retrier(pace, explain)


def test_a_passing_failure_is_tried_again(retrier: Retrier) -> None:
    request = Script(FAILED, FAILED)
    assert retrier.call(request, "k", Effort()) == "answer"
    assert len(request.calls_s) == 3


def test_a_final_failure_is_not_tried_again(retrier: Retrier) -> None:
    request = Script(RefusedError("no"))
    with pytest.raises(RefusedError) as caught:
        retrier.call(request, "k", Effort())
    assert isinstance(caught.value.__cause__, Trouble)
    assert len(request.calls_s) == 1


def test_a_fault_of_the_program_is_raised_as_it_is(retrier: Retrier) -> None:
    with pytest.raises(Trouble):
        retrier.call(Script(None), "k", Effort())


def test_patience_ends_with_a_sentence(retrier: Retrier) -> None:
    request = Script(*[FAILED] * 1000)
    started_s = time.monotonic()
    with pytest.raises(UnavailableError, match=r"the store failed \(\d+ attempts in 0 s\). Look at it"):
        retrier.call(request, "k", Effort(patience_s=0.4))
    assert time.monotonic() - started_s < 0.4
    assert len(request.calls_s) >= 2


def test_what_the_server_asks_to_be_waited_is_waited(retrier: Retrier) -> None:
    request = Script(Again("busy", "", after_s=0.3))
    retrier.call(request, "k", Effort())
    assert request.calls_s[1] - request.calls_s[0] >= 0.3


def test_a_wait_longer_than_patience_is_not_begun(retrier: Retrier) -> None:
    with pytest.raises(UnavailableError, match=r"busy \(1 attempt in 0 s, and it asks to be left alone for 3600 s\)"):
        retrier.call(Script(Again("busy", "", after_s=3600)), "k", Effort())


def test_an_effort_that_is_stopped_ends_its_pause(retrier: Retrier) -> None:
    effort = Effort()
    threading.Timer(0.1, effort.stopped.set).start()
    started_s = time.monotonic()
    with pytest.raises(UnavailableError):
        retrier.call(Script(Again("busy", "", after_s=30)), "k", effort)
    assert time.monotonic() - started_s < 10


def test_pauses_grow_and_are_bounded_and_differ() -> None:
    def pauses(attempts: int) -> list[float]:
        return [retry._pause_s(attempts, FAILED) for _ in range(200)]

    assert max(pauses(1)) <= 2 * retry.FIRST_PAUSE_S
    assert max(pauses(5)) > 4 * retry.FIRST_PAUSE_S
    assert max(pauses(50)) <= retry.LONGEST_PAUSE_S
    assert len(set(pauses(3))) > 100


def test_a_stranger_that_cannot_be_reached_gets_less_patience(
    retrier: Retrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "STRANGER_PATIENCE_S", 0.3)
    away = Again("cannot be reached", "", unreachable=True)
    with pytest.raises(UnavailableError):
        retrier.call(Script(*[away] * 1000), "k", Effort())
    with pytest.raises(RefusedError):
        retrier.call(Script(RefusedError("it has answered")), "k", Effort())
    request = Script(away, away, away, away, away)  # these pauses take longer than 0.3 s, but for one run in millions
    monkeypatch.setattr(retry, "_pause_s", lambda *_: 0.1)
    assert retrier.call(request, "k", Effort()) == "answer"


def test_only_an_attempt_that_may_have_been_done_leaves_doubt(retrier: Retrier) -> None:
    sure, doubtful = Effort(), Effort()
    retrier.call(Script(Again("conflict", "", undone=True)), "k", sure)
    retrier.call(Script(FAILED), "k", doubtful)
    assert not sure.doubtful
    assert doubtful.doubtful


def test_a_busy_server_gets_half_as_many_requests(pace: Pace, retrier: Retrier) -> None:
    retrier.call(Script(BUSY), "k", Effort())
    assert pace.limit == 4


def test_many_threads_told_at_once_halve_once(pace: Pace) -> None:
    for _ in range(5):
        pace.slow_down(0.2)
    assert pace.limit == 4


def test_at_least_one_request_is_let_through(pace: Pace) -> None:
    for _ in range(10):
        pace.slow_down(0)
    assert pace.limit == 1


def test_answers_win_the_pace_back(pace: Pace) -> None:
    pace.slow_down(0)
    for _ in range(5):
        pace.went_well()
    assert pace.limit == 5
    for _ in range(1000):
        pace.went_well()
    assert pace.limit == 8


def test_a_pause_holds_for_every_thread(pace: Pace) -> None:
    def turn(_: int) -> float:
        with pace.turn(time.monotonic() + 10) as mine:
            assert mine
            return time.monotonic()

    pace.slow_down(0.3)
    until_s = time.monotonic() + 0.29
    with ThreadPoolExecutor(8) as threads:
        assert all(at_s >= until_s for at_s in threads.map(turn, range(8)))


def test_no_more_requests_are_under_way_than_the_limit(pace: Pace) -> None:
    pace.slow_down(0)
    pace.slow_down(0)  # two may
    under_way, most = 0, 0
    lock = threading.Lock()

    def turn(_: int) -> None:
        nonlocal under_way, most
        with pace.turn(time.monotonic() + 10):
            with lock:
                under_way += 1
                most = max(most, under_way)
            time.sleep(0.01)  # nothing to await: it is the absence of others that counts
            with lock:
                under_way -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(turn, range(16)))
    assert most == 2


def test_who_gets_no_turn_in_time_is_told_so() -> None:
    pace = Pace(1)
    with pace.turn(time.monotonic() + 10), ThreadPoolExecutor(1) as other:
        waiting = other.submit(Retrier(pace, explain).call, Script(), "k", Effort(patience_s=0.1))
        with pytest.raises(UnavailableError, match="lets too few requests through"):
            waiting.result()


def test_a_turn_is_given_back_by_an_exception(pace: Pace) -> None:
    for _ in range(20):
        with pytest.raises(ZeroDivisionError), pace.turn(time.monotonic() + 10):
            raise ZeroDivisionError
    with pace.turn(time.monotonic()) as mine:
        assert mine


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 120 "}, 120),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "-5"}, 0),
        ({"retry-after": "9" * 400}, float("inf")),
        ({"x-amz-retry-after": "1500"}, 1.5),
    ],
)
def test_retry_after_is_read_in_its_forms(headers: dict[str, str], seconds: float) -> None:
    assert retry_after_s(headers, datetime.now(UTC)) == seconds


def test_retry_after_may_be_a_date() -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    assert retry_after_s({"retry-after": format_datetime(now + timedelta(seconds=9), usegmt=True)}, now) == 9
    assert retry_after_s({"retry-after": format_datetime(now - timedelta(seconds=9), usegmt=True)}, now) == 0
