"""The command before repositories that cannot be used, or not as asked: one message, its exit code, nothing changed."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from coordinator.model.point import tracking_bitmap
from tests.contract.disks import loop_device
from tests.object_servers import (
    ACCESS_KEY,
    SECRET_KEY,
    ObjectServer,
    client_of,
    make_bucket,
    running_seaweedfs,
)
from tests.repositories import backup, local_uri, make_repository
from tests.stack import MIB, QemuNbd, flushpoint, make_disk, random_disk, wait_until
from workers.repository.layout import plain_seal, point_key

BUCKET = "backups"
DAMAGED, REFUSED = 5, 3


@dataclass(frozen=True, slots=True)
class Host:
    """A user with an embedded stack of his own."""

    environ: Mapping[str, str]

    def flushpoint(self, *argv: object) -> subprocess.CompletedProcess[str]:
        return flushpoint(*argv, environ=self.environ)

    def succeeds(self, *argv: object) -> str:
        """What it writes to standard output."""
        done = self.flushpoint(*argv)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fails(self, code: int, *argv: object) -> str:
        """The one line that it writes to standard error; it writes nothing else."""
        done = self.flushpoint(*argv)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("flushpoint: ")
        return done.stderr


@contextmanager
def running_host(state: Path, **environ: str) -> Iterator[Host]:
    """Nothing of the environment's credentials or settings reaches it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FLUSHPOINT_"))}
    host = Host({**kept, "FLUSHPOINT_STATE_DIR": str(state), **environ})
    try:
        yield host
    finally:
        host.succeeds("down")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Its credentials are in profiles, none of which is the default."""
    directory = tmp_path_factory.mktemp("host")
    profiles = {
        "right": {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY},
        "wrong-secret": {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": "no-secret-of-theirs"},
        "stranger": {"aws_access_key_id": "AKIASTRANGER", "aws_secret_access_key": SECRET_KEY},
        "half": {"aws_access_key_id": ACCESS_KEY},
    }
    lines = [line for name, keys in profiles.items() for line in (f"[{name}]", *(f"{key}={keys[key]}" for key in keys))]
    (directory / "credentials").write_text("\n".join(lines))
    with running_host(
        directory / "state",
        AWS_SHARED_CREDENTIALS_FILE=str(directory / "credentials"),
        AWS_CONFIG_FILE=os.devnull,
        AWS_EC2_METADATA_DISABLED="true",
    ) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Place:
    """A repository in a directory, and a disk beside it."""

    directory: Path
    disk: Path

    @property
    def path(self) -> Path:
        return self.directory / "repository"

    @property
    def uri(self) -> str:
        return str(local_uri(self.path))


@pytest.fixture
def place(tmpfs_path: Path) -> Place:
    """Of one recovery point, g@1 of disk `disk`, which is the disk beside it."""
    place = Place(tmpfs_path, random_disk(tmpfs_path / "disk.img", 3 * MIB))
    with make_repository(place.path) as made:
        backup(made, "g", place.disk.read_bytes())
    return place


def tree(directory: Path) -> dict[str, bytes]:
    """Every file, by its path and content."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def joined(uri: str, options: str) -> str:
    return f"{uri}{'&' if '?' in uri else '?'}{options}"


def users_of(uri: str, disk: Path, back: Path) -> list[tuple[object, ...]]:
    """Commands that a repository serves: a job that writes it, a task, and a reader that needs no worker."""
    return [
        ("mirror", disk, joined(uri, "group=g")),
        ("restore", "g", "--to", back, "-r", uri),
        ("serve", "g", "-r", uri),
    ]


