"""What of a disk goes into a pack, and what of a pack comes back, block by block."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from coordinator.model.errors import RefusedError
from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES, Extent, Status
from tests.repositories import (
    DISK,
    BytesSource,
    Written,
    backup,
    local_uri,
    make_repository,
    publish_epoch,
    read_point,
)
from workers.access import Access
from workers.repository import keyring
from workers.repository.archive import Archive
from workers.repository.archive import Written as Unit
from workers.repository.epochs import open_epoch
from workers.repository.expand import expanded
from workers.repository.layout import KEYS
from workers.repository.pack import Origin
from workers.repository.reader import PointDisk
from workers.repository.repository import Repository
from workers.repository.root import Root
from workers.repository.store.contract import ObjectStore
from workers.repository.store.local import LocalStore


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with make_repository(tmp_path / "r") as made:
        yield made


def point_of(
    repository: Repository, data: bytes, extents: Sequence[Extent], base: bool = False, exact: bool = False
) -> Unit:
    """One unit over the newest point, or over zeroes, published."""
    epoch = open_epoch(repository, "g", DISK, "job", lambda owner: True)
    parent: PointDisk | None = None
    root = Root.empty(len(data), repository.store, repository.keyring)
    if base and epoch.parent is not None and epoch.parent_member is not None:
        parent, root = repository.disk(epoch.parent, DISK), repository.root(epoch.parent_member)
    archive = Archive(repository, Origin("g", epoch.number), DISK, len(data), base=parent, known=parent, exact=exact)
    with ThreadPoolExecutor(2) as pool:
        unit = archive.write_unit(BytesSource(data), extents, pool)
    packs = [unit.pack] if unit.pack else []
    publish_epoch(repository, Written(epoch, root, len(data), packs, unit.bytes_sent))
    return unit


def data(offset: int, length: int) -> Extent:
    return Extent(offset, length, Status.DATA)


def zero(offset: int, length: int) -> Extent:
    return Extent(offset, length, Status.ZERO)


def test_a_changed_block_is_read_whole_unless_it_must_not(repository: Repository) -> None:
    disk = b"\x11" * 8192 + b"\xff" * (BLOCK_BYTES - 8192)
    point_of(repository, disk, [data(0, 4096)])
    assert read_point(repository, "g") == disk
    point_of(repository, disk, [data(0, 8192)], exact=True)
    assert read_point(repository, "g") == b"\x11" * 8192 + bytes(BLOCK_BYTES - 8192)


def test_zeroes_smaller_than_a_block_are_zeroes_and_nothing_beside_them(repository: Repository) -> None:
    disk = bytes(4096) + b"\x22" * 4096 + b"\xff" * (BLOCK_BYTES - 8192)
    point_of(repository, disk, [zero(0, 4096)], exact=True)
    assert not any(read_point(repository, "g"))
    point_of(repository, b"\x11" * BLOCK_BYTES, [data(0, BLOCK_BYTES)])
    point_of(repository, disk, [zero(0, 4096), data(4096, 4096)], base=True, exact=True)
    assert read_point(repository, "g") == disk[:8192] + b"\x11" * (BLOCK_BYTES - 8192)


def test_what_became_zeroes_is_a_change_though_nothing_is_stored_for_it(repository: Repository) -> None:
    point_of(repository, b"x" * 3 * BLOCK_BYTES, [data(0, 3 * BLOCK_BYTES)])
    unit = point_of(repository, b"x" * 2 * BLOCK_BYTES + bytes(BLOCK_BYTES), [data(0, 3 * BLOCK_BYTES)], base=True)
    assert (unit.bytes_sent, unit.bytes_changed) == (0, BLOCK_BYTES)
    same = point_of(repository, b"x" * 2 * BLOCK_BYTES + bytes(BLOCK_BYTES), [data(0, 3 * BLOCK_BYTES)], base=True)
    assert (same.pack, same.bytes_changed) == (None, 0)


def test_a_rewrap_that_was_killed_in_the_middle_is_completed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("old")
    with make_repository(tmp_path / "r", f"file:{tmp_path}/key") as made:
        store = made.store
        written: list[str] = []
        put = store.put

        def killed(key: str, content: bytes) -> None:
            if written:
                raise KeyboardInterrupt
            written.append(key)
            put(key, content)

        with monkeypatch.context() as patched:
            patched.setattr(store, "put", killed)
            with pytest.raises(KeyboardInterrupt):
                keyring.rewrap(store, b"old", b"new")
        with pytest.raises(RefusedError):
            keyring.load(store, b"", b"new")
        assert keyring.rewrap(store, b"old", b"new") == 2
        keyring.load(store, b"", b"new")


def test_of_two_who_make_a_repository_at_once_the_second_leaves_no_keys_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest key could be taken for the other's: all that was written would seem damaged."""
    (tmp_path / "key").write_text("secret")
    (tmp_path / "r").mkdir()
    uri, access = local_uri(tmp_path / "r", f"file:{tmp_path}/key"), Access(["/"], [])
    new_keys, kept = keyring.new_keys, list[str]()

    def late(store: ObjectStore, secret: bytes) -> list[str]:
        monkeypatch.setattr(keyring, "new_keys", new_keys)
        with Repository.init(uri, access) as winner:
            point_of(winner, b"x" * BLOCK_BYTES, [data(0, BLOCK_BYTES)])
            kept.extend(info.key for info in winner.store.list(KEYS))
        return new_keys(store, secret)

    monkeypatch.setattr(keyring, "new_keys", late)
    with pytest.raises(RefusedError, match="somebody else has just made a repository"):
        Repository.init(uri, access)
    with Repository.open(uri, access) as opened:
        assert [info.key for info in opened.store.list(KEYS)] == kept
        assert read_point(opened, "g") == b"x" * BLOCK_BYTES


