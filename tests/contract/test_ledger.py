"""The contract of coordinator/ledger/contract.py, over each implementation. Tests are named as rules."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from coordinator.ledger import (
    ConflictError,
    DeposedError,
    Finished,
    Ledger,
    NewEvent,
    NewUnit,
    Term,
    Versioned,
)
from coordinator.ledger.redis_jobs import SURPLUS_JOBS
from coordinator.model.errors import NotFoundError, RefusedError, UsageError
from coordinator.model.events import EventName
from coordinator.model.extent import Extent, Status, pack_extents, unpack_extents
from coordinator.model.job import IoStatus, JobRecord, JobSpec, State
from coordinator.model.point import PointMember, PointRecord, RepositoryRecord
from coordinator.model.progress import RATE_WINDOW_S
from coordinator.model.units import Claim, Directive, PlannedUnit, QuarantinedUnit, UnitKind

SPEC = JobSpec(source="/a", target="/b")
OTHER_SPEC = JobSpec(source="/a", target="/c")
HOUR_MS = 3_600_000
UNIT = 100
"""Bytes of a unit of these tests."""


def planned(count: int, first: int = 0) -> list[PlannedUnit]:
    starts = range(first * UNIT, (first + count) * UNIT, UNIT)
    return [PlannedUnit(s, s + UNIT, (Extent(s, UNIT, Status.DATA),)) for s in starts]


def leader(ledger: Ledger) -> Term:
    """Lead, and adopt the server's run so that it hands out claims."""
    term = ledger.lead("leader", HOUR_MS)
    assert term is not None
    if not ledger.run_is_known():
        ledger.adopt_run(term, hold_ms=0)
    return term


def update(ledger: Ledger, job_id: str, **changes: object) -> JobRecord:
    return ledger.update(job_id, ledger.job(job_id).version, changes)


def claim(ledger: Ledger, token: str, lease_ms: int = HOUR_MS) -> Claim:
    claimed = ledger.claim("worker", token, lease_ms)
    assert claimed is not None
    return claimed


def start(ledger: Ledger, job_id: str = "job", units: int = 0) -> None:
    """A running job whose plan is done, with `units` copy units ready; `units` 0: its plan unit is ready."""
    leader(ledger)
    ledger.submit(job_id, SPEC)
    ledger.update(job_id, 1, {"state": State.RUNNING}, new_unit=NewUnit(UnitKind.PLAN, 1))
    if units:
        plan = claim(ledger, f"plan-{job_id}")
        assert plan.job_id == job_id
        assert ledger.add_units(job_id, plan.unit_id, plan.token, UnitKind.COPY, 0, units * UNIT, planned(units))
        assert ledger.finish(job_id, plan.unit_id, plan.token) is Finished.DONE


def finish(ledger: Ledger, held: Claim, **counts: int) -> Finished:
    return ledger.finish(held.job_id, held.unit_id, held.token, **counts)


def release(
    ledger: Ledger,
    held: Claim,
    *,
    remaining: str = "",
    done_bytes: int = 0,
    count_attempt: bool = True,
    flush_failed: bool = False,
    delay_ms: int = 0,
    max_attempts: int = 0,
) -> bool:
    return ledger.release(
        held.job_id,
        held.unit_id,
        held.token,
        remaining=remaining or held.extents,
        done_bytes=done_bytes,
        bytes_read=done_bytes,
        bytes_sent=done_bytes,
        count_attempt=count_attempt,
        flush_failed=flush_failed,
        delay_ms=delay_ms,
        max_attempts=max_attempts,
    )


def lose_flush(ledger: Ledger, held: Claim) -> None:
    assert release(ledger, held, count_attempt=False, flush_failed=True)


def quarantined(ledger: Ledger, job_id: str = "job") -> list[tuple[int, int]]:
    return [(unit.start, unit.end) for unit in ledger.quarantined(job_id)]


def drain_wakes(ledger: Ledger) -> list[str]:
    woken = []
    while (job_id := ledger.next_wake(0)) is not None:
        woken.append(job_id)
    return woken


def wait_for(found: Callable[[], object]) -> None:
    """On the server's clock, so it can only be asked again and again."""
    deadline = time.monotonic() + 10
    while not found():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.001)


# -- jobs -----------------------------------------------------------------------------------------------------


def test_a_submitted_job_is_read_back_and_wakes_the_leader(ledger: Ledger) -> None:
    spec = JobSpec(source="/a", target="/b", speed=7)
    job = ledger.submit("job", spec)
    assert ledger.job("job") == Versioned(job, 1)
    assert (job.spec, job.state, job.speed) == (spec, State.CREATED, 7)
    assert abs(job.created_at - time.time()) < 60
    assert drain_wakes(ledger) == ["job"]
    assert ledger.active_jobs() == ["job"]


def test_submitting_again_returns_the_job_that_exists(ledger: Ledger) -> None:
    first = ledger.submit("job", SPEC, "key")
    assert ledger.submit("job", SPEC) == first
    assert ledger.submit("another", SPEC, "key") == first
    assert [job.id for job in ledger.jobs()] == ["job"]


def test_submitting_again_with_another_spec_is_refused(ledger: Ledger) -> None:
    ledger.submit("job", SPEC, "key")
    with pytest.raises(RefusedError):
        ledger.submit("job", OTHER_SPEC)
    with pytest.raises(RefusedError):
        ledger.submit("another", OTHER_SPEC, "key")
    assert ledger.job("job").job.spec == SPEC


def test_jobs_are_listed_newest_first_in_pages(ledger: Ledger) -> None:
    ids = [f"job{n}" for n in range(5)]
    for job_id in ids:
        ledger.submit(job_id, SPEC)
    assert [job.id for job in ledger.jobs(limit=2)] == ["job4", "job3"]
    assert [job.id for job in ledger.jobs(after="job3", limit=2)] == ["job2", "job1"]
    assert [job.id for job in ledger.jobs(after="job0")] == []
    with pytest.raises(NotFoundError):
        ledger.jobs(after="nobody")


def test_an_unknown_job_is_not_found(ledger: Ledger) -> None:
    for ask in (
        lambda: ledger.job("nobody"),
        lambda: ledger.update("nobody", 1, {}),
        lambda: ledger.dismiss("nobody", 1),
    ):
        with pytest.raises(NotFoundError):
            ask()


def test_update_of_a_job_that_changed_is_a_conflict_and_changes_nothing(ledger: Ledger) -> None:
    ledger.submit("job", SPEC)
    ledger.update("job", 1, {"speed": 5})
    last = ledger.last_event_id()
    with pytest.raises(ConflictError):
        ledger.update("job", 1, {"speed": 9}, events=[NewEvent(EventName.BLOCK_JOB_READY, {})])
    assert (ledger.job("job").job.speed, ledger.job("job").version) == (5, 2)
    assert ledger.events(last) == []


def test_every_kind_of_field_survives_the_ledger(ledger: Ledger) -> None:
    ledger.submit("job", SPEC)
    changes = {
        "state": State.RUNNING,
        "started_at": 1795502345.084877,
        "disk_size": 2**52,
        "source_may_change": True,
        "compare_reason": "ein Grund, mit Ümlaut",
        "target_io_status": IoStatus.NOSPACE,
    }
    job = update(ledger, "job", **changes)
    assert {name: getattr(job, name) for name in changes} == changes
    assert ledger.job("job").job == job


def test_update_takes_no_field_that_the_ledger_keeps(ledger: Ledger) -> None:
    ledger.submit("job", SPEC)
    for name in ("id", "spec", "units_ready", "nonsense"):
        with pytest.raises(ValueError, match=name):
            update(ledger, "job", **{name: 1})


