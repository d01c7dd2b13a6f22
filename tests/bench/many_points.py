"""A repository of very many points of many disks, and what it costs to open, list, plan, check and prune it.

`python -m tests.bench.many_points make DIRECTORY POINTS DISKS CHANGED` writes one as movers do: in one group each point
changes a few blocks of CHANGED disks. The other disks keep the roots they have.
`python -m tests.bench.many_points list|plan|check|prune URI` measures one of these, in a process of its own so that its
memory can be told. All print JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES, Extent, Status
from coordinator.model.job import Sync
from coordinator.model.point import Retention
from coordinator.model.repository_uri import RepositoryUri, parse_repository
from coordinator.model.units import plan_units
from coordinator.model.uri import parse
from tests.bench.scenarios import Scale
from tests.demo.lab import MIB, Lab, peak_memory, run
from tests.object_servers import make_bucket, running_seaweedfs
from tests.repositories import local_uri, make_repository, publish_members, write_disk, write_member
from workers.access import Access
from workers.repository.check import check
from workers.repository.collect import prune
from workers.repository.epochs import open_epoch
from workers.repository.repository import Repository
from workers.repository.store import open_store
from workers.sources import open_source

GROUP = "fleet"
DISK_BYTES = 16 * SEGMENT_BYTES + 4096
"""The last block is a short one, alone in its segment."""
ACCESS = Access(["/"], ["*"])
CHANGED = 4
"""Disks that are written at each point of the bench; one in 25 of its hundred."""
_BUCKET = "bench"
_COPIES_AT_ONCE = 8
_BLOCKS = -(-DISK_BYTES // BLOCK_BYTES)
_SEGMENT_BLOCKS = SEGMENT_BYTES // BLOCK_BYTES
_CHANGED_BLOCKS = 3
_FIRST_CUT_S = 1_700_000_000.0
_BETWEEN_CUTS_S = 3600.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What is in the repository; every byte of it follows from these numbers. Disks count from 0, epochs from 1."""

    points: int
    disks: int
    changed: int
    """Disks that are written at each point after the first, in turns."""

    def name(self, disk: int) -> str:
        return f"vm{disk // 2:04}/disk{disk % 2}"

    def written_at(self, epoch: int) -> list[int]:
        """Disks."""
        if epoch == 1:
            return list(range(self.disks))
        return sorted({(epoch * self.changed + n) % self.disks for n in range(self.changed)})

    def blocks(self, disk: int, epoch: int) -> dict[int, bytes]:
        """What a disk that is written at this epoch then has in the blocks that change, by their number."""
        if epoch == 1:
            return {n: _content(disk, epoch, n) for n in range(0, _BLOCKS, _SEGMENT_BLOCKS)}
        chosen = random.Random(f"{disk} {epoch}").sample(range(_BLOCKS), _CHANGED_BLOCKS)
        return {n: _content(disk, epoch, n) for n in chosen[:-1]} | {chosen[-1]: bytes(_length(chosen[-1]))}

    def content(self, disk: int, epoch: int) -> bytes:
        """All of a disk at a point, from what was written up to then."""
        data = bytearray(DISK_BYTES)
        for number in range(1, epoch + 1):
            if disk in self.written_at(number):
                for block, new in self.blocks(disk, number).items():
                    data[block * BLOCK_BYTES : block * BLOCK_BYTES + len(new)] = new
        return bytes(data)


def make(repository: Repository, shape: Shape) -> None:
    """Write all points into an empty repository."""
    for number in range(1, shape.points + 1):
        first = open_epoch(repository, GROUP, shape.name(0), "many_points", lambda owner: True)
        members = {m.disk: m for m in first.parent.members} if first.parent else {}
        for disk in shape.written_at(number):
            epoch = replace(first, disk=shape.name(disk))
            blocks = shape.blocks(disk, number)
            sync = Sync.DIRTY if epoch.parent else Sync.FULL
            extents = [Extent(n * BLOCK_BYTES, _length(n), Status.DIRTY) for n in sorted(blocks)]
            written = write_disk(repository, epoch, _Blocks(blocks), DISK_BYTES, extents, sync)
            members[epoch.disk] = write_member(repository, written, sync)
        publish_members(repository, first, tuple(members.values()), _FIRST_CUT_S + number * _BETWEEN_CUTS_S)


# -- measuring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found, and what that cost."""

    found: dict[str, int]
    seconds: float
    peak_bytes: int
    """Largest resident size of the whole process, interpreter and libraries included."""
    growth_bytes: int
    """How much of it came with what was measured."""


def measured(uri: RepositoryUri, work: Callable[[RepositoryUri], dict[str, int]]) -> Measured:
    open_store(uri).close()  # a worker imports boto3 once
    before = peak_memory(os.getpid())
    begin = time.monotonic()
    found = work(uri)
    seconds = time.monotonic() - begin
    peak = peak_memory(os.getpid())
    return Measured(found, seconds, peak, peak - before)


