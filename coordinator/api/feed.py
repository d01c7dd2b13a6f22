"""Wakes the requests that wait: one reader of the events for all of them, however many they are."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Set
from functools import partial
from typing import TypeVar

import structlog
from starlette.concurrency import run_in_threadpool

from coordinator.ledger.contract import Ledger
from coordinator.model.errors import UnavailableError

T = TypeVar("T")
log = structlog.get_logger()

LOOK_AGAIN_S = 2.0
"""A waiting request is woken by events; this bounds what a lost one could cost."""
READ_S = 5.0
"""Of one look for new events."""
RETRY_S = 0.5
"""Between two tries to read from a ledger that does not answer."""
PAGE = 1000


class EventFeed:
    """Reads in a thread of its own while it is `running`. A request that waits costs no thread, so that any number of
    them leaves the API's threads to those that want an answer now."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        """By the job whose events they wait for, "" for all. Touched by the thread of the event loop alone."""
        self._closed = threading.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        reader = threading.Thread(
            target=self._read,
            args=(asyncio.get_running_loop(),),
            name="events",
            daemon=True,  # it ends with the read that it is at, for which nobody waits
        )
        reader.start()
        try:
            yield
        finally:
            self.close()

    def close(self) -> None:
        """End all waits with UnavailableError, so that who waits asks again. Called by the thread of the event loop."""
        self._closed.set()
        self._wake_all()

    async def wait_for(self, look: Callable[[], T], ends: Callable[[T], bool], job_id: str, wait_s: float) -> T:
        """What `look` finds (in a thread) once that `ends` the wait, or after `wait_s`. Looks now and after each event
        of the job, of any job if it is ""."""
        deadline = time.monotonic() + wait_s
        with self._waiter(job_id) as woken:
            while True:
                woken.clear()  # before the look, or a change between the two is missed
                found = await run_in_threadpool(look)
                left_s = deadline - time.monotonic()
                if ends(found) or left_s <= 0:
                    return found
                if not self._closed.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(woken.wait(), min(left_s, LOOK_AGAIN_S))
                if self._closed.is_set():
                    raise UnavailableError("the coordinator is stopping", "ask again once it, or another, runs")

    @contextlib.contextmanager
    def _waiter(self, job_id: str) -> Iterator[asyncio.Event]:
        woken = asyncio.Event()
        self._waiting[job_id].add(woken)
        try:
            yield woken
        finally:
            self._waiting[job_id].discard(woken)
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake who waits for the jobs of new events; and everybody where some may have been missed."""
        position = ""
        wake: Callable[[], None]
        while not self._closed.is_set():
            try:
                if position:
                    events = self._ledger.events(position, limit=PAGE, wait_s=READ_S)
                    position = events[-1]["id"] if events else position
                    wake = partial(self._wake, {event["job"] for event in events})
                else:
                    position = self._ledger.last_event_id()
                    wake = self._wake_all
            except Exception as error:
                # Whatever it is, a reader that has ended would leave all who wait to LOOK_AGAIN_S for ever.
                if not isinstance(error, UnavailableError):
                    log.exception("cannot read the events")
                position, wake = "", self._wake_all
                self._closed.wait(RETRY_S)
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(wake)

    def _wake(self, jobs: Set[str]) -> None:
        for job_id in ({*jobs, ""} if jobs else set()) & self._waiting.keys():
            for woken in self._waiting[job_id]:
                woken.set()

    def _wake_all(self) -> None:
        self._wake(self._waiting.keys())
