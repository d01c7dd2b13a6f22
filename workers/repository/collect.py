"""Prune and collect: points go by the retention policy, then what no point leads to, in two steps.

    1  condemn   what nothing alive leads to, of decided epochs only, is listed in condemned/<id>; then the epochs that
                 are open are looked up and added
    2  remove    by a later run, when every one of those epochs is over, and still nothing leads to it

A writer looks up what is condemned after its hold is there, and refers to none of it. So whoever may refer to something
condemned had its hold before, is among the epochs listed with it, and is looked at again when that is decided. A writer
that sleeps for a week keeps what was condemned meanwhile from being removed, until its hold is stale and its epoch is
abandoned, after which it can publish nothing. tests/models has all of this as a model that is searched to its end.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.point import Decision, Retention, kept
from workers.failpoint import pass_point
from workers.repository.decisions import DamagedDecisionError, Group, Hold, prune_leftovers
from workers.repository.epochs import abandon
from workers.repository.layout import COMPACTION, CONDEMNED, DISKS, MOVED, PACKS, DamageError, named_by_id, pack_key
from workers.repository.locks import extend_locks
from workers.repository.pack import read_head
from workers.repository.reach import Alive, find_alive, live_points, moved_packs
from workers.repository.repository import Repository
from workers.repository.store.contract import MissingObjectError

OpenEpochs = tuple[tuple[str, int], ...]
"""(group, number) of epochs and compactions that have a hold."""
STALE_UPLOAD_S = 24 * 3600.0
"""Parts of an upload that nobody finished in a day."""
_NAMES_TOLD = 20
_A_SENTENCE = 50_000
"""Objects in one record of condemned ones."""


class Condemned(BaseModel):
    """condemned/<id>: keys, and the epochs (group, number) that were open when they were condemned.

    kind "remove": nothing alive leads to them. kind "move": packs of which little is alive, see compact.py. kind
    "shun": packs that a check found damaged, which no writer refers to any more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    kind: Literal["remove", "move", "shun"]
    at: float
    keys: tuple[str, ...]
    open_epochs: tuple[tuple[str, int], ...] | None
    """None: written, but the epochs not looked up yet."""


@dataclass(slots=True)
class Pruned:
    """What a prune did, or would do."""

    kept: dict[str, dict[int, str]] = field(default_factory=dict)
    """Group -> epoch -> why."""
    removed: dict[str, list[int]] = field(default_factory=dict)
    """Group -> epochs that are points no more."""
    forgotten: dict[str, list[int]] = field(default_factory=dict)
    """Group -> epochs whose decisions are damaged, and which are points no more if they ever were."""
    condemned: int = 0
    condemned_bytes: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    abandoned: list[str] = field(default_factory=list)
    """Epochs whose writers are dead, "group@epoch"."""
    uploads: int = 0
    """Unfinished uploads that were removed."""
    locked: int = 0
    """Objects whose lock was extended."""


def prune(
    repository: Repository,
    groups: Iterable[str] | None,
    retention: Retention,
    *,
    forget_damaged: bool = False,
    dry_run: bool = False,
    went_on: Callable[[], None] = lambda: None,
    goes_on: Callable[[str], bool] = lambda owner: False,
) -> Pruned:
    """Apply the retention to `groups` (None: all of them), then collect. NotFoundError, before anything is done, for a
    group that there is not; RefusedError if another prune came in between; DamageError if something that is alive
    cannot be read: then nothing more is removed.

    `forget_damaged` takes a decision of `groups` that cannot be read for one that is not alive.
    `goes_on` says of the owner of a silent hold whether it is known to go on some day, as a paused job may.
    """
    report = Pruned()
    decisions = repository.decisions
    there = decisions.groups()
    wanted = there.keys() if groups is None else set(groups)
    if unknown := sorted(wanted - there.keys()):
        names = ", ".join(sorted(there)[:_NAMES_TOLD]) or "none"
        raise NotFoundError(f"there is no group {unknown[0]!r} in {repository.store.name}", f"it has: {names}")
    if not dry_run:
        report.abandoned = _abandon_stale(repository, decisions.holds(), goes_on)
    if report.abandoned:
        there = decisions.groups()
    try:
        for name in sorted(wanted):
            _retain(repository, there[name], retention, report, forget_damaged=forget_damaged, dry_run=dry_run)
            went_on()
    except DamageError:
        if not dry_run:  # nothing goes, so all of it is to stay locked
            extend_locks(repository, decisions.groups_to_keep(), went_on)
        raise
    if dry_run:
        return report
    collect(repository, report, went_on)
    report.uploads = repository.store.abort_uploads(STALE_UPLOAD_S)
    return report


