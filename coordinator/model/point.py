"""Recovery points: what a decision says, and which points a retention policy keeps."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Member(BaseModel):
    """One disk of a point. Sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    disk: str
    """DISK or VM/DISK."""
    size: int
    root: str
    """Key of its root, in which the directory is at `directory_offset`."""
    directory_offset: int
    directory_length: int
    root_digest: str
    """Hex; of the directory, which vouches for everything under it."""
    sync: str
    reason: str = ""
    """Of an incremental: which bitmap was read, or why contents were compared instead."""
    parent: int = 0
    """The epoch it was made from; 0: none."""
    bytes_read: int = 0
    bytes_sent: int = 0
    """Bytes of blocks that were stored because they were new, before compression; of a source that changed meanwhile
    also of those that needed no storing."""


class SeedMember(Member):
    """A disk of which a group has copied no more than the beginning: it is no part of the point, and what the next one
    builds on."""

    seeded: int = Field(gt=0)
    """The first bytes, as they were at the cut. What follows reads as zeroes, or as it was when it was written last."""


PIVOT = "pivot"
"""The `sync` of a disk whose guest went on with its target."""


class MirroredDisk(BaseModel):
    """One disk of an epoch that went to a target of its own and not to the repository, which has the decision alone.
    Sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    disk: str
    target: str
    size: int
    seeded: int = 0
    """The first bytes, where the target has no more of it yet; 0: it has the whole disk."""
    sync: str
    reason: str = ""
    parent: int = 0
    """The epoch that the target held before; 0: none."""
    bytes_read: int = 0
    bytes_sent: int = 0


class MachineCut(BaseModel):
    """How one virtual machine of a point was cut: what the point's label is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vm: str
    cut_at: float
    """Unix time, by the clock of its host."""
    freeze_ms: float
    """How long it stood still; 0 if it was not running."""
    filesystem_consistent: bool = False
    fallback: str = ""
    """Why it is not, where that was asked for."""


TRACKING = "flushpoint:"
"""How the names of our own bitmaps begin."""


def tracking_bitmap(repository: str, group: str, epoch: int) -> str:
    """The name of the bitmap that knows what was written since point `epoch` was cut. No other is trusted unasked."""
    return f"{TRACKING}{repository}:{group}:{epoch}"


class PointMember(BaseModel):
    """One disk of a point, as it is told; see Member."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    disk: str
    size: int
    sync: str
    reason: str = ""
    parent: int = 0
    bytes_read: int = 0
    bytes_sent: int = 0


class PointSeed(PointMember):
    """A disk that is no part of the point yet; see SeedMember."""

    seeded: int


class PointRecord(BaseModel):
    """A recovery point as the ledger remembers it, and as the API tells it. Its manifest has the last word."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    group: str
    epoch: int
    cut_at: float
    decided_at: float
    consistency: str
    job: str = ""
    members: tuple[PointMember, ...] = ()
    machines: tuple[MachineCut, ...] = ()
    """Of a group of live guests."""
    seeding: tuple[PointSeed, ...] = ()
    """Without members beside them it is no point that could be restored, but a step on the way to the first."""
    mirrors: tuple[MirroredDisk, ...] = ()

    def member(self, disk: str) -> PointMember | None:
        return next((m for m in self.members if m.disk == disk), None)


