"""The structure of a repository, looked at from end to end: everything that points lead to is there and is whole.

It reads decisions, roots, pages and every map; with `data`, every pack. It changes nothing and stops at
nothing: damage is located and named, and the rest is looked at all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from coordinator.model.errors import FlushpointError, RefusedError
from coordinator.model.point import Decision
from workers.repository.layout import DISKS, MOVED, PACKS, DamageError, pack_key
from workers.repository.pack import check_whole, read_tail
from workers.repository.reach import moved_packs
from workers.repository.repository import Repository
from workers.repository.root import PageRef, Root
from workers.repository.root import check_whole as check_whole_root
from workers.repository.segment_map import MapRef
from workers.repository.store.contract import MissingObjectError, StoreError

TAILS_AT_ONCE = 4
"""Packs looked at side by side; with `data` so many are in memory."""
MOST_DAMAGE = 1000
"""Findings in one report; a repository with more is lost in ways that no list helps with."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One finding. `points` are those it harms, as "group@epoch"."""

    message: str
    key: str
    points: tuple[str, ...]


@dataclass(slots=True)
class Checked:
    """What a check found. Sizes in bytes."""

    points: int = 0
    packs: int = 0
    pack_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    orphans: int = 0
    orphan_bytes: int = 0
    """Objects that no point leads to: leftovers of killed jobs or pruned points, which the next prunes remove."""


class _Check:
    def __init__(self, repository: Repository, data: bool, went_on: Callable[[], None]) -> None:
        self._repository = repository
        self._data = data
        self._went_on = went_on
        self.report = Checked()
        self._groups = repository.decisions.groups()  # before the packs: what a point leads to was there before it
        self._sizes = {info.key: info.size for info in repository.store.list(PACKS)}
        self._moved = frozenset(moved_packs(repository))
        self._seen: dict[PageRef | str, list[Damage]] = {}
        """What a page, root or pack was found to be like, so that each is looked at once."""
        self._used: set[str] = set()
        self._harmed: list[Damage] = []
        self._where = ""

    def run(self) -> Checked:
        for group in self._groups.values():
            for epoch in group.present():
                self._where = f"{group.name}@{epoch}"
                with self._noting():
                    decision = self._repository.decisions.decision(group.name, epoch)
                    if decision is not None and decision.is_point:
                        self.report.points += 1
                        self._look_at(decision)
        self._look_at_packs()
        self._count_orphans()
        return self.report

    def _look_at(self, point: Decision) -> None:
        for member in point.members:
            with self._noting():
                root = self._repository.root(member)
                for key in sorted(root.roots() - self._used):
                    self._used.add(key)
                    with self._noting():
                        check_whole_root(self._repository.store.get(key), key)
                for number, page in enumerate(root.pages):
                    if page.root:
                        self._look_at_page(member.disk, root, number, page)

    def _look_at_page(self, disk: str, root: Root, number: int, page: PageRef) -> None:
        """A page that several points share is read once, and its damage told of each of them."""
        if page in self._seen:
            for damage in self._seen[page]:
                self._add(damage.message, damage.key)
            return
        self._went_on()
        before = len(self.report.damage)
        with self._noting():
            for ref in root.page(number).values():
                self._look_at_map(disk, ref)
        self._seen[page] = self.report.damage[before:]

    def _look_at_map(self, disk: str, ref: MapRef) -> None:
        for pack in (ref.pack, *ref.packs):
            self._look_for_pack(pack)
        with self._noting():
            size = self._sizes.get(pack_key(ref.pack))
            if size is None and ref.pack not in self._moved:
                return  # said already
            if size is not None and ref.offset + ref.length > size:
                raise DamageError("a map beyond the end, wanted", pack_key(ref.pack), ref.offset, ref.length)
            self._look_at_runs(disk, ref)

    def _look_at_runs(self, disk: str, ref: MapRef) -> None:
        for run in self._repository.fetcher.map(disk, ref):
            if run is not None and run.pack in self._moved:
                run = self._repository.relocations.current_run(run, self._moved)
            size = self._sizes.get(pack_key(run.pack)) if run is not None else None
            if run is not None and size is not None and run.offset + run.length > size:
                raise DamageError("a run beyond the end, wanted", pack_key(run.pack), run.offset, run.length)

    def _look_for_pack(self, pack: bytes) -> None:
        key = pack_key(pack)
        self._used.add(key)
        if pack in self._moved:
            self._used.add(f"{MOVED}{pack.hex()}")
            with self._noting():
                record = self._repository.relocations.read(pack)
                for target in record.packs if record is not None else ():
                    if f"{PACKS}{target}" not in self._used:
                        self._look_for_pack(bytes.fromhex(target))
        elif key not in self._sizes and self._repository.store.size(key) is None:
            self._add(f"{key} is missing, and a point leads to it", key)

    def _look_at_packs(self) -> None:
        """Their tails, which a truncated one lacks; with `data` every byte of them."""
        self.report.packs = len(self._sizes)
        self.report.pack_bytes = sum(self._sizes.values())
        self._where = ""
        with ThreadPoolExecutor(TAILS_AT_ONCE, thread_name_prefix="tails") as pool:
            for found in pool.map(self._pack_damage, self._sizes):
                self._went_on()
                if found is not None:
                    self._add(found.message, found.key)

    def _pack_damage(self, key: str) -> DamageError | None:
        store, pack = self._repository.store, bytes.fromhex(key.removeprefix(PACKS))
        try:
            if self._data:
                check_whole(store.get(key), pack)
            else:
                read_tail(store, pack, self._sizes[key])
        except DamageError as error:
            return error
        except MissingObjectError:
            pass  # collected meanwhile
        except StoreError as error:
            return DamageError(f"{error.message}: something", key)
        return None

    def _count_orphans(self) -> None:
        roots = {info.key: info.size for info in self._repository.store.list(DISKS)}
        for key, size in {**self._sizes, **roots}.items():
            superseded = key.startswith(PACKS) and bytes.fromhex(key.removeprefix(PACKS)) in self._moved
            if key not in self._used or superseded:
                self.report.orphans += 1
                self.report.orphan_bytes += size

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except DamageError as error:
            self._add(error.message, error.key)
        except MissingObjectError as error:
            self._add(f"{error.message}, and a point leads to it", "")
        except StoreError as error:
            self._add(error.message, "")
        except RefusedError:
            raise
        except FlushpointError as error:
            self._add(error.message, "")

    def _add(self, message: str, key: str) -> None:
        where = (self._where,) if self._where else ()
        for number, known in enumerate(self.report.damage):
            if known.message == message:
                if where and where[0] not in known.points:
                    self.report.damage[number] = Damage(message, key, (*known.points, *where))
                return
        if len(self.report.damage) < MOST_DAMAGE:
            self.report.damage.append(Damage(message, key, where))


def check(repository: Repository, *, data: bool = False, went_on: Callable[[], None] = lambda: None) -> Checked:
    """Look at everything points lead to; `data` also reads every pack and compares its digest, which needs no key."""
    return _Check(repository, data, went_on).run()
