"""Repositories for tests: made, written and read without a ledger, a coordinator or a mover."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES, Extent, Status, merge_adjacent
from coordinator.model.point import Decision, Member, SeedMember
from coordinator.model.repository_uri import RepositoryUri, parse_repository
from coordinator.model.units import plan_units
from workers.access import Access
from workers.repository import reader
from workers.repository.archive import Archive, Readable
from workers.repository.epochs import Epoch, collect_maps, open_epoch, publish, write_disk_root
from workers.repository.index import NoIndex, RunIndex
from workers.repository.pack import Origin, PackRef
from workers.repository.reader import PointDisk
from workers.repository.repository import Repository
from workers.repository.root import Root
from workers.repository.store.contract import MissingObjectError

DISK = "disk"


class BytesSource:
    """A disk in memory."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(self.data)[offset : offset + len(buffer)]

    def extents(self) -> Iterable[Extent]:
        """Blocks of data and of zeroes, as a server would tell them."""
        size = len(self.data)
        for start in range(0, size, BLOCK_BYTES):
            length = min(BLOCK_BYTES, size - start)
            zero = self.data.startswith(bytes(length), start)
            yield Extent(start, length, Status.ZERO if zero else Status.DATA)


@dataclass
class Written:
    """An epoch whose packs are all there, and which is undecided."""

    epoch: Epoch
    base: Root
    size: int
    packs: list[PackRef]
    sent: int


def local_uri(directory: Path, key: str = "") -> RepositoryUri:
    return parse_repository(f"repo+file://{directory}{f'?key={key}' if key else ''}")


def make_repository(directory: Path, key: str = "") -> Repository:
    """An empty one in a directory that is made; `key` is a reference such as file:/path."""
    directory.mkdir(parents=True, exist_ok=True)
    return Repository.init(local_uri(directory, key), Access(["/"], ["*"]))


def write_epoch(
    repository: Repository,
    group: str,
    source: BytesSource,
    kind: str,
    *,
    extents: Iterable[Extent] | None = None,
    index: RunIndex | None = None,
    pool: Executor | None = None,
) -> Written:
    """`kind` is full, dirty (with `extents`) or compare; an epoch of a writer that died before is abandoned."""
    epoch = open_epoch(repository, group, DISK, "job", lambda owner: True)
    wanted = source.extents() if extents is None else extents
    return write_disk(repository, epoch, source, len(source.data), wanted, kind, index=index, pool=pool)


def write_disk(
    repository: Repository,
    epoch: Epoch,
    source: Readable,
    size: int,
    extents: Iterable[Extent],
    kind: str,
    *,
    index: RunIndex | None = None,
    pool: Executor | None = None,
) -> Written:
    """The packs of the disk that `epoch` names; `pool` is shut down."""
    member = epoch.parent_member
    known = repository.disk_of(member) if member else None
    base = None if kind == "full" else known
    origin = Origin(epoch.group, epoch.number)
    archive = Archive(repository, origin, epoch.disk, size, base, known, index=index or NoIndex())
    with pool or ThreadPoolExecutor(2) as threads:
        units = plan_units(merge_adjacent(extents), size)
        written = [archive.write_unit(source, unit.extents, threads) for unit in units]
    root = repository.root(member) if base and member else Root.empty(size, repository.store, repository.keyring)
    packs = [w.pack for w in written if w.pack is not None]
    return Written(epoch, root, size, packs, sum(w.bytes_sent for w in written))


def write_member(repository: Repository, written: Written, sync: str = "full") -> Member:
    """The disk's root, and how the manifest is to name it."""
    maps = collect_maps(repository, written.epoch.disk, written.packs)
    root = write_disk_root(repository, written.epoch, written.base, written.size, maps)
    return written.epoch.member_of(root, written.size).model_copy(update={"sync": sync})


def publish_epoch(repository: Repository, written: Written, cut_at: float | None = None) -> Decision:
    return publish_members(repository, written.epoch, (write_member(repository, written),), cut_at)


def publish_members(
    repository: Repository,
    epoch: Epoch,
    members: tuple[Member, ...],
    cut_at: float | None = None,
    seeding: tuple[SeedMember, ...] = (),
) -> Decision:
    now = time.time()
    decision = Decision(
        decision="manifest",
        repository=repository.id,
        group=epoch.group,
        epoch=epoch.number,
        job="job",
        cut_at=now if cut_at is None else cut_at,
        decided_at=now,
        members=members,
        seeding=seeding,
    )
    return publish(repository, epoch, decision)


def backup(repository: Repository, group: str, data: bytes | bytearray, kind: str = "full") -> Decision:
    return publish_epoch(repository, write_epoch(repository, group, BytesSource(data), kind))


def read_point(repository: Repository, group: str, epoch: int = 0) -> bytes:
    """All of the one disk of a point, which reads the same when it is streamed."""
    disk = repository.disk(repository.decisions.point(group, epoch), "")
    data = bytearray(disk.size)
    disk.read_into(0, memoryview(data))
    assert streamed(disk) == data
    return bytes(data)


def streamed(disk: PointDisk) -> bytearray:
    """All of a disk by streams, however short; what they leave is read as usual, and all of it if a pack is gone."""
    found = bytearray(disk.size)
    view = memoryview(found)

    def write(offset: int, data: memoryview) -> None:
        view[offset : offset + len(data)] = data

    everything = [(at, min(SEGMENT_BYTES, disk.size - at)) for at in range(0, disk.size, SEGMENT_BYTES)]
    with mock.patch.object(reader, "STREAM_BLOCKS", 1):
        try:
            left = disk.stream(everything, write)
        except MissingObjectError:  # compaction has moved a pack
            left = everything
    for offset, length in left:
        disk.read_into(offset, view[offset : offset + length])
    return found