class RepositoryRecord(BaseModel):
    """A repository that the ledger knows points of."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    uri: str
    """By which it was named last."""
    scanned_at: float = 0.0
    """When all of it was last looked at; 0: never, so that older points may be missing."""


class Decision(BaseModel):
    """groups/<group>/points/<epoch>.json: written once, it publishes an epoch or ends it. Times in Unix seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    decision: Literal["manifest", "tombstone"]
    repository: str
    group: str
    epoch: int
    job: str = ""
    cut_at: float = 0.0
    decided_at: float = 0.0
    consistency: Literal["", "crash", "filesystem"] = ""
    members: tuple[Member, ...] = ()
    seeding: tuple[SeedMember, ...] = Field(default=(), exclude_if=lambda seeding: seeding == ())
    """Disks that it has a part of. Without members a manifest is no recovery point, but what one will be made from."""
    mirrors: tuple[MirroredDisk, ...] = Field(default=(), exclude_if=lambda mirrors: mirrors == ())
    """Disks that are on targets; of a tombstone those that may have been written there."""
    machines: tuple[MachineCut, ...] = Field(default=(), exclude_if=lambda machines: machines == ())
    """Of a group of live guests; not in the record, and so not in its seal, of any other."""
    spec: dict[str, Any] = Field(default_factory=dict)
    """What was asked for, so that a lost ledger loses no group."""
    why: str = ""
    """Of a tombstone."""
    seal: str = ""
    """Hex digest, keyed in an encrypted repository, of all of the above."""

    @property
    def is_point(self) -> bool:
        """Or at least a step on the way to one."""
        return self.decision == "manifest"

    @property
    def roots(self) -> tuple[Member, ...]:
        """All that it leads to, and keeps."""
        return (*self.members, *self.seeding)

    def member(self, disk: str) -> Member | None:
        return next((m for m in self.members if m.disk == disk), None)

    def mirror(self, disk: str, target: str) -> MirroredDisk | None:
        return next((m for m in self.mirrors if (m.disk, m.target) == (disk, target)), None)

    def base(self, disk: str) -> Member | None:
        """What the next copy of a disk builds on: all of the disk, or what was seeded so far."""
        return next((m for m in self.roots if m.disk == disk), None)

    def record(self) -> PointRecord:
        """What the ledger remembers of it."""
        return PointRecord(
            group=self.group,
            epoch=self.epoch,
            cut_at=self.cut_at,
            decided_at=self.decided_at,
            consistency=self.consistency,
            job=self.job,
            members=tuple(PointMember.model_validate(member.model_dump()) for member in self.members),
            machines=self.machines,
            seeding=tuple(PointSeed.model_validate(member.model_dump()) for member in self.seeding),
            mirrors=self.mirrors,
        )


class Retention(BaseModel):
    """How many points to keep of each kind; a point may count for several. All 0: nothing is pruned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    last: int = Field(default=0, ge=0)
    hourly: int = Field(default=0, ge=0)
    daily: int = Field(default=0, ge=0)
    weekly: int = Field(default=0, ge=0)
    monthly: int = Field(default=0, ge=0)

    @property
    def keeps_all(self) -> bool:
        return not (self.last or self.hourly or self.daily or self.weekly or self.monthly)


def kept(
    points: Iterable[tuple[int, float]], retention: Retention, held: Iterable[int] = (), newest: Iterable[int] = ()
) -> dict[int, str]:
    """Which of the (epoch, cut time) to keep, each with the reasons; the held ones always, the last one, and those that
    are the `newest` of some disk.

    Of the points of one hour (day, week, month; UTC, weeks as of ISO 8601) the newest counts for it.
    """
    newest_first = sorted(points, reverse=True)
    held, newest = set(held), set(newest)
    reasons: dict[int, list[str]] = {}
    for place, (epoch, _) in enumerate(newest_first):
        if place == 0 or epoch in newest:
            reasons.setdefault(epoch, []).append("newest")
        if epoch in held:
            reasons.setdefault(epoch, []).append("held")
        if retention.keeps_all or place < retention.last:
            reasons.setdefault(epoch, []).append("last")
    for name, count, period in (
        ("hourly", retention.hourly, "%Y-%m-%d %H"),
        ("daily", retention.daily, "%Y-%m-%d"),
        ("weekly", retention.weekly, "%G-%V"),
        ("monthly", retention.monthly, "%Y-%m"),
    ):
        for epoch in _newest_of_each(newest_first, count, _formatter(period)):
            reasons.setdefault(epoch, []).append(name)
    return {epoch: ", ".join(why) for epoch, why in reasons.items()}


def _formatter(period: str) -> Callable[[float], str]:
    return lambda time: datetime.datetime.fromtimestamp(time, datetime.UTC).strftime(period)


def _newest_of_each(points: list[tuple[int, float]], count: int, period: Callable[[float], str]) -> list[int]:
    found: dict[str, int] = {}
    for epoch, time in points:
        if len(found) == count:
            break
        found.setdefault(period(time), epoch)
    return list(found.values())
