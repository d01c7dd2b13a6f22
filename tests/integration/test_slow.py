"""Low speeds and short slices: every claim makes progress, whatever path copies."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import MIB, Nbdkit, QemuNbd, Stack, make_disk, random_disk, running_stack, same_bytes, wait_until

pytestmark = pytest.mark.needs("qemu-nbd", "nbdkit")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One admission of 512 KiB at 2 MiB/s outlasts a slice of 0.1 s."""
    with running_stack(tmp_path_factory.mktemp("stack"), env={"FLUSHPOINT_UNIT_SLICE_S": "0.1"}) as running:
        yield running


@pytest.mark.parametrize("target_kind", ["file", "nbd"])
@pytest.mark.parametrize("source_kind", ["file", "nbd"])
def test_a_slice_shorter_than_one_admission_still_makes_progress(
    stack: Stack, tmp_path: Path, source_kind: str, target_kind: str
) -> None:
    original = random_disk(tmp_path / "source.img", 4 * MIB)
    image = make_disk(tmp_path / "target.img", 4 * MIB, {})
    with contextlib.ExitStack() as servers:
        source: Path | str = original
        target: Path | str = image
        if source_kind == "nbd":
            source = servers.enter_context(QemuNbd(original, "--read-only")).uri
        if target_kind == "nbd":
            target = servers.enter_context(QemuNbd(image)).uri
        job = stack.mirror(source, target, speed=2 * MIB, source_frozen=True)
    assert job.error == "", stack.logs()
    assert job.bytes_sent == job.offset == 4 * MIB
    assert same_bytes(original, image)


def test_ranges_that_start_with_zeroes_do_not_use_up_every_slice(stack: Stack, tmp_path: Path) -> None:
    """No block status, so the fast path reads them all; each has data at its end."""
    tail = os.urandom(4096)
    original = make_disk(tmp_path / "source.img", 6 * MIB, {n * 512 * 1024 - 4096: tail for n in range(1, 13)})
    with Nbdkit(original, "--readonly", "--filter=noextents", "file", str(original)) as source:
        job = stack.mirror(source.uri, tmp_path / "target.img", speed=4 * MIB)
    assert job.error == "", stack.logs()
    assert same_bytes(original, tmp_path / "target.img")


def test_a_file_written_while_it_is_copied_is_compared_again(stack: Stack, tmp_path: Path) -> None:
    """By a process that takes no locks: the time of modification tells."""
    source, target = random_disk(tmp_path / "source.img", 8 * MIB), tmp_path / "target.img"
    job = stack.submit(source, target, speed=2 * MIB)
    wait_until(lambda: stack.client.job(job.id).offset >= 2 * MIB, "some progress")
    with source.open("r+b") as disk:
        disk.write(b"changed behind the copy")
    stack.client.set_speed(job.id, 0)
    ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert ended.pass_number > 1
    assert same_bytes(source, target)


@pytest.mark.needs("qemu-storage-daemon")
def test_a_read_only_export_of_a_disk_in_use_gives_a_copy_of_one_moment(stack: Stack, tmp_path: Path) -> None:
    """Its guest writes a first block, which the copy has passed, and then a last one, which it has not reached."""
    source, target = random_disk(tmp_path / "source.img", 16 * MIB), tmp_path / "target.img"
    listen = tmp_path / "q.sock"
    command = ["qemu-storage-daemon", "--blockdev", f"file,node-name=f,filename={source}"]
    command += ["--blockdev", "raw,node-name=n,file=f", "--nbd-server", f"addr.type=unix,addr.path={listen}"]
    for name, writable in (("seen", "off"), ("written", "on")):
        command += ["--export", f"nbd,id={name},node-name=n,name={name},writable={writable}"]
    with subprocess.Popen(command) as daemon:
        try:
            wait_until(listen.exists, "the exports")
            job = stack.submit(f"nbd+unix:///seen?socket={listen}", target, speed=4 * MIB)
            stack.wait_for_progress(job.id, 4 * MIB)
            guest = ["-c", "write -P 1 0 64k", "-c", "flush", "-c", "write -P 2 15M 64k", "-c", "flush"]
            uri = f"nbd+unix:///written?socket={listen}"
            subprocess.run(["qemu-io", "-f", "raw", *guest, uri], check=True, capture_output=True)
            stack.client.set_speed(job.id, 0)
            ended = stack.wait(job.id)
        finally:
            daemon.terminate()
    assert ended.error == "", stack.logs()
    assert same_bytes(source, target)
