"""What of a repository is alive: everything that a recovery point leads to, or one that is held: by a reader, or as the
parent of an open epoch.

Bounded by the number of packs (an id each) and not by blocks: pages say which packs a segment's runs are in, and a page
that many points share is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from coordinator.model.point import Decision, Member
from workers.repository.decisions import Group
from workers.repository.layout import MOVED, named_by_id, pack_key
from workers.repository.repository import Repository
from workers.repository.root import PageRef, Root
from workers.repository.segment_map import MapRef


@dataclass(slots=True)
class Alive:
    """Packs by id; roots by key."""

    packs: set[bytes] = field(default_factory=set)
    roots: set[str] = field(default_factory=set)
    moved: set[bytes] = field(default_factory=set)
    """Packs that are alive only by their record in moved/: the object itself, if still there, is not wanted."""


def live_points(repository: Repository, groups: dict[str, Group]) -> Iterator[Decision]:
    """All recovery points of `groups_to_keep`, and those that are held; DamageError for a manifest that cannot be read,
    since nothing may be collected while it is not known what it leads to."""
    for group in groups.values():
        yield from repository.decisions.points_to_keep(group)


def each_root(repository: Repository, points: Iterator[Decision]) -> Iterator[tuple[Decision, str, Root]]:
    """(point, disk, root) of every disk of every point; one root that several points name comes once."""

    def members() -> Iterator[tuple[Decision, Member]]:
        seen: set[str] = set()
        for point in points:
            for member in point.roots:
                if member.root not in seen:
                    seen.add(member.root)
                    yield point, member

    for (point, member), loading in repository.prefetcher.each(lambda one: repository.root(one[1]), members()):
        yield point, member.disk, loading.result()


def each_map(repository: Repository, roots: Iterator[tuple[Decision, str, Root]]) -> Iterator[tuple[str, MapRef]]:
    """(disk, map) of all pages, each page once however many roots share it."""

    def pages() -> Iterator[tuple[str, Root, int]]:
        seen: set[PageRef] = set()
        for _, disk, root in roots:
            for number, page in enumerate(root.pages):
                if page.root and page not in seen:
                    seen.add(page)
                    yield disk, root, number

    for (disk, _, _), reading in repository.prefetcher.each(lambda one: one[1].page(one[2]), pages()):
        yield from ((disk, ref) for ref in reading.result().values())


def find_alive(repository: Repository, points: Iterator[Decision], went_on: Callable[[], None] = lambda: None) -> Alive:
    """`went_on` is called now and then, so that a lease can be looked at."""
    alive = Alive()

    def noting_roots() -> Iterator[tuple[Decision, str, Root]]:
        for point, disk, root in each_root(repository, points):
            went_on()
            alive.roots |= root.roots()
            yield point, disk, root

    for _, ref in each_map(repository, noting_roots()):
        alive.packs.add(ref.pack)
        alive.packs.update(ref.packs)
    _follow_moves(repository, alive)
    return alive


def moved_packs(repository: Repository) -> dict[bytes, tuple[bytes, ...]]:
    """What was moved, and to which packs. A record that leads to a pack that is not there moves nothing: a compaction
    that slept for too long may write one."""
    found = {}
    there: dict[bytes, bool] = {}
    for pack, _ in named_by_id(repository.store, MOVED):
        record = repository.relocations.read(pack)
        targets = tuple(bytes.fromhex(p) for p in record.packs) if record is not None else ()
        for target in targets:
            if target not in there:
                there[target] = repository.store.size(pack_key(target)) is not None
        if record is not None:
            found[pack] = targets
    # What a target was moved to in its turn may be all that is left of it.
    return {pack: to for pack, to in found.items() if all(there[target] or target in found for target in to)}


def _follow_moves(repository: Repository, alive: Alive) -> None:
    moved = moved_packs(repository)
    todo = list(alive.packs & moved.keys())
    while todo:
        pack = todo.pop()
        alive.moved.add(pack)
        for target in moved[pack]:
            if target not in alive.packs:
                alive.packs.add(target)
                todo += [target] if target in moved else []
