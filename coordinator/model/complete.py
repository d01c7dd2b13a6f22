"""The end of a group's protection: one last point, or a pivot, after which its guests go on with its targets. Pure.

A pivot is a round whose machines stand still while the last of what was written is copied, so passes come first, until
one is short enough that what is written meanwhile fits into the stop. Before the go key has turned any failure leaves
every machine where it was. After that some may have moved, and none can go back alone: then only further pivots follow,
until all have.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

PASSES = 2
"""At least: what the first one had to copy says nothing of the next."""
MOST_PASSES = 6
"""Then it is tried, however long the last one took: who writes faster than can be copied has no shorter one."""
PASS_FITS = 2.0
"""A pass may take this many times the stop: most of it is not copying."""
TRIES = 4
"""Of passes or pivots that fail, before the group goes on as before; after GO without end."""
LONGEST_PAUSE_S = 30.0


class Completing(BaseModel):
    """What was asked for, and how far it is."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    pivots: bool
    downtime_s: float = 0.0
    """How long machines may stand still for the pivot."""
    passes: int = 0
    last_pass_s: float = 0.0
    failures: int = 0
    """Of passes and pivots, all together."""
    went: bool = False
    """Some machines may have moved."""
    next_at: float = 0.0
    """The next round is not begun before."""

    @property
    def is_ripe(self) -> bool:
        """Whether the next round is the pivot."""
        is_short = self.last_pass_s <= PASS_FITS * self.downtime_s
        return self.pivots and (self.went or (self.passes >= PASSES and is_short) or self.passes >= MOST_PASSES)


class Completion(BaseModel):
    """How it ended."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    done: bool
    why: str = ""
    pivoted: bool = False
    point: int = 0
    """The last one."""
    downtimes_ms: Mapping[str, float] = Field(default_factory=dict)
    """By VM, how long it stood still for the pivot."""


def after_pass(completing: Completing, took_s: float) -> Completing:
    return completing.model_copy(update={"passes": completing.passes + 1, "last_pass_s": took_s, "next_at": 0.0})


def after_failure(completing: Completing, now: float, *, went: bool) -> Completing | None:
    """None: it is given up. What a pivot has left to copy is copied by another pass first, where that can be."""
    failures = completing.failures + 1
    went = completing.went or went
    if failures >= TRIES and not went:
        return None
    changes = {
        "failures": failures,
        "went": went,
        "passes": min(completing.passes, PASSES - 1),
        "next_at": now + min(2.0 ** (failures - 1), LONGEST_PAUSE_S),
    }
    return completing.model_copy(update=changes)