def test_a_concluded_job_is_not_active_and_can_be_dismissed(ledger: Ledger) -> None:
    start(ledger, units=3)
    with pytest.raises(RefusedError):
        ledger.dismiss("job", ledger.job("job").version)
    update(ledger, "job", state=State.CONCLUDED)
    assert ledger.active_jobs() == []
    with pytest.raises(ConflictError):
        ledger.dismiss("job", 1)
    ledger.dismiss("job", ledger.job("job").version)
    assert ledger.jobs() == []
    assert drain_wakes(ledger) == []
    assert ledger.claim("worker", "token", HOUR_MS) is None


def test_a_dismissed_id_starts_anew(ledger: Ledger) -> None:
    start(ledger, units=1)
    held = claim(ledger, "old")
    update(ledger, "job", state=State.CONCLUDED)
    ledger.dismiss("job", ledger.job("job").version)
    start(ledger, units=2)
    ledger.reap(leader(ledger), 0)
    assert finish(ledger, held) is Finished.STALE
    assert {claim(ledger, "a").start, claim(ledger, "b").start} == {0, UNIT}


def test_concluded_jobs_beyond_a_number_are_surplus_those_first_that_ended_first(ledger: Ledger) -> None:
    for job_id in ("first", "second", "third", "active"):
        ledger.submit(job_id, SPEC)
    for job_id in ("third", "first", "second"):
        update(ledger, job_id, state=State.CONCLUDED)
    assert ledger.surplus(3) == []
    assert ledger.surplus(1) == ["third", "first"]
    ledger.dismiss("third", ledger.job("third").version)
    assert ledger.surplus(1) == ["first"]
    assert ledger.surplus(0) == ["first", "second"]


def test_a_surplus_is_named_in_bounded_pieces(ledger: Ledger) -> None:
    for n in range(SURPLUS_JOBS + 5):
        ledger.submit(f"job{n}", SPEC)
        update(ledger, f"job{n}", state=State.CONCLUDED)
    assert ledger.surplus(2) == [f"job{n}" for n in range(SURPLUS_JOBS)]


# -- leadership -----------------------------------------------------------------------------------------------


def test_one_leads_at_a_time(ledger: Ledger) -> None:
    term = ledger.lead("one", HOUR_MS)
    assert term == Term(1, "one")
    assert ledger.lead("two", HOUR_MS) is None
    assert ledger.lead("one", HOUR_MS) == term


def test_a_lapsed_or_resigned_term_is_followed_by_a_greater_one(ledger: Ledger) -> None:
    assert ledger.lead("one", 0) == Term(1, "one")
    second = ledger.lead("two", HOUR_MS)
    assert second == Term(2, "two")
    ledger.resign(Term(1, "one"))
    assert ledger.lead("one", HOUR_MS) is None, "a deposed leader resigned for another"
    ledger.resign(second)
    assert ledger.lead("two", HOUR_MS) == Term(3, "two")


def test_a_term_that_runs_is_seen_by_all(ledger: Ledger) -> None:
    assert not ledger.led()
    ledger.lead("one", 0)
    assert not ledger.led()
    term = ledger.lead("one", HOUR_MS)
    assert term is not None
    assert ledger.led()
    ledger.resign(term)
    assert not ledger.led()


def test_a_generation_is_raised_past_what_was_found_elsewhere(ledger: Ledger) -> None:
    assert ledger.lead("one", HOUR_MS, at_least=40) == Term(41, "one")
    assert ledger.lead("one", HOUR_MS, at_least=41) == Term(42, "one")
    assert ledger.lead("one", HOUR_MS, at_least=7) == Term(42, "one")


def test_a_deposed_leader_is_refused_in_every_step(ledger: Ledger) -> None:
    ledger.submit("job", SPEC)
    old = ledger.lead("old", 0)
    assert old is not None
    assert ledger.lead("new", HOUR_MS) is not None
    for step in (
        lambda: ledger.update("job", 1, {"speed": 1}, term=old),
        lambda: ledger.dismiss("job", 1, old),
        lambda: ledger.reap(old, 3),
        lambda: ledger.adopt_run(old, 0),
        lambda: ledger.reap(Term(2, "old"), 3),
    ):
        with pytest.raises(DeposedError):
            step()
    assert ledger.job("job").version == 1
    assert not ledger.run_is_known()


# -- claims ---------------------------------------------------------------------------------------------------


def test_a_claim_carries_the_unit(ledger: Ledger) -> None:
    start(ledger)
    plan = claim(ledger, "token")
    assert (plan.job_id, plan.kind, plan.pass_number, plan.extents) == ("job", UnitKind.PLAN, 1, "")
    assert ledger.add_units("job", plan.unit_id, "token", UnitKind.COMPARE, 0, UNIT, planned(1))
    unit = claim(ledger, "token2", lease_ms=1234)
    assert (unit.kind, unit.pass_number, unit.token, unit.lease_ms) == (UnitKind.COMPARE, 1, "token2", 1234)
    assert (unit.start, unit.end, unit.failures, unit.expired) == (0, UNIT, 0, 0)
    assert unpack_extents(unit.extents) == [Extent(0, UNIT, Status.DATA)]


