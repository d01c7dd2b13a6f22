"""The control loop over the in-memory ledger: its sentences, its fencing, its doorbells."""

from __future__ import annotations

import secrets
import threading

import pytest
from kombu.exceptions import OperationalError
from structlog.testing import capture_logs

from coordinator.ledger import DeposedError, Finished, MemoryLedger, Term
from coordinator.model.epoch import EpochSpec, Participant
from coordinator.model.errors import FlushpointError, UnavailableError
from coordinator.model.extent import Extent, Status
from coordinator.model.job import JobSpec, State, Verb
from coordinator.model.messages import Doorbell
from coordinator.model.step import VerbArguments, apply_verb
from coordinator.model.units import UnitKind, plan_units
from coordinator.service.control import ControlLoop
from coordinator.service.dispatcher import BELLS_PER_SLOT, Dispatcher, Ringer
from coordinator.settings import Settings
from tests.stack import wait_until

SPEC = JobSpec(source="/s", target="/t")
LEASE_MS = 15_000


class Bench:
    """One coordinator over one ledger, with the doorbells it sent."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self.ledger = ledger
        self.settings = Settings(cycle_s=0.01, leader_ttl_s=5, keep_concluded=100)
        self.bells: list[Doorbell] = []
        self.control = self.another()

    def another(self) -> ControlLoop:
        return ControlLoop(self.ledger, self.settings, Dispatcher(self.ledger, self.settings, self.bells.append).top_up)

    def cycles(self, count: int = 4) -> list[str]:
        return [sentence for _ in range(count) for sentence in self.control.cycle()]


@pytest.fixture
def bench() -> Bench:
    return Bench(MemoryLedger())


def copy_everything(ledger: MemoryLedger) -> None:
    """A mover without disks."""
    while (claim := ledger.claim("m", f"t{ledger.last_event_id()}{id(object())}", LEASE_MS)) is not None:
        if claim.kind is UnitKind.PLAN:
            ledger.opened(claim.job_id, claim.unit_id, claim.token, {"disk_size": 100, "max_writers": 0})
            units = list(plan_units([Extent(0, 100, Status.DATA)], 100))
            assert ledger.add_units(claim.job_id, claim.unit_id, claim.token, UnitKind.COPY, 0, 100, units)
        assert ledger.finish(claim.job_id, claim.unit_id, claim.token) is Finished.DONE


def test_a_job_is_driven_from_created_to_concluded(bench: Bench) -> None:
    bench.ledger.submit("j", SPEC)
    sentences = bench.cycles()
    assert "job j starts with a copy pass" in sentences
    assert bench.bells
    for _ in range(4):
        copy_everything(bench.ledger)
        sentences += bench.cycles()
    assert [s for s in sentences if s.startswith("job j")] == [
        "job j starts with a copy pass",
        "job j everything is copied, settles",
        "job j ready",
        "job j in sync and flushed, completes",
        "job j has nothing left to do",
        "job j concluded",
    ]
    job = bench.ledger.job("j").job
    assert job.state is State.CONCLUDED
    assert job.len == job.offset == 100


def test_an_epoch_whose_machines_are_silent_is_ended_by_the_sweep(bench: Bench) -> None:
    bench.cycles(1)
    term = bench.control._term
    assert term is not None
    machine = Participant(vm="db", host="hv1", disks=("vda",))
    bench.ledger.open_epoch(term, "shop", EpochSpec(participants=(machine,), prepare_ms=1, freeze_ms=1, hold_ms=1))
    sentences: list[str] = []
    wait_until(lambda: sentences.extend(bench.cycles(1)) or sentences, "a sweep that finds it", 5)
    assert sentences == ["epoch shop@1 is aborted: not prepared in time: db"]


def lose_workers(bench: Bench) -> None:
    """Whoever claims a unit dies, until the job does not run any more."""
    for _ in range(200):  # many a cycle waits for a wake-up and reaps nothing
        bench.ledger.claim("m", secrets.token_hex(4), 0)
        bench.control.cycle()
        if bench.ledger.job("j").job.state in (State.PAUSED, State.CONCLUDED):
            return


def planned(bench: Bench, **spec: str) -> None:
    """A running job with one copy unit of 100 bytes."""
    bench.ledger.submit("j", JobSpec.model_validate({**SPEC.model_dump(), **spec}))
    bench.cycles()
    plan = bench.ledger.claim("m", "plan", LEASE_MS)
    assert plan is not None
    bench.ledger.opened("j", plan.unit_id, "plan", {"disk_size": 100, "max_writers": 0})
    units = list(plan_units([Extent(0, 100, Status.DATA)], 100))
    assert bench.ledger.add_units("j", plan.unit_id, "plan", UnitKind.COPY, 0, 100, units)
    assert bench.ledger.finish("j", plan.unit_id, "plan") is Finished.DONE


def test_units_whose_workers_keep_dying_fail_a_job_that_reports_errors(bench: Bench) -> None:
    planned(bench)
    lose_workers(bench)
    job = bench.ledger.job("j").job
    assert job.state is State.CONCLUDED
    assert job.error.startswith("1 work unit was given up after 5 attempts (100 bytes at 0). The last attempt ended")


def test_units_whose_workers_keep_dying_pause_a_job_that_stops_on_errors_until_it_is_resumed(bench: Bench) -> None:
    planned(bench, on_target_error="stop")
    lose_workers(bench)
    found = bench.ledger.job("j")
    assert (found.job.state, found.job.target_io_status) == (State.PAUSED, "failed")
    resume = apply_verb(found.job, Verb.RESUME, VerbArguments())
    bench.ledger.update("j", found.version, resume.changes, retry_quarantined=resume.retry_quarantined)
    for _ in range(4):
        copy_everything(bench.ledger)
        bench.cycles()
    job = bench.ledger.job("j").job
    assert (job.state, job.error, job.offset) == (State.CONCLUDED, "", 100)


def test_of_concluded_jobs_the_newest_are_kept_and_the_others_are_dismissed(bench: Bench) -> None:
    for n in range(bench.settings.keep_concluded + 2):
        bench.ledger.submit(f"j{n}", SPEC)
        bench.ledger.update(f"j{n}", 1, {"state": State.CONCLUDED})
    bench.ledger.submit("active", SPEC)
    sentences = bench.cycles(1)
    keep = bench.settings.keep_concluded
    assert sentences[-2:] == [f"job j{n} is dismissed: {keep} have concluded after it" for n in (0, 1)]
    left = {job.id for job in bench.ledger.jobs(limit=1000)}
    assert left == {"active", *(f"j{n}" for n in range(2, keep + 2))}
    assert [event["data"] for event in bench.ledger.events(job_id="j0")][-1] == {"status": "null"}


def test_a_second_coordinator_only_watches(bench: Bench) -> None:
    bench.cycles(1)
    other = bench.another()
    other.cycle()
    assert bench.control.leads
    assert not other.leads


def test_a_leader_keeps_its_generation_from_cycle_to_cycle(bench: Bench) -> None:
    assert [s for s in bench.cycles(10) if s.startswith("leads")] == ["leads with generation 1"]


def test_a_deposed_coordinator_changes_nothing(bench: Bench) -> None:
    bench.ledger.submit("j", SPEC)
    first = bench.ledger.lead("first", 60_000)
    assert first is not None
    bench.ledger.resign(first)
    assert bench.ledger.lead("second", 60_000) is not None
    with pytest.raises(DeposedError):
        bench.control.visit("j", first)
    assert bench.ledger.job("j").job.state is State.CREATED


def test_a_restarted_server_is_adopted_before_anything_is_claimed(bench: Bench) -> None:
    bench.ledger.submit("j", SPEC)
    bench.cycles()
    bench.ledger.restart()
    assert bench.ledger.claim("m", "t", LEASE_MS) is None
    sentences = bench.cycles()
    assert any(s.startswith("adopts the ledger's server") and "wait up to 20 s" in s for s in sentences)


def test_an_idle_deployment_waits_for_nobody(bench: Bench) -> None:
    assert any("wait up to 0 s" in s for s in bench.cycles(1))


def test_doorbells_outstanding_are_at_most_two_a_slot(bench: Bench) -> None:
    bench.ledger.worker_alive("w", "mover", 3, 60_000)
    for n in range(50):
        bench.ledger.submit(f"j{n}", SPEC)
    bench.cycles(60)
    assert len(bench.bells) == BELLS_PER_SLOT * 3


def test_a_broker_that_hangs_stops_no_decision(bench: Bench) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def send(bell: Doorbell) -> None:
        hangs.set()
        assert goes_on.wait(30)
        bench.bells.append(bell)

    ringer = Ringer(Dispatcher(bench.ledger, bench.settings, send).top_up)
    ringer.start()
    bench.control = ControlLoop(bench.ledger, bench.settings, ringer.ask)
    bench.ledger.submit("j", SPEC)
    bench.cycles()
    assert hangs.wait(30)
    bench.ledger.update("j", bench.ledger.job("j").version, {"pause_requested": True})
    bench.cycles()
    assert bench.ledger.job("j").job.state is State.PAUSED
    assert bench.control.leads
    goes_on.set()
    wait_until(lambda: len(bench.bells) == 1, "the doorbell")


@pytest.mark.parametrize("trouble", [OperationalError("away"), UnavailableError("no ledger"), ZeroDivisionError("bug")])
def test_a_ringing_that_fails_is_done_when_it_is_asked_for_again(trouble: Exception) -> None:
    troubles, rings = [trouble], threading.Semaphore(0)

    def top_up() -> int:
        rings.release()
        if troubles:
            raise troubles.pop()
        return 1

    ringer = Ringer(top_up)
    ringer.start()
    for _ in range(2):
        ringer.ask()
        assert rings.acquire(timeout=30)


def test_a_coordinator_whose_term_ran_out_meanwhile_does_not_lead(bench: Bench) -> None:
    bench.settings = Settings(cycle_s=0.01, leader_ttl_s=0.05)
    bench.control = bench.another()
    bench.cycles(1)
    wait_until(lambda: not bench.control.leads, "the end of the term")
    bench.cycles(1)
    assert bench.control.leads


@pytest.mark.parametrize("trouble", [None, UnavailableError("failover")])
def test_a_coordinator_that_ends_resigns_even_from_a_term_that_trouble_made_it_step_down_from(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, trouble: Exception | None
) -> None:
    def end() -> bool:
        bench.control.stop()
        if trouble is not None:
            raise trouble
        return True

    monkeypatch.setattr(bench.ledger, "run_is_known", end)
    bench.control.run()
    assert not bench.ledger.led()
    assert bench.ledger.lead("next", 60_000) == Term(2, "next")


def test_a_generation_never_falls_not_even_in_a_ledger_that_lost_everything(bench: Bench) -> None:
    for nonce in ("one", "two", "three"):
        term = bench.ledger.lead(nonce, 60_000)
        assert term is not None
        bench.ledger.resign(term)
    assert "leads with generation 4" in bench.cycles(1)
    MemoryLedger.__init__(bench.ledger)
    assert [s for s in bench.cycles(2) if s.startswith("leads")] == [], "the term goes on"
    bench.control.stop()
    bench.control.run()
    assert bench.ledger.lead("next", 60_000) == Term(5, "next")


def test_a_leader_warns_of_what_the_ledgers_server_may_cost_at_its_start_and_the_servers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.ledger, "shortcomings", lambda: ["it forgets"])

    def warnings() -> list[str]:
        with capture_logs() as logs:
            bench.cycles()
        return [entry["event"] for entry in logs if entry["log_level"] == "warning"]

    assert warnings() == ["the ledger's server: it forgets"]
    assert warnings() == []
    bench.ledger.restart()
    assert warnings() == ["the ledger's server: it forgets"]


def test_a_cycle_that_fails_stops_no_coordinator(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised: a failover, a refusal nobody foresaw, a mistake of ours."""
    troubles = [UnavailableError("failover"), FlushpointError("NOPERM"), ZeroDivisionError("a bug")]
    real = bench.ledger.run_is_known

    def fail_first() -> bool:
        if troubles:
            raise troubles.pop(0)
        return real()

    monkeypatch.setattr(bench.ledger, "run_is_known", fail_first)
    bench.ledger.submit("j", SPEC)
    loop = threading.Thread(target=bench.control.run)
    loop.start()
    try:
        wait_until(lambda: bench.ledger.job("j").job.state is State.RUNNING, "the first step")
        assert not troubles
    finally:
        bench.control.stop()
        loop.join(10)
