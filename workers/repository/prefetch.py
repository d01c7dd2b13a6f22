"""Asks a store for what will be wanted next: each answer takes its time, but many come in the time of one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar

AT_ONCE = 16
"""Requests under way, and answers held for whoever asked: as many as an S3 store sends at once."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Prefetcher:
    """Threads for `each`. Thread-safe; what they call must not use the same prefetcher, or they wait for themselves."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="prefetch")

    def each(self, call: Callable[[Item], Answer], items: Iterable[Item]) -> Iterator[tuple[Item, Future[Answer]]]:
        """Every item with its call, in order; the call's error comes out of the future. Bounded memory: `items` is
        read no further ahead than calls are made.

        It begins with one call and doubles, so that whoever stops early has asked for little more than he wanted.
        """
        rest = iter(items)
        flying: deque[tuple[Item, Future[Answer]]] = deque()
        depth = 1
        try:
            while True:
                for item in islice(rest, depth - len(flying)):
                    flying.append((item, self._threads.submit(call, item)))
                if not flying:
                    return
                yield flying.popleft()
                depth = min(2 * depth, self._at_once)
        finally:
            for _, future in flying:
                future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for calls under way."""
        self._threads.shutdown(cancel_futures=True)
