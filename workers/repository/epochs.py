"""Opening an epoch of a group, and deciding it: from the hold that announces it to the manifest or the tombstone.

open      hold written (it pins the parent and names the epoch), then condemned packs are looked up
write     movers store packs (archive.py), and renew the hold
publish   root written, then the decision, then the hold let go; done again after a crash it does the same
abandon   a tombstone, after which nobody can publish the epoch any more
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from coordinator.model.errors import RefusedError
from coordinator.model.point import Decision, Member
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
    """An open epoch of one group; `parent` is the newest point that holds the disk and can be read, if there is one."""

    group: str
    number: int
    disk: str
    owner: str
    """Who writes it, for people, and from " on " on, where."""
    parent: Decision | None
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
        return self.parent.member(self.disk) if self.parent else None

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
        points = (self.parent.epoch,) if self.parent else ()
        return Hold(
            id=self.hold_id,
            kind="epoch",
            group=self.group,
            epoch=self.number,
            points=points,
            owner=self.owner,
            renewed_at=time.time(),
        )


def open_epoch(repository: Repository, group: str, disk: str, owner: str, is_over: Callable[[str], bool]) -> Epoch:
    """Announce the group's next epoch. RefusedError while somebody else writes one.

    `is_over` says of an owner whether its job is known to have ended: its epoch is then abandoned at once, any other's
    only when its hold was not renewed for HOLD_TTL_S. A hold of `owner` itself is taken up again.
    """
    decisions = repository.decisions
    seen = decisions.group(group)
    holds = decisions.holds_of_epochs(group)
    for hold in holds:
        if _are_one(hold.owner, owner) and not seen.is_decided(hold.epoch):
            epoch = reopen(repository, group, hold.epoch, disk, owner, hold.points[0] if hold.points else 0)
            _, damaged = _newest_with(repository, seen, disk)
            return _missing(epoch, damaged, decisions.about(group, hold.epoch))
        if not seen.is_decided(hold.epoch) and not hold.is_stale and not is_over(hold.owner):
            raise _busy(repository, hold)
        if seen.is_decided(hold.epoch):  # perhaps by what is damaged now
            decisions.let_go(hold.id)
        else:
            abandon(repository, group, hold.epoch, f"given up: {hold.owner} wrote it and has ended or fallen silent")
    number = max([seen.newest, *(h.epoch for h in holds)], default=0) + 1
    for _ in range(PARENTS):
        parent, damaged = _newest_with(repository, seen, disk)
        epoch = Epoch(group, number, disk, owner, parent)
        announced = epoch.hold()
        if not decisions.announce(announced):
            raise RefusedError(f"somebody else has just opened epoch {number} of group {group!r}", "try again")
        first = min((h.epoch for h in decisions.holds_of_epochs(group)), default=number)
        if first < number:
            decisions.let_go(epoch.hold_id)
            raise RefusedError(f"somebody else has just opened epoch {first} of group {group!r}", "try again")
        now = decisions.about(group, number, *announced.points)
        if now.is_decided(number):
            decisions.let_go(epoch.hold_id)
            raise RefusedError(f"somebody else has just decided epoch {number} of group {group!r}", "try again")
        if epoch.parent is None or epoch.parent.epoch in now.present():
            return _missing(epoch, damaged, now)
        decisions.let_go(epoch.hold_id)  # a prune has removed the parent before the hold was there
        seen = decisions.group(group)
    raise RefusedError(f"the points of group {group!r} are pruned as fast as they are read", "try again")


def reopen(repository: Repository, group: str, number: int, disk: str, owner: str, parent_epoch: int) -> Epoch:
    """An epoch that was opened before, as a job's record names it."""
    parent = repository.decisions.decision(group, parent_epoch) if parent_epoch else None
    return Epoch(group, number, disk, owner, parent)


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


def abandon(repository: Repository, group: str, number: int, why: str) -> Decision:
    """End an epoch without result, unless it was published: what is decided is returned."""
    tombstone = Decision(
        decision="tombstone",
        repository=repository.id,
        group=group,
        epoch=number,
        decided_at=time.time(),
        why=why,
    )
    decided = repository.decisions.decide(tombstone)
    repository.decisions.let_go(f"epoch-{group}-{number:010d}")
    return decided


def _newest_with(repository: Repository, group: Group, disk: str) -> tuple[Decision | None, int]:
    """The newest point of the disk that can be read, and the newest damaged decision after it (0: none)."""
    damaged = 0
    for found in repository.decisions.newest_points_or_damage(group):
        if isinstance(found, DamagedDecisionError):
            damaged = max(damaged, found.epoch)
        elif found.member(disk) is not None:
            return found, damaged
    return None, damaged


def _missing(epoch: Epoch, damaged: int, now: Group) -> Epoch:
    """`now` was looked at after `damaged` was: what a prune has forgotten since was listed no more."""
    return replace(epoch, missed=max(damaged, now.forgotten))


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
