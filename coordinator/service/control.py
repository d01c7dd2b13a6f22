"""One coordinator: leads if it can, and then reconciles jobs, reaps leases and has doorbells rung."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable

import structlog
from pydantic import ValidationError

from coordinator.ledger.contract import (
    GROUP_WAKE,
    ConflictError,
    DeposedError,
    Ledger,
    NewEvent,
    NewUnit,
    Term,
    UnreadableGroupError,
)
from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError
from coordinator.model.job import State
from coordinator.model.step import next_step
from coordinator.service.groups import GroupControl
from coordinator.settings import Settings

log = structlog.get_logger()

STEPS_A_VISIT = 16
"""A job takes several steps in one visit (settled, ready, waiting, pending, concluded); this bounds a mistake."""
WAKES_A_CYCLE = 100
"""Answered before doorbells are rung and the term is renewed."""


class ControlLoop:
    """`run` blocks until `stop`; `cycle` is one turn and returns the sentences it would log.

    `ring` is called at the end of each turn, and must not wait for anybody.
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        ring: Callable[[], object],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._ring = ring
        self._clock = clock
        self._groups = GroupControl(ledger, clock, self._visit_safely)
        self._nonce = secrets.token_hex(16)
        self._term: Term | None = None
        self._term_ends_at = 0.0
        """Monotonic time, from before the ledger was asked for the term."""
        self._highest_generation = 0
        self._stop = threading.Event()
        self._next_sweep = 0.0

    @property
    def leads(self) -> bool:
        """Not in a term that has run out meanwhile, whatever the loop is waiting for."""
        return self._term is not None and time.monotonic() < self._term_ends_at

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Cycle until stopped, then resign. An unreachable ledger is waited for, not died of."""
        while not self._stop.is_set():
            try:
                for sentence in self.cycle():
                    log.info(sentence, generation=self._term.generation if self._term else 0)
            except DeposedError as error:
                log.warning("steps down", error=str(error))
                self._step_down()
            except UnavailableError as error:
                log.warning("the ledger is away", error=str(error))
                self._pause()
            except Exception:
                # Whatever it is, a coordinator that goes on answering but has stopped deciding would be worse.
                log.exception("a cycle failed")
                self._pause()
        if self._highest_generation > 0:
            self._resign()

    def _resign(self) -> None:
        """Also from a term that some trouble made us step down from: in the ledger it may go on."""
        try:
            self._ledger.resign(Term(self._highest_generation, self._nonce))
        except FlushpointError as error:
            log.warning("cannot resign; the term ends by itself", error=str(error))

    def _pause(self) -> None:
        self._step_down()
        self._stop.wait(self._settings.cycle_s)

    def _step_down(self) -> None:
        self._term = None
        self._next_sweep = 0.0

    def cycle(self) -> list[str]:
        """One turn: lead, recover if the server restarted, sweep or wait for a wake-up, ring."""
        asked_at = time.monotonic()
        # A term that goes on keeps its generation, and so it must in a ledger that has lost everything.
        at_least = self._highest_generation - 1 if self._term else self._highest_generation
        term = self._ledger.lead(self._nonce, int(self._settings.leader_ttl_s * 1000), at_least)
        if term is None:
            self._step_down()
            self._stop.wait(self._settings.cycle_s)
            return []
        self._term_ends_at = asked_at + self._settings.leader_ttl_s
        sentences = [] if self._term == term else [f"leads with generation {term.generation}"]
        self._term = term
        self._highest_generation = term.generation
        if not self._ledger.run_is_known():
            sentences.append(self._recover(term))
        if sentences:
            self._warn()  # at the start, and about a server that was started anew
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + self._settings.cycle_s
            sentences += self._sweep(term)
        else:
            woken = self._ledger.next_wake(min(self._settings.cycle_s, self._next_sweep - now))
            if woken is not None:
                sentences += self._visit_woken(woken, term)
        self._ring()
        return sentences

    def _warn(self) -> None:
        for shortcoming in self._ledger.shortcomings():
            log.warning(f"the ledger's server: {shortcoming}")

    def _recover(self, term: Term) -> str:
        """The server restarted: writes may be lost, so every lease is doubted and none granted for a while.

        Holders of leases the ledger no longer knows stop by their own clock within `lease_s`, and what they sent has
        arrived or is lost within `quarantine_s`. Without a job that is
        under way nobody can hold one that a claim could collide with.
        """
        settings = self._settings
        hold_s = settings.lease_s + settings.quarantine_s if self._ledger.active_jobs() else 0.0
        ready_again = self._ledger.adopt_run(term, hold_ms=int(hold_s * 1000))
        self._next_sweep = 0.0
        return f"adopts the ledger's server: {ready_again} units are ready again, claims wait up to {hold_s:g} s"

    def _sweep(self, term: Term) -> list[str]:
        sentences = [
            f"{unit} is ready again: its lease ran out or its delay is over"
            for unit in self._ledger.reap(term, self._settings.max_attempts)
        ]
        sentences += [f"epoch {name} is aborted: {why}" for name, why in self._ledger.expire_epochs(term)]
        for job_id in self._ledger.active_jobs():
            sentences += self._visit_safely(job_id, term)
        for group in self._ledger.groups():
            sentences += self._visit_group(group.name, term)
        return sentences + self._dismiss_surplus(term)

    def _dismiss_surplus(self, term: Term) -> list[str]:
        """Of the concluded jobs only so many are kept: each costs memory of the ledger's server for ever."""
        sentences = []
        keep = self._settings.keep_concluded
        for job_id in self._ledger.surplus(keep):
            with contextlib.suppress(NotFoundError, ConflictError):  # its user was faster
                self._ledger.dismiss(job_id, self._ledger.job(job_id).version, term)
                sentences.append(f"job {job_id} is dismissed: {keep} have concluded after it")
        return sentences

    def _visit_woken(self, first: str, term: Term) -> list[str]:
        """All that have woken us until now: jobs, then groups, once each, for a visit of a group reads all its jobs."""
        woken = [first]
        while len(woken) < WAKES_A_CYCLE and (another := self._ledger.next_wake(0)) is not None:
            woken.append(another)
        groups = dict.fromkeys(name.removeprefix(GROUP_WAKE) for name in woken if name.startswith(GROUP_WAKE))
        sentences = []
        for job_id in woken:
            if not job_id.startswith(GROUP_WAKE) and (steps := self._visit_safely(job_id, term)):
                sentences += steps
                if group := self._group_waiting_for(job_id):
                    groups[group] = None
        return sentences + [sentence for group in groups for sentence in self._visit_group(group, term)]

    def _group_waiting_for(self, job_id: str) -> str:
        """The group of a job that has come to where groups wait for theirs; "" if this is not so."""
        with contextlib.suppress(NotFoundError, ValidationError):
            job = self._ledger.job(job_id).job
            return job.spec.group if job.state in (State.PENDING, State.CONCLUDED) else ""
        return ""

    def _visit_group(self, name: str, term: Term) -> list[str]:
        """One group's trouble is no other group's."""
        try:
            return self._groups.visit(name, term)
        except ConflictError:
            return []
        except ValidationError as error:
            return [f"group {name} has a job whose record cannot be read: {error.errors()[0]['msg']}"]
        except (RefusedError, UnreadableGroupError) as error:
            return [f"group {name} cannot go on: {error.message}"]

    def _visit_safely(self, job_id: str, term: Term) -> list[str]:
        """One job's trouble is no other job's."""
        try:
            return self.visit(job_id, term)
        except ConflictError:
            return []  # a user's verb came in between; it has woken us again
        except ValidationError as error:
            return [f"job {job_id} has a record that cannot be read: {error.errors()[0]['msg']}"]

    def visit(self, job_id: str, term: Term) -> list[str]:
        """Take the steps a job is due for, until it waits for its units or its user."""
        sentences: list[str] = []
        for _ in range(STEPS_A_VISIT):
            try:
                versioned = self._ledger.job(job_id)
            except NotFoundError:
                return sentences
            job = versioned.job
            given_up = self._ledger.quarantined(job_id) if job.units_quarantined else []
            step = next_step(job, self._clock(), given_up)
            if step is None:
                return sentences
            pass_number = int(step.changes.get("pass_number", job.pass_number))
            self._ledger.update(
                job_id,
                versioned.version,
                step.changes,
                events=[NewEvent(name, data) for name, data in step.events],
                new_unit=NewUnit(step.new_unit, pass_number) if step.new_unit else None,
                drop_units=step.drop_units,
                retry_quarantined=step.retry_quarantined,
                term=term,
            )
            sentences.append(f"job {job_id} {step.sentence}")
        return sentences
