"""Opening an epoch of a group, and deciding it: from the hold that announces it to the manifest or the tombstone.

open      hold written (it pins the parent and names the epoch), then condemned packs are looked up
write     movers store packs (archive.py), and renew the hold
publish   root written, then the decision, then the hold let go; done again after a crash it does the same
abandon   a tombstone, after which nobody can publish the epoch any more
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from coordinator.model.errors import RefusedError
from coordinator.model.point import Decision, Member, MirroredDisk
from workers.failpoint import pass_point
from workers.repository.decisions import DamagedDecisionError, Group, Hold
from workers.repository.layout import DamageError, hold_key, root_key
from workers.repository.pack import PackRef, read_contents
from workers.repository.repository import Repository
from workers.repository.root import Root, RootRef, write_root
from workers.repository.segment_map import MapRef

FOOTERS_AT_ONCE = 16
PARENTS = 3
"""How often a parent may be pruned between being found and being pinned."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """An open epoch of one group, as one of its disks sees it; `parent` is the newest point that holds the disk, or
    what was seeded of it, and can be read, if there is one."""

    group: str
    number: int
    disk: str
    owner: str
    """Who writes it, for people, and from " on " on, where."""
    parent: Decision | None
    pins: tuple[int, ...] = ()
    """The points that its hold keeps: the parents of all its disks."""
    missed: int = 0
    """The newest epoch of which nobody can tell whether it is a point, because its decision is damaged, or was when a
    prune forgot it; 0: none."""

    @property
    def may_have_newer_parent(self) -> bool:
        """Whether the epoch that was missed may have been the newest point of the disk: what was written since that is
        not all that differs from `parent`."""
        return self.missed > (self.parent.epoch if self.parent else 0)

    @property
    def hold_id(self) -> str:
        return f"epoch-{self.group}-{self.number:010d}"

    @property
    def parent_member(self) -> Member | None:
        return self.parent.base(self.disk) if self.parent else None

    def member_of(self, ref: RootRef, size: int) -> Member:
        """The epoch's disk, of `size` bytes, by its root."""
        return Member(
            disk=self.disk,
            size=size,
            root=ref.key,
            directory_offset=ref.directory_offset,
            directory_length=ref.directory_length,
            root_digest=ref.digest.hex(),
            sync="",
            parent=self.parent.epoch if self.parent else 0,
        )

    def hold(self) -> Hold:
        return Hold(
            id=self.hold_id,
            kind="epoch",
            group=self.group,
            epoch=self.number,
            points=self.pins,
            owner=self.owner,
            renewed_at=time.time(),
        )


def open_epoch(repository: Repository, group: str, disk: str, owner: str, is_over: Callable[[str], bool]) -> Epoch:
    """`open_epochs` of a group of one disk."""
    return open_epochs(repository, group, [disk], owner, is_over)[0]


def open_epochs(
    repository: Repository,
    group: str,
    disks: Sequence[str],
    owner: str,
    is_over: Callable[[str], bool],
    at_least: int = 1,
    has: Callable[[Decision, str], bool] = lambda point, disk: point.base(disk) is not None,
) -> list[Epoch]:
    """Announce the group's next epoch, whose number is not less than `at_least`; as each of its disks sees it.
    RefusedError while somebody else writes one.

    `is_over` says of an owner whether its job is known to have ended: its epoch is then abandoned at once, any other's
    only when its hold was not renewed for HOLD_TTL_S. A hold of `owner` itself is taken up again. `has` says of a point
    whether a disk can build on it.
    """
    decisions = repository.decisions
    seen = decisions.group(group)
    holds = decisions.holds_of_epochs(group)
    for hold in holds:
        if _are_one(hold.owner, owner) and not seen.is_decided(hold.epoch):
            return _taken_up(repository, seen, hold, disks, owner, has)
        if not seen.is_decided(hold.epoch) and not hold.is_stale and not is_over(hold.owner):
            raise _busy(repository, hold)
        if seen.is_decided(hold.epoch):  # perhaps by what is damaged now
            decisions.let_go(hold.id)
        else:
            abandon(repository, group, hold.epoch, f"given up: {hold.owner} wrote it and has ended or fallen silent")
    number = max([seen.newest + 1, at_least, *(h.epoch + 1 for h in holds)])
    for _ in range(PARENTS):
        parents, damaged = _newest_with(repository, seen, disks, has)
        pins = _pins(parents)
        epochs = [Epoch(group, number, disk, owner, parents.get(disk), pins) for disk in disks]
        announced = epochs[0].hold()
        if not decisions.announce(announced):
            raise RefusedError(f"somebody else has just opened epoch {number} of group {group!r}", "try again")
        first = min((h.epoch for h in decisions.holds_of_epochs(group)), default=number)
        if first < number:
            decisions.let_go(announced.id)
            raise RefusedError(f"somebody else has just opened epoch {first} of group {group!r}", "try again")
        now = decisions.about(group, number, *pins)
        if now.is_decided(number):
            decisions.let_go(announced.id)
            raise RefusedError(f"somebody else has just decided epoch {number} of group {group!r}", "try again")
        if set(pins) <= set(now.present()):
            return _missing(epochs, damaged, now)
        decisions.let_go(announced.id)  # a prune has removed a parent before the hold was there
        seen = decisions.group(group)
    raise RefusedError(f"the points of group {group!r} are pruned as fast as they are read", "try again")