def test_no_repository_is_made_over_keys_that_its_own_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of a making that was broken off; the new repository could be opened by nobody."""
    for name in ("one", "other"):
        (tmp_path / name).write_text(name)
    with monkeypatch.context() as patched:

        def killed(store: LocalStore, key: str, content: bytes) -> bool:
            raise KeyboardInterrupt

        patched.setattr(LocalStore, "put_if_absent", killed)
        with pytest.raises(KeyboardInterrupt):
            make_repository(tmp_path / "r", f"file:{tmp_path}/one")
    with pytest.raises(RefusedError, match="has keys of a repository whose making was broken off") as caught:
        make_repository(tmp_path / "r", f"file:{tmp_path}/other")
    assert "remove what is in keys/" in caught.value.remedy
    with make_repository(tmp_path / "r", f"file:{tmp_path}/one") as made:
        point_of(made, b"x" * BLOCK_BYTES, [data(0, BLOCK_BYTES)])
    with Repository.open(local_uri(tmp_path / "r", f"file:{tmp_path}/one"), Access(["/"], [])) as opened:
        assert read_point(opened, "g") == b"x" * BLOCK_BYTES


def test_what_is_written_under_a_newer_key_is_read_by_those_who_were_there_before(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    with make_repository(tmp_path / "r", f"file:{tmp_path}/key") as before:
        keyring.rotate(before.store, b"secret")
        with Repository.open(local_uri(tmp_path / "r", f"file:{tmp_path}/key"), Access(["/"], [])) as after:
            point_of(after, b"x" * BLOCK_BYTES, [data(0, BLOCK_BYTES)])
        assert read_point(before, "g") == b"x" * BLOCK_BYTES


def test_a_frame_that_says_it_is_huge_is_not_believed() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(100_000_000))
    with pytest.raises(ValueError, match="larger"):
        expanded(bomb, BLOCK_BYTES)
    assert expanded(zstandard.ZstdCompressor().compress(b"x" * 100), 100) == b"x" * 100


def test_what_differs_between_two_points_is_all_that_does(tmp_path: Path) -> None:
    """And what differs is told as data or as zeroes, whatever other block holds the same."""
    dice = random.Random(5)
    size = 3 * SEGMENT_BYTES + 12345
    data = bytearray(size)
    with make_repository(tmp_path / "r") as repository:
        history = []
        for _ in range(6):
            for _ in range(dice.randrange(1, 8)):
                block = dice.randrange(-(-size // BLOCK_BYTES))
                start = block * BLOCK_BYTES
                stop = min(size, start + BLOCK_BYTES * dice.randrange(1, 40))
                data[start:stop] = bytes(stop - start) if dice.random() < 0.3 else dice.randbytes(stop - start)
            history.append((backup(repository, "g", data), bytes(data)))
        for older, before in history:
            for newer, now in history:
                disk = repository.disk(newer, "disk")
                told = bytearray(before)
                for extent in disk.changes(repository.disk(older, "disk"), 0, size):
                    if extent.reads_as_zeroes:
                        told[extent.offset : extent.end] = bytes(extent.length)
                    else:
                        disk.read_into(extent.offset, memoryview(told)[extent.offset : extent.end])
                    assert before[extent.offset : extent.end] != now[extent.offset : extent.end], "it does not differ"
                assert told == now
