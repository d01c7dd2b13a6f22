"""How fast a job goes and when it will be in sync.

The rate is one of the recent past, so that it forgets a rest, an old speed limit and a peer that has become slow.
An average over the whole job would take as long to follow a change as the job had gone on before it.

The ledger keeps two marks of (time, offset), the newer at most `RATE_WINDOW_S` older than the last progress; a rate is
measured from the older one, so over one to two windows. When the job's state or speed changes, or a new pass begins,
both marks are set to that moment. Progress is counted when a unit is done or given back, which a mover does every
`unit_slice_s`: a window lasts longer than that.
"""

from __future__ import annotations

from coordinator.model.job import JobRecord, State

RATE_WINDOW_S = 5.0
"""Also in coordinator/ledger/scripts/prelude.lua."""
_ADVANCING = frozenset({State.RUNNING, State.READY, State.WAITING})


def rate_of(job: JobRecord, now: float) -> float:
    """Bytes a second over the recent past; 0 where nothing is copied. Of a concluded job: over its active time.

    Until a window has gone by without progress, time ends with the last progress: between two units nobody can tell
    a slow job from a fast one, and `now` is another host's clock than the ledger's.
    """
    if job.state is State.CONCLUDED:
        return job.offset / job.active_s if job.active_s > 0 else 0.0
    if job.state not in _ADVANCING:
        return 0.0
    elapsed = max(job.progress_at, now - RATE_WINDOW_S) - job.rate_from_at
    gained = job.offset - job.rate_from_offset  # less than nothing where units are to be done again
    return max(0.0, gained / elapsed) if elapsed > 0 else 0.0


def eta_of(job: JobRecord, now: float) -> float | None:
    """Seconds until `offset` reaches `len` at that rate; None while nobody can know, and where nothing is copied.

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
