"""Mirrors of groups: targets that hold the newest point of each disk and no other. Pure.

A target that is being written is of no use until the last byte is there and all disks are decided, so it is said to be
inconsistent from before the first write to the decision. What was begun and given up stays so until another pass is
decided: that writes all that the one before may have written, since bitmaps and comparisons tell of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict, Field

from coordinator.model.uri import parse


class MirrorSpec(BaseModel):
    """Copies of a group's disks that are kept up to date."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: dict[str, str] = Field(min_length=1, description="by VM/DISK, a path or nbd://host:port/export")
    staged: bool = Field(
        default=False,
        description="each point goes to the repository first, so that targets can always be brought to a point",
    )
    overwrite: bool = Field(default=False, description="files that are there already may be overwritten")


class MirrorState(BaseModel):
    """What a target holds."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    target: str
    epoch: int = 0
    """The last point that was brought there; 0: none."""
    begun: int = 0
    """The point that is written over it, or was when that was given up; 0: none."""
    is_ours: bool = False
    """A job of ours has written there, so that what there is may be written again."""

    @property
    def is_consistent(self) -> bool:
        return self.epoch > 0 and self.begun == 0


Mirrors = Mapping[str, MirrorState]
"""By VM/DISK."""


class Applying(BaseModel):
    """A point on its way from the repository to targets, beside all rounds."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    point: int
    targets: dict[str, str]
    """By VM/DISK."""
    since: dict[str, int]
    """By VM/DISK, the point that the target held; not there: contents have to be compared."""


def check_targets(mirror: MirrorSpec, disks: Iterable[str]) -> None:
    """ValueError, UsageError."""
    if astray := sorted(mirror.targets.keys() ^ set(disks)):
        raise ValueError(f"mirror.targets: {astray[0]} is no disk of the group, or has no target: name one of each")
    places = [str(parse(target)) for target in mirror.targets.values()]
    if len(set(places)) < len(places):
        raise ValueError(f"mirror.targets: {max(places, key=places.count)} is named twice")
    for target in mirror.targets.values():
        if parse(target).kind not in ("file", "nbd"):
            raise ValueError(f"mirror.targets: {target} is no path and no NBD export")


def state_of(mirrors: Mirrors, disk: str, target: str) -> MirrorState:
    """Of another target than the one that was written last nothing is known."""
    found = mirrors.get(disk)
    return found if found is not None and found.target == target else MirrorState(target=target)


def begun(mirrors: Mirrors, targets: Mapping[str, str], number: int) -> dict[str, MirrorState]:
    """Before anything of point `number` is written to `targets`."""
    return {
        **mirrors,
        **{
            disk: state_of(mirrors, disk, target).model_copy(update={"begun": number})
            for disk, target in targets.items()
        },
    }


def written(mirrors: Mirrors, targets: Mapping[str, str]) -> dict[str, MirrorState]:
    """Jobs have written to these targets, or may have."""
    return _updated(mirrors, targets, {"is_ours": True})


def decided(mirrors: Mirrors, targets: Mapping[str, str], number: int) -> dict[str, MirrorState]:
    """All of point `number` is there, and decided."""
    return _updated(mirrors, targets, {"epoch": number, "begun": 0, "is_ours": True})


def _updated(mirrors: Mirrors, targets: Mapping[str, str], changes: Mapping[str, object]) -> dict[str, MirrorState]:
    """Where disks still go to these targets."""
    known = ((disk, mirrors[disk]) for disk in targets if disk in mirrors)
    ours = {disk: state.model_copy(update=changes) for disk, state in known if state.target == targets[disk]}
    return {**mirrors, **ours}


def is_synced(mirrors: Mirrors) -> bool:
    """Whether all targets together are a point."""
    states = list(mirrors.values())
    return bool(states) and all(state.is_consistent for state in states) and len({s.epoch for s in states}) == 1
