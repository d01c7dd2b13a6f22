"""A lease stops its mover by the mover's own clock, and kills it if it was not running to be stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from coordinator.ledger import MemoryLedger
from coordinator.model.errors import UnavailableError
from coordinator.model.units import Claim, Directive, UnitKind
from workers.mover.lease import AbortedError, Halt, Lease, LeaseLostError


def claim(lease_ms: int) -> Claim:
    return Claim("j", "u", UnitKind.COPY, 1, "token", lease_ms, 0, 1, "", 0, 0, rewrite=False)


class Renewals(MemoryLedger):
    """Answers renewals from a list; the last answer goes on for ever. An exception is raised."""

    def __init__(self, *answers: Directive | Exception) -> None:
        super().__init__()
        self.answers = list(answers)

    def renew(self, job_id: str, unit_id: str, token: str, lease_ms: int) -> Directive:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


HELD = Directive(held=True, run=True, speed=0)


def lease_over(ledger: MemoryLedger, lease_ms: int = 60_000, closing: bool = False) -> Lease:
    return Lease(ledger, claim(lease_ms), 0.01, time.monotonic(), 0, lambda: closing)


def wait_for_halt(lease: Lease) -> Halt | None:
    deadline = time.monotonic() + 5
    while lease.halt is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return lease.halt


def test_a_lease_taken_away_halts_its_mover() -> None:
    with lease_over(Renewals(HELD, Directive(held=False, run=False, speed=0))) as lease:
        assert wait_for_halt(lease) is Halt.LOST
        with pytest.raises(LeaseLostError):
            lease.assert_held()


def test_a_pause_halts_a_mover_that_keeps_its_lease() -> None:
    with lease_over(Renewals(HELD, Directive(held=True, run=False, speed=0))) as lease:
        assert wait_for_halt(lease) is Halt.YIELD
        lease.assert_held()


def test_a_cancel_by_force_breaks_off_what_the_mover_waits_for_and_keeps_its_lease() -> None:
    broken_off = threading.Event()
    by_force = Directive(held=True, run=False, speed=0, force=True)
    with Lease(
        Renewals(HELD, by_force), claim(60_000), 0.01, time.monotonic(), 0, lambda: False, broken_off.set
    ) as lease:
        assert broken_off.wait(5)
        assert lease.halt is Halt.ABORT
        with pytest.raises(AbortedError):
            lease.assert_held()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0  # it may still be writing to a file


def test_nothing_is_broken_off_once_the_work_is_over() -> None:
    """The answer to a renewal comes late: by then the disks may be another unit's."""
    asked, answer, broken_off = threading.Event(), threading.Event(), threading.Event()

    class Late(MemoryLedger):
        def renew(self, job_id: str, unit_id: str, token: str, lease_ms: int) -> Directive:
            asked.set()
            assert answer.wait(5)
            return Directive(held=True, run=False, speed=0, force=True)

    lease = Lease(Late(), claim(60_000), 0.01, time.monotonic(), 0, lambda: False, broken_off.set)
    with lease:
        assert asked.wait(5)
    answer.set()
    lease._thread.join(5)
    assert not broken_off.is_set()


def test_a_closing_worker_halts_its_movers() -> None:
    with lease_over(Renewals(HELD), closing=True) as lease:
        assert wait_for_halt(lease) is Halt.YIELD


def test_a_new_speed_arrives_with_a_renewal() -> None:
    with lease_over(Renewals(HELD, Directive(held=True, run=True, speed=42))) as lease:
        deadline = time.monotonic() + 5
        while lease.speed != 42:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_a_mover_cut_off_from_the_ledger_stops_itself_before_its_lease_ends() -> None:
    begun = time.monotonic()
    with lease_over(Renewals(UnavailableError("away")), lease_ms=2000) as lease:
        assert wait_for_halt(lease) is Halt.LOST
        assert time.monotonic() - begun < 2


def test_the_timer_is_disarmed_when_the_work_is_over() -> None:
    with lease_over(Renewals(HELD)):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


ZOMBIE = """
import os, signal, time
from tests.unit.mover.test_lease import HELD, Renewals, lease_over
with lease_over(Renewals(HELD), lease_ms=300):
    print("leased", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    print("wrote old data", flush=True)
"""


def test_a_mover_stopped_past_its_lease_dies_on_waking() -> None:
    child = subprocess.Popen([sys.executable, "-c", ZOMBIE], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout as out:
        assert out.readline().strip() == "leased"
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        time.sleep(0.5)  # its lease runs out: nothing but time passing can be waited for
        os.kill(child.pid, signal.SIGCONT)
        assert out.read() == ""
    assert child.wait(5) == -signal.SIGALRM
