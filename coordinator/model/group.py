"""A consistency group: which disks of which machines belong together, how it is protected, and the round at work.

The file that people write (`GroupFile`) and what the API takes (`GroupSpec`) are the same words; durations are seconds,
or text such as 500ms, 5s, 10m, 2h.
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator
from pydantic.alias_generators import to_camel

from coordinator.model.complete import Completing, Completion
from coordinator.model.epoch import Consistency, Participant, ViewKind
from coordinator.model.errors import RefusedError
from coordinator.model.job import parse_bytes
from coordinator.model.mirror import Applying, MirrorSpec, MirrorState, check_targets
from coordinator.model.point import Retention
from coordinator.model.repository_uri import parse_repository

OUTCOMES_KEPT = 20
FAILED_JOBS_KEPT = 10
"""Of a group: they take places of users' own jobs among those that the ledger keeps."""
LONGEST_HOLD_S = 1800.0
"""Nobody renews the epoch's hold in the repository while views are held: this has to be far less than an hour."""
_DURATION = re.compile(r"(?P<n>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is no duration: write a number and ms, s, m, h or d, such as 5s")
    return float(match["n"]) * _UNITS_S[match["unit"]]


LONGEST_S = 366 * 86400.0
Seconds = Annotated[
    float,
    BeforeValidator(_seconds),
    Field(allow_inf_nan=False, le=LONGEST_S),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*(ms|s|m|h|d)$"}]}
    ),
]


def _bytes(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


Rate = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(le=1 << 50),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)?\s*[kKmMgGtT]?([iI]?[bB])?(/s)?$"},
            ]
        }
    ),
]
"""Bytes a second; 0 is unlimited."""
Bytes = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(le=1 << 60),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^\d+(\.\d+)?\s*[kKmMgGtT]?([iI]?[bB])?$"},
            ]
        }
    ),
]
TimeOfDay = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]


class _Words(BaseModel):
    """Written in camelCase, as in other files of Kubernetes' kind."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True
    )


class SpeedWindow(_Words):
    """A limit for a part of the day; one that ends before it begins goes over midnight."""

    begin: TimeOfDay = Field(alias="from")
    end: TimeOfDay = Field(alias="to")
    speed: Rate = Field(ge=0)


class GroupPolicy(_Words):
    """How a group is protected. Times in seconds."""

    rpo: Seconds = Field(
        default=0.0, ge=0, description="how old the newest recovery point may become; 0: points when asked for alone"
    )
    retention: Retention = Field(default=Retention(), description="which points are kept; nothing said: all")
    speed: Rate = Field(default=0, ge=0, description="bytes per second over all disks; 0 is unlimited")
    speed_windows: tuple[SpeedWindow, ...] = Field(default=(), description="other limits by time of day; first match")
    time_zone: str = Field(default="UTC", description="of the windows, such as Europe/Vienna")
    consistency: Consistency = Field(
        default=Consistency.CRASH,
        description="filesystem: guest agents freeze file systems for the cut; where one does not, its point says so",
    )
    freeze_timeout: Seconds = Field(default=1.0, ge=0.01, le=60, description="no guest is ever stopped for longer")
    prepare_timeout: Seconds = Field(
        default=30.0, ge=0.01, le=600, description="how long the slowest machine may take to prepare"
    )
    seed_slice: Bytes = Field(
        default=8 * 1024**3,
        ge=1024**2,
        description="a disk that no point has yet is copied in parts of at most so many bytes, a view for each",
    )
    hold_timeout: Seconds = Field(
        default=600.0,
        ge=0.01,
        le=LONGEST_HOLD_S,
        description="how long views may be held: guests pay for them with each of their writes",
    )
    views: ViewKind = Field(
        default=ViewKind.STAGE,
        description="stage: what changed is first copied on the guest's host; fleece: it is read from the guest's QEMU,"
        " where that is safe, and the view held for as long as the copy takes",
    )

    @field_validator("time_zone")
    @classmethod
    def _zone_is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, OSError, ValueError):  # nothing of that name, a directory, a path that leads elsewhere
            raise ValueError(f"{name!r} is no time zone, such as UTC or Europe/Vienna") from None
        return name


class GroupSpec(_Words):
    """What is protected, where to, and how."""

    repository: str = Field(min_length=1, max_length=4096, description="s3://bucket/prefix or repo+file:///dir")
    policy: GroupPolicy = GroupPolicy()
    mirror: MirrorSpec | None = Field(
        default=None, description="targets; without staged the repository has the record of them alone"
    )
    members: tuple[Participant, ...] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _is_well_formed(self) -> Self:
        uri = parse_repository(self.repository)
        if uri.repository != uri:
            raise ValueError("the repository is named with a group, a disk or a point: leave those out")
        if self.mirror is not None:
            check_targets(self.mirror, self.disks)
        names = [member.vm for member in self.members]
        if len(set(names)) < len(names):
            raise ValueError(f"the machine {max(names, key=names.count)} is named twice: name all its disks at once")
        monitors = [(member.host, member.qmp) for member in self.members if member.qmp]
        if len(set(monitors)) < len(monitors):
            raise ValueError("two machines have one monitor: name all disks of a machine at once")
        places = [place for member in self.members for disk in member.disks for place in member.places(disk)]
        if len(set(places)) < len(places):
            raise ValueError(f"two disks have one image, {max(places, key=places.count)}: name it once")
        for member in self.members:
            if not member.qmp and not member.images:
                raise ValueError(
                    f"{member.vm} has neither qmp nor images: name its monitor, its disks' images, or both"
                )
            if member.qmp and not member.qmp.startswith("/"):
                raise ValueError(f"qmp of {member.vm} is no absolute path of a monitor's socket on {member.host}")
            if member.guest_agent and not member.qmp:
                raise ValueError(f"{member.vm} has a guestAgent and no qmp: of bare disks nobody freezes file systems")
            if member.guest_agent and not member.guest_agent.startswith("/"):
                raise ValueError(f"guestAgent of {member.vm} is no absolute path of a socket on {member.host}")
        return self

    @property
    def disks(self) -> tuple[str, ...]:
        """VM/DISK of all, in order."""
        return tuple(f"{member.vm}/{disk}" for member in self.members for disk in member.disks)

    @property
    def written_targets(self) -> dict[str, str]:
        """Where rounds write, by VM/DISK; empty if that is the repository."""
        return self.mirror.targets if self.mirror is not None and not self.mirror.staged else {}


class GroupMetadata(_Words):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


class GroupFile(_Words):
    """`flushpoint apply -f`."""

    api_version: Literal["flushpoint/v1"]
    kind: Literal["ConsistencyGroup"]
    metadata: GroupMetadata
    spec: GroupSpec

    @classmethod
    def schema_of_file(cls) -> dict[str, Any]:
        """JSON schema, as config/group.schema.json has it for editors."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}