def reopen(
    repository: Repository,
    group: str,
    number: int,
    disk: str,
    owner: str,
    parent_epoch: int,
    pins: tuple[int, ...] | None = None,
) -> Epoch:
    """An epoch that was opened before, as a job's record names it; `pins` where it has other disks, too."""
    parent = repository.decisions.decision(group, parent_epoch) if parent_epoch else None
    kept = pins if pins is not None else _pins({disk: parent} if parent else {})
    return Epoch(group, number, disk, owner, parent, kept)


def _taken_up(
    repository: Repository,
    seen: Group,
    hold: Hold,
    disks: Sequence[str],
    owner: str,
    has: Callable[[Decision, str], bool],
) -> list[Epoch]:
    """Of the points that the hold keeps, each disk stands on the newest that has it."""
    now = repository.decisions.about(hold.group, hold.epoch, *hold.points)
    if not set(hold.points) <= set(now.present()):
        abandon(repository, hold.group, hold.epoch, "what it builds on was pruned before it was held")
        what = f"points of group {hold.group!r} were pruned while epoch {hold.epoch} was opened"
        raise RefusedError(what, "try again")
    held = [repository.decisions.decision(hold.group, point) for point in sorted(hold.points)]
    epochs = []
    for disk in disks:
        having = [point for point in held if point is not None and has(point, disk)]
        epochs.append(Epoch(hold.group, hold.epoch, disk, owner, having[-1] if having else None, hold.points))
    _, damaged = _newest_with(repository, seen, disks, has)
    return _missing(epochs, damaged, now)


def _pins(parents: Mapping[str, Decision]) -> tuple[int, ...]:
    return tuple(sorted({parent.epoch for parent in parents.values()}))


def collect_maps(repository: Repository, disk: str, packs: Iterable[PackRef]) -> list[MapRef]:
    """The maps that the units of an epoch wrote of a disk, in order of segments."""
    with ThreadPoolExecutor(FOOTERS_AT_ONCE, thread_name_prefix="footers") as pool:
        contents = pool.map(lambda ref: read_contents(repository.store, repository.keyring, ref), packs)
        refs = [stored.ref for content in contents for stored in content.maps if stored.disk == disk]
    return sorted(refs, key=lambda ref: ref.segment)


def write_disk_root(repository: Repository, epoch: Epoch, base: Root, size: int, maps: Iterable[MapRef]) -> RootRef:
    """Write the root of the epoch's disk: `maps`, sorted, over `base`."""
    pass_point("between-packs-and-root")
    key = root_key(epoch.disk, epoch.group, epoch.number, secrets.token_hex(8))
    return write_root(repository.store, repository.keyring, key, base, size, maps)


