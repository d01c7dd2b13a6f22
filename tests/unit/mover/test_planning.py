"""Planning stops within a moment when it is told to, keeps what it has found, and goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from coordinator.ledger import MemoryLedger, NewUnit
from coordinator.model.extent import SEGMENT_BYTES, Extent, Status, unpack_extents
from coordinator.model.job import JobRecord, JobSpec, State
from coordinator.model.units import UNIT_BYTES, Claim, UnitKind
from coordinator.settings import Settings
from workers.access import Access
from workers.mover.backup import Backups
from workers.mover.lease import AbortedError, Halt
from workers.mover.planning import Planner
from workers.nbd.session import DEFAULT_LIMITS

SIZE = 16 * UNIT_BYTES
BLOCK = 64 * 1024


class Disk:
    """Tells its extents 64 KiB at a time, as a server may; `told` counts them."""

    max_writers = max_readers = 0
    block_size = 1
    may_change = False

    def __init__(self, *statuses: Status) -> None:
        self.size = SIZE
        self.told = 0
        self._statuses = statuses

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        for at in range(offset, offset + length, BLOCK):
            self.told += 1
            yield Extent(at, BLOCK, self._statuses[at // BLOCK % len(self._statuses)])

    def stamp(self) -> str:
        return ""

    def identity(self) -> tuple[str, str]:
        return ("path", "/t")

    def close(self) -> None:
        pass


class MergingDisk(Disk):
    """As a source is: what is alike is one extent, however often the server had to be asked for it."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        extents = list(super().extents(offset, length))
        yield Extent(offset, length, extents[0].status)


class CleanDisk(Disk):
    """Nothing of it is to be copied."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self.told += length // BLOCK
        return iter(())


class Disks:
    """Stands in for workers.mover.disks.Disks."""

    max_movers = 0

    def __init__(self, source: Disk, target: Disk, root: Path) -> None:
        self.source, self.target = source, target
        self.access = Access([str(root)], [])
        self.limits = DEFAULT_LIMITS

    def open(self, job: JobRecord) -> tuple[Disk, Disk]:
        return self.source, self.target

    def open_source(self, job: JobRecord) -> Disk:
        return self.source

    def open_target(self, job: JobRecord, size: int, *, create: bool) -> Disk:
        return self.target

    def keep(self, job: JobRecord, source: Disk, target: Disk) -> None:
        pass

    def close(self) -> None:
        pass


class CountingLease:
    """Halts once a disk has told more than so much."""

    def __init__(self, disk: Disk, after: int, halt: Halt = Halt.YIELD) -> None:
        self._disk, self._after, self._halt = disk, after, halt

    @property
    def halt(self) -> Halt | None:
        return self._halt if self._disk.told > self._after else None

    def assert_held(self) -> None:
        if self.halt is Halt.ABORT:
            raise AbortedError("cancelled by force")


class Bench:
    def __init__(self, root: Path, source: Disk, target: Disk, **facts: object) -> None:
        self.source, self.target = source, target
        self.ledger = MemoryLedger()
        term = self.ledger.lead("me", 10**9)
        assert term is not None
        self.ledger.adopt_run(term, 0)
        self.ledger.submit("j", JobSpec(source="/s", target=str(root / "t")))
        changes = {"state": State.RUNNING, "pass_number": 1, **facts}
        self.ledger.update("j", self.ledger.job("j").version, changes, new_unit=NewUnit(UnitKind.PLAN, 1))
        disks = Disks(source, target, root)
        backups = Backups(self.ledger, Settings(), disks.access)
        self.planner = Planner(self.ledger, disks, backups)  # type: ignore[arg-type]
        self.plan = self._claim()

    def run(self, lease: CountingLease) -> bool:
        return self.planner.run(self.job, self.plan, lease)  # type: ignore[arg-type]

    @property
    def job(self) -> JobRecord:
        return self.ledger.job("j").job

    def planned(self) -> list[Extent]:
        extents = []
        while claim := self.ledger.claim("m", "t", 10**6):
            extents += unpack_extents(claim.extents)
            self.ledger.finish("j", claim.unit_id, "t")
        return sorted(extents, key=lambda e: e.offset)

    def _claim(self) -> Claim:
        claim = self.ledger.claim("planner", "p", 10**6)
        assert claim is not None
        return claim


@pytest.fixture
def alternating(tmp_path: Path) -> Bench:
    source = Disk(Status.DATA, Status.DIRTY)
    return Bench(tmp_path, source, Disk(Status.DATA), disk_size=SIZE)


def test_a_halt_is_seen_between_two_extents(alternating: Bench) -> None:
    assert not alternating.run(CountingLease(alternating.source, 3))
    assert alternating.source.told == 4


def test_a_halted_plan_keeps_its_whole_units_and_is_continued_behind_them(alternating: Bench) -> None:
    a_unit = UNIT_BYTES // BLOCK
    assert not alternating.run(CountingLease(alternating.source, 2 * a_unit + a_unit // 2))
    assert alternating.job.plan_cursor == 2 * UNIT_BYTES
    assert alternating.job.units_ready == 2
    alternating.source.told = 0
    assert alternating.run(CountingLease(alternating.source, SIZE))
    assert alternating.source.told == (SIZE - 2 * UNIT_BYTES) // BLOCK
    planned = alternating.planned()
    assert sum(e.length for e in planned) == SIZE
    assert all(left.end == right.offset for left, right in pairwise(planned))


@pytest.mark.parametrize("kind", [MergingDisk, CleanDisk])
def test_a_halt_is_seen_though_no_extent_ends_for_long(tmp_path: Path, kind: type[Disk]) -> None:
    bench = Bench(tmp_path, kind(Status.DATA), Disk(Status.DATA), disk_size=SIZE)
    assert not bench.run(CountingLease(bench.source, 0))
    assert bench.source.told <= SEGMENT_BYTES // BLOCK


def test_a_halt_is_seen_while_the_target_is_asked_for_its_zeroes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Disk(Status.DATA), Disk(Status.ZERO))
    assert not bench.run(CountingLease(bench.target, 3))
    assert bench.target.told == 4
    assert bench.source.told == 0
    assert bench.job.disk_size == 0  # looked at again when the job goes on
    assert bench.run(CountingLease(bench.target, SIZE))
    assert bench.job.target_zeroed


def test_a_plan_cancelled_by_force_says_so(alternating: Bench) -> None:
    with pytest.raises(AbortedError):
        alternating.run(CountingLease(alternating.source, 3, Halt.ABORT))
