"""Jobs, leadership and the server's run, in Redis."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.ledger.connection import BLOCK_S, Server
from coordinator.ledger.contract import ConflictError, DeposedError, NewEvent, NewUnit, Term, Versioned
from coordinator.ledger.records import (
    UPDATE_FIELDS,
    checked,
    events_of,
    fields_of,
    pairs,
    record_of,
    spec_text,
)
from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.job import JobRecord, JobSpec, State

SURPLUS_JOBS = 100
"""Jobs that one call of surplus names: the control loop dismisses them between two looks at the others."""


def deposed(term: Term) -> DeposedError:
    return DeposedError(
        f"another coordinator leads, or the ledger's server was restarted since (this one has generation"
        f" {term.generation})"
    )


def fence_of(term: Term | None) -> tuple[int | str, str]:
    """As scripts take it; empty for steps of users, which no term fences."""
    return (term.generation, term.nonce) if term else ("", "")


def missing(job_id: str) -> NotFoundError:
    return NotFoundError(f"there is no job {job_id!r}", "see flushpoint jobs")


def conflict(job_id: str) -> ConflictError:
    return ConflictError(f"job {job_id!r} changed meanwhile", "do the same once more")


def refused_spec(job_id: str) -> RefusedError:
    return RefusedError(f"job {job_id!r} exists with another specification", "choose another id or idempotency key")


def not_concluded(job_id: str, state: str) -> RefusedError:
    return RefusedError(f"job {job_id!r} is {state}, not concluded", "cancel it first, or wait for its end")


class RedisLeadership:
    _server: Server

    def run_is_known(self) -> bool:
        return bool(self._server.ask("run_is_known"))

    def adopt_run(self, term: Term, hold_ms: int) -> int:
        count: int = self._server.run("adopt_run", term.generation, term.nonce, hold_ms)
        if count < 0:
            raise deposed(term)
        return count

    def lead(self, nonce: str, ttl_ms: int, at_least: int = 0) -> Term | None:
        generation = self._server.ask("lead", nonce, ttl_ms, at_least)
        return Term(generation, nonce) if generation else None

    def led(self) -> bool:
        return bool(self._server.ask("led"))

    def resign(self, term: Term) -> None:
        self._server.ask("resign", term.generation, term.nonce)


class RedisJobs:
    _server: Server

    def submit(self, job_id: str, spec: JobSpec, idempotency_key: str = "", term: Term | None = None) -> JobRecord:
        fresh = JobRecord(id=job_id, spec=spec, speed=spec.speed)
        fields = fresh.model_dump(exclude={"id", "spec", "created_at"})
        run = self._server.run if term else self._server.run_flushed
        answer = run("submit", job_id, spec_text(spec), idempotency_key, *fence_of(term), *fields_of(fields))
        if answer[0] == "deposed" and term is not None:
            raise deposed(term)
        if answer[0] == "refused":
            raise refused_spec(answer[1])
        return record_of(pairs(answer[1]))

    def job(self, job_id: str) -> Versioned:
        with self._server.errors():
            fields = self._server.redis.hgetall(self._server.keys.job(job_id))
        if not fields:
            raise missing(job_id)
        return Versioned(record_of(fields), int(fields["version"]))

    def jobs(self, *, after: str = "", limit: int = 100) -> list[JobRecord]:
        keys, redis = self._server.keys, self._server.redis
        with self._server.errors():
            first = 0
            if after:
                rank = redis.zrevrank(keys.jobs, after)
                if rank is None:
                    raise missing(after)
                first = int(rank) + 1
            ids = redis.zrevrange(keys.jobs, first, first + limit - 1) if limit > 0 else []
        return list(self.jobs_named(ids).values())

    def jobs_named(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        with self._server.errors():
            pipe = self._server.redis.pipeline(transaction=False)
            for job_id in ids:
                pipe.hgetall(self._server.keys.job(job_id))
            found = pipe.execute()
        return {job_id: record_of(fields) for job_id, fields in zip(ids, found, strict=True) if fields}

    def active_jobs(self) -> list[str]:
        with self._server.errors():
            return sorted(self._server.redis.smembers(self._server.keys.active))

    def surplus(self, keep: int) -> list[str]:
        keys, redis = self._server.keys, self._server.redis
        with self._server.errors():
            surplus = min(redis.zcard(keys.concluded) - keep, SURPLUS_JOBS)
            return list(redis.zrange(keys.concluded, 0, surplus - 1)) if surplus > 0 else []

    def update(
        self,
        job_id: str,
        version: int,
        changes: Mapping[str, Any],
        *,
        events: Sequence[NewEvent] = (),
        new_unit: NewUnit | None = None,
        drop_units: bool = False,
        retry_quarantined: bool = False,
        term: Term | None = None,
    ) -> JobRecord:
        fields = fields_of(checked(changes, UPDATE_FIELDS))
        answer = self._server.run(
            "update",
            job_id,
            version,
            *fence_of(term),
            int(drop_units),
            int(retry_quarantined),
            str(new_unit.kind) if new_unit else "",
            new_unit.pass_number if new_unit else 0,
            len(fields) // 2,
            *fields,
            *events_of(events),
        )
        if answer[0] == "deposed" and term is not None:
            raise deposed(term)
        if answer[0] == "missing":
            raise missing(job_id)
        if answer[0] == "conflict":
            raise conflict(job_id)
        return record_of(pairs(answer[1]))

    def dismiss(self, job_id: str, version: int, term: Term | None = None) -> None:
        answer = self._server.run("dismiss", job_id, version, *fence_of(term))
        if answer == "deposed" and term is not None:
            raise deposed(term)
        if answer == "missing":
            raise missing(job_id)
        if answer == "conflict":
            raise conflict(job_id)
        if answer != "ok":
            raise not_concluded(job_id, State(answer))

    def next_wake(self, timeout_s: float) -> str | None:
        key, deadline = self._server.keys.wake, time.monotonic() + timeout_s
        with self._server.errors():
            while True:
                if popped := self._server.redis.zpopmin(key):
                    return str(popped[0][0])
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                # A timeout of 0 would be for ever.
                if woken := self._server.redis.bzpopmin(key, max(0.001, min(left, BLOCK_S))):
                    return str(woken[1])
