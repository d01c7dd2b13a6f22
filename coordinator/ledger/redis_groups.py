"""Groups, in Redis: a record each, replaced as a whole by whoever has read it last."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from pydantic import ValidationError

from coordinator.ledger.connection import Server
from coordinator.ledger.contract import ConflictError, NewEvent, Term
from coordinator.ledger.records import events_of
from coordinator.ledger.redis_jobs import deposed, fence_of
from coordinator.model.errors import NotFoundError
from coordinator.model.group import GroupRecord

log = structlog.get_logger()


def missing_group(name: str) -> NotFoundError:
    return NotFoundError(f"there is no group {name!r}", "see flushpoint groups, or apply its file")


def group_conflict(name: str) -> ConflictError:
    return ConflictError(f"group {name!r} changed meanwhile", "do the same once more")


class RedisGroups:
    _server: Server

    def put_group(
        self, group: GroupRecord, *, events: Sequence[NewEvent] = (), term: Term | None = None
    ) -> GroupRecord:
        kept = group.model_copy(update={"version": group.version + 1})
        run = self._server.run if term else self._server.run_flushed
        record = kept.model_dump_json()
        answer = run("put_group", group.name, group.version, record, *fence_of(term), *events_of(events))
        if answer == "deposed" and term is not None:
            raise deposed(term)
        if answer == "conflict":
            raise group_conflict(group.name)
        return kept

    def group(self, name: str) -> GroupRecord:
        with self._server.errors():
            text = self._server.redis.hget(self._server.keys.group(name), "record")
        if text is None:
            raise missing_group(name)
        return GroupRecord.model_validate_json(text)

    def groups(self) -> list[GroupRecord]:
        found = []
        for text in self._server.ask("groups"):
            try:
                found.append(GroupRecord.model_validate_json(text))
            except ValidationError as error:  # of another version: no other group, and no job, is to suffer from it
                log.warning("a group's record cannot be read", error=error.errors()[0]["msg"])
        return sorted(found, key=lambda group: group.name)

    def remove_group(self, name: str, version: int) -> None:
        answer = self._server.run("remove_group", name, version)
        if answer == "missing":
            raise missing_group(name)
        if answer == "conflict":
            raise group_conflict(name)
