"""A job: what was asked for, which state it is in, and what may be done to it.

States and verbs are QEMU's (QAPI JobStatus, JobVerb). Nothing but `TRANSITIONS` and `verb_is_legal`
decides legality::

    created ──> running ──> ready ──> waiting ──> pending ──> concluded ──> (dismissed)
      │  ^       │   ^       │  ^                                 ^
      v  │       v   │       v  │     aborting ───────────────────┘
      paused     paused     standby      ^
                                         └── from every state before concluded

A job that is told to complete stays ready until it is in sync; waiting is the moment between that and pending.
"""

from __future__ import annotations

import enum
import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from coordinator.model.repository_uri import is_repository, parse_repository
from coordinator.model.task import AnyTask, EpochPart, RepositoryTask, group_of


class State(enum.StrEnum):
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    """All of the disk has been copied once. A source that may change may have done so since; `synced` tells."""
    STANDBY = "standby"
    """Paused while ready."""
    WAITING = "waiting"
    """Told to complete; the last flush is under way."""
    PENDING = "pending"
    """All work is done; waits for finalize."""
    ABORTING = "aborting"
    CONCLUDED = "concluded"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.CREATED: frozenset({State.RUNNING, State.PAUSED, State.ABORTING}),
    State.RUNNING: frozenset({State.PAUSED, State.READY, State.ABORTING}),
    State.PAUSED: frozenset({State.RUNNING, State.CREATED, State.ABORTING}),
    State.READY: frozenset({State.STANDBY, State.WAITING, State.ABORTING}),
    State.STANDBY: frozenset({State.READY, State.ABORTING}),
    State.WAITING: frozenset({State.PENDING, State.ABORTING}),
    State.PENDING: frozenset({State.CONCLUDED, State.ABORTING}),
    State.ABORTING: frozenset({State.CONCLUDED}),
    State.CONCLUDED: frozenset(),
}
"""CREATED and PAUSED, back and forth, as in QEMU; a complete that is refused leaves the job READY."""


