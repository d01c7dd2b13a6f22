"""What a group's control loop may do next, and what it has to see to say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from coordinator.model.epoch import Epoch, EpochSpec
from coordinator.model.events import EventName
from coordinator.model.group import GroupRecord
from coordinator.model.job import JobRecord, JobSpec

Events = tuple[tuple[EventName, Mapping[str, Any]], ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What of a group's round was found: all its jobs that exist, by their ids, and the group's newest epoch."""

    jobs: Mapping[str, JobRecord] = dataclass_field(default_factory=dict)
    epoch: Epoch | None = None
    busy: str = ""
    """Another group that is just cutting one of these machines."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Record how the group stands now; `sentence` is what the control loop logs."""

    sentence: str
    group: GroupRecord
    events: Events = ()


@dataclass(frozen=True, slots=True)
class Submit:
    jobs: Mapping[str, JobSpec]


@dataclass(frozen=True, slots=True)
class Begin:
    """Open the ledger's epoch, with a number greater than `after`."""

    spec: EpochSpec
    after: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    number: int
    why: str


@dataclass(frozen=True, slots=True)
class Retire:
    number: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """By force: what was copied is worth nothing."""

    jobs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finalize:
    jobs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dismiss:
    jobs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Steer:
    """Bring jobs to what their group is told: copies rest while it is paused, and share its limit."""

    jobs: tuple[str, ...]
    paused: bool
    speed: int


Action = Keep | Submit | Begin | GiveUp | Retire | Cancel | Finalize | Dismiss | Steer
