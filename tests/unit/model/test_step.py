"""The control loop's decisions as rules, asserted on the sentence it would log."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.model.errors import RefusedError
from coordinator.model.events import EventName
from coordinator.model.job import VERBS, IoStatus, JobRecord, JobSpec, State, Sync, Verb, transition_is_legal
from coordinator.model.step import MAX_COMPLETE_PASSES, Step, VerbArguments, apply_verb, next_step
from coordinator.model.task import RepositoryTask, TaskKind
from coordinator.model.units import QuarantinedUnit, UnitKind

NOW = 1000.0


def job(**fields: object) -> JobRecord:
    spec = {"source": "/s", "target": "/t"}
    for name in ("sync", "auto_complete", "auto_finalize", "on_source_error", "on_target_error"):
        if name in fields:
            spec[name] = fields.pop(name)  # type: ignore[assignment]
    return JobRecord.model_validate({"id": "j", "spec": JobSpec.model_validate(spec), **fields})


def settled(**fields: object) -> JobRecord:
    """Its source cannot change, unless told otherwise; where it is ready, that has been told."""
    ready = fields.get("state") is State.READY and not fields.get("source_may_change")
    given = {"pass_number": 1, "pass_kind": "settle", "plan_done": True, "settled": True, "synced": ready, **fields}
    return job(**given)


def step_of(record: JobRecord) -> Step:
    step = next_step(record, NOW)
    assert step is not None
    return step


def after(record: JobRecord, step: Step) -> JobRecord:
    return record.model_copy(update=dict(step.changes))


def test_a_created_job_starts_with_a_plan_unit() -> None:
    step = step_of(job())
    assert step.sentence == "starts with a copy pass"
    assert step.new_unit is UnitKind.PLAN
    assert step.changes["state"] is State.RUNNING


def test_a_task_is_one_unit_from_start_to_end() -> None:
    task = RepositoryTask(kind=TaskKind.CHECK, repository="repo+file:///r")
    record = JobRecord(id="j", spec=JobSpec(task=task))
    step = step_of(record)
    assert step.new_unit is UnitKind.TASK
    done = after(record, step).model_copy(update={"settled": True})
    states = []
    while (following := next_step(done, NOW)) is not None:
        done = after(done, following)
        states.append(done.state)
    assert states == [State.READY, State.WAITING, State.PENDING, State.CONCLUDED]


def test_a_job_with_an_epoch_publishes_it_before_it_is_pending() -> None:
    record = settled(state=State.WAITING, epoch=3)
    assert step_of(record).new_unit is UnitKind.PUBLISH
    assert next_step(record.model_copy(update={"units_leased": 1}), NOW) is None
    assert step_of(record.model_copy(update={"published": True})).changes["state"] is State.PENDING


@pytest.mark.parametrize("why", [{"fatal": True, "error": "x"}, {"cancel_requested": "soft"}])
def test_an_aborted_epoch_is_abandoned_before_the_job_concludes(why: dict[str, object]) -> None:
    record = job(state=State.ABORTING, epoch=3, units_ready=5, **why)
    assert next_step(record.model_copy(update={"units_leased": 1}), NOW) is None
    step = step_of(record)
    assert (step.new_unit, step.drop_units, step.changes["closing"]) == (UnitKind.ABANDON, True, True)
    waiting = record.model_copy(update={"closing": True, "units_ready": 1})
    assert next_step(waiting, NOW) is None
    given_up = waiting.model_copy(update={"units_ready": 0, "units_quarantined": 1})
    assert step_of(given_up).changes["state"] is State.CONCLUDED
    published = record.model_copy(update={"published": True})
    assert step_of(published).changes["state"] is State.CONCLUDED


def test_a_publication_that_a_policy_stopped_is_resumed() -> None:
    stopped = settled(state=State.WAITING, epoch=3, pause_requested=True, units_quarantined=1)
    assert next_step(stopped, NOW) is None
    resumed = after(stopped, apply_verb(stopped, Verb.RESUME, VerbArguments()))
    assert step_of(resumed.model_copy(update={"units_quarantined": 0})).new_unit is UnitKind.PUBLISH


def test_a_forced_cancel_waits_for_no_worker_to_abandon_the_epoch() -> None:
    closing = job(state=State.ABORTING, epoch=3, closing=True, units_ready=1, cancel_requested="soft")
    assert next_step(closing, NOW) is None
    forced = closing.model_copy(update={"cancel_requested": "force"})
    assert step_of(forced).changes["state"] is State.CONCLUDED


def test_a_cancel_that_came_after_the_publication_says_so() -> None:
    record = job(state=State.ABORTING, epoch=3, group="shop", published=True, cancel_requested="soft")
    assert "shop@3 was published" in step_of(record).changes["error"]


def test_an_incremental_job_starts_with_a_comparing_pass() -> None:
    assert step_of(job(sync=Sync.INCREMENTAL)).sentence == "starts with a compare pass"


@pytest.mark.parametrize("out", [{"units_ready": 1}, {"units_leased": 1}])
def test_a_pass_waits_for_its_units(out: dict[str, int]) -> None:
    assert next_step(job(state=State.RUNNING, pass_number=1, pass_kind="copy", plan_done=True, **out), NOW) is None


def test_a_copied_pass_settles_before_it_is_ready() -> None:
    running = job(state=State.RUNNING, pass_number=1, pass_kind="copy", plan_done=True)
    step = step_of(running)
    assert step.new_unit is UnitKind.SETTLE
    assert "state" not in step.changes


def test_a_redone_pass_settles_again() -> None:
    step = step_of(job(state=State.RUNNING, pass_number=1, pass_kind="settle", plan_done=True, settled=False))
    assert step.new_unit is UnitKind.SETTLE


def test_a_settled_job_is_ready_and_says_so() -> None:
    step = step_of(settled(state=State.RUNNING))
    assert step.changes["state"] is State.READY
    assert [name for name, _ in step.events] == [EventName.MIRROR_STATE_CHANGE, EventName.BLOCK_JOB_READY]
    assert step.events[0][1] == {"synced": True}
    assert after(settled(state=State.RUNNING), step).synced


@pytest.mark.parametrize(
    ("found", "synced"),
    [
        ({}, False),
        ({"compared": True, "pass_sent": 1}, False),
        ({"compared": True, "source_written": True}, False),
        ({"compared": True}, True),
    ],
    ids=["copied", "differed", "written", "clean"],
)
def test_a_source_that_may_change_is_called_in_sync_by_a_clean_comparison_alone(
    found: dict[str, object], synced: bool
) -> None:
    """Ready says that all of it was copied once."""
    step = step_of(settled(state=State.RUNNING, source_may_change=True, **found))
    assert step.changes["state"] is State.READY
    told = [data for name, data in step.events if name is EventName.MIRROR_STATE_CHANGE]
    assert told == ([{"synced": True}] if synced else [])


def test_sync_that_was_lost_and_found_again_is_told_each_time() -> None:
    """By a pass that finds a difference, a refusal, and the pass after it that finds none."""
    ready = settled(state=State.READY, source_may_change=True, compared=True, synced=True, auto_complete=False)
    assert next_step(ready, NOW) is None
    differs = after(ready, apply_verb(ready, Verb.COMPLETE, VerbArguments()))
    differs = differs.model_copy(update={"complete_passes": MAX_COMPLETE_PASSES, "pass_sent": 1})
    lost = step_of(differs)
    assert lost.events == ((EventName.MIRROR_STATE_CHANGE, {"synced": False}),)
    refusal = step_of(after(differs, lost))
    assert (refusal.sentence, refusal.events) == ("refuses to complete", ())
    refused = after(after(differs, lost), refusal)
    asked = after(refused, apply_verb(refused, Verb.COMPLETE, VerbArguments()))
    compares = step_of(asked)
    assert compares.events == ()
    clean = after(asked, compares).model_copy(update={"settled": True})
    found = step_of(clean)
    assert (found.sentence, found.events) == ("in sync", ((EventName.MIRROR_STATE_CHANGE, {"synced": True}),))
    assert step_of(after(clean, found)).sentence == "in sync and flushed, completes"


def test_a_ready_job_waits_for_complete_unless_told_to_complete_by_itself() -> None:
    assert next_step(settled(state=State.READY, auto_complete=False), NOW) is None
    assert step_of(settled(state=State.READY)).changes["state"] is State.WAITING


def test_a_source_that_cannot_change_completes_after_one_pass() -> None:
    assert step_of(settled(state=State.READY)).sentence == "in sync and flushed, completes"


def test_a_source_that_may_change_is_compared_before_it_completes() -> None:
    step = step_of(settled(state=State.READY, source_may_change=True))
    assert step.changes["pass_kind"] == "compare"
    assert step.changes["pass_number"] == 2


def test_a_comparing_pass_that_found_nothing_is_in_sync() -> None:
    compared = settled(state=State.READY, source_may_change=True, compared=True, complete_passes=1)
    told = step_of(compared)
    assert told.sentence == "in sync"
    assert step_of(after(compared, told)).sentence == "in sync and flushed, completes"


def test_what_was_compared_before_complete_was_asked_for_proves_nothing() -> None:
    held = settled(state=State.READY, source_may_change=True, compared=True, synced=True, auto_complete=False)
    asked = after(held, apply_verb(held, Verb.COMPLETE, VerbArguments()))
    assert step_of(asked).changes["pass_kind"] == "compare"


def test_a_job_that_compares_again_may_be_paused() -> None:
    comparing = settled(state=State.READY, settled=False, pass_kind="compare", complete_passes=1, pause_requested=True)
    assert step_of(comparing).changes["state"] is State.STANDBY


def test_a_source_that_never_rests_refuses_complete_and_the_job_goes_on() -> None:
    waiting = settled(
        state=State.READY,
        source_may_change=True,
        compared=True,
        pass_sent=1,
        complete_passes=MAX_COMPLETE_PASSES,
        auto_complete=False,
        complete_requested=True,
    )
    step = step_of(waiting)
    assert step.sentence == "refuses to complete"
    back = after(waiting, step)
    assert back.state is State.READY
    assert not back.complete_requested
    assert back.error


def test_pause_waits_until_no_mover_writes() -> None:
    asked = job(state=State.RUNNING, pause_requested=True, pass_number=1, units_leased=1)
    assert next_step(asked, NOW) is None
    assert step_of(asked.model_copy(update={"units_leased": 0})).changes["state"] is State.PAUSED


def test_cancel_of_a_paused_job_concludes() -> None:
    paused = job(state=State.PAUSED, pause_requested=True, pass_number=1, cancel_requested="soft")
    aborting = after(paused, step_of(paused))
    assert aborting.state is State.ABORTING
    step = step_of(aborting)
    assert step.sentence == "cancelled"
    assert [name for name, _ in step.events] == [EventName.BLOCK_JOB_CANCELLED]


def test_an_abort_waits_until_no_mover_writes() -> None:
    assert next_step(job(state=State.ABORTING, fatal=True, error="x", units_leased=1), NOW) is None


def quarantined(**fields: object) -> JobRecord:
    given = {"state": State.RUNNING, "pass_number": 1, "pass_kind": "copy", "units_quarantined": 2, **fields}
    return job(**given)


SILENT = [
    QuarantinedUnit(100, 200, UnitKind.COPY, 5, ""),
    QuarantinedUnit(200, 300, UnitKind.COPY, 5, ""),
]


@pytest.mark.parametrize("out", [{}, {"units_ready": 1}, {"units_leased": 1}])
def test_report_fails_a_job_with_given_up_units_at_once_by_range_cause_and_remedy(out: dict[str, int]) -> None:
    step = next_step(quarantined(**out), NOW, SILENT)
    assert step is not None
    assert step.changes["fatal"] is True
    assert step.changes["error"] == (
        "2 work units were given up after 5 attempts (200 bytes at 100). The last attempt ended without a word: a"
        " worker died, or met what only its log tells. Mend the cause (see the workers' logs, and flushpoint events"
        " --job j), then submit the job again"
    )
    assert [(name, data["action"], data["offset"], data["length"]) for name, data in step.events] == [
        (EventName.BLOCK_JOB_ERROR, "report", 100, 100),
        (EventName.BLOCK_JOB_ERROR, "report", 200, 100),
    ]


@pytest.mark.parametrize("policy", ["stop", "enospc"])
@pytest.mark.parametrize(("side", "status"), [("source", "io_status"), ("target", "target_io_status")])
def test_stop_pauses_a_job_with_given_up_units_and_resume_retries_them(policy: str, side: str, status: str) -> None:
    record = quarantined(units_ready=1, **{f"on_{side}_error": policy})
    step = next_step(record, NOW, SILENT)
    assert step is not None
    assert [data["action"] for _, data in step.events] == ["stop", "stop"]
    stopped = after(record, step)
    assert getattr(stopped, status) is IoStatus.FAILED
    assert {stopped.io_status, stopped.target_io_status} == {IoStatus.OK, IoStatus.FAILED}
    assert "200 bytes at 100" in stopped.error
    assert not stopped.fatal
    paused = after(stopped, step_of(stopped))
    assert paused.state is State.PAUSED
    assert next_step(paused, NOW, SILENT) is None
    resumed = apply_verb(paused, Verb.RESUME, VerbArguments())
    assert resumed.retry_quarantined
    assert after(paused, resumed).error == ""


def test_ignore_copies_all_else_before_given_up_units_fail_the_job() -> None:
    known = [QuarantinedUnit(100, 200, UnitKind.COPY, 5, "cannot read 9 bytes at 100 of /s: Input/output error.")]
    record = quarantined(units_quarantined=1, on_source_error="ignore", plan_done=True)
    assert next_step(record.model_copy(update={"units_ready": 1}), NOW, known) is None
    step = next_step(record, NOW, known)
    assert step is not None
    assert step.changes["fatal"] is True
    assert step.changes["error"].startswith(
        "1 work unit was given up after 5 attempts (100 bytes at 100). The last attempt failed: cannot read 9 bytes at"
        " 100 of /s: Input/output error. Mend"
    )
    assert step.events == (), "each attempt had its event"


def test_a_given_up_plan_is_named_and_many_ranges_are_counted() -> None:
    apart = [QuarantinedUnit(n * 1000, n * 1000 + 10, UnitKind.COPY, 5, "") for n in range(6)]
    step = next_step(quarantined(), NOW, [QuarantinedUnit(0, 0, UnitKind.PLAN, 5, ""), *apart])
    assert step is not None
    assert "(the plan, 10 bytes at 0, 10 bytes at 1000, 10 bytes at 2000 and 3 more)" in step.changes["error"]
    assert len(step.events) == 7


def test_resume_resets_the_io_status() -> None:
    paused = job(
        state=State.PAUSED, pause_requested=True, pass_number=1, target_io_status=IoStatus.NOSPACE, error="full"
    )
    resumed = after(paused, apply_verb(paused, Verb.RESUME, VerbArguments()))
    assert resumed.state is State.RUNNING
    assert resumed.target_io_status is IoStatus.OK
    assert resumed.error == ""


def test_verbs_outside_their_states_are_refused_with_a_remedy() -> None:
    for state, verb in itertools.product(State, Verb):
        record = job(state=state)
        if state in VERBS[verb]:
            apply_verb(record, verb, VerbArguments(speed=1))
        else:
            with pytest.raises(RefusedError) as refused:
                apply_verb(record, verb, VerbArguments(speed=1))
            assert str(state) in refused.value.message
            assert refused.value.remedy


records = st.builds(
    job,
    state=st.sampled_from(State),
    pass_number=st.integers(0, 3),
    pass_kind=st.sampled_from(["copy", "compare", "settle"]),
    plan_done=st.booleans(),
    compared=st.booleans(),
    synced=st.booleans(),
    settled=st.booleans(),
    source_may_change=st.booleans(),
    pass_sent=st.integers(0, 1),
    complete_passes=st.integers(0, MAX_COMPLETE_PASSES),
    units_ready=st.integers(0, 1),
    units_leased=st.integers(0, 1),
    units_quarantined=st.integers(0, 1),
    pause_requested=st.booleans(),
    cancel_requested=st.sampled_from(["", "soft", "force"]),
    complete_requested=st.booleans(),
    fatal=st.booleans(),
    auto_complete=st.booleans(),
    auto_finalize=st.booleans(),
)


@given(records)
def test_every_step_is_a_legal_transition(record: JobRecord) -> None:
    step = next_step(record, NOW)
    if step is not None and "state" in step.changes and step.changes["state"] != record.state:
        assert transition_is_legal(record.state, step.changes["state"])


@given(records)
def test_a_job_settles_into_waiting_within_a_visit(record: JobRecord) -> None:
    """With its units done at once, every job comes to rest: no step repeats for ever."""
    for _ in range(20 + 6 * MAX_COMPLETE_PASSES):
        step = next_step(record, NOW)
        if step is None:
            return
        record = after(record, step)
        if step.drop_units:
            record = record.model_copy(update={"units_ready": 0, "units_leased": 0, "units_quarantined": 0})
        if step.new_unit is UnitKind.PLAN:
            record = record.model_copy(update={"plan_done": True})
        if step.new_unit is UnitKind.SETTLE:
            record = record.model_copy(update={"settled": True})
    raise AssertionError(f"still stepping: {record}")


@given(records)
def test_nobody_may_still_write_when_a_job_has_concluded(record: JobRecord) -> None:
    step = next_step(record, NOW)
    if step is not None and step.changes.get("state") is State.CONCLUDED and record.state is State.ABORTING:
        assert record.units_leased == 0
