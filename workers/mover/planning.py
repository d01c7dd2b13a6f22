"""The plan unit: open source and target, check them against each other, split the pass into units."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from coordinator.ledger.contract import Finished, Ledger
from coordinator.model.errors import NotFoundError, RefusedError, Side
from coordinator.model.extent import Extent
from coordinator.model.job import JobRecord, Sync
from coordinator.model.units import Claim, PlannedUnit, UnitKind, plan_units
from coordinator.model.uri import parse
from workers.mover.disks import Disks, opening
from workers.mover.lease import Lease, LeaseLostError
from workers.sources.contract import Source
from workers.sources.identity import Identity, name_in_fleet
from workers.targets import existing_target

UNITS_A_BATCH = 16
"""Units added in one step: bounds the size of a script's arguments, lets movers start early."""


@dataclass(frozen=True, slots=True)
class Planner:
    ledger: Ledger
    disks: Disks

    def run(self, job: JobRecord, claim: Claim, lease: Lease) -> bool:
        """Plan from the job's cursor on; False if the lease halted before the end. OpenError names the side."""
        if job.pass_number == 1 and job.disk_size == 0:
            job = self._open_first(job, claim)
        source, target = self.disks.open(job)
        fresh = job.plan_cursor == 0
        # Within a pass the fact only grows: what was copied while somebody wrote stays so when he stops.
        may_change = source.may_change or (job.source_may_change and not fresh)
        facts: dict[str, object] = {"max_writers": target.max_writers, "source_may_change": may_change}
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
        extents: Iterator[Extent] = iter(source.extents(cursor, source.size - cursor))
        if job.target_zeroed and not comparing:
            extents = (e for e in extents if not e.reads_as_zeroes)
        for batch in _batches(plan_units(extents, source.size)):
            if lease.halt is not None:
                return False
            end = batch[-1].end
            if not self.ledger.add_units(job.id, claim.unit_id, claim.token, kind, cursor, end, batch):
                raise LeaseLostError(f"the plan of job {job.id} was taken over")
            cursor = end
        return True

    def _open_first(self, job: JobRecord, claim: Claim) -> JobRecord:
        """Check everything before anything is touched; then make the target ready, and record what was found."""
        self.disks.close()  # an image of the last job must not stay locked while this one's servers are waited for
        with opening(Side.SOURCE):
            source = self.disks.open_source(job)
        try:
            with opening(Side.TARGET):
                self._check_target(job, claim, source)
                target = self.disks.open_target(job, source.size, create=True)
        except BaseException:
            source.close()
            raise
        self.disks.keep(job, source, target)
        with opening(Side.TARGET):
            self._reserve(job, claim, target.identity())
            # Asked of the target rather than concluded from having made it: somebody else may have made it first.
            zeroed = all(extent.reads_as_zeroes for extent in target.extents(0, source.size))
        facts = {
            "disk_size": source.size,
            "block_size": max(source.block_size, target.block_size),
            "target_zeroed": zeroed,
            "compare_reason": "asked for" if job.spec.sync is Sync.INCREMENTAL else "",
        }
        self._record(claim, facts)
        return job.model_copy(update=facts)

    def _check_target(self, job: JobRecord, claim: Claim, source: Source) -> None:
        spec = job.spec
        uri = parse(spec.target)
        there = existing_target(uri, self.disks.access)
        if there is not None and there.is_read_by(source):
            raise RefusedError(
                f"the target {spec.target} is the source {spec.source}, or a file it is read from",
                "name another target",
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


def _batches(units: Iterator[PlannedUnit]) -> Iterator[list[PlannedUnit]]:
    while batch := list(itertools.islice(units, UNITS_A_BATCH)):
        yield batch
