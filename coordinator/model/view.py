"""A job as the API shows it."""

from __future__ import annotations

from coordinator.model.job import JobRecord


class JobView(JobRecord):
    """The record and what follows from it at the moment of the answer."""

    version: int = 0
    """Grows with every change of the record; 0 where the caller did not ask for one job."""
    rate: float = 0.0
    """Bytes per second over the last few seconds; of a concluded job over all its active time."""
    eta_s: float | None = None
    """Seconds until the job is in sync; None while nobody can know."""