def test_no_unit_is_claimed_twice(ledger: Ledger) -> None:
    start(ledger, units=200)
    claimed: list[list[str]] = [[], [], [], []]

    def work(mine: list[str], name: str) -> None:
        while held := ledger.claim(name, f"{name}-{len(mine)}", HOUR_MS):
            mine.append(held.unit_id)

    threads = [threading.Thread(target=work, args=(mine, f"w{n}")) for n, mine in enumerate(claimed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = [unit_id for mine in claimed for unit_id in mine]
    assert len(everything) == len(set(everything)) == 200


def test_claims_go_round_robin_over_jobs(ledger: Ledger) -> None:
    for job_id in ("a", "b", "c"):
        start(ledger, job_id)
    for plan in [claim(ledger, job_id) for job_id in ("a", "b", "c")]:
        assert ledger.add_units(plan.job_id, plan.unit_id, plan.token, UnitKind.COPY, 0, 200, planned(2))
    assert [claim(ledger, f"t{n}").job_id for n in range(6)] == ["a", "b", "c"] * 2


def test_at_most_max_writers_units_are_leased(ledger: Ledger) -> None:
    start(ledger)
    plan = claim(ledger, "plan")
    assert ledger.opened("job", plan.unit_id, "plan", {"max_writers": 2, "disk_size": 500})
    assert ledger.add_units("job", plan.unit_id, "plan", UnitKind.COPY, 0, 500, planned(5))
    assert ledger.work_is_ready() == 1, "the plan unit is a writer too"
    first = claim(ledger, "t1")
    assert ledger.work_is_ready() == 0
    assert ledger.claim("worker", "t2", HOUR_MS) is None
    finish(ledger, first)
    claim(ledger, "t3")
    assert ledger.claim("worker", "t4", HOUR_MS) is None


@pytest.mark.parametrize(
    "stop",
    [{"pause_requested": True}, {"cancel_requested": "soft"}, {"state": State.PAUSED}, {"state": State.ABORTING}],
)
def test_a_job_that_may_not_run_gives_no_claims_and_says_so_to_its_holders(
    ledger: Ledger, stop: dict[str, object]
) -> None:
    start(ledger, units=3)
    held = claim(ledger, "held")
    assert ledger.renew("job", held.unit_id, "held", HOUR_MS) == Directive(held=True, run=True, speed=0)
    update(ledger, "job", speed=99, **stop)
    assert ledger.claim("worker", "token", HOUR_MS) is None
    assert ledger.work_is_ready() == 0
    assert ledger.renew("job", held.unit_id, "held", HOUR_MS) == Directive(held=True, run=False, speed=99)
    update(ledger, "job", pause_requested=False, cancel_requested="", state=State.RUNNING)
    assert claim(ledger, "token").job_id == "job"


def test_a_cancel_by_force_is_told_to_holders_as_such(ledger: Ledger) -> None:
    start(ledger, units=1)
    held = claim(ledger, "held")
    for cancel, force in (("soft", False), ("force", True)):
        update(ledger, "job", cancel_requested=cancel)
        told = ledger.renew("job", held.unit_id, "held", HOUR_MS)
        assert told == Directive(held=True, run=False, speed=0, force=force)


def test_paused_jobs_do_not_hide_the_one_that_runs(ledger: Ledger) -> None:
    for n in range(50):
        start(ledger, f"paused{n}")
        update(ledger, f"paused{n}", pause_requested=True)
    start(ledger, "runs")
    assert claim(ledger, "token").job_id == "runs"
    assert ledger.claim("worker", "token2", HOUR_MS) is None


def test_work_is_ready_counts_what_can_be_claimed_up_to_1000(ledger: Ledger) -> None:
    start(ledger, units=700)
    assert ledger.work_is_ready() == 700
    start(ledger, "second")
    assert ledger.work_is_ready() == 701
    plan = next(c for c in (claim(ledger, f"t{n}") for n in range(2)) if c.kind is UnitKind.PLAN)
    ledger.add_units("second", plan.unit_id, plan.token, UnitKind.COPY, 0, 40000, planned(400))
    assert ledger.work_is_ready() == 1000


# -- the end of a unit ----------------------------------------------------------------------------------------


def test_finish_counts_once_however_often_it_is_repeated(ledger: Ledger) -> None:
    start(ledger, units=2)
    held = claim(ledger, "token")
    assert finish(ledger, held, bytes_read=70, bytes_sent=60) is Finished.DONE
    before = ledger.job("job")
    for _ in range(3):
        assert finish(ledger, held, bytes_read=70, bytes_sent=60) is Finished.ALREADY
    assert ledger.job("job") == before
    job = before.job
    assert (job.len, job.offset, job.bytes_read, job.bytes_sent, job.pass_sent) == (200, 100, 70, 60, 60)
    assert (job.units_ready, job.units_leased, job.units_done) == (1, 0, 2)


def test_a_stale_token_changes_nothing(ledger: Ledger) -> None:
    start(ledger, units=1)
    held = claim(ledger, "token")
    before = ledger.job("job")
    unit = held.unit_id
    assert ledger.finish("job", unit, "another") is Finished.STALE
    assert ledger.finish("job", "9-9", "token") is Finished.STALE
    assert ledger.finish("nobody", unit, "token") is Finished.STALE
    assert ledger.renew("job", unit, "another", HOUR_MS) == Directive(held=False, run=False, speed=0)
    assert not ledger.opened("job", unit, "another", {"disk_size": 1})
    assert not ledger.add_units("job", unit, "another", UnitKind.COPY, 0, 1, planned(1))
    assert not ledger.redo("job", unit, "another", [])
    assert ledger.suspects("job", unit, "another", 0) == []
    assert not ledger.release(
        "job",
        unit,
        "another",
        remaining="x",
        done_bytes=1,
        bytes_read=1,
        bytes_sent=1,
        count_attempt=True,
        events=[NewEvent(EventName.BLOCK_JOB_ERROR, {})],
        changes={"error": "x"},
    )
    assert ledger.job("job") == before
    assert [event["data"] for event in ledger.events()] == [{"status": "created"}, {"status": "running"}]


def test_only_a_plan_unit_plans_and_only_a_settle_unit_settles(ledger: Ledger) -> None:
    start(ledger, units=1)
    held = claim(ledger, "token")
    assert not ledger.add_units("job", held.unit_id, "token", UnitKind.COPY, UNIT, 200, planned(1))
    assert not ledger.redo("job", held.unit_id, "token", [])


@pytest.mark.parametrize(
    ("kind", "recorded"),
    [(UnitKind.TASK, "settled"), (UnitKind.PUBLISH, "published"), (UnitKind.ABANDON, "abandoned")],
)
def test_units_of_a_repository_record_what_they_did(ledger: Ledger, kind: UnitKind, recorded: str) -> None:
    start(ledger)
    ledger.update("job", ledger.job("job").version, {}, new_unit=NewUnit(kind, 1), drop_units=True)
    assert finish(ledger, claim(ledger, "t")) is Finished.DONE
    record = ledger.job("job").job
    assert getattr(record, recorded)
    assert [record.settled, record.published, record.abandoned].count(True) == 1


def test_results_of_a_pass_are_kept_in_order_and_go_with_its_units(ledger: Ledger) -> None:
    start(ledger, units=3)
    for text in ("first", "", "last"):
        held = claim(ledger, text or "none")
        for _ in range(2):  # said again, it is kept once
            ledger.finish(held.job_id, held.unit_id, held.token, result=text)
    assert ledger.results("job") == ["first", "last"]
    ledger.update("job", ledger.job("job").version, {}, drop_units=True)
    assert ledger.results("job") == []


def test_an_aborting_job_runs_its_closing_unit_and_no_other(ledger: Ledger) -> None:
    start(ledger, units=2)
    update(ledger, "job", cancel_requested="soft", state=State.ABORTING)
    assert ledger.claim("w", "t", HOUR_MS) is None
    closing = NewUnit(UnitKind.ABANDON, 1)
    ledger.update("job", ledger.job("job").version, {"closing": True}, new_unit=closing, drop_units=True)
    held = claim(ledger, "t2")
    assert held.kind is UnitKind.ABANDON
    assert ledger.renew("job", held.unit_id, "t2", HOUR_MS).run


def test_a_target_belongs_to_one_active_job(ledger: Ledger) -> None:
    start(ledger, "one")
    start(ledger, "two")
    holders = {held.job_id: held for held in (claim(ledger, "t1"), claim(ledger, "t2"))}
    one, two = holders["one"], holders["two"]
    assert ledger.reserve("one", one.unit_id, one.token, "disk") == "one"
    assert ledger.reserve("one", one.unit_id, one.token, "disk") == "one"
    assert ledger.reserve("two", two.unit_id, two.token, "disk") == "one"
    assert ledger.reserve("two", two.unit_id, "another", "disk") is None
    ledger.update("one", ledger.job("one").version, {"state": State.CONCLUDED})
    assert ledger.reserve("two", two.unit_id, two.token, "disk") == "two"


def test_finishing_a_plan_or_settle_unit_is_recorded_and_wakes_the_leader(ledger: Ledger) -> None:
    start(ledger, units=1)
    assert ledger.job("job").job.plan_done
    ledger.update("job", ledger.job("job").version, {}, new_unit=NewUnit(UnitKind.SETTLE, 1))
    finish(ledger, claim(ledger, "copy"))
    settle = claim(ledger, "settle")
    drain_wakes(ledger)
    version = ledger.job("job").version
    assert not ledger.job("job").job.settled
    finish(ledger, settle)
    assert ledger.job("job").job.settled
    assert ledger.job("job").version == version + 1
    assert drain_wakes(ledger) == ["job"]


def test_the_last_finish_wakes_the_leader_and_no_other(ledger: Ledger) -> None:
    start(ledger, units=2)
    first, second = claim(ledger, "t1"), claim(ledger, "t2")
    drain_wakes(ledger)
    version = ledger.job("job").version
    finish(ledger, first)
    assert (drain_wakes(ledger), ledger.job("job").version) == ([], version)
    finish(ledger, second)
    assert (drain_wakes(ledger), ledger.job("job").version) == (["job"], version + 1)


def test_the_last_lease_of_a_paused_job_wakes_the_leader(ledger: Ledger) -> None:
    start(ledger, units=3)
    first, second = claim(ledger, "t1"), claim(ledger, "t2")
    update(ledger, "job", pause_requested=True)
    drain_wakes(ledger)
    finish(ledger, first)
    assert drain_wakes(ledger) == []
    release(ledger, second, count_attempt=False)
    assert drain_wakes(ledger) == ["job"]


def test_the_plan_cursor_makes_adding_units_idempotent(ledger: Ledger) -> None:
    start(ledger)
    plan = claim(ledger, "token")
    assert ledger.add_units("job", plan.unit_id, "token", UnitKind.COPY, 0, 300, planned(3))
    assert not ledger.add_units("job", plan.unit_id, "token", UnitKind.COPY, 0, 300, planned(3))
    assert ledger.add_units("job", plan.unit_id, "token", UnitKind.COPY, 300, 500, planned(2, first=3))
    job = ledger.job("job").job
    assert (job.plan_cursor, job.len, job.units_ready) == (500, 500, 5)


def test_a_released_unit_is_claimed_again_with_what_remains(ledger: Ledger) -> None:
    start(ledger, units=1)
    held = claim(ledger, "t1")
    rest = pack_extents([Extent(60, 40, Status.DATA)])
    assert release(ledger, held, remaining=rest, done_bytes=60)
    assert ledger.job("job").job.offset == 60
    again = claim(ledger, "t2")
    assert (again.unit_id, again.extents, again.failures, again.expired) == (held.unit_id, rest, 1, 0)
    assert finish(ledger, held) is Finished.STALE
    assert finish(ledger, again, bytes_sent=40) is Finished.DONE
    job = ledger.job("job").job
    assert (job.offset, job.len, job.pass_sent) == (UNIT, UNIT, 100)


def test_a_copy_unit_without_remaining_extents_cannot_be_released(ledger: Ledger) -> None:
    start(ledger, units=1)
    held = claim(ledger, "t1")
    with pytest.raises(ValueError, match="finish it"):
        ledger.release(
            "job", held.unit_id, "t1", remaining="", done_bytes=0, bytes_read=0, bytes_sent=0, count_attempt=True
        )
    assert finish(ledger, held) is Finished.DONE


def test_a_delayed_unit_counts_as_ready_and_is_claimed_after_its_delay(ledger: Ledger) -> None:
    start(ledger, units=1)
    term = leader(ledger)
    held = claim(ledger, "t1")
    assert release(ledger, held, delay_ms=HOUR_MS)
    assert ledger.reap(term, 0) == []
    assert (ledger.work_is_ready(), ledger.job("job").job.units_ready) == (0, 1)
    assert ledger.claim("worker", "t2", HOUR_MS) is None
    start(ledger, "soon", units=1)
    soon = claim(ledger, "t3")
    assert release(ledger, soon, delay_ms=1)
    wait_for(lambda: ledger.reap(term, 0) == [f"soon/{soon.unit_id}"])
    assert claim(ledger, "t4").job_id == "soon"


def test_a_unit_is_quarantined_at_its_last_counted_attempt(ledger: Ledger) -> None:
    start(ledger, units=2)
    bad = claim(ledger, "t0")
    finish(ledger, claim(ledger, "good"))
    assert release(ledger, bad, max_attempts=2)
    assert release(ledger, claim(ledger, "t1"), count_attempt=False, max_attempts=2)
    drain_wakes(ledger)
    version = ledger.job("job").version
    assert release(ledger, claim(ledger, "t2"), max_attempts=2)
    assert quarantined(ledger) == [(0, UNIT)]
    job = ledger.job("job").job
    assert (job.units_quarantined, job.units_ready, job.units_leased) == (1, 0, 0)
    assert (drain_wakes(ledger), ledger.job("job").version) == (["job"], version + 1)
    assert ledger.claim("worker", "t3", HOUR_MS) is None


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([], ""),
        (
            [
                NewEvent(EventName.BLOCK_JOB_ERROR, {"error": "one"}),
                NewEvent(EventName.BLOCK_JOB_ERROR, {"error": "two"}),
            ],
            "two",
        ),
    ],
)
def test_a_given_up_unit_tells_the_error_it_was_given_back_with_last(
    ledger: Ledger, events: list[NewEvent], error: str
) -> None:
    start(ledger, units=1)
    for n in range(2):
        held = claim(ledger, f"t{n}")
        assert ledger.release(
            "job",
            held.unit_id,
            held.token,
            remaining=held.extents,
            done_bytes=0,
            bytes_read=0,
            bytes_sent=0,
            count_attempt=True,
            max_attempts=2,
            events=events,
        )
    assert ledger.quarantined("job") == [QuarantinedUnit(0, UNIT, UnitKind.COPY, 2, error)]


