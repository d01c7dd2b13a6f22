"""What a ledger does. `RedisLedger` and `MemoryLedger` pass the same contract tests.

Every method that changes something is one atomic step (one Lua script in Redis). Coordinator steps carry a
`Term` and are refused with `DeposedError` when it is not the current one; unit steps carry the unit's token
alone, so a change of leader disturbs no mover. Clock: the server's own, so that hosts need not agree.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from coordinator.model.epoch import Epoch, EpochSpec
from coordinator.model.errors import DamagedError, FlushpointError, UnavailableError
from coordinator.model.events import EventName
from coordinator.model.group import GroupRecord
from coordinator.model.job import Event, JobRecord, JobSpec
from coordinator.model.point import PointRecord, RepositoryRecord
from coordinator.model.units import Claim, Directive, PlannedUnit, QuarantinedUnit, UnitKind

GROUP_WAKE = "group:"
"""How a group is told from a job in `next_wake`: no job's id has a colon."""


class DeposedError(FlushpointError):
    """Another coordinator leads, or the server was restarted and its run is not adopted yet: this one must stop acting
    on what it has read."""


class LedgerUnavailableError(UnavailableError):
    """The ledger's server does not answer, or takes no writes now. Says nothing about any disk."""


class ConflictError(FlushpointError):
    """The job or group changed since it was read; read it again and decide anew."""


class UnreadableGroupError(DamagedError):
    """The record of a group is damaged, or of another version: `why`. All that can be done with it is to remove it, in
    `version`."""

    def __init__(self, name: str, version: int, why: str) -> None:
        super().__init__(
            f"the record of group {name!r} cannot be read: {why}",
            "take the version of Flushpoint that wrote it, or delete the group, whose points stay, and apply its file",
        )
        self.name = name
        self.version = version
        self.why = why


