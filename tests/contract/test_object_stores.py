"""What every object store promises, asked of a directory, SeaweedFS and moto; then what only one of them can show."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from coordinator.model.errors import DiskIOError, FlushpointError, NotFoundError, RefusedError
from coordinator.model.repository_uri import RepositoryUri, parse_repository
from tests.object_servers import ObjectServer, client_of, running_moto, running_seaweedfs
from workers.repository.store import MissingObjectError, ObjectStore, ShortObjectError, open_store, probe
from workers.repository.store.contract import Buffer, ReadNext
from workers.repository.store.s3_upload import PART_BYTES

MIB = 1024 * 1024
BUCKET, LOCKED_BUCKET = "bucket", "locked-bucket"
S3_KINDS = ("seaweedfs", "moto")
KINDS = ("directory", *S3_KINDS)


Opener = Callable[[str, str, str], tuple[ObjectStore, Callable[[str], Any]]]


def make_buckets(server: ObjectServer) -> None:
    with closing(client_of(server)) as client:
        client.create_bucket(Bucket=BUCKET)
        client.create_bucket(Bucket=LOCKED_BUCKET, ObjectLockEnabledForBucket=True)


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[ObjectServer]:
    with running_seaweedfs() as server:
        make_buckets(server)
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[ObjectServer]:
    with running_moto() as server:
        make_buckets(server)
        yield server


def uri_of(kind: str, request: pytest.FixtureRequest) -> RepositoryUri:
    """A new, empty place in a store of that kind."""
    if kind == "directory":
        path: Path = request.getfixturevalue("tmp_path") / "repository"
        path.mkdir()
        return parse_repository(f"repo+file://{path}")
    server: ObjectServer = request.getfixturevalue(kind)
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server.uri(BUCKET, f"{secrets.token_hex(6)}/backups")


@pytest.fixture(params=KINDS)
def uri(request: pytest.FixtureRequest) -> RepositoryUri:
    return uri_of(request.param, request)


@pytest.fixture
def store(uri: RepositoryUri) -> Iterator[ObjectStore]:
    with closing(open_store(uri)) as store:
        yield store


@pytest.fixture
def open_in(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens a store of a kind in a bucket, with options of a URI; returns also what heads its objects with boto3."""
    opened: list[Any] = []

    def opener(kind: str, bucket: str, options: str) -> tuple[ObjectStore, Callable[[str], Any]]:
        uri_of(kind, request)
        server: ObjectServer = request.getfixturevalue(kind)
        uri = server.uri(bucket, secrets.token_hex(6), options)
        client, store = client_of(server), open_store(uri)
        opened.extend([client, store])
        return store, lambda key: client.head_object(Bucket=bucket, Key=f"{uri.prefix}/{key}")

    yield opener
    for closable in opened:
        closable.close()


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


