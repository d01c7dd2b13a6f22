"""The barrier of a group's epoch (DESIGN §6): who takes part, who has arrived, and whether all may cut.

Nothing but `TRANSITIONS` and `transition_is_legal` decides which phase may follow which::

    preparing ──> freezing ──> cutting ──> taken ──> readable ──> retired
        │            │            │          │          │
        └────────────┴────────────┴──────────┴──────────┴───────> aborted

    go key: open     open         go         go         go         (aborted: abort; go, where it came after that)

Guests run while they prepare. When the last participant is PREPARED all may freeze, and the time for it runs. The last
one FROZEN turns the go key to GO, unless that time is over; then it turns to ABORT. Participants act on its value
alone, never on a clock of theirs. Each then thaws, and the epoch lives on if all are CUT. Each makes its views
READABLE for movers, which may take long; until it has, its views may break, and end the epoch.

An epoch may **pivot**: its guests go on with other images, which passes before it have filled. Who is FROZEN has
written the last of what changed to them and can still go either way; who is CUT runs on them. GO is the decision. A
machine that fails after it stays where it was and says so, while others have moved: the next epoch moves the rest.

Times are whole milliseconds of the ledger's clock: one clock decides which arrival came in time.
"""

from __future__ import annotations

import enum
import posixpath
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from coordinator.model.errors import NotFoundError, RefusedError, UsageError
from coordinator.model.repository_uri import is_name
from coordinator.model.uri import parse


class Phase(enum.StrEnum):
    PREPARING = "preparing"
    """All guests run; scratch, nodes and host caches are made ready."""
    FREEZING = "freezing"
    """All were PREPARED: guests may be stopped, until the deadline."""
    CUTTING = "cutting"
    """All were FROZEN in time, with their views taken: the go key says GO, guests go on."""
    TAKEN = "taken"
    """All are CUT: the views are made readable."""
    READABLE = "readable"
    """All can be read: what hosts hold is copied, flushed and sealed. A view that is read as it is may still break, and
    fails whoever reads it."""
    RETIRED = "retired"
    """Published by its manifest: views go, and the bitmaps that it covers."""
    ABORTED = "aborted"
    """Nothing comes of it: views go, bitmaps stay."""


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.PREPARING: frozenset({Phase.FREEZING, Phase.ABORTED}),
    Phase.FREEZING: frozenset({Phase.CUTTING, Phase.ABORTED}),
    Phase.CUTTING: frozenset({Phase.TAKEN, Phase.ABORTED}),
    Phase.TAKEN: frozenset({Phase.READABLE, Phase.ABORTED}),
    Phase.READABLE: frozenset({Phase.RETIRED, Phase.ABORTED}),
    Phase.RETIRED: frozenset(),
    Phase.ABORTED: frozenset(),
}
OVER = frozenset(phase for phase, following in TRANSITIONS.items() if not following)


class GoKey(enum.StrEnum):
    OPEN = "open"
    GO = "go"
    """Thaw, and what was taken counts; whatever becomes of the epoch, this is never taken back."""
    ABORT = "abort"
    """Thaw, and nothing counts."""


class Arrival(enum.StrEnum):
    PREPARED = "prepared"
    FROZEN = "frozen"
    CUT = "cut"
    READABLE = "readable"


COUNTS_IN = {
    Arrival.PREPARED: Phase.PREPARING,
    Arrival.FROZEN: Phase.FREEZING,
    Arrival.CUT: Phase.CUTTING,
    Arrival.READABLE: Phase.TAKEN,
}
"""The one phase in which an arrival counts. In an earlier one it is a mistake, in a later one it comes too late."""
_BEFORE_GO = frozenset({Phase.PREPARING, Phase.FREEZING})


def transition_is_legal(old: Phase, new: Phase) -> bool:
    return new in TRANSITIONS[old]


def is_early(arrival: Arrival, phase: Phase) -> bool:
    """Whether the phase in which the arrival counts is still to come."""
    return COUNTS_IN[arrival] in _still_to_come(phase)


def _still_to_come(phase: Phase) -> frozenset[Phase]:
    following = TRANSITIONS[phase]
    return following.union(*map(_still_to_come, following))


class ViewKind(enum.StrEnum):
    """How a disk's view is read."""

    FLEECE = "fleece"
    """From an export of the guest's own QEMU."""
    STAGE = "stage"
    """From a second image on the host, to which the view was copied."""


