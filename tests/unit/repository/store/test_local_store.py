"""A directory as an object store: what a crash, a full disk and an odd file system do to it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.model.errors import NotFoundError, RefusedError
from tests.contract.disks import small_tmpfs
from workers.repository.store import LocalStore, MissingObjectError, StoreError

MIB = 1024 * 1024


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "repository"
    path.mkdir()
    return path


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(str(root))


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_an_object_is_named_after_it_is_synced_and_its_directory_after_it_is_named(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("packs/first", b"makes the directories")
    events: list[str] = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def spy_fsync(fd: int) -> None:
        events.append("sync " + str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(root)).partition("/")[0])
        fsync(fd)

    def spy(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object, **named: object) -> None:
            events.append(name)
            real(*arguments, **named)

        return call

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy("rename", replace))
    monkeypatch.setattr(os, "link", spy("link", link))
    store.put("packs/p", b"data")
    assert events == ["sync .tmp", "rename", "sync packs"]
    events.clear()
    assert store.put_if_absent("packs/q", b"data")
    assert events == ["sync .tmp", "link", "sync packs"]
    events.clear()
    assert not store.put_if_absent("packs/q", b"other")
    assert events == ["sync .tmp", "link", "sync packs"]  # the caller will rely on what it has not written
    events.clear()
    store.delete(["packs/p", "packs/q"])
    assert events == ["sync packs"]


def test_directories_are_durable_before_anything_is_in_them(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()) or fsync(fd))
    (root / "a").mkdir()  # by another writer, which has not synced it yet
    store.put("a/b/k", b"x")
    assert {root, root / "a", root / "a/b"} <= set(synced)
    synced.clear()
    store.put("a/b/k", b"y")
    assert len(synced) == 2  # the file and its directory; the others are known to be durable


@pytest.mark.parametrize("call", ["put", "put_if_absent"])
def test_a_failed_sync_leaves_nothing_and_keeps_the_old(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store.put("k", b"old")
    store.put("packs/first", b"x")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(StoreError, match=r"cannot write packs/p in .*: Input/output error. Look at the kernel's log"):
        getattr(store, call)("packs/p", b"new")
    with pytest.raises(StoreError):
        store.put("k", b"new")
    monkeypatch.undo()
    assert files(root) == ["k", "packs/first"]
    assert store.get("k") == b"old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_file_system_is_recognised(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "write", failing(number))
    with pytest.raises(StoreError, match=r"cannot write k in .*. Make room there, or let retention") as caught:
        store.put("k", b"x")
    assert caught.value.errno == number
    assert files(root) == []


def test_a_really_full_file_system_keeps_what_it_has(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path, "2m") as mount:
        store = LocalStore(str(mount))
        store.put("packs/p", bytes(MIB))
        with pytest.raises(StoreError) as caught:
            store.put("packs/p", bytes(3 * MIB))
        assert caught.value.errno == errno.ENOSPC
        assert store.get("packs/p") == bytes(MIB)
        assert store.abort_uploads(0) == 0


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, "Permission denied. Give the worker's user read and write access to the whole directory"),
        (errno.EPERM, "Operation not permitted. Give the worker's user"),
        (errno.EROFS, "Read-only file system. Mount its file system for writing"),
    ],
)
def test_missing_rights_are_refused(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    store.put("k", b"x")
    monkeypatch.setattr(os, "open", failing(number))
    with pytest.raises(RefusedError, match=message):
        store.put("k", b"y")
    with pytest.raises(RefusedError, match=message):
        store.get("k")


def test_a_file_system_without_hard_links_is_named(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    with pytest.raises(StoreError, match=r"Operation not supported. Take a file system with hard links") as caught:
        store.put_if_absent("k", b"x")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert files(root) == []


def test_a_link_that_nfs_made_and_then_denied_is_ours(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def repeated(*arguments: object, **named: object) -> None:
        link(*arguments, **named)  # type: ignore[arg-type]
        raise FileExistsError(errno.EEXIST, "the answer to the first was lost")

    monkeypatch.setattr(os, "link", repeated)
    assert store.put_if_absent("k", b"mine")


def test_a_directory_that_went_away_is_named_by_every_call(root: Path, store: LocalStore) -> None:
    store.put("packs/p", b"x")
    root.rename(root.with_name("elsewhere"))
    calls: list[Callable[[], object]] = [
        lambda: store.get("packs/p"),
        lambda: store.size("packs/p"),
        lambda: store.put("packs/p", b"x"),
        lambda: store.put_if_absent("packs/q", b"x"),
        lambda: list(store.list("packs/")),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match=r"no directory .*/repository on this worker's host") as caught:
            call()
        assert not isinstance(caught.value, MissingObjectError)
    assert not root.exists()


def test_a_listing_is_sorted_by_whole_keys(store: LocalStore) -> None:
    expected = sorted(["a-b", "a/x/1", "a/x-2", "a/y", "a.c", "a0", "b"])
    for key in reversed(expected):
        store.put(key, b"x")
    assert [info.key for info in store.list("")] == expected


def test_a_listing_reads_a_directory_when_it_gets_there(root: Path, store: LocalStore) -> None:
    for key in ("a/1", "b/1", "c/1"):
        store.put(key, b"x")
    listing = store.list("")
    assert next(listing).key == "a/1"
    store.delete(["b/1"])
    assert [info.key for info in listing] == ["c/1"]


def test_what_is_no_object_is_not_shown(root: Path, store: LocalStore) -> None:
    store.put("packs/p", b"x")
    (root / "packs/link").symlink_to(root / "packs/p")
    os.mkfifo(root / "packs/fifo")
    assert [info.key for info in store.list("")] == ["packs/p"]
    with pytest.raises(StoreError):
        store.get("packs/link")
    with pytest.raises(MissingObjectError):
        store.get("packs/fifo")


def test_objects_are_for_their_owner_alone(root: Path, store: LocalStore) -> None:
    store.put("packs/p", b"x")
    assert (root / "packs/p").stat().st_mode & 0o777 == 0o600
    assert (root / "packs").stat().st_mode & 0o777 == 0o700


def test_an_upload_gives_its_descriptor_back(store: LocalStore) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        store.put("k", b"x")
        store.put_if_absent("k", b"x")
        with store.upload("left") as upload:
            upload.write(b"x")
        store.get("k")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


KILLED = """
import sys
from workers.repository.store import LocalStore

with LocalStore(sys.argv[1]).upload("packs/p") as upload:
    while True:
        upload.write(bytes(100_000))
        print("more", flush=True)
"""


def test_a_process_killed_in_mid_write_leaves_nothing_visible(root: Path, store: LocalStore) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(20):
            child.stdout.readline()
        child.kill()
    assert list(store.list("")) == []
    assert store.size("packs/p") is None
    assert len(files(root)) == 1
    assert store.abort_uploads(0) == 1
    assert files(root) == []
