"""Groups, reconciled: see what a group's round needs, take the next action (model/round.py), until it has to wait."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable
from itertools import count

from coordinator.ledger.contract import ConflictError, Ledger, NewEvent, Term
from coordinator.model.actions import (
    Action,
    Begin,
    Cancel,
    Dismiss,
    Finalize,
    GiveUp,
    Keep,
    Retire,
    Seen,
    Steer,
    Submit,
)
from coordinator.model.errors import NotFoundError
from coordinator.model.group import GroupRecord, Round, Stage, share_a_machine
from coordinator.model.job import Verb
from coordinator.model.round import jobs_of, next_action
from coordinator.model.step import VerbArguments, apply_verb

ACTIONS_A_VISIT = 16
"""A round takes several actions in one visit; this bounds a mistake."""


class GroupControl:
    """`visit_job` takes the steps that a job of the group is due for."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float], visit_job: Callable[[str, Term], list[str]]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._visit_job = visit_job

    def visit(self, name: str, term: Term) -> list[str]:
        """What was done, a sentence each. ConflictError if a user's call came in between, which has woken us again."""
        sentences: list[str] = []
        for number in count():
            try:
                group = self._ledger.group(name)
            except NotFoundError:
                break
            action = next_action(group, self._seen(group), secrets.token_hex(8), self._clock())
            if action is None or number == ACTIONS_A_VISIT:
                break
            sentences += self._do(group, action, term)
        return sentences

    def _seen(self, group: GroupRecord) -> Seen:
        jobs = self._ledger.jobs_named(jobs_of(group))
        if group.round is None:
            return Seen(jobs)
        busy = self._busy(group.name, group.round) if group.round.stage is Stage.STARTING else ""
        return Seen(jobs, self._ledger.newest_epoch(group.name), busy)

    def _busy(self, name: str, begun: Round) -> str:
        """Guests are stopped by one group at a time. Of which machines a round is was said when it began."""
        for other in self._ledger.groups():
            cutting = other.round if other.round is not None and other.round.stage is Stage.CUTTING else None
            if other.name != name and cutting is not None and share_a_machine(begun.spec, cutting.spec):
                return other.name
        return ""

    def _do(self, group: GroupRecord, action: Action, term: Term) -> list[str]:
        match action:
            case Keep():
                events = [NewEvent(name, data) for name, data in action.events]
                self._ledger.put_group(action.group, events=events, term=term)
                return [f"group {group.name} {action.sentence}"]
            case Submit():
                for job_id, spec in action.jobs.items():
                    self._ledger.submit(job_id, spec, term=term)
                return self._visit_jobs(action.jobs, term)
            case Begin():
                self._ledger.open_epoch(term, group.name, action.spec, action.after)
            case GiveUp():
                self._ledger.give_up_epoch(term, group.name, action.number, action.why)
            case Retire():
                self._ledger.retire_epoch(term, group.name, action.number)
            case Cancel():
                for job_id in action.jobs:
                    self._act(job_id, Verb.CANCEL, VerbArguments(force=True), term)
                return self._visit_jobs(action.jobs, term)
            case Finalize():
                for job_id in action.jobs:
                    self._act(job_id, Verb.FINALIZE, VerbArguments(), term)
                return self._visit_jobs(action.jobs, term)
            case Steer():
                for job_id in action.jobs:
                    self._act(job_id, Verb.PAUSE if action.paused else Verb.RESUME, VerbArguments(), term)
                    self._act(job_id, Verb.SET_SPEED, VerbArguments(speed=action.speed), term)
                return self._visit_jobs(action.jobs, term)
            case Dismiss():
                for job_id in action.jobs:
                    with contextlib.suppress(NotFoundError):  # its user was faster
                        self._ledger.dismiss(job_id, self._ledger.job(job_id).version, term)
        return []

    def _visit_jobs(self, job_ids: Iterable[str], term: Term) -> list[str]:
        return [sentence for job_id in job_ids for sentence in self._visit_job(job_id, term)]

    def _act(self, job_id: str, verb: Verb, arguments: VerbArguments, term: Term) -> None:
        with contextlib.suppress(ConflictError, NotFoundError):  # looked at again in a moment
            found = self._ledger.job(job_id)
            self._ledger.update(job_id, found.version, apply_verb(found.job, verb, arguments).changes, term=term)
