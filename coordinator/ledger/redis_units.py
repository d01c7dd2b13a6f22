"""Work units, in Redis."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.ledger.connection import Server
from coordinator.ledger.contract import Finished, NewEvent, SuspectUnit, Term
from coordinator.ledger.records import OPENED_FIELDS, RELEASE_FIELDS, checked, events_of, fields_of
from coordinator.ledger.redis_jobs import deposed
from coordinator.model.extent import pack_extents
from coordinator.model.units import Claim, Directive, PlannedUnit, QuarantinedUnit, UnitKind

READY_BOUND = 1000
"""work_is_ready stops counting here."""
REAP_UNITS = 1000
"""Units that one reap handles of each kind: a script blocks the server while it runs."""
SWEEP_UNITS = 2000
"""Forgotten units that one reap sweeps: one UNLINK of them, and Lua unpacks no more than about 8000."""


def empty_release(job_id: str, unit_id: str) -> ValueError:
    return ValueError(f"unit {unit_id} of job {job_id} has nothing left: finish it instead of releasing it")


def error_in(event: Any) -> str:
    """What the data of an event says about why a unit was given back."""
    return str(event.get("error", "")) if event else ""


class RedisUnits:
    _server: Server

    def claim(self, worker: str, token: str, lease_ms: int) -> Claim | None:
        got = self._server.run("claim", worker, token, lease_ms)
        if not got:
            return None
        job_id, unit_id, kind, pass_number, start, end, extents, failures, expired, rewrite = got
        return Claim(
            job_id=job_id,
            unit_id=unit_id,
            kind=UnitKind(kind),
            pass_number=int(pass_number),
            token=token,
            lease_ms=lease_ms,
            start=int(start),
            end=int(end),
            extents=extents,
            failures=int(failures),
            expired=int(expired),
            rewrite=rewrite == "1",
        )

    def renew(self, job_id: str, unit_id: str, token: str, lease_ms: int) -> Directive:
        held, run, speed, force = self._server.ask("renew", job_id, unit_id, token, lease_ms)
        return Directive(held=bool(held), run=bool(run), speed=int(speed), force=bool(force))

    def opened(self, job_id: str, unit_id: str, token: str, facts: Mapping[str, Any]) -> bool:
        fields = fields_of(checked(facts, OPENED_FIELDS))
        return bool(self._server.run("opened", job_id, unit_id, token, *fields))

    def reserve(self, job_id: str, unit_id: str, token: str, target: str) -> str | None:
        owner = self._server.run("reserve", job_id, unit_id, token, target)
        return None if owner is None else str(owner)

    def add_units(
        self,
        job_id: str,
        unit_id: str,
        token: str,
        kind: UnitKind,
        cursor: int,
        new_cursor: int,
        units: Sequence[PlannedUnit],
    ) -> bool:
        args: list[str | int] = []
        for unit in units:
            args += (unit.start, unit.end, unit.bytes, pack_extents(unit.extents))
        return bool(self._server.run("add_units", job_id, unit_id, token, str(kind), cursor, new_cursor, *args))

    def finish(
        self,
        job_id: str,
        unit_id: str,
        token: str,
        *,
        bytes_read: int = 0,
        bytes_sent: int = 0,
        digest: str = "",
        result: str = "",
    ) -> Finished:
        return Finished(self._server.run("finish", job_id, unit_id, token, bytes_read, bytes_sent, digest, result))

    def results(self, job_id: str) -> list[str]:
        return [str(text) for text in self._server.run("results", job_id)]

    def release(
        self,
        job_id: str,
        unit_id: str,
        token: str,
        *,
        remaining: str,
        done_bytes: int,
        bytes_read: int,
        bytes_sent: int,
        count_attempt: bool,
        flush_failed: bool = False,
        delay_ms: int = 0,
        max_attempts: int = 0,
        events: Sequence[NewEvent] = (),
        changes: Mapping[str, Any] | None = None,
    ) -> bool:
        fields = fields_of(checked(changes or {}, RELEASE_FIELDS))
        answer = self._server.run(
            "release",
            job_id,
            unit_id,
            token,
            remaining,
            done_bytes,
            bytes_read,
            bytes_sent,
            int(count_attempt),
            int(flush_failed),
            delay_ms,
            max_attempts,
            len(fields) // 2,
            *fields,
            *events_of(events),
        )
        if answer == "empty":
            raise empty_release(job_id, unit_id)
        return bool(answer == "ok")

    def reap(self, term: Term, max_attempts: int) -> list[str]:
        answer = self._server.run("reap", term.generation, term.nonce, max_attempts, REAP_UNITS, SWEEP_UNITS)
        if answer[0] == "deposed":
            raise deposed(term)
        return list(answer[1:])

    def suspects(self, job_id: str, unit_id: str, token: str, quarantine_ms: int) -> list[SuspectUnit]:
        found = self._server.ask("suspects", job_id, unit_id, token, quarantine_ms)
        return sorted((SuspectUnit(*fields) for fields in found), key=lambda suspect: suspect.unit_id)

    def redo(self, job_id: str, unit_id: str, token: str, suspects: Sequence[str], max_attempts: int = 0) -> bool:
        return bool(self._server.run("redo", job_id, unit_id, token, max_attempts, *suspects))

    def quarantined(self, job_id: str) -> list[QuarantinedUnit]:
        return sorted(
            QuarantinedUnit(int(start), int(end), UnitKind(kind), int(failures), error_in(cause and json.loads(cause)))
            for start, end, kind, failures, cause in self._server.ask("quarantined", job_id)
        )

    def take(self, job_id: str, want: int, speed: int, burst: int) -> int:
        return int(self._server.run("take", job_id, want, speed, burst)) if speed > 0 else 0

    def work_is_ready(self) -> int:
        return int(self._server.ask("work_is_ready", READY_BOUND))