class Stage(enum.StrEnum):
    """What a round is at::

    opening ──> starting ──> cutting ──> copying ──> publishing ──> (over)
       │           │            │           │            │             ^
       └───────────┴────────────┴───────────┴────────────┴──> ending ──┘
    """

    OPENING = "opening"
    """A job announces the epoch in the repository."""
    STARTING = "starting"
    """The ledger's epoch is opened: from then on agents are at work."""
    CUTTING = "cutting"
    """Agents prepare, cut and stage, until all can be read."""
    COPYING = "copying"
    """A job a disk."""
    PUBLISHING = "publishing"
    """A job decides the epoch by its manifest."""
    ENDING = "ending"
    """Nothing comes of it: jobs are cancelled, the epoch is given up, a job decides it by its tombstone."""


class Round(BaseModel):
    """One attempt at a recovery point; `spec` as it was when the attempt began."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    spec: GroupSpec
    begun_at: float
    requests: tuple[str, ...] = ()
    """The checkpoints that it was begun for."""
    leaving: tuple[Participant, ...] = ()
    """Disks that the group has no more, whose bitmaps go with the point that comes of it."""
    completes: bool = False
    """The group's last one."""
    pivot_s: float = 0.0
    """Its machines go on with the targets, and stand still for at most so long; 0: they do not."""
    stage: Stage = Stage.OPENING
    number: int = 0
    """Of its epoch; 0 while none is announced."""
    repository: str = ""
    """Its id."""
    parents: dict[str, int] = Field(default_factory=dict)
    """By VM/DISK, the point it builds on."""
    pins: tuple[int, ...] = ()
    """All of those points."""
    sizes: dict[str, int] = Field(default_factory=dict)
    """By VM/DISK, in bytes, of the point it builds on."""
    seeded: dict[str, int] = Field(default_factory=dict)
    """By VM/DISK, how many bytes the point it builds on has of a disk that is being seeded."""
    why: str = ""
    """Why nothing comes of it."""
    ending_at: float = 0.0
    """Since when that is known."""
    ends: int = 0
    """How often the repository was asked in vain to end it, as far as it goes ..."""
    end_at: float = 0.0
    """... and when it is asked again."""


