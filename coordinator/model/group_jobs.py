"""Jobs that a group's coordinator has made: how they ended, what they are told, and which are kept."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.model.actions import Steer
from coordinator.model.group import FAILED_JOBS_KEPT, GroupRecord, changed
from coordinator.model.job import JobRecord, State
from coordinator.model.schedule import speed_at

STEERED = frozenset({State.CREATED, State.RUNNING, State.PAUSED, State.READY, State.STANDBY})
"""States in which a job still copies, or may."""


def astray(group: GroupRecord, jobs: Iterable[JobRecord], now: float) -> Steer | None:
    """Those that do not do what the group is told."""
    speed = speed_at(group.spec.policy, now)
    astray = [
        job.id
        for job in jobs
        if not job.cancel_requested
        and job.state in STEERED
        and (job.pause_requested != group.paused or job.speed != speed)
    ]
    return Steer(tuple(astray), group.paused, speed) if astray else None


def put_away(group: GroupRecord, jobs: Iterable[JobRecord]) -> GroupRecord:
    """Those that failed are left for people to look at, the last few: they take places of users' jobs."""
    over = {job.id: job.failed for job in jobs}
    failed = tuple(dict.fromkeys((*group.failed, *(job_id for job_id in over if over[job_id]))))
    gone = (*failed[:-FAILED_JOBS_KEPT], *(job_id for job_id in over if not over[job_id]))
    return changed(group, failed=failed[-FAILED_JOBS_KEPT:], done_with=(*group.done_with, *gone))


def succeeded(job: JobRecord) -> bool:
    return job.state is State.CONCLUDED and not job.failed and not job.cancelled


def failure(job: JobRecord) -> str:
    return job.error or f"job {job.id} was cancelled"
