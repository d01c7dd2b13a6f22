"""The repository's side of a group's epoch, in tasks of one unit: announced before anybody is cut, decided at the end.

The disks in between are jobs like any other (backup.py), which know the epoch by their `part`. All of this may be done
again: a hold of the same owner is taken up, a decision that is there is found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from coordinator.ledger.contract import Ledger
from coordinator.model.errors import RefusedError
from coordinator.model.point import PIVOT, Decision, SeedMember
from coordinator.model.repository_uri import parse_repository
from coordinator.model.task import AbandonEpoch, DecidedEpoch, EpochTask, OpenedEpoch, OpenEpoch, PublishEpoch
from workers.access import Access
from workers.mover import points
from workers.mover.backup import located
from workers.repository.epochs import Epoch, abandon, open_epochs, publish
from workers.repository.layout import DamageError
from workers.repository.repository import Repository


def run(task: EpochTask, ledger: Ledger, access: Access, is_over: Callable[[str], bool]) -> dict[str, Any]:
    """What the job of the task tells; errors are those of the repository."""
    mark = ledger.points_mark()
    with Repository.open(parse_repository(task.repository).repository, access) as repository:
        if isinstance(task, OpenEpoch):
            return _open(repository, task, is_over).model_dump(mode="json")
        decision = _publish(repository, task) if isinstance(task, PublishEpoch) else _abandon(repository, task)
    is_ours = decision.is_point and decision.job == task.owner
    if is_ours:
        points.published(ledger, task.repository, decision, mark)
    told = DecidedEpoch.by(decision) if is_ours else DecidedEpoch(is_point=False)
    return told.model_dump(mode="json")


def _open(repository: Repository, task: OpenEpoch, is_over: Callable[[str], bool]) -> OpenedEpoch:
    owner = located(task.owner)
    if task.targets:
        return _open_mirrors(repository, task, owner, is_over)
    epochs = open_epochs(repository, task.group, task.disks, owner, is_over, task.at_least)
    return OpenedEpoch(
        repository=repository.id,
        number=epochs[0].number,
        parents={epoch.disk: epoch.parent.epoch for epoch in epochs if epoch.parent and _is_whole(repository, epoch)},
        pins=epochs[0].pins,
        sizes={epoch.disk: member.size for epoch in epochs if (member := epoch.parent_member)},
        seeded={epoch.disk: member.seeded for epoch in epochs if isinstance(member := epoch.parent_member, SeedMember)},
    )


def _open_mirrors(repository: Repository, task: OpenEpoch, owner: str, is_over: Callable[[str], bool]) -> OpenedEpoch:
    """The same where disks go to targets: each builds on what its own target holds."""

    def has(point: Decision, disk: str) -> bool:
        return point.mirror(disk, task.targets[disk]) is not None

    epochs = open_epochs(repository, task.group, task.disks, owner, is_over, task.at_least, has)
    held = {
        epoch.disk: mirror
        for epoch in epochs
        if epoch.parent and (mirror := epoch.parent.mirror(epoch.disk, task.targets[epoch.disk]))
    }
    sure = [epoch for epoch in epochs if epoch.parent and not epoch.may_have_newer_parent]
    oldest = min((epoch.parent.epoch for epoch in sure if epoch.parent), default=0)
    decided = _decided_after(repository, task.group, oldest) if sure else []
    for epoch in sure:
        if _runs_on(epoch, task.targets[epoch.disk], decided):
            why = f"a guest of group {task.group!r} runs on {task.targets[epoch.disk]}"
            abandon(repository, task.group, epoch.number, why)
            raise RefusedError(why, "name another target")
    sure = [epoch for epoch in sure if not _is_overwritten(epoch, task.targets[epoch.disk], decided)]
    return OpenedEpoch(
        repository=repository.id,
        number=epochs[0].number,
        parents={epoch.disk: epoch.parent.epoch for epoch in sure if epoch.parent},
        pins=epochs[0].pins,
        sizes={disk: mirror.size for disk, mirror in held.items()},
        seeded={disk: mirror.seeded for disk, mirror in held.items() if mirror.seeded},
    )


def _decided_after(repository: Repository, group: str, number: int) -> list[Decision]:
    """Points and tombstones, oldest first. DamageError."""
    later = [epoch for epoch in repository.decisions.group(group).present() if epoch > number]
    found = (reading.result() for _, reading in repository.decisions.read(group, later))
    return [decision for decision in found if decision is not None]


def _runs_on(epoch: Epoch, target: str, decided: Iterable[Decision]) -> bool:
    """Whether the disk's guest went on with the target, and has not left it since, as far as the records tell."""
    mirror = epoch.parent.mirror(epoch.disk, target) if epoch.parent else None
    if mirror is None or mirror.sync != PIVOT:
        return False
    return not any(newer.is_point and _names(newer, epoch.disk) for newer in _after_parent(epoch, decided))


def _is_overwritten(epoch: Epoch, target: str, decided: Iterable[Decision]) -> bool:
    """Whether another disk may have been written to the target of this one after the point that it holds."""
    later = _after_parent(epoch, decided)
    return any(one.target == target and one.disk != epoch.disk for newer in later for one in newer.mirrors)


def _after_parent(epoch: Epoch, decided: Iterable[Decision]) -> Iterator[Decision]:
    return (newer for newer in decided if epoch.parent is not None and newer.epoch > epoch.parent.epoch)


def _names(decision: Decision, disk: str) -> bool:
    return any(one.disk == disk for one in decision.mirrors)


def _is_whole(repository: Repository, epoch: Epoch) -> bool:
    """Whether the disk's parent can be built on. A page that is damaged would be in every point to come, since what
    bitmaps tell mends none of it: such a disk is copied whole."""
    member = epoch.parent_member
    try:
        if member is not None:
            repository.whole_root(member)
    except DamageError:
        return False
    return member is not None


def _publish(repository: Repository, task: PublishEpoch) -> Decision:
    decision = task.decision.model_copy(update={"decided_at": time.time()})
    return publish(repository, Epoch(decision.group, decision.epoch, "", located(task.owner), None), decision)


def _abandon(repository: Repository, task: AbandonEpoch) -> Decision:
    return abandon(repository, task.group, task.number, task.why, task.mirrors)