class Outcome(BaseModel):
    """How a round ended."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    round: str
    requests: tuple[str, ...]
    number: int
    published: bool
    is_step: bool = False
    """It was no failure: a further part of disks was copied that are in no point yet."""
    why: str = ""
    begun_at: float
    ended_at: float
    cut_at: float = 0.0


class GroupRecord(BaseModel):
    """A group as the ledger keeps it. Times in Unix seconds."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    spec: GroupSpec
    version: int = 0
    """Grows with every change; 0: not in the ledger yet."""
    requests: tuple[str, ...] = ()
    """Checkpoints that were asked for and that no round was begun for."""
    round: Round | None = None
    outcomes: tuple[Outcome, ...] = ()
    """Of the last rounds, oldest first."""
    counted: int = 0
    """The greatest number of an epoch."""
    published: int = 0
    """The newest recovery point that a round made; 0: none yet."""
    published_cut_at: float = 0.0
    covered: tuple[str, ...] = ()
    """VM/DISK of those that are in it."""
    seeding: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """VM/DISK of those that are in no point yet, or not any more: (how many bytes are copied, and how many it has)."""
    leaving: tuple[Participant, ...] = ()
    """Disks that were taken out of the group since its newest point, and may have bitmaps of it."""
    done_with: tuple[str, ...] = ()
    """Jobs of the last round, which nobody needs any more."""
    failed: tuple[str, ...] = ()
    """Jobs that failed, oldest first, for people to look at; the last few."""
    paused: bool = False
    """No round is begun, and the copies of one that is at work rest."""
    cancelled: str = ""
    """The round that its user gave up."""
    mirrors: dict[str, MirrorState] = Field(default_factory=dict)
    """By VM/DISK."""
    applying: Applying | None = None
    """Of a group with staged targets."""
    apply_failures: int = 0
    """In a row."""
    apply_at: float = 0.0
    """When it is tried again."""
    completing: Completing | None = None
    completion: Completion | None = None
    """How the last one ended that was asked for."""
    completed: bool = False
    """No round is begun any more."""
    live: tuple[str, ...] = ()
    """Targets that its guests went on with at their last pivot."""
    rpo_missed: bool = False
    """What the last of RPO_MISSED and RPO_RECOVERED said."""
    pruned: int = 0
    """The newest point when old ones were last pruned."""
    pruned_at: float = 0.0
    prune_job: str = ""

    def outcome_for(self, request: str) -> Outcome | None:
        """Of the round that was begun for a checkpoint; None while there is none, or once it was long ago."""
        return next((outcome for outcome in self.outcomes if request in outcome.requests), None)

    def knows(self, request: str) -> bool:
        waiting = self.requests + (self.round.requests if self.round else ())
        return request in waiting or self.outcome_for(request) is not None


def changed(group: GroupRecord, **changes: Any) -> GroupRecord:
    return group.model_copy(update=changes)


def respecified(group: GroupRecord, spec: GroupSpec) -> GroupRecord:
    """The group with another spec, and what that takes out of it. RefusedError while its guests may be moving, and for
    targets that they run on."""
    if group.completing is not None and spec != group.spec:
        raise RefusedError(f"group {group.name!r} is completing", "wait for that, or cancel it")
    new = set(spec.mirror.targets.values()) if spec.mirror is not None else set()
    if spec != group.spec and (live := sorted(new.intersection(group.live))):
        raise RefusedError(f"a guest of group {group.name!r} runs on {live[0]}", "name another target")
    stay = {place for m in spec.members for disk in m.disks for place in m.places(disk)}
    leaving = []
    for member in (*group.leaving, *group.spec.members):
        gone = member.only(disk for disk in member.disks if stay.isdisjoint(member.places(disk)))
        if gone.disks and gone not in leaving:
            leaving.append(gone)
    targets = spec.mirror.targets if spec.mirror is not None else {}
    mirrors = {disk: state for disk, state in group.mirrors.items() if targets.get(disk) == state.target}
    completed = group.completed and spec == group.spec  # who gives it something else to do wants it to go on
    return changed(group, spec=spec, leaving=tuple(leaving), mirrors=mirrors, completed=completed)