# -- reading and writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100_001, MIB + 1], ids=["empty", "byte", "small", "waits_for_continue"])
def test_what_was_put_is_read_back(store: ObjectStore, size: int) -> None:
    data = secrets.token_bytes(size)
    store.put("packs/p1", data)
    assert store.get("packs/p1") == data
    assert store.size("packs/p1") == size


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_may_be_put(store: ObjectStore, kind: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
    store.put("a", kind(b"some bytes"))
    assert store.put_if_absent("b", kind(b"some bytes"))
    assert store.get("a") == store.get("b") == b"some bytes"


def test_put_replaces_the_whole_object(store: ObjectStore) -> None:
    store.put("keys/k", b"long, and first")
    store.put("keys/k", b"second")
    assert store.get("keys/k") == b"second"


def test_a_range_is_exactly_what_was_asked_for(store: ObjectStore) -> None:
    data = secrets.token_bytes(10_000)
    store.put("packs/p", data)
    assert store.get_range("packs/p", 0, 1) == data[:1]
    assert store.get_range("packs/p", 4_321, 1_234) == data[4_321:5_555]
    assert store.get_range("packs/p", 9_999, 1) == data[-1:]


def test_a_range_is_streamed_in_the_pieces_that_are_asked_for(store: ObjectStore) -> None:
    data = secrets.token_bytes(1_000_000)
    store.put("packs/p", data)
    pieces: list[bytes] = []
    store.stream_range(
        "packs/p", 10, 999_990, lambda read: pieces.extend(bytes(read(n)) for n in (1, 700_000, 299_989))
    )
    assert b"".join(pieces) == data[10:]
    store.stream_range("packs/p", 10, 999_990, lambda read: pieces.append(bytes(read(5))))  # and drops the rest
    assert pieces[-1] == data[10:15]


def test_an_error_of_who_reads_a_stream_is_passed_on_at_once(store: ObjectStore) -> None:
    store.put("packs/p", bytes(1_000_000))
    calls: list[Buffer] = []

    def fail(read: ReadNext) -> None:
        calls.append(read(10))
        raise DiskIOError("the target is full")

    with pytest.raises(DiskIOError, match="the target is full"):
        store.stream_range("packs/p", 0, 1_000_000, fail)
    assert len(calls) == 1
    assert store.get_range("packs/p", 0, 3) == bytes(3)


@pytest.mark.parametrize(("offset", "length"), [(9_990, 11), (10_000, 1), (20_000, 5)])
def test_a_range_beyond_the_end_is_an_error(store: ObjectStore, offset: int, length: int) -> None:
    store.put("packs/p", bytes(10_000))
    with pytest.raises(ShortObjectError, match=r"packs/p in .* ends"):
        store.get_range("packs/p", offset, length)
    with pytest.raises(ShortObjectError, match=r"packs/p in .* ends"):
        store.stream_range("packs/p", offset, length, lambda read: [read(1) for _ in range(length)] and None)


def test_an_absent_object_is_missing(store: ObjectStore) -> None:
    store.put("packs/other", b"x")
    with pytest.raises(MissingObjectError, match="no object packs/p in"):
        store.get("packs/p")
    with pytest.raises(MissingObjectError, match="no object packs/p in"):
        store.get_range("packs/p", 0, 1)
    with pytest.raises(MissingObjectError, match="no object packs/p in"):
        store.stream_range("packs/p", 0, 1, lambda read: None)
    assert store.size("packs/p") is None


def test_a_directory_of_keys_is_no_object(store: ObjectStore) -> None:
    store.put("disks/d/roots/r", b"x")
    with pytest.raises(MissingObjectError):
        store.get("disks/d")
    assert store.size("disks/d/roots") is None


def test_a_reader_sees_the_old_object_or_the_new_one(store: ObjectStore) -> None:
    versions = [bytes([number]) * 300_000 for number in range(8)]
    store.put("k", versions[0])

    def write() -> None:
        for version in versions:
            store.put("k", version)

    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(write)
        while not written.done():
            assert store.get("k") in versions
        written.result()
    assert store.get("k") == versions[-1]


def test_many_threads_may_use_one_store(store: ObjectStore) -> None:
    def work(number: int) -> bool:
        data = secrets.token_bytes(50_000 + number)
        store.put(f"packs/{number}", data)
        return store.get(f"packs/{number}") == data and store.size(f"packs/{number}") == len(data)

    with ThreadPoolExecutor(20) as threads:
        assert all(threads.map(work, range(60)))


# -- writing what must not be there yet ------------------------------------------------------------------


def test_an_object_that_is_there_is_not_replaced(store: ObjectStore) -> None:
    assert store.put_if_absent("groups/g/points/1.json", b"first")
    assert not store.put_if_absent("groups/g/points/1.json", b"second")
    assert store.get("groups/g/points/1.json") == b"first"


def test_a_deleted_object_is_absent(store: ObjectStore) -> None:
    store.put("holds/h", b"first")
    store.delete(["holds/h"])
    assert store.put_if_absent("holds/h", b"second")


@pytest.mark.parametrize("uri", ["directory", "seaweedfs"], indirect=True)  # moto looks before it writes
def test_of_many_writers_at_once_one_wins(store: ObjectStore) -> None:
    start = threading.Barrier(8)

    def write(number: int) -> bool:
        start.wait()
        return store.put_if_absent("decision", b"by %d" % number)

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(write, range(8)))
    assert won.count(True) == 1
    assert store.get("decision") == b"by %d" % won.index(True)


# -- uploads ---------------------------------------------------------------------------------------------

UPLOAD_SIZES = [0, 5, PART_BYTES, PART_BYTES + 1, 7 * PART_BYTES + 12_345]


