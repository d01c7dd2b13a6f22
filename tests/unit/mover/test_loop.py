"""What a mover does with its unit when things go wrong, over the in-memory ledger and disks in memory."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from coordinator.ledger import MemoryLedger, NewUnit
from coordinator.model.errors import DiskIOError, Next, NotFoundError, Side, UnavailableError
from coordinator.model.extent import Extent, Status
from coordinator.model.job import JobRecord, JobSpec, State
from coordinator.model.messages import Doorbell
from coordinator.model.units import UnitKind, plan_units
from coordinator.settings import Settings
from tests.unit.mover.test_engine import MemoryDisk
from workers.mover.disks import OpenError
from workers.mover.loop import Mover
from workers.sources.repository import DamagedDiskError

SIZE = 1024 * 1024
BELL = Doorbell(role="mover", bell="b")


class PageCache(MemoryDisk):
    """Reads show every write; only a flush that works makes them durable. A failed flush forgets which were dirty."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.durable = bytearray(content)
        self.fail_flushes = 0
        self.flush_errno = errno.EIO
        self._dirty: list[tuple[int, int]] = []

    def write(self, offset: int, data: memoryview) -> None:
        super().write(offset, data)
        self._dirty.append((offset, len(data)))

    def flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        if self.fail_flushes:
            self.fail_flushes -= 1
            raise DiskIOError("flush failed", errno_=self.flush_errno, next_=Next.RECONNECT)
        for offset, length in dirty:
            self.durable[offset : offset + length] = self.content[offset : offset + length]


class FakeDisks:
    """Stands in for workers.mover.disks.Disks with two disks in memory."""

    def __init__(self, source: MemoryDisk, target: PageCache) -> None:
        self.source, self.target = source, target
        self.errors: list[Exception] = []

    def open(self, job: JobRecord) -> tuple[MemoryDisk, PageCache]:
        if self.errors:
            raise self.errors.pop(0)
        return self.source, self.target

    def fast_path(self) -> None:
        return None

    def flush_target(self) -> None:
        self.target.flush()

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class Bench:
    def __init__(self, kind: UnitKind, **spec: str) -> None:
        self.clock = 1000.0
        self.ledger = MemoryLedger(lambda: self.clock)
        term = self.ledger.lead("me", 10**9)
        assert term is not None
        self.term = term
        self.ledger.adopt_run(term, 0)
        self.ledger.submit("j", JobSpec.model_validate({"source": "/s", "target": "/t", **spec}))
        self.ledger.update(
            "j",
            self.ledger.job("j").version,
            {"state": State.RUNNING, "disk_size": SIZE, "pass_number": 2},
            new_unit=NewUnit(UnitKind.PLAN, 2),
        )
        plan = self.ledger.claim("planner", "p", 60_000)
        assert plan is not None
        units = list(plan_units([Extent(0, SIZE, Status.DATA)], SIZE))
        assert self.ledger.add_units("j", plan.unit_id, "p", kind, 0, SIZE, units)
        self.ledger.finish("j", plan.unit_id, "p")
        self.disks = FakeDisks(MemoryDisk(b"n" * SIZE), PageCache(b"o" * SIZE))
        self.mover = Mover(self.ledger, Settings(retry_delay_s=1, renew_s=0.05), "m", lambda: False)
        self.mover._disks = self.disks  # type: ignore[assignment]

    def work(self) -> JobRecord:
        """One doorbell, after whatever delay a unit was given."""
        self.clock += 60
        self.ledger.reap(self.term, 5)
        self.mover.work(BELL)
        return self.job

    @property
    def job(self) -> JobRecord:
        return self.ledger.job("j").job

    def events(self) -> list[object]:
        return [e["data"]["action"] for e in self.ledger.events() if e["event"] == "BLOCK_JOB_ERROR"]


@pytest.fixture
def comparing() -> Iterator[Bench]:
    bench = Bench(UnitKind.COMPARE)
    yield bench
    bench.mover._engine.close()


def test_a_compare_whose_flush_failed_is_written_anew(comparing: Bench) -> None:
    """The page cache would show it as equal, though it is not durable."""
    comparing.disks.target.fail_flushes = 1
    assert comparing.work().units_done == 1  # the plan
    job = comparing.work()
    assert job.units_done == 2
    assert comparing.disks.target.durable == comparing.disks.source.content
    assert job.pass_sent == SIZE


def given_back(bench: Bench) -> None:
    """Claimed, and released for a pause or a slice: never tried in vain."""
    claim = bench.ledger.claim("m", "t", 10_000)
    assert claim is not None
    assert claim.failures == 0
    bench.ledger.release(
        "j",
        claim.unit_id,
        "t",
        remaining=claim.extents,
        done_bytes=0,
        bytes_read=0,
        bytes_sent=0,
        count_attempt=False,
    )


def test_a_compare_whose_flush_stopped_the_job_is_no_attempt_and_is_written_anew() -> None:
    bench = Bench(UnitKind.COMPARE, on_target_error="stop")
    bench.disks.target.fail_flushes, bench.disks.target.flush_errno = 1, errno.ENOSPC
    bench.work()
    assert bench.work().pause_requested
    bench.ledger.update("j", bench.ledger.job("j").version, {"pause_requested": False})
    given_back(bench)
    assert bench.work().units_done == 2
    assert bench.disks.target.durable == bench.disks.source.content
    bench.mover._engine.close()


def test_a_compare_whose_holder_died_is_written_anew_and_counts_as_different(comparing: Bench) -> None:
    lost = comparing.ledger.claim("dead", "t", 10)
    assert lost is not None
    comparing.disks.target.content[:] = comparing.disks.source.content  # what the dead one wrote and never flushed
    assert comparing.work().pass_sent == SIZE
    assert comparing.disks.target.durable == comparing.disks.source.content


