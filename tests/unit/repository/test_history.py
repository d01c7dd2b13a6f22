"""Whatever happens to a repository, every point in it restores to what its disk was (I1, I3).

A plain model in memory, random writes, epochs of every kind, epochs that are aborted or whose writers die, prunes,
compactions, new keys: after each step every live point is read back whole.
"""

from __future__ import annotations

import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES, Extent, Status
from coordinator.model.point import Retention
from coordinator.model.repository_uri import parse_repository
from tests.repositories import BytesSource, Written, publish_epoch, write_epoch
from workers.access import Access
from workers.repository import keyring
from workers.repository.check import check
from workers.repository.collect import forbidden_packs, prune
from workers.repository.compact import compact
from workers.repository.epochs import abandon, publish
from workers.repository.index import SqliteIndex
from workers.repository.layout import pack_key
from workers.repository.repository import Repository

SIZE = SEGMENT_BYTES + 3 * BLOCK_BYTES + 1001
BLOCKS = -(-SIZE // BLOCK_BYTES)
PLACES = (0, 1, 2, 15, 16, 17, 126, 127, 128, 129, 130, 131)
"""Blocks that are written: few, so that they are written again and again; beside each other and at ends."""
GROUPS = ("one", "two")
GROUP = st.sampled_from(GROUPS)
WRITES = st.lists(st.sampled_from(PLACES), max_size=6)


class Disk(BytesSource):
    """A disk in memory that can tell what was written since it was last asked."""

    def __init__(self) -> None:
        super().__init__(bytearray(SIZE))
        self.data: bytearray
        self.dirty: set[int] = set()

    def write(self, block: int, content: bytes) -> None:
        start = block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, SIZE)
        self.data[start:end] = content[: end - start]
        self.dirty.add(block)

    def dirty_extents(self) -> Iterator[Extent]:
        for block in sorted(self.dirty):
            yield Extent(block * BLOCK_BYTES, min(BLOCK_BYTES, SIZE - block * BLOCK_BYTES), Status.DIRTY)


class Histories(RuleBasedStateMachine):
    @initialize(encrypted=st.booleans(), seed=st.integers(0, 2**32))
    def begin(self, encrypted: bool, seed: int) -> None:
        shm = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(prefix="flushpoint-", dir=shm if shm.is_dir() else None))
        self.dice = random.Random(seed)
        self.patch = pytest.MonkeyPatch()  # ids of packs and roots by the seed too, so that a failure can be replayed
        self.patch.setattr(secrets, "token_bytes", self.dice.randbytes)
        self.patch.setattr(secrets, "token_hex", lambda count: self.dice.randbytes(count).hex())
        (self.directory / "key").write_text("a passphrase")
        (self.directory / "repository").mkdir()
        self.secret = (self.directory / "key").read_bytes().strip() if encrypted else b""
        query = f"?key=file:{self.directory}/key" if encrypted else ""
        self.uri = parse_repository(f"repo+file://{self.directory}/repository{query}")
        self.repository = Repository.init(self.uri, self.access)
        self.disks = {group: Disk() for group in GROUPS}
        self.points: dict[tuple[str, int], bytes] = {}
        self.write("one", list(PLACES))
        self.write("two", list(PLACES))
        self.clock = 1_700_000_000.0

    @property
    def access(self) -> Access:
        return Access([str(self.directory)], [])

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.patch.undo()
            self.repository.close()
            shutil.rmtree(self.directory)

    # -- what the repository does -----------------------------------------------------------------------------

    def write(self, group: str, blocks: list[int]) -> None:
        for block in blocks:
            # Few different contents, so that blocks are found equal; some that do not compress; some zeroes.
            content = self.dice.choice(
                [bytes(BLOCK_BYTES), self.dice.randbytes(BLOCK_BYTES), bytes([self.dice.randrange(1, 4)]) * BLOCK_BYTES]
            )
            self.disks[group].write(block, content)

    def written(self, group: str, kind: str) -> Written:
        """An epoch whose units are all written, and which is still undecided."""
        disk = self.disks[group]
        index = SqliteIndex(
            self.directory / "index",
            forbidden_packs(self.repository),
            lambda pack: self.repository.store.size(pack_key(pack)) is not None,
        )
        extents = disk.dirty_extents() if kind == "dirty" else disk.extents()
        written = write_epoch(self.repository, group, disk, kind, extents=extents, index=index)
        index.close()
        return written

    @rule(group=GROUP, kind=st.sampled_from(["full", "dirty", "compare"]), blocks=WRITES)
    def backup(self, group: str, kind: str, blocks: list[int]) -> None:
        self.write(group, blocks)
        if kind == "dirty" and not any(name == group for name, _ in self.points):
            kind = "full"  # there is no parent that the bitmap could be about
        written = self.written(group, kind)
        self.clock += self.dice.choice([60, 3600, 86_400])
        decision = publish_epoch(self.repository, written, self.clock)
        publish(self.repository, written.epoch, decision)  # a second time changes nothing (I5)
        self.points[group, decision.epoch] = bytes(self.disks[group].data)
        self.disks[group].dirty.clear()

    @rule(group=GROUP, kind=st.sampled_from(["full", "compare"]), blocks=WRITES, dies=st.booleans())
    def abort(self, group: str, kind: str, blocks: list[int], dies: bool) -> None:
        """Its packs are orphans; a writer that died leaves its hold as well."""
        self.write(group, blocks)
        written = self.written(group, kind)
        if not dies:
            abandon(self.repository, group, written.epoch.number, "cancelled")

    @rule(last=st.integers(1, 3), daily=st.integers(0, 2))
    def prune(self, last: int, daily: int) -> None:
        report = prune(self.repository, None, Retention(last=last, daily=daily))
        for group, epochs in report.removed.items():
            for epoch in epochs:
                del self.points[group, epoch]

    @rule(share=st.sampled_from([0.3, 0.9, 1.0]))
    def compact(self, share: float) -> None:
        compact(self.repository, live_share=share)

    @precondition(lambda self: self.secret)
    @rule()
    def new_data_key(self) -> None:
        keyring.rotate(self.repository.store, self.secret)
        self.reopen()

    @precondition(lambda self: self.secret)
    @rule()
    def new_owner_key(self) -> None:
        path = self.directory / "key"
        path.write_text(self.dice.randbytes(32).hex())
        new = path.read_bytes()
        keyring.rewrap(self.repository.store, self.secret, new)
        self.secret = new
        self.reopen()

    @rule()
    def reopen(self) -> None:
        self.repository.close()
        self.repository = Repository.open(self.uri, self.access)

    # -- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def every_point_restores(self) -> None:
        if not hasattr(self, "points"):
            return
        found = {
            (name, point.epoch)
            for name, group in self.repository.decisions.groups().items()
            for point in self.repository.decisions.points(group)
        }
        assert found == self.points.keys()
        for (group, epoch), content in self.points.items():
            disk = self.repository.disk(self.repository.decisions.point(group, epoch), "disk")
            read = bytearray(SIZE)
            disk.read_into(0, memoryview(read))
            assert read == content
            for extent in disk.extents(0, SIZE):
                if extent.reads_as_zeroes:
                    assert read.startswith(bytes(extent.length), extent.offset)

    @invariant()
    def nothing_is_damaged(self) -> None:
        if hasattr(self, "points"):
            assert check(self.repository, data=True).damage == []


Histories.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=20,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestHistories = pytest.mark.timeout(600)(Histories.TestCase)  # on a machine that does much else beside
