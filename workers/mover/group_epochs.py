"""The repository's side of a group's epoch, in tasks of one unit: announced before anybody is cut, decided at the end.

The disks in between are jobs like any other (backup.py), which know the epoch by their `part`. All of this may be done
again: a hold of the same owner is taken up, a decision that is there is found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
    for epoch in epochs:
        _refuse_live(repository, epoch, task.targets[epoch.disk])
    sure = [
        epoch
        for epoch in epochs
        if not epoch.may_have_newer_parent and not _written_since(repository, epoch, task.targets[epoch.disk])
    ]
    return OpenedEpoch(
        repository=repository.id,
        number=epochs[0].number,
        parents={epoch.disk: epoch.parent.epoch for epoch in sure if epoch.parent},
        pins=epochs[0].pins,
        sizes={disk: mirror.size for disk, mirror in held.items()},
        seeded={disk: mirror.seeded for disk, mirror in held.items() if mirror.seeded},
    )


def _refuse_live(repository: Repository, epoch: Epoch, target: str) -> None:
    """RefusedError for a target that a guest went on with, and has not left since, as far as the records tell."""
    mirror = epoch.parent.mirror(epoch.disk, target) if epoch.parent else None
    if mirror is None or mirror.sync != PIVOT:
        return
    for newer in _decided_after(repository, epoch):
        if newer.is_point and any(one.disk == epoch.disk for one in newer.mirrors):
            return
    abandon(repository, epoch.group, epoch.number, f"a guest runs on {target}")
    raise RefusedError(f"a guest of group {epoch.group!r} runs on {target}", "name another target")


def _written_since(repository: Repository, epoch: Epoch, target: str) -> bool:
    """Whether another disk may have been written to the target of this one after the point that it holds."""
    decided = _decided_after(repository, epoch) if epoch.parent else ()
    try:
        return any(one.target == target and one.disk != epoch.disk for newer in decided for one in newer.mirrors)
    except DamageError:  # nobody can tell
        return True


def _decided_after(repository: Repository, epoch: Epoch) -> Iterator[Decision]:
    """After the disk's parent, points and tombstones. DamageError."""
    after = epoch.parent.epoch if epoch.parent else 0
    present = repository.decisions.group(epoch.group).present()
    for _, reading in repository.decisions.read(epoch.group, [number for number in present if number > after]):
        if (decision := reading.result()) is not None:
            yield decision


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
