"""Readers of guests' QEMUs that the guard watches: one that hangs is killed, or its guest could neither be stopped nor
let run (fleece.py)."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from dataclasses import dataclass

BEAT_S = 0.5
"""How often a reader says a word."""
SILENT_S = 2.0
"""After which one is taken to hang ..."""
DUE_S = 1.0
"""... and after which, if its guest had to run again by now."""


@dataclass(slots=True)
class Watched:
    guest: str
    process: int
    """A pidfd, which the guard owns."""
    heard: float
    """Its last word; monotonic."""

    def ends_at(self, due: frozenset[str]) -> float:
        """When it is to be killed unless it says a word before. `due`: guests whose deadline is over."""
        return self.heard + (DUE_S if self.guest in due else SILENT_S)

    def kill(self) -> None:
        """Whatever it is doing. Never another one that has got its number since: a pidfd is of one process."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)


def has_hung_up(connection: socket.socket) -> bool:
    """Whether nobody is at the other end any more. While somebody is, the process that has connected lives, and the
    pidfd that was made from its number is of no other."""
    asked = select.poll()
    asked.register(connection, 0)
    return bool(asked.poll(0))
