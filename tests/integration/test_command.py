"""The command against a running deployment: exit codes, messages, and what stays as it was."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.model.job import State
from tests.stack import MIB, QemuNbd, Stack, Writer, random_disk, running_stack, same_bytes, wait_until
from tests.stack import flushpoint as command

pytestmark = pytest.mark.needs("qemu-nbd", "qemu-img", "qemu-io")
SIZE = 2 * MIB


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only directory that the workers may use."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), env={"FLUSHPOINT_ALLOWED_ROOTS": str(root)}) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Place:
    """Where a test has its disks: inside the allowed root, and outside."""

    inside: Path
    outside: Path
    source: Path


@pytest.fixture
def place(root: Path, tmp_path: Path) -> Place:
    inside = root / tmp_path.name
    inside.mkdir()
    return Place(inside, tmp_path, random_disk(inside / "source.img", SIZE))


def flushpoint(stack: Stack, *argv: object) -> subprocess.CompletedProcess[str]:
    return command(*argv, environ={**os.environ, "FLUSHPOINT_API": f"unix://{stack.api_socket}"})


def qemu(*command: object) -> None:
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=30)


# -- bad input: what `mirror` is told to read, and where ------------------------------------------------------------


@contextmanager
def missing(place: Place) -> Iterator[list[str]]:
    yield [str(place.inside / "missing.img")]


@contextmanager
def outside_the_roots(place: Place) -> Iterator[list[str]]:
    yield [str(random_disk(place.outside / "elsewhere.img", SIZE))]


@contextmanager
def inconsistent_bitmap(place: Place) -> Iterator[list[str]]:
    """Its writer died before it could store the bitmap."""
    image = place.inside / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)
    qemu("qemu-img", "bitmap", "--add", image, "b0")
    server = QemuNbd(image, image_format="qcow2")
    qemu("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", server.uri)  # it answers, so it has the image open
    server.kill()
    yield [str(image), "--sync", "dirty", "--bitmap", "b0"]


@contextmanager
def no_nbd_server(place: Place) -> Iterator[list[str]]:
    """Another service, which says something of its own."""
    path = place.inside / "http.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with listener.accept()[0] as peer:
                        peer.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield [f"nbd+unix:///?socket={path}"]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("bad_source", "code", "names"),
    [
        (missing, 3, ["missing.img", "does not exist"]),
        (outside_the_roots, 3, ["elsewhere.img is outside the worker's allowed roots", "FLUSHPOINT_ALLOWED_ROOTS"]),
        (inconsistent_bitmap, 3, ["bitmap 'b0'", "is inconsistent", "--sync incremental"]),
        (no_nbd_server, 3, ["http.sock", "NBD"]),
    ],
)
def test_a_bad_source_is_refused_by_name_and_leaves_the_target_alone(
    stack: Stack,
    place: Place,
    bad_source: Callable[[Place], AbstractContextManager[list[str]]],
    code: int,
    names: list[str],
) -> None:
    """Although its user allows it to be overwritten."""
    target = random_disk(place.inside / "target.img", 3 * MIB)
    before = target.read_bytes()
    with bad_source(place) as words:
        source, *options = words
        done = flushpoint(stack, "mirror", source, target, "--overwrite", *options)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(f". Nothing was copied to {target}\n")
    for name in names:
        assert name in done.stderr
    assert target.read_bytes() == before


def test_a_target_outside_the_roots_is_refused_and_left_alone(stack: Stack, place: Place) -> None:
    target = random_disk(place.outside / "target.img", 3 * MIB)
    before = target.read_bytes()
    done = flushpoint(stack, "mirror", place.source, target, "--overwrite", "--json")
    assert done.returncode == 3, done.stderr
    assert f"{target} is outside the worker's allowed roots" in done.stderr
    assert json.loads(done.stdout)["error_code"] == "refused"
    assert target.read_bytes() == before


def test_a_target_that_holds_data_is_refused_and_left_alone(stack: Stack, place: Place) -> None:
    target = random_disk(place.inside / "target.img", SIZE)
    before = target.read_bytes()
    done = flushpoint(stack, "mirror", place.source, target)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"{target} exists and holds data. Give --overwrite to lose it" in done.stderr
    assert target.read_bytes() == before


@pytest.mark.needs("mount")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_a_target_that_fills_up_is_code_1_and_no_whole_copy(stack: Stack, place: Place) -> None:
    small = place.inside / "small"
    small.mkdir()
    qemu("mount", "-t", "tmpfs", "-o", f"size={MIB}", "none", small)
    try:
        target = small / "target.img"
        done = flushpoint(stack, "mirror", place.source, target)
        assert (done.returncode, done.stdout) == (1, "")
        assert "cannot write" in done.stderr
        assert f"of {target}: No space left on device. Make room for it" in done.stderr
        assert done.stderr.endswith(f"{target} is no whole copy\n")
    finally:
        wait_until(lambda: subprocess.run(["umount", small], check=False).returncode == 0, "umount")


# -- complete ------------------------------------------------------------------------------------------------------


def test_a_refused_complete_is_code_3_and_the_next_one_code_0(stack: Stack, place: Place) -> None:
    target = place.inside / "target.img"
    with QemuNbd(place.source) as server:
        submitted = flushpoint(stack, "mirror", "--detach", "--no-auto-complete", server.uri, target)
        job_id = submitted.stdout.strip()
        stack.wait(job_id, State.READY)
        assert not stack.client.job(job_id).synced
        with Writer(server.uri):
            refused = flushpoint(stack, "complete", job_id)
        assert (refused.returncode, refused.stdout) == (3, f"{job_id}  ready\n")
        assert refused.stderr.count("complete it again") == 1
        watched = flushpoint(stack, "job", job_id, "--wait")
        assert (watched.returncode, watched.stderr) == (3, refused.stderr)
        done = flushpoint(stack, "complete", job_id)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{job_id}  concluded\n", "")
    assert same_bytes(place.source, target)
    told = [event["synced"] for event in stack.events(job_id) if event["event"] == "MIRROR_STATE_CHANGE"]
    assert told == [True], "and that only at the end"


def test_the_eta_follows_a_pause_and_a_changed_speed_within_seconds(stack: Stack, place: Place) -> None:
    source = random_disk(place.inside / "large.img", 64 * MIB)
    client = stack.client
    job = stack.submit(source, place.inside / "target.img", speed=4 * MIB)

    def eta_is_between(low: float, high: float) -> Callable[[], bool]:
        def look() -> bool:
            now = client.job(job.id)
            return now.eta_s is not None and low < now.eta_s * now.speed / (now.len - now.offset) < high

        return look

    wait_until(eta_is_between(0.6, 1.6), "an ETA at the first speed", 15)
    client.pause(job.id)
    assert stack.wait(job.id, State.PAUSED).eta_s is None
    client.set_speed(job.id, 8 * MIB)
    client.resume(job.id)
    wait_until(eta_is_between(0.6, 1.6), "an ETA at the second speed", 15)
    client.cancel(job.id)
    stack.wait(job.id)