def test_given_up_units_are_ready_again_when_they_are_retried_and_their_attempts_start_anew(ledger: Ledger) -> None:
    start(ledger, units=13)
    held = [claim(ledger, f"t{n}") for n in range(13)]
    for one in held[1:]:  # more than nine: their numbers order them, not their names
        assert release(ledger, one, max_attempts=1)
    update(ledger, "job", speed=1)
    assert ledger.job("job").job.units_quarantined == 12
    job = ledger.update("job", ledger.job("job").version, {}, retry_quarantined=True)
    assert (job.units_quarantined, job.units_ready, job.units_leased) == (0, 12, 1)
    assert ledger.quarantined("job") == []
    again = [claim(ledger, f"again{n}") for n in range(12)]
    assert [one.unit_id for one in again] == [one.unit_id for one in held[1:]]
    assert {one.failures for one in again} == {0}
    for one in [held[0], *again]:
        assert finish(ledger, one) is Finished.DONE
    assert ledger.job("job").job.offset == 13 * UNIT


def test_an_expired_lease_is_still_doubted_after_a_retry(ledger: Ledger) -> None:
    start(ledger, units=1)
    claim(ledger, "zombie", lease_ms=0)
    ledger.reap(leader(ledger), 1)
    ledger.update("job", ledger.job("job").version, {}, retry_quarantined=True)
    assert claim(ledger, "again").expired == 1


def test_release_applies_its_changes_and_events_in_one_step(ledger: Ledger) -> None:
    start(ledger, units=2)
    held = claim(ledger, "t1")
    drain_wakes(ledger)
    last, version = ledger.last_event_id(), ledger.job("job").version
    assert ledger.release(
        "job",
        held.unit_id,
        "t1",
        remaining=held.extents,
        done_bytes=0,
        bytes_read=5,
        bytes_sent=0,
        count_attempt=True,
        events=[NewEvent(EventName.BLOCK_JOB_ERROR, {"operation": "read"})],
        changes={"io_status": IoStatus.FAILED, "pause_requested": True, "error": "EIO", "fatal": True},
    )
    job = ledger.job("job").job
    assert (job.io_status, job.pause_requested, job.error, job.fatal) == (IoStatus.FAILED, True, "EIO", True)
    assert (job.bytes_read, ledger.job("job").version) == (5, version + 1)
    assert [(e["event"], e["data"]) for e in ledger.events(last)] == [("BLOCK_JOB_ERROR", {"operation": "read"})]
    assert drain_wakes(ledger) == ["job"]
    assert ledger.claim("worker", "t2", HOUR_MS) is None


