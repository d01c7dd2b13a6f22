"""When a request is sent again: as the server asks, slower for all threads when it is busy, and not for ever.

              ┌──────────────────────── pause ◄───────────────┐
              ▼                                               │
    turn ► attempt ── fails ──► worth another (`Again`) ── patience left?
              │                     │ no                      │ no
              ▼                     ▼                         ▼
            answer                error                  UnavailableError

A server that is busy (503 SlowDown, 429) is left alone by every thread of the store until the pause is over, and then
gets half as many requests at once as before; each answer wins a little of that back (as TCP does with its window).
botocore's own retries are turned off: they know nothing of Retry-After, and count attempts instead of time.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from coordinator.model.errors import FlushpointError, UnavailableError

PATIENCE_S = 60.0
"""No attempt starts later than this after the first one."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
"""Pauses double from the first to the longest; a Retry-After may be longer."""
STRANGER_PATIENCE_S = 10.0
"""For an endpoint that cannot be reached and never answered this store: rather misspelt than restarting."""

Answer = TypeVar("Answer")
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Again:
    """A failure worth another attempt, and the sentence that tells of it if there is none left."""

    message: str
    remedy: str
    after_s: float = 0.0
    """What the server asks to be waited (Retry-After)."""
    busy: bool = False
    """It asks for fewer requests."""
    unreachable: bool = False
    """There was no connection to anybody."""
    undone: bool = False
    """The attempt has certainly changed nothing."""


@dataclass(slots=True)
class Effort:
    """One call: how long it may take, whether somebody stopped it, and whether an attempt's outcome is unknown."""

    patience_s: float = PATIENCE_S
    stopped: threading.Event = field(default_factory=threading.Event)
    doubtful: bool = False


class Pace:
    """How many requests may be under way, and from when on: shared by all threads of a store."""

    def __init__(self, most: int, clock: Clock = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._limit = float(most)
        self._under_way = 0
        self._not_before_s = 0.0
        self._changed = threading.Condition()
        self._own = threading.local()

    @property
    def limit(self) -> int:
        """Requests that may be under way now, 1 to `most`."""
        return int(self._limit)

    @contextmanager
    def turn(self, deadline_s: float) -> Iterator[bool]:
        """Wait for one's turn; False if it has not come by the deadline (of the clock). A request that is made while an
        answer is being read, by the same thread, belongs to that one's turn: it would wait for itself."""
        if getattr(self._own, "turn", False):
            yield True
            return
        with self._changed:
            mine = self._wait(deadline_s)
            self._under_way += mine
        self._own.turn = mine
        try:
            yield mine
        finally:
            self._own.turn = False
            with self._changed:
                self._under_way -= mine
                self._changed.notify_all()

    def went_well(self) -> None:
        """After as many answers as requests may be under way, one more may be."""
        with self._changed:
            self._limit = min(float(self._most), self._limit + 1 / self._limit)
            self._changed.notify_all()

    def slow_down(self, pause_s: float) -> None:
        """No request for `pause_s`, then half as many at once. Counted once, however many threads were told."""
        with self._changed:
            now = self._clock()
            if now >= self._not_before_s:
                self._limit = max(1.0, self._limit / 2)
            self._not_before_s = max(self._not_before_s, now + pause_s)

    def _wait(self, deadline_s: float) -> bool:
        while True:
            now = self._clock()
            free = self._under_way < int(self._limit)
            if free and now >= self._not_before_s:
                return True
            if now >= deadline_s:
                return False
            until_s = min(self._not_before_s, deadline_s) if free else deadline_s
            self._changed.wait(until_s - now)


class Retrier:
    """Sends requests until one is answered. `explain` tells what an exception means, None if it is not its matter."""

    def __init__(self, pace: Pace, explain: Callable[[Exception, str], FlushpointError | Again | None]) -> None:
        self._pace = pace
        self._explain = explain
        self._reached = False

    def call(self, request: Callable[[], Answer], key: str, effort: Effort) -> Answer:
        """The answer; or what `explain` made of the failure; or UnavailableError when patience is over.

        `key` goes into messages. `effort.doubtful` is set when an attempt failed that may have been done.
        """
        started_s = time.monotonic()
        deadline_s = started_s + effort.patience_s
        attempts = 0
        last: Again | None = None
        while True:
            with self._pace.turn(deadline_s) as mine:
                if not mine:
                    raise _gave_up(last or _CROWDED, attempts, started_s)
                try:
                    answer = request()
                except FlushpointError:
                    raise
                except Exception as error:
                    last = self._worth_another(error, key)
                    cause = error
                else:
                    self._reached = True
                    self._pace.went_well()
                    return answer
            attempts += 1
            effort.doubtful |= not last.undone
            if not self._reached:
                deadline_s = min(deadline_s, started_s + STRANGER_PATIENCE_S)
            pause_s = _pause_s(attempts, last)
            if last.busy:
                self._pace.slow_down(pause_s)
            if time.monotonic() + pause_s > deadline_s or effort.stopped.wait(pause_s):
                raise _gave_up(last, attempts, started_s) from cause

    def _worth_another(self, error: Exception, key: str) -> Again:
        explained = self._explain(error, key)
        if explained is None:
            raise error
        self._reached |= isinstance(explained, FlushpointError) or not explained.unreachable
        if isinstance(explained, FlushpointError):
            raise explained from error
        return explained


_CROWDED = Again("the object store lets too few requests through", "run fewer workers, or give the store more room")


def _pause_s(attempts: int, failure: Again) -> float:
    """What the server asks, and a random part of what doubles with every attempt: threads must not return in step."""
    return failure.after_s + random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempts))


def _gave_up(failure: Again, attempts: int, started_s: float) -> UnavailableError:
    asked = f", and it asks to be left alone for {failure.after_s:.0f} s" if failure.after_s else ""
    tried = f"{attempts} attempt{'' if attempts == 1 else 's'} in {time.monotonic() - started_s:.0f} s"
    return UnavailableError(f"{failure.message} ({tried}{asked})", failure.remedy)