@pytest.mark.parametrize("size", UPLOAD_SIZES, ids=["empty", "small", "one_part", "two_parts", "more_than_in_flight"])
def test_an_upload_is_what_was_written_though_the_buffer_is_reused(store: ObjectStore, size: int) -> None:
    pattern = secrets.token_bytes(3 * MIB + 7)
    buffer = bytearray(len(pattern))
    with store.upload("packs/p") as upload:
        for offset in range(0, size, len(pattern)):
            count = min(len(pattern), size - offset)
            buffer[:] = pattern
            upload.write(memoryview(buffer)[:count])
            buffer[:] = bytes(len(buffer))
        upload.commit()
    assert store.get("packs/p") == (pattern * (size // len(pattern) + 1))[:size]


@pytest.mark.parametrize("size", [5, 2 * PART_BYTES + 1], ids=["small", "parts"])
def test_nothing_is_seen_of_an_upload_before_its_commit(store: ObjectStore, size: int) -> None:
    with store.upload("packs/p") as upload:
        upload.write(bytes(size))
        assert store.size("packs/p") is None
        assert keys(store) == []
        upload.commit()
        assert store.size("packs/p") == size


@pytest.mark.parametrize("size", [5, 2 * PART_BYTES + 1], ids=["small", "parts"])
@pytest.mark.parametrize("ending", ["left", "failed"])
def test_an_upload_left_without_commit_leaves_nothing(store: ObjectStore, size: int, ending: str) -> None:
    with suppress(ZeroDivisionError), store.upload("packs/p") as upload:
        upload.write(bytes(size))
        if ending == "failed":
            raise ZeroDivisionError
    assert keys(store) == []
    assert store.abort_uploads(0) == 0


KILLED = """
import sys
from coordinator.model.repository_uri import parse_repository
from workers.repository.store import open_store
from workers.repository.store.s3_upload import PART_BYTES

store = open_store(parse_repository(sys.argv[1]))
with store.upload("packs/p") as upload:
    upload.write(bytes(7 * PART_BYTES))
    print("written", flush=True)
    sys.stdin.read()
"""


def test_an_uploader_killed_leaves_nothing_visible_and_its_remains_are_removed(
    store: ObjectStore, uri: RepositoryUri, tmp_path: Path
) -> None:
    # On S3 it dies by itself as soon as its first part is there; on a directory with all of it written.
    env = os.environ | {"FLUSHPOINT_FAILPOINT": f"part-sent:kill:{tmp_path / 'marker'}"}
    command = [sys.executable, "-c", KILLED, str(uri)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "marker").exists() == (uri.kind == "s3")
    assert store.size("packs/p") is None
    assert keys(store) == []
    assert store.abort_uploads(0) == 1
    assert store.abort_uploads(0) == 0


@pytest.mark.parametrize("uri", ["directory", "seaweedfs"], indirect=True)  # all uploads to moto began in 2010
def test_a_young_upload_is_not_aborted(store: ObjectStore) -> None:
    with store.upload("packs/p") as upload:
        upload.write(bytes(2 * PART_BYTES))
        assert store.abort_uploads(60) == 0
        upload.commit()
    assert store.size("packs/p") == 2 * PART_BYTES


def test_uploads_of_other_repositories_are_not_aborted(request: pytest.FixtureRequest) -> None:
    uri = uri_of("moto", request)
    with closing(open_store(replace(uri, prefix="neighbour"))) as neighbour, closing(open_store(uri)) as store:
        with neighbour.upload("packs/p") as upload:
            upload.write(bytes(PART_BYTES + 1))
            assert store.abort_uploads(0) == 0
            upload.commit()
        assert neighbour.size("packs/p") == PART_BYTES + 1


# -- listing and deleting --------------------------------------------------------------------------------


def test_a_listing_has_keys_sizes_and_times(store: ObjectStore) -> None:
    store.put("packs/a", b"1")
    store.put("packs/b", b"22")
    found = list(store.list("packs/"))
    assert [(info.key, info.size) for info in found] == [("packs/a", 1), ("packs/b", 2)]
    assert all(abs(datetime.now(UTC) - info.modified) < timedelta(minutes=1) for info in found)


def test_a_prefix_is_the_beginning_of_a_key_and_no_directory(store: ObjectStore) -> None:
    for key in ("a/x/1", "a/x-2", "a/x3", "a/y", "ab", "b"):
        store.put(key, b"x")
    assert sorted(keys(store, "a/x")) == ["a/x-2", "a/x/1", "a/x3"]
    assert keys(store, "a/x/") == ["a/x/1"]
    assert sorted(keys(store, "a")) == ["a/x-2", "a/x/1", "a/x3", "a/y", "ab"]
    for prefix in ("c", "a/yz", "a/x/1/", "none/of/these"):
        assert keys(store, prefix) == []


def test_a_directory_is_listed_in_order_over_many_pages(store: ObjectStore) -> None:
    expected = [f"packs/{number:06d}" for number in range(0, 2_010, 2)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: store.put(key, b"x"), reversed(expected)))
    assert keys(store, "packs/") == expected
    store.delete(expected[1:])
    assert keys(store) == expected[:1]


def test_a_repository_sees_its_own_objects_alone(request: pytest.FixtureRequest) -> None:
    for kind in S3_KINDS:
        uri = uri_of(kind, request)
        with closing(open_store(uri)) as store, closing(open_store(replace(uri, prefix=f"{uri.prefix}2"))) as other:
            other.put("packs/p", b"x")
            assert keys(store) == []
            assert store.size("packs/p") is None


def test_a_repository_may_be_a_whole_bucket(request: pytest.FixtureRequest) -> None:
    for kind in S3_KINDS:
        uri = uri_of(kind, request)
        with closing(open_store(replace(uri, prefix=""))) as store:
            key = f"{secrets.token_hex(4)}/k"
            store.put(key, b"x")
            assert store.name == f"s3://{BUCKET}"
            assert keys(store, key) == [key]


def test_deleting_what_is_not_there_is_no_error(store: ObjectStore) -> None:
    store.put("packs/a", b"x")
    store.delete(["packs/none", "packs/a", "packs/a"])
    store.delete([])
    assert keys(store) == []


# -- names -----------------------------------------------------------------------------------------------

BAD_KEYS = ["", "/etc/passwd", "../up", "p/../../up", "a//b", "a/", ".tmp/x", "a/./b", "a\0b", "a\n", "é", "a" * 901]
BAD_PREFIXES = ["/", "../", "a//", "a/../b", ".tmp/"]


def test_a_key_that_leads_elsewhere_is_refused(store: ObjectStore) -> None:
    calls: list[Callable[[str], object]] = [
        store.get,
        lambda key: store.get_range(key, 0, 1),
        lambda key: store.stream_range(key, 0, 1, lambda read: None),
        store.size,
        lambda key: store.put(key, b"x"),
        lambda key: store.put_if_absent(key, b"x"),
        store.upload,
        lambda key: store.delete([key]),
        store.extend_lock,
    ]
    for key in BAD_KEYS:
        for call in calls:
            with pytest.raises(RefusedError, match="is no key of an object"):
                call(key)
    for prefix in BAD_PREFIXES:
        with pytest.raises(RefusedError, match="is no prefix of keys"):
            keys(store, prefix)


def test_the_name_of_a_store_is_its_uri_without_options(store: ObjectStore, uri: RepositoryUri) -> None:
    assert store.name == str(uri).partition("?")[0]


def test_without_a_lock_extending_it_does_nothing(store: ObjectStore) -> None:
    store.put("packs/p", b"x")
    store.extend_lock("packs/p")
    store.put("packs/p", b"y")
    store.delete(["packs/p"])
    assert keys(store) == []


# -- what is not there at all ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", S3_KINDS)
def test_a_missing_bucket_is_not_mistaken_for_a_missing_object(kind: str, request: pytest.FixtureRequest) -> None:
    with closing(open_store(replace(uri_of(kind, request), bucket="nobody-made-it"))) as store:
        calls: list[Callable[[], object]] = [
            lambda: store.get("k"),
            lambda: store.size("k"),
            lambda: store.put("k", b"x"),
            lambda: store.put_if_absent("k", b"x"),
            lambda: keys(store),
            lambda: probe(store),
        ]
        for call in calls:
            with pytest.raises(NotFoundError, match="no bucket nobody-made-it for s3://nobody-made-it/") as caught:
                call()
            assert not isinstance(caught.value, MissingObjectError)


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no directory .*/none on this worker's host. Make it, or mount"):
        open_store(parse_repository(f"repo+file://{tmp_path}/none"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", "does not accept the worker's signature. Check AWS_SECRET"),
        ("AWS_ACCESS_KEY_ID", "nobody", "does not know the worker's access key. Check AWS_ACCESS"),
    ],
)
def test_wrong_credentials_are_refused_and_not_shown(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    uri = uri_of("seaweedfs", request)
    monkeypatch.setenv(name, value)
    with closing(open_store(uri)) as store, pytest.raises(RefusedError, match=message) as caught:
        store.get("k")
    assert not isinstance(caught.value, NotFoundError)
    assert value not in str(caught.value)


# -- probing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["directory", "seaweedfs"], indirect=True)
def test_a_good_store_is_found_good_and_left_clean(store: ObjectStore) -> None:
    findings = probe(store)
    assert findings.conditional_put
    assert findings.read_after_write
    assert findings.list_after_write
    assert findings.range_reads
    assert findings.cannot == ()
    assert keys(store) == []


# -- what AWS has and others may not ---------------------------------------------------------------------


def test_packs_alone_have_the_storage_class(open_in: Opener) -> None:
    store, head = open_in("moto", BUCKET, "storage-class=STANDARD_IA")
    for key in ("packs/small", "keys/k"):
        store.put(key, b"x")
    store.put("packs/big", bytes(PART_BYTES + 1))
    assert store.put_if_absent("packs/absent", b"x")
    classes = [head(key).get("StorageClass") for key in ("packs/small", "packs/big", "packs/absent", "keys/k")]
    assert classes == ["STANDARD_IA", "STANDARD_IA", "STANDARD_IA", None]


@pytest.mark.parametrize(
    ("options", "expected"),
    [("sse=AES256", ("AES256", None)), ("sse=aws:kms&sse-kms-key=my-key", ("aws:kms", "my-key"))],
)
def test_objects_are_encrypted_by_the_store_as_asked(
    open_in: Opener, options: str, expected: tuple[str, str | None]
) -> None:
    store, head = open_in("moto", BUCKET, options)
    store.put("small", b"x")
    store.put("big", bytes(PART_BYTES + 1))
    assert store.put_if_absent("absent", b"x")
    for key in ("small", "big", "absent"):
        assert (head(key)["ServerSideEncryption"], head(key).get("SSEKMSKeyId")) == expected


# moto forgets the lock of a multipart upload, but refuses an object without a checksum as AWS does.
@pytest.mark.parametrize(("kind", "sizes"), [("seaweedfs", [1, PART_BYTES + 1]), ("moto", [1])], ids=S3_KINDS)
def test_every_object_is_locked_for_the_configured_days(open_in: Opener, kind: str, sizes: list[int]) -> None:
    store, head = open_in(kind, LOCKED_BUCKET, "lock-mode=GOVERNANCE&lock-days=3")
    for size in sizes:
        store.put(f"packs/{size}", bytes(size))
    assert store.put_if_absent("decision", b"x")
    for key in ("decision", *(f"packs/{size}" for size in sizes)):
        assert head(key)["ObjectLockMode"] == "GOVERNANCE"
        assert ends_in(head(key)["ObjectLockRetainUntilDate"], timedelta(days=3))


@pytest.mark.parametrize("kind", S3_KINDS)
def test_a_lock_is_extended_from_now(open_in: Opener, kind: str) -> None:
    store, head = open_in(kind, LOCKED_BUCKET, "lock-mode=GOVERNANCE&lock-days=9")
    store.put("packs/p", b"x")
    first = head("packs/p")["ObjectLockRetainUntilDate"]
    while head("packs/p")["ObjectLockRetainUntilDate"] == first:  # it is kept in whole seconds
        store.extend_lock("packs/p")
    assert ends_in(head("packs/p")["ObjectLockRetainUntilDate"], timedelta(days=9))


def test_the_lock_of_a_missing_object_cannot_be_extended(open_in: Opener) -> None:
    store, _ = open_in("seaweedfs", LOCKED_BUCKET, "lock-mode=GOVERNANCE&lock-days=9")
    with pytest.raises(MissingObjectError):
        store.extend_lock("packs/none")


def ends_in(moment: datetime, duration: timedelta) -> bool:
    return abs(moment - datetime.now(UTC) - duration) < timedelta(minutes=1)


@pytest.mark.parametrize("kind", S3_KINDS)
def test_checksums_are_taken_by_servers_that_know_them(kind: str, request: pytest.FixtureRequest) -> None:
    uri = uri_of(kind, request)
    with closing(open_store(replace(uri, s3=replace(uri.s3, checksums="when_supported")))) as store:
        data = secrets.token_bytes(PART_BYTES + 5)
        store.put("packs/big", data)
        store.put("packs/small", data[:1000])
        assert store.put_if_absent("k", b"x")
        assert store.get("packs/big") == data
        assert store.get("packs/small") == data[:1000]
        store.delete(["packs/big", "packs/small"])
        assert keys(store) == ["k"]


# -- processes -------------------------------------------------------------------------------------------


def test_a_store_is_not_used_in_a_forked_child(request: pytest.FixtureRequest) -> None:
    with closing(open_store(uri_of("moto", request))) as store:
        store.put("k", b"x")
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                store.get("k")
            except RuntimeError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as said:
            assert b"was opened in another process" in said.read()
        os.waitpid(child, 0)


def test_the_store_package_does_not_import_boto3() -> None:
    program = "import sys, workers.repository.store; assert not {'boto3', 'botocore'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_errors_of_a_store_are_ours(store: ObjectStore) -> None:
    """Whoever retries a unit looks at FlushpointError alone."""
    with pytest.raises(FlushpointError):
        store.get_range("packs/none", 0, 1)