def collect(repository: Repository, report: Pruned, went_on: Callable[[], None] = lambda: None) -> None:
    """Remove what was condemned before and may go now; condemn what nothing leads to any more."""
    # In this order: whoever may refer to something condemned is open here, or decided below, and then its point is
    # among those looked at. A compaction that is over here has written its records before what is alive is found.
    sentences = [(key, bound(repository, key, one)) for key, one in sentences_of(repository, "remove")]
    open_now = open_epochs(repository)
    groups = repository.decisions.groups_to_keep()
    report.locked = extend_locks(repository, groups, went_on)
    alive = find_alive(repository, live_points(repository, groups), went_on)
    for key, sentence in sentences:
        if may_go(open_now, groups, sentence):
            _execute(repository, key, [k for k in sentence.keys if not _leads_to(alive, k)], report)
    for key, sentence in sentences_of(repository, "shun"):
        if not any(_leads_to(alive, k) for k in sentence.keys):
            repository.store.delete([key])
    forget_moved(repository)
    known = {k for _, sentence in sentences for k in sentence.keys}
    for keys in _batches(_dead(repository, open_now, groups, alive, known, report)):
        went_on()
        condemn(repository, "remove", keys)
    for group in groups.values():
        repository.store.delete(prune_leftovers(group))


def condemned_packs(repository: Repository, kind: str = "") -> frozenset[bytes]:
    """What a writer must not refer to but where its parent does; to be asked once its hold is written. With kind "shun"
    what it must not even take over from its parent."""
    keys = (key for _, sentence in sentences_of(repository, kind) for key in sentence.keys)
    return frozenset(bytes.fromhex(key.removeprefix(PACKS)) for key in keys if key.startswith(PACKS))


def forbidden_packs(repository: Repository) -> frozenset[bytes]:
    """What the index must not lead a writer to: what is condemned, and what was moved, of which only that went along
    that was alive then. Looked up in this order, for the one becomes the other."""
    condemned = condemned_packs(repository)
    return condemned | {pack for pack, _ in named_by_id(repository.store, MOVED)}


def _retain(
    repository: Repository, group: Group, retention: Retention, report: Pruned, *, forget_damaged: bool, dry_run: bool
) -> None:
    points: list[tuple[int, float]] = []
    seeds: list[int] = []
    damaged: list[int] = []
    newest: dict[str, int] = {}
    last: Decision | None = None
    for found in repository.decisions.points_or_damage(group):
        if isinstance(found, Decision):
            last = found
            newest |= {member.disk: found.epoch for member in found.members}
            if found.members:
                points.append((found.epoch, found.cut_at))
            else:
                seeds.append(found.epoch)
        elif forget_damaged:
            damaged.append(found.epoch)
        else:
            raise found
    holds = [hold for hold in repository.decisions.holds() if not hold.is_stale]  # as late as may be
    held = {epoch for hold in holds if hold.group == group.name for epoch in hold.points}
    if in_use := held.intersection(damaged):
        raise RefusedError(
            f"somebody reads {group.name}@{min(in_use)} or builds on it, though its decision is damaged now",
            "wait until that has ended",
        )
    # A disk that is seeded anew is in no point since: whatever was asked for, the last one that has it stays.
    needed = {newest[disk.disk] for disk in last.roots if disk.disk in newest} if last is not None else set()
    keep = kept(points, retention, held, needed)
    keep |= {epoch: "seed" for epoch in seeds if epoch in held or (last is not None and epoch == last.epoch)}
    report.kept[group.name] = keep
    report.removed[group.name] = sorted({*seeds, *(epoch for epoch, _ in points)} - keep.keys())
    report.forgotten[group.name] = damaged
    present = group.present()
    if dry_run or len(keep) == len(present):
        return
    repository.decisions.retain(group, sorted(keep), damaged)
    pass_point("after-retain")


def _abandon_stale(repository: Repository, holds: list[Hold], goes_on: Callable[[str], bool]) -> list[str]:
    """Epochs that nobody has been heard of for long are ended, or their holds renewed where somebody goes on; the holds
    of readers are just dropped."""
    decisions = repository.decisions
    abandoned = []
    for hold in holds:
        if not hold.is_stale:
            continue
        if hold.kind == "epoch" and hold.group != COMPACTION:
            is_decided = decisions.about(hold.group, hold.epoch).is_decided(hold.epoch)
            if not is_decided and goes_on(hold.owner):
                decisions.hold(hold.model_copy(update={"renewed_at": time.time()}))
                continue
            with suppress(DamagedDecisionError):  # decided, and nobody can tell how
                decided = abandon(repository, hold.group, hold.epoch, f"given up: {hold.owner} has fallen silent")
                abandoned += [] if decided.is_point else [f"{hold.group}@{hold.epoch}"]
        repository.decisions.let_go(hold.id)
    return abandoned


def open_epochs(repository: Repository) -> OpenEpochs:
    return tuple(sorted((hold.group, hold.epoch) for hold in repository.decisions.holds() if hold.kind == "epoch"))


def may_go(open_now: OpenEpochs, groups: dict[str, Group], sentence: Condemned) -> bool:
    """Whether every epoch that may refer to what was condemned is over: decided, or without its hold, like one that was
    announced and taken back. `open_now` was asked for before `groups`."""
    epochs = sentence.open_epochs or ()
    return all(epoch not in open_now or _is_decided(groups, open_now, epoch) for epoch in epochs)


