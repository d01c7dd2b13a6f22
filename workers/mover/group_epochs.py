"""The repository's side of a group's epoch, in tasks of one unit: announced before anybody is cut, decided at the end.

The disks in between are jobs like any other (backup.py), which know the epoch by their `part`. All of this may be done
again: a hold of the same owner is taken up, a decision that is there is found.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from coordinator.ledger.contract import Ledger
from coordinator.model.point import Decision, SeedMember
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
    sure = [epoch for epoch in epochs if not epoch.may_have_newer_parent]
    return OpenedEpoch(
        repository=repository.id,
        number=epochs[0].number,
        parents={epoch.disk: epoch.parent.epoch for epoch in sure if epoch.parent},
        pins=epochs[0].pins,
        sizes={disk: mirror.size for disk, mirror in held.items()},
        seeded={disk: mirror.seeded for disk, mirror in held.items() if mirror.seeded},
    )


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
