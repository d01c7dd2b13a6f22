"""The structure of a repository, looked at from end to end: everything that points lead to is there and is whole.

It reads decisions, roots, pages and every map; with `data`, every pack. It changes nothing and stops at
nothing: damage is located and named, and the rest is looked at all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pyroaring import BitMap

from coordinator.model.errors import NotFoundError, UnavailableError
from coordinator.model.point import Decision, Member
from workers.repository.layout import DISKS, MOVED, PACKS, DamageError, named_by_id, pack_key
from workers.repository.pack import check_whole, read_tail
from workers.repository.prefetch import AT_ONCE, Prefetcher
from workers.repository.reach import moved_packs
from workers.repository.repository import Repository, root_ref
from workers.repository.root import PageRef, Root, RootRef
from workers.repository.root import check_whole as check_whole_root
from workers.repository.segment_map import MapRef
from workers.repository.store.contract import MissingObjectError, StoreError

WHOLE_AT_ONCE = 4
"""Roots, and with `data` packs, of which all is in memory at once: some are as large as 100 MiB."""
MOST_DAMAGE = 1000
"""Findings in one report; a repository with more is lost in ways that no list helps with."""

Key = TypeVar("Key", bound=Hashable)


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


class _Findings:
    """What is wrong with one thing, in the order it was found; whatever shares the thing is harmed too."""

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}
        """Message -> key of the object."""

    def add(self, message: str, key: str) -> None:
        self.messages.setdefault(message, key)

    def include(self, other: _Findings) -> None:
        for message, key in other.messages.items():
            self.add(message, key)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes what the store or damage stops the body with. All else is not about the repository, and goes on up."""
        try:
            yield
        except DamageError as error:
            self.add(error.message, error.key)
        except MissingObjectError as error:
            self.add(f"{error.message}, and a point leads to it", "")
        except (NotFoundError, StoreError, UnavailableError) as error:
            self.add(error.message, "")


class _Looked(Generic[Key]):
    """Things of one kind that many points share, each looked at once. Thread-safe: two may look, and find the same."""

    def __init__(self) -> None:
        self._findings: dict[Key, _Findings | None] = {}
        """None for what is sound: nearly all of very many."""

    def __contains__(self, key: Key) -> bool:
        return key in self._findings

    def once(self, key: Key, look: Callable[[_Findings], None]) -> _Findings:
        """What `look` noted, now or before."""
        if key in self._findings:
            return self._findings[key] or _Findings()
        findings = _Findings()
        look(findings)
        self._findings[key] = findings if findings.messages else None
        return findings


