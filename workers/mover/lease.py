"""A lease in the hand of its mover: renewed by a thread, given up by the mover's own clock.

A mutable target cannot be fenced by a check alone: a mover stopped inside `send` and continued later would
write old data over new. So the process also arms ITIMER_REAL to the lease, with SIGALRM's default action: it
dies on waking before it runs another instruction of ours.
"""

from __future__ import annotations

import enum
import signal
import threading
import time
from collections.abc import Callable

from coordinator.ledger.contract import Ledger
from coordinator.model.errors import FlushpointError
from coordinator.model.units import Claim

SELF_STOP_SHARE = 0.75
"""A mover that cannot renew stops by itself when this share of its lease is gone; the timer is the last resort."""


class Halt(enum.Enum):
    """Why a mover must not go on with its unit."""

    LOST = "lost"
    """The lease is not ours any more: stop writing at once, tell nobody."""
    YIELD = "yield"
    """Paused, cancelled or closing: drain, flush, release what remains."""
    ABORT = "abort"
    """Cancelled by force: what waits for a server is broken off. Flush nothing, release the unit as it was claimed."""


class LeaseLostError(FlushpointError):
    """The lease ran out or was taken; whatever was not finished belongs to somebody else."""


class AbortedError(FlushpointError):
    """The job was cancelled by force. The lease is held until nothing of ours writes any more."""


class Lease:
    """Context manager around the work on one claimed unit.

    `granted_at` is monotonic, from before the claim was sent; `speed` in bytes a second until the first renewal;
    `closing` says when the process is to end. `abort` breaks off, from another thread, what the work waits for.
    """

    def __init__(
        self,
        ledger: Ledger,
        claim: Claim,
        renew_s: float,
        granted_at: float,
        speed: int,
        closing: Callable[[], bool],
        abort: Callable[[], None] = lambda: None,
    ) -> None:
        self._closing = closing
        self._abort = abort
        self._ledger = ledger
        self._claim = claim
        self._renew_s = renew_s
        self._granted_at = granted_at
        self._length_s = claim.lease_ms / 1000
        self._told: Halt | None = None
        self._over = threading.Event()
        self._arming = threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.speed = speed

    def __enter__(self) -> Lease:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._arming:  # first of all: nothing is in flight, and a renewal may hang for longer than the lease
            self._over.set()
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._thread.join(timeout=self._renew_s)

    @property
    def halt(self) -> Halt | None:
        """None: go on. By our own clock, whatever the thread that renews is waiting for."""
        if self._told is not Halt.LOST and time.monotonic() >= self._granted_at + self._length_s * SELF_STOP_SHARE:
            self._told = Halt.LOST
        return self._told

    def assert_held(self) -> None:
        """LeaseLostError if the lease is lost or its time is nearly up by our own clock; AbortedError."""
        if self.halt is Halt.ABORT:
            raise AbortedError(f"job {self._claim.job_id} was cancelled by force")
        if self.halt is Halt.LOST:
            raise LeaseLostError(f"the lease of unit {self._claim.unit_id} of job {self._claim.job_id} is lost")

    def wait(self, seconds: float, enough: Callable[[], bool]) -> bool:
        """Sleep, but not past a halt or beyond `enough`; False if the mover must stop."""
        deadline = time.monotonic() + seconds
        while self.halt is None:
            left = deadline - time.monotonic()
            if left <= 0 or enough():
                return True
            self._over.wait(min(left, 0.05))
        return False

    def _arm(self) -> None:
        left = self._granted_at + self._length_s - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))

    def _renew(self) -> None:
        claim = self._claim
        while not self._over.wait(self._renew_s):
            asked_at = time.monotonic()
            try:
                told = self._ledger.renew(claim.job_id, claim.unit_id, claim.token, claim.lease_ms)
            except FlushpointError:
                continue  # `halt` sees when it is too late
            if not told.held:
                self._told = Halt.LOST
                return
            with self._arming:
                if self._over.is_set() or self.halt is Halt.LOST:
                    return
                self._granted_at = asked_at
                self._arm()
                if told.force:
                    # With every renewal: a disk may have been opened since the last. Never when the work is over:
                    # the disks may be another unit's by then.
                    self._told = Halt.ABORT
                    self._abort()
                elif not told.run or self._closing():
                    self._told = Halt.YIELD
            self.speed = told.speed