class Verb(enum.StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    CANCEL = "cancel"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


_ALIVE = frozenset({State.CREATED, State.RUNNING, State.PAUSED, State.READY, State.STANDBY})
VERBS: dict[Verb, frozenset[State]] = {
    Verb.PAUSE: _ALIVE,
    Verb.RESUME: _ALIVE | {State.WAITING},  # where an error policy may have stopped the publication
    Verb.SET_SPEED: _ALIVE | {State.WAITING},
    Verb.COMPLETE: frozenset({State.READY}),
    Verb.CANCEL: _ALIVE | {State.WAITING, State.PENDING, State.ABORTING},  # by force, when a soft one takes too long
    Verb.FINALIZE: frozenset({State.PENDING}),
    Verb.DISMISS: frozenset({State.CONCLUDED}),
}


def transition_is_legal(old: State, new: State) -> bool:
    return new in TRANSITIONS[old]


def verb_is_legal(state: State, verb: Verb) -> bool:
    return state in VERBS[verb]


class Sync(enum.StrEnum):
    """Which extents a mirror copies (the `sync` of QEMU's drive-mirror)."""

    FULL = "full"
    """All data of the chain."""
    TOP = "top"
    """Data of the topmost image only."""
    DIRTY = "dirty"
    """What the named bitmap calls dirty."""
    INCREMENTAL = "incremental"
    """The target holds an older copy: reads what a bitmap calls dirty where one can be trusted, else all of both sides,
    and sends only what differs."""


class ErrorPolicy(enum.StrEnum):
    REPORT = "report"
    IGNORE = "ignore"
    """The extent stays dirty and is tried again, a bounded number of times."""
    STOP = "stop"
    ENOSPC = "enospc"
    """stop on ENOSPC, report otherwise."""


class IoStatus(enum.StrEnum):
    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class JobSpec(BaseModel):
    """What a submitter asks for. Immutable once submitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(default="", max_length=4096, description="URI or path of the disk to copy")
    target: str = Field(default="", max_length=4096, description="URI or path of the copy")
    task: AnyTask | None = Field(default=None, description="instead of source and target")
    part: EpochPart | None = Field(default=None, description="of the epoch of a group, whose coordinator gives it")
    of_group: str = Field(default="", description="the group for one of whose targets its coordinator made it")
    adds: bool = Field(
        default=False, description="with sync=top: the target keeps what the source does not hold, of a group's targets"
    )
    sync: Sync = Sync.FULL
    bitmap: str | None = Field(
        default=None, max_length=1023, description="dirty bitmap, with sync=dirty or incremental"
    )
    speed: int = Field(default=0, ge=0, description="bytes per second over all workers; 0 is unlimited")
    on_source_error: ErrorPolicy = ErrorPolicy.REPORT
    on_target_error: ErrorPolicy = ErrorPolicy.REPORT
    overwrite: bool = Field(default=False, description="an existing target file may be overwritten")
    source_frozen: bool = Field(
        default=False, description="a promise that nobody writes the source: it is not compared once more at the end"
    )
    auto_complete: bool = Field(default=True, description="complete as soon as the job is ready")
    auto_finalize: bool = Field(default=True, description="finalize as soon as the job is pending")

    @model_validator(mode="after")
    def _copies_a_disk_or_does_a_task(self) -> Self:
        for name in ("source", "target"):
            if (getattr(self, name) == "") == (self.task is None):
                raise ValueError(f"{name} is missing" if self.task is None else f"a task has no {name}")
        return self

    @model_validator(mode="after")
    def _bitmap_goes_with_sync(self) -> Self:
        if self.sync is Sync.DIRTY and self.bitmap is None:
            raise ValueError("sync=dirty wants bitmap=NAME")
        if self.bitmap is not None and self.sync not in (Sync.DIRTY, Sync.INCREMENTAL):
            raise ValueError(f"sync={self.sync} reads no bitmap: take sync=dirty, or incremental to compare without it")
        return self

    @model_validator(mode="after")
    def _adds_for_a_group(self) -> Self:
        if self.adds and (self.sync is not Sync.TOP or not self.of_group):
            raise ValueError("adds is for groups, with sync=top: take sync=dirty or incremental")
        return self

    @model_validator(mode="after")
    def _part_goes_to_a_repository(self) -> Self:
        if self.part is not None and not is_repository(self.target):
            raise ValueError("a part of an epoch goes to a repository")
        return self

    @property
    def is_of_a_group(self) -> bool:
        """Only a group's coordinator makes such jobs."""
        is_task = self.task is not None and not isinstance(self.task, RepositoryTask)
        return self.part is not None or self.of_group != "" or is_task

    @property
    def group(self) -> str:
        """The group whose coordinator made this job for an epoch; "" if people did, or their tools."""
        if self.part is not None or self.of_group:
            return self.of_group or parse_repository(self.target).group
        if self.task is None or isinstance(self.task, RepositoryTask):
            return ""
        return group_of(self.task)


class JobRecord(BaseModel):
    """A job as the ledger keeps it; also what the API answers. All sizes are in bytes, times in Unix seconds."""

    model_config = ConfigDict(extra="ignore")

    id: str
    spec: JobSpec
    state: State = State.CREATED
    created_at: float = 0.0
    started_at: float = 0.0
    """When the job first ran; 0 before."""
    concluded_at: float = 0.0

    # What was found out when source and target were opened; 0 before.
    disk_size: int = 0
    block_size: int = 0
    max_writers: int = 0
    target_zeroed: bool = False
    """The target read as zeroes from end to end before the first pass, in which zero extents then cost nothing."""
    source_may_change: bool = False
    """The source is an NBD export or an image that another process has open for writing, and its submitter has not
    promised `source_frozen`; or its files were seen to be written."""
    source_stamp: str = ""
    """What the source's files looked like when the pass was planned; "" where nothing tells."""
    source_written: bool = False
    """The stamp was another one when the pass was settled: somebody wrote the source meanwhile."""
    compare_reason: str = ""
    """Why content is compared instead of a bitmap being read, where that is so."""
    bitmap: str = ""
    """The bitmap that an incremental job reads instead of comparing all of the disk."""
    source_point: int = 0
    """Where the source is a group's newest recovery point: which one that was when the job was planned. All movers read
    that one, whatever is published meanwhile."""

    # Of a job whose target is a repository; see coordinator.model.point.
    group: str = ""
    disk: str = ""
    epoch: int = 0
    """The epoch it writes; 0 while none is open."""
    parent_epoch: int = 0
    on_parent: bool = False
    """What a pass does not cover stays as it is in the parent; else it reads as zeroes."""
    pass_root: str = ""
    """The root of the last settled pass."""
    cut_at: float = 0.0
    published: bool = False
    abandoned: bool = False
    closing: bool = False
    """Of an aborting job: its last unit, which abandons the epoch, may run."""
    result: str = ""
    """What a task tells, as JSON."""

    pass_number: int = 0
    pass_kind: str = ""
    """"copy" or "compare", then "settle"; see coordinator.model.step."""
    compared: bool = False
    """The pass compares contents, so `pass_sent` counts what differed."""
    plan_cursor: int = 0
    """Bytes of the disk, from its start, that have been split into units in this pass."""
    plan_done: bool = False
    pass_sent: int = 0
    """Bytes written to the target in this pass; 0 after a comparing pass means: in sync."""
    settled: bool = False
    """The pass is flushed and its suspect units are verified; set when its settle unit finishes."""
    complete_passes: int = 0
    """Comparing passes made since complete was asked for."""
    synced: bool = False
    """What the last MIRROR_STATE_CHANGE said. True once a settled pass has shown that the target equals the source: any
    pass where the source cannot change, else a comparing one that found nothing."""

    len: int = 0
    offset: int = 0

    # How fast `offset` grows, by the ledger's clock; see coordinator.model.progress.
    active_s: float = 0.0
    """Seconds in which the job made progress: without rests, and without the time in which it was ready and idle."""
    progress_at: float = 0.0
    """When `offset` last grew, or since when the job goes at its present speed, if that is later."""
    rate_from_at: float = 0.0
    rate_from_offset: int = 0
    """The rate is measured from this moment, and from the offset that the job had then."""
    rate_mark_at: float = 0.0
    rate_mark_offset: int = 0
    """The moment that takes its place when it has become old."""

    bytes_read: int = 0
    bytes_sent: int = 0

    units_ready: int = 0
    units_leased: int = 0
    units_done: int = 0
    units_quarantined: int = 0

    speed: int = 0
    pause_requested: bool = False
    cancel_requested: str = ""
    """"", "soft" or "force"."""
    complete_requested: bool = False
    finalize_requested: bool = False
    io_status: IoStatus = IoStatus.OK
    target_io_status: IoStatus = IoStatus.OK
    error: str = ""
    """Why the job failed, is paused by an error, or refused to complete; with the remedy."""
    fatal: bool = False
    """The error ends the job."""
    error_code: str = ""
    """The `code` of the error class, so that a client can raise the same again."""

    @property
    def in_sync(self) -> bool:
        return self.len == self.offset

    @property
    def failed(self) -> bool:
        return self.state is State.CONCLUDED and self.fatal

    @property
    def cancelled(self) -> bool:
        return self.state is State.CONCLUDED and self.cancel_requested != "" and not self.fatal


_SPEED = re.compile(r"(?P<n>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?)(?:i?b)?(?:/s)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """'50M', '1.5GiB/s', '4096' to bytes; K, M, G, T are powers of 1024 as in QEMU's tools.

    Raises ValueError naming the text.
    """
    match = _SPEED.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write a number and K, M, G or T, such as 50M")
    factor = 1024 ** " kmgt".index(match["unit"].lower() or " ")
    return int(float(match["n"]) * factor)


Event = dict[str, Any]
"""{"id", "time", "event", "job", "data": {…}}; `id` is the stream's and grows strictly."""