# -- leases that run out --------------------------------------------------------------------------------------


def test_an_expired_lease_is_claimed_again_and_its_late_holder_is_stale(ledger: Ledger) -> None:
    start(ledger, units=1)
    late = claim(ledger, "late", lease_ms=0)
    term = leader(ledger)
    assert ledger.reap(term, 0) == [f"job/{late.unit_id}"]
    assert ledger.reap(term, 0) == []
    assert not ledger.renew("job", late.unit_id, "late", HOUR_MS).held
    again = claim(ledger, "again")
    assert (again.unit_id, again.failures, again.expired) == (late.unit_id, 1, 1)
    assert finish(ledger, late) is Finished.STALE
    assert finish(ledger, again) is Finished.DONE
    assert ledger.job("job").job.offset == UNIT


def test_a_renewed_lease_does_not_expire(ledger: Ledger) -> None:
    start(ledger, units=1)
    held = claim(ledger, "token", lease_ms=0)
    assert ledger.renew("job", held.unit_id, "token", HOUR_MS).held
    assert ledger.reap(leader(ledger), 0) == []
    assert finish(ledger, held) is Finished.DONE


def test_a_unit_whose_leases_keep_expiring_is_quarantined(ledger: Ledger) -> None:
    start(ledger, units=1)
    term = leader(ledger)
    claim(ledger, "t1", lease_ms=0)
    assert len(ledger.reap(term, 2)) == 1
    claim(ledger, "t2", lease_ms=0)
    drain_wakes(ledger)
    assert ledger.reap(term, 2) == []
    assert quarantined(ledger) == [(0, UNIT)]
    assert drain_wakes(ledger) == ["job"]


def suspect_and_settle(ledger: Ledger) -> tuple[Claim, Claim]:
    """A job whose one unit is done although a lease of it expired: that unit, and the held settle unit."""
    start(ledger, units=2)
    term = leader(ledger)
    claim(ledger, "late", lease_ms=0)
    ledger.reap(term, 0)
    finish(ledger, claim(ledger, "clean"))
    again = claim(ledger, "again")
    assert ledger.finish("job", again.unit_id, "again", digest="abc") is Finished.DONE
    ledger.update("job", ledger.job("job").version, {}, new_unit=NewUnit(UnitKind.SETTLE, 1))
    return again, claim(ledger, "settle")


def test_a_done_unit_whose_lease_had_expired_is_a_suspect(ledger: Ledger) -> None:
    again, settle = suspect_and_settle(ledger)
    (suspect,) = ledger.suspects("job", settle.unit_id, "settle", 0)
    assert (suspect.unit_id, suspect.extents, suspect.digest) == (again.unit_id, again.extents, "abc")
    assert suspect.quarantine_ms == 0
    (suspect,) = ledger.suspects("job", settle.unit_id, "settle", HOUR_MS)
    assert HOUR_MS - 60_000 < suspect.quarantine_ms <= HOUR_MS


def test_a_suspect_that_changed_is_copied_again(ledger: Ledger) -> None:
    again, settle = suspect_and_settle(ledger)
    drain_wakes(ledger)
    assert ledger.redo("job", settle.unit_id, "settle", [again.unit_id, "9-9"])
    assert not ledger.redo("job", settle.unit_id, "settle", [again.unit_id])
    job = ledger.job("job").job
    assert (job.offset, job.len, job.units_ready, job.units_leased, job.settled) == (UNIT, 2 * UNIT, 1, 0, False)
    assert drain_wakes(ledger) == ["job"]
    third = claim(ledger, "third")
    assert (third.unit_id, third.extents) == (again.unit_id, again.extents)
    assert finish(ledger, third) is Finished.DONE
    assert ledger.job("job").job.offset == 2 * UNIT


def test_a_suspect_is_copied_again_with_all_its_extents(ledger: Ledger) -> None:
    start(ledger, units=1)
    term = leader(ledger)
    whole = claim(ledger, "whole")
    rest = pack_extents([Extent(60, 40, Status.DATA)])
    assert release(ledger, whole, remaining=rest, done_bytes=60)
    claim(ledger, "late", lease_ms=0)
    ledger.reap(term, 0)
    finish(ledger, claim(ledger, "again"))
    ledger.update("job", ledger.job("job").version, {}, new_unit=NewUnit(UnitKind.SETTLE, 1))
    settle = claim(ledger, "settle")
    (suspect,) = ledger.suspects("job", settle.unit_id, "settle", 0)
    assert suspect.extents == rest, "what the zombie may have written over"
    assert ledger.redo("job", settle.unit_id, "settle", [suspect.unit_id])
    assert ledger.job("job").job.offset == 0
    assert claim(ledger, "third").extents == whole.extents


def test_one_holder_does_all_of_a_unit_that_a_zombie_may_write_to(ledger: Ledger) -> None:
    start(ledger, units=1)
    claim(ledger, "zombie", lease_ms=0)
    ledger.reap(leader(ledger), 0)
    held = claim(ledger, "half")
    assert release(ledger, held, remaining=pack_extents([Extent(60, 40, Status.DATA)]), done_bytes=60)
    assert ledger.job("job").job.offset == 0
    assert claim(ledger, "all").extents == held.extents


# -- flushes that fail ----------------------------------------------------------------------------------------


def test_a_unit_whose_flush_failed_is_to_be_rewritten_until_it_is_done(ledger: Ledger) -> None:
    start(ledger, units=1)
    first = claim(ledger, "t1")
    assert not first.rewrite
    lose_flush(ledger, first)
    second = claim(ledger, "t2")
    assert (second.rewrite, second.failures, second.extents) == (True, 0, first.extents)
    assert release(ledger, second, remaining=pack_extents([Extent(60, 40, Status.DATA)]), done_bytes=60)
    third = claim(ledger, "t3")
    assert third.rewrite
    assert finish(ledger, third) is Finished.DONE


def test_a_unit_that_was_leased_when_a_flush_failed_is_not_done_when_it_is_finished(ledger: Ledger) -> None:
    start(ledger, units=2)
    told, untold = claim(ledger, "told"), claim(ledger, "untold")
    lose_flush(ledger, told)
    drain_wakes(ledger)
    assert finish(ledger, untold, bytes_read=UNIT, bytes_sent=UNIT) is Finished.AGAIN
    assert finish(ledger, untold, bytes_read=UNIT, bytes_sent=UNIT) is Finished.STALE
    job = ledger.job("job").job
    assert (job.offset, job.bytes_read, job.units_ready, job.units_leased, job.units_done) == (0, 0, 2, 0, 1)
    assert drain_wakes(ledger) == []
    for held in (claim(ledger, "t1"), claim(ledger, "t2")):
        assert held.rewrite
        assert finish(ledger, held) is Finished.DONE
    assert ledger.job("job").job.offset == 2 * UNIT


def test_a_unit_finished_during_the_lease_of_a_failed_flush_is_ready_again(ledger: Ledger) -> None:
    start(ledger, units=2)
    told, untold = claim(ledger, "told"), claim(ledger, "untold")
    assert finish(ledger, untold) is Finished.DONE
    lose_flush(ledger, told)
    job = ledger.job("job").job
    assert (job.offset, job.units_ready, job.units_done) == (0, 2, 1)
    assert [claim(ledger, "t1").rewrite, claim(ledger, "t2").rewrite] == [True, True]


