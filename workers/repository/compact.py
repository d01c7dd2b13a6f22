"""Compaction: what is alive of packs that are mostly dead moves to new packs, and moved/<pack> says where it is.

    1  nominate  mostly dead packs are condemned to be moved: from then on no writer takes a block from them that its
                 parent does not hold
    2  move      when every epoch that was open then is decided, what is alive is known for good: it is copied, sealed
                 anew, and moved/<pack> written; the old pack is collected like anything else that nothing leads to

Killed anywhere, it leaves a new pack that nothing leads to, or an old one that is not needed: the next prune's work.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
from pyroaring import BitMap

from coordinator.model.errors import RefusedError
from coordinator.model.extent import BLOCK_BYTES
from workers.failpoint import pass_point
from workers.repository import collect
from workers.repository.decisions import HOLD_RENEW_S, Hold
from workers.repository.expand import expanded
from workers.repository.layout import COMPACTION, PACKS, DamageError, hold_key, named_by_id, pack_key
from workers.repository.pack import Contents, Origin, PackWriter, map_context, map_digest, read_contents, read_tail
from workers.repository.reach import each_map, each_root, live_points, moved_packs
from workers.repository.repository import Repository
from workers.repository.runs import Squeezed, context_of
from workers.repository.segment_map import MapRef

log = structlog.get_logger()

LIVE_SHARE = 0.5
"""A pack of which less than this is alive is worth moving: half of what is read and written is gained."""
NEW_PACK_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class _Live:
    """What is alive of one pack: offsets of runs, maps, and bytes of both."""

    runs: BitMap = field(default_factory=BitMap)
    maps: dict[int, tuple[str, MapRef]] = field(default_factory=dict)
    size: int = 0


@dataclass(slots=True)
class Compacted:
    """What a compaction did. Sizes in bytes."""

    nominated: int = 0
    moved_packs: int = 0
    moved_bytes: int = 0
    freed_bytes: int = 0


def compact(
    repository: Repository, *, live_share: float = LIVE_SHARE, went_on: Callable[[], None] = lambda: None
) -> Compacted:
    """Move what may be moved, nominate more, and move that too if nobody is writing."""
    report = Compacted()
    _move_nominated(repository, report, went_on)
    victims = _nominate(repository, live_share, went_on)
    if victims:
        report.nominated = len(victims)
        collect.condemn(repository, "move", [pack_key(pack) for pack in victims])
        _move_nominated(repository, report, went_on)
    return report


def _nominate(repository: Repository, live_share: float, went_on: Callable[[], None]) -> list[bytes]:
    known = {key for _, sentence in collect.sentences_of(repository) for key in sentence.keys}
    live = _live(repository, None, went_on)
    victims = []
    for pack, info in named_by_id(repository.store, PACKS):
        if info.key not in known and pack in live and live[pack].size < info.size * live_share:
            victims.append(pack)
    return victims


def _live(repository: Repository, only: set[bytes] | None, went_on: Callable[[], None]) -> dict[bytes, _Live]:
    """What points lead to, pack by pack, where it is now: what was moved before counts for where it went.

    Reads every map once; a roaring bitmap of offsets for each pack.
    """
    found: dict[bytes, _Live] = {}
    moved = moved_packs(repository).keys()
    relocations = repository.relocations
    groups = repository.decisions.groups_to_keep()
    for disk, ref in each_map(repository, each_root(repository, live_points(repository, groups))):
        went_on()
        if only is not None and not moved and ref.pack not in only and only.isdisjoint(ref.packs):
            continue
        here = relocations.current_map(ref, moved)
        holder = found.setdefault(here.pack, _Live())
        if here.offset in holder.maps:
            continue  # a page that an epoch writes names most maps of the page before
        holder.maps[here.offset] = (disk, here)
        holder.size += here.length
        for run in repository.fetcher.map(disk, ref):
            if run is None:
                continue
            run = relocations.current_run(run, moved)
            live = found.setdefault(run.pack, _Live())
            if run.offset not in live.runs:
                live.runs.add(run.offset)
                live.size += run.length
    return found if only is None else {pack: live for pack, live in found.items() if pack in only}


def _move_nominated(repository: Repository, report: Compacted, went_on: Callable[[], None]) -> None:
    victims: set[bytes] = set()
    sentences = [collect.bound(repository, name, one) for name, one in collect.sentences_of(repository, "move")]
    open_now = collect.open_epochs(repository)
    groups = repository.decisions.groups()
    for sentence in sentences:
        if collect.may_go(open_now, groups, sentence):
            victims |= {bytes.fromhex(key.removeprefix(PACKS)) for key in sentence.keys}
    if not victims:
        return
    live = _live(repository, victims, went_on)
    with _Mover(repository, report) as mover:
        for pack in sorted(victims):
            went_on()
            if pack in live:
                mover.renew()
                mover.move(pack, live[pack])
        mover.finish()
    collect.forget_moved(repository)


class _Mover:
    """Copies what is alive of several packs into as few new ones as it fills."""

    def __init__(self, repository: Repository, report: Compacted) -> None:
        self._repository = repository
        self._report = report
        self._number = secrets.randbits(48)
        self._hold_id = f"compaction-{self._number}"
        self._renewed_at = time.monotonic()
        self._writer: PackWriter | None = None
        self._places: dict[bytes, dict[int, tuple[bytes, int]]] = {}

    def __enter__(self) -> _Mover:
        self._repository.decisions.hold(self._hold())
        return self

    def _hold(self) -> Hold:
        return Hold(
            id=self._hold_id,
            kind="epoch",
            group=COMPACTION,
            epoch=self._number,
            owner="compaction",
            renewed_at=time.time(),
        )

    def renew(self) -> None:
        """RefusedError if it was given up meanwhile: what was written here may be collected already."""
        if time.monotonic() - self._renewed_at < HOLD_RENEW_S:
            return
        self._check_hold()
        self._repository.decisions.hold(self._hold())
        self._renewed_at = time.monotonic()

    def _check_hold(self) -> None:
        if self._repository.store.size(hold_key(self._hold_id)) is None:
            raise RefusedError("the compaction was silent for too long and was given up", "run it again")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, None)
        self._repository.decisions.let_go(self._hold_id)

    def move(self, pack: bytes, live: _Live) -> None:
        repository, store = self._repository, self._repository.store
        size = store.size(pack_key(pack))
        if size is None:
            return
        try:
            contents = read_contents(store, repository.keyring, read_tail(store, pack, size))
            self._copy(pack, contents, live)
        except DamageError as error:  # it stays where it is, as it is, for a check to find
            log.warning("a damaged pack is not moved", error=error.message)
            return
        self._report.moved_bytes += live.size
        self._report.freed_bytes += size - live.size

    def _copy(self, pack: bytes, contents: Contents, live: _Live) -> None:
        """Everything alive of one pack, each piece compared with its digest; DamageError leaves it unmoved."""
        repository = self._repository
        places: dict[int, tuple[bytes, int]] = {}
        for run in contents.runs:
            if run.offset not in live.runs:
                continue
            plain = self._opened(pack, run.offset, run.length, context_of(repository.keyring.repository, run.digest))
            if not _is_block(repository, plain, run.digest):
                raise DamageError("a run", pack_key(pack), run.offset, run.length)
            moved = self._room(run.length).add_run(Squeezed(run.digest, plain, raw=True))
            places[run.offset] = (moved.pack, moved.offset)
        for offset, (disk, ref) in live.maps.items():
            context = map_context(repository.keyring.repository, disk, ref.segment)
            plain = self._opened(pack, offset, ref.length, context)
            if map_digest(repository.keyring, plain) != ref.digest:
                raise DamageError("a map", pack_key(pack), offset, ref.length)
            new = self._room(ref.length).add_map(disk, ref.segment, plain, ref.packs)
            places[offset] = (new.pack, new.offset)
        if not places.keys() >= set(live.runs):  # in a plain repository nothing else tells of a rotten footer
            raise DamageError("the footer, which lists too little,", pack_key(pack))
        self._places[pack] = places

    def finish(self) -> None:
        """Close the last pack; then say where everything is."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        pass_point("between-packs-and-moved")
        self._check_hold()
        for pack, places in self._places.items():
            self.renew()
            if self._repository.relocations.write(pack, places):
                self._report.moved_packs += 1
            pass_point("between-moved-and-moved")
        self._places.clear()

    def _room(self, length: int) -> PackWriter:
        if self._writer is not None and self._writer.size + length > NEW_PACK_BYTES:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            self._writer = PackWriter(
                self._repository.store, self._repository.keyring, Origin(COMPACTION, self._number)
            )
        return self._writer

    def _opened(self, pack: bytes, offset: int, length: int, context: bytes) -> bytes:
        stored = self._repository.fetcher.bytes_of(pack, offset, length)
        try:
            return bytes(self._repository.keyring.open(pack, offset, stored, context))
        except ValueError as error:
            raise DamageError("a run or map", pack_key(pack), offset, length) from error


def _is_block(repository: Repository, stored: bytes, digest: bytes) -> bool:
    """Whether a run, which may be compressed or not, holds the block of that digest."""
    if repository.keyring.digest(stored) == digest:
        return True
    try:
        return repository.keyring.digest(expanded(stored, BLOCK_BYTES)) == digest
    except ValueError:
        return False
