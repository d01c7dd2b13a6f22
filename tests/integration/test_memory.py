"""A mover's memory is bounded by its requests in flight, whatever the size of the disk and the number of extents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.stack import MIB, QemuNbd, Stack, make_disk, random_disk, running_stack, same_bytes

pytestmark = pytest.mark.needs("qemu-nbd")

PEAK_MIB = 150
TIB = 1024**4


@pytest.fixture
def stack(tmpfs_path: Path) -> Iterator[Stack]:
    with running_stack(tmpfs_path / "stack") as running:
        yield running


def peak_mib(process: psutil.Process) -> float:
    """The largest resident size that a process ever had, with the interpreter and all it shares with its parent."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def test_a_mover_stays_under_150_mib(stack: Stack, tmpfs_path: Path) -> None:
    """Every way of copying: 512 MiB through the engine's buffers, on both sides, and by splice; then 8 TiB with 20,000
    extents, planned and zeroed over old data."""
    source, target = random_disk(tmpfs_path / "source.img", 512 * MIB), make_disk(tmpfs_path / "t", 512 * MIB, {})
    jobs = []
    with QemuNbd(source, "--read-only") as origin, QemuNbd(target) as goal:
        jobs.append(stack.mirror(origin.uri, goal.uri, sync="incremental", source_frozen=True))
        assert same_bytes(source, target)
        jobs.append(stack.mirror(origin.uri, goal.uri, source_frozen=True))
        jobs.append(stack.mirror(source, goal.uri))
    scattered = {n * TIB // 2500: b"data" for n in range(20_000)}
    huge = make_disk(tmpfs_path / "huge.img", 8 * TIB, scattered)
    old = make_disk(tmpfs_path / "old.img", 8 * TIB, {1: b"old"})
    jobs.append(stack.mirror(huge, old, overwrite=True))
    assert [job.error for job in jobs] == [""] * 4, stack.logs()
    peaks = [peak_mib(mover) for mover in stack.movers()]
    assert len(peaks) == 2
    assert max(peaks) < PEAK_MIB, peaks
