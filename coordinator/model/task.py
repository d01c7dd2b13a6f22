"""Work that a job does in one unit: on a repository as a whole (make it, look at it, tidy it), and on an epoch of a
group (announce it, decide it)."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from coordinator.model.point import Decision, MirroredDisk, Retention
from coordinator.model.repository_uri import is_key_reference, parse_repository


class TaskKind(enum.StrEnum):
    INIT = "init"
    """Probe the store and make an empty repository."""
    SCAN = "scan"
    """Read all decisions, and tell the ledger which points there are."""
    CHECK = "check"
    """Look at everything that points lead to."""
    PRUNE = "prune"
    """Apply a retention policy, then collect what no point leads to."""
    COMPACT = "compact"
    """Move what is alive out of packs that are mostly dead."""
    NEW_DATA_KEY = "new-data-key"
    """Write with a new data key from now on."""
    REWRAP_KEYS = "rewrap-keys"
    """Wrap all keys with the owner's new key."""


class RepositoryTask(BaseModel):
    """What to do, and to which repository. Fields that the kind does not know stay at their defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: TaskKind
    repository: str = Field(min_length=1, max_length=4096)
    level: int = Field(default=1, ge=1, le=22, description="init: zstd level of what is stored")
    groups: tuple[str, ...] = Field(default=(), description="prune: only these; empty: all")
    retention: Retention = Field(default=Retention(), description="prune: what to keep")
    forget_damaged: bool = Field(
        default=False, description="prune: points whose decisions are damaged go, and what only they led to"
    )
    dry_run: bool = Field(default=False, description="prune: say what would go, and change nothing")
    data: bool = Field(default=False, description="check: read every pack, too")
    new_key: str = Field(default="", max_length=4096, description="rewrap-keys: env:NAME, file:/path or kms:KEY")

    @model_validator(mode="after")
    def _names_are_well_formed(self) -> Self:
        parse_repository(self.repository)
        if (self.kind is TaskKind.REWRAP_KEYS) != bool(self.new_key):
            raise ValueError("new_key goes with rewrap-keys: give both or neither")
        if self.new_key and not is_key_reference(self.new_key):
            raise ValueError("new_key is no reference to a key: write env:NAME, file:/path or kms:KEY")
        return self


class EpochPart(BaseModel):
    """What makes a job one of those of a group's epoch: its disk is one member of a recovery point, which others open
    and decide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int = Field(gt=0)
    owner: str
    """Of the epoch's hold."""
    pins: tuple[int, ...] = ()
    """The points that the hold keeps, for all members."""
    parent: int = Field(ge=0)
    """The newest point of the disk; 0: there is none."""
    since: int = Field(ge=0)
    """The source holds what was written since this point, and nothing of the rest, which stays as it is there; 0: all
    of the disk."""
    reason: str = ""
    """Why it holds all of the disk, or which bitmaps told what was written."""
    cut_at: float
    seeded: int = Field(default=0, ge=0)
    """The source holds nothing beyond this byte that could be relied on; 0: it holds all of the disk, or all that was
    written."""


class OpenEpoch(BaseModel):
    """Announce a group's next epoch in its repository, where it pins the newest point of each disk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["open-epoch"] = "open-epoch"
    repository: str
    group: str
    owner: str
    at_least: int = Field(gt=0)
    """Its number must not be less: the ledger has counted so far."""
    disks: tuple[str, ...] = Field(min_length=1)
    """VM/DISK."""
    targets: dict[str, str] = Field(default_factory=dict)
    """Where each of them goes, of a group whose disks do not go to the repository."""


class OpenedEpoch(BaseModel):
    """What its job tells."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    repository: str
    """Its id."""
    number: int
    parents: dict[str, int]
    """The newest point of each disk that can be built on; none for a disk without."""
    pins: tuple[int, ...]
    sizes: dict[str, int] = Field(default_factory=dict)
    """In bytes, of each disk in the point it builds on."""
    seeded: dict[str, int] = Field(default_factory=dict)
    """How many bytes there are so far of each disk that is being seeded."""


class PublishEpoch(BaseModel):
    """Decide an epoch by its manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["publish-epoch"] = "publish-epoch"
    repository: str
    owner: str
    decision: Decision


class AbandonEpoch(BaseModel):
    """Decide an epoch by its tombstone, unless its manifest is there: then that is what its job tells."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["abandon-epoch"] = "abandon-epoch"
    repository: str
    group: str
    owner: str
    number: int
    why: str
    mirrors: tuple[MirroredDisk, ...] = ()
    """Disks whose targets may have been written."""


class DecidedEpoch(BaseModel):
    """What the jobs of both tell."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    is_point: bool
    cut_at: float = 0.0
    disks: tuple[str, ...] = ()
    """VM/DISK of those that are in the point."""
    seeding: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Of those that are not yet, (how many bytes there are, and how many they have)."""

    @classmethod
    def by(cls, decision: Decision) -> Self:
        seeding = {disk.disk: (disk.seeded, disk.size) for disk in decision.seeding}
        seeding |= {disk.disk: (disk.seeded, disk.size) for disk in decision.mirrors if disk.seeded}
        there = [disk.disk for disk in decision.members] + [disk.disk for disk in decision.mirrors]
        return cls(
            is_point=decision.is_point,
            cut_at=decision.cut_at,
            disks=tuple(disk for disk in there if disk not in seeding),
            seeding=seeding,
        )


def _family(task: Any) -> str:
    """By which model a task is checked, so that what is wrong with it is said once."""
    kind = str(task.get("kind", "") if isinstance(task, dict) else getattr(task, "kind", ""))
    return kind if kind in ("open-epoch", "publish-epoch", "abandon-epoch") else "repository"


EpochTask = OpenEpoch | PublishEpoch | AbandonEpoch
AnyTask = Annotated[
    Annotated[RepositoryTask, Tag("repository")]
    | Annotated[OpenEpoch, Tag("open-epoch")]
    | Annotated[PublishEpoch, Tag("publish-epoch")]
    | Annotated[AbandonEpoch, Tag("abandon-epoch")],
    Discriminator(_family),
]


def group_of(task: EpochTask) -> str:
    return task.decision.group if isinstance(task, PublishEpoch) else task.group
