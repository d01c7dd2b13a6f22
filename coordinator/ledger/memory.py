"""The ledger in this process's memory: the same semantics as in Redis, for tests. Thread-safe.

The twin test (tests/contract/test_ledger_twins.py) holds it to the Lua scripts' behaviour step by step.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.ledger.contract import Finished, NewEvent, NewUnit, SuspectUnit, Term, Versioned
from coordinator.ledger.memory_epochs import MemoryEpochs
from coordinator.ledger.memory_groups import MemoryGroups
from coordinator.ledger.memory_points import MemoryPoints
from coordinator.ledger.records import OPENED_FIELDS, RELEASE_FIELDS, UPDATE_FIELDS, checked
from coordinator.ledger.redis_fleet import FIRST_EVENT_ID, checked_event_id
from coordinator.ledger.redis_jobs import SURPLUS_JOBS, conflict, deposed, missing, not_concluded, refused_spec
from coordinator.ledger.redis_units import READY_BOUND, REAP_UNITS, empty_release, error_in
from coordinator.model.events import EventName
from coordinator.model.extent import pack_extents
from coordinator.model.job import Event, JobRecord, JobSpec, State
from coordinator.model.progress import RATE_WINDOW_S
from coordinator.model.units import Claim, Directive, PlannedUnit, QuarantinedUnit, UnitKind

_DONE_MS = 3_600_000
_IDEMPOTENCY_MS = 86_400_000
_EVENTS = 100_000
_RUNS = frozenset({State.RUNNING, State.READY, State.WAITING})
_RECORDED = {
    UnitKind.PLAN: "plan_done",
    UnitKind.SETTLE: "settled",
    UnitKind.TASK: "settled",
    UnitKind.PUBLISH: "published",
    UnitKind.ABANDON: "abandoned",
}


@dataclass(slots=True)
class _Unit:
    """As the hash unit:JOB/UNIT of keys.py."""

    kind: UnitKind
    pass_number: int
    start: int = 0
    end: int = 0
    bytes: int = 0
    extents: str = ""
    remaining: str = ""
    counted: int = 0
    token: str = ""
    """Not empty while leased."""
    until: int = 0
    failures: int = 0
    expired: int = 0
    expired_at: int = 0
    digest: str = ""
    cause: Mapping[str, Any] | None = None
    """Data of the event it was given up with."""
    rewrite: bool = False
    spoilt: bool = False
    """Of the lease: ends with it."""
    done: bool = False


@dataclass(slots=True)
class _Job:
    record: JobRecord
    version: int
    incarnation: int
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    units: dict[str, _Unit] = field(default_factory=dict)
    ready: deque[str] = field(default_factory=deque)
    claims: int = 0
    leased: dict[str, int] = field(default_factory=dict)
    """Leased copy units by the number of their claim, which is their order too."""
    recent: dict[str, int] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)
    results: list[str] = field(default_factory=list)
    quarantined: set[str] = field(default_factory=set)

    @property
    def may_run(self) -> bool:
        job = self.record
        if job.state is State.ABORTING and job.closing:
            return True
        return job.state in _RUNS and not (job.pause_requested or job.cancel_requested or job.fatal)

    @property
    def claimable(self) -> int:
        """How many units could be claimed now."""
        if not self.may_run:
            return 0
        if self.record.max_writers == 0:
            return len(self.ready)
        return max(0, min(len(self.ready), self.record.max_writers - self.record.units_leased))

    def held(self, unit_id: str, token: str) -> _Unit | None:
        unit = self.units.get(unit_id)
        return unit if unit is not None and token != "" and unit.token == token else None


@dataclass(slots=True)
class _Bucket:
    level: float
    at_us: int
    speed: int


class MemoryLedger(MemoryPoints, MemoryGroups, MemoryEpochs):
    """`clock` gives seconds and may be any function that does not go back."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())
        MemoryPoints.__init__(self, self._changed, clock, self._emit)
        MemoryGroups.__init__(self, self._changed, self._fence, self._emit, self._wake)
        MemoryEpochs.__init__(self, self._changed, clock, self._fence, self.run_is_known, lambda: self._run, self._wake)
        self._targets: dict[str, str] = {}
        self._run = 1
        self._adopted_run = 0
        self._hold_until = 0
        self._generation = 0
        self._leader = ""
        self._leads_until = 0
        self._jobs: dict[str, _Job] = {}
        self._concluded: dict[str, None] = {}
        self._idempotency: dict[str, tuple[str, int]] = {}
        self._incarnations = itertools.count(1)
        self._turns = itertools.count(1)
        self._runnable: dict[str, int] = {}
        self._leases: dict[tuple[str, str], int] = {}
        self._delayed: dict[tuple[str, str], int] = {}
        self._done: dict[str, tuple[str, str, int]] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._wakes: dict[str, None] = {}
        self._bells: dict[str, dict[str, int]] = {}
        self._workers: dict[str, tuple[int, int]] = {}
        self._events: deque[Event] = deque(maxlen=_EVENTS)

    def close(self) -> None:
        """Nothing to close; there so that both ledgers can be closed."""

    # -- the server -------------------------------------------------------------------------------------------
    def ping(self) -> None:
        """Always answers."""

    def shortcomings(self) -> list[str]:
        return []

    def restart(self) -> None:
        """As if the server had restarted without losing a write."""
        with self._changed:
            self._run += 1

    def run_is_known(self) -> bool:
        with self._changed:
            return self._run == self._adopted_run

    def adopt_run(self, term: Term, hold_ms: int) -> int:
        with self._changed:
            self._check_leader(term)
            self._hold_until = self._now_ms() + (hold_ms if self._adopted_run else 0)
            self._adopted_run = self._run
            over = sorted(self._leases, key=lambda member: (self._leases[member], "/".join(member)))
            for job_id, unit_id in over:
                job = self._jobs[job_id]
                self._drop_lease(job, unit_id)
                job.units[unit_id].expired += 1
                job.units[unit_id].expired_at = self._hold_until
                job.record.units_ready += 1
                job.ready.append(unit_id)
                self._refresh(job)
            return len(over)

    # -- leadership -------------------------------------------------------------------------------------------
    def lead(self, nonce: str, ttl_ms: int, at_least: int = 0) -> Term | None:
        with self._changed:
            if self._leader not in ("", nonce) and self._leads_until > self._now_ms():
                return None
            if self._leader != nonce or self._generation <= at_least:
                self._generation = max(self._generation, at_least) + 1
            self._leader = nonce
            self._leads_until = self._now_ms() + ttl_ms
            return Term(self._generation, nonce)

    def led(self) -> bool:
        with self._changed:
            return self._leader != "" and self._leads_until > self._now_ms()

    def resign(self, term: Term) -> None:
        with self._changed:
            if term == Term(self._generation, self._leader):
                self._leader = ""
                if not self._held_back() and not self._leases:
                    self._adopted_run = 0

    # -- jobs -------------------------------------------------------------------------------------------------
    def submit(self, job_id: str, spec: JobSpec, idempotency_key: str = "", term: Term | None = None) -> JobRecord:
        with self._changed:
            if term is not None:
                self._fence(term)
            known, until = self._idempotency.get(idempotency_key, ("", 0))
            if known in self._jobs and until > self._now_ms():
                job_id = known
            job = self._jobs.get(job_id)
            if job is not None and job.record.spec != spec:
                raise refused_spec(job_id)
            if job is None:
                record = JobRecord(id=job_id, spec=spec, speed=spec.speed, created_at=self._clock())
                job = self._jobs[job_id] = _Job(record, 1, next(self._incarnations))
                self._emit(job_id, [_status("created")])
                self._wake(job_id)
            if idempotency_key:
                self._idempotency[idempotency_key] = (job_id, self._now_ms() + _IDEMPOTENCY_MS)
            return job.record.model_copy()

    def job(self, job_id: str) -> Versioned:
        with self._changed:
            job = self._known(job_id)
            return Versioned(job.record.model_copy(), job.version)

    def jobs_named(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        with self._changed:
            return {job_id: self._jobs[job_id].record.model_copy() for job_id in ids if job_id in self._jobs}

    def jobs(self, *, after: str = "", limit: int = 100) -> list[JobRecord]:
        with self._changed:
            ids = list(reversed(self._jobs))
            first = ids.index(self._known(after).record.id) + 1 if after else 0
            return [self._jobs[job_id].record.model_copy() for job_id in ids[first : first + limit]]

    def active_jobs(self) -> list[str]:
        with self._changed:
            return sorted(job_id for job_id, job in self._jobs.items() if job.record.state is not State.CONCLUDED)

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
        checked(changes, UPDATE_FIELDS)
        with self._changed:
            if term is not None:
                self._fence(term)
            job = self._versioned(job_id, version)
            before, old_speed = job.record.state, job.record.speed
            if drop_units:
                self._forget_units(job)
            if retry_quarantined:
                self._retry_quarantined(job)
            self._change(job, changes)
            if job.record.state is not before or job.record.speed != old_speed or drop_units:
                self._restart_rate(job)
            if job.record.state is not before:
                self._concluded.pop(job_id, None)
                if job.record.state is State.CONCLUDED:
                    self._concluded[job_id] = None
                    self._targets = {target: owner for target, owner in self._targets.items() if owner != job_id}
            changed = [_status(job.record.state)] if job.record.state is not before else []
            concluded = job.record.state is State.CONCLUDED
            self._emit(job_id, [*events, *changed] if concluded else [*changed, *events])
            if new_unit is not None:
                self._create_unit(job, _Unit(new_unit.kind, new_unit.pass_number))
            self._refresh(job)
            self._announce(job)
            return job.record.model_copy()

    def surplus(self, keep: int) -> list[str]:
        with self._changed:
            return list(self._concluded)[: max(0, len(self._concluded) - keep)][:SURPLUS_JOBS]

    def dismiss(self, job_id: str, version: int, term: Term | None = None) -> None:
        with self._changed:
            if term is not None:
                self._fence(term)
            job = self._versioned(job_id, version)
            if job.record.state is not State.CONCLUDED:
                raise not_concluded(job_id, job.record.state)
            self._forget_units(job)
            for known in (self._jobs, self._concluded, self._runnable, self._wakes, self._buckets):
                known.pop(job_id, None)
            self._emit(job_id, [_status("null")])

    def next_wake(self, timeout_s: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._wakes, timeout_s)
            if not self._wakes:
                return None
            job_id = next(iter(self._wakes))
            del self._wakes[job_id]
            return job_id

    # -- units ------------------------------------------------------------------------------------------------
    def claim(self, worker: str, token: str, lease_ms: int) -> Claim | None:
        with self._changed:
            if self._held_back() or not self._runnable:
                return None
            job_id = min(self._runnable, key=self._runnable.__getitem__)
            job = self._jobs[job_id]
            unit_id = job.ready.popleft()
            unit = job.units[unit_id]
            claim = Claim(
                job_id=job_id,
                unit_id=unit_id,
                kind=unit.kind,
                pass_number=unit.pass_number,
                token=token,
                lease_ms=lease_ms,
                start=unit.start,
                end=unit.end,
                extents=unit.remaining or unit.extents,
                failures=unit.failures,
                expired=unit.expired,
                rewrite=unit.rewrite,
            )
            if unit.bytes:
                job.claims += 1
                job.leased[unit_id] = job.claims
            unit.token = token
            unit.until = self._leases[job_id, unit_id] = self._now_ms() + lease_ms
            job.record.units_ready -= 1
            job.record.units_leased += 1
            del self._runnable[job_id]
            self._refresh(job)
            return claim

    def renew(self, job_id: str, unit_id: str, token: str, lease_ms: int) -> Directive:
        with self._changed:
            job, unit = self._held(job_id, unit_id, token)
            if job is None or unit is None:
                return Directive(held=False, run=False, speed=0)
            unit.until = self._leases[job_id, unit_id] = self._now_ms() + lease_ms
            force = job.record.cancel_requested == "force"
            return Directive(held=True, run=job.may_run, speed=job.record.speed, force=force)

    def opened(self, job_id: str, unit_id: str, token: str, facts: Mapping[str, Any]) -> bool:
        checked(facts, OPENED_FIELDS)
        with self._changed:
            job, unit = self._held(job_id, unit_id, token)
            if job is None or unit is None:
                return False
            self._change(job, facts)
            self._refresh(job)
            self._announce(job)
            return True

    def reserve(self, job_id: str, unit_id: str, token: str, target: str) -> str | None:
        with self._changed:
            job, unit = self._held(job_id, unit_id, token)
            if job is None or unit is None:
                return None
            owner = self._targets.get(target, job_id)
            known = self._jobs.get(owner)
            if owner != job_id and known is not None and known.record.state is not State.CONCLUDED:
                return owner
            self._targets[target] = job_id
            return job_id

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
        with self._changed:
            job, plan = self._held(job_id, unit_id, token)
            if job is None or plan is None or plan.kind is not UnitKind.PLAN:
                return False
            if job.record.plan_cursor != cursor:
                return False
            for planned in units:
                extents = pack_extents(planned.extents)
                self._create_unit(
                    job, _Unit(kind, plan.pass_number, planned.start, planned.end, planned.bytes, extents)
                )
                job.record.len += planned.bytes
            job.record.plan_cursor = new_cursor
            self._refresh(job)
            self._wake(job_id)
            return True

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
        with self._changed:
            job, unit = self._held(job_id, unit_id, token)
            if job is None or unit is None:
                before = self._done.get(token, ("", "", 0))
                known = before[:2] == (job_id, unit_id) and before[2] > self._now_ms()
                return Finished.ALREADY if known else Finished.STALE
            if unit.spoilt:
                self._drop_lease(job, unit_id)
                job.record.units_ready += 1
                job.ready.append(unit_id)
                self._announce_if_idle(job)
                self._refresh(job)
                return Finished.AGAIN
            self._complete_unit(job, unit_id, token, digest)
            self._count_bytes(job, bytes_read, bytes_sent)
            if result:
                job.results.append(result)
            if unit.kind in _RECORDED:
                setattr(job.record, _RECORDED[unit.kind], True)
                self._announce(job)
            else:
                self._announce_if_idle(job)
            self._refresh(job)
            return Finished.DONE

    def results(self, job_id: str) -> list[str]:
        with self._changed:
            known = self._jobs.get(job_id)
            return list(known.results) if known is not None else []

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
        checked(changes or {}, RELEASE_FIELDS)
        with self._changed:
            job, unit = self._held(job_id, unit_id, token)
            if job is None or unit is None:
                return False
            if unit.bytes and not remaining:
                raise empty_release(job_id, unit_id)
            if unit.bytes and not unit.expired and not unit.spoilt:
                done = min(done_bytes, unit.bytes - unit.counted)
                unit.remaining = remaining
                unit.counted += done
                self._advance(job, done)
                if done > 0:
                    job.recent[unit_id] = job.claims
            self._count_bytes(job, bytes_read, bytes_sent)
            unit.failures += int(count_attempt)
            if unit.bytes and flush_failed:
                self._lose_flush(job, unit_id)
            self._drop_lease(job, unit_id)
            self._change(job, changes or {})
            if 0 < max_attempts <= unit.failures:
                self._quarantine(job, unit_id, events[-1].data if events else None)
            else:
                job.record.units_ready += 1
                if delay_ms > 0:
                    self._delayed[job_id, unit_id] = self._now_ms() + delay_ms
                else:
                    job.ready.append(unit_id)
                if changes:
                    self._announce(job)
                else:
                    self._announce_if_idle(job)
            self._emit(job_id, events)
            self._refresh(job)
            return True

    def reap(self, term: Term, max_attempts: int) -> list[str]:
        with self._changed:
            self._fence(term)
            made_ready = []
            for job_id, unit_id in self._due(self._leases):
                job, unit = self._jobs[job_id], self._jobs[job_id].units[unit_id]
                self._drop_lease(job, unit_id)
                unit.expired += 1
                unit.expired_at = self._now_ms()
                unit.failures += 1
                if 0 < max_attempts <= unit.failures:
                    self._quarantine(job, unit_id)
                else:
                    job.record.units_ready += 1
                    job.ready.append(unit_id)
                    made_ready.append(f"{job_id}/{unit_id}")
                    self._announce_if_idle(job)
                self._refresh(job)
            for job_id, unit_id in self._due(self._delayed):
                del self._delayed[job_id, unit_id]
                self._jobs[job_id].ready.append(unit_id)
                self._refresh(self._jobs[job_id])
                made_ready.append(f"{job_id}/{unit_id}")
            return made_ready

    def suspects(self, job_id: str, unit_id: str, token: str, quarantine_ms: int) -> list[SuspectUnit]:
        with self._changed:
            job, holder = self._held(job_id, unit_id, token)
            if job is None or holder is None:
                return []
            found = []
            for suspect_id in sorted(job.suspects):
                unit = job.units[suspect_id]
                wait = max(0, unit.expired_at + quarantine_ms - self._now_ms())
                found.append(SuspectUnit(suspect_id, unit.remaining or unit.extents, unit.digest, wait))
            return found

    def redo(self, job_id: str, unit_id: str, token: str, suspects: Sequence[str], max_attempts: int = 0) -> bool:
        with self._changed:
            job, holder = self._held(job_id, unit_id, token)
            if job is None or holder is None or holder.kind is not UnitKind.SETTLE:
                return False
            for suspect_id in suspects:
                if suspect_id not in job.suspects:
                    continue
                job.suspects.discard(suspect_id)
                unit = job.units[suspect_id]
                self._undo(job, unit)
                job.record.units_done -= 1
                unit.failures += 1
                if 0 < max_attempts <= unit.failures:
                    self._quarantine(job, suspect_id)
                else:
                    job.record.units_ready += 1
                    job.ready.append(suspect_id)
            self._complete_unit(job, unit_id, token, "")
            self._announce(job)
            self._refresh(job)
            return True

    def quarantined(self, job_id: str) -> list[QuarantinedUnit]:
        with self._changed:
            job = self._jobs.get(job_id)
            units = [job.units[unit_id] for unit_id in job.quarantined] if job is not None else []
            return sorted(QuarantinedUnit(u.start, u.end, u.kind, u.failures, error_in(u.cause)) for u in units)

    def take(self, job_id: str, want: int, speed: int, burst: int) -> int:
        if speed <= 0:
            return 0
        with self._changed:
            now_us = int(self._clock() * 1_000_000)
            bucket = self._buckets.setdefault(job_id, _Bucket(burst, now_us, speed))
            gained = max(0, now_us - bucket.at_us) * bucket.speed / 1_000_000
            level = min(burst, bucket.level + gained) - want
            self._buckets[job_id] = _Bucket(level, now_us, speed)
            return -int(level * 1000 // speed) if level < 0 else 0

    def work_is_ready(self) -> int:
        with self._changed:
            if self._held_back():
                return 0
            return min(READY_BOUND, sum(self._jobs[job_id].claimable for job_id in self._runnable))

    # -- doorbells and workers --------------------------------------------------------------------------------
    def ring(self, role: str, bells: Sequence[str], limit: int, ttl_ms: int) -> list[str]:
        with self._changed:
            now = self._now_ms()
            known = self._bells.get(role, {})
            outstanding = {bell: rung for bell, rung in known.items() if rung > now - ttl_ms}
            chosen = list(bells[: max(0, limit - len(outstanding))])
            self._bells[role] = {**outstanding, **dict.fromkeys(chosen, now)}
            return chosen

    def woken(self, role: str, bell: str) -> None:
        with self._changed:
            self._bells.get(role, {}).pop(bell, None)

    def worker_alive(self, worker: str, role: str, slots: int, ttl_ms: int) -> None:
        with self._changed:
            self._workers[worker] = (slots, self._now_ms() + ttl_ms)

    def worker_gone(self, worker: str) -> None:
        with self._changed:
            self._workers.pop(worker, None)

    def workers(self) -> dict[str, int]:
        with self._changed:
            now = self._now_ms()
            return {worker: slots for worker, (slots, until) in self._workers.items() if until > now}

    # -- events -----------------------------------------------------------------------------------------------
    def events(self, after: str = "0", *, limit: int = 100, wait_s: float = 0.0, job_id: str = "") -> list[Event]:
        start = _position(checked_event_id(after))

        def found() -> list[Event]:
            passed = (event for event in self._events if _position(event["id"]) > start)
            return [dict(event) for event in passed if job_id in ("", event["job"])][:limit]

        with self._changed:
            return self._changed.wait_for(found, wait_s)

    def last_event_id(self) -> str:
        with self._changed:
            return str(self._events[-1]["id"]) if self._events else FIRST_EVENT_ID

    # -- what steps are made of; the functions of scripts/prelude.lua ----------------------------------------
    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _fence(self, term: Term) -> None:
        self._check_leader(term)
        if self._adopted_run not in (0, self._run):
            raise deposed(term)

    def _check_leader(self, term: Term) -> None:
        if term != Term(self._generation, self._leader):
            raise deposed(term)

    def _held_back(self) -> bool:
        return self._run != self._adopted_run or self._hold_until > self._now_ms()

    def _known(self, job_id: str) -> _Job:
        if job_id not in self._jobs:
            raise missing(job_id)
        return self._jobs[job_id]

    def _versioned(self, job_id: str, version: int) -> _Job:
        job = self._known(job_id)
        if job.version != version:
            raise conflict(job_id)
        return job

    def _held(self, job_id: str, unit_id: str, token: str) -> tuple[_Job | None, _Unit | None]:
        job = self._jobs.get(job_id)
        return job, job.held(unit_id, token) if job is not None else None

    def _change(self, job: _Job, changes: Mapping[str, Any]) -> None:
        job.record = JobRecord.model_validate({**dict(job.record), **changes})

    def _wake(self, job_id: str) -> None:
        self._wakes.setdefault(job_id)
        self._changed.notify_all()

    def _announce(self, job: _Job) -> None:
        job.version += 1
        self._wake(job.record.id)

    def _announce_if_idle(self, job: _Job) -> None:
        if job.record.units_leased == 0 and (job.record.units_ready == 0 or not job.may_run):
            self._announce(job)

    def _emit(self, job_id: str, events: Sequence[NewEvent]) -> None:
        for event in events:
            last_ms, last_number = _position(self.last_event_id())
            now_ms = max(last_ms, self._now_ms())
            self._events.append(
                {
                    "id": f"{now_ms}-{last_number + 1 if now_ms == last_ms else 0}",
                    "time": self._clock(),
                    "event": str(event.name),
                    "job": job_id,
                    "data": dict(event.data),
                }
            )
        self._changed.notify_all()

    def _refresh(self, job: _Job) -> None:
        job_id = job.record.id
        if job.claimable == 0:
            self._runnable.pop(job_id, None)
        elif job_id not in self._runnable:
            self._runnable[job_id] = next(self._turns)

    def _create_unit(self, job: _Job, unit: _Unit) -> None:
        unit_id = f"{job.incarnation}-{next(job.numbers)}"
        job.units[unit_id] = unit
        job.ready.append(unit_id)
        job.record.units_ready += 1

    def _drop_lease(self, job: _Job, unit_id: str) -> None:
        job.units[unit_id].token = ""
        job.units[unit_id].spoilt = False
        job.leased.pop(unit_id, None)
        del self._leases[job.record.id, unit_id]
        job.record.units_leased -= 1
        oldest = next(iter(job.leased.values()), job.claims + 1)
        for known in [known for known, number in job.recent.items() if number < oldest]:
            del job.recent[known]
            if job.units[known].done and not job.units[known].expired:
                del job.units[known]

    def _undo(self, job: _Job, unit: _Unit) -> None:
        job.record.offset -= unit.counted
        unit.remaining, unit.digest, unit.counted, unit.done = "", "", 0, False

    def _lose_flush(self, job: _Job, told: str) -> None:
        job.units[told].rewrite = True
        for unit_id in job.leased.keys() - {told}:
            unit = job.units[unit_id]
            self._undo(job, unit)
            unit.rewrite = unit.spoilt = True
        for number, unit_id in sorted((number, unit_id) for unit_id, number in job.recent.items()):
            unit = job.units[unit_id]
            if number < job.leased[told] or unit.token:
                continue
            was_done = unit.done
            self._undo(job, unit)
            unit.rewrite = True
            if was_done:
                job.suspects.discard(unit_id)
                job.record.units_done -= 1
                job.record.units_ready += 1
                job.ready.append(unit_id)

    def _restart_rate(self, job: _Job) -> None:
        record, now = job.record, self._clock()
        record.progress_at = record.rate_from_at = record.rate_mark_at = now
        record.rate_from_offset = record.rate_mark_offset = record.offset

    def _advance(self, job: _Job, count: int) -> None:
        if count == 0:
            return
        record, now = job.record, self._clock()
        record.offset += count
        record.active_s += max(0.0, now - record.progress_at)
        record.progress_at = now
        if now - record.rate_mark_at >= RATE_WINDOW_S:
            record.rate_from_at, record.rate_from_offset = record.rate_mark_at, record.rate_mark_offset
            record.rate_mark_at, record.rate_mark_offset = now, record.offset

    def _retry_quarantined(self, job: _Job) -> None:
        for unit_id in sorted(job.quarantined, key=lambda unit_id: int(unit_id.rpartition("-")[2])):
            job.units[unit_id].failures = 0
            job.ready.append(unit_id)
        job.record.units_ready += len(job.quarantined)
        job.record.units_quarantined = 0
        job.quarantined.clear()

    def _quarantine(self, job: _Job, unit_id: str, cause: Mapping[str, Any] | None = None) -> None:
        job.units[unit_id].cause = cause
        job.quarantined.add(unit_id)
        job.record.units_quarantined += 1
        self._announce(job)

    def _count_bytes(self, job: _Job, bytes_read: int, bytes_sent: int) -> None:
        job.record.bytes_read += bytes_read
        job.record.bytes_sent += bytes_sent
        job.record.pass_sent += bytes_sent

    def _complete_unit(self, job: _Job, unit_id: str, token: str, digest: str) -> None:
        unit = job.units[unit_id]
        self._advance(job, unit.bytes - unit.counted)
        job.record.units_done += 1
        self._done[token] = (job.record.id, unit_id, self._now_ms() + _DONE_MS)
        if unit.bytes:
            unit.counted, unit.digest, unit.done = unit.bytes, digest, True
            if unit.expired:
                job.suspects.add(unit_id)
            job.recent[unit_id] = job.claims
            self._drop_lease(job, unit_id)
        else:
            self._drop_lease(job, unit_id)
            del job.units[unit_id]

    def _forget_units(self, job: _Job) -> None:
        for known in (self._leases, self._delayed):
            for member in [member for member in known if member[0] == job.record.id]:
                del known[member]
        job.units.clear()
        job.ready.clear()
        job.leased.clear()
        job.recent.clear()
        job.claims = 0
        job.suspects.clear()
        job.results.clear()
        job.quarantined.clear()
        job.incarnation, job.numbers = next(self._incarnations), itertools.count(1)
        job.record.units_ready = job.record.units_leased = 0
        job.record.units_done = job.record.units_quarantined = 0

    def _due(self, times: Mapping[tuple[str, str], int]) -> list[tuple[str, str]]:
        now = self._now_ms()
        due = [member for member, at in times.items() if at <= now]
        return sorted(due, key=lambda member: (times[member], "/".join(member)))[:REAP_UNITS]


def _status(status: str) -> NewEvent:
    return NewEvent(EventName.JOB_STATUS_CHANGE, {"status": str(status)})


def _position(event_id: str) -> tuple[int, int]:
    ms, _, number = event_id.partition("-")
    return int(ms), int(number or 0)