class Consistency(enum.StrEnum):
    """What disks hold at a cut."""

    CRASH = "crash"
    """What they would after a power failure: file systems replay their journals."""
    FILESYSTEM = "filesystem"
    """File systems have written everything, and have nothing to replay."""


class Participant(BaseModel):
    """A virtual machine with disks in the group, or bare disks, in the words of the file that people write."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True
    )

    vm: str
    """Its name, by which it arrives."""
    host: str
    """Whose agent drives it."""
    qmp: str = ""
    """Path of its monitor on that host; "": these are bare disks, which are always taken from their images."""
    guest_agent: str = ""
    """Path of the socket of its guest agent there; "": it has none."""
    disks: tuple[str, ...] = Field(min_length=1)
    images: Mapping[str, str] = Field(
        default_factory=dict,
        exclude_if=lambda images: not images,
        description="by disk, the path or file URI of its image there: where it is while no guest is at the monitor",
    )

    @model_validator(mode="after")
    def _names_are_well_formed(self) -> Self:
        for name in (self.vm, self.host, *self.disks):
            if not is_name(name):
                raise ValueError(f"{name!r} is no name of a machine, a host or a disk")
        if len(set(self.disks)) < len(self.disks):
            raise ValueError(f"a disk of {self.vm} is named twice")
        return self

    @model_validator(mode="after")
    def _images_are_of_its_disks(self) -> Self:
        if self.images and (astray := sorted(self.images.keys() ^ set(self.disks))):
            raise ValueError(f"images of {self.vm}: {astray[0]} is no disk of it, or has no image: name one of each")
        for disk, image in self.images.items():
            if parse(image).kind != "file":
                raise ValueError(f"images of {self.vm}: {image} is no file and no block device of {self.host}")
            if not disk[0].isalpha():
                raise ValueError(f"{disk!r} has an image, so its name has to begin with a letter: QEMU is told it")
        return self

    def places(self, disk: str) -> tuple[str, ...]:
        """Where a disk is found, each by itself: of two disks that are one, whatever people call them, a place is the
        same."""
        device = [f"{self.host} {self.qmp} {disk}"] if self.qmp else []
        image = [f"{self.host}:{_path_of(self.images[disk])}"] if disk in self.images else []
        return (*device, *image)

    def only(self, disks: Iterable[str]) -> Self:
        """It with no others than these of its disks."""
        kept = tuple(disks)
        images = {disk: image for disk, image in self.images.items() if disk in kept}
        return self.model_copy(update={"disks": kept, "images": images})


class EpochSpec(BaseModel):
    """What the coordinator opens an epoch with, and all that agents need to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    participants: tuple[Participant, ...] = Field(min_length=1)
    prepare_ms: int = Field(gt=0)
    """How long to wait for the last one PREPARED."""
    freeze_ms: int = Field(gt=0)
    """From the last one PREPARED until all must be FROZEN; no guest is stopped for longer."""
    hold_ms: int = Field(gt=0)
    """From GO until all must be READABLE: as long as views are held, guests pay for them with each of their writes."""
    views: ViewKind = ViewKind.STAGE
    """fleece: where that is safe; the facts of a cut tell what became of each disk, and why."""
    consistency: Consistency = Consistency.CRASH
    """filesystem: file systems are frozen before a guest is stopped, where it lets us; the facts of its cut tell."""
    sizes: Mapping[str, int] = Field(default_factory=dict)
    """By VM/DISK, in bytes as of its parent: a disk that has another size now is copied whole."""
    leaving: tuple[Participant, ...] = ()
    """Disks that the group has no more: their bitmaps go with the point."""
    seeded: Mapping[str, int] = Field(default_factory=dict)
    """By VM/DISK, how many bytes its parent has of it. Not there: all."""
    slice_bytes: int = Field(default=0, ge=0)
    """How much to copy at most of a disk beside what was written to it; 0: all of it."""
    repository: str = ""
    """Its id, for the names of bitmaps."""
    parents: Mapping[str, int] = Field(default_factory=dict)
    """By VM/DISK, the recovery point that the disk's copy will add to: frozen bitmaps of later epochs are part of what
    is dirty. Not there: none."""
    targets: Mapping[str, str] = Field(default_factory=dict)
    """By VM/DISK, where movers will write it: a guest that runs on that takes no part."""
    pivots: Mapping[str, str] = Field(default_factory=dict)
    """By VM/DISK, the URI of the target that the guest goes on with, which holds the disk as of its parent. All disks
    or none: with none this is an epoch like any other."""

    @model_validator(mode="after")
    def _machines_differ(self) -> Self:
        names = [participant.vm for participant in self.participants]
        if len(set(names)) < len(names):
            raise ValueError("a machine takes part twice")
        return self

    @model_validator(mode="after")
    def _all_pivot_or_none(self) -> Self:
        disks = {f"{one.vm}/{disk}" for one in self.participants for disk in one.disks}
        if self.pivots and set(self.pivots) != disks:
            differ = ", ".join(sorted(disks ^ set(self.pivots)))
            raise ValueError(f"an epoch pivots all of its disks, or none: {differ}")
        if len(set(self.pivots.values())) < len(self.pivots):
            raise ValueError("two disks pivot to one target")
        return self

    @property
    def vms(self) -> tuple[str, ...]:
        return tuple(participant.vm for participant in self.participants)

    def parent(self, vm: str, disk: str) -> int:
        """0: none."""
        return self.parents.get(f"{vm}/{disk}", 0)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Each once, in the order of the participants; they hear of the epoch."""
        return tuple(dict.fromkeys(participant.host for participant in (*self.participants, *self.leaving)))


class DiskView(BaseModel):
    """What became of one disk at the cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    disk: str
    kind: ViewKind
    why: str = ""
    """Why this kind."""


