"""Object lock: what points lead to stays locked for as long as points lead to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from workers.repository.decisions import Group
from workers.repository.layout import (
    KEYS,
    OWNERS,
    REPOSITORY_KEY,
    moved_key,
    pack_key,
    point_key,
    retained_prefix,
)
from workers.repository.reach import Alive
from workers.repository.repository import Repository
from workers.repository.store.contract import MissingObjectError

AT_ONCE = 8
"""Requests on their way; each extends the lock of one object."""
_A_BATCH = 256


def extend_locks(
    repository: Repository, groups: dict[str, Group], alive: Alive, went_on: Callable[[], None] = lambda: None
) -> int:
    """Lock everything alive for the configured days from now, where the repository has such; how many objects."""
    store = repository.store
    if not store.locks:
        return 0

    def extend(key: str) -> int:
        try:
            store.extend_lock(key)
        except MissingObjectError:  # a check says so; the others are to be locked all the same
            return 0
        return 1

    extended = 0
    keys = _wanted(repository, groups, alive)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        while batch := list(islice(keys, _A_BATCH)):
            went_on()
            extended += sum(threads.map(extend, batch))
    return extended


def _wanted(repository: Repository, groups: dict[str, Group], alive: Alive) -> Iterator[str]:
    yield REPOSITORY_KEY
    for prefix in (KEYS, OWNERS):
        yield from (info.key for info in repository.store.list(prefix))
    yield from (pack_key(pack) for pack in alive.packs - alive.moved)
    yield from (moved_key(pack) for pack in alive.moved)
    yield from alive.roots
    for group in groups.values():
        yield from (point_key(group.name, epoch) for epoch in group.present())
        yield from (info.key for info in repository.store.list(retained_prefix(group.name)))
