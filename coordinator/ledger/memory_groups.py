"""Groups in memory: the twin of redis_groups.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from coordinator.ledger.contract import GROUP_WAKE, NewEvent, Term
from coordinator.ledger.redis_groups import group_conflict, missing_group
from coordinator.model.group import GroupRecord


class MemoryGroups:
    def __init__(
        self,
        lock: threading.Condition,
        fence: Callable[[Term], None],
        emit: Callable[[str, Sequence[NewEvent]], None],
        wake: Callable[[str], None],
    ) -> None:
        self._groups_lock = lock
        self._fence_group = fence
        self._emit_of_group = emit
        self._wake_for_group = wake
        self._groups: dict[str, GroupRecord] = {}

    def put_group(
        self, group: GroupRecord, *, events: Sequence[NewEvent] = (), term: Term | None = None
    ) -> GroupRecord:
        with self._groups_lock:
            if term is not None:
                self._fence_group(term)
            known = self._groups.get(group.name)
            if (known.version if known else 0) != group.version:
                raise group_conflict(group.name)
            kept = self._groups[group.name] = group.model_copy(update={"version": group.version + 1})
            self._emit_of_group("", events)
            self._wake_for_group(f"{GROUP_WAKE}{group.name}")
            return kept

    def group(self, name: str) -> GroupRecord:
        with self._groups_lock:
            if name not in self._groups:
                raise missing_group(name)
            return self._groups[name]

    def groups(self) -> list[GroupRecord]:
        with self._groups_lock:
            return [self._groups[name] for name in sorted(self._groups)]

    def unreadable_groups(self) -> dict[str, str]:
        return {}

    def remove_group(self, name: str, version: int) -> None:
        with self._groups_lock:
            if self.group(name).version != version:
                raise group_conflict(name)
            del self._groups[name]