def test_what_was_given_back_in_part_during_the_lease_of_a_failed_flush_is_all_to_be_done(ledger: Ledger) -> None:
    start(ledger, units=3)
    told = claim(ledger, "told")
    rest = pack_extents([Extent(60, 40, Status.DATA)])
    ready, leased = claim(ledger, "t1"), claim(ledger, "t2")
    for part in (leased, ready):
        assert release(ledger, part, remaining=rest, done_bytes=60)
    again = claim(ledger, "t3")
    assert again.unit_id == leased.unit_id
    lose_flush(ledger, told)
    assert ledger.job("job").job.offset == 0
    assert release(ledger, again, remaining=rest, done_bytes=40)
    assert ledger.job("job").job.offset == 0
    later = {held.unit_id: held for held in (claim(ledger, f"u{n}") for n in range(3))}
    for first in (told, ready, leased):
        assert (later[first.unit_id].extents, later[first.unit_id].rewrite) == (first.extents, True)


def test_units_whose_leases_did_not_overlap_that_of_a_failed_flush_stand(ledger: Ledger) -> None:
    start(ledger, units=3)
    finish(ledger, claim(ledger, "before"))
    lose_flush(ledger, claim(ledger, "told"))
    after = claim(ledger, "after")
    assert not after.rewrite
    assert finish(ledger, after) is Finished.DONE
    assert ledger.job("job").job.offset == 2 * UNIT


def test_what_a_failed_flush_spoils_of_a_lease_ends_with_the_lease(ledger: Ledger) -> None:
    start(ledger, units=2)
    told, lost = claim(ledger, "told"), claim(ledger, "lost")
    lose_flush(ledger, told)
    ledger.renew("job", lost.unit_id, "lost", 0)
    ledger.reap(leader(ledger), 0)
    for held in (claim(ledger, "t1"), claim(ledger, "t2")):
        assert held.rewrite
        assert finish(ledger, held) is Finished.DONE


def test_a_suspect_that_a_failed_flush_may_have_lost_is_a_suspect_again_when_it_is_rewritten(ledger: Ledger) -> None:
    start(ledger, units=2)
    claim(ledger, "late", lease_ms=0)
    ledger.reap(leader(ledger), 0)
    told, suspect = claim(ledger, "told"), claim(ledger, "again")
    assert suspect.expired == 1
    assert ledger.finish("job", suspect.unit_id, "again", digest="old") is Finished.DONE
    lose_flush(ledger, told)
    for n in range(2):
        held = claim(ledger, f"t{n}")
        assert ledger.finish("job", held.unit_id, f"t{n}", digest="new") is Finished.DONE
    ledger.update("job", ledger.job("job").version, {}, new_unit=NewUnit(UnitKind.SETTLE, 1))
    settle = claim(ledger, "settle")
    assert [s.digest for s in ledger.suspects("job", settle.unit_id, "settle", 0)] == ["new"]


def test_a_failed_flush_of_a_settle_unit_loses_no_copy(ledger: Ledger) -> None:
    """All of it was flushed before; the settle unit wrote nothing."""
    start(ledger, units=1)
    finish(ledger, claim(ledger, "copy"))
    ledger.update("job", ledger.job("job").version, {}, new_unit=NewUnit(UnitKind.SETTLE, 1))
    lose_flush(ledger, claim(ledger, "settle"))
    job = ledger.job("job").job
    assert (job.offset, job.units_ready) == (UNIT, 1)


# -- a new pass -----------------------------------------------------------------------------------------------


def test_dropped_units_are_stale_and_gone(ledger: Ledger) -> None:
    start(ledger, units=6)
    term = leader(ledger)
    leased, delayed, bad = (claim(ledger, f"t{n}") for n in range(3))
    release(ledger, delayed, delay_ms=1)
    release(ledger, bad, max_attempts=1)
    ledger.update(
        "job",
        ledger.job("job").version,
        {"plan_cursor": 0, "len": 0, "offset": 0},
        drop_units=True,
        new_unit=NewUnit(UnitKind.PLAN, 2),
        term=term,
    )
    before = ledger.job("job")
    counts = before.job
    assert (counts.units_ready, counts.units_leased, counts.units_done, counts.units_quarantined) == (1, 0, 0, 0)
    assert finish(ledger, leased) is Finished.STALE
    assert not ledger.renew("job", leased.unit_id, leased.token, HOUR_MS).held
    assert ledger.quarantined("job") == []
    assert ledger.reap(term, 0) == []
    assert ledger.job("job") == before
    plan = claim(ledger, "plan")
    assert (plan.kind, plan.pass_number) == (UnitKind.PLAN, 2)
    assert ledger.claim("worker", "none", HOUR_MS) is None


# -- the server's run -----------------------------------------------------------------------------------------


def test_nothing_is_claimed_before_a_leader_adopts_the_servers_run(ledger: Ledger) -> None:
    ledger.submit("job", SPEC)
    ledger.update("job", 1, {"state": State.RUNNING}, new_unit=NewUnit(UnitKind.PLAN, 1))
    assert not ledger.run_is_known()
    assert ledger.claim("worker", "token", HOUR_MS) is None
    assert ledger.work_is_ready() == 0
    leader(ledger)
    assert ledger.run_is_known()
    assert claim(ledger, "token").kind is UnitKind.PLAN


def test_claims_are_held_back_after_adoption(ledger: Ledger) -> None:
    start(ledger)
    term = leader(ledger)
    ledger.adopt_run(term, hold_ms=HOUR_MS)
    assert ledger.claim("worker", "token", HOUR_MS) is None
    assert ledger.work_is_ready() == 0
    ledger.adopt_run(term, hold_ms=20)
    wait_for(lambda: ledger.claim("worker", "token", HOUR_MS))


def test_a_restarted_server_claims_nothing_until_adopted_and_doubts_every_lease(
    restartable: tuple[Ledger, Callable[[], None]],
) -> None:
    ledger, restart = restartable
    start(ledger, units=3)
    held = claim(ledger, "held")
    before = ledger.job("job")
    restart()
    assert ledger.job("job") == before
    assert not ledger.run_is_known()
    assert ledger.claim("worker", "token", HOUR_MS) is None
    term = ledger.lead("leader", HOUR_MS)
    assert term is not None
    assert ledger.adopt_run(term, hold_ms=50) == 1
    assert ledger.run_is_known()
    assert finish(ledger, held) is Finished.STALE
    assert ledger.claim("worker", "early", HOUR_MS) is None
    wait_for(lambda: ledger.work_is_ready() == 3)
    claimed = [claim(ledger, f"t{n}") for n in range(3)]
    assert {c.unit_id for c in claimed if c.expired} == {held.unit_id}


def resign_and_adopt(ledger: Ledger, term: Term) -> None:
    """What a change of leaders comes to: the next one adopts a run that it does not know, with the longest hold."""
    ledger.resign(term)
    successor = ledger.lead("successor", HOUR_MS)
    assert successor is not None
    if not ledger.run_is_known():
        ledger.adopt_run(successor, hold_ms=HOUR_MS)


def test_nobody_waits_after_a_leader_resigned_while_no_lease_was_out(ledger: Ledger) -> None:
    start(ledger)
    term = leader(ledger)
    ledger.resign(term)
    assert ledger.claim("worker", "early", HOUR_MS) is None, "the next leader could not know of this lease"
    resign_and_adopt(ledger, term)
    assert claim(ledger, "token").kind is UnitKind.PLAN


