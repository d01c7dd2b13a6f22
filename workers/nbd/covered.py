"""The FLUSH rule: a flush covers only writes already answered, so it has to wait for those that began before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class CoveredWrites:
    """Writes in flight, in the order they began. Thread-safe."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._next = 0
        self._in_flight: dict[int, None] = {}

    @contextmanager
    def write(self) -> Iterator[None]:
        """Hold while a write is on its way, answered or failed when it is left."""
        with self._changed:
            ticket = self._next
            self._next += 1
            self._in_flight[ticket] = None
        try:
            yield
        finally:
            with self._changed:
                del self._in_flight[ticket]
                self._changed.notify_all()

    def wait(self) -> None:
        """Return when every write that began before this call has ended.

        Later writes are not waited for, so a flush ends under a stream of writes. Bounded because each write is:
        a silent connection fails its writes.
        """
        with self._changed:
            barrier = self._next
            self._changed.wait_for(lambda: not self._in_flight or next(iter(self._in_flight)) >= barrier)
