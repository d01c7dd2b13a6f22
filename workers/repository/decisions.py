"""Decisions, and which of the published points are still there.

groups/<group>/points/<epoch>.json      one conditional PUT: manifest or tombstone, never changed
groups/<group>/retained/<n>.json        n grows, one conditional PUT each; the newest counts: every point up to
                                        `floor` that is not among `keep` is gone, whoever publishes it again later
holds/<id>.json                         points that somebody reads, epochs that somebody writes
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.point import Decision
from coordinator.model.repository_uri import LATEST
from workers.repository.keyring import Keyring
from workers.repository.layout import GROUPS, HOLDS, DamageError, hold_key, point_key, retained_prefix
from workers.repository.prefetch import Prefetcher
from workers.repository.store.contract import MissingObjectError, ObjectStore

HOLD_TTL_S = 3600.0
"""A hold that was not renewed for this long binds nobody: its owner is dead, or asleep beyond any lease."""
HOLD_RENEW_S = 300.0
POINTS_TRIED = 3
"""How often a point may be pruned between being found and being held."""
_POINT = re.compile(rf"{GROUPS}(?P<group>[^/]+)/points/(?P<epoch>\d{{10,}})\.json")
_RETAINED = re.compile(rf"{GROUPS}(?P<group>[^/]+)/retained/(?P<number>\d{{10,}})\.json")


class Retained(BaseModel):
    """What a prune left of a group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    number: int
    floor: int
    keep: tuple[int, ...]
    forgotten: int = Field(default=0, exclude_if=lambda epoch: epoch == 0)
    """The newest epoch that was dropped though nobody could read whether it was a point, and of which disks. Not in
    the record if there is none, and so not in its seal."""
    seal: str = ""

    def has(self, epoch: int) -> bool:
        return epoch > self.floor or epoch in self.keep