def test_nobody_waits_for_a_server_that_restarted_after_its_leader_had_resigned(
    restartable: tuple[Ledger, Callable[[], None]],
) -> None:
    ledger, restart = restartable
    start(ledger)
    term = leader(ledger)
    ledger.resign(term)
    restart()
    resign_and_adopt(ledger, term)
    assert claim(ledger, "token").kind is UnitKind.PLAN


def test_leases_outlive_a_leader_that_resigns(ledger: Ledger) -> None:
    start(ledger, units=2)
    held = claim(ledger, "held")
    ledger.resign(leader(ledger))
    assert ledger.run_is_known()
    assert claim(ledger, "another").kind is UnitKind.COPY, "claims need no leader"
    assert finish(ledger, held) is Finished.DONE


def test_a_lease_that_is_out_when_the_leader_resigns_is_waited_for_after_a_restart(
    restartable: tuple[Ledger, Callable[[], None]],
) -> None:
    ledger, restart = restartable
    start(ledger, units=2)
    claim(ledger, "held")
    term = leader(ledger)
    ledger.resign(term)
    restart()
    resign_and_adopt(ledger, term)
    assert ledger.claim("worker", "token", HOUR_MS) is None


def test_a_leader_that_resigns_shortens_no_hold(ledger: Ledger) -> None:
    start(ledger)
    term = leader(ledger)
    ledger.adopt_run(term, hold_ms=HOUR_MS)
    resign_and_adopt(ledger, term)
    assert ledger.claim("worker", "token", HOUR_MS) is None


def test_a_leader_that_resigns_before_it_adopted_a_restarted_server_leaves_that_to_the_next(
    restartable: tuple[Ledger, Callable[[], None]],
) -> None:
    ledger, restart = restartable
    start(ledger)
    restart()
    term = ledger.lead("leader", HOUR_MS)
    assert term is not None
    resign_and_adopt(ledger, term)
    assert ledger.claim("worker", "token", HOUR_MS) is None


# -- wakes, doorbells, workers --------------------------------------------------------------------------------


def test_many_wakes_of_a_job_are_one(ledger: Ledger) -> None:
    ledger.submit("a", SPEC)
    ledger.submit("b", SPEC)
    for _ in range(20):
        update(ledger, "a", speed=1)
    assert drain_wakes(ledger) == ["a", "b"]


def test_a_wake_ends_the_wait(ledger: Ledger) -> None:
    assert ledger.next_wake(0.01) is None
    submitter = threading.Timer(0.05, ledger.submit, ("job", SPEC))
    submitter.start()
    began = time.monotonic()
    assert ledger.next_wake(30) == "job"
    assert time.monotonic() - began < 15
    submitter.join()


def test_no_more_doorbells_are_outstanding_than_the_limit(ledger: Ledger) -> None:
    assert ledger.ring("mover", ["a", "b", "c"], 2, HOUR_MS) == ["a", "b"]
    assert ledger.ring("mover", ["d"], 2, HOUR_MS) == []
    assert ledger.ring("other", ["d"], 2, HOUR_MS) == ["d"]
    for _ in range(2):
        ledger.woken("mover", "a")
    ledger.woken("mover", "never rung")
    assert ledger.ring("mover", ["e", "f"], 2, HOUR_MS) == ["e"]
    assert ledger.ring("mover", ["g"], 1, HOUR_MS) == []


def test_an_old_doorbell_no_longer_counts(ledger: Ledger) -> None:
    assert ledger.ring("mover", ["a"], 1, HOUR_MS) == ["a"]
    assert ledger.ring("mover", ["b"], 1, 0) == ["b"]
    assert ledger.ring("mover", ["c"], 1, HOUR_MS) == []


def test_workers_are_those_that_said_so_lately(ledger: Ledger) -> None:
    ledger.worker_alive("a", "mover", 4, HOUR_MS)
    ledger.worker_alive("a", "mover", 5, HOUR_MS)
    ledger.worker_alive("dead", "mover", 8, 0)
    ledger.worker_alive("b", "mover", 2, HOUR_MS)
    assert ledger.workers() == {"a": 5, "b": 2}
    ledger.worker_gone("b")
    assert ledger.workers() == {"a": 5}


# -- speed ----------------------------------------------------------------------------------------------------


def test_the_bucket_lets_a_burst_pass_and_then_the_speed(ledger: Ledger) -> None:
    assert ledger.take("job", 1000, speed=100, burst=1000) == 0
    wait_ms = ledger.take("job", 100_000, speed=100, burst=1000)
    assert 990_000 < wait_ms <= 1_000_000
    assert 1_990_000 < ledger.take("job", 100_000, speed=100, burst=1000) <= 2_000_000, "debts add up"
    assert ledger.take("other", 1000, speed=100, burst=1000) == 0


def test_a_changed_speed_counts_from_now(ledger: Ledger) -> None:
    ledger.take("job", 101_000, speed=100, burst=1000)
    assert 199_000 < ledger.take("job", 100_000, speed=1000, burst=1000) <= 200_000
    assert ledger.take("job", 100_000, speed=0, burst=1000) == 0


# -- how fast a job goes --------------------------------------------------------------------------------------


def test_progress_is_timed_and_an_old_mark_gives_way(ledger: Ledger) -> None:
    start(ledger, units=4)
    begun = ledger.job("job").job
    assert begun.rate_from_at == begun.rate_mark_at == begun.progress_at
    assert abs(begun.progress_at - time.time()) < 60
    finish(ledger, claim(ledger, "t1"))
    young = ledger.job("job").job
    assert (young.rate_from_offset, young.rate_mark_offset, young.rate_mark_at) == (0, 0, begun.rate_mark_at)
    assert young.active_s == pytest.approx(young.progress_at - begun.progress_at, abs=1e-3)
    old = young.progress_at - RATE_WINDOW_S
    update(ledger, "job", rate_mark_at=old, rate_mark_offset=7, progress_at=old)
    held = claim(ledger, "t2")
    assert release(ledger, held, remaining=pack_extents([Extent(160, 40, Status.DATA)]), done_bytes=60)
    moved = ledger.job("job").job
    assert (moved.rate_from_at, moved.rate_from_offset) == (pytest.approx(old), 7)
    assert (moved.rate_mark_at, moved.rate_mark_offset) == (moved.progress_at, UNIT + 60)
    assert moved.active_s == pytest.approx(young.active_s + moved.progress_at - old, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "drop"),
    [({"state": State.READY}, False), ({"speed": 5}, False), ({"plan_done": False}, True)],
    ids=["state", "speed", "pass"],
)
def test_what_changes_how_fast_a_job_goes_restarts_its_rate(
    ledger: Ledger, changes: dict[str, object], drop: bool
) -> None:
    start(ledger, units=2)
    finish(ledger, claim(ledger, "t1"))
    update(ledger, "job", rate_from_at=1.0, rate_mark_at=2.0, progress_at=3.0)
    same = update(ledger, "job", state=State.RUNNING, speed=0, error="x")
    assert (same.rate_from_at, same.rate_mark_at, same.progress_at) == (1.0, 2.0, 3.0)
    job = ledger.update("job", ledger.job("job").version, changes, drop_units=drop)
    assert abs(job.progress_at - time.time()) < 60
    assert job.rate_from_at == job.rate_mark_at == job.progress_at
    assert (job.rate_from_offset, job.rate_mark_offset) == (UNIT, UNIT)


# -- events ---------------------------------------------------------------------------------------------------


