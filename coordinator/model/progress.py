"""How fast a job goes and when it will be in sync."""

from __future__ import annotations

from coordinator.model.job import JobRecord, State

_RESTING = frozenset({State.PAUSED, State.STANDBY})
_ADVANCING = frozenset({State.RUNNING, State.READY, State.WAITING})


def rate_of(job: JobRecord, now: float) -> float:
    """Bytes a second, over the time since the job started; 0 before, and while it is paused."""
    if not job.started_at or job.state in _RESTING:
        return 0.0
    elapsed = (job.concluded_at or now) - job.started_at
    return job.offset / elapsed if elapsed > 0 else 0.0


def eta_of(job: JobRecord, now: float) -> float | None:
    """Seconds until `offset` reaches `len` at the rate so far; None while nobody can know, and where nothing is copied.

    The part of the disk that is not planned yet is counted as if it were as full as the planned one.
    """
    if job.state not in _ADVANCING:
        return None
    rate = rate_of(job, now)
    if job.in_sync and job.plan_done:
        return 0.0
    if rate <= 0 or not job.plan_cursor:
        return None
    expected = job.len if job.plan_done else job.len * job.disk_size / job.plan_cursor
    return max(0.0, (expected - job.offset) / rate)
