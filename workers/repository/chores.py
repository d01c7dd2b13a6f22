"""What is done to a repository as a whole: each function is one `TaskKind`, and returns what its job tells.

A scan is not among them: it is about what the ledger knows (see workers/mover/points.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from coordinator.model.errors import RefusedError
from coordinator.model.repository_uri import RepositoryUri, parse_repository
from coordinator.model.task import RepositoryTask, TaskKind
from workers.access import Access
from workers.repository import keyring
from workers.repository.check import Checked, check
from workers.repository.collect import condemn, prune
from workers.repository.compact import compact
from workers.repository.layout import PACKS, DamageError
from workers.repository.repository import Repository, allowed_store, read_record
from workers.repository.secret import new_owners_key, owners_key
from workers.repository.store import probe

WentOn = Callable[[], None]


class FoundDamageError(DamageError):
    """A check found damage; the report is in the job's result."""

    def __init__(self, repository: str, report: Checked) -> None:
        first = report.damage[0]
        super().__init__("something", first.key)
        more = f", and {len(report.damage) - 1} more" if len(report.damage) > 1 else ""
        self.message = f"{first.message}{more}"
        self.remedy = "points that it does not harm can be restored; the next backups store it anew"
        self.result = {"repository": repository} | asdict(report)


def run(
    task: RepositoryTask,
    job_id: str,
    access: Access,
    went_on: WentOn,
    goes_on: Callable[[str], bool] = lambda owner: False,
) -> dict[str, Any]:
    """Do a task. `went_on` is called now and then and may raise to break off; errors are those of the repository. For
    `goes_on` see `prune`."""
    uri = parse_repository(task.repository).repository
    if task.kind is TaskKind.INIT:
        return _init(uri, access, task.level, job_id)
    if task.kind is TaskKind.REWRAP_KEYS:
        return _rewrap(uri, access, task.new_key)
    with Repository.open(uri, access) as repository:
        return {"repository": repository.id} | _run(task, repository, uri, access, went_on, goes_on)


def _run(
    task: RepositoryTask,
    repository: Repository,
    uri: RepositoryUri,
    access: Access,
    went_on: WentOn,
    goes_on: Callable[[str], bool],
) -> dict[str, Any]:
    match task.kind:
        case TaskKind.CHECK:
            return _check(repository, task.data, went_on)
        case TaskKind.PRUNE:
            pruned = prune(
                repository,
                task.groups or None,
                task.retention,
                forget_damaged=task.forget_damaged,
                dry_run=task.dry_run,
                went_on=went_on,
                goes_on=goes_on,
            )
            return asdict(pruned)
        case TaskKind.COMPACT:
            return asdict(compact(repository, went_on=went_on))
        case TaskKind.NEW_DATA_KEY:
            if not uri.key:
                raise _no_key()
            secret = owners_key(uri, access, repository.store, repository.id)
            return {"key": keyring.rotate(repository.store, secret)}
        case _:
            raise ValueError(f"{task.kind} is done elsewhere")


def _init(uri: RepositoryUri, access: Access, level: int, job_id: str) -> dict[str, Any]:
    if uri.kind == "file":
        Path(access.check_path(uri.path, must_exist=False)).mkdir(exist_ok=True)
    store = allowed_store(uri, access)
    try:
        findings = probe(store)
    finally:
        store.close()
    if not findings.conditional_put or not findings.read_after_write:
        raise RefusedError(
            f"{store.name} cannot hold a repository: {'; '.join(findings.cannot)}",
            "use a store with conditional PUT (If-None-Match) and read-after-write",
        )
    with Repository.init(uri, access, level, job_id) as repository:
        return {
            "repository": repository.id,
            "encrypted": repository.record.encrypted,
            "store": asdict(findings),
            "warnings": [*findings.cannot, *uri.warnings()],
        }


def _check(repository: Repository, data: bool, went_on: WentOn) -> dict[str, Any]:
    report = check(repository, data=data, went_on=went_on)
    if not report.damage:
        return asdict(report)
    packs = sorted({damage.key for damage in report.damage if damage.key.startswith(PACKS)})
    if packs:  # writers store anew what is in them, wherever they read it again
        condemn(repository, "shun", packs)
    raise FoundDamageError(repository.id, report)


def _rewrap(uri: RepositoryUri, access: Access, new_key: str) -> dict[str, Any]:
    """The repository is not opened: where another rewrap was broken off, neither key opens all of its keys."""
    if not uri.key:
        raise _no_key()
    if new_key == uri.key:
        raise RefusedError(f"{new_key} is the key it has", "name another one by --new-key")
    store = allowed_store(uri, access)
    try:
        record = read_record(store)
        if not record.encrypted:
            raise RefusedError(f"the repository {store.name} is not encrypted, and a key was named", "leave out key=")
        old = owners_key(uri, access, store, record.id)
        new = new_owners_key(replace(uri, key=new_key), access, store, record.id)
        return {"repository": record.id, "keys": keyring.rewrap(store, old, new)}
    finally:
        store.close()


def _no_key() -> RefusedError:
    return RefusedError("no key was named, so the repository is not encrypted and has none", "add key=… to its URI")