class _Check:
    """Looks at the disks of a point side by side; the thread of each disk asks for its maps side by side again."""

    def __init__(self, repository: Repository, data: bool, went_on: Callable[[], None]) -> None:
        self._repository = repository
        self._data = data
        self._went_on = went_on
        self._report = Checked()
        self._groups = repository.decisions.groups()  # before the packs: what a point leads to was there before it
        self._sizes = {info.key: info.size for _, info in named_by_id(repository.store, PACKS)}
        self._moved = frozenset(moved_packs(repository))
        self._disks: _Looked[tuple[str, RootRef]] = _Looked()
        self._roots: _Looked[str] = _Looked()
        self._pages: _Looked[tuple[str, PageRef]] = _Looked()
        self._packs: _Looked[bytes] = _Looked()
        self._sound: dict[bytes, BitMap] = {}
        """By pack, the offsets of maps that are: a page that an epoch writes names most of those of the page before."""
        self._used: set[str] = set()
        self._told: dict[str, tuple[str, dict[str, None]]] = {}
        """Message -> key of the object, and the points that are harmed."""

    def run(self) -> Checked:
        with Prefetcher(WHOLE_AT_ONCE) as disks:
            for group in self._groups.values():
                for epoch, reading in self._repository.decisions.read(group.name, group.present()):
                    findings = _Findings()
                    with findings.noting():
                        decision = reading.result()
                        if decision is not None and decision.is_point:
                            self._report.points += 1
                            self._look_at_point(decision, disks, findings)
                    self._tell(findings, f"{group.name}@{epoch}")
        self._look_at_packs()
        self._count_orphans()
        self._report.damage = list(self._damage())
        return self._report

    def _damage(self) -> Iterator[Damage]:
        """What was told, but not of points that were pruned meanwhile: what they alone led to may be gone by now."""
        if not self._told:
            return
        groups = self._repository.decisions.groups().values()
        there = {f"{group.name}@{epoch}" for group in groups for epoch in group.present()}
        for message, (key, points) in self._told.items():
            harmed = tuple(point for point in points if point in there)
            if harmed or not points:
                yield Damage(message, key, harmed)

    def _look_at_point(self, point: Decision, disks: Prefetcher, findings: _Findings) -> None:
        fresh = [m for m in point.roots if (m.disk, root_ref(m)) not in self._disks]
        for _, looking in disks.each(self._look_at_disk, fresh):
            looking.result()
        for member in point.roots:
            findings.include(self._look_at_disk(member))

    def _look_at_disk(self, member: Member) -> _Findings:
        def look(findings: _Findings) -> None:
            with findings.noting():
                root = self._repository.root(member)
                for key in sorted(root.roots()):
                    findings.include(self._look_at_root(key))
                for number, page in enumerate(root.pages):
                    if page.root:
                        findings.include(self._look_at_page(member.disk, root, number))

        return self._disks.once((member.disk, root_ref(member)), look)

    def _look_at_root(self, key: str) -> _Findings:
        def look(findings: _Findings) -> None:
            self._used.add(key)
            with findings.noting():
                check_whole_root(self._repository.store.get(key), key)

        return self._roots.once(key, look)

    def _look_at_page(self, disk: str, root: Root, number: int) -> _Findings:
        def look(findings: _Findings) -> None:
            self._went_on()
            with findings.noting():
                maps = root.page(number).values()
                for _, looking in self._repository.prefetcher.each(lambda ref: self._look_at_map(disk, ref), maps):
                    findings.include(looking.result())

        return self._pages.once((disk, root.pages[number]), look)

    def _look_at_map(self, disk: str, ref: MapRef) -> _Findings:
        findings = _Findings()
        sound = self._sound.setdefault(ref.pack, BitMap())
        if ref.offset in sound:
            return findings
        for pack in (ref.pack, *ref.packs):
            findings.include(self._look_for_pack(pack))
        with findings.noting():
            size = self._sizes.get(pack_key(ref.pack))
            if size is None and ref.pack not in self._moved:
                return findings  # it says so already
            if size is not None and ref.offset + ref.length > size:
                raise DamageError("a map beyond the end, wanted", pack_key(ref.pack), ref.offset, ref.length)
            self._look_at_runs(disk, ref)
        if not findings.messages:
            sound.add(ref.offset)
        return findings

    def _look_at_runs(self, disk: str, ref: MapRef) -> None:
        for run in self._repository.fetcher.map(disk, ref):
            if run is not None and run.pack in self._moved:
                run = self._repository.relocations.current_run(run, self._moved)
            size = self._sizes.get(pack_key(run.pack)) if run is not None else None
            if run is not None and size is not None and run.offset + run.length > size:
                raise DamageError("a run beyond the end, wanted", pack_key(run.pack), run.offset, run.length)

    def _look_for_pack(self, pack: bytes) -> _Findings:
        """Whether it is there, or all that it was moved to."""

        def look(findings: _Findings) -> None:
            todo, followed = [pack], set[bytes]()
            while todo:
                one = todo.pop()
                if one not in followed:
                    followed.add(one)
                    with findings.noting():
                        todo += self._follow(one, findings)

        return self._packs.once(pack, look)

    def _follow(self, pack: bytes, findings: _Findings) -> list[bytes]:
        """Where it was moved to, if it was."""
        key = pack_key(pack)
        self._used.add(key)
        if pack in self._moved:
            self._used.add(f"{MOVED}{pack.hex()}")
            record = self._repository.relocations.read(pack)
            return [bytes.fromhex(target) for target in record.packs] if record is not None else []
        if key not in self._sizes and self._repository.store.size(key) is None:
            findings.add(f"{key} is missing, and a point leads to it", key)
        return []

    def _look_at_packs(self) -> None:
        """Their tails, which a truncated one lacks; with `data` every byte of them."""
        self._report.packs = len(self._sizes)
        self._report.pack_bytes = sum(self._sizes.values())
        with Prefetcher(WHOLE_AT_ONCE if self._data else AT_ONCE) as packs:
            for _, looking in packs.each(self._look_at_pack, self._sizes):
                self._went_on()
                self._tell(looking.result())

    def _look_at_pack(self, key: str) -> _Findings:
        store, pack = self._repository.store, bytes.fromhex(key.removeprefix(PACKS))
        findings = _Findings()
        try:
            if self._data:
                check_whole(store.get(key), pack)
            else:
                read_tail(store, pack, self._sizes[key])
        except DamageError as error:
            findings.add(error.message, error.key)
        except MissingObjectError:
            pass  # collected meanwhile
        except StoreError as error:
            damage = DamageError(f"{error.message}: something", key)
            findings.add(damage.message, damage.key)
        return findings

    def _count_orphans(self) -> None:
        for key, size in self._sizes.items():
            self._count_orphan(key, size, superseded=bytes.fromhex(key.removeprefix(PACKS)) in self._moved)
        for info in self._repository.store.list(DISKS):
            self._count_orphan(info.key, info.size, superseded=False)

    def _count_orphan(self, key: str, size: int, superseded: bool) -> None:
        if key not in self._used or superseded:
            self._report.orphans += 1
            self._report.orphan_bytes += size

    def _tell(self, findings: _Findings, point: str = "") -> None:
        """Of the point that is harmed, if it is known."""
        for message, key in findings.messages.items():
            if message in self._told or len(self._told) < MOST_DAMAGE:
                _, points = self._told.setdefault(message, (key, {}))
                points |= {point: None} if point else {}


def check(repository: Repository, *, data: bool = False, went_on: Callable[[], None] = lambda: None) -> Checked:
    """Look at everything points lead to; `data` also reads every pack and compares its digest, which needs no key."""
    return _Check(repository, data, went_on).run()