class CutFacts(BaseModel):
    """What a participant tells when it is CUT, for the label of the recovery point."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cut_at: float
    """Unix time in seconds, by the clock of its host."""
    freeze_ms: float = Field(ge=0)
    """How long the guest stood still; 0 for one that was not running."""
    filesystem_consistent: bool
    """Its file systems were frozen, all that its guest agent freezes, and stayed so until it was cut."""
    fallback: str = ""
    """Why it is not, where that was asked for."""
    views: tuple[DiskView, ...]
    """One of each disk; none where they pivot."""


class DiskCopy(BaseModel):
    """Where one disk can be read as it was at the cut."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    disk: str
    path: str
    """Where movers on its host read it: of a qcow2 image that nobody writes any more, or, of a fleece, the URI of an
    export on a unix socket."""
    uri: str = ""
    """Of the NBD export by which movers elsewhere read it; "": all are on its host."""
    size: int = Field(gt=0)
    """Of the disk, in bytes."""
    since: int = Field(ge=0)
    """It holds what was written since this epoch was cut, and nothing of the rest; 0: all of the disk."""
    reason: str = ""
    """Which bitmaps told what was written, or why none did."""
    seeded: int = Field(default=0, ge=0)
    """Beside what was written it holds what the disk had up to here, and no more of what the parent does not have yet;
    0: nothing is missing."""


class ReadFacts(BaseModel):
    """What a participant tells when it is READABLE."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    copies: tuple[DiskCopy, ...]
    """One of each disk; none where they pivot."""


class Standing(BaseModel):
    """What participants act on: the answer to every arrival, and the content of every piece of news."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    phase: Phase
    key: GoKey
    why: str = ""
    """Why it was aborted."""
    left_ms: int = 0
    """Until this phase times out, as of the answer; 0 where none does. A participant that has heard nothing when they
    are over asks for a time-out, and waits on if the ledger's clock knows better."""


