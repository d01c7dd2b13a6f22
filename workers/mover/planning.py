"""The plan unit: open source and target, check them against each other, split the pass into units."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from coordinator.ledger.contract import Finished, Ledger
from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.extent import Extent
from coordinator.model.job import JobRecord, Sync
from coordinator.model.units import Claim, PlannedUnit, UnitKind, plan_units
from coordinator.model.uri import parse
from workers.mover.disks import Disks
from workers.mover.lease import Lease, LeaseLostError
from workers.sources.contract import Source
from workers.targets import existing_target_identity

UNITS_A_BATCH = 16
"""Units added in one step: bounds the size of a script's arguments, lets movers start early."""


@dataclass(frozen=True, slots=True)
class Planner:
    ledger: Ledger
    disks: Disks

    def run(self, job: JobRecord, claim: Claim, lease: Lease) -> bool:
        """Plan from the job's cursor on; False if the lease halted before the end.

        Raises the errors of opening: they end the job, for there is nothing to retry them for.
        """
        if job.pass_number == 1 and job.disk_size == 0:
            job = self._open_first(job, claim)
        source, target = self.disks.open(job)
        comparing = job.pass_kind == "compare"
        if target.max_writers != job.max_writers or source.may_change != job.source_may_change:
            self._record(claim, max_writers=target.max_writers, source_may_change=source.may_change)
        kind = UnitKind.COMPARE if comparing else UnitKind.COPY
        skip_zeroes = job.target_zeroed and not comparing
        cursor = job.plan_cursor
        units = plan_units(self._wanted(source, cursor, skip_zeroes), source.size)
        for batch in _batches(units):
            if lease.halt is not None:
                return False
            end = batch[-1].end
            if not self.ledger.add_units(job.id, claim.unit_id, claim.token, kind, cursor, end, batch):
                raise LeaseLostError(f"the plan of job {job.id} was taken over")
            cursor = end
        if self.ledger.finish(job.id, claim.unit_id, claim.token) is Finished.STALE:
            raise LeaseLostError(f"the plan of job {job.id} was taken over")
        return True

    def _wanted(self, source: Source, cursor: int, skip_zeroes: bool) -> Iterator[Extent]:
        extents = source.extents(cursor, source.size - cursor)
        if skip_zeroes:
            return (e for e in extents if not e.reads_as_zeroes)
        return iter(extents)

    def _open_first(self, job: JobRecord, claim: Claim) -> JobRecord:
        """Check before anything is touched; record the intent to create before creating."""
        spec = job.spec
        access = self.disks.access
        source = self.disks.open_source(job)
        try:
            target_uri = parse(spec.target)
            there = existing_target_identity(target_uri, access)
            if there is not None and there in source.reads_from():
                raise RefusedError(
                    f"the target {spec.target} is the source {spec.source}, or a file it is read from",
                    "name another target",
                )
            if there is None and spec.sync is Sync.DIRTY:
                raise NotFoundError(
                    f"the target {spec.target} does not exist, so there is no older copy to bring up to date",
                    "make a full copy first",
                )
            if there is None:
                self._record(claim, target_created=True)
                job = job.model_copy(update={"target_created": True})
            target = self.disks.open_target(job, source.size, create=True)
        except BaseException:
            source.close()
            raise
        facts = {
            "disk_size": source.size,
            "block_size": max(source.block_size, target.block_size),
            "max_writers": target.max_writers,
            "source_may_change": source.may_change,
            "target_zeroed": job.target_created and target_uri.kind == "file",
            "compare_reason": "asked for" if spec.sync is Sync.INCREMENTAL else "",
        }
        job = job.model_copy(update=facts)
        self.disks.keep(job, source, target)
        self._record_facts(claim, facts)
        return job

    def _record(
        self,
        claim: Claim,
        *,
        target_created: bool | None = None,
        max_writers: int | None = None,
        source_may_change: bool | None = None,
    ) -> None:
        known = {
            "target_created": target_created,
            "max_writers": max_writers,
            "source_may_change": source_may_change,
        }
        self._record_facts(claim, {name: value for name, value in known.items() if value is not None})

    def _record_facts(self, claim: Claim, facts: Mapping[str, object]) -> None:
        if not self.ledger.opened(claim.job_id, claim.unit_id, claim.token, facts):
            raise LeaseLostError(f"the plan of job {claim.job_id} was taken over")


def _batches(units: Iterator[PlannedUnit]) -> Iterator[list[PlannedUnit]]:
    while batch := list(itertools.islice(units, UNITS_A_BATCH)):
        yield batch
