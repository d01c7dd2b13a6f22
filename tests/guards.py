"""A guard in a thread of the tests' own process: where nobody is killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.agent.guard import Guard


@contextmanager
def serving_guard(path: Path) -> Iterator[Path]:
    """Where it listens."""
    guard, ends = Guard(path, print), threading.Event()
    serving = threading.Thread(target=guard.run, args=(ends.is_set,))
    serving.start()
    try:
        yield path
    finally:
        ends.set()
        serving.join()
        guard.close()
