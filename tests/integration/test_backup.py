"""Jobs whose target, or source, is a repository: backed up by movers, published, restored, verified, resumed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.model.job import JobSpec, State
from coordinator.model.task import RepositoryTask, TaskKind
from coordinator.model.view import JobView
from tests.contract.disks import loop_device
from tests.object_servers import make_bucket, running_seaweedfs
from tests.repositories import local_uri, make_repository, read_point
from tests.stack import MIB, QemuNbd, Stack, make_disk, random_disk, running_stack, same_bytes, wait_until
from workers.access import Access
from workers.repository.check import check
from workers.repository.repository import Repository

pytestmark = pytest.mark.needs("qemu-nbd", "qemu-img", "qemu-io")
SIZE = 20 * MIB + 512 * 7
DATA = {0: os.urandom(3 * MIB), 8 * MIB + 512: os.urandom(70_000), 17 * MIB: b"z" * MIB, SIZE - 512: b"e" * 512}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture
def repository(tmpfs_path: Path) -> Path:
    make_repository(tmpfs_path / "repository").close()
    return tmpfs_path / "repository"


def target(repository: Path, group: str = "shop") -> str:
    return f"repo+file://{repository}?group={group}"


def done(job: JobView) -> JobView:
    assert job.error == "", job
    assert job.state is State.CONCLUDED
    return job


def run(*command: object) -> str:
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("kind", ["raw", "qcow2", "nbd"])
def test_every_source_is_backed_up_and_restored_to_every_target(
    stack: Stack, repository: Path, tmpfs_path: Path, kind: str
) -> None:
    original = make_disk(tmpfs_path / "original.img", SIZE, DATA)
    source = str(original)
    if kind == "qcow2":
        source = str(tmpfs_path / "original.qcow2")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", original, source)
    if kind == "nbd":
        with QemuNbd(original, "--read-only") as server:
            job = done(stack.mirror(server.uri, target(repository), source_frozen=True))
    else:
        job = done(stack.mirror(source, target(repository)))
    assert (job.group, job.epoch) == ("shop", 1)
    point = f"repo+file://{repository}?group=shop&disk={job.disk}&point=1"
    done(stack.mirror(point, tmpfs_path / "back.img"))
    assert same_bytes(original, tmpfs_path / "back.img")
    done(stack.mirror(point, tmpfs_path / "back.qcow2"))
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", original, tmpfs_path / "back.qcow2")
    served = random_disk(tmpfs_path / "served.img", SIZE)
    with QemuNbd(served) as server:
        done(stack.mirror(point, server.uri))
    assert same_bytes(original, served)
    done(stack.mirror(point, "null:"))


@pytest.mark.needs("losetup")
def test_a_point_is_restored_straight_to_a_block_device(stack: Stack, repository: Path, tmpfs_path: Path) -> None:
    original = make_disk(tmpfs_path / "original.img", SIZE, DATA)
    done(stack.mirror(original, target(repository)))
    image = random_disk(tmpfs_path / "device.img", SIZE)
    with loop_device(image) as device:
        done(stack.mirror(target(repository), device))
    assert same_bytes(original, image)


def test_an_incremental_stores_what_differs_and_each_point_stays_what_it_was(
    stack: Stack, repository: Path, tmpfs_path: Path
) -> None:
    disk = make_disk(tmpfs_path / "disk.img", SIZE, DATA)
    done(stack.mirror(disk, target(repository)))
    first = disk.read_bytes()
    with disk.open("r+b") as file:
        file.seek(9 * MIB)
        file.write(b"new")
        file.seek(17 * MIB)
        file.write(bytes(MIB))
    second = done(stack.mirror(disk, target(repository), sync="incremental"))
    assert second.bytes_sent == 64 * 1024
    assert "has no dirty bitmaps" in second.compare_reason
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        assert read_point(opened, "shop", 1) == first
        assert read_point(opened, "shop", 2) == disk.read_bytes()
        assert opened.decisions.point("shop", 2).members[0].reason == second.compare_reason
        assert check(opened, data=True).damage == []


def test_a_dirty_bitmap_says_what_is_read(stack: Stack, repository: Path, tmpfs_path: Path) -> None:
    disk = tmpfs_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", make_disk(tmpfs_path / "d.img", SIZE, DATA), disk)
    refused = stack.mirror(disk, target(repository), sync="top")
    assert refused.error == ""
    run("qemu-img", "bitmap", "--add", disk, "b0")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 3M 64k", "-c", "write -z 17M 64k", disk)
    job = done(stack.mirror(disk, target(repository), sync="dirty", bitmap="b0"))
    assert job.bytes_read <= 2 * 64 * 1024
    assert job.bytes_sent == 64 * 1024
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, tmpfs_path / "flat.img")
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        assert read_point(opened, "shop") == (tmpfs_path / "flat.img").read_bytes()


@pytest.mark.parametrize(
    ("name", "flags", "why"),
    [
        ("{id}:shop:1", "", ""),
        ("{id}:shop:7", "", "has no bitmap"),
        ("{id}:other:1", "", "has no bitmap"),
        ("0123:shop:1", "", "has no bitmap"),
        ("{id}:shop:1", "--disable", "is disabled"),
    ],
)
def test_an_incremental_trusts_the_bitmap_of_the_point_it_adds_to_and_no_other(
    stack: Stack, repository: Path, tmpfs_path: Path, name: str, flags: str, why: str
) -> None:
    disk = tmpfs_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", make_disk(tmpfs_path / "d.img", SIZE, DATA), disk)
    done(stack.mirror(disk, target(repository)))
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        bitmap = "flushpoint:" + name.format(id=opened.id)
    run("qemu-img", "bitmap", "--add", disk, bitmap)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 3M 64k", "-c", "write -z 17M 64k", disk)
    if flags:
        run("qemu-img", "bitmap", flags, disk, bitmap)
    job = done(stack.mirror(disk, target(repository), sync="incremental"))
    assert job.bytes_sent == 64 * 1024
    assert (job.bytes_read <= 2 * 64 * 1024) == (why == "")
    assert why in job.compare_reason
    assert job.bitmap == ("" if why else bitmap)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, tmpfs_path / "flat.img")
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        reason = opened.decisions.point("shop", 2).members[0].reason
        assert reason == (job.compare_reason or f"by bitmap {bitmap!r}")
        assert read_point(opened, "shop") == (tmpfs_path / "flat.img").read_bytes()


def test_an_incremental_does_not_take_an_exports_word_for_what_was_written(
    stack: Stack, repository: Path, tmpfs_path: Path
) -> None:
    place = f"{target(repository)}&disk=vda"
    disk = tmpfs_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", make_disk(tmpfs_path / "d.img", SIZE, DATA), disk)
    done(stack.mirror(disk, place))
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        bitmap = f"flushpoint:{opened.id}:shop:1"
    run("qemu-img", "bitmap", "--add", "--disable", disk, bitmap)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 3M 1M", disk)
    with QemuNbd(disk, "--read-only", f"--bitmap={bitmap}", image_format="qcow2") as server:
        job = done(stack.mirror(server.uri, place, sync="incremental", source_frozen=True))
    assert job.bytes_sent == MIB
    assert "does not tell whether its bitmap is recording" in job.compare_reason


def test_an_incremental_does_not_trust_a_bitmap_above_a_backing_file(
    stack: Stack, repository: Path, tmpfs_path: Path
) -> None:
    base, top = tmpfs_path / "base.qcow2", tmpfs_path / "top.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", make_disk(tmpfs_path / "d.img", SIZE, DATA), base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top)
    done(stack.mirror(top, target(repository)))
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        run("qemu-img", "bitmap", "--add", top, f"flushpoint:{opened.id}:shop:1")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 3M 1M", base)
    job = done(stack.mirror(top, target(repository), sync="incremental"))
    assert job.bytes_sent == MIB
    assert "does not know of changes to its backing file" in job.compare_reason


def test_an_incremental_reads_the_bitmap_it_was_told_of_where_it_is_there(
    stack: Stack, repository: Path, tmpfs_path: Path
) -> None:
    disk = tmpfs_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", make_disk(tmpfs_path / "d.img", SIZE, DATA), disk)
    run("qemu-img", "bitmap", "--add", disk, "mine")
    place = f"{target(repository)}&disk=vda"
    done(stack.mirror(disk, place, sync="incremental", bitmap="mine"))  # no point yet: all of it
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 3M 64k", disk)
    for bitmap, offered in (("mine", True), ("another", False)):
        with QemuNbd(disk, "--read-only", "--bitmap=mine", image_format="qcow2") as server:
            job = done(stack.mirror(server.uri, place, sync="incremental", bitmap=bitmap, source_frozen=True))
        assert (job.bytes_read <= 2 * 64 * 1024) == offered
        assert ("does not offer" in job.compare_reason) != offered


def test_a_bitmap_without_a_point_to_add_to_is_refused(stack: Stack, repository: Path, tmpfs_path: Path) -> None:
    disk = tmpfs_path / "disk.qcow2"
    run("qemu-img", "create", "-f", "qcow2", disk, "4M")
    run("qemu-img", "bitmap", "--add", disk, "b0")
    job = stack.mirror(disk, target(repository), sync="dirty", bitmap="b0")
    assert "make a full copy first" in job.error.lower()
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        assert opened.decisions.holds() == []


def test_a_disk_that_is_written_meanwhile_is_compared_until_it_stands_still(
    stack: Stack, repository: Path, tmpfs_path: Path
) -> None:
    disk = random_disk(tmpfs_path / "disk.img", 8 * MIB)
    with QemuNbd(disk) as server:
        job = stack.submit(server.uri, target(repository), auto_complete=False)
        stack.wait(job.id, State.READY)
        run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 64k", "-c", "flush", server.uri)
        stack.client.complete(job.id)
        ended = done(stack.wait(job.id))
    assert ended.pass_number == 3
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        assert read_point(opened, "shop") == disk.read_bytes()


def test_a_killed_worker_sends_no_finished_unit_again(tmpfs_path: Path, repository: Path) -> None:
    disk = random_disk(tmpfs_path / "disk.img", 320 * MIB)
    with running_stack(tmpfs_path / "stack") as stack:
        job = stack.submit(disk, target(repository), speed=100 * MIB)
        stack.wait_for_progress(job.id, 128 * MIB)
        stack.kill("worker")
        stack.start_worker()
        stack.client.set_speed(job.id, 0)
        ended = done(stack.wait(job.id))
        assert ended.bytes_sent == 320 * MIB
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        report = check(opened)
        assert report.damage == []
        assert read_point(opened, "shop") == disk.read_bytes()


def test_a_cancelled_job_leaves_a_tombstone_and_no_hold(stack: Stack, repository: Path, tmpfs_path: Path) -> None:
    disk = random_disk(tmpfs_path / "disk.img", 64 * MIB)
    job = stack.submit(disk, target(repository), speed=MIB)
    wait_until(lambda: stack.client.job(job.id).units_leased > 0 and stack.client.job(job.id).epoch == 1, "a mover")
    other = stack.mirror(disk, target(repository))
    assert job.id in other.error
    stack.client.cancel(job.id)
    assert stack.wait(job.id).cancelled
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        decision = opened.decisions.decision("shop", 1)
        assert decision is not None
        assert not decision.is_point
        assert opened.decisions.holds() == []
        assert list(opened.store.list("packs/")) == []
    assert done(stack.mirror(disk, target(repository))).epoch == 2


def test_a_source_that_fails_fails_the_job_and_publishes_nothing(
    stack: Stack, repository: Path, tmpfs_path: Path
) -> None:
    missing = stack.mirror(tmpfs_path / "absent.img", target(repository))
    assert "absent.img does not exist" in missing.error
    assert missing.error_code == "not-found"
    nowhere = stack.mirror(make_disk(tmpfs_path / "d.img", MIB, {}), f"repo+file://{tmpfs_path}/none?group=g")
    assert "none" in nowhere.error
    with Repository.open(local_uri(repository), Access(["/"], [])) as opened:
        assert opened.decisions.groups() == {}


def test_a_restore_writes_only_what_differs(stack: Stack, repository: Path, tmpfs_path: Path) -> None:
    disk = random_disk(tmpfs_path / "disk.img", 16 * MIB)
    done(stack.mirror(disk, target(repository)))
    older = tmpfs_path / "older.img"
    older.write_bytes(disk.read_bytes())
    with older.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"older")
    job = done(stack.mirror(target(repository), older, sync="incremental"))
    assert job.bytes_sent == 64 * 1024
    assert same_bytes(disk, older)
    small = make_disk(tmpfs_path / "small.img", MIB, {})
    with QemuNbd(small) as server:
        assert str(16 * MIB) in stack.mirror(target(repository), server.uri).error


def test_s3_holds_points_as_a_directory_does(tmpfs_path: Path) -> None:
    disk = make_disk(tmpfs_path / "disk.img", SIZE, DATA)
    (tmpfs_path / "key").write_text("a passphrase")
    with running_seaweedfs() as server:
        make_bucket(server, "backups")
        uri = str(server.uri("backups", "of/mine", f"key=file:{tmpfs_path}/key"))
        with running_stack(tmpfs_path / "stack", env=server.env) as stack:

            def task(kind: TaskKind) -> dict[str, object]:
                spec = JobSpec(task=RepositoryTask(kind=kind, repository=uri))
                job = done(stack.wait(stack.client.submit(spec).id))
                result: dict[str, object] = json.loads(job.result)
                return result

            assert task(TaskKind.INIT)["encrypted"]
            done(stack.mirror(disk, f"{uri}&group=shop"))
            done(stack.mirror(disk, f"{uri}&group=shop", sync="incremental"))
            done(stack.mirror(f"{uri}&group=shop&point=2", tmpfs_path / "back.img"))
            assert same_bytes(disk, tmpfs_path / "back.img")
            assert task(TaskKind.SCAN)["groups"] == {"shop": [1, 2]}
            assert task(TaskKind.CHECK)["damage"] == []
