"""Recovery points on an S3 server and in a directory, beside the copies that others make of the same bytes.

Every backup goes to a SeaweedFS of its own in memory, started before it and killed after it, so that nobody meets what
the one before left behind. s5cmd and rclone copy a file as one object: they neither compress nor take digests.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from coordinator.model.extent import SEGMENT_BYTES, Extent, Status
from coordinator.model.job import JobSpec, Sync
from coordinator.model.repository_uri import RepositoryUri, parse_repository
from coordinator.model.task import RepositoryTask, TaskKind
from coordinator.model.units import plan_units
from tests.bench.scenarios import BITMAP, BLOCK, Bench, Run, fill_random, scatter, summary
from tests.demo.lab import MIB, Lab, processes, run
from tests.object_servers import ObjectServer, client_of, make_bucket, running_seaweedfs
from workers.nbd.endpoint import Endpoint
from workers.nbd.session import Session

BUCKET = "bench"
_PIECE = 16 * MIB
Program = Callable[[ObjectServer, RepositoryUri, Path], Run]
"""Takes the server, our repository on it, and the file to copy to or from it."""


class _Table:
    """Runs of programs, without the round that warms up, and what they cost the server."""

    def __init__(self) -> None:
        self._runs: dict[str, list[Run]] = {}
        self._server: dict[str, list[float]] = {}

    def add(self, number: int, name: str, taken: Run, server_cpu: float = 0.0) -> None:
        if number > 0:
            self._runs.setdefault(name, []).append(taken)
            self._server.setdefault(name, []).append(server_cpu)

    def summary(self, size: int) -> dict[str, Any]:
        result = summary(self._runs, size)
        for name, seconds in self._server.items():
            result["medians"][name]["server_cpu_seconds"] = statistics.median(seconds)
        return result


class BackupBench:
    def __init__(self, bench: Bench, lab: Lab, say: Callable[[str], None]) -> None:
        self._bench = bench
        self._lab = lab
        self._say = say
        self._rounds = bench.scale.rounds
        self._size = bench.scale.copy_bytes
        self._disk = bench.scale.scattered_disk_bytes

    def measure(self) -> dict[str, Any]:
        return {
            "incompressible": self._kind("incompressible", fill_random),
            "compressible": self._kind("compressible", fill_compressible),
            "increments": self.increments(),
        }

    # -- whole disks ---------------------------------------------------------------------------------------

    def _kind(self, title: str, fill: Callable[[Path, int], None]) -> dict[str, Any]:
        source = self._lab.path / "disk.raw"
        fill(source, self._size)
        backup = self._backups(title, source)
        restore = self._restores(title, source)
        local = self._local(title, source)
        source.unlink()
        return {"to_s3": backup, "from_s3": restore, "to_directory": local}

    def _backups(self, title: str, source: Path) -> dict[str, Any]:
        table = _Table()
        stored: dict[str, Any] = {}
        for number, name, program in self._turns(self._to_s3()):
            with self._server() as server:
                uri = self._new_repository(server)
                before = processes()[server.pid].cpu_seconds
                taken = program(server, uri, source)
                spent = processes()[server.pid].cpu_seconds - before
                table.add(number, name, taken, spent)
                if name == "flushpoint":
                    stored = _stored(server, uri) | {
                        "units": _units_of([Extent(0, self._size, Status.DATA)], self._size)
                    }
            self._say(
                f"{title} to S3, round {number}: {name} {taken.seconds:.2f} s, {taken.cpu_seconds:.2f} s CPU, "
                f"the server {spent:.2f} s"
            )
        return table.summary(self._size) | {"stored": stored}

    def _restores(self, title: str, source: Path) -> dict[str, Any]:
        table = _Table()
        copy = self._lab.path / "restored.raw"
        with self._server() as server:
            uri = self._new_repository(server)
            self._ours_to_s3(server, uri, source)
            self._s5cmd(server, [str(source), f"s3://{BUCKET}/plain.raw"])
            for number, name, program in self._turns(self._from_s3()):
                copy.unlink(missing_ok=True)
                _touch_memory(self._size)
                before = processes()[server.pid].cpu_seconds
                taken = program(server, uri, copy)
                spent = processes()[server.pid].cpu_seconds - before
                run(["cmp", source, copy])
                table.add(number, name, taken, spent)
                self._say(
                    f"{title} from S3, round {number}: {name} {taken.seconds:.2f} s, {taken.cpu_seconds:.2f} s CPU, "
                    f"the server {spent:.2f} s"
                )
        copy.unlink()
        return table.summary(self._size)

    def _local(self, title: str, source: Path) -> dict[str, Any]:
        """A repository in a directory, and `cp`; both in memory, where a sync costs nothing."""
        table = _Table()
        where, copy = self._lab.path / "repository", self._lab.path / "copy.raw"

        def ours() -> Run:
            where.mkdir()
            uri = self._init(f"repo+file://{where}")
            return self._bench.mirror(JobSpec(source=str(source), target=str(uri), source_frozen=True))[1]

        def cp() -> Run:
            return _timed(["cp", source, copy])

        for number, name, program in self._turns({"flushpoint": ours, "cp": cp}):
            taken = program()
            table.add(number, name, taken)
            shutil.rmtree(where, ignore_errors=True)
            copy.unlink(missing_ok=True)
            self._say(f"{title} to a directory, round {number}: {name} {taken.seconds:.2f} s")
        return table.summary(self._size)

    # -- increments ----------------------------------------------------------------------------------------

    def increments(self) -> dict[str, Any]:
        """By a bitmap: 1 % and a tenth of that of one disk, and as many bytes of a disk of a quarter of its size.

        The first MiB of every segment holds data, so that every segment has a map, and the root all its pages.
        """
        dirty = self._disk // 100 // BLOCK
        found = {}
        for name, size, blocks in (
            ("one percent", self._disk, dirty),
            ("a tenth of that", self._disk, dirty // 10),
            ("the same bytes, a quarter of the disk", self._disk // 4, dirty),
        ):
            found[name] = self._increment(size, blocks)
            one = found[name]
            self._say(
                f"increment, {name}: {one['median_seconds']:.2f} s, {one['objects']} objects, "
                f"{one['bytes'] / MIB:.1f} MiB for {one['dirty_bytes'] / MIB:.1f} MiB dirty"
            )
        return found

    def _increment(self, size: int, blocks: int) -> dict[str, Any]:
        disk = self._lab.path / "increment.qcow2"
        seconds = []
        result: dict[str, Any] = {}
        with self._server() as server:
            uri = self._new_repository(server)
            run(["qemu-img", "create", "-q", "-f", "qcow2", disk, str(size)])
            self._write(disk, range(0, size, SEGMENT_BYTES), MIB)
            target = f"{uri}&group=increment&disk=disk"
            self._bench.mirror(JobSpec(source=str(disk), target=target, source_frozen=True))
            for number in range(self._rounds):
                run(["qemu-img", "bitmap", "--add", "-g", str(BLOCK), disk, BITMAP])
                dirty = scatter(size, blocks, number)
                self._write(disk, dirty, BLOCK)
                before = _stored(server, uri)
                spec = JobSpec(source=str(disk), target=target, sync=Sync.DIRTY, bitmap=BITMAP, source_frozen=True)
                taken = self._bench.mirror(spec)[1]
                after = _stored(server, uri)
                run(["qemu-img", "bitmap", "--remove", disk, BITMAP])
                seconds.append(taken.seconds)
                result = {
                    "disk_bytes": size,
                    "dirty_bytes": blocks * BLOCK,
                    "objects": after["objects"] - before["objects"],
                    "bytes": after["bytes"] - before["bytes"],
                    "units": _units_of([Extent(at, BLOCK, Status.DATA) for at in sorted(dirty)], size),
                }
            self._check(uri, disk)
        disk.unlink()
        return result | {"seconds": seconds, "median_seconds": statistics.median(seconds)}

    def _check(self, uri: RepositoryUri, disk: Path) -> None:
        copy = self._lab.path / "increment.raw"
        source = f"{uri}&group=increment&disk=disk"
        self._bench.mirror(JobSpec(source=source, target=str(copy)))
        run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", disk, copy])
        copy.unlink()

    def _write(self, disk: Path, offsets: Iterable[int], length: int) -> None:
        """Random bytes, through QEMU, which keeps the bitmap."""
        with (
            self._lab.serving("writable", self._lab.qemu_nbd("writable", disk, "qcow2")) as uri,
            Session.open(Endpoint.parse(uri), 1) as session,
        ):
            for at in offsets:
                session.write(at, os.urandom(length))
            session.flush()

    # -- programs ------------------------------------------------------------------------------------------

    def _to_s3(self) -> dict[str, Program]:
        return {
            "flushpoint": self._ours_to_s3,
            "s5cmd": lambda server, _, source: self._s5cmd(server, [str(source), f"s3://{BUCKET}/plain.raw"]),
            "rclone": lambda server, _, source: self._rclone(server, [str(source), f":s3:{BUCKET}/plain.raw"]),
        }

    def _from_s3(self) -> dict[str, Program]:
        return {
            "flushpoint": self._ours_from_s3,
            "s5cmd": lambda server, _, copy: self._s5cmd(server, [f"s3://{BUCKET}/plain.raw", str(copy)]),
            "rclone": lambda server, _, copy: self._rclone(server, [f":s3:{BUCKET}/plain.raw", str(copy)]),
        }

    def _ours_to_s3(self, server: ObjectServer, uri: RepositoryUri, source: Path) -> Run:
        return self._bench.mirror(JobSpec(source=str(source), target=str(uri), source_frozen=True))[1]

    def _ours_from_s3(self, server: ObjectServer, uri: RepositoryUri, copy: Path) -> Run:
        return self._bench.mirror(JobSpec(source=f"{uri}&group=disk&disk=disk", target=str(copy)))[1]

    @staticmethod
    def _s5cmd(server: ObjectServer, words: list[str]) -> Run:
        return _timed(["s5cmd", "--endpoint-url", server.endpoint, "cp", *words])

    @staticmethod
    def _rclone(server: ObjectServer, words: list[str]) -> Run:
        options = ["--s3-provider=Other", "--s3-env-auth", f"--s3-endpoint={server.endpoint}", "--config="]
        return _timed(["rclone", *options, "copyto", *words])

    # -- around it -----------------------------------------------------------------------------------------

    def _turns(self, programs: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
        """(round, name, program); nobody is always the first of a round.

        Round 0 warms up and is not counted: who touches a virtual machine's memory first waits for its host.
        """
        names = list(programs)
        for number in range(self._rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                yield number, name, programs[name]

    @contextmanager
    def _server(self) -> Iterator[ObjectServer]:
        with running_seaweedfs() as server:
            make_bucket(server, BUCKET)
            yield server

    def _new_repository(self, server: ObjectServer) -> RepositoryUri:
        return self._init(str(server.uri(BUCKET, "repository")))

    def _init(self, uri: str) -> RepositoryUri:
        self._bench.mirror(JobSpec(task=RepositoryTask(kind=TaskKind.INIT, repository=uri)))
        return parse_repository(uri)


def fill_compressible(path: Path, size: int) -> None:
    """Half of every 512 bytes is random, the rest one byte: about two to one, without two equal blocks."""
    with path.open("wb") as file:
        for _ in range(size // _PIECE):
            piece = bytearray(os.urandom(_PIECE))
            for start in range(256, _PIECE, 512):
                piece[start : start + 256] = b"\xa5" * 256
            file.write(piece)


def _touch_memory(size: int) -> None:
    """The host of a virtual machine takes back memory that lies free for a moment, and whoever is given it next waits
    for that, half as long again as a whole restore takes. So what the next run will fill is given back just before."""
    mmap.mmap(-1, size + size // 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def _timed(command: list[str | Path]) -> Run:
    done = run(command)
    return Run(done.seconds, done.cpu_seconds)


def _units_of(extents: list[Extent], size: int) -> int:
    return sum(1 for _ in plan_units(extents, size))


def _stored(server: ObjectServer, uri: RepositoryUri) -> dict[str, int]:
    """Objects of the repository, and their bytes."""
    objects = total = 0
    with closing(client_of(server)) as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{uri.prefix}/"):
            for one in page.get("Contents", []):
                objects += 1
                total += one["Size"]
    return {"objects": objects, "bytes": total}