def list_points(uri: RepositoryUri) -> dict[str, int]:
    """Open it, and tell of every point what `flushpoint points` does."""
    with Repository.open(uri, ACCESS) as repository:
        group = repository.decisions.groups()[GROUP]
        rows = [
            (point.epoch, point.cut_at, len(point.members), sum(member.size for member in point.members))
            for point in repository.decisions.points(group)
        ]
    return {"points": len(rows), "disks": sum(disks for _, _, disks, _ in rows)}


def plan_newest(uri: RepositoryUri) -> dict[str, int]:
    """Plan the restore of all disks of the newest point; each is opened for itself, as by its job."""
    with Repository.open(uri, ACCESS) as repository:
        newest = repository.decisions.point(GROUP, repository.decisions.group(GROUP).newest)
    units = extents = 0
    for member in newest.members:
        named = replace(uri, group=GROUP, point=newest.epoch, disk=member.disk)
        with closing(open_source(parse(str(named)), Sync.FULL, None, ACCESS)) as source:
            for unit in plan_units(source.extents(0, source.size), source.size):
                units += 1
                extents += len(unit.extents)
    return {"disks": len(newest.members), "units": units, "extents": extents}


def check_structure(uri: RepositoryUri) -> dict[str, int]:
    with Repository.open(uri, ACCESS) as repository:
        report = check(repository)
    return {
        "points": report.points,
        "packs": report.packs,
        "damage": len(report.damage),
        "orphans": report.orphans,
    }


def prune_dry(uri: RepositoryUri) -> dict[str, int]:
    """What a prune to the last ten would remove."""
    with Repository.open(uri, ACCESS) as repository:
        report = prune(repository, (GROUP,), Retention(last=10), dry_run=True)
    return {"kept": len(report.kept[GROUP]), "removed": len(report.removed[GROUP])}


MEASURES = {"list": list_points, "plan": plan_newest, "check": check_structure, "prune": prune_dry}


def measure_apart(what: str, uri: RepositoryUri) -> dict[str, Any]:
    """A `Measured` of a process of its own."""
    found: dict[str, Any] = json.loads(run([sys.executable, "-m", "tests.bench.many_points", what, str(uri)]).stdout)
    return found


class ManyPointsBench:
    """In a directory and on an S3 server, both in memory."""

    def __init__(self, lab: Lab, scale: Scale, say: Callable[[str], None]) -> None:
        self._directory = lab.path / "many_points"
        self._shape = Shape(scale.many_points, scale.many_points_disks, CHANGED)
        self._say = say

    def measure(self) -> dict[str, Any]:
        begin = time.monotonic()
        with make_repository(self._directory) as repository:
            make(repository, self._shape)
        made_s = time.monotonic() - begin
        uri = local_uri(self._directory)
        found = {"directory": self._measured("directory", uri, list(MEASURES))}
        with running_seaweedfs() as server:
            make_bucket(server, _BUCKET)
            copy = server.uri(_BUCKET, "many_points")
            copy_repository(uri, copy)
            found["s3"] = self._measured("S3", copy, ["list", "plan"])
        return {**asdict(self._shape), "made_seconds": made_s, **found}

    def _measured(self, where: str, uri: RepositoryUri, names: list[str]) -> dict[str, Any]:
        found = {}
        for name in names:
            found[name] = measure_apart(name, uri)
            seconds, growth = found[name]["seconds"], found[name]["growth_bytes"] / MIB
            self._say(f"{self._shape.points:,} points, {where}: {name} {seconds:.2f} s, memory + {growth:.0f} MiB")
        return found


def copy_repository(source: RepositoryUri, target: RepositoryUri) -> None:
    """Object by object: nothing in a repository says where it is."""
    with (
        closing(open_store(source)) as old,
        closing(open_store(target)) as new,
        ThreadPoolExecutor(_COPIES_AT_ONCE) as pool,
    ):
        for _ in pool.map(lambda info: new.put(info.key, old.get(info.key)), old.list("")):
            pass


# -- contents ----------------------------------------------------------------------------------------------------


class _Blocks:
    """A disk of which only some blocks are ever read."""

    def __init__(self, blocks: dict[int, bytes]) -> None:
        self._blocks = blocks

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), BLOCK_BYTES):
            block = self._blocks[(offset + at) // BLOCK_BYTES]
            buffer[at : at + len(block)] = block


def _length(block: int) -> int:
    return min(BLOCK_BYTES, DISK_BYTES - block * BLOCK_BYTES)


def _content(disk: int, epoch: int, block: int) -> bytes:
    """No block equals another, and each is stored in some hundred bytes."""
    digest = hashlib.sha256(f"{disk} {epoch} {block}".encode()).digest()
    return (digest * (BLOCK_BYTES // len(digest)))[: _length(block)]


def _made(directory: str, points: str, disks: str, changed: str) -> dict[str, float]:
    begin = time.monotonic()
    with make_repository(Path(directory)) as repository:
        make(repository, Shape(int(points), int(disks), int(changed)))
    return {"seconds": time.monotonic() - begin, "peak_bytes": peak_memory(os.getpid())}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name == "make":
        print(json.dumps(_made(*arguments)))
    else:
        print(json.dumps(asdict(measured(parse_repository(arguments[0]), MEASURES[name]))))