def test_a_jobs_events_begin_with_created_and_end_with_null(ledger: Ledger) -> None:
    ledger.submit("job", SPEC, "key")
    ledger.submit("job", SPEC)
    ledger.submit("another", SPEC, "key")
    update(ledger, "job", state=State.CONCLUDED)
    ledger.dismiss("job", ledger.job("job").version)
    changes = [(e["event"], e["job"], e["data"]) for e in ledger.events(job_id="job")]
    assert changes == [("JOB_STATUS_CHANGE", "job", {"status": status}) for status in ("created", "concluded", "null")]
    assert len(ledger.events()) == 3


def test_events_come_in_order_and_a_state_change_has_one(ledger: Ledger) -> None:
    ledger.submit("job", SPEC)
    ledger.submit("other", SPEC)
    created = ledger.last_event_id()
    update(ledger, "job", state=State.RUNNING)
    ready = NewEvent(EventName.BLOCK_JOB_READY, {"len": 5})
    ledger.update("job", ledger.job("job").version, {"state": State.READY}, events=[ready])
    update(ledger, "job", state=State.READY)
    update(ledger, "other", state=State.ABORTING)
    events = ledger.events(created)
    assert [(e["event"], e["job"], e["data"]) for e in events] == [
        ("JOB_STATUS_CHANGE", "job", {"status": "running"}),
        ("JOB_STATUS_CHANGE", "job", {"status": "ready"}),
        ("BLOCK_JOB_READY", "job", {"len": 5}),
        ("JOB_STATUS_CHANGE", "other", {"status": "aborting"}),
    ]
    assert all(abs(e["time"] - time.time()) < 60 for e in events)
    ids = [e["id"] for e in events]
    assert ledger.last_event_id() == ids[-1]
    assert [e["id"] for e in ledger.events(ids[1])] == ids[2:]
    assert [e["id"] for e in ledger.events(created, limit=2)] == ids[:2]
    assert [e["id"] for e in ledger.events(created, job_id="other", limit=1)] == ids[3:], "others' are read past"


def test_waiting_for_events_ends_with_the_first(ledger: Ledger) -> None:
    assert ledger.last_event_id() == "0-0"
    assert ledger.events(wait_s=0.01) == []
    for job_id in ("job", "other"):
        ledger.submit(job_id, SPEC)
    last = ledger.last_event_id()

    def cause() -> None:
        update(ledger, "other", state=State.RUNNING)
        update(ledger, "job", state=State.RUNNING)

    causing = threading.Timer(0.05, cause)
    causing.start()
    began = time.monotonic()
    (event,) = ledger.events(last, wait_s=30, job_id="job")
    assert (event["job"], time.monotonic() - began < 15) == ("job", True)
    causing.join()


def test_a_senseless_event_id_is_a_usage_error(ledger: Ledger) -> None:
    with pytest.raises(UsageError):
        ledger.events("yesterday")


def point(epoch: int, group: str = "shop") -> PointRecord:
    member = PointMember(disk="db/vda", size=1 << 30, sync="full", bytes_sent=7)
    return PointRecord(
        group=group, epoch=epoch, cut_at=epoch * 10.5, decided_at=0.0, consistency="crash", job="job", members=(member,)
    )


def record(ledger: Ledger, *points: PointRecord, publish: bool = False, uri: str = "s3://b/p") -> int:
    return ledger.record_points("r", uri, points, ledger.points_mark(), publish=publish)


def test_points_are_remembered_once_and_listed_in_order(ledger: Ledger) -> None:
    points = [point(n) for n in (3, 1, 20)]
    assert record(ledger, *points) == 3
    assert record(ledger, *points) == 0
    assert ledger.points("r", "shop") == [point(1), point(3), point(20)]
    assert ledger.points("r", "shop", after=1, limit=1) == [point(3)]
    assert ledger.point_epochs("r", "shop") == [1, 3, 20]
    assert ledger.points("r", "other") == ledger.points("other", "shop") == []


def test_a_published_point_is_one_event_whoever_recorded_it_first(ledger: Ledger) -> None:
    record(ledger, point(1))  # by a scan that came between the manifest and its writer's word: no news yet
    assert ledger.events() == []
    for _ in range(2):
        record(ledger, point(1), publish=True)
    record(ledger, point(1))
    [event] = ledger.events()
    assert (event["event"], event["job"]) == ("RECOVERY_POINT", "job")
    assert event["data"] == {"repository": "r", "group": "shop", "epoch": 1, "cut_at": 10.5}


def test_what_a_listing_did_not_find_is_forgotten_unless_it_was_recorded_since(ledger: Ledger) -> None:
    record(ledger, point(1), point(2), point(3), point(1, "other"))
    mark = ledger.points_mark()
    record(ledger, point(3), point(4))  # published while the listing is under way
    assert ledger.retain_points("r", "shop", [2], mark) == 1
    assert ledger.point_epochs("r", "shop") == [2, 3, 4]
    assert ledger.point_epochs("r", "other") == [1]


def test_who_saw_a_point_before_it_was_forgotten_does_not_bring_it_back(ledger: Ledger) -> None:
    record(ledger, point(1), point(2), publish=True)
    mark = ledger.points_mark()  # a scan reads manifests ...
    ledger.forget_points("r", "shop", [1])  # ... and a prune removes one of them
    assert ledger.record_points("r", "s3://b/p", [point(1), point(2), point(3)], mark) == 1
    assert ledger.point_epochs("r", "shop") == [2, 3]
    assert record(ledger, point(1)) == 1, "who sees it now is right: it is there after all"


def test_a_group_is_forgotten_with_its_last_point(ledger: Ledger) -> None:
    record(ledger, point(1), point(2), point(1, "other"))
    assert ledger.point_groups("r") == {"other": 1, "shop": 2}
    ledger.forget_points("r", "shop", [1, 2, 9])
    assert ledger.point_groups("r") == {"other": 1}
    ledger.retain_points("r", "other", [], ledger.points_mark())
    assert ledger.point_groups("r") == {}
    assert record(ledger, point(1)) == 1


def test_marks_grow_even_if_the_server_has_lost_its_memory(ledger: Ledger) -> None:
    marks = [ledger.points_mark() for _ in range(100)]
    assert marks == sorted(set(marks))
    assert marks[0] > time.time() * 1_000_000 - HOUR_MS * 1000, "they begin with the time, not with 1"


def test_a_repository_is_known_by_the_uri_that_named_it_last_and_scanned_when_it_was(ledger: Ledger) -> None:
    assert ledger.repositories() == []
    record(ledger, uri="s3://b/p?key=env:A")
    assert ledger.repositories() == [RepositoryRecord(id="r", uri="s3://b/p?key=env:A", scanned_at=0.0)]
    ledger.scanned("r", "s3://b/p?key=env:B")
    [known] = ledger.repositories()
    assert known.uri == "s3://b/p?key=env:B"
    assert known.scanned_at > 0
    record(ledger, uri="s3://b/q")
    assert ledger.repositories() == [known.model_copy(update={"uri": "s3://b/q"})]


def test_more_points_than_one_script_takes_are_all_recorded(ledger: Ledger) -> None:
    assert record(ledger, *(point(n) for n in range(1, 251))) == 250
    assert [p.epoch for p in ledger.points("r", "shop", limit=1000)] == list(range(1, 251))


def test_ping_answers(ledger: Ledger) -> None:
    ledger.ping()


def test_a_server_set_up_as_it_should_be_has_no_shortcomings(ledger: Ledger) -> None:
    assert ledger.shortcomings() == []
