"""A byte that is another than was written: found, located and named, and no other point is harmed (I6)."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError
from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES, Extent, Status
from coordinator.model.point import Retention
from tests.golden.make_repositories import HERE, KEY, KINDS, POINTS, content
from tests.repositories import (
    DISK,
    BytesSource,
    backup,
    local_uri,
    make_repository,
    publish_epoch,
    publish_members,
    read_point,
    write_disk,
    write_epoch,
)
from workers.access import Access
from workers.repository.check import check
from workers.repository.collect import condemn, forbidden_packs, prune
from workers.repository.compact import compact
from workers.repository.epochs import open_epoch, renew
from workers.repository.layout import CONDEMNED, SEGMENTS_A_PAGE, DamageError, hold_key, pack_key
from workers.repository.pack import read_contents, read_head, read_tail
from workers.repository.repository import Repository
from workers.repository.store.contract import ObjectStore

ACCESS = Access(["/"], [])


def opened(directory: Path, kind: str) -> Repository:
    key = directory.parent / "key"
    key.write_text(KEY)
    return Repository.open(local_uri(directory, f"file:{key}" if kind == "encrypted" else ""), ACCESS)


@pytest.fixture(params=KINDS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A copy of a golden repository, and its kind."""
    directory = tmp_path / "repository"
    shutil.copytree(HERE / f"repository-1-{request.param}", directory)
    return directory, request.param


def test_a_repository_of_format_1_reads_as_ever(golden: tuple[Path, str]) -> None:
    with opened(*golden) as repository:
        assert [p.epoch for p in repository.decisions.points(repository.decisions.group("golden"))] == list(POINTS)
        for epoch in POINTS:
            assert read_point(repository, "golden", epoch) == content(epoch)
        assert check(repository, data=True).damage == []


OBJECTS = sorted(
    (kind, str(path.relative_to(HERE / f"repository-1-{kind}")))
    for kind in KINDS
    for path in (HERE / f"repository-1-{kind}").rglob("*")
    if path.is_file()
)