def renew(repository: Repository, epoch: Epoch) -> None:
    """Say that the epoch is still being written. RefusedError if it was ended meanwhile, or its hold removed."""
    if repository.decisions.about(epoch.group, epoch.number).is_decided(epoch.number):
        raise RefusedError(
            f"epoch {epoch.number} of group {epoch.group!r} was given up while this job was silent",
            "submit the job again",
        )
    _check_hold(repository, epoch)
    repository.decisions.hold(epoch.hold())


def publish(repository: Repository, epoch: Epoch, decision: Decision) -> Decision:
    """Decide the epoch by its manifest. The same job's earlier manifest is as good; RefusedError for anything else."""
    pass_point("between-root-and-manifest")
    if not repository.decisions.about(epoch.group, epoch.number).is_decided(epoch.number):
        _check_hold(repository, epoch)
    decided = repository.decisions.decide(decision)
    pass_point("after-manifest")
    if not decided.is_point or decided.job != decision.job:
        raise RefusedError(
            f"epoch {epoch.number} of group {epoch.group!r} was decided by somebody else: {decided.why or decided.job}",
            "submit the job again",
        )
    if epoch.number not in repository.decisions.about(epoch.group, epoch.number).present():
        raise RefusedError(
            f"epoch {epoch.number} of group {epoch.group!r} was given up and pruned while its writer was silent",
            "submit the job again",
        )
    repository.decisions.let_go(epoch.hold_id)
    return decided


def abandon(
    repository: Repository, group: str, number: int, why: str, mirrors: tuple[MirroredDisk, ...] = ()
) -> Decision:
    """End an epoch without result, unless it was published: what is decided is returned. `mirrors` may have been
    written."""
    tombstone = Decision(
        decision="tombstone",
        repository=repository.id,
        group=group,
        epoch=number,
        decided_at=time.time(),
        why=why,
        mirrors=mirrors,
    )
    decided = repository.decisions.decide(tombstone)
    repository.decisions.let_go(f"epoch-{group}-{number:010d}")
    return decided


def _newest_with(
    repository: Repository, group: Group, disks: Sequence[str], has: Callable[[Decision, str], bool]
) -> tuple[dict[str, Decision], dict[str, int]]:
    """By disk, the newest point of it that can be read, and the newest damaged decision after that (0: none)."""
    parents: dict[str, Decision] = {}
    damaged = dict.fromkeys(disks, 0)
    for found in repository.decisions.newest_points_or_damage(group):
        for disk in disks:
            if disk in parents:
                continue
            if isinstance(found, DamagedDecisionError):
                damaged[disk] = max(damaged[disk], found.epoch)
            elif has(found, disk):
                parents[disk] = found
        if len(parents) == len(damaged):
            break
    return parents, damaged


def _missing(epochs: Iterable[Epoch], damaged: Mapping[str, int], now: Group) -> list[Epoch]:
    """`now` was looked at after `damaged` was: what a prune has forgotten since was listed no more."""
    return [replace(epoch, missed=max(damaged[epoch.disk], now.forgotten)) for epoch in epochs]


def _check_hold(repository: Repository, epoch: Epoch) -> None:
    """Whoever removes something takes an epoch without hold for one that nobody writes any more."""
    try:
        there = repository.decisions.hold_of(epoch.hold_id)
    except DamageError:
        return  # it is there, and will be written anew
    if there is None or not _are_one(there.owner, epoch.owner):
        taken = f"is now {there.owner}'s" if there is not None else "was removed"
        raise RefusedError(
            f"the hold of epoch {epoch.number} of group {epoch.group!r} {taken}, so that what this job refers to may be"
            " gone",
            "submit the job again",
        )


def _are_one(owner: str, other: str) -> bool:
    """Wherever they are: a job's units are done on any host."""
    return owner.partition(" on ")[0] == other.partition(" on ")[0]


def _busy(repository: Repository, hold: Hold) -> RefusedError:
    minutes = (time.time() - hold.renewed_at) / 60
    return RefusedError(
        f"{hold.owner} is writing epoch {hold.epoch} of group {hold.group!r} in {repository.store.name}, last heard of "
        f"{minutes:.0f} min ago",
        f"wait for it or cancel it; if it is dead, remove {hold_key(hold.id)} or wait an hour",
    )