class Epoch(BaseModel):
    """An epoch as the ledger keeps it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    group: str
    number: int
    spec: EpochSpec
    phase: Phase = Phase.PREPARING
    key: GoKey = GoKey.OPEN
    why: str = ""
    """Why it was aborted; begins with the machine that did it, if one did."""
    doubtful: bool = False
    """It was aborted by another run of the ledger's server than it was opened by, which may have lost that its go key
    had turned before."""
    opened_ms: int
    prepare_by_ms: int
    freeze_by_ms: int = 0
    """0 until all are PREPARED."""
    go_ms: int = 0
    """When the go key became GO."""
    hold_by_ms: int = 0
    """0 until then."""
    over_ms: int = 0
    prepared: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    cuts: Mapping[str, CutFacts] = Field(default_factory=dict)
    reads: Mapping[str, ReadFacts] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.group}@{self.number}"

    @property
    def is_over(self) -> bool:
        return self.phase in OVER

    def arrived(self, arrival: Arrival) -> frozenset[str]:
        """Which participants; a set, so that arriving twice is arriving once."""
        return {
            Arrival.PREPARED: self.prepared,
            Arrival.FROZEN: self.frozen,
            Arrival.CUT: frozenset(self.cuts),
            Arrival.READABLE: frozenset(self.reads),
        }[arrival]

    def fleeced(self, vm: str) -> frozenset[str]:
        """Its disks that are read from its own QEMU."""
        views = self.cuts[vm].views if vm in self.cuts else ()
        return frozenset(view.disk for view in views if view.kind is ViewKind.FLEECE)

    def participant(self, vm: str) -> Participant:
        """NotFoundError for one that takes no part."""
        for participant in self.spec.participants:
            if participant.vm == vm:
                return participant
        raise NotFoundError(f"{vm!r} takes no part in epoch {self.name}")

    def on(self, host: str) -> tuple[Participant, ...]:
        return tuple(participant for participant in self.spec.participants if participant.host == host)

    def standing(self, now_ms: int) -> Standing:
        left_ms = max(0, _ends_ms(self) - now_ms) if self.phase in _AWAITED else 0
        return Standing(phase=self.phase, key=self.key, why=self.why, left_ms=left_ms)


def _path_of(image: str) -> str:
    return posixpath.normpath(f"/{parse(image).path.lstrip('/')}")


def open_epoch(group: str, number: int, spec: EpochSpec, now_ms: int) -> Epoch:
    return Epoch(
        group=checked_group(group),
        number=number,
        spec=spec,
        opened_ms=now_ms,
        prepare_by_ms=now_ms + spec.prepare_ms,
    )


def arrive(epoch: Epoch, vm: str, arrival: Arrival, now_ms: int, facts: CutFacts | ReadFacts | None = None) -> Epoch:
    """A participant has prepared, frozen, cut, or is readable (the last two with `facts`).

    An arrival that was counted before changes nothing, whenever it comes again, and neither does one that comes too
    late: the answer tells what to do. One that comes too early was made without being told to: RefusedError.
    """
    epoch.participant(vm)
    if vm in epoch.arrived(arrival):
        return epoch
    epoch = time_out(epoch, now_ms)
    if is_early(arrival, epoch.phase):
        raise too_early(epoch.name, vm, arrival, epoch.phase)
    if epoch.phase is not COUNTS_IN[arrival]:
        return epoch
    if arrival is Arrival.CUT:
        if not isinstance(facts, CutFacts):
            raise ValueError("a cut comes with its facts")
        epoch = epoch.model_copy(update={"cuts": {**epoch.cuts, vm: facts}})
    elif arrival is Arrival.READABLE:
        if not isinstance(facts, ReadFacts):
            raise ValueError("what is readable comes with its facts")
        epoch = epoch.model_copy(update={"reads": {**epoch.reads, vm: facts}})
    else:
        epoch = epoch.model_copy(update={arrival.value: epoch.arrived(arrival) | {vm}})
    if len(epoch.arrived(arrival)) < len(epoch.spec.participants):
        return epoch
    return _ON_LAST[arrival](epoch, now_ms)


def time_out(epoch: Epoch, now_ms: int) -> Epoch:
    """Somebody has waited long enough, it thinks: abort if the time of this phase is over."""
    awaited = _AWAITED.get(epoch.phase)
    if awaited is None or now_ms < _ends_ms(epoch):
        return epoch
    missing = [vm for vm in epoch.spec.vms if vm not in epoch.arrived(awaited)]
    return _abort(epoch, f"not {awaited} in time: {', '.join(missing)}", now_ms)


def abort(epoch: Epoch, vm: str, why: str, now_ms: int) -> Epoch:
    """A participant cannot go on. After GO it changes nothing: all cut then, or tell that they failed to."""
    epoch.participant(vm)
    return _abort(epoch, f"{vm}: {why}", now_ms) if epoch.phase in _BEFORE_GO else epoch


def fail_cut(epoch: Epoch, vm: str, why: str, now_ms: int) -> Epoch:
    """After GO a participant's cut failed, or its view broke before everything was READABLE.

    RefusedError where nobody may cut yet, and where all can be read: from then on the coordinator decides.
    """
    epoch.participant(vm)
    if is_early(Arrival.CUT, epoch.phase):
        raise too_early(epoch.name, vm, Arrival.CUT, epoch.phase)
    if epoch.phase in (Phase.READABLE, Phase.RETIRED):
        raise too_late_to_fail(epoch.name, epoch.phase)
    return epoch if epoch.is_over else _abort(epoch, f"{vm}: {why}", now_ms)


def give_up(epoch: Epoch, why: str, now_ms: int) -> Epoch:
    """The coordinator ends the epoch without result, before GO or later. One that is over stays what it is."""
    return epoch if epoch.is_over else _abort(epoch, why, now_ms)


def retire(epoch: Epoch, now_ms: int) -> Epoch:
    """Its manifest is written. RefusedError unless all were READABLE."""
    if epoch.phase is Phase.RETIRED:
        return epoch
    if not transition_is_legal(epoch.phase, Phase.RETIRED):
        raise not_readable(epoch.name, epoch.phase)
    return _move(epoch, Phase.RETIRED, over_ms=now_ms)


def checked_group(name: str) -> str:
    if not is_name(name):
        raise UsageError(f"{name!r} is no name of a group", "letters, digits, dots, hyphens and underscores")
    return name


def checked_facts(epoch: Epoch, vm: str, facts: CutFacts) -> CutFacts:
    """ValueError, a mistake of the agent, unless there is one view of each disk: a disk forgotten would be lost."""
    disks = _viewed(epoch, vm)
    if sorted(view.disk for view in facts.views) != disks:
        raise ValueError(f"the cut of {vm} needs one view of each of its disks: {', '.join(disks)}")
    return facts


def checked_reads(epoch: Epoch, vm: str, facts: ReadFacts) -> ReadFacts:
    """The same for copies."""
    disks = _viewed(epoch, vm)
    if sorted(copy.disk for copy in facts.copies) != disks:
        raise ValueError(f"{vm} needs one copy of each of its disks: {', '.join(disks)}")
    return facts


def _viewed(epoch: Epoch, vm: str) -> list[str]:
    """Of which disks there are views: a pivot leaves none."""
    return [] if epoch.spec.pivots else sorted(epoch.participant(vm).disks)


def too_early(name: str, vm: str, arrival: Arrival, phase: Phase) -> RefusedError:
    return RefusedError(f"{vm} is {arrival} in epoch {name}, which is {phase}: nobody was told to", "thaw it")


def too_late_to_fail(name: str, phase: Phase) -> RefusedError:
    return RefusedError(f"epoch {name} is {phase}: all can be read", "let the coordinator give it up")


def not_readable(name: str, phase: Phase) -> RefusedError:
    return RefusedError(f"epoch {name} is {phase}: only one that can be read can be retired", "give it up instead")


def not_over(name: str, phase: Phase) -> RefusedError:
    return RefusedError(f"epoch {name} is {phase}", "retire it, or give it up, before the next one is opened")


def unknown_epoch(name: str) -> NotFoundError:
    return NotFoundError(f"there is no epoch {name}", "it was over long ago, or is lost: nobody may cut for it")


def _all_prepared(epoch: Epoch, now_ms: int) -> Epoch:
    return _move(epoch, Phase.FREEZING, freeze_by_ms=now_ms + epoch.spec.freeze_ms)


def _all_frozen(epoch: Epoch, now_ms: int) -> Epoch:
    return _move(epoch, Phase.CUTTING, key=GoKey.GO, go_ms=now_ms, hold_by_ms=now_ms + epoch.spec.hold_ms)


def _all_cut(epoch: Epoch, now_ms: int) -> Epoch:
    return _move(epoch, Phase.TAKEN)


def _all_readable(epoch: Epoch, now_ms: int) -> Epoch:
    return _move(epoch, Phase.READABLE)


_ON_LAST: dict[Arrival, Callable[[Epoch, int], Epoch]] = {
    Arrival.PREPARED: _all_prepared,
    Arrival.FROZEN: _all_frozen,
    Arrival.CUT: _all_cut,
    Arrival.READABLE: _all_readable,
}


def _abort(epoch: Epoch, why: str, now_ms: int) -> Epoch:
    key = GoKey.ABORT if epoch.key is GoKey.OPEN else epoch.key
    return _move(epoch, Phase.ABORTED, key=key, why=why, over_ms=now_ms)


def _move(epoch: Epoch, phase: Phase, **changes: Any) -> Epoch:
    assert transition_is_legal(epoch.phase, phase), f"{epoch.phase} to {phase}"
    return epoch.model_copy(update={"phase": phase, **changes})


_AWAITED = {phase: arrival for arrival, phase in COUNTS_IN.items()}


def _ends_ms(epoch: Epoch) -> int:
    """When the phase times out."""
    ends = {Phase.PREPARING: epoch.prepare_by_ms, Phase.FREEZING: epoch.freeze_by_ms}
    return ends.get(epoch.phase, epoch.hold_by_ms)