@pytest.mark.parametrize(("kind", "name"), OBJECTS, ids=lambda part: part.rpartition("/")[2][:24])
def test_a_flipped_byte_is_found_and_its_object_named(kind: str, name: str, tmp_path: Path) -> None:
    directory = tmp_path / "repository"
    shutil.copytree(HERE / f"repository-1-{kind}", directory)
    path = directory / name
    whole = path.read_bytes()
    for at in {0, 7, 30, len(whole) // 3, len(whole) // 2, len(whole) - 40, len(whole) - 1}:
        broken = bytearray(whole)
        broken[at % len(whole)] ^= 0x41
        if _says_the_same(whole, bytes(broken)):
            continue
        path.write_bytes(broken)
        assert any(name in message for message in findings(directory, kind)), f"byte {at} of {name}"


def findings(directory: Path, kind: str) -> list[str]:
    """What is said of a repository, which also is looked at for points that are unharmed."""
    try:
        with opened(directory, kind) as repository:
            report = check(repository, data=True)
            harmed = {point for damage in report.damage for point in damage.points}
            for epoch in POINTS:
                if f"golden@{epoch}" not in harmed:
                    assert read_point(repository, "golden", epoch) == content(epoch)
            return [damage.message for damage in report.damage]
    except FlushpointError as error:  # the records that everything else hangs on
        return [error.message]


def _says_the_same(old: bytes, new: bytes) -> bool:
    """JSON with other white space is the same record."""
    return old.startswith(b"{") and b"".join(old.split()) == b"".join(new.split())


def test_damage_to_a_point_leaves_its_neighbours_readable(tmp_path: Path) -> None:
    with make_repository(tmp_path / "r") as repository:
        first, second = bytearray(b"a" * 200_000), bytearray(b"a" * 200_000)
        second[70_000:70_100] = b"b" * 100
        backup(repository, "g", first)
        point = backup(repository, "g", second, "compare")
        newest = max(repository.store.list("packs/"), key=lambda info: info.modified)
        path = tmp_path / "r" / newest.key
        data = bytearray(path.read_bytes())
        data[95] ^= 1
        path.write_bytes(data)
    with Repository.open(local_uri(tmp_path / "r"), ACCESS) as repository:
        with pytest.raises(DamageError, match=newest.key) as caught:
            read_point(repository, "g", point.epoch)
        assert caught.value.exit_code == 5
        assert caught.value.offset >= 0
        assert read_point(repository, "g", point.epoch - 1) == first
        condemn(repository, "shun", [newest.key])
        backup(repository, "g", second, "compare")  # as by the next incremental after a check
        assert read_point(repository, "g") == second


def test_a_segment_whose_map_is_damaged_is_copied_anew_by_the_next_epoch(tmp_path: Path) -> None:
    data = b"a" * 100_000
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", data)
        break_the_map(repository, tmp_path / "r")
    with Repository.open(local_uri(tmp_path / "r"), ACCESS) as repository:
        changed = [Extent(65536, len(data) - 65536, Status.DIRTY)]
        publish_epoch(repository, write_epoch(repository, "g", BytesSource(data), "dirty", extents=changed))
        assert read_point(repository, "g") == data


def test_a_damaged_map_over_what_is_zeroes_now_is_written_anew(tmp_path: Path) -> None:
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", b"a" * 100_000)
        break_the_map(repository, tmp_path / "r")
    with Repository.open(local_uri(tmp_path / "r"), ACCESS) as repository:
        backup(repository, "g", bytes(100_000), "compare")
        assert read_point(repository, "g") == bytes(100_000)


def break_the_map(repository: Repository, directory: Path) -> None:
    """Flip a byte of the one map in the one pack."""
    (pack,) = repository.store.list("packs/")
    footer = read_tail(repository.store, bytes.fromhex(pack.key.removeprefix("packs/")), pack.size)
    (stored,) = read_contents(repository.store, repository.keyring, footer).maps
    path = directory / pack.key
    broken = bytearray(path.read_bytes())
    broken[stored.ref.offset + 9] ^= 1
    path.write_bytes(broken)


PAGE_BYTES = SEGMENTS_A_PAGE * SEGMENT_BYTES


class Large(BytesSource):
    """A disk of two pages: 4 GiB that begin with a block of data, and `tail`."""

    def __init__(self, head: bytes, tail: bytes) -> None:
        super().__init__(tail)
        self.head = head
        self.size = PAGE_BYTES + len(tail)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset >= PAGE_BYTES:
            super().read_into(offset - PAGE_BYTES, buffer)
        else:
            buffer[:] = self.head[offset : offset + len(buffer)].ljust(len(buffer), b"\0")

    def extents(self) -> Iterable[Extent]:
        yield Extent(0, len(self.head), Status.DATA)
        yield Extent(len(self.head), PAGE_BYTES - len(self.head), Status.HOLE)
        for extent in super().extents():
            yield Extent(PAGE_BYTES + extent.offset, extent.length, extent.status)


def back_up_large(repository: Repository, source: Large, kind: str, extents: Iterable[Extent] | None = None) -> None:
    epoch = open_epoch(repository, "g", DISK, "job", lambda owner: True)
    wanted = source.extents() if extents is None else extents
    publish_epoch(repository, write_disk(repository, epoch, source, source.size, wanted, kind))


def large_with_its_last_page_damaged(repository: Repository, directory: Path) -> Large:
    """The one point of it; its last page covers three segments with something in each, of four."""
    tail = b"".join(letter * 100_000 + bytes(SEGMENT_BYTES - 100_000) for letter in (b"b", b"c", b"d"))
    source = Large(b"a" * 65536, tail + bytes(1_000_000))
    back_up_large(repository, source, "full")
    break_the_last_page(repository, directory)
    return source


def break_the_last_page(repository: Repository, directory: Path) -> None:
    """Of the newest point's root: it lies just before the directory."""
    (member,) = repository.decisions.point("g", 0).members
    flip(directory / member.root, member.directory_offset - 1)


def flip(path: Path, at: int) -> None:
    broken = bytearray(path.read_bytes())
    broken[at] ^= 1
    path.write_bytes(broken)


def test_a_damaged_page_is_mended_by_the_next_epoch_that_compares(tmp_path: Path) -> None:
    """All that it covers is stored anew: also where the disk is a hole now, and where the hole began long before."""
    with make_repository(tmp_path / "r") as repository:
        source = large_with_its_last_page_damaged(repository, tmp_path / "r")
        now = Large(source.head, bytes(2 * SEGMENT_BYTES) + source.data[2 * SEGMENT_BYTES :])
        back_up_large(repository, now, "compare")
        disk = repository.disk(repository.decisions.point("g", 0), DISK)
        found = bytearray(len(now.data))
        disk.read_into(PAGE_BYTES, memoryview(found))
        assert found == now.data
        assert list(disk.mapped(0, SEGMENTS_A_PAGE + 4)) == [0, SEGMENTS_A_PAGE + 2], "page 0 is that of the parent"
        assert [d.points for d in check(repository).damage if d.message.startswith("a page")] == [("g@1",)]


def test_a_damaged_page_of_which_only_a_part_is_written_is_not_taken_for_zeroes(tmp_path: Path) -> None:
    """As by a bitmap, if the damage comes after it was looked for."""
    with make_repository(tmp_path / "r") as repository:
        source = large_with_its_last_page_damaged(repository, tmp_path / "r")
        changed = [Extent(PAGE_BYTES, 3 * SEGMENT_BYTES, Status.DIRTY)]
        with pytest.raises(DamageError, match="a page in disks/"):
            back_up_large(repository, source, "dirty", changed)
        (root,) = repository.store.list("disks/")
        assert root.key == repository.decisions.point("g", 1).members[0].root


def test_a_missing_pack_is_named_by_check_and_by_a_reader(tmp_path: Path) -> None:
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", b"x" * 100_000)
        (pack,) = repository.store.list("packs/")
        repository.store.delete([pack.key])
        assert [d.points for d in check(repository).damage if pack.key in d.message] == [("g@1",)]
        with pytest.raises(FlushpointError, match=pack.key):
            read_point(repository, "g")


@pytest.mark.parametrize("kind", ["packs/", "disks/"])
def test_what_ends_too_early_is_damage_to_a_reader(tmp_path: Path, kind: str) -> None:
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", b"x" * 100_000)
        (info,) = repository.store.list(kind)
        os.truncate(tmp_path / "r" / info.key, info.size // 3)
        with pytest.raises(DamageError, match=info.key):
            read_point(repository, "g")


def test_an_older_root_that_is_missing_is_damage_to_the_points_that_share_its_pages(tmp_path: Path) -> None:
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", b"x" * 100_000)
        (older,) = repository.store.list("disks/")
        backup(repository, "g", b"x" * 100_000, "compare")
        repository.store.delete([older.key])
        with pytest.raises(DamageError, match=f"missing, wanted in {older.key}"):
            read_point(repository, "g", 2)


def test_a_truncated_pack_is_named(tmp_path: Path) -> None:
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", b"x" * 100_000)
        (pack,) = repository.store.list("packs/")
        path = tmp_path / "r" / pack.key
        path.write_bytes(path.read_bytes()[:-100])
        assert any(pack.key in damage.message for damage in check(repository).damage)


def test_damage_that_points_share_is_told_of_each(tmp_path: Path) -> None:
    with make_repository(tmp_path / "r") as repository:
        first = backup(repository, "g", b"x" * 100_000)
        epoch = open_epoch(repository, "g", DISK, "job", lambda owner: True)
        publish_members(repository, epoch, first.members)
        path = tmp_path / "r" / first.members[0].root
        broken = bytearray(path.read_bytes())
        broken[first.members[0].directory_offset - 1] ^= 1  # of the page
        path.write_bytes(broken)
        told = {damage.message: damage.points for damage in check(repository).damage}
        assert len(told) == 2, "the object, and the page in it"
        assert set(told.values()) == {("g@1", "g@2")}


def test_a_check_that_is_broken_off_takes_that_for_no_damage(tmp_path: Path) -> None:
    class CancelledError(FlushpointError):
        pass

    asked = []

    def went_on() -> None:
        asked.append(None)
        if len(asked) == 1:
            raise CancelledError("the job was cancelled by force")

    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", b"x" * 100_000)
        with pytest.raises(CancelledError):
            check(repository, went_on=went_on)


def test_a_wrong_key_is_refused_before_anything_is_read(golden: tuple[Path, str]) -> None:
    directory, kind = golden
    wrong = directory.parent / "wrong"
    wrong.write_text("another passphrase")
    with pytest.raises(RefusedError, match="does not open the repository" if kind == "encrypted" else "not encrypted"):
        Repository.open(local_uri(directory, f"file:{wrong}"), ACCESS)


def test_an_encrypted_repository_without_a_key_is_refused(tmp_path: Path) -> None:
    shutil.copytree(HERE / "repository-1-encrypted", tmp_path / "r")
    with pytest.raises(RefusedError, match="no key was named"):
        Repository.open(local_uri(tmp_path / "r"), ACCESS)


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    make_repository(tmp_path / "r").close()
    path = tmp_path / "r" / "repository.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(RefusedError, match="has format 7"):
        Repository.open(local_uri(tmp_path / "r"), ACCESS)


def test_no_repository_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="repository init"):
        Repository.open(local_uri(tmp_path), ACCESS)


def test_an_encrypted_repository_shows_nothing_of_its_disks(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    canary = b"CANARY-OF-A-GUEST" * 1000
    with make_repository(tmp_path / "r", f"file:{tmp_path}/key") as repository:
        backup(repository, "g", canary)
        backup(repository, "g", canary)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file())
    assert b"CANARY" not in stored
    assert KEY.encode() not in stored


def test_equal_blocks_are_stored_once(tmp_path: Path) -> None:
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", b"x" * 1_000_000)
        before = sum(info.size for info in repository.store.list("packs/"))
        backup(repository, "g", b"x" * 1_000_000)
        assert sum(info.size for info in repository.store.list("packs/")) - before < 1000
        assert pack_key(b"\0" * 16) not in [info.key for info in repository.store.list("packs/")]


def test_a_damaged_hold_keeps_no_other_group_from_being_written_and_says_how_to_get_rid_of_it(tmp_path: Path) -> None:
    """A check does not look at holds, and no backup would write it anew: only its owner, if there still is one."""
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", b"x" * 1000)
        repository.decisions.hold_point("g", 1, "read-1", "a reader")
        epoch = open_epoch(repository, "g-1", DISK, "job 1", lambda owner: False)
        for hold in ("read-1", epoch.hold_id):
            path = tmp_path / "r" / hold_key(hold)
            path.write_bytes(path.read_bytes().replace(b"0", b"1"))
        with pytest.raises(DamageError, match="the record in holds/") as caught:
            prune(repository, None, Retention(last=1))
        assert caught.value.remedy == "whoever is at work writes it anew within 10 minutes; if it stays, remove it"
        assert backup(repository, "g", b"y" * 1000).epoch == 2
        renew(repository, epoch)
        repository.decisions.let_go("read-1")
        prune(repository, None, Retention(last=1))


@pytest.mark.parametrize("key", ["packs/notes.txt", f"packs/{'ab' * 16}.part", "moved/notes.txt", "groups/g/points/x"])
def test_what_somebody_else_has_put_there_stands_in_nobodys_way_and_stays(tmp_path: Path, key: str) -> None:
    """A program that synchronises directories, say."""
    with make_repository(tmp_path / "r") as repository:
        for seed in (b"x", b"y"):
            backup(repository, "g", seed * 100_000)
        repository.store.put(key, b"")
        for _ in range(3):
            prune(repository, None, Retention(last=1))
        compact(repository)
        forbidden_packs(repository)
        assert check(repository, data=True).damage == []
        assert repository.store.size(key) == 0


def test_a_pack_of_which_nothing_is_left_is_named_and_stands_in_no_prunes_way(tmp_path: Path) -> None:
    """A store may be asked for one byte at least."""
    with make_repository(tmp_path / "r") as repository:
        backup(repository, "g", b"x" * 1000)
        repository.store.put(pack_key(bytes(16)), b"")
        with pytest.raises(DamageError, match="the head in packs/0000"):
            read_head(_AsksForSomething(repository.store), bytes(16), 0)
        prune(repository, None, Retention(last=1))
        assert [damage.key for damage in check(repository).damage] == [pack_key(bytes(16))]


def test_a_damaged_list_of_what_may_go_says_how_to_get_rid_of_it(tmp_path: Path) -> None:
    """No check looks at it and no backup writes it anew, which cannot even begin: it must know what is on the list."""
    with make_repository(tmp_path / "r") as repository:
        for seed in (b"x", b"y"):
            backup(repository, "g", seed * 100_000)
        prune(repository, None, Retention(last=1))
        listed = [info.key for info in repository.store.list(CONDEMNED)]
        for key in listed:
            repository.store.put(key, b"rot")
        for act in (forbidden_packs, lambda made: prune(made, None, Retention(last=1)), compact):
            with pytest.raises(DamageError, match=f"the record in {listed[0]} is damaged") as caught:
                act(repository)
            assert caught.value.remedy == "remove it: the next prune, or check, lists anew what was on it"
        repository.store.delete(listed)
        for _ in range(2):
            prune(repository, None, Retention(last=1))
        assert check(repository, data=True).orphans == 0
        assert read_point(repository, "g") == b"y" * 100_000


class _AsksForSomething:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        assert length > 0
        return self._store.get_range(key, offset, length)


def test_a_flipped_bit_of_a_footer_is_found_without_a_key_or_changes_nothing(tmp_path: Path) -> None:
    """What it says of maps goes into a root: a map in the place of another would be read as if all were well."""
    with make_repository(tmp_path / "r") as repository:
        data = random.Random(1).randbytes(3 * BLOCK_BYTES)
        (ref,) = write_epoch(repository, "g", BytesSource(data), "full").packs
        path = tmp_path / "r" / pack_key(ref.pack)
        whole, sound, found = path.read_bytes(), read_contents(repository.store, repository.keyring, ref), 0
        for at in range(8 * ref.footer_offset, 8 * (ref.footer_offset + ref.footer_length)):
            broken = bytearray(whole)
            broken[at // 8] ^= 1 << at % 8
            path.write_bytes(broken)
            try:
                assert read_contents(repository.store, repository.keyring, ref) == sound, f"bit {at}"
            except DamageError as error:
                found += str(error).startswith("the footer in")
        assert found >= 8 * ref.footer_length - 8
