"""What is measured, and how. Scenarios return plain data; every copy is verified outside its timing."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coordinator.model.job import JobSpec, Sync
from coordinator.model.view import JobView
from flushpoint.client import Client
from tests.demo.lab import GIB, MIB, Lab, LabError, run

BITMAP = "scattered"
BLOCK = 65536
JOB_TIMEOUT_S = 120.0
DELAY_MS = 5


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured; `--quick` takes less of everything."""

    rounds: int
    copy_bytes: int
    scattered_disk_bytes: int
    scattered_blocks: int
    scattered_rounds: int
    delayed_blocks: int
    delayed_serial_blocks: int
    fixed_jobs: int
    planned_extents: int
    many_points: int
    many_points_disks: int
    """Of each of the many points."""


FULL = Scale(5, 2 * GIB, 20 * GIB, 3277, 3, 8192, 512, 20, 1_000_000, 1000, 100)
QUICK = Scale(2, 256 * MIB, 4 * GIB, 655, 1, 1024, 128, 5, 50_000, 100, 20)


@dataclass(frozen=True, slots=True)
class Run:
    """One timed copy. CPU seconds are of all processes of the program (not of the NBD servers)."""

    seconds: float
    cpu_seconds: float
    mover_cpu_seconds: float | None = None


class Bench:
    def __init__(self, lab: Lab, client: Client, scale: Scale, say: Callable[[str], None]) -> None:
        self._lab = lab
        self._client = client
        self.scale = scale
        self._say = say

    # -- one copy --------------------------------------------------------------------------------------------

    def mirror(self, spec: JobSpec) -> tuple[JobView, Run]:
        """From before the submission until the answer that the job has concluded."""
        stack = self._lab.stack
        cpu, movers = stack.cpu_seconds(), stack.mover_cpu_seconds()
        begin = time.monotonic()
        job = self._client.submit(spec)
        job = self._client.wait(job.id, timeout_s=JOB_TIMEOUT_S)
        seconds = time.monotonic() - begin
        if job.failed:
            raise LabError(f"job {job.id} failed: {job.error}")
        return job, Run(seconds, stack.cpu_seconds() - cpu, stack.mover_cpu_seconds() - movers)

    def _ours(self, source: str, target: str) -> Run:
        # nbdcopy and qemu-img read a source once and trust that nobody writes it: so it is promised here as well.
        return self.mirror(JobSpec(source=source, target=target, overwrite=True, source_frozen=True))[1]

    @staticmethod
    def _nbdcopy(source: str, target: str) -> Run:
        done = run(["nbdcopy", "--flush", source, target])
        return Run(done.seconds, done.cpu_seconds)

    @staticmethod
    def _convert(source: str, target: str) -> Run:
        done = run(["qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", source, target])
        return Run(done.seconds, done.cpu_seconds)

    # -- bulk ------------------------------------------------------------------------------------------------

    def bulk(self) -> dict[str, Any]:
        """Random data from a read-only qemu-nbd to a writable one, and to an existing raw file."""
        size = self.scale.copy_bytes
        source, served, local = (self._lab.path / name for name in ("bulk.raw", "served.raw", "local.raw"))
        fill_random(source, size)
        for path in (served, local):
            fill_random(path, size)  # existing, as after an earlier copy: no program gains by a fresh file
        with (
            self._lab.serving("bulk", self._lab.qemu_nbd("bulk", source, "raw", "-r")) as uri,
            self._lab.serving("served", self._lab.qemu_nbd("served", served, "raw")) as served_uri,
        ):
            result = {
                "nbd_to_nbd": self._rounds("NBD to NBD", source, uri, served, served_uri),
                "nbd_to_file": self._rounds("NBD to file", source, uri, local, str(local)),
            }
        for path in (source, served, local):
            path.unlink()
        return result

    def _rounds(self, title: str, original: Path, source: str, copy: Path, target: str) -> dict[str, Any]:
        programs: dict[str, Callable[[str, str], Run]] = {
            "flushpoint": self._ours,
            "nbdcopy": self._nbdcopy,
            "qemu-img convert": self._convert,
        }
        names = list(programs)
        runs: dict[str, list[Run]] = {name: [] for name in names}
        for number in range(self.scale.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:  # nobody is always the first of a round
                spoil(copy)
                taken = programs[name](source, target)
                run(["cmp", original, copy])
                runs[name].append(taken)
                self._say(f"{title}, round {number + 1}: {name} {taken.seconds:.2f} s, {taken.cpu_seconds:.2f} s CPU")
        return summary(runs, original.stat().st_size)

    # -- scattered changes -----------------------------------------------------------------------------------

    def scattered(self) -> dict[str, Any]:
        """Dirty 64 KiB blocks all over a large qcow2 disk: served by qemu-nbd with its bitmap, and the image itself."""
        scale = self.scale
        disk = self._lab.path / "scattered.qcow2"
        self._make_scattered(disk, scale.scattered_disk_bytes, scale.scattered_blocks)
        dirty = scale.scattered_blocks * BLOCK
        with self._lab.serving("scattered", self._lab.qemu_nbd("scattered", disk, "qcow2", "-r", "-B", BITMAP)) as uri:
            served = self._dirty_rounds("scattered, served", disk, uri, dirty)
        image = self._dirty_rounds("scattered, image", disk, str(disk), dirty)
        disk.unlink()
        return {
            "disk_bytes": scale.scattered_disk_bytes,
            "dirty_bytes": dirty,
            "nbd_to_nbd": served,
            "qcow2_to_nbd": image,
        }

    def _dirty_rounds(self, title: str, disk: Path, source: str, dirty: int) -> dict[str, Any]:
        seconds, sent = [], []
        for _ in range(self.scale.scattered_rounds):
            target = self._lab.path / "target.raw"
            _make_hole(target, self.scale.scattered_disk_bytes)
            with self._lab.serving("target", self._lab.qemu_nbd("target", target, "raw")) as uri:
                job, taken = self.mirror(_dirty(source, uri))
            _compare(disk, target)
            seconds.append(taken.seconds)
            sent.append(job.bytes_sent)
            target.unlink()
            self._say(f"{title}: {taken.seconds:.2f} s, sent {job.bytes_sent / dirty:.3f} × the dirty bytes")
        return {
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "bytes_sent": max(sent),
            "sent_per_dirty": max(sent) / dirty,
        }

    def _make_scattered(self, disk: Path, size: int, blocks: int) -> None:
        run(["qemu-img", "create", "-q", "-f", "qcow2", disk, str(size)])
        run(["qemu-img", "bitmap", "--add", "-g", str(BLOCK), disk, BITMAP])
        dice = random.Random(blocks)
        commands = [f"write -q -P {dice.randrange(1, 256)} {at} {BLOCK}" for at in scatter(size, blocks)]
        run(["qemu-io", "-f", "qcow2", disk], stdin="\n".join([*commands, "quit", ""]))

    # -- latency ---------------------------------------------------------------------------------------------

    def latency(self) -> dict[str, Any]:
        """The same scattered blocks to a server that thinks 5 ms about every write.

        One request at a time is qemu-io's `write`, 64 KiB each, timed over a part of the same blocks to the same
        server and multiplied; it reads no source, which is in its favour.
        """
        scale = self.scale
        disk, target = self._lab.path / "delayed.qcow2", self._lab.path / "delayed.raw"
        self._make_scattered(disk, scale.scattered_disk_bytes, scale.delayed_blocks)
        seconds, serial = [], []
        for _ in range(scale.scattered_rounds):
            _make_hole(target, scale.scattered_disk_bytes)
            command: list[str | Path] = [
                "nbdkit",
                "--foreground",
                "--unix",
                self._lab.socket("delayed"),
                "--threads",
                "64",
            ]
            command += ["--filter=delay", "file", target, f"wdelay={DELAY_MS}ms"]
            with (
                self._lab.serving("blocks", self._lab.qemu_nbd("blocks", disk, "qcow2", "-r", "-B", BITMAP)) as source,
                self._lab.serving("delayed", command) as uri,
            ):
                part = [
                    f"write -q -P 1 {at} {BLOCK}" for at in scatter(scale.scattered_disk_bytes, scale.delayed_blocks)
                ]
                part = part[: scale.delayed_serial_blocks]
                one_by_one = run(["qemu-io", "-f", "raw", "-t", "writeback", uri], stdin="\n".join([*part, "quit", ""]))
                serial.append(one_by_one.seconds * scale.delayed_blocks / len(part))
                seconds.append(self.mirror(_dirty(source, uri))[1].seconds)
            _compare(disk, target)
            target.unlink()
            self._say(f"latency: {seconds[-1]:.2f} s, one at a time {serial[-1]:.2f} s")
        disk.unlink()
        return {
            "delay_ms": DELAY_MS,
            "blocks": scale.delayed_blocks,
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "serial_seconds": statistics.median(serial),
            "serial_is": f"qemu-io write of 64 KiB, {scale.delayed_serial_blocks} of the blocks, scaled to all",
            "speedup": statistics.median(serial) / statistics.median(seconds),
        }

    # -- fixed cost, planning --------------------------------------------------------------------------------

    def fixed_cost(self) -> dict[str, Any]:
        """Submit to concluded of a disk of 1 MiB that is one hole, to an existing file."""
        source, target = self._lab.path / "empty.raw", self._lab.path / "copy.raw"
        _make_hole(source, MIB)
        _make_hole(target, MIB)
        first = self._ours(str(source), str(target)).seconds  # a fresh stack may hold claims back for a while
        seconds = [self._ours(str(source), str(target)).seconds for _ in range(self.scale.fixed_jobs)]
        run(["cmp", source, target])
        self._say(f"fixed cost: {statistics.median(seconds) * 1000:.0f} ms")
        return {
            "first_seconds": first,
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "worst_seconds": max(seconds),
        }

    def planning(self) -> dict[str, Any]:
        """Splitting a 16 TiB disk with scattered dirty blocks into units, by the model alone and over real NBD."""
        found = {}
        for how in ("model", "nbd"):
            command = [sys.executable, "-m", "tests.bench.planning", how, str(self.scale.planned_extents)]
            found[how] = json.loads(run(command).stdout)
            self._say(f"planning, {how}: {found[how]['extents']:,} extents in {found[how]['seconds']:.2f} s")
        return found


def _dirty(source: str, target: str) -> JobSpec:
    return JobSpec(source=source, target=target, sync=Sync.DIRTY, bitmap=BITMAP, overwrite=True, source_frozen=True)


def start_up(lab: Lab, rounds: int) -> dict[str, Any]:
    """Whole commands, interpreter and all: the one that starts the embedded stack, and the next, which finds it."""
    first: list[float] = []
    second: list[float] = []
    for _ in range(rounds):
        for taken in (first, second):
            taken.append(run([sys.executable, "-m", "flushpoint", "jobs"]).seconds)
        lab.stack.stop()
    return {
        "first_seconds": first,
        "second_seconds": second,
        "first_median_seconds": statistics.median(first),
        "second_median_seconds": statistics.median(second),
    }


# -- data ------------------------------------------------------------------------------------------------------


def fill_random(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(size // (16 * MIB)):
            file.write(os.urandom(16 * MIB))


def spoil(path: Path) -> None:
    """Make the old copy differ from the disk in every MiB, so that a copy that does nothing is found out."""
    with path.open("r+b") as file:
        for offset in range(0, path.stat().st_size, MIB):
            file.seek(offset)
            file.write(b"an older copy of the disk")


def _make_hole(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def scatter(size: int, blocks: int, seed: int = 0) -> list[int]:
    """Offsets of blocks, shuffled, of which hardly two are neighbours."""
    return [n * BLOCK for n in random.Random(size + blocks + seed).sample(range(size // BLOCK), blocks)]


def _compare(disk: Path, copy: Path) -> None:
    run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", disk, copy])


def summary(runs: dict[str, Sequence[Run]] | dict[str, list[Run]], size: int) -> dict[str, Any]:
    medians: dict[str, dict[str, float]] = {}
    for name, taken in runs.items():
        medians[name] = {
            "seconds": statistics.median(r.seconds for r in taken),
            "cpu_seconds": statistics.median(r.cpu_seconds for r in taken),
        }
        medians[name]["mib_per_second"] = size / MIB / medians[name]["seconds"]
        movers = [r.mover_cpu_seconds for r in taken if r.mover_cpu_seconds is not None]
        if movers:
            medians[name]["mover_cpu_seconds"] = statistics.median(movers)
    ours = medians["flushpoint"]
    ratios = {
        name: {
            "speed": theirs["seconds"] / ours["seconds"],
            "cpu": ours["cpu_seconds"] / theirs["cpu_seconds"],
            "mover_cpu": ours["mover_cpu_seconds"] / theirs["cpu_seconds"],
        }
        for name, theirs in medians.items()
        if name != "flushpoint"
    }
    return {
        "bytes": size,
        "runs": {name: [asdict(r) for r in taken] for name, taken in runs.items()},
        "medians": medians,
        "ratios": ratios,
    }
