"""What the ledger is told of recovery points: it keeps a copy, and the repository has the truth.

A manifest never changes once it is written, so a scan reads only those that the ledger does not know yet (and
tombstones), and forgets those that the listing does not show any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from coordinator.ledger.contract import Ledger
from coordinator.model.point import Decision, PointRecord
from coordinator.model.repository_uri import is_name, parse_repository
from coordinator.model.task import RepositoryTask, TaskKind
from workers.access import Access
from workers.repository.layout import DamageError
from workers.repository.repository import Repository

RECORDED_AT_ONCE = 64


def scan(task: RepositoryTask, ledger: Ledger, access: Access, went_on: Callable[[], None]) -> dict[str, Any]:
    """Teach the ledger which points there are, in the groups of the task or in all; what the job tells.

    A manifest that is damaged hides no other: what is said of it is in `damaged`, by its epoch. `begun` has the epochs
    that were written to a group's targets, or may have been, after the last one that is whole there.
    """
    uri = parse_repository(task.repository).repository
    mark = ledger.points_mark()
    with Repository.open(uri, access) as repository:
        decisions = repository.decisions
        named = [name for name in task.groups if is_name(name)]
        listed = {name: decisions.group(name) for name in named} if task.groups else decisions.groups()
        told: dict[str, list[int]] = {}
        damaged: dict[str, dict[int, str]] = {}
        begun: dict[str, int] = {}

        def read(name: str, epochs: list[int]) -> Iterator[PointRecord]:
            for epoch, reading in decisions.read(name, epochs):
                went_on()
                try:
                    decision = reading.result()
                except DamageError as error:
                    damaged.setdefault(name, {})[epoch] = error.message
                    continue
                if decision is not None and decision.is_point:
                    yield decision.record()
                elif decision is not None and decision.mirrors:
                    begun[name] = max(begun.get(name, 0), epoch)

        for name in task.groups or sorted({*listed, *ledger.point_groups(repository.id)}):
            present = listed[name].present() if name in listed else []
            known = set(ledger.point_epochs(repository.id, name))
            found = [epoch for epoch in present if epoch in known]
            unknown = read(name, [epoch for epoch in present if epoch not in known])
            while new := list(islice(unknown, RECORDED_AT_ONCE)):
                ledger.record_points(repository.id, str(uri), new, mark)
                found += [point.epoch for point in new]
            ledger.retain_points(repository.id, name, present, mark)
            if found:
                told[name] = sorted(found)
            newest = ledger.points(repository.id, name, after=max(found) - 1, limit=1) if found else []
            if newest and newest[0].mirrors:
                at_work = [hold.epoch for hold in decisions.holds_of_epochs(name)]
                begun[name] = max([begun.get(name, 0), *at_work])
            if begun.get(name, 0) <= max(found, default=0):
                begun.pop(name, None)
        if task.groups:
            ledger.record_points(repository.id, str(uri), [], mark)
        else:
            ledger.scanned(repository.id, str(uri))
        return {"repository": repository.id, "groups": told, "damaged": damaged, "begun": begun}


def published(ledger: Ledger, target: str, decision: Decision, mark: int) -> None:
    """A job has written the manifest, after `mark` was taken; told again, it is no news."""
    uri = parse_repository(target).repository
    ledger.record_points(decision.repository, str(uri), [decision.record()], mark, publish=True)


def learn_of(task: RepositoryTask, ledger: Ledger, access: Access, result: Mapping[str, Any] | None) -> None:
    """A task was done, or failed on its way (`result` is None then): see what became of the points."""
    if task.kind is TaskKind.INIT and result is not None:
        ledger.scanned(result["repository"], str(parse_repository(task.repository).repository))
    elif task.kind is TaskKind.PRUNE and not task.dry_run:
        # By what is there now: an earlier attempt may have removed points, and died before it could say so.
        scan(task, ledger, access, lambda: None)
