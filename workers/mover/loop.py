"""A mover: claims ready units one after the other, and does what each kind asks for."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog

from coordinator.ledger.contract import Finished, Ledger, LedgerUnavailableError
from coordinator.model.errors import (
    DamagedError,
    DiskIOError,
    FlushpointError,
    Next,
    NotFoundError,
    Side,
    UnavailableError,
)
from coordinator.model.extent import Extent, Status, merge_adjacent, pack_extents, unpack_extents
from coordinator.model.job import JobRecord
from coordinator.model.messages import Doorbell
from coordinator.model.policy import Action
from coordinator.model.repository_uri import is_repository
from coordinator.model.task import RepositoryTask, TaskKind
from coordinator.model.units import Claim, UnitKind
from coordinator.settings import Settings
from workers.failpoint import pass_point
from workers.mover import group_epochs, points
from workers.mover.backup import Backups
from workers.mover.disks import Disks, OpenError, opening
from workers.mover.engine import Engine, Failure, Orders, Outcome
from workers.mover.fastpath import copy_fast
from workers.mover.lease import AbortedError, Halt, Lease, LeaseLostError
from workers.mover.planning import Planner, may_change
from workers.mover.rate import RateLimit
from workers.mover.verdict import Verdict, judge, judge_refusal, note
from workers.qemu.image import ImageInUseError
from workers.repository import chores
from workers.sources.contract import Source
from workers.targets.contract import Target

log = structlog.get_logger()

DELAY_MAX_S = 30.0
"""Longest pause before a unit that failed is tried again."""


class Mover:
    """One a process; `work` is called for each doorbell. Once `closing` it hands back its unit and claims no more."""

    def __init__(self, ledger: Ledger, settings: Settings, name: str, closing: Callable[[], bool]) -> None:
        self._closing = closing
        self._ledger = ledger
        self._settings = settings
        self._name = name
        self._disks = Disks(settings)
        self._engine = Engine(settings.depth)
        self._backups = Backups(ledger, settings, self._disks.access)
        self._planner = Planner(ledger, self._disks, self._backups)

    def work(self, bell: Doorbell) -> int:
        """Claim until nothing is ready or the budget is used up; the number of units worked on."""
        self._ledger.woken(bell.role, bell.bell)
        ends_at = time.monotonic() + self._settings.worker_budget_s
        done = 0
        try:
            while time.monotonic() < ends_at and not self._closing():
                granted_at = time.monotonic()
                claim = self._ledger.claim(self._name, secrets.token_hex(16), int(self._settings.lease_s * 1000))
                if claim is None:
                    break
                self._serve(claim, granted_at)
                done += 1
        finally:
            self._disks.close()
            self._backups.close()
        return done

    def _serve(self, claim: Claim, granted_at: float) -> None:
        try:
            job = self._ledger.job(claim.job_id).job
        except NotFoundError:
            return
        lease = Lease(
            self._ledger, claim, self._settings.renew_s, granted_at, job.speed, self._closing, self._disks.abort
        )
        backing_up = is_repository(job.spec.target)
        serve = {
            UnitKind.PLAN: self._plan,
            UnitKind.COPY: self._back_up if backing_up else self._copy,
            UnitKind.COMPARE: self._back_up if backing_up else self._copy,
            UnitKind.SETTLE: self._write_root if backing_up else self._settle,
            UnitKind.PUBLISH: self._publish,
            UnitKind.ABANDON: self._abandon,
            UnitKind.TASK: self._do_task,
        }[claim.kind]
        with lease:
            try:
                serve(job, claim, lease)
            except (LeaseLostError, LedgerUnavailableError) as error:
                # Nobody to tell: the unit is somebody else's, or will be when the lease has run out.
                log.warning("gave up a unit", job=claim.job_id, unit=claim.unit_id, reason=str(error))
                self._disks.close()
            except (AbortedError, OpenError) as error:
                self._disks.close()  # nothing of ours is in flight when it returns; then the unit may be let go
                if isinstance(error, OpenError) and lease.halt is not Halt.ABORT:
                    self._give_up(claim, error)
                else:
                    log.info("broke off a unit", job=claim.job_id, unit=claim.unit_id, reason=str(error))
                    self._release(claim, remaining=claim.extents, count_attempt=False)
            except Exception:
                # A mistake of ours must neither hang the job until leases expire nor go unseen: it counts as a
                # failed attempt, and after some of them the unit is quarantined. What it wrote was not flushed.
                log.exception("a unit failed", job=claim.job_id, unit=claim.unit_id)
                self._disks.close()
                self._release(claim, remaining=claim.extents, count_attempt=True, flush_failed=True)

    # -- kinds of units ------------------------------------------------------------------------------------

    def _plan(self, job: JobRecord, claim: Claim, lease: Lease) -> None:
        if not self._planner.run(job, claim, lease):
            self._release(claim, remaining="", count_attempt=False)

    def _copy(self, job: JobRecord, claim: Claim, lease: Lease) -> None:
        source, target = self._disks.open(job)
        extents = unpack_extents(claim.extents)
        suspect = claim.expired > 0
        in_compare_pass = claim.kind is UnitKind.COMPARE
        # After a failed flush or a dead holder the target may show what it does not durably hold (the page cache
        # keeps it): equal to the source is then no proof, and all of the unit is written anew.
        anew = suspect or claim.rewrite
        orders = Orders(
            compare=in_compare_pass and not anew,
            target_zeroed=job.target_zeroed and claim.pass_number == 1 and not anew,
            count_zeroes=in_compare_pass,
            digest=suspect,
            ends_at=math.inf if suspect else time.monotonic() + self._settings.unit_slice_s,
        )
        rate = RateLimit(self._ledger, job)
        outcome = self._copy_all(source, target, extents, orders, lease, rate, fast=not (suspect or in_compare_pass))
        lease.assert_held()
        pass_point("before-flush")
        failed = self._flush(job)
        if failed is None or lease.halt is Halt.ABORT:
            lease.assert_held()
        pass_point("before-finish")
        if failed is not None:
            # Nothing written since the last flush is durable: the unit starts again, on a target opened anew. The
            # ledger is told even if the lease is nearly over: nobody else may learn of it.
            self._disks.close()
            outcome = Outcome(failures=[*outcome.failures, failed], remaining=extents)
        if not outcome.remaining:
            finished = self._ledger.finish(
                job.id,
                claim.unit_id,
                claim.token,
                bytes_read=outcome.bytes_read,
                bytes_sent=outcome.bytes_sent,
                digest=outcome.digest,
            )
            if finished is Finished.STALE:
                raise LeaseLostError(f"unit {claim.unit_id} belongs to somebody else")
            if finished is Finished.AGAIN:
                log.warning("a flush failed meanwhile; the unit is written anew", job=job.id, unit=claim.unit_id)
            return
        if suspect:
            outcome.remaining = extents  # its digest must cover all of it
        self._give_back(job, claim, extents, outcome, flush_failed=failed is not None)

    def _copy_all(
        self,
        source: Source,
        target: Target,
        extents: list[Extent],
        orders: Orders,
        lease: Lease,
        rate: RateLimit,
        *,
        fast: bool,
    ) -> Outcome:
        """By the pair's fast path as far as it goes, the rest by the engine.

        A fast path that fails is given up without a word of blame: the engine copies all of it again, and meets the
        same error at its extent if it is still there.
        """
        path = self._disks.fast_path() if fast else None
        if path is None:
            return self._engine.copy(source, target, extents, orders, lease, rate)
        data = [e for e in extents if not e.reads_as_zeroes]
        try:
            done = copy_fast(path, data, lease, rate, orders.ends_at)
        except DiskIOError as error:
            log.info("the fast path failed", error=str(error))
            self._disks.drop_fast_path()
            return self._engine.copy(source, target, extents, orders, lease, rate)
        if sum(e.length for e in done.left) > done.copied:
            self._disks.leave_fast_path()  # mostly zeroes: reading everything twice is no fast path
        left = sorted([*(e for e in extents if e.reads_as_zeroes), *done.left], key=lambda e: e.offset)
        # A slice of its own, or ranges left to the engine would be read and left again, for ever.
        slice_ends_at = time.monotonic() + self._settings.unit_slice_s
        outcome = self._engine.copy(source, target, left, replace(orders, ends_at=slice_ends_at), lease, rate)
        outcome.add(done.copied, done.copied)
        remaining = sorted([*outcome.remaining, *done.rest], key=lambda e: e.offset)
        outcome.remaining = list(merge_adjacent(remaining))
        return outcome

    def _flush(self, job: JobRecord) -> Failure | None:
        """Everything this mover wrote is durable, or the failure that says it is not."""
        try:
            self._disks.flush_target()
        except DiskIOError as error:
            return Failure(Side.TARGET, error, _whole(job))
        return None

    def _settle(self, job: JobRecord, claim: Claim, lease: Lease) -> None:
        """Read suspect units again once their dead holders cannot write any more, then flush a last time."""
        self._disks.close()  # opened anew, to see who writes the source now
        source, target = self._disks.open(job)
        written = source.stamp() != job.source_stamp
        if written or (may_change(job, source) and not job.source_may_change):
            facts = {"source_may_change": True, "source_written": written}
            if not self._ledger.opened(job.id, claim.unit_id, claim.token, facts):
                raise LeaseLostError(f"the settle unit of job {job.id} was taken over")
        quarantine_ms = int((self._settings.lease_s + self._settings.quarantine_s) * 1000)
        suspects = self._ledger.suspects(job.id, claim.unit_id, claim.token, quarantine_ms)
        longest = max((s.quarantine_ms for s in suspects), default=0)
        if not lease.wait(longest / 1000, lambda: False):
            lease.assert_held()
            self._release(claim, remaining="", count_attempt=False)
            return
        try:
            changed = [
                s.unit_id
                for s in suspects
                if self._engine.digest_of(target.read_into, unpack_extents(s.extents)) != s.digest
            ]
        except DiskIOError as error:
            lease.assert_held()
            self._give_back(job, claim, [], Outcome(failures=[Failure(Side.TARGET, error, _whole(job))]))
            return
        lease.assert_held()
        if changed:
            log.warning("an old write came after a new one; copying again", job=job.id, units=changed)
            self._ledger.redo(job.id, claim.unit_id, claim.token, changed, self._settings.max_attempts)
            return
        failed = self._flush(job)
        lease.assert_held()
        if failed is not None:
            self._disks.close()
            self._give_back(job, claim, [], Outcome(failures=[failed]))
            return
        self._disks.close()  # who is told that the job has concluded may want the images, and QEMU's locks on them
        self._ledger.finish(job.id, claim.unit_id, claim.token)

    # -- repositories --------------------------------------------------------------------------------------

    def _back_up(self, job: JobRecord, claim: Claim, lease: Lease) -> None:
        """Store a unit's blocks in a pack of their own. Nothing is flushed: a pack is durable when it is there."""
        source, _ = self._disks.open(job)
        outcome, result = self._backups.copy(job, claim, source, lease)
        lease.assert_held()
        pass_point("before-finish")
        if outcome.remaining:
            self._give_back(job, claim, unpack_extents(claim.extents), outcome)
            return
        done = {"bytes_read": outcome.bytes_read, "bytes_sent": outcome.bytes_sent}
        self._finish(claim, result=result, **done)

    def _write_root(self, job: JobRecord, claim: Claim, lease: Lease) -> None:
        self._disks.close()  # opened anew, to see who writes the source now
        source, _ = self._disks.open(job)
        written = source.stamp() != job.source_stamp
        changes = written or (may_change(job, source) and not job.source_may_change)
        with opening(Side.TARGET):
            facts = self._backups.settle(job, self._ledger.results(job.id))
        if changes:
            facts |= {"source_may_change": True, "source_written": written}
        lease.assert_held()
        if not self._ledger.opened(job.id, claim.unit_id, claim.token, facts):
            raise LeaseLostError(f"the settle unit of job {job.id} was taken over")
        self._disks.close()
        self._finish(claim)

    def _publish(self, job: JobRecord, claim: Claim, lease: Lease) -> None:
        mark = self._ledger.points_mark()
        with opening(Side.TARGET):
            decision = self._backups.publish(job)
        points.published(self._ledger, job.spec.target, decision, mark)
        self._finish(claim)

    def _abandon(self, job: JobRecord, claim: Claim, lease: Lease) -> None:
        mark = self._ledger.points_mark()
        try:
            decision = self._backups.abandon(job)
            if decision.is_point and decision.job == job.id:  # published after all, by a mover that then died
                points.published(self._ledger, job.spec.target, decision, mark)
                self._ledger.opened(job.id, claim.unit_id, claim.token, {"published": True})
        except FlushpointError as error:
            log.warning("cannot abandon an epoch", job=job.id, epoch=job.epoch, error=str(error))
            self._release(claim, remaining="", count_attempt=True)
            return
        self._finish(claim)

    def _do_task(self, job: JobRecord, claim: Claim, lease: Lease) -> None:
        task, access = job.spec.task, self._disks.access
        assert task is not None
        try:
            if not isinstance(task, RepositoryTask):
                result = group_epochs.run(task, self._ledger, access, self._backups.is_over)
            elif task.kind is TaskKind.SCAN:
                result = points.scan(task, self._ledger, access, lease.assert_held)
            else:
                result = self._do_chore(task, job.id, lease)
        except chores.FoundDamageError as error:
            self._ledger.opened(job.id, claim.unit_id, claim.token, {"result": json.dumps(error.result)})
            raise OpenError(Side.SOURCE, error) from error
        except (LeaseLostError, LedgerUnavailableError):
            raise
        except FlushpointError as error:
            raise OpenError(Side.SOURCE, error) from error
        if not self._ledger.opened(job.id, claim.unit_id, claim.token, {"result": json.dumps(result)}):
            raise LeaseLostError(f"the task of job {job.id} was taken over")
        self._finish(claim)

    def _do_chore(self, task: RepositoryTask, job_id: str, lease: Lease) -> dict[str, Any]:
        access = self._disks.access
        try:
            result = chores.run(task, job_id, access, lease.assert_held, self._backups.goes_on)
        except FlushpointError:
            with contextlib.suppress(FlushpointError):  # the first error is to be told
                points.learn_of(task, self._ledger, access, None)
            raise
        points.learn_of(task, self._ledger, access, result)
        return result

    def _finish(self, claim: Claim, *, result: str = "", bytes_read: int = 0, bytes_sent: int = 0) -> None:
        finished = self._ledger.finish(
            claim.job_id, claim.unit_id, claim.token, bytes_read=bytes_read, bytes_sent=bytes_sent, result=result
        )
        if finished is Finished.STALE:
            raise LeaseLostError(f"unit {claim.unit_id} belongs to somebody else")

    # -- giving back ---------------------------------------------------------------------------------------

    def _give_back(
        self, job: JobRecord, claim: Claim, extents: list[Extent], outcome: Outcome, *, flush_failed: bool = False
    ) -> None:
        """Release what remains: unchanged for a pause or a slice, by the error policy for failures."""
        left = sum(e.length for e in outcome.remaining)
        done = sum(e.length for e in extents) - left
        broken = [f for f in outcome.failures if f.error.next is Next.RECONNECT and f.error.errno != errno.ENOSPC]
        retry = bool(broken) and len(broken) == len(outcome.failures) and not self._last_attempt(claim)
        if retry:
            self._disks.close()
        verdict = note(job, outcome.failures) if retry else judge(job, outcome.failures)
        self._release(
            claim,
            remaining=pack_extents(outcome.remaining) if claim.extents else "",
            done_bytes=done,
            bytes_read=outcome.bytes_read,
            bytes_sent=outcome.bytes_sent,
            count_attempt=bool(outcome.failures) and verdict.action is Action.IGNORE,
            flush_failed=flush_failed,
            verdict=verdict,
        )

    def _give_up(self, claim: Claim, failed: OpenError) -> None:
        """A disk could not be opened: nothing of the unit is done. A server may come back while a job runs; what is
        damaged stays so."""
        job = self._ledger.job(claim.job_id).job  # the plan unit may have opened both before
        error = failed.error
        first_open = claim.kind is UnitKind.TASK or (claim.kind is UnitKind.PLAN and job.disk_size == 0)
        if first_open or not isinstance(error, UnavailableError | DiskIOError | ImageInUseError):
            self._release(claim, remaining=claim.extents, count_attempt=False, verdict=judge_refusal(error))
            return
        if not isinstance(error, DiskIOError):
            error = DiskIOError(error.message, next_=Next.RECONNECT, remedy=error.remedy)
        failures = [Failure(failed.side, error, _whole(job))]
        is_final = error.code == DamagedError.code or self._last_attempt(claim)
        verdict = judge(job, failures) if is_final else note(job, failures)
        count = verdict.action is Action.IGNORE
        self._release(claim, remaining=claim.extents, count_attempt=count, verdict=verdict)

    def _last_attempt(self, claim: Claim) -> bool:
        return claim.failures + 1 >= self._settings.max_attempts

    def _release(
        self,
        claim: Claim,
        *,
        remaining: str,
        count_attempt: bool,
        flush_failed: bool = False,
        done_bytes: int = 0,
        bytes_read: int = 0,
        bytes_sent: int = 0,
        verdict: Verdict | None = None,
    ) -> None:
        verdict = verdict or Verdict()
        delay_s = min(DELAY_MAX_S, self._settings.retry_delay_s * 2**claim.failures) if count_attempt else 0.0
        held = self._ledger.release(
            claim.job_id,
            claim.unit_id,
            claim.token,
            remaining=remaining,
            done_bytes=done_bytes,
            bytes_read=bytes_read,
            bytes_sent=bytes_sent,
            count_attempt=count_attempt,
            flush_failed=flush_failed,
            delay_ms=int(delay_s * 1000),
            max_attempts=self._settings.max_attempts,
            events=verdict.events,
            changes=verdict.changes or None,
        )
        if not held:
            log.warning("the unit belongs to somebody else", job=claim.job_id, unit=claim.unit_id)


def _whole(job: JobRecord) -> Extent:
    return Extent(0, job.disk_size, Status.DATA)
