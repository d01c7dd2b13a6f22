"""Object lock: what points lead to stays locked for as long as points lead to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from coordinator.model.errors import FlushpointError
from coordinator.model.point import Member
from workers.repository.decisions import Group
from workers.repository.layout import (
    KEYS,
    OWNERS,
    REPOSITORY_KEY,
    DamageError,
    moved_key,
    pack_key,
    point_key,
    retained_prefix,
)
from workers.repository.reach import moved_packs
from workers.repository.repository import Repository
from workers.repository.root import PageRef
from workers.repository.store.contract import MissingObjectError

AT_ONCE = 8
"""Requests on their way; each extends the lock of one object."""
_A_BATCH = 256


def extend_locks(repository: Repository, groups: dict[str, Group], went_on: Callable[[], None] = lambda: None) -> int:
    """Lock everything that points lead to for the configured days from now, where the repository has such; how many
    objects. One that cannot be locked is told in the end, and keeps nothing else from being locked; what is damaged is
    passed over, since a check and a collection name it.
    """
    store = repository.store
    if not store.locks:
        return 0
    refused: list[FlushpointError] = []

    def extend(key: str) -> int:
        try:
            store.extend_lock(key)
        except MissingObjectError:
            return 0
        except FlushpointError as error:
            refused.append(error)
            return 0
        return 1

    extended = 0
    keys = _wanted(repository, groups)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        while batch := list(islice(keys, _A_BATCH)):
            went_on()
            extended += sum(threads.map(extend, batch))
    if refused:
        raise refused[0]
    return extended


def _wanted(repository: Repository, groups: dict[str, Group]) -> Iterator[str]:
    yield REPOSITORY_KEY
    for prefix in (KEYS, OWNERS):
        yield from (info.key for info in repository.store.list(prefix))
    for group in groups.values():
        yield from (info.key for info in repository.store.list(retained_prefix(group.name)))
    seen: set[str] = set()
    pages: set[PageRef] = set()
    moved = moved_packs(repository)
    for group in groups.values():
        for epoch, reading in repository.decisions.read(group.name, group.wanted()):
            yield point_key(group.name, epoch)
            try:
                decision = reading.result()
            except DamageError:
                continue
            for member in decision.roots if decision is not None else ():
                for key in _reached(repository, member, pages, moved):
                    if key not in seen:
                        seen.add(key)
                        yield key


def _reached(
    repository: Repository, member: Member, pages: set[PageRef], moved: dict[bytes, tuple[bytes, ...]]
) -> Iterator[str]:
    """Objects that one disk of a point leads to, but for pages that were looked at before."""
    yield member.root
    try:
        root = repository.root(member)
    except DamageError:
        return
    yield from root.roots()
    for number, page in enumerate(root.pages):
        if not page.root or page in pages:
            continue
        pages.add(page)
        try:
            refs = root.page(number).values()
        except DamageError:
            continue
        for pack in {pack for ref in refs for pack in (ref.pack, *ref.packs)}:
            yield from _followed(pack, moved)


def _followed(pack: bytes, moved: dict[bytes, tuple[bytes, ...]]) -> Iterator[str]:
    """A pack, or where compaction took what lived in it."""
    todo, seen = [pack], {pack}
    while todo:
        one = todo.pop()
        if one not in moved:
            yield pack_key(one)
            continue
        yield moved_key(one)
        todo += [to for to in moved[one] if to not in seen]
        seen.update(moved[one])
