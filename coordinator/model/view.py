"""Jobs and groups as the API shows them."""

from __future__ import annotations

import enum

from pydantic import BaseModel

from coordinator.model.complete import Completing, Completion
from coordinator.model.group import GroupRecord, GroupSpec, Outcome, Stage
from coordinator.model.job import JobRecord
from coordinator.model.mirror import MirrorState


class JobView(JobRecord):
    """The record and what follows from it at the moment of the answer."""

    version: int = 0
    """Grows with every change of the record; 0 where the caller did not ask for one job."""
    rate: float = 0.0
    """Bytes per second over the last few seconds; of a concluded job over all its active time."""
    eta_s: float | None = None
    """Seconds until the job is in sync; None while nobody can know."""


class RoundView(BaseModel):
    """The attempt at a recovery point that is at work."""

    id: str
    stage: Stage
    number: int
    """Of the point it may become; 0 while it has none."""
    begun_at: float
    why: str = ""
    """Why nothing comes of it, once that is so."""


class GroupView(BaseModel):
    """A group; times in Unix seconds."""

    name: str
    spec: GroupSpec
    version: int
    point: int = 0
    """The newest recovery point that was made of it; 0: none yet."""
    point_cut_at: float = 0.0
    rpo_s: float | None = None
    """How long ago that was cut; None: there is none."""
    rpo_missed: bool = False
    """It was cut longer ago than the policy allows."""
    paused: bool = False
    seeding: dict[str, tuple[int, int]] = {}
    """VM/DISK of those that are in no point yet: (how many bytes are copied, and how many it has)."""
    mirrors: dict[str, MirrorState] = {}
    """By VM/DISK, what targets hold."""
    completing: Completing | None = None
    """Its end, if that was asked for, and how far it is."""
    completed: bool = False
    """It has its last point, or its guests run on its targets; no other follows."""
    completion: Completion | None = None
    """How the end that was asked for last came out."""
    round: RoundView | None = None
    outcomes: tuple[Outcome, ...] = ()
    """Of the last rounds, oldest first."""


class CheckpointState(enum.StrEnum):
    WAITING = "waiting"
    """Another round has to end first."""
    RUNNING = "running"
    PUBLISHED = "published"
    FAILED = "failed"


class CheckpointView(BaseModel):
    """What became of a checkpoint that was asked for."""

    id: str
    group: str
    state: CheckpointState
    point: int = 0
    """Of a published one."""
    stage: Stage | None = None
    """Of a running one."""
    why: str = ""
    """Of a failed one."""

    @property
    def is_over(self) -> bool:
        return self.state in (CheckpointState.PUBLISHED, CheckpointState.FAILED)


class CompletionView(BaseModel):
    """What became of a group's end that was asked for."""

    id: str
    group: str
    is_over: bool
    done: bool = False
    """Once it is over: every machine has its last point, or runs on its targets; else none does."""
    why: str = ""
    pivoted: bool = False
    point: int = 0
    downtimes_ms: dict[str, float] = {}
    """By VM, how long it stood still for the pivot."""
    passes: int = 0
    """So far."""


def view_of_completion(group: GroupRecord, request: str) -> CompletionView | None:
    """None: it is not known, or not any more."""
    if (running := group.completing) is not None and running.id == request:
        return CompletionView(id=request, group=group.name, is_over=False, passes=running.passes)
    if (ended := group.completion) is not None and ended.id == request:
        return CompletionView(group=group.name, is_over=True, **ended.model_dump())
    return None


def view_of_group(group: GroupRecord, now: float) -> GroupView:
    at_work = group.round
    return GroupView(
        name=group.name,
        spec=group.spec,
        version=group.version,
        point=group.published,
        point_cut_at=group.published_cut_at,
        rpo_s=max(0.0, now - group.published_cut_at) if group.published else None,
        rpo_missed=group.rpo_missed,
        paused=group.paused,
        seeding=group.seeding,
        mirrors=group.mirrors,
        completing=group.completing,
        completed=group.completed,
        completion=group.completion,
        round=RoundView.model_validate(at_work.model_dump(include=set(RoundView.model_fields))) if at_work else None,
        outcomes=group.outcomes,
    )


def view_of_checkpoint(group: GroupRecord, request: str) -> CheckpointView | None:
    """None for one that was never asked for, or long ago."""
    at_work = group.round
    if request in group.requests:
        return CheckpointView(id=request, group=group.name, state=CheckpointState.WAITING)
    if at_work is not None and request in at_work.requests:
        return CheckpointView(id=request, group=group.name, state=CheckpointState.RUNNING, stage=at_work.stage)
    outcome = group.outcome_for(request)
    if outcome is None:
        return None
    state = CheckpointState.PUBLISHED if outcome.published else CheckpointState.FAILED
    point = outcome.number if outcome.published else 0
    return CheckpointView(id=request, group=group.name, state=state, point=point, why=outcome.why)