def test_a_server_that_is_away_is_tried_again_and_then_left_to_the_policy() -> None:
    bench = Bench(UnitKind.COPY, on_target_error="stop")
    away = OpenError(Side.TARGET, UnavailableError("nothing listens", "start it"))
    bench.disks.errors = [away] * 5
    for _ in range(4):
        assert bench.work().state is State.RUNNING
        assert not bench.job.pause_requested
    job = bench.work()
    assert job.pause_requested
    assert not job.fatal
    assert job.target_io_status == "failed"
    assert bench.events() == ["ignore"] * 4 + ["stop"]
    bench.mover._engine.close()


def test_what_is_damaged_is_not_tried_again(comparing: Bench) -> None:
    """Not even while its extents are read, as a point's are by the plan."""
    damaged = DamagedDiskError("a map in packs/1 is damaged", next_=Next.GIVE_UP)
    comparing.disks.errors = [OpenError(Side.SOURCE, damaged)]
    job = comparing.work()
    assert job.fatal
    assert job.error_code == "damaged"
    assert comparing.events() == ["report"]


def test_slices_and_pauses_are_no_failed_attempts(comparing: Bench) -> None:
    for _ in range(20):
        given_back(comparing)
    comparing.disks.errors = [OpenError(Side.SOURCE, UnavailableError("away"))]
    job = comparing.work()
    assert not job.fatal
    assert job.units_ready == 1


def test_a_mistake_of_ours_ends_in_quarantine_and_not_in_silence(comparing: Bench) -> None:
    comparing.disks.errors = [ZeroDivisionError("a bug")] * 9
    for _ in range(5):
        job = comparing.work()
    assert job.units_quarantined == 1


def test_what_was_written_before_a_mistake_of_ours_is_to_be_rewritten(comparing: Bench) -> None:
    def mistake() -> None:
        raise ZeroDivisionError("a bug")

    comparing.disks.flush_target = mistake  # type: ignore[method-assign]
    comparing.work()
    comparing.clock += 60
    comparing.ledger.reap(comparing.term, 5)
    claim = comparing.ledger.claim("m", "t", 10_000)
    assert claim is not None
    assert claim.rewrite


def test_a_missing_disk_is_refused_at_once(comparing: Bench) -> None:
    comparing.disks.errors = [OpenError(Side.SOURCE, NotFoundError("/s does not exist", "check it"))]
    job = comparing.work()
    assert job.fatal
    assert job.error_code == "not-found"


def test_enospc_at_a_flush_is_not_waited_for() -> None:
    bench = Bench(UnitKind.COPY, on_target_error="enospc")

    def full() -> None:
        raise DiskIOError("full", errno_=errno.ENOSPC, next_=Next.RECONNECT)

    bench.disks.flush_target = full  # type: ignore[method-assign]
    job = bench.work()
    assert job.pause_requested
    assert job.target_io_status == "nospace"
    bench.mover._engine.close()


# -- cancel --force -----------------------------------------------------------------------------------------------


class Hanging(PageCache):
    """A server that answers no write, or no flush, until the connection is broken off."""

    def __init__(self, content: bytes, hangs_at: str) -> None:
        super().__init__(content)
        self.hangs_at = hangs_at
        self.reached = threading.Event()
        self.broken_off = threading.Event()
        self.flushes = 0

    def write(self, offset: int, data: memoryview) -> None:
        self._hang("write")
        super().write(offset, data)

    def flush(self) -> None:
        self.flushes += 1
        self._hang("flush")
        super().flush()

    def _hang(self, where: str) -> None:
        if where == self.hangs_at:
            self.reached.set()
            assert self.broken_off.wait(5)
            raise DiskIOError("the connection is broken", next_=Next.RECONNECT)


@pytest.mark.parametrize("hangs_at", ["write", "flush"])
def test_a_cancel_by_force_lets_the_unit_go_as_it_was_claimed(hangs_at: str) -> None:
    """On the last attempt, where any other lost connection would be left to the policy and fail the job."""
    bench = Bench(UnitKind.COPY)
    bench.mover._settings = bench.mover._settings.model_copy(update={"max_attempts": 1})
    target = Hanging(b"o" * SIZE, hangs_at)
    bench.disks.target = target
    bench.disks.abort = target.broken_off.set  # type: ignore[method-assign]

    def cancel() -> None:
        assert target.reached.wait(5)
        bench.ledger.update("j", bench.ledger.job("j").version, {"cancel_requested": "force"})

    with ThreadPoolExecutor(1) as user:
        cancelling = user.submit(cancel)
        job = bench.work()
        cancelling.result()
    assert job.units_leased == 0
    assert job.units_ready == 1
    assert (job.offset, job.bytes_sent, job.units_quarantined) == (0, 0, 0)
    assert not job.fatal
    assert bench.events() == []
    assert target.flushes == (1 if hangs_at == "flush" else 0)
    assert target.durable == b"o" * SIZE
    bench.mover._engine.close()


def test_a_disk_that_breaks_while_it_is_opened_under_force_is_no_error_of_the_job() -> None:
    bench = Bench(UnitKind.COPY)
    broken_off = threading.Event()

    def open_until_broken_off(job: JobRecord) -> tuple[MemoryDisk, PageCache]:
        bench.ledger.update("j", bench.ledger.job("j").version, {"cancel_requested": "force"})
        assert broken_off.wait(5)
        raise OpenError(Side.TARGET, NotFoundError("gone", "look for it"))

    bench.disks.open = open_until_broken_off  # type: ignore[method-assign]
    bench.disks.abort = broken_off.set  # type: ignore[method-assign]
    job = bench.work()
    assert job.units_ready == 1
    assert not job.fatal
    bench.mover._engine.close()
