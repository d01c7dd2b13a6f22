"""Mirror jobs on a whole running stack: every pair of source and target, verbs, errors, bad input."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.model.errors import RefusedError
from coordinator.model.job import IoStatus, State
from tests.contract.disks import loop_device, serving_tcp
from tests.stack import (
    MIB,
    Faulty,
    Nbdkit,
    QemuNbd,
    Stack,
    Writer,
    make_disk,
    random_disk,
    running_stack,
    same_bytes,
    wait_until,
)

pytestmark = pytest.mark.needs("qemu-nbd", "qemu-img", "qemu-io", "nbdkit")
TIB = 1024**4


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    return tmp_path


def qemu_img(*arguments: object) -> str:
    return subprocess.run(
        ["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def qemu_io(image: Path, *commands: str, image_format: str = "qcow2") -> None:
    subprocess.run(
        ["qemu-io", "-f", image_format, *itertools.chain.from_iterable(("-c", c) for c in commands), str(image)],
        check=True,
        capture_output=True,
        timeout=60,
    )


def flat(image: Path, image_format: str, directory: Path) -> Path:
    """What a guest would read, as a raw file."""
    raw = directory / f"{image.name}.flat"
    qemu_img("convert", "-f", image_format, "-O", "raw", image, raw)
    return raw


CONTENTS = {
    "mixed": (
        37 * MIB + 512 * 3,
        {0: os.urandom(3 * MIB), 8 * MIB: bytes(2 * MIB), 20 * MIB + 512: os.urandom(70_000), 37 * MIB: b"e" * 1536},
    ),
    "blank": (5 * MIB, {}),
    "empty": (0, {}),
}


KINDS = ("raw", "qcow2", "nbd", "device")
PAIRS = [
    (source, target, content)
    for source, target, content in itertools.product(KINDS, KINDS, CONTENTS)
    if not (content == "empty" and "device" in (source, target))  # there is no block device of 0 bytes
]


@pytest.mark.needs("losetup")
@pytest.mark.parametrize(("source_kind", "target_kind", "content"), PAIRS)
def test_every_source_reaches_every_target(
    stack: Stack, disks: Path, source_kind: str, target_kind: str, content: str
) -> None:
    size, data = CONTENTS[content]
    original = make_disk(disks / "original.img", size, data)
    image = disks / ("target.qcow2" if target_kind == "qcow2" else "target.img")
    with contextlib.ExitStack() as servers:

        def serve(served: Path, *options: str) -> str:
            """qemu-nbd serves no disk of 0 bytes, nbdkit does."""
            server = QemuNbd(served, *options) if size else Nbdkit(served, *options, "file", str(served))
            return servers.enter_context(server).uri

        source: Path | str = original
        target: Path | str = image
        match source_kind:
            case "qcow2":
                source = disks / "source.qcow2"
                qemu_img("convert", "-f", "raw", "-O", "qcow2", original, source)
            case "nbd":
                source = serve(original, "--read-only" if size else "--readonly")
            case "device":
                source = servers.enter_context(loop_device(original, "--read-only"))
        if target_kind in ("nbd", "device"):
            random_disk(image, size)  # old data, which must not shine through the holes
        match target_kind:
            case "nbd":
                target = serve(image)
            case "device":
                target = servers.enter_context(loop_device(image))
        job = stack.mirror(source, target)
        assert job.error == "", stack.logs()
    assert job.len == job.offset
    copy = flat(image, "qcow2", disks) if target_kind == "qcow2" else image
    assert same_bytes(original, copy)


def test_a_disk_of_16_tib_with_little_data_copies_its_data_alone(stack: Stack, disks: Path) -> None:
    source = disks / "source.qcow2"
    target = disks / "target.qcow2"
    qemu_img("create", "-f", "qcow2", source, 16 * TIB)
    qemu_io(source, "write -P 7 0 1M", f"write -P 8 {8 * TIB + 65536} 64k", f"write -P 9 {16 * TIB - 65536} 64k")
    job = stack.mirror(source, target)
    assert job.error == "", stack.logs()
    assert job.bytes_sent <= 2 * MIB
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "qcow2", source, target)


def test_sync_top_copies_the_topmost_image_alone(stack: Stack, disks: Path) -> None:
    base = make_disk(disks / "base.img", 16 * MIB, {0: b"b" * MIB})
    top = disks / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", top)
    qemu_io(top, "write -P 84 4M 1M")
    target = make_disk(disks / "target.img", 16 * MIB, {})
    job = stack.mirror(top, target, sync="top", overwrite=True)
    assert job.error == "", stack.logs()
    assert same_bytes(target, make_disk(disks / "want.img", 16 * MIB, {4 * MIB: b"T" * MIB}))


def test_sync_dirty_sends_what_the_bitmap_calls_dirty(stack: Stack, disks: Path) -> None:
    source = disks / "source.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", random_disk(disks / "original.img", 24 * MIB), source)
    target = disks / "target.img"
    assert stack.mirror(source, target).error == ""
    qemu_img("bitmap", "--add", "-f", "qcow2", source, "b0")
    qemu_io(source, "write -P 1 3M 64k", "write -P 2 17M 128k", "write -z 9M 64k")
    job = stack.mirror(source, target, sync="dirty", bitmap="b0")
    assert job.error == "", stack.logs()
    assert job.bytes_sent <= 4 * 64 * 1024
    assert same_bytes(target, flat(source, "qcow2", disks))


def test_sync_incremental_sends_what_differs(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", 24 * MIB)
    target = disks / "target.img"
    shutil.copy(source, target)
    with target.open("r+b") as old:
        old.seek(5 * MIB + 100)
        old.write(b"older")
        old.seek(20 * MIB)
        old.write(b"older")
    job = stack.mirror(source, target, sync="incremental")
    assert job.error == "", stack.logs()
    assert job.bytes_sent == 2 * 64 * 1024
    assert same_bytes(source, target)


def test_sync_incremental_reads_a_bitmap_that_is_there_and_compares_without(stack: Stack, disks: Path) -> None:
    source = disks / "source.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", random_disk(disks / "original.img", 24 * MIB), source)
    target = disks / "target.img"
    assert stack.mirror(source, target).error == ""
    qemu_img("bitmap", "--add", "-f", "qcow2", source, "b0")
    for byte, bitmap in ((1, "b0"), (2, "b1")):
        qemu_io(source, f"write -P {byte} 3M 64k")
        job = stack.mirror(source, target, sync="incremental", bitmap=bitmap)
        assert job.error == "", stack.logs()
        assert job.bytes_sent == 64 * 1024
        assert (job.bytes_read == 64 * 1024) == (job.bitmap == "b0") == (job.compare_reason == "")
        assert same_bytes(target, flat(source, "qcow2", disks))
    assert "has no bitmap 'b1'" in job.compare_reason


def test_a_bitmap_says_nothing_about_a_target_without_an_older_copy(stack: Stack, disks: Path) -> None:
    source = disks / "source.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", random_disk(disks / "original.img", 24 * MIB), source)
    qemu_img("bitmap", "--add", "-f", "qcow2", source, "b0")
    qemu_io(source, "write -P 1 3M 64k")
    empty = make_disk(disks / "empty.img", 24 * MIB, {})
    for target in (disks / "absent.img", empty):  # the second as a plan that died leaves it
        job = stack.mirror(source, target, sync="incremental", bitmap="b0")
        assert job.error == "", stack.logs()
        assert job.compare_reason == "the target holds no older copy"
        assert same_bytes(target, flat(source, "qcow2", disks))


def test_zeroes_in_data_become_holes(stack: Stack, disks: Path) -> None:
    source = make_disk(disks / "source.img", 32 * MIB, {0: bytes(16 * MIB), 16 * MIB: os.urandom(MIB)})
    target = disks / "target.img"
    assert stack.mirror(source, target).error == ""
    assert same_bytes(source, target)
    assert target.stat().st_blocks * 512 <= 2 * MIB


def test_verbs_answer_within_a_second_while_data_flows(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", 256 * MIB)
    target = disks / "target.img"
    client = stack.client
    job = stack.submit(source, target, speed=32 * MIB, auto_complete=False)
    stack.wait(job.id, State.RUNNING)

    def timed(done: State | None) -> float:
        begun = time.monotonic()
        if done is not None:
            stack.wait(job.id, done, timeout_s=10)
        return time.monotonic() - begun

    wait_until(lambda: client.job(job.id).units_leased > 0, "a mover")
    client.pause(job.id)
    assert timed(State.PAUSED) < 1
    held = client.job(job.id)
    assert held.units_leased == 0
    client.resume(job.id)
    assert timed(State.RUNNING) < 1
    begun = time.monotonic()
    client.set_speed(job.id, 0)
    stack.wait(job.id, State.READY)  # the rest, some 200 MiB: at the old speed it would take 6 seconds
    assert time.monotonic() - begun < 3
    assert same_bytes(source, target)
    client.complete(job.id)
    assert timed(State.CONCLUDED) < 1


def test_a_speed_is_shared_by_all_workers_and_may_change(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", 48 * MIB)
    job = stack.submit(source, disks / "target.img", speed=8 * MIB)
    stack.wait(job.id, State.RUNNING)
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun > 2, "two seconds of copying")
    stack.client.pause(job.id)
    paused = stack.wait(job.id, State.PAUSED)
    assert 8 * MIB <= paused.offset <= 32 * MIB
    stack.client.set_speed(job.id, 0)
    stack.client.resume(job.id)
    assert stack.wait(job.id).error == ""


def test_cancel_concludes_and_pretends_no_copy(stack: Stack, disks: Path) -> None:
    job = stack.submit(random_disk(disks / "source.img", 64 * MIB), disks / "target.img", speed=MIB)
    wait_until(lambda: stack.client.job(job.id).units_leased > 0, "a mover")
    begun = time.monotonic()
    stack.client.cancel(job.id)
    ended = stack.wait(job.id)
    assert time.monotonic() - begun < 1
    assert ended.cancelled
    assert "BLOCK_JOB_CANCELLED" in [e["event"] for e in stack.events(job.id)]


def test_a_job_takes_qemus_states_in_order(stack: Stack, disks: Path) -> None:
    job = stack.mirror(random_disk(disks / "source.img", MIB), disks / "target.img")
    assert [e.get("status", e["event"]) for e in stack.events(job.id)] == [
        "created",
        "running",
        "ready",
        "MIRROR_STATE_CHANGE",
        "BLOCK_JOB_READY",
        "waiting",
        "pending",
        "BLOCK_JOB_COMPLETED",
        "concluded",
    ]
    stack.client.dismiss(job.id)
    assert stack.events(job.id)[-1]["status"] == "null"


def test_a_writable_export_is_compared_until_in_sync(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", 16 * MIB)
    with QemuNbd(source) as server:
        job = stack.mirror(server.uri, disks / "target.img")
    assert job.error == "", stack.logs()
    assert job.source_may_change
    assert job.pass_number == 2
    assert job.pass_sent == 0
    assert same_bytes(source, disks / "target.img")


def test_a_promise_that_a_source_is_frozen_spares_the_comparing_pass(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", 8 * MIB)
    with QemuNbd(source, "--read-only") as server:
        jobs = {f: stack.mirror(server.uri, disks / f"{f}.img", source_frozen=f) for f in (True, False)}
    assert {f: (job.error, job.pass_number) for f, job in jobs.items()} == {True: ("", 1), False: ("", 2)}
    assert same_bytes(source, disks / "True.img")


def test_complete_under_a_writer_is_refused_and_later_gives_a_clean_copy(stack: Stack, disks: Path) -> None:
    source, target = random_disk(disks / "source.img", 16 * MIB), disks / "target.img"
    with QemuNbd(source) as server:
        job = stack.submit(server.uri, target, auto_complete=False)
        stack.wait(job.id, State.READY)
        with Writer(server.uri):
            stack.client.complete(job.id)
            wait_until(lambda: stack.client.job(job.id).error != "", "the refusal", 60)
        refused = stack.client.job(job.id)
        assert refused.state is State.READY
        assert "still changes" in refused.error
        stack.client.complete(job.id)
        ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert same_bytes(source, target)


def test_a_job_that_completes_by_itself_fails_rather_than_end_half(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", 4 * MIB)
    with QemuNbd(source) as server, Writer(server.uri):
        job = stack.mirror(server.uri, disks / "target.img")
    assert job.failed
    assert job.error_code == "refused"


# -- errors and policies ------------------------------------------------------------------------------------------


def test_report_fails_the_job_with_the_range(stack: Stack, disks: Path) -> None:
    image = make_disk(disks / "target.img", 8 * MIB, {})
    with Faulty(image, "error-pwrite=EIO", "error-pwrite-rate=100%") as server:
        server.trigger.touch()
        job = stack.mirror(random_disk(disks / "source.img", 8 * MIB), server.uri)
    assert job.failed
    assert server.uri in job.error
    errors = [e for e in stack.events(job.id) if e["event"] == "BLOCK_JOB_ERROR"]
    assert errors[0]["action"] == "report"
    assert errors[0]["operation"] == "write"
    assert errors[0]["errno"] == errno.EIO


@pytest.mark.parametrize(
    ("policy", "errno_name", "status"), [("stop", "EIO", "failed"), ("enospc", "ENOSPC", "nospace")]
)
def test_stop_pauses_and_resume_goes_on_after_the_mending(
    stack: Stack, disks: Path, policy: str, errno_name: str, status: str
) -> None:
    source = random_disk(disks / "source.img", 8 * MIB)
    image = make_disk(disks / "target.img", 8 * MIB, {})
    with Faulty(image, f"error-pwrite={errno_name}", "error-pwrite-rate=100%") as server:
        server.trigger.touch()
        job = stack.submit(source, server.uri, on_target_error=policy)
        paused = stack.wait(job.id, State.PAUSED)
        assert paused.target_io_status == status
        assert paused.io_status is IoStatus.OK
        server.trigger.unlink()
        stack.client.resume(job.id)
        ended = stack.wait(job.id)
    assert ended.error == ""
    assert ended.target_io_status is IoStatus.OK
    assert same_bytes(source, image)


def test_ignore_tries_again_and_stays_bounded(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", 8 * MIB)
    with Faulty(source, "error-pread=EIO", "error-pread-rate=100%") as server:
        server.trigger.touch()
        job = stack.submit(server.uri, disks / "target.img", on_source_error="ignore")
        wait_until(lambda: any(e["event"] == "BLOCK_JOB_ERROR" for e in stack.events(job.id)), "an error")
        server.trigger.unlink()
        ended = stack.wait(job.id)
        assert ended.error == ""
        assert same_bytes(source, disks / "target.img")
        server.trigger.touch()
        never = stack.mirror(server.uri, disks / "other.img", on_source_error="ignore")
    assert never.failed
    assert f"given up after 5 attempts ({8 * MIB} bytes at 0). The last attempt failed: " in never.error


# -- bad input ---------------------------------------------------------------------------------------------------


def refusal(stack: Stack, source: object, target: object, **options: object) -> str:
    job = stack.mirror(str(source), str(target), **options)
    assert job.failed, job
    assert ". " in job.error, f"no remedy in: {job.error}"
    return f"{job.error_code}: {job.error}"


def test_bad_input_ends_in_a_message_that_names_the_thing(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", 2 * MIB)
    missing = disks / "missing.img"
    assert str(missing) in refusal(stack, missing, disks / "t")
    text = make_disk(disks / "text.qcow2", MIB, {0: b"no image"})
    assert str(text) in refusal(stack, text, disks / "t")
    small = make_disk(disks / "small.img", MIB, {})
    with QemuNbd(small) as server:
        assert str(2 * MIB) in refusal(stack, source, server.uri)
    with QemuNbd(source, "--read-only", name="ro") as server:
        assert "read-only" in refusal(stack, small, server.uri)
        assert "no-such" in refusal(stack, server.uri.replace("///", "///no-such"), disks / "t")
    qcow2 = disks / "q.qcow2"
    qemu_img("create", "-f", "qcow2", qcow2, MIB)
    assert "no-such" in refusal(stack, qcow2, disks / "t", sync="dirty", bitmap="no-such")
    assert not (disks / "t").exists()


def test_an_existing_file_is_overwritten_only_if_told_to(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", MIB)
    target = random_disk(disks / "target.img", 3 * MIB)
    before = target.read_bytes()
    assert "--overwrite" in refusal(stack, source, target)
    assert target.read_bytes() == before
    assert stack.mirror(source, target, overwrite=True).error == ""
    assert same_bytes(source, target)


def test_a_disk_is_never_mirrored_onto_itself(stack: Stack, disks: Path) -> None:
    source = random_disk(disks / "source.img", MIB)
    before = source.read_bytes()
    link = disks / "link.img"
    link.symlink_to(source)
    hard = disks / "hard.img"
    hard.hardlink_to(source)
    for alias in (link, hard):
        assert "source" in refusal(stack, source, alias, overwrite=True)
    with pytest.raises(RefusedError):
        stack.submit(source, source)
    top = disks / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", source, "-F", "raw", top)
    assert "source" in refusal(stack, top, source, overwrite=True)
    with QemuNbd(source, "--read-only", name="ro") as server:
        assert str(source) in refusal(stack, server.uri, source, overwrite=True)
    with QemuNbd(source) as server:
        detour = server.uri.replace(str(disks), str(disks / "." / ".." / disks.name))
        assert "source" in refusal(stack, server.uri, detour)
    assert source.read_bytes() == before


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_disk_served_over_tcp_is_never_mirrored_onto_itself(stack: Stack, disks: Path, image_format: str) -> None:
    """By nbdkit, which takes no locks that would keep an image from being made over it."""
    source = random_disk(disks / "source.img", MIB)
    before = source.read_bytes()
    with serving_tcp("nbdkit", "-f", "--readonly", "file", str(source)) as port:
        target = f"file://{source}?format={image_format}"
        assert "is the source" in refusal(stack, f"nbd://127.0.0.1:{port}/", target, overwrite=True)
    assert source.read_bytes() == before


def test_a_server_that_ends_with_its_first_client_is_told_of_as_a_target(stack: Stack, disks: Path) -> None:
    image = make_disk(disks / "target.img", MIB, {})
    listen = disks / "once.sock"
    with subprocess.Popen(["qemu-nbd", "-f", "raw", "-k", str(listen), str(image)]) as server:
        try:
            wait_until(listen.exists, "qemu-nbd")  # a client that looks would be its only one
            source = random_disk(disks / "source.img", MIB)
            assert "--persistent" in refusal(stack, source, f"nbd+unix:///?socket={listen}")
        finally:
            server.kill()
    assert not any(image.read_bytes())


def test_events_are_json_with_strictly_growing_ids(stack: Stack, disks: Path) -> None:
    stack.mirror(random_disk(disks / "source.img", MIB), disks / "target.img")
    ids = [tuple(map(int, e.id.split("-"))) for e in stack.client.events()]
    assert ids == sorted(set(ids))
    json.dumps(stack.events(""))


def test_an_incremental_of_a_sparse_16_tib_disk_reads_no_holes(stack: Stack, disks: Path) -> None:
    """And zeroes what the target holds where the source has a hole."""
    source, target = disks / "source.qcow2", disks / "target.qcow2"
    for image in (source, target):
        qemu_img("create", "-f", "qcow2", image, 16 * TIB)
    qemu_io(source, "write -P 7 0 1M", f"write -P 9 {9 * TIB} 64k")
    qemu_io(target, "write -P 7 0 1M", f"write -P 5 {3 * TIB} 128k")
    job = stack.mirror(source, target, sync="incremental")
    assert job.error == "", stack.logs()
    assert job.bytes_sent <= MIB + 64 * 1024
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "qcow2", source, target)


def test_two_jobs_never_write_one_target(stack: Stack, disks: Path) -> None:
    """Whether it exists or the first job makes it, and by whatever name."""
    source, other = random_disk(disks / "source.img", 8 * MIB), random_disk(disks / "other.img", 8 * MIB)
    target, link = disks / "target.img", disks / "link.img"
    link.symlink_to(target)
    first = stack.submit(source, target, speed=2 * MIB)
    wait_until(lambda: stack.client.job(first.id).disk_size > 0, "the first plan")
    for name in (target, link):
        assert first.id in refusal(stack, other, name, overwrite=True)
    stack.client.set_speed(first.id, 0)
    assert stack.wait(first.id).error == ""
    assert same_bytes(source, target)
    assert stack.mirror(other, target, overwrite=True).error == ""
    assert same_bytes(other, target)