# -- S3: who asks, and where -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bucket:
    """One of SeaweedFS, with a repository at `prefix` that has the point g@1."""

    server: ObjectServer

    def uri(self, profile: str, *, bucket: str = BUCKET, endpoint: str = "") -> str:
        server = ObjectServer(endpoint or self.server.endpoint, 0)
        return str(server.uri(bucket, "prefix", f"profile={profile}" if profile else ""))

    def objects(self) -> dict[str, str]:
        """Keys of all there are, and what tells one content from another."""
        with closing(client_of(self.server)) as client:
            assert [b["Name"] for b in client.list_buckets()["Buckets"]] == [BUCKET]
            return {o["Key"]: o["ETag"] for o in client.list_objects_v2(Bucket=BUCKET)["Contents"]}


@pytest.fixture(scope="module")
def bucket(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with running_seaweedfs() as server:
        make_bucket(server, BUCKET)
        bucket = Bucket(server)
        host.succeeds("repository", "init", bucket.uri("right"))
        disk = random_disk(tmp_path_factory.mktemp("bucket") / "disk.img", MIB)
        host.succeeds("mirror", disk, joined(bucket.uri("right"), "group=g"))
        yield bucket


@contextmanager
def as_nobody(bucket: Bucket) -> Iterator[str]:
    yield bucket.uri("")


@contextmanager
def with_half_of_the_credentials(bucket: Bucket) -> Iterator[str]:
    yield bucket.uri("half")


@contextmanager
def with_a_wrong_secret_key(bucket: Bucket) -> Iterator[str]:
    yield bucket.uri("wrong-secret")


@contextmanager
def with_a_wrong_access_key(bucket: Bucket) -> Iterator[str]:
    yield bucket.uri("stranger")


@contextmanager
def to_a_missing_bucket(bucket: Bucket) -> Iterator[str]:
    yield bucket.uri("right", bucket="other-backups")


@contextmanager
def with_a_clock_an_hour_slow(bucket: Bucket) -> Iterator[str]:
    """By a proxy that dates every request back, which the server looks at before the signature."""
    there = urlsplit(bucket.server.endpoint).netloc

    class Proxy(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
            self.headers.replace_header("X-Amz-Date", an_hour_ago.strftime("%Y%m%dT%H%M%SZ"))
            with closing(http.client.HTTPConnection(there, timeout=30)) as connection:
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                said = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield bucket.uri("right", endpoint=f"http://127.0.0.1:{proxy.server_port}")
        finally:
            proxy.shutdown()
            thread.join()


LOCKED_OUT = [
    (as_nobody, "no credentials for s3://backups/prefix", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    (with_half_of_the_credentials, "only half of the credentials", "both in its profile"),
    (with_a_wrong_secret_key, "does not accept the worker's signature", "Check AWS_SECRET_ACCESS_KEY or profile="),
    (with_a_wrong_access_key, "does not know the worker's access key", "Check AWS_ACCESS_KEY_ID"),
    (to_a_missing_bucket, "there is no bucket other-backups", "Make it, or check endpoint="),
    (with_a_clock_an_hour_slow, "the clocks of the worker's host and of s3://backups/prefix", "by NTP"),
]


@pytest.mark.parametrize(("asked", "problem", "remedy"), LOCKED_OUT, ids=[case[0].__name__ for case in LOCKED_OUT])
def test_a_bucket_that_does_not_let_us_in_is_told_with_what_to_put_right(
    host: Host,
    bucket: Bucket,
    tmp_path: Path,
    asked: Callable[[Bucket], AbstractContextManager[str]],
    problem: str,
    remedy: str,
) -> None:
    """To whoever writes and whoever reads; no secret is in what is said."""
    disk, back = random_disk(tmp_path / "disk.img", MIB), tmp_path / "back.img"
    before = bucket.objects()
    with asked(bucket) as uri:
        for command in [("repository", "init", uri), *users_of(uri, disk, back)]:
            said = host.fails(REFUSED, *command)
            assert problem in said
            assert remedy in said
            assert SECRET_KEY not in said
            assert "no-secret-of-theirs" not in said
    assert bucket.objects() == before
    assert not back.exists()


# -- keys and formats ------------------------------------------------------------------------------------------------


@pytest.fixture
def encrypted(tmpfs_path: Path) -> Place:
    """As `place`, by the key in the file `key`; another key is in `other`."""
    place = Place(tmpfs_path, random_disk(tmpfs_path / "disk.img", MIB))
    (tmpfs_path / "key").write_text("the right passphrase")
    (tmpfs_path / "other").write_text("quite another one")
    with make_repository(place.path, f"file:{tmpfs_path}/key") as made:
        backup(made, "g", place.disk.read_bytes())
    return place


@pytest.mark.parametrize(
    ("key", "problem", "remedy"),
    [
        ("", "is encrypted, and no key was named", "Add key=env:NAME, key=file:/path"),
        ("key=file:{}/other", "the key given does not open the repository", "Name the key it was made with, by key="),
        ("key=file:{}/absent", "absent does not exist", "Check the path on the worker's host"),
    ],
    ids=["none", "wrong", "absent"],
)
def test_an_encrypted_repository_opens_to_its_key_alone(
    host: Host, encrypted: Place, key: str, problem: str, remedy: str
) -> None:
    uri = joined(encrypted.uri, key.format(encrypted.directory)) if key else encrypted.uri
    back = encrypted.directory / "back.img"
    before = tree(encrypted.path)
    for command in users_of(uri, encrypted.disk, back):
        said = host.fails(REFUSED, *command)
        assert problem in said
        assert remedy in said
        assert "passphrase" not in said
        assert "quite another one" not in said
    assert tree(encrypted.path) == before
    assert not back.exists()


def test_a_key_for_a_repository_that_is_not_encrypted_is_refused(host: Host, place: Place) -> None:
    """Whoever names one believes that what he stores is encrypted."""
    (place.directory / "key").write_text("a passphrase")
    before = tree(place.path)
    back = place.directory / "back.img"
    for command in users_of(f"{place.uri}?key=file:{place.directory}/key", place.disk, back):
        said = host.fails(REFUSED, *command)
        assert f"{place.uri} is not encrypted, and a key was named. Leave out key=" in said
    assert tree(place.path) == before
    assert not back.exists()


def test_a_repository_of_a_newer_format_is_refused_by_its_number(host: Host, place: Place) -> None:
    """By everything that would read or write it, and init does not make another over it."""
    path = place.path / "repository.json"
    newer = {**json.loads(path.read_text()), "format": 2, "what_format_1_knows_nothing_of": True}
    path.write_text(json.dumps({**newer, "seal": plain_seal(newer)}))
    before = tree(place.path)
    back = place.directory / "back.img"
    for command in [*users_of(place.uri, place.disk, back), ("repository", "init", place.uri)]:
        said = host.fails(REFUSED, *command)
        assert f"{place.uri} has format 2, and this program knows up to 1" in said
        assert "Use a newer version of Flushpoint" in said
    assert tree(place.path) == before
    assert not back.exists()


def test_init_makes_no_repository_over_another(host: Host, place: Place) -> None:
    before = tree(place.path)
    for uri in (place.uri, f"{place.uri}?key=file:{place.disk}"):
        said = host.fails(REFUSED, "repository", "init", uri)
        assert f"there is a repository at {place.uri} already. Use it, or name another place" in said
    assert tree(place.path) == before


# -- two at once -----------------------------------------------------------------------------------------------------


@contextmanager
def slow_writer(host: Host, place: Place) -> Iterator[str]:
    """The id of a job that is in the middle of writing g@2; at the end it is let run, and its point has to be there."""
    large = random_disk(place.directory / "large.img", 32 * MIB)
    job = host.succeeds("mirror", large, f"{place.uri}?group=g", "--speed", "256K", "--detach").strip()
    wait_until(lambda: any((place.path / "holds").glob("epoch-*.json")), "the hold of its epoch")
    yield job
    assert points(host, place.uri) == [1], "the first one is still at it"
    host.succeeds("set-speed", job, "0")
    host.succeeds("job", job, "--wait")
    assert points(host, place.uri) == [1, 2]
    assert "2 points" in host.succeeds("repository", "check", place.uri, "--data")
    host.succeeds("restore", "g@2", "--to", place.directory / "back.img", "-r", place.uri)
    assert (place.directory / "back.img").read_bytes() == large.read_bytes()


def points(host: Host, uri: str) -> list[int]:
    return [point["epoch"] for point in json.loads(host.succeeds("points", "g", "-r", uri, "--json"))]


def orphans(host: Host, uri: str) -> int:
    found: int = json.loads(host.succeeds("repository", "check", uri, "--json"))["orphans"]
    return found


def test_of_two_writers_of_one_group_the_second_is_refused_and_the_first_published(host: Host, place: Place) -> None:
    with slow_writer(host, place) as job:
        for source in (place.directory / "large.img", place.disk):  # the same disk, and another of the group
            said = host.fails(REFUSED, "mirror", source, f"{place.uri}?group=g")
            assert f"job {job} is writing group 'g' in {place.uri}" in said
            assert "Wait until it has concluded, or cancel it" in said
    assert orphans(host, place.uri) == 0
    host.succeeds("mirror", place.disk, f"{place.uri}?group=g&disk=disk")
    assert points(host, place.uri) == [1, 2, 3]


def test_of_two_coordinators_the_second_is_refused_by_the_hold_of_the_first(host: Host, place: Place) -> None:
    """They know nothing of each other but what is in the repository."""
    with running_host(place.directory / "second") as second:
        with slow_writer(host, place) as job:
            said = second.fails(REFUSED, "mirror", place.disk, f"{place.uri}?group=g&disk=disk")
            who = f"job {job} on {socket.gethostname()}"
            assert f"{who} is writing epoch 2 of group 'g' in {place.uri}, last heard of 0 min ago" in said
            assert "Wait for it or cancel it; if it is dead, remove holds/epoch-g-0000000002.json" in said
        assert orphans(second, place.uri) == 0
        second.succeeds("mirror", place.disk, f"{place.uri}?group=g&disk=disk")
        assert points(host, place.uri) == points(second, place.uri) == [1, 2, 3]


# -- what is not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "number", "disk", "names"),
    [
        ("g", "9", "", ["'g' has no", "point 9", "the newest are", "1"]),
        ("nobody", "", "", ["group 'nobody'", "flushpoint repository scan"]),
        ("g", "1", "other", ["no disk 'other'", "it has", "disk"]),
    ],
    ids=["point", "group", "disk"],
)
def test_what_does_not_exist_is_not_found_and_what_does_is_named(
    host: Host, place: Place, group: str, number: str, disk: str, names: list[str]
) -> None:
    back = place.directory / "back.img"
    before = tree(place.path)
    point = f"{group}@{number}" if number else group
    chosen = ("--disk", disk) if disk else ()
    uri = f"{place.uri}?group={group}" + (f"&point={number}" if number else "") + (f"&disk={disk}" if disk else "")
    for command in [
        ("restore", point, "--to", back, "-r", place.uri, *chosen),
        ("verify", point, "-r", place.uri, *chosen),
        ("serve", point, "-r", place.uri, *chosen),
        ("mirror", uri, back),
    ]:
        said = host.fails(REFUSED, *command)
        for name in names:
            assert name.lower() in said.lower(), said
    assert not back.exists()
    assert tree(place.path) == before, "not even a hold is left"


def test_a_directory_without_a_repository_is_not_made_one(host: Host, tmpfs_path: Path) -> None:
    disk, back = random_disk(tmpfs_path / "disk.img", MIB), tmpfs_path / "back.img"
    (tmpfs_path / "empty").mkdir()
    for command in users_of(f"repo+file://{tmpfs_path}/empty", disk, back):
        said = host.fails(REFUSED, *command)
        assert f"there is no repository at repo+file://{tmpfs_path}/empty" in said
        assert "Make one with flushpoint repository init, or check the URI" in said
    assert tree(tmpfs_path / "empty") == {}
    assert not back.exists()


# -- damage ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Points:
    """g@1 and g@2 of one disk, which held `first` and `second`, and h@1; what writing g@2 added to the repository."""

    place: Place
    first: bytes
    second: bytes
    pack: Path
    root: Path


@pytest.fixture
def points_of_two(tmpfs_path: Path) -> Points:
    place = Place(tmpfs_path, tmpfs_path / "disk.img")
    first = random.Random(7).randbytes(3 * MIB)
    second = first[:MIB] + random.Random(8).randbytes(MIB) + first[2 * MIB :]
    place.disk.write_bytes(second)
    with make_repository(place.path) as made:
        backup(made, "g", first)
        before = tree(place.path).keys()
        backup(made, "g", second, "compare")
        added = {name.partition("/")[0]: place.path / name for name in tree(place.path).keys() - before}
        backup(made, "h", random.Random(9).randbytes(MIB))
    return Points(place, first, second, added["packs"], added["disks"])


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("part", ["pack", "root"])
@pytest.mark.parametrize("harm", [truncated, Path.unlink], ids=["truncated", "missing"])
def test_damage_is_code_5_by_name_harms_no_other_point_and_is_mended_by_the_next_backup(
    host: Host, points_of_two: Points, part: str, harm: Callable[[Path], None]
) -> None:
    place, harmed = points_of_two.place, points_of_two.pack if part == "pack" else points_of_two.root
    harm(harmed)
    name = str(harmed.relative_to(place.path))
    before = tree(place.path)
    back = place.directory / "back.img"

    said = host.fails(DAMAGED, "verify", "g@2", "-r", place.uri)
    assert name in said
    assert "is damaged. Run flushpoint repository check" in said
    assert "point=2 was not found sound" in said
    said = host.fails(DAMAGED, "restore", "g@2", "--to", back, "-r", place.uri)
    assert name in said
    if part == "root":  # before anything was touched
        assert said.endswith(f"Nothing was copied to {back}\n")
        assert not back.exists()
        assert name in host.fails(DAMAGED, "serve", "g@2", "-r", place.uri)
    else:
        assert said.endswith(f"{back} is no whole copy\n")
        back.unlink()

    host.succeeds("verify", "h", "-r", place.uri)
    host.succeeds("restore", "g@1", "--to", back, "-r", place.uri)
    assert back.read_bytes() == points_of_two.first
    assert tree(place.path) == before, "not even a hold is left"

    assert harmed_points(host, place.uri, name) == {"g@2"}
    host.succeeds("mirror", place.disk, f"{place.uri}?group=g", "--sync", "incremental")
    host.succeeds("restore", "g@3", "--to", back, "--update", "-r", place.uri)
    assert back.read_bytes() == points_of_two.second


def harmed_points(host: Host, uri: str, name: str) -> set[str]:
    """Those that a check tells of, all of whose findings are about `name`."""
    done = host.flushpoint("repository", "check", uri)
    assert done.returncode == DAMAGED, done
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
    assert "the next backups store it anew" in done.stderr
    head, *findings = [line.split() for line in done.stdout.splitlines()]
    assert head == ["POINTS", "DAMAGE"]
    assert all(name in words for words in findings)
    return {points for points, *_ in findings} - {"none"}


def test_a_damaged_manifest_hides_no_other_point(host: Host, points_of_two: Points) -> None:
    """Nor is an older point taken for the newest, unasked."""
    place = points_of_two.place
    manifest = place.path / point_key("g", 2)
    truncated(manifest)
    back = place.directory / "back.img"
    for point in ("g", "g@2"):
        said = host.fails(DAMAGED, "restore", point, "--to", back, "-r", place.uri)
        assert f"the record in {point_key('g', 2)} is damaged. The newest that can be read are 1" in said
    assert not back.exists()
    host.succeeds("restore", "g@1", "--to", back, "-r", place.uri)
    assert back.read_bytes() == points_of_two.first
    listed = host.flushpoint("points", "g", "-r", place.uri, "--json")
    assert listed.returncode == DAMAGED
    assert [point["epoch"] for point in json.loads(listed.stdout)] == [1]
    assert point_key("g", 2) in listed.stderr


def test_a_bitmap_adds_nothing_to_a_point_that_is_damaged(host: Host, points_of_two: Points) -> None:
    """It says what differs from just that one, so that no other can stand in for it."""
    place = points_of_two.place
    image = place.directory / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", place.disk, image)
    run("qemu-img", "bitmap", "--add", image, "b0")
    points_of_two.root.unlink()
    said = host.fails(REFUSED, "mirror", image, f"{place.uri}?group=g&disk=disk", "--sync", "dirty", "--bitmap", "b0")
    assert str(points_of_two.root.relative_to(place.path)) in said
    assert "Copy the disk with --sync incremental" in said
    assert points(host, place.uri) == [1, 2]
    host.succeeds("mirror", image, f"{place.uri}?group=g&disk=disk", "--sync", "incremental")
    host.succeeds("verify", "g@4", "-r", place.uri)


def tracked(place: Place, content: bytes, bitmap: str) -> Path:
    """A qcow2 image of these bytes with a bitmap that knows of nothing written yet."""
    raw, image = place.directory / "tracked.img", place.directory / "tracked.qcow2"
    raw.write_bytes(content)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    run("qemu-img", "bitmap", "--add", image, bitmap)
    return image


def bitmap_of_point(place: Place, epoch: int) -> str:
    return tracking_bitmap(json.loads((place.path / "repository.json").read_text())["id"], "g", epoch)


def newest(host: Host, uri: str) -> dict[str, Any]:
    """The one disk of the group's newest point, as it is told, also if an older one is damaged."""
    listed = host.flushpoint("points", "g", "-r", uri, "--json")
    assert listed.returncode in (0, DAMAGED), listed
    (member,) = json.loads(listed.stdout)[-1]["members"]
    found: dict[str, Any] = member
    return found


def restored(host: Host, place: Place) -> bytes:
    back = place.directory / "back.img"
    host.succeeds("restore", "g", "--to", back, "--overwrite", "-r", place.uri)
    return back.read_bytes()


def test_a_bitmap_of_the_point_whose_decision_is_damaged_is_not_taken_for_one_of_an_older_point(
    host: Host, points_of_two: Points
) -> None:
    """Nothing was written since g@2, so that nothing would be read, and the copy be that of g@1."""
    place = points_of_two.place
    truncated(place.path / point_key("g", 2))
    image = tracked(place, points_of_two.second, "b0")
    target = f"{place.uri}?group=g&disk=disk"
    said = host.fails(REFUSED, "mirror", image, target, "--sync", "dirty", "--bitmap", "b0")
    assert "the decision about epoch 2 of group 'g' was found damaged" in said
    assert "Copy the disk with --sync incremental" in said
    host.succeeds("mirror", image, target, "--sync", "incremental", "--bitmap", "b0")
    assert newest(host, place.uri)["parent"] == 1
    assert newest(host, place.uri)["reason"].endswith(
        "epoch 2 of group 'g' was found damaged, so all of it was compared"
    )
    assert restored(host, place) == points_of_two.second
    host.succeeds("mirror", image, target, "--sync", "incremental", "--bitmap", "b0")
    assert newest(host, place.uri)["reason"] == "by bitmap 'b0'", "it adds to what was made of the image just now"


def test_a_bitmap_that_is_named_for_the_parent_is_read_past_a_damaged_decision(
    host: Host, points_of_two: Points
) -> None:
    place = points_of_two.place
    truncated(place.path / point_key("g", 2))
    bitmap = bitmap_of_point(place, 1)
    image = tracked(place, points_of_two.first, bitmap)
    (place.directory / "piece").write_bytes(points_of_two.second[MIB : 2 * MIB])
    run("qemu-io", "-f", "qcow2", "-c", f"write -s {place.directory}/piece 1M 1M", image)
    host.succeeds("mirror", image, f"{place.uri}?group=g&disk=disk", "--sync", "incremental")
    told = newest(host, place.uri)
    assert (told["reason"], told["bytes_read"]) == (f"by bitmap {bitmap!r}", MIB)
    assert restored(host, place) == points_of_two.second


def flip_in_root(points: Points, part: str) -> None:
    """A bit of its one page, or of the directory, which lies behind it."""
    manifest = json.loads((points.place.path / point_key("g", 2)).read_text())
    root = bytearray(points.root.read_bytes())
    root[manifest["members"][0]["directory_offset"] + (5 if part == "directory" else -5)] ^= 1
    points.root.write_bytes(root)


@pytest.mark.parametrize(("part", "done"), [("page", "compared"), ("directory", "stored")])
def test_a_damaged_part_of_the_newest_root_is_mended_by_the_next_incremental_whatever_its_bitmap_says(
    host: Host, points_of_two: Points, part: str, done: str
) -> None:
    place = points_of_two.place
    image = tracked(place, points_of_two.second, bitmap_of_point(place, 2))
    flip_in_root(points_of_two, part)
    said = host.fails(DAMAGED, "verify", "g@2", "-r", place.uri)
    assert f"{part} in {points_of_two.root.relative_to(place.path)}" in said
    host.succeeds("mirror", image, f"{place.uri}?group=g&disk=disk", "--sync", "incremental")
    assert newest(host, place.uri)["reason"] == f"the newest recovery point is damaged, so all of it was {done}"
    assert restored(host, place) == points_of_two.second


def test_a_damaged_page_is_no_ground_for_a_bitmap_alone(host: Host, points_of_two: Points) -> None:
    place = points_of_two.place
    image = tracked(place, points_of_two.second, "b0")
    flip_in_root(points_of_two, "page")
    said = host.fails(REFUSED, "mirror", image, f"{place.uri}?group=g&disk=disk", "--sync", "dirty", "--bitmap", "b0")
    assert f"a page in {points_of_two.root.relative_to(place.path)}" in said
    assert "Copy the disk with --sync incremental" in said


def test_a_damaged_manifest_stops_a_prune_until_that_is_told_to_forget_it(host: Host, points_of_two: Points) -> None:
    place = points_of_two.place
    truncated(place.path / point_key("g", 2))
    before = tree(place.path)
    prune = ("prune", "g", "-r", place.uri, "--keep-last", "5")
    for command in (prune, (*prune, "--dry-run")):
        said = host.fails(DAMAGED, *command)
        assert (
            f"the record in {point_key('g', 2)} is damaged. Put back a copy of that object, or give the point up"
            in said
        )
        assert "what only it leads to, by flushpoint prune g --forget-damaged" in said
    told = host.succeeds(*prune, "--forget-damaged", "--dry-run")
    assert told == "keep   g@1  newest, last\nwould forget g@2  damaged\n"
    assert tree(place.path) == before
    assert "\nforget g@2  damaged\n" in host.succeeds(*prune, "--forget-damaged")
    assert points(host, place.uri) == [1]
    host.succeeds("mirror", place.disk, f"{place.uri}?group=g", "--sync", "incremental")
    assert points(host, place.uri) == [1, 3], "the number of what was forgotten is not given again"
    assert restored(host, place) == points_of_two.second
    host.succeeds(*prune)
    assert orphans(host, place.uri) == 0
    assert "3 points" in host.succeeds("repository", "check", place.uri, "--data")


# -- where a point is restored to ------------------------------------------------------------------------------------

SMALL = MIB
"""Bytes of a target; the point has three times as many."""


@dataclass(frozen=True, slots=True)
class Target:
    """As it is named, the bytes behind it, and the options with which it is refused."""

    name: str | Path
    content: Path
    options: tuple[str, ...] = ()


@contextmanager
def file_with_data(directory: Path) -> Iterator[Target]:
    image = random_disk(directory / "target.img", SMALL)
    yield Target(image, image)


@contextmanager
def file_with_as_much_data(directory: Path) -> Iterator[Target]:
    image = random_disk(directory / "target.img", 3 * MIB)
    yield Target(image, image)


@contextmanager
def hole_too_small(directory: Path) -> Iterator[Target]:
    image = make_disk(directory / "target.img", SMALL, {})
    yield Target(image, image)


@contextmanager
def file_too_small_to_be_an_older_copy(directory: Path) -> Iterator[Target]:
    image = random_disk(directory / "target.img", SMALL)
    yield Target(image, image, ("--update",))


@contextmanager
def qcow2_with_data(directory: Path) -> Iterator[Target]:
    image = directory / "target.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", random_disk(directory / "raw.img", SMALL), image)
    yield Target(image, image)


@contextmanager
def device_too_small(directory: Path) -> Iterator[Target]:
    """A device is written as it is, so that there is nothing to allow."""
    image = random_disk(directory / "target.img", SMALL)
    with loop_device(image) as device:
        yield Target(device, image, ("--overwrite",))


@contextmanager
def export_too_small(directory: Path) -> Iterator[Target]:
    image = random_disk(directory / "target.img", SMALL)
    with QemuNbd(image) as server:
        yield Target(server.uri, image, ("--overwrite",))


@contextmanager
def export_too_small_to_be_an_older_copy(directory: Path) -> Iterator[Target]:
    image = random_disk(directory / "target.img", SMALL)
    with QemuNbd(image) as server:
        yield Target(server.uri, image, ("--update",))


NO_PLACES = [
    (file_with_data, "exists and holds data. Give --overwrite to lose it, or name another target"),
    (file_with_as_much_data, "exists and holds data. Give --overwrite to lose it, or name another target"),
    (qcow2_with_data, "exists and holds data. Give --overwrite to lose it, or name another target"),
    (hole_too_small, "has 1048576 bytes, not the 3145728 bytes of the source. Give --overwrite to cut it to size"),
    (file_too_small_to_be_an_older_copy, "has 1048576 bytes and the source 3145728: it is no older copy of it"),
    (device_too_small, "has 1048576 bytes, less than the 3145728 bytes of the source. Name a larger target"),
    (export_too_small, "has 1048576 bytes, less than the 3145728 bytes of the source. Name a larger target"),
    (export_too_small_to_be_an_older_copy, "has 1048576 bytes, less than the 3145728 bytes of the source"),
]


@pytest.mark.needs("qemu-nbd", "qemu-img", "losetup")
@pytest.mark.parametrize(("target", "why"), NO_PLACES, ids=[case[0].__name__ for case in NO_PLACES])
def test_a_target_that_is_no_place_for_the_point_is_refused_and_left_alone(
    host: Host, place: Place, target: Callable[[Path], AbstractContextManager[Target]], why: str
) -> None:
    before = tree(place.path)
    with target(place.directory) as chosen:
        content = chosen.content.read_bytes()
        said = host.fails(REFUSED, "restore", "g", "--to", chosen.name, "-r", place.uri, *chosen.options)
        assert f"{chosen.name} " in said
        assert why in said
        assert said.endswith(f"Nothing was copied to {chosen.name}\n")
        assert chosen.content.read_bytes() == content
    assert tree(place.path) == before


def run(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=30)