class GroupVerb(enum.StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"


def told(group: GroupRecord, verb: GroupVerb, *, force: bool = False) -> GroupRecord:
    """The group after a user's verb. RefusedError for one that makes no sense now. `force`: cancel what leaves some
    machines on their targets and others where they were."""
    if verb is not GroupVerb.CANCEL:
        return _told_to_rest(group, verb is GroupVerb.PAUSE)
    if group.completing is not None:
        return _told_not_to_complete(group, group.completing, force)
    if group.round is None or group.round.stage is Stage.ENDING:
        raise RefusedError(f"group {group.name!r} is at work on no recovery point", "there is nothing to cancel")
    if group.round.stage is Stage.PUBLISHING:
        raise RefusedError(f"{group.name}@{group.round.number} is just being published", "let it be, and prune it")
    return group.model_copy(update={"cancelled": group.round.id})


def _told_to_rest(group: GroupRecord, paused: bool) -> GroupRecord:
    if group.completed and not paused:
        if not set(group.live).isdisjoint(group.spec.written_targets.values()):
            raise RefusedError(f"guests of group {group.name!r} run on its targets", "apply it with other targets")
        return changed(group, paused=False, completed=False)
    return changed(group, paused=paused)


def _told_not_to_complete(group: GroupRecord, completing: Completing, force: bool) -> GroupRecord:
    at_work = group.round
    if at_work is not None and at_work.pivot_s and at_work.stage is Stage.PUBLISHING:
        raise RefusedError(f"machines of group {group.name!r} run on their targets already", "it is about to end")
    if completing.went and not force:
        raise RefusedError(
            f"machines of group {group.name!r} run on their targets already",
            "let it move the others, or cancel it by force: each stays where it is then",
        )
    if at_work is not None and at_work.pivot_s and not completing.went:
        return changed(group, cancelled=at_work.id)  # some may have moved: its end tells whether that was in time
    ended = Completion(id=completing.id, done=False, why="cancelled by its user")
    cancelled = at_work.id if at_work is not None else group.cancelled
    left = changed(group, completing=None, completion=ended, cancelled=cancelled)
    if not completing.went:
        return left
    why = "cancelled by force: some machines may run on their targets, and others where they were"
    torn = ended.model_copy(update={"why": why})
    return changed(left, completion=torn, completed=True, live=tuple(group.spec.written_targets.values()))


def told_to_complete(group: GroupRecord, request: str, *, pivots: bool, downtime_s: float) -> GroupRecord:
    """The group once its end is asked for; asked for again by the same `request`, it changes nothing. RefusedError."""
    known = {one.id for one in (group.completing, group.completion) if one is not None}
    if request in known:
        return group
    if group.completing is not None:
        raise RefusedError(f"group {group.name!r} is completing already", "wait for that, or cancel it")
    if group.paused:
        raise RefusedError(f"group {group.name!r} is paused", "resume it first")
    if group.completed:
        raise RefusedError(f"group {group.name!r} is complete", "resume it, or apply it with something else to do")
    if pivots and (bare := [member.vm for member in group.spec.members if not member.qmp]):
        raise RefusedError(
            f"{bare[0]} of group {group.name!r} has no monitor, so nobody there could go on with its targets",
            "take it out of the group, or complete it without a pivot",
        )
    if pivots and not group.spec.written_targets:
        what = "its targets are staged" if group.spec.mirror is not None else "it has no targets"
        raise RefusedError(
            f"the guests of group {group.name!r} cannot go on elsewhere: {what}", "give it mirror.targets"
        )
    return changed(group, completing=Completing(id=request, pivots=pivots, downtime_s=downtime_s))


def shared_disk(one: GroupRecord, other: GroupRecord) -> str:
    """A disk that is in both groups, as VM/DISK of the first; "" if there is none. A monitor is one machine, however
    it is called, and an image one disk. What the other's round at work began with is still in it."""
    specs = (other.spec, *((other.round.spec,) if other.round else ()))
    theirs = {place for spec in specs for m in spec.members for disk in m.disks for place in m.places(disk)}
    for member in one.spec.members:
        for disk in member.disks:
            if not theirs.isdisjoint(member.places(disk)):
                return f"{member.vm}/{disk}"
    return ""


def share_a_machine(one: GroupSpec, other: GroupSpec) -> bool:
    """Whether a guest could be stopped by both. Of bare disks nobody is stopped, and none is in two groups."""
    ours, theirs = ({(m.host, m.qmp) for m in spec.members if m.qmp} for spec in (one, other))
    return not ours.isdisjoint(theirs)