@dataclass(frozen=True, slots=True)
class Term:
    """One term of leadership: a strictly growing number and a random nonce."""

    generation: int
    nonce: str


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event about to be appended to the stream in the step that causes it."""

    name: EventName
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NewUnit:
    """A plan or settle unit that a step of the control loop adds."""

    kind: UnitKind
    pass_number: int


class Finished(enum.StrEnum):
    DONE = "done"
    ALREADY = "already"
    """This token finished this unit before; nothing was counted again."""
    STALE = "stale"
    """The lease was lost; nothing was counted."""
    AGAIN = "again"
    """A flush of the job failed while the unit was leased, and another's may have been the one that was told: the
    unit is ready again, to be written anew; nothing was counted."""


@dataclass(frozen=True, slots=True)
class SuspectUnit:
    """A done unit one of whose leases had expired: settle reads its ranges again."""

    unit_id: str
    extents: str
    digest: str
    """blake3 hex of what its last holder wrote, in order of its extents."""
    quarantine_ms: int
    """How long to wait until the last expired holder must be dead; 0: now."""


@dataclass(frozen=True, slots=True)
class Versioned:
    """A job and the version its next `update` must name."""

    job: JobRecord
    version: int


class Ledger(Protocol):
    # -- the server ---------------------------------------------------------------------------------------
    def ping(self) -> None:
        """UnavailableError when the server does not answer or refuses writes."""

    def shortcomings(self) -> list[str]:
        """What the server's configuration may cost, each in a sentence with what to do about it; [] as it should be."""

    def run_is_known(self) -> bool:
        """False when the server's run_id is not the one recorded by `adopt_run`: it restarted, may have lost
        writes, and hands out no claims until a leader adopts it."""

    def adopt_run(self, term: Term, hold_ms: int) -> int:
        """Record the server's run_id, make every leased unit ready and suspect (expired += 1), and hand out
        no claim for `hold_ms` (the longest lease granted before), unless no run was recorded yet, or none any more
        (`resign`).
        Returns the number of units made ready."""

    # -- leadership -----------------------------------------------------------------------------------------
    def lead(self, nonce: str, ttl_ms: int, at_least: int = 0) -> Term | None:
        """Become or stay leader for `ttl_ms`; None while another leads. A new term's generation is greater
        than any before and greater than `at_least`."""

    def led(self) -> bool:
        """Whether anybody leads."""

    def resign(self, term: Term) -> None:
        """Leave leadership, unless it was lost. If nobody holds a lease, the recorded run is forgotten: no claims until
        the next leader has adopted the server's run, for which nobody has to wait then."""

    # -- jobs -------------------------------------------------------------------------------------------------
    def submit(self, job_id: str, spec: JobSpec, idempotency_key: str = "", term: Term | None = None) -> JobRecord:
        """Create the job (state created, with its JOB_STATUS_CHANGE) and wake the leader. The same id, or the same
        non-empty idempotency key with an equal spec, returns the job that exists; with another spec it raises
        RefusedError. The record is flushed to the AOF before this returns where the server can (WAITAOF); not with a
        `term` (DeposedError unless current), for the control loop makes what it misses once more."""

    def job(self, job_id: str) -> Versioned:
        """NotFoundError if there is none."""

    def jobs_named(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        """Those of these ids that there are, asked for at once."""

    def jobs(self, *, after: str = "", limit: int = 100) -> list[JobRecord]:
        """Newest first; `after` is the id of the last one seen (NotFoundError if it was dismissed)."""

    def active_jobs(self) -> list[str]:
        """Ids of all jobs that are not concluded."""

    def update(
        self,
        job_id: str,
        version: int,
        changes: Mapping[str, Any],
        *,
        events: Sequence[NewEvent] = (),
        new_unit: NewUnit | None = None,
        drop_units: bool = False,
        retry_quarantined: bool = False,
        term: Term | None = None,
    ) -> JobRecord:
        """Apply `changes` (fields of JobRecord) if the job still has `version`, else ConflictError; append
        the events (and a JOB_STATUS_CHANGE {status} when `state` changes: before them, but after them when the
        job is concluded, as QEMU orders them); add `new_unit`; wake the leader.
        `drop_units` forgets all units of the job and zeroes its unit counters (a new pass, or an abort),
        before the changes and `new_unit` apply: later finishes of them are stale. `retry_quarantined` makes
        given-up units ready again, oldest first, and counts their attempts from the start. A new state, a new speed
        and dropped units restart the measuring of the rate (coordinator.model.progress). `term` given:
        DeposedError unless current. Unit steps do not change a job's version, except those that wake the
        leader (see below). A job whose state becomes concluded leaves `active_jobs`."""

    def surplus(self, keep: int) -> list[str]:
        """Ids of concluded jobs beyond the `keep` that concluded last, oldest first; a bounded number."""

    def dismiss(self, job_id: str, version: int, term: Term | None = None) -> None:
        """Forget a concluded job and all its records; its last JOB_STATUS_CHANGE says null. `term` as in update."""

    def next_wake(self, timeout_s: float) -> str | None:
        """Block until a job or a group wants the control loop's attention; the job's id, or GROUP_WAKE and the group's
        name; None at the time limit."""

    # -- units --------------------------------------------------------------------------------------------------
    def claim(self, worker: str, token: str, lease_ms: int) -> Claim | None:
        """The next ready unit of a job that may run (state running or ready or waiting, no pause or
        cancel requested, no fatal error, fewer than max_writers units leased where max_writers > 0), round
        robin over jobs.
        `token` is random and becomes the lease's. None: nothing is ready, or claims are held back."""

    def renew(self, job_id: str, unit_id: str, token: str, lease_ms: int) -> Directive: ...

    def opened(self, job_id: str, unit_id: str, token: str, facts: Mapping[str, Any]) -> bool:
        """A unit's holder records what it found (disk_size, block_size, max_writers, target_zeroed,
        source_may_change, source_stamp, source_written, source_point, compare_reason, bitmap; of a repository's group,
        disk, epoch, parent_epoch, on_parent, pass_root, cut_at, published; of a task its result) in the job; wakes the
        leader. False: stale."""

    def reserve(self, job_id: str, unit_id: str, token: str, target: str) -> str | None:
        """A unit's holder reserves its job's target, by a name without a line feed, until the job concludes; one
        target may have several names. Returns the id of the job that has it, which may be another active one;
        None: stale."""

    def add_units(
        self,
        job_id: str,
        unit_id: str,
        token: str,
        kind: UnitKind,
        cursor: int,
        new_cursor: int,
        units: Sequence[PlannedUnit],
    ) -> bool:
        """A plan unit's holder adds units and moves plan_cursor from `cursor` to `new_cursor`; `len` and
        units_ready grow. False, and nothing changes, if stale or the cursor is elsewhere. Wakes the leader, for
        doorbells, without a change of version: it has nothing to decide anew."""

    def finish(
        self,
        job_id: str,
        unit_id: str,
        token: str,
        *,
        bytes_read: int = 0,
        bytes_sent: int = 0,
        digest: str = "",
        result: str = "",
    ) -> Finished:
        """The unit is done; adds its bytes to `offset`, bytes_read, bytes_sent, pass_sent once, and a `result` that is
        not empty to the job's results. A plan unit sets plan_done, a settle or task unit settled, a publish unit
        published, an abandon unit abandoned. Wakes the leader when it is a plan or settle unit, when no unit
        of the job is ready or leased any more, and when none is leased of a job that may not run (it waits
        for that to pause or conclude; release and reap wake it for the same).

        A token is valid until reap takes the lease away, even past its time. The same finish again is
        ALREADY for one hour, then STALE."""

    def results(self, job_id: str) -> list[str]:
        """What the finished units of the job's current pass left, in the order of their finishing."""

    def release(
        self,
        job_id: str,
        unit_id: str,
        token: str,
        *,
        remaining: str,
        done_bytes: int,
        bytes_read: int,
        bytes_sent: int,
        count_attempt: bool,
        flush_failed: bool = False,
        delay_ms: int = 0,
        max_attempts: int = 0,
        events: Sequence[NewEvent] = (),
        changes: Mapping[str, Any] | None = None,
    ) -> bool:
        """Give a unit back with the packed extents that remain (`done_bytes` of it, counted into `offset`,
        are flushed and done). It is ready again after `delay_ms`, or quarantined when `max_attempts` > 0 and
        its counted attempts have reached it; a delayed unit counts as ready. `changes` (io_status,
        target_io_status, pause_requested, error, error_code, fatal) are applied to the job in the same step,
        the events appended, and the leader woken if there are changes or a quarantine. False: stale, nothing
        changes. A copy or compare unit without remaining extents must be finished, not released: ValueError.

        Of a unit whose lease had expired before, all extents remain and `done_bytes` counts nothing: its next
        holder does all of it again, so that the digest of `suspects` covers whatever a zombie may write to.

        `flush_failed`: what was written since the last good flush may be lost, and shows all the same where it is
        read. The unit's next claims say `rewrite`. Kernel and server tell of it once, to one of those who write, so
        every other copy unit whose lease overlapped this one is undone (its bytes leave `offset`) and to be rewritten
        too: a done one is ready again, a leased one is when its holder finishes it (AGAIN) or gives it back."""

    def reap(self, term: Term, max_attempts: int) -> list[str]:
        """Make units ready whose lease has expired (expired += 1, attempts counted; quarantined at
        `max_attempts`, and the leader woken) or whose delay is over. Returns "job/unit" of each made ready;
        handles a bounded number a call, and sweeps a bounded number of forgotten units."""

    def suspects(self, job_id: str, unit_id: str, token: str, quarantine_ms: int) -> list[SuspectUnit]:
        """For the holder of a settle unit: done units of the job with an expired lease, `quarantine_ms`
        counted from the moment the last lease expired; [] if stale."""

    def redo(self, job_id: str, unit_id: str, token: str, suspects: Sequence[str], max_attempts: int = 0) -> bool:
        """Settle found suspect units changed: make them ready again with all their extents (their bytes
        leave `offset`; they stay suspects; a failed attempt counts, and they are quarantined at `max_attempts`),
        end the settle unit without setting settled, and wake the leader. False: stale."""

    def quarantined(self, job_id: str) -> list[QuarantinedUnit]:
        """The units that were given up, by where they lie."""

    def take(self, name: str, want: int, speed: int, burst: int) -> int:
        """Token bucket shared by all workers of a job, or of a group's jobs (GROUP_WAKE and its name): takes `want`
        bytes and returns the milliseconds to wait before sending them (0: now). The bucket refills at `speed` bytes/s
        up to `burst`; it may go into debt, which is what the wait pays for. A changed `speed` counts from now."""

    # -- recovery points ------------------------------------------------------------------------------------
    # A copy of what manifests say, by the id of their repository. Manifests never change: only which of them are
    # there does. Losing all of it loses nothing; a scan brings it back.

    def points_mark(self) -> int:
        """To be taken before a repository is looked at, for what is then recorded or retained by what was seen."""

    def record_points(
        self, repository: str, uri: str, points: Sequence[PointRecord], mark: int, *, publish: bool = False
    ) -> int:
        """Remember points that were seen after `mark` was taken, and by which URI their repository is named; how many
        were new. What was forgotten since then stays so. With `publish` each is one RECOVERY_POINT event of its job,
        whoever recorded it first. Any number of times."""

    def retain_points(self, repository: str, group: str, epochs: Sequence[int], mark: int) -> int:
        """A listing that began after `mark` was taken found these points in the group: forget its others, except those
        recorded since. How many were forgotten. Groups without points are forgotten too."""

    def forget_points(self, repository: str, group: str, epochs: Sequence[int]) -> None:
        """They were removed."""

    def scanned(self, repository: str, uri: str) -> None:
        """All of the repository was looked at just now."""

    def repositories(self) -> list[RepositoryRecord]:
        """By id."""

    def point_groups(self, repository: str) -> dict[str, int]:
        """How many points of each group are remembered."""

    def point_epochs(self, repository: str, group: str) -> list[int]:
        """Ascending."""

    def points(self, repository: str, group: str, *, after: int = 0, limit: int = 100) -> list[PointRecord]:
        """Of the group, with epochs greater than `after`, ascending."""

    # -- groups ---------------------------------------------------------------------------------------------

    def put_group(
        self, group: GroupRecord, *, events: Sequence[NewEvent] = (), term: Term | None = None
    ) -> GroupRecord:
        """Record a group as it is to be from now on, if the ledger has it in `group.version` (0: not at all), else
        ConflictError; the events are appended and the leader is woken. As it is recorded, with its new version. `term`
        given: DeposedError unless current. Flushed to the AOF, or not, as by `submit`."""

    def group(self, name: str) -> GroupRecord:
        """NotFoundError if there is none, UnreadableGroupError."""

    def groups(self) -> list[GroupRecord]:
        """All that can be read, by name."""

    def unreadable_groups(self) -> dict[str, str]:
        """The others: by name, why not."""

    def remove_group(self, name: str, version: int) -> None:
        """Forget a group, not its points. ConflictError, NotFoundError."""

    # -- epochs of groups -----------------------------------------------------------------------------------
    # The coordinator's part; that of the agents is in barrier.py. What each step does is said in model/epoch.py. The
    # leader is woken (next_wake) when an epoch is taken, readable or aborted.

    def open_epoch(self, term: Term, group: str, spec: EpochSpec, after: int = 0) -> Epoch:
        """The group's next epoch, with a number greater than all before and than `after` (the greatest that is known
        from elsewhere). Its hosts hear of it. RefusedError while one of the group is not over (`newest_epoch`, for who
        lost the answer), and while the server's run is not adopted: an epoch is opened only after recovery."""

    def newest_epoch(self, group: str) -> Epoch | None:
        """The one that was opened last; None if there was none, or it was over more than an hour ago."""

    def expire_epochs(self, term: Term) -> list[tuple[str, str]]:
        """Abort every epoch whose phase has timed out, as `Barrier.time_out` does, whoever still waits for it; their
        names and why, sorted."""

    def give_up_epoch(self, term: Term, group: str, number: int, why: str) -> Epoch:
        """End it without result: before GO the go key says ABORT, after that it stays GO. One that is over stays as it
        is. NotFoundError for one that was over long ago or is lost."""

    def retire_epoch(self, term: Term, group: str, number: int) -> Epoch:
        """Its manifest is written: agents may drop its views and the bitmaps that it covers. RefusedError unless it
        was readable, or is retired already; NotFoundError as above."""

    # -- doorbells and workers ------------------------------------------------------------------------------
    def work_is_ready(self) -> int:
        """Number of units that could be claimed now, at most 1000 (a bound, not a statistic)."""

    def ring(self, role: str, bells: Sequence[str], limit: int, ttl_ms: int) -> list[str]:
        """Record bells as outstanding, as many as keep at most `limit` outstanding; those older than
        `ttl_ms` no longer count. Returns the ones to send."""

    def woken(self, role: str, bell: str) -> None:
        """The doorbell arrived; any number of times."""

    def worker_alive(self, worker: str, role: str, slots: int, ttl_ms: int) -> None: ...

    def worker_gone(self, worker: str) -> None: ...

    def workers(self) -> dict[str, int]:
        """Worker id to slots, of those alive."""

    # -- events ---------------------------------------------------------------------------------------------------
    def events(self, after: str = "0", *, limit: int = 100, wait_s: float = 0.0, job_id: str = "") -> list[Event]:
        """Events after stream id `after`, oldest first; waits up to `wait_s` for the first. With `job_id`
        only that job's; it reads on past those of others."""

    def last_event_id(self) -> str: ...

    def close(self) -> None:
        """Give connections back; the next call connects again."""