class Hold(BaseModel):
    """Keeps points from being pruned; one of an epoch also says that the epoch is being written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    id: str
    kind: Literal["epoch", "read"]
    group: str
    epoch: int = 0
    """The one that is being written; 0 for a reader."""
    points: tuple[int, ...] = ()
    owner: str
    """Who: a job or a command, and the host where it was last at work; for people."""
    renewed_at: float
    seal: str = ""

    @property
    def is_stale(self) -> bool:
        return time.time() - self.renewed_at > HOLD_TTL_S


class DamagedDecisionError(DamageError):
    """Of an epoch nobody can tell whether it is a point, nor what that leads to."""

    def __init__(self, what: str, group: str, epoch: int) -> None:
        super().__init__(what, point_key(group, epoch))
        self.epoch = epoch
        self.remedy = (
            "put back a copy of that object, or give the point up, and what only it leads to, by flushpoint prune"
            f" {group} --forget-damaged"
        )


@dataclass(frozen=True, slots=True)
class Group:
    """What listing tells of a group: epochs that were decided, and what the last prune left."""

    name: str
    decided: tuple[int, ...]
    """Sorted. Epochs up to the floor are decided too, whether their object is still there or not."""
    retained: Retained | None
    held: frozenset[int] = frozenset()
    """Points that somebody holds; only for `to_keep`."""

    def is_decided(self, epoch: int) -> bool:
        return epoch in self.decided or (self.retained is not None and epoch <= self.retained.floor)

    def present(self) -> list[int]:
        """Decided epochs that were not pruned: points and tombstones, oldest first."""
        return [epoch for epoch in self.decided if self.retained is None or self.retained.has(epoch)]

    def wanted(self) -> list[int]:
        """The same, and those that a prune dropped while somebody took hold of them."""
        return sorted({*self.present(), *self.held.intersection(self.decided)})

    @property
    def newest(self) -> int:
        return max((*self.decided, self.retained.floor if self.retained else 0), default=0)

    @property
    def forgotten(self) -> int:
        """See `Retained`."""
        return self.retained.forgotten if self.retained else 0


Record = TypeVar("Record", Decision, Retained, Hold)


class Decisions:
    """Reads and writes them. Thread-safe."""

    def __init__(self, store: ObjectStore, keyring: Keyring, prefetcher: Prefetcher) -> None:
        self._store = store
        self._keyring = keyring
        self._prefetcher = prefetcher

    def groups(self) -> dict[str, Group]:
        """All groups, by their names."""
        return self._listed(GROUPS, self._newest_retained(GROUPS), {})

    def group(self, name: str) -> Group:
        """One group; without any epoch if there is none of that name."""
        prefix = _prefix_of(name)
        return self._listed(prefix, self._newest_retained(prefix), {}).get(name, Group(name, (), None))

    def groups_to_keep(self) -> dict[str, Group]:
        """All groups as whoever removes something has to see them: with what is held.

        Holds are looked at between retention records and decisions. Whoever is made from a point that is missing from
        the record had its hold before, so it has it still, or is decided and seen.
        """
        return self._listed(GROUPS, self._newest_retained(GROUPS), self._held())

    def group_to_keep(self, name: str) -> Group:
        """One of them."""
        prefix = _prefix_of(name)
        return self._listed(prefix, self._newest_retained(prefix), self._held()).get(name, Group(name, (), None))

    def about(self, name: str, *epochs: int) -> Group:
        """What `group` tells, but of these epochs alone: it costs the same however many others there are."""
        decided = [epoch for epoch in sorted(epochs) if self._store.size(point_key(name, epoch)) is not None]
        # In this order: a decision that was pruned before it was asked for is below the floor.
        return Group(name, tuple(decided), self._newest_retained(retained_prefix(name)).get(name))

    def points(self, group: Group) -> Iterator[Decision]:
        """Its recovery points, oldest first, read while they are asked for: few are in memory, however many there are.

        A damaged one raises DamageError; see `points_or_damage` to go on past it.
        """
        return _undamaged(self.points_or_damage(group))

    def points_or_damage(self, group: Group) -> Iterator[Decision | DamagedDecisionError]:
        """The same, and in the place of a damaged one its error."""
        return self._points(group, Group.present, partial(self.group, group.name))

    def newest_points_or_damage(self, group: Group) -> Iterator[Decision | DamagedDecisionError]:
        """The same, newest first."""
        return self._points(group, _newest_first, partial(self.group, group.name))

    def points_to_keep(self, group: Group) -> Iterator[Decision]:
        """As `points`, of one of `groups_to_keep`: with those that are held."""
        return _undamaged(self._points(group, Group.wanted, partial(self.group_to_keep, group.name)))

    def read(self, name: str, epochs: Iterable[int]) -> Iterator[tuple[int, Future[Decision | None]]]:
        """`decision` of each of these epochs of a group, side by side; its errors come out of the future."""
        return self._prefetcher.each(lambda epoch: self.decision(name, epoch), epochs)

    def point(self, name: str, epoch: int) -> Decision:
        """One recovery point, for LATEST the newest that has a whole disk; NotFoundError names those there are."""
        look = partial(self.group, name) if epoch == LATEST else partial(self.about, name, epoch)
        there_are = _undamaged(self._points(look(), _newest_first, look))
        found = next((point for point in there_are if epoch != LATEST or point.members), None)
        if found is not None:
            return found
        there = ", ".join(str(e) for e in self.group(name).present()[-10:]) or "none"
        what = f"recovery point {epoch}" if epoch else "recovery point"
        raise NotFoundError(
            f"group {name!r} has no {what} in {self._store.name}; the newest are: {there}",
            "list them with flushpoint points, and their groups with flushpoint repository scan",
        )

    def decision(self, group: str, epoch: int) -> Decision | None:
        """What was decided, None if nothing was. DamagedDecisionError."""
        key = point_key(group, epoch)
        try:
            data = self._store.get(key)
        except MissingObjectError:
            return None
        try:
            decision = self._opened(Decision, data, key)
        except DamageError as error:
            raise DamagedDecisionError("the record", group, epoch) from error
        if (decision.group, decision.epoch, decision.repository) != (group, epoch, self._keyring.repository.hex()):
            raise DamagedDecisionError("a decision about something else", group, epoch)
        return decision

    def decide(self, decision: Decision) -> Decision:
        """Write a decision, once and for all. Returns what is decided now: this, or what another wrote before."""
        key = point_key(decision.group, decision.epoch)
        if self._store.put_if_absent(key, self._sealed(decision)):
            return decision
        there = self.decision(decision.group, decision.epoch)
        if there is None:
            raise DamageError("a decision that vanished", key)
        return there

    def retain(self, group: Group, keep: Sequence[int], damaged: Iterable[int] = ()) -> Retained:
        """Make `keep` all that is left of the group up to now; what is damaged is among what goes. RefusedError if
        another prune was quicker."""
        number = group.retained.number + 1 if group.retained else 1
        forgotten = max((group.forgotten, *damaged))
        retained = Retained(number=number, floor=group.newest, keep=tuple(sorted(keep)), forgotten=forgotten)
        key = f"{retained_prefix(group.name)}{number:010d}.json"
        if not self._store.put_if_absent(key, self._sealed(retained)):
            raise RefusedError(f"another prune of group {group.name!r} came in between", "run it again")
        return retained

    # -- holds ---------------------------------------------------------------------------------------------

    def holds(self) -> list[Hold]:
        """DamageError for one that cannot be read, with what to do: nobody knows what it keeps."""
        found = (self.hold_of(_hold_id(info.key)) for info in self._store.list(HOLDS))
        return [hold for hold in found if hold is not None]  # without those given up between the listing and now

    def holds_of_epochs(self, group: str) -> list[Hold]:
        """Those of one group's epochs: no other is looked at, whatever is damaged."""
        ids = [_hold_id(info.key) for info in self._store.list(f"{HOLDS}epoch-{group}-")]
        found = (self.hold_of(one) for one in ids if one.rpartition("-")[0] == f"epoch-{group}")
        return [hold for hold in found if hold is not None]

    def hold_of(self, hold_id: str) -> Hold | None:
        """One of them, None if nobody has it."""
        key = hold_key(hold_id)
        try:
            return self._opened(Hold, self._store.get(key), key)
        except MissingObjectError:
            return None
        except DamageError as error:
            minutes = 2 * HOLD_RENEW_S / 60
            error.remedy = f"whoever is at work writes it anew within {minutes:.0f} minutes; if it stays, remove it"
            raise

    def hold(self, hold: Hold) -> None:
        """Write or renew a hold."""
        self._store.put(hold_key(hold.id), self._sealed(hold))

    def hold_point(self, name: str, epoch: int, hold_id: str, owner: str) -> tuple[Decision, Hold]:
        """A recovery point, and the hold by which it stays one while somebody reads it. NotFoundError, as `point`."""
        for _ in range(POINTS_TRIED):
            point = self.point(name, epoch)
            hold = Hold(id=hold_id, kind="read", group=name, points=(point.epoch,), owner=owner, renewed_at=time.time())
            self.hold(hold)
            if point.epoch in self.about(name, point.epoch).present():  # a prune may have come between
                return point, hold
            self.let_go(hold_id)
        raise _pruned_too_fast(name)

    def announce(self, hold: Hold) -> bool:
        """Write a hold that nobody may have written before; False if somebody has."""
        return self._store.put_if_absent(hold_key(hold.id), self._sealed(hold))

    def let_go(self, hold_id: str) -> None:
        self._store.delete([hold_key(hold_id)])

    # -- bytes ---------------------------------------------------------------------------------------------

    def _points(
        self, group: Group, epochs_of: Callable[[Group], Iterable[int]], look_again: Callable[[], Group]
    ) -> Iterator[Decision | DamagedDecisionError]:
        """One that was listed and is gone was pruned meanwhile: what was published in its place has to be seen."""
        told: set[int] = set()
        for _ in range(POINTS_TRIED):
            for epoch, reading in self.read(group.name, [e for e in epochs_of(group) if e not in told]):
                found = _outcome(reading)
                if found is None:
                    break
                told.add(epoch)
                if isinstance(found, DamagedDecisionError) or found.is_point:
                    yield found
            else:
                return
            group = look_again()
        raise _pruned_too_fast(group.name)

    def _listed(
        self, prefix: str, retained: Mapping[str, Retained], held: Mapping[str, frozenset[int]]
    ) -> dict[str, Group]:
        """Decisions are listed after the retention records: one that another prune has kept, or that was published in
        place of one it has not, is then among them."""
        epochs: dict[str, list[int]] = {}
        for info in self._store.list(prefix):
            if match := _POINT.fullmatch(info.key):
                epochs.setdefault(match["group"], []).append(int(match["epoch"]))
        return {
            name: Group(name, tuple(sorted(epochs.get(name, ()))), retained.get(name), held.get(name, frozenset()))
            for name in sorted(epochs.keys() | retained.keys())
        }

    def _held(self) -> dict[str, frozenset[int]]:
        """By group, the points of readers that are not silent, and of epochs until somebody has ended them."""
        held: dict[str, frozenset[int]] = {}
        for hold in self.holds():
            if hold.kind == "epoch" or not hold.is_stale:
                held[hold.group] = held.get(hold.group, frozenset()).union(hold.points)
        return held

    def _newest_retained(self, prefix: str) -> dict[str, Retained]:
        newest: dict[str, str] = {}
        for info in self._store.list(prefix):
            if match := _RETAINED.fullmatch(info.key):
                newest[match["group"]] = max(newest.get(match["group"], ""), info.key)
        return {name: self._retained(name, key) for name, key in newest.items()}

    def _retained(self, name: str, key: str) -> Retained:
        """The record of that key, or one that has replaced it since."""
        for _ in range(POINTS_TRIED):
            try:
                return self._opened(Retained, self._store.get(key), key)
            except MissingObjectError:
                key = max((info.key for info in self._store.list(retained_prefix(name))), default=key)
        raise _pruned_too_fast(name)

    def _sealed(self, record: Decision | Retained | Hold) -> bytes:
        fields = record.model_dump(mode="json", exclude={"seal"})
        return json.dumps({**fields, "seal": self._seal_of(fields)}, indent=1, sort_keys=True).encode()

    def _opened(self, kind: type[Record], data: bytes, key: str) -> Record:
        """DamageError if a byte of it is another than was written."""
        try:
            record = kind.model_validate_json(data)
        except ValidationError as error:
            raise DamageError("the record", key) from error
        fields = record.model_dump(mode="json", exclude={"seal"})
        if record.seal != self._seal_of(fields):
            raise DamageError("the record", key)
        return record

    def _seal_of(self, fields: dict[str, Any]) -> str:
        return self._keyring.digest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hex()


