"""The plan unit: open source and target, check them against each other, split the pass into units."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from coordinator.ledger.contract import Finished, Ledger
from coordinator.model.errors import NotFoundError, RefusedError, Side, UnavailableError
from coordinator.model.extent import Extent, merge_adjacent
from coordinator.model.job import JobRecord, Sync
from coordinator.model.repository_uri import is_repository
from coordinator.model.units import Claim, PlannedUnit, UnitKind, plan_units
from coordinator.model.uri import parse
from workers.mover.backup import Backups
from workers.mover.disks import Disks, OpenError, opening
from workers.mover.lease import Lease, LeaseLostError
from workers.mover.pace import Step
from workers.sources.contract import Source
from workers.sources.identity import Identity, name_in_fleet
from workers.sources.repository import RepositorySource
from workers.targets import Target, existing_target

UNITS_A_BATCH = 16
"""Units added in one step: bounds the size of a script's arguments, lets movers start early."""
MAX_PIECE_BYTES = 2 * 1024**3
"""Most to ask extents of at once: one question to an NBD server."""


class _HaltedError(Exception):
    """The lease halted while a disk was asked for its extents."""


@dataclass(frozen=True, slots=True)
class Planner:
    ledger: Ledger
    disks: Disks
    backups: Backups

    def run(self, job: JobRecord, claim: Claim, lease: Lease) -> bool:
        """Plan from the job's cursor on; False if the lease halted before the end. OpenError names the side."""
        try:
            planned = self._run(job, claim, lease)
        except _HaltedError:
            planned = False
        if not planned:
            lease.assert_held()
        return planned

    def _run(self, job: JobRecord, claim: Claim, lease: Lease) -> bool:
        if job.pass_number == 1 and job.disk_size == 0:
            job = self._open_first(job, claim, lease)
        source, _ = self.disks.open(job)
        fresh = job.plan_cursor == 0
        # Within a pass the fact only grows: what was copied while somebody wrote stays so when he stops.
        changes = may_change(job, source) or (job.source_may_change and not fresh)
        facts: dict[str, object] = {"max_writers": self.disks.max_movers, "source_may_change": changes}
        if fresh:
            facts["source_stamp"] = source.stamp()
        self._record(claim, facts)
        with opening(Side.SOURCE):
            planned = self._add_units(job, claim, lease, source)
        if planned and self.ledger.finish(job.id, claim.unit_id, claim.token) is Finished.STALE:
            raise LeaseLostError(f"the plan of job {job.id} was taken over")
        return planned

    def _add_units(self, job: JobRecord, claim: Claim, lease: Lease, source: Source) -> bool:
        comparing = job.pass_kind == "compare"
        kind = UnitKind.COMPARE if comparing else UnitKind.COPY
        cursor = job.plan_cursor
        extents = _watched(source, cursor, source.size, lease)
        if job.target_zeroed and not comparing:
            extents = (e for e in extents if not e.reads_as_zeroes)
        units = plan_units(extents, source.size)
        halted = False
        while not halted:
            batch: list[PlannedUnit] = []
            try:
                for unit in itertools.islice(units, UNITS_A_BATCH):
                    batch.append(unit)
            except _HaltedError:  # what was found before it is whole units, and is not asked for again
                halted = True
            if not batch:
                break
            end = batch[-1].end
            if not self.ledger.add_units(job.id, claim.unit_id, claim.token, kind, cursor, end, batch):
                raise LeaseLostError(f"the plan of job {job.id} was taken over")
            cursor = end
        return not halted

    def _open_first(self, job: JobRecord, claim: Claim, lease: Lease) -> JobRecord:
        """Check everything before anything is touched; then make the target ready, and record what was found."""
        self.disks.close()  # an image of the last job must not stay locked while this one's servers are waited for
        with opening(Side.SOURCE):
            source = self.disks.open_source(job)
        if isinstance(source, RepositorySource):
            job = job.model_copy(update={"source_point": source.point})
        if is_repository(job.spec.target):
            return self._open_epoch(job, claim, source)
        try:
            with opening(Side.TARGET):
                self._check_target(job, claim, source)
                target = self._open_target(job, source.size)
        except BaseException:
            source.close()
            raise
        self.disks.keep(job, source, target)
        with opening(Side.TARGET):
            self._reserve(job, claim, target.identity())
            # Asked of the target rather than concluded from having made it: somebody else may have made it first.
            zeroed = all(extent.reads_as_zeroes for extent in _watched(target, 0, source.size, lease))
        facts: dict[str, object] = {
            "disk_size": source.size,
            "block_size": max(source.block_size, target.block_size),
            "target_zeroed": zeroed,
            "source_point": job.source_point,
        }
        if job.spec.sync is Sync.INCREMENTAL and zeroed:  # made just now, perhaps by an attempt that died
            facts["compare_reason"] = "the target holds no older copy"
        elif job.spec.sync is Sync.INCREMENTAL:
            facts |= self._try_bitmap(job, source.size, job.spec.bitmap or "", "no bitmap was named")
        self._record(claim, facts)
        return job.model_copy(update=facts)

    def _open_epoch(self, job: JobRecord, claim: Claim, source: Source) -> JobRecord:
        """The same for a target that is a repository: nothing is touched but the hold of an epoch."""
        try:
            with opening(Side.TARGET):
                facts, bitmap = self.backups.open_first(job, claim, source)
        except BaseException:
            source.close()
            raise
        self.disks.keep(job, source, self.disks.open_target(job, source.size, create=True))
        facts |= {"disk_size": source.size, "block_size": source.block_size, "source_point": job.source_point}
        if job.spec.sync is Sync.INCREMENTAL and facts["on_parent"]:
            facts |= self._try_bitmap(job, source.size, bitmap, str(facts["compare_reason"]))
        self._record(claim, facts)
        return job.model_copy(update=facts)

    def _try_bitmap(self, job: JobRecord, size: int, bitmap: str, without: str) -> dict[str, object]:
        """Open an incremental job's source by its bitmap, if that can be trusted; else it is compared, and why."""
        if not bitmap:
            return {"compare_reason": without}
        try:
            self.disks.open_source_anew(job.model_copy(update={"bitmap": bitmap, "disk_size": size}))
        except OpenError as failed:
            if not isinstance(failed.error, RefusedError):
                raise
            self.disks.open_source_anew(job.model_copy(update={"disk_size": size}))
            return {"compare_reason": failed.error.message}
        return {"bitmap": bitmap}

    def _open_target(self, job: JobRecord, size: int) -> Target:
        """A target that `_check_target` has looked at, if it was there."""
        try:
            return self.disks.open_target(job, size, create=True)
        except (UnavailableError, NotFoundError) as error:
            if parse(job.spec.target).kind != "nbd":
                raise
            # Movers come and go: a server that ends with its first client is of no use, and ends with our look at it.
            raise UnavailableError(
                f"the target {job.spec.target} was there when it was looked at, and is gone: {error.message}",
                "start its server so that it outlives its first client (qemu-nbd: --persistent)",
            ) from error

    def _check_target(self, job: JobRecord, claim: Claim, source: Source) -> None:
        spec = job.spec
        uri = parse(spec.target)
        if uri.kind == "nothing":  # any number of jobs may write there
            return
        there = existing_target(uri, self.disks.access, self.disks.limits)
        if there is not None and there.is_read_by(source):
            raise RefusedError(
                f"the target {spec.target} is the source {spec.source}, or a file it is read from",
                "name another target",
            )
        if there is not None and (user := there.user_beside(source)) is not None:
            raise RefusedError(
                f"the target {spec.target} is open in process {user}, which may be what serves the source {spec.source}"
                " on this host",
                "stop that process, or name another target",
            )
        if there is None and spec.sync is Sync.DIRTY:
            raise NotFoundError(
                f"the target {spec.target} does not exist, so there is no older copy to bring up to date",
                "make a full copy first",
            )
        # By what it is, or by the name that it will be made under: two jobs must not make one file either.
        self._reserve(job, claim, there.identity if there else ("path", os.path.realpath(uri.path)))

    def _reserve(self, job: JobRecord, claim: Claim, target: Identity) -> None:
        """No two active jobs write one target."""
        name = name_in_fleet(target, socket.gethostname())
        owner = self.ledger.reserve(job.id, claim.unit_id, claim.token, name)
        if owner is None:
            raise LeaseLostError(f"the plan of job {job.id} was taken over")
        if owner != job.id:
            raise RefusedError(
                f"job {owner} is writing the target {job.spec.target}", "wait until it has concluded, or cancel it"
            )

    def _record(self, claim: Claim, facts: Mapping[str, object]) -> None:
        if not self.ledger.opened(claim.job_id, claim.unit_id, claim.token, facts):
            raise LeaseLostError(f"the plan of job {claim.job_id} was taken over")


def may_change(job: JobRecord, source: Source) -> bool:
    """Whether one pass over the source need not be a point in time, by what is seen of it and what was promised."""
    return source.may_change and not job.spec.source_frozen


def _watched(disk: Source | Target, offset: int, end: int, lease: Lease) -> Iterator[Extent]:
    """The extents of [offset, end), or _HaltedError within a moment of the lease's halt.

    Asked for piece by piece: a server that knows little at a time may be asked a million times before an extent ends.
    """
    return merge_adjacent(_pieces(disk, offset, end, lease))


def _pieces(disk: Source | Target, offset: int, end: int, lease: Lease) -> Iterator[Extent]:
    step = Step(MAX_PIECE_BYTES)
    while offset < end:
        length = min(step.bytes, end - offset)
        begun = time.monotonic()
        for extent in disk.extents(offset, length):
            if lease.halt is not None:
                raise _HaltedError
            yield extent
        step.took(length, time.monotonic() - begun)
        if lease.halt is not None:
            raise _HaltedError
        offset += length
