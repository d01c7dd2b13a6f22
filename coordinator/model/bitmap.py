"""Which dirty bitmaps of a disk tell what was written since a recovery point. Pure.

A bitmap of ours is called flushpoint:REPOSITORY:GROUP:VM/DISK:EPOCH and records writes since the cut of that epoch.
Every cut adds one and disables those that recorded until then, in the same stop:

    cut 7 (published)    cut 8 (aborted)    cut 9
    |------ :7 ----------|------ :8 --------|------ :9 -----
                                            what changed since point 7: :7 and :8 together

Nothing is merged back when an epoch is aborted: that fails while somebody reads the bitmap. Names tell whose a bitmap
is and what it means, also to an agent that has just started; one that does not match is nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.model.point import TRACKING


@dataclass(frozen=True, slots=True)
class Tracking:
    """A dirty bitmap as QEMU tells of it; an inconsistent one is not usable, nor does it record."""

    name: str
    is_recording: bool
    is_usable: bool


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a cut does with the bitmaps of one disk."""

    add: str
    disable: tuple[str, ...]
    """Those of this group that record until the cut."""
    remove: tuple[str, ...]
    """All of this group, if contents have to be compared: or they would look, together with the one that is added, as
    if they had recorded all the time, should this epoch be aborted, or another build on an older point."""
    changed: tuple[str, ...]
    """All together they name what was written between the cut of the parent and this one, if that is known."""
    since: int
    """The parent, if they do; 0: they do not, so that contents have to be compared."""
    compare: str
    """Why; "" if they do."""

    @property
    def reason(self) -> str:
        """For the point's label: how it is known what was written, or why it is not."""
        return self.compare or f"by bitmap {', '.join(self.changed)}"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose bitmaps: a disk's (VM/DISK), by the name under which its points are. One that was made under another name
    tells of another disk: of two that were exchanged, say, or of an image that was put elsewhere."""

    repository: str
    group: str
    disk: str


def name_of(owner: Owner, epoch: int) -> str:
    return f"{TRACKING}{owner.repository}:{owner.group}:{owner.disk}:{epoch}"


def epoch_of(owner: Owner, name: str) -> int | None:
    """The epoch whose writes a bitmap records; None if it is not this disk's."""
    number = name.rpartition(":")[2]
    if not number.isascii() or not number.isdigit():
        return None
    epoch = int(number)
    return epoch if epoch > 0 and name == name_of(owner, epoch) else None


def rotate(bitmaps: Iterable[Tracking], owner: Owner, parent: int, epoch: int, useless: str = "") -> Rotation:
    """At the cut of `epoch`, whose parent is the point `parent` (0: there is none). `useless` is why bitmaps are of no
    use, whatever they tell."""
    ours = {number: b for b in bitmaps if (number := epoch_of(owner, b.name)) is not None}
    since = {number: b for number, b in ours.items() if parent <= number < epoch}
    newest = max(since, default=0)
    compare = ""
    if parent == 0:
        compare = "there is no recovery point yet"
    elif useless:
        compare = useless
    elif parent not in since:
        compare = f"no bitmap records what was written since point {parent}"
    elif not all(b.is_usable for b in since.values()):
        compare = "QEMU did not close its bitmaps, or another client has changed them"
    elif not since[newest].is_recording:
        compare = "the bitmap was not recording, so that writes may be missing"
    changed = tuple(since[number].name for number in sorted(since)) if not compare else ()
    remove = tuple(ours[number].name for number in sorted(ours)) if compare else ()
    disable = tuple(b.name for _, b in sorted(ours.items()) if b.is_recording and not compare)
    return Rotation(name_of(owner, epoch), disable, remove, changed, since=0 if compare else parent, compare=compare)


def all_of(bitmaps: Iterable[Tracking], owner: Owner) -> tuple[str, ...]:
    """All of the group's on a disk that it has no more, whichever disk they tell of; the oldest first."""
    prefix = f"{TRACKING}{owner.repository}:{owner.group}:"
    ours = [b.name for b in bitmaps if b.name.startswith(prefix)]
    return tuple(sorted(ours, key=lambda name: (name.rpartition(":")[2].zfill(20), name)))


def leftovers(bitmaps: Iterable[Tracking], owner: Owner, newest_point: int) -> tuple[str, ...]:
    """Those that nobody will need, to be removed in this order, the oldest first: whoever is killed on the way must not
    leave a bitmap without one after it, with which it would look as if they told of all that was written. For the same
    reason one that is not usable stays while it is newer than the newest point. What tells of another disk goes too."""
    known = list(bitmaps)
    epochs = {name: epoch_of(owner, name) for name in all_of(known, owner)}
    return tuple(name for name, epoch in epochs.items() if epoch is None or epoch < newest_point)
