"""The rate limit of a job, or of the jobs of a group together: one bucket in the ledger, shared by all their movers,
adjustable while they run."""

from __future__ import annotations

import contextlib

from coordinator.ledger.contract import GROUP_WAKE, Ledger
from coordinator.model.errors import FlushpointError
from coordinator.model.job import JobRecord
from workers.mover.lease import Lease

BURST_S = 0.1
"""The bucket holds a tenth of a second, so that a limit is smooth and a changed one is felt at once."""


class RateLimit:
    """Admission of a job's bytes; `lease.speed` is the limit in bytes a second, 0 unlimited."""

    def __init__(self, ledger: Ledger, job: JobRecord) -> None:
        self._ledger = ledger
        self._bucket = f"{GROUP_WAKE}{job.spec.group}" if job.spec.group else job.id

    def admit(self, length: int, lease: Lease) -> bool:
        """Wait until `length` bytes may go; False if the lease halts meanwhile. A new speed ends an old wait."""
        speed = lease.speed
        if speed == 0:
            return True
        burst = max(1, int(speed * BURST_S))
        try:
            wait_ms = self._ledger.take(self._bucket, length, speed, burst)
        except FlushpointError:
            wait_ms = int(length / speed * 1000)  # alone, at the same speed, until the ledger is back
        if lease.wait(wait_ms / 1000, lambda: lease.speed != speed):
            return True
        with contextlib.suppress(FlushpointError):  # or a resumed job would first pay for what was never sent
            self._ledger.take(self._bucket, -length, speed, burst)
        return False
