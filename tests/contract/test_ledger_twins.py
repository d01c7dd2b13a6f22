"""The same random steps over both ledgers: everything that can be observed must be the same.

Leases last for hours, each 10 s longer than the one before, so that no order depends on a clock's ticks; what
time alone decides (delays, holds, the token bucket) is in test_ledger.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from coordinator.ledger import Ledger, MemoryLedger, NewEvent, NewUnit, RedisLedger, Term
from coordinator.model.errors import FlushpointError
from coordinator.model.events import EventName
from coordinator.model.extent import Extent, Status, pack_extents
from coordinator.model.job import JobSpec, State
from coordinator.model.units import Claim, PlannedUnit, UnitKind

HOUR_MS = 3_600_000
UNIT = 100

_jobs = st.sampled_from(["a", "b", "c"])
_which = st.integers(0, 40)
_bytes = st.integers(0, UNIT)
_running = st.sampled_from([State.RUNNING, State.READY, State.WAITING])
_states = st.one_of(_running, _running, _running, st.sampled_from(list(State)))


class Twins(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.redis = RedisLedger(self.url, prefix=f"{secrets.token_hex(4)}:")
        self.memory = MemoryLedger()
        self.claims: list[Claim] = []
        self.held: list[Claim] = []
        self.leases = 0
        self.term = Term(0, "")
        self.last_event = "0"
        self.lead("one", 0)
        self.adopt()
        for job_id in ("a", "b", "c"):
            self.submit(job_id, "", "/b")
            self.start(job_id, State.RUNNING)
        self.claim(3)
        for which in (0, 1, 2):
            self.add_units(which, 6, 0)

    def teardown(self) -> None:
        self.redis.close()

    def both(self, step: Callable[[Ledger], Any]) -> Any:
        """The result of a step, which must be the same, or the class of its error."""
        answers = []
        for ledger in (self.redis, self.memory):
            try:
                answers.append(step(ledger))
            except (FlushpointError, ValueError) as error:
                answers.append((type(error), str(error)))
        assert _observable(answers[0]) == _observable(answers[1])
        return answers[1]

    def version(self, job_id: str, off: int) -> int:
        try:
            return self.memory.job(job_id).version + off
        except FlushpointError:
            return 1

    def claimed(self, which: int, kind: UnitKind | None = None) -> Claim:
        """Three times of four a claim that is held, of `kind` where there is one; else any, even long over."""
        among = self.claims
        if which % 4:
            self.held = [c for c in self.held if self.renewed(c)]
            among = [c for c in self.held if c.kind is kind] or self.held or among
        return among[-1 - which % len(among)]

    @rule(job_id=_jobs, key=st.sampled_from(["", "", "k1", "k2"]), to=st.sampled_from(["/b", "/b", "/c"]))
    def submit(self, job_id: str, key: str, to: str) -> None:
        self.both(lambda ledger: ledger.submit(job_id, JobSpec(source="/a", target=to), key))

    @rule(
        job_id=_jobs,
        off=st.sampled_from([0, 0, 0, -1]),
        changes=st.fixed_dictionaries(
            {},
            optional={
                "state": _states,
                "pause_requested": st.booleans(),
                "cancel_requested": st.sampled_from(["", "", "soft"]),
                "max_writers": st.integers(0, 3),
                "speed": st.integers(0, 9),
                "plan_cursor": st.just(0),
            },
        ),
        kind=st.sampled_from([None, UnitKind.PLAN, UnitKind.SETTLE]),
        drop=st.sampled_from([False, False, False, True]),
        retry=st.booleans(),
        fenced=st.booleans(),
        event=st.booleans(),
    )
    def update(
        self,
        job_id: str,
        off: int,
        changes: dict[str, Any],
        kind: UnitKind | None,
        drop: bool,
        retry: bool,
        fenced: bool,
        event: bool,
    ) -> None:
        version = self.version(job_id, off)
        self.both(
            lambda ledger: ledger.update(
                job_id,
                version,
                changes,
                events=[NewEvent(EventName.BLOCK_JOB_READY, {"x": version})] if event else [],
                new_unit=NewUnit(kind, 1) if kind else None,
                drop_units=drop,
                retry_quarantined=retry,
                term=self.term if fenced else None,
            )
        )

    @rule(job_id=_jobs, state=_running)
    def start(self, job_id: str, state: State) -> None:
        version = self.version(job_id, 0)
        changes = {"state": state, "pause_requested": False, "cancel_requested": "", "plan_cursor": 0}
        self.both(lambda led: led.update(job_id, version, changes, new_unit=NewUnit(UnitKind.PLAN, 1)))

    @rule(job_id=_jobs, off=st.sampled_from([0, 0, -1]), fenced=st.booleans())
    def dismiss(self, job_id: str, off: int, fenced: bool) -> None:
        version = self.version(job_id, off)
        self.both(lambda ledger: ledger.dismiss(job_id, version, self.term if fenced else None))

    @rule(nonce=st.sampled_from(["one", "two"]), at_least=st.sampled_from([0, 0, 5]))
    def lead(self, nonce: str, at_least: int) -> None:
        self.term = self.both(lambda ledger: ledger.lead(nonce, HOUR_MS, at_least)) or self.term

    @rule(nonce=st.sampled_from(["one", "two"]), adopts=st.sampled_from([True, True, True, False]))
    def change_of_leader(self, nonce: str, adopts: bool) -> None:
        self.both(lambda ledger: ledger.resign(self.term))
        self.both(lambda ledger: ledger.reap(self.term, 1))
        self.lead(nonce, 0)
        if adopts and not self.both(lambda ledger: ledger.run_is_known()):
            self.adopt()

    @rule()
    def adopt(self) -> None:
        self.both(lambda ledger: ledger.adopt_run(self.term, 0))

    def renewed(self, claim: Claim) -> bool:
        lease_ms = self.lease_ms()
        directive = self.both(lambda ledger: ledger.renew(claim.job_id, claim.unit_id, claim.token, lease_ms))
        return bool(directive.held)

    def lease_ms(self) -> int:
        self.leases += 1
        return HOUR_MS + self.leases * 10_000

    @rule(count=st.integers(1, 4))
    def claim(self, count: int) -> None:
        for _ in range(count):
            token, lease_ms = secrets.token_hex(4), self.lease_ms()
            claimed = self.both(lambda ledger, t=token, ms=lease_ms: ledger.claim("worker", t, ms))
            if claimed is not None:
                self.claims.append(claimed)
                self.held.append(claimed)

    @rule(which=_which)
    def renew(self, which: int) -> None:
        self.renewed(self.claimed(which))

    @rule(which=_which, max_attempts=st.integers(0, 2))
    def expire(self, which: int, max_attempts: int) -> None:
        held = self.claimed(which)
        self.both(lambda ledger: ledger.renew(held.job_id, held.unit_id, held.token, 0))
        self.both(lambda ledger: ledger.reap(self.term, max_attempts))

    @rule(which=_which, writers=st.integers(0, 2))
    def opened(self, which: int, writers: int) -> None:
        held = self.claimed(which, UnitKind.PLAN)
        facts = {"max_writers": writers, "disk_size": 7, "source_may_change": True}
        self.both(lambda ledger: ledger.opened(held.job_id, held.unit_id, held.token, facts))

    @rule(which=_which, disk=st.sampled_from(["x", "y"]))
    def reserve(self, which: int, disk: str) -> None:
        held = self.claimed(which)
        self.both(lambda ledger: ledger.reserve(held.job_id, held.unit_id, held.token, disk))

    @rule(which=_which, count=st.integers(1, 3), off=st.sampled_from([0, 0, 0, 1]))
    def add_units(self, which: int, count: int, off: int) -> None:
        held = self.claimed(which, UnitKind.PLAN)
        try:
            cursor = self.memory.job(held.job_id).job.plan_cursor + off
        except FlushpointError:
            cursor = 0
        starts = range(cursor, cursor + count * UNIT, UNIT)
        units = [PlannedUnit(s, s + UNIT, (Extent(s, UNIT, Status.DATA),)) for s in starts]
        self.both(
            lambda ledger: ledger.add_units(
                held.job_id, held.unit_id, held.token, UnitKind.COPY, cursor, cursor + count * UNIT, units
            )
        )

    @rule(which=_which, sent=_bytes)
    def finish(self, which: int, sent: int) -> None:
        held = self.claimed(which)
        self.both(
            lambda ledger: ledger.finish(
                held.job_id,
                held.unit_id,
                held.token,
                bytes_read=UNIT,
                bytes_sent=sent,
                digest=held.token,
                result=held.token if sent else "",
            )
        )
        self.both(lambda ledger: ledger.results(held.job_id))

    @rule(
        which=_which,
        done=_bytes,
        empty=st.sampled_from([False, False, False, True]),
        counted=st.booleans(),
        flush_failed=st.booleans(),
        delay_ms=st.sampled_from([0, 0, HOUR_MS]),
        max_attempts=st.integers(0, 2),
        changes=st.sampled_from([{}, {}, {"error": "x"}, {"pause_requested": True}]),
    )
    def release(
        self,
        which: int,
        done: int,
        empty: bool,
        counted: bool,
        flush_failed: bool,
        delay_ms: int,
        max_attempts: int,
        changes: dict[str, Any],
    ) -> None:
        held = self.claimed(which)
        rest = pack_extents([Extent(held.start + done, UNIT - done, Status.DATA)])
        self.both(
            lambda ledger: ledger.release(
                held.job_id,
                held.unit_id,
                held.token,
                remaining="" if empty else rest,
                done_bytes=done,
                bytes_read=done,
                bytes_sent=done,
                count_attempt=counted,
                flush_failed=flush_failed,
                delay_ms=delay_ms,
                max_attempts=max_attempts,
                events=[NewEvent(EventName.BLOCK_JOB_ERROR, changes)] if changes else [],
                changes=changes,
            )
        )

    @rule(which=_which, all_of_them=st.booleans())
    def settle(self, which: int, all_of_them: bool) -> None:
        held = self.claimed(which, UnitKind.SETTLE)
        suspects = self.both(lambda ledger: ledger.suspects(held.job_id, held.unit_id, held.token, 0))
        changed = [suspect.unit_id for suspect in suspects][: None if all_of_them else 1]
        self.both(lambda ledger: ledger.redo(held.job_id, held.unit_id, held.token, changed))

    @rule(job_id=_jobs, all_of_them=st.booleans())
    def suspect(self, job_id: str, all_of_them: bool) -> None:
        """Leases run out; the units that are ready then are done, and a settle unit looks at them."""
        runs = {"state": State.RUNNING, "max_writers": 0, "pause_requested": False}
        self.update(job_id, 0, runs, kind=None, drop=False, retry=False, fenced=False, event=False)
        self.claim(4)
        for claim in [claim for claim in self.held if claim.kind is UnitKind.COPY][-2:]:
            self.both(lambda ledger, c=claim: ledger.renew(c.job_id, c.unit_id, c.token, 0))
            self.both(lambda ledger: ledger.reap(self.term, 0))
        first = len(self.claims)
        self.claim(8)
        for claim in self.claims[first:]:
            if claim.kind is UnitKind.COPY:
                self.both(
                    lambda ledger, c=claim: ledger.finish(c.job_id, c.unit_id, c.token, bytes_sent=1, digest=c.token)
                )
        version = self.version(job_id, 0)
        self.both(lambda ledger: ledger.update(job_id, version, {}, new_unit=NewUnit(UnitKind.SETTLE, 1)))
        self.claim(4)
        self.settle(1, all_of_them)

    @rule(job_id=_jobs)
    def end_and_begin_again(self, job_id: str) -> None:
        version = self.version(job_id, 0)
        self.both(lambda ledger: ledger.update(job_id, version, {"state": State.CONCLUDED}))
        self.both(lambda ledger: ledger.dismiss(job_id, version + 1))
        self.submit(job_id, "", "/b")
        self.start(job_id, State.RUNNING)

    @rule()
    def wake(self) -> None:
        self.both(lambda ledger: ledger.next_wake(0))

    @rule(role=st.sampled_from(["m", "n"]), count=st.integers(0, 3), limit=st.integers(0, 4))
    def ring(self, role: str, count: int, limit: int) -> None:
        bells = [secrets.token_hex(4) for _ in range(count)]
        sent = self.both(lambda ledger: ledger.ring(role, bells, limit, HOUR_MS))
        if sent:
            self.both(lambda ledger: ledger.woken(role, sent[0]))

    @rule(worker=_jobs, slots=st.integers(0, 3))
    def workers(self, worker: str, slots: int) -> None:
        if slots:
            self.both(lambda ledger: ledger.worker_alive(worker, "m", slots, HOUR_MS))
        else:
            self.both(lambda ledger: ledger.worker_gone(worker))
        self.both(lambda ledger: ledger.workers())

    @invariant()
    def look_the_same(self) -> None:
        for job in self.both(lambda ledger: ledger.jobs()):
            self.both(lambda ledger, job_id=job.id: ledger.job(job_id))
            self.both(lambda ledger, job_id=job.id: ledger.quarantined(job_id))
        self.both(lambda ledger: ledger.active_jobs())
        self.both(lambda ledger: ledger.surplus(1))
        self.both(lambda ledger: ledger.led())
        self.both(lambda ledger: ledger.work_is_ready())
        self.both(lambda ledger: ledger.events())

    @invariant()
    def counters_are_never_negative(self) -> None:
        for job in self.memory.jobs():
            counts = (job.units_ready, job.units_leased, job.units_done, job.units_quarantined, job.offset)
            assert min(counts) >= 0


def _observable(answer: Any) -> Any:
    """Without ids and times that come from a clock."""
    if isinstance(answer, list):
        return [_observable(item) for item in answer]
    if isinstance(answer, dict) and "event" in answer:
        return (answer["event"], answer["job"], answer["data"])
    if hasattr(answer, "created_at"):
        timed = ("created_at", "active_s", "progress_at", "rate_from_at", "rate_mark_at")
        return answer.model_copy(update=dict.fromkeys(timed, 0.0))
    if hasattr(answer, "version"):
        return _observable(answer.job), answer.version
    return answer


@pytest.mark.timeout(600)  # about 10 s; the rest is for shrinking what was found
def test_both_ledgers_answer_the_same(valkey_url: str) -> None:
    Twins.url = valkey_url
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Twins,
        settings=settings(
            max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
