"""Doorbells, workers and the event stream, in Redis."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence

from coordinator.ledger.connection import BLOCK_S, Server
from coordinator.model.errors import UsageError
from coordinator.model.job import Event

FIRST_EVENT_ID = "0-0"
PAGE = 1000
"""Entries read at a time while looking for those of one job."""

_EVENT_ID = re.compile(r"\d{1,19}(-\d{1,19})?")


def checked_event_id(text: str) -> str:
    if _EVENT_ID.fullmatch(text) is None:
        raise UsageError(f"{text!r} is no event id", 'give the "id" of an event, or 0 for the oldest')
    return text


class RedisFleet:
    _server: Server

    def ring(self, role: str, bells: Sequence[str], limit: int, ttl_ms: int) -> list[str]:
        return list(self._server.run("ring", role, limit, ttl_ms, *bells))

    def woken(self, role: str, bell: str) -> None:
        with self._server.errors():
            self._server.redis.zrem(self._server.keys.bells(role), bell)

    def worker_alive(self, worker: str, role: str, slots: int, ttl_ms: int) -> None:
        self._server.ask("worker_alive", worker, role, slots, ttl_ms)

    def worker_gone(self, worker: str) -> None:
        self._server.ask("worker_gone", worker)

    def workers(self) -> dict[str, int]:
        return {worker: int(facts.split(" ", 1)[0]) for worker, facts in self._server.ask("workers")}


class RedisEvents:
    _server: Server

    def events(self, after: str = "0", *, limit: int = 100, wait_s: float = 0.0, job_id: str = "") -> list[Event]:
        position, deadline = checked_event_id(after), time.monotonic() + wait_s
        found: list[Event] = []
        with self._server.errors():
            while len(found) < limit:
                left = deadline - time.monotonic()
                block = max(1, int(min(left, BLOCK_S) * 1000)) if left > 0 and not found else None
                count = PAGE if job_id else limit
                answer = self._server.redis.xread({self._server.keys.events: position}, count, block)
                entries = answer[0][1] if answer else []
                passing = (_event(entry_id, fields) for entry_id, fields in entries)
                found += [event for event in passing if job_id in ("", event["job"])]
                if entries:
                    position = entries[-1][0]
                if len(entries) < count and (found or deadline <= time.monotonic()):
                    break
        return found[:limit]

    def last_event_id(self) -> str:
        with self._server.errors():
            newest = self._server.redis.xrevrange(self._server.keys.events, count=1)
        return str(newest[0][0]) if newest else FIRST_EVENT_ID


def _event(entry_id: str, fields: dict[str, str]) -> Event:
    return {
        "id": entry_id,
        "time": float(fields["time"]),
        "event": fields["event"],
        "job": fields["job"],
        "data": json.loads(fields["data"]),
    }
