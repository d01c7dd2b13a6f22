"""The threads that carry requests out, shared by all connections of a server, which take turns.

    connection A ─▶ lane A: r r r r ┐
    connection B ─▶ lane B: r       ├─▶ turns: A, B ─▶ request threads
    connection C ─▶ lane C:         ┘

A lane stands in `turns` once while it has requests, and goes to the end with every request that is taken: a client
that floods its lane waits behind itself. It also means one thread is woken at a time, by a thread that takes a
turn and leaves another: a burst of requests that are carried out at once does not wake more threads than are of use.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from workers.nbd.server_requests import Asked


class Lane:
    """The requests of one connection that wait for a request thread, first come, first carried out."""

    def __init__(self, carry_out: Callable[[Asked], None], turns: SimpleQueue[Lane | None]) -> None:
        self._carry_out = carry_out
        self._turns = turns
        self._lock = threading.Lock()
        self._waiting: deque[Asked] = deque()
        self._queued = False
        """Whether the lane stands in `turns`, where it stands once at most."""

    def put(self, asked: Asked) -> None:
        with self._lock:
            self._waiting.append(asked)
            if self._queued:
                return
            self._queued = True
        self._turns.put(self)

    def take_turn(self) -> None:
        """Carry out one request. The lane goes to the end of the queue first, so that the next may be begun."""
        with self._lock:
            asked = self._waiting.popleft()
            self._queued = bool(self._waiting)
            again = self._queued
        if again:
            self._turns.put(self)
        self._carry_out(asked)


class RequestThreads:
    """The threads that carry requests out, for all connections. A lane in `turns` has at least one request."""

    def __init__(self, count: int) -> None:
        self._turns: SimpleQueue[Lane | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"nbd-server-request-{at}", daemon=True) for at in range(count)
        ]
        self._started = False

    def start(self) -> None:
        self._started = True
        for thread in self._threads:
            thread.start()

    def lane(self, carry_out: Callable[[Asked], None]) -> Lane:
        """For a new connection. `carry_out` must not raise."""
        return Lane(carry_out, self._turns)

    def close(self, deadline: float) -> bool:
        """False if a thread still runs at `deadline` (monotonic). Lanes must get no more requests."""
        if not self._started:
            return True
        for _ in self._threads:
            self._turns.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (lane := self._turns.get()) is not None:
            lane.take_turn()
