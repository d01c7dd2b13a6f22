"""Work on a repository as a whole, which a job does in one unit: make it, look at it, tidy it."""

from __future__ import annotations

import enum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from coordinator.model.point import Retention
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