def prune_leftovers(group: Group) -> Iterable[str]:
    """Keys of decisions and older retention records that the newest retention record has made void; `group` is one of
    `groups_to_keep`."""
    if group.retained is None:
        return []
    wanted = set(group.wanted())
    gone = [point_key(group.name, epoch) for epoch in group.decided if epoch not in wanted]
    older = [f"{retained_prefix(group.name)}{n:010d}.json" for n in range(1, group.retained.number)]
    return [*gone, *older[-100:]]


def _outcome(reading: Future[Decision | None]) -> Decision | DamagedDecisionError | None:
    try:
        return reading.result()
    except DamagedDecisionError as error:
        return error


def _undamaged(found: Iterable[Decision | DamagedDecisionError]) -> Iterator[Decision]:
    for point in found:
        if isinstance(point, DamagedDecisionError):
            raise point
        yield point


def _hold_id(key: str) -> str:
    return key.removeprefix(HOLDS).removesuffix(".json")


def _newest_first(group: Group) -> Iterable[int]:
    return reversed(group.present())


def _prefix_of(name: str) -> str:
    return f"{GROUPS}{name}/"


def _pruned_too_fast(name: str) -> RefusedError:
    return RefusedError(f"the points of group {name!r} are pruned as fast as they are read", "try again")