def forget_moved(repository: Repository) -> None:
    """Remove nominations all of whose packs were moved, or are gone.

    Not before: another compaction may be about to move what was alive when it looked, and what was dead then must not
    be referred to again, however little is left to move for us.
    """
    nominations = list(sentences_of(repository, "move"))
    if not nominations:
        return
    moved = moved_packs(repository)
    for key, nomination in nominations:
        packs = [bytes.fromhex(pack.removeprefix(PACKS)) for pack in nomination.keys]
        if all(pack in moved or repository.store.size(pack_key(pack)) is None for pack in packs):
            repository.store.delete([key])


def _is_decided(groups: dict[str, Group], open_now: OpenEpochs, epoch: tuple[str, int]) -> bool:
    """A compaction is over when its hold is gone: nothing but moved/ can lead to what it wrote."""
    if epoch[0] == COMPACTION:
        return epoch not in open_now
    group = groups.get(epoch[0])
    return group is not None and group.is_decided(epoch[1])


def _leads_to(alive: Alive, key: str) -> bool:
    if key.startswith(PACKS):
        pack = bytes.fromhex(key.removeprefix(PACKS))
        return pack in alive.packs and pack not in alive.moved
    if key.startswith(MOVED):
        return bytes.fromhex(key.removeprefix(MOVED)) in alive.moved
    return key in alive.roots


def _dead(
    repository: Repository,
    open_now: OpenEpochs,
    groups: dict[str, Group],
    alive: Alive,
    known: set[str],
    report: Pruned,
) -> Iterator[str]:
    """Keys that nothing alive leads to, of epochs that are decided, and that are not condemned yet."""
    for pack, info in named_by_id(repository.store, PACKS):
        if info.key in known or _leads_to(alive, info.key):
            continue
        origin = _epoch_of_pack(repository, pack, info.size)
        if _is_decided(groups, open_now, origin):
            report.condemned += 1
            report.condemned_bytes += info.size
            yield info.key
    for info in repository.store.list(DISKS):
        if info.key in known or info.key in alive.roots:
            continue
        if _is_decided(groups, open_now, _epoch_of_root(info.key)):
            report.condemned += 1
            report.condemned_bytes += info.size
            yield info.key
    for _, info in named_by_id(repository.store, MOVED):
        if info.key not in known and not _leads_to(alive, info.key):
            yield info.key


def _epoch_of_pack(repository: Repository, pack: bytes, size: int) -> tuple[str, int]:
    try:
        origin = read_head(repository.store, pack, size).origin
    except DamageError:
        return ("", 0)  # no pack of ours: check names it, nobody removes it
    except MissingObjectError:
        return ("", 0)  # another prune has just removed it
    return (origin.group, origin.epoch)


def _epoch_of_root(key: str) -> tuple[str, int]:
    """By its name, disks/<disk>/roots/<group>-<epoch>-<nonce>."""
    group, _, rest = key.rpartition("/")[2].rpartition("-")[0].rpartition("-")
    return (group, int(rest)) if rest.isdigit() else ("", 0)


def sentences_of(repository: Repository, kind: str = "") -> Iterator[tuple[str, Condemned]]:
    """(key, record) of what is condemned, of one kind or of all."""
    for info in repository.store.list(CONDEMNED):
        try:
            sentence = Condemned.model_validate_json(repository.store.get(info.key))
        except MissingObjectError:
            continue  # another run has just carried it out
        except ValidationError as error:
            damage = DamageError("the record", info.key)
            damage.remedy = "remove it: the next prune, or check, lists anew what was on it"
            raise damage from error
        if kind in ("", sentence.kind):
            yield info.key, sentence


def condemn(repository: Repository, kind: Literal["remove", "move", "shun"], keys: list[str]) -> Condemned:
    """Write the record first, then look who may not have seen it."""
    sentence = Condemned(kind=kind, at=time.time(), keys=tuple(keys), open_epochs=None)
    name = f"{CONDEMNED}{time.time_ns():020d}-{secrets.token_hex(4)}.json"
    _write(repository, name, sentence)
    pass_point("between-condemned-and-bound")
    return bound(repository, name, sentence)


def bound(repository: Repository, name: str, sentence: Condemned) -> Condemned:
    """The record with its open epochs, looked up now if whoever wrote it did not come to that."""
    if sentence.open_epochs is not None:
        return sentence
    found = sentence.model_copy(update={"open_epochs": open_epochs(repository)})
    _write(repository, name, found)
    return found


def _write(repository: Repository, name: str, sentence: Condemned) -> None:
    repository.store.put(name, json.dumps(sentence.model_dump(mode="json")).encode())


def _execute(repository: Repository, name: str, keys: list[str], report: Pruned) -> None:
    """The record goes last: killed in between, the rest goes by the next run."""
    for key in keys:
        size = repository.store.size(key)
        if size is not None:
            report.deleted += 1
            report.deleted_bytes += size
    repository.store.delete(keys)
    pass_point("between-removed-and-record")
    repository.store.delete([name])


def _batches(keys: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for key in keys:
        batch.append(key)
        if len(batch) == _A_SENTENCE:
            yield batch
            batch = []
    if batch:
        yield batch
