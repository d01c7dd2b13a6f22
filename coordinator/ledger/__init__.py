"""The ledger: the one record of jobs, units, leases, leadership and events.

Law: whoever decides, decides elsewhere (coordinator.model) and asks for one step here. A step is atomic and
fenced, by a term or by a unit's token, and made with the server's clock. Nothing outside this package
touches Redis for state, and nothing in it knows what a disk or a worker process is.
"""

from __future__ import annotations

from coordinator.ledger.barrier import Barrier, News
from coordinator.ledger.contract import (
    GROUP_WAKE,
    ConflictError,
    DeposedError,
    Finished,
    Ledger,
    NewEvent,
    NewUnit,
    SuspectUnit,
    Term,
    UnreadableGroupError,
    Versioned,
)
from coordinator.ledger.keys import DEFAULT_PREFIX
from coordinator.ledger.memory import MemoryLedger
from coordinator.ledger.memory_epochs import MemoryBarrier
from coordinator.ledger.redis_epochs import RedisBarrier
from coordinator.ledger.redis_ledger import RedisLedger

__all__ = [
    "GROUP_WAKE",
    "Barrier",
    "ConflictError",
    "DeposedError",
    "Finished",
    "Ledger",
    "MemoryBarrier",
    "MemoryLedger",
    "NewEvent",
    "NewUnit",
    "News",
    "RedisBarrier",
    "RedisLedger",
    "SuspectUnit",
    "Term",
    "UnreadableGroupError",
    "Versioned",
    "open_barrier",
    "open_ledger",
]


def open_ledger(url: str, prefix: str = DEFAULT_PREFIX) -> RedisLedger:
    """The ledger at a redis://, rediss:// or unix:// URL; connects when first used."""
    return RedisLedger(url, prefix=prefix)


def open_barrier(url: str, prefix: str = DEFAULT_PREFIX) -> RedisBarrier:
    """The same for the agents of hosts, in asyncio."""
    return RedisBarrier(url, prefix=prefix)
