"""Groups, in Redis: a record each, replaced as a whole by whoever has read it last."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from pydantic import ValidationError

from coordinator.ledger.connection import Server
from coordinator.ledger.contract import ConflictError, NewEvent, Term, UnreadableGroupError
from coordinator.ledger.records import events_of
from coordinator.ledger.redis_jobs import deposed, fence_of
from coordinator.model.errors import FlushpointError, NotFoundError
from coordinator.model.group import GroupRecord

log = structlog.get_logger()


def missing_group(name: str) -> NotFoundError:
    return NotFoundError(f"there is no group {name!r}", "see flushpoint groups, or apply its file")


def group_conflict(name: str) -> ConflictError:
    return ConflictError(f"group {name!r} changed meanwhile", "do the same once more")


def _record_of(name: str, version: str, text: str) -> GroupRecord:
    try:
        return GroupRecord.model_validate_json(text)
    except ValidationError as error:
        why = error.errors()[0]
        place = ".".join(str(part) for part in why["loc"])
        raise UnreadableGroupError(name, int(version), f"{place}: {why['msg']}" if place else why["msg"]) from error
    except FlushpointError as error:  # some of what a spec is checked for
        raise UnreadableGroupError(name, int(version), error.message) from error


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
            version, text = self._server.redis.hmget(self._server.keys.group(name), "version", "record")
        if version is None or text is None:
            raise missing_group(name)
        return _record_of(name, version, text)

    def groups(self) -> list[GroupRecord]:
        found, unreadable = self._all()
        for error in unreadable:
            log.warning(error.message)
        return found

    def unreadable_groups(self) -> dict[str, str]:
        return {error.name: error.why for error in self._all()[1]}

    def _all(self) -> tuple[list[GroupRecord], list[UnreadableGroupError]]:
        """By name. No group, and no job, is to suffer from one that cannot be read."""
        found, unreadable = [], []
        for name, version, text in sorted(self._server.ask("groups")):
            try:
                found.append(_record_of(name, version, text))
            except UnreadableGroupError as error:
                unreadable.append(error)
        return found, unreadable

    def remove_group(self, name: str, version: int) -> None:
        answer = self._server.run("remove_group", name, version)
        if answer == "missing":
            raise missing_group(name)
        if answer == "conflict":
            raise group_conflict(name)
