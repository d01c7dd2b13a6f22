"""Views of disks that a Linux guest writes all the time: what is staged is what the disks held at the cut."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.model.bitmap import Owner, leftovers, rotate
from coordinator.model.errors import RefusedError, UnavailableError
from coordinator.model.job import Sync
from coordinator.model.uri import parse
from flushpoint.cli import main
from tests.guards import serving_guard
from tests.guest import GuestKit
from tests.live_guest import LiveDisk, LiveGuest, running_guest
from workers.access import Access
from workers.agent import stage as stage_module
from workers.agent.cut import Part, Vm
from workers.agent.guard import GuardLink
from workers.agent.guest import OURS, look_at
from workers.agent.journal import Journal
from workers.agent.monitor import Monitor
from workers.agent.service import stage_all
from workers.agent.stage import Staged, stage
from workers.agent.views import prepare, remembered, remove
from workers.sources import open_source

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc")

REPOSITORY, CHANGED = "0a1b", "changed"
"""Whose bitmaps; the group of the test of them."""
DEADLINE_S = 10.0
"""Long enough for a busy machine; what a guest is promised is another matter."""
STAGE_S = 60.0
LAYOUTS = {
    "virtio-blk": [LiveDisk("v0"), LiveDisk("v1", format="raw")],
    "virtio-blk with IOThreads": [LiveDisk("v0", iothread=True), LiveDisk("v1", iothread=True)],
    "virtio-scsi": [LiveDisk("s0", bus="virtio-scsi")],
    "virtio-scsi with an IOThread": [LiveDisk("s0", bus="virtio-scsi", iothread=True)],
}


@pytest.fixture(params=LAYOUTS, scope="module")
def guest(request: pytest.FixtureRequest, guest_kit: GuestKit, module_tmpfs_path: Path) -> Iterator[LiveGuest]:
    directory = module_tmpfs_path / request.param.replace(" ", "-")
    with running_guest(guest_kit, directory, LAYOUTS[request.param]) as running:
        yield running


@asynccontextmanager
async def monitored(guest: LiveGuest, directory: Path) -> AsyncIterator[Vm]:
    with serving_guard(directory / "guard") as guard:
        monitor = await Monitor.connect(guest.monitor)
        link = GuardLink(guard)
        try:
            yield Vm(monitor, link, Journal(directory / "journal"))
        finally:
            link.close()
            await monitor.close()


CUTS = 50
"""Of each layout: two hundred of all."""
READ_SHARE = 0.1
WHOLE = 1 << 60
"""Of a disk: more than it has."""


async def cut(
    vm: Vm, guest: LiveGuest, scratch: Path, group: str, parent: int, epoch: int, *, clones: bool = True
) -> tuple[list[Part], list[Path]]:
    """Views of all disks, and `clones` of their images made inside the same stop."""
    found = await look_at(vm.monitor)
    parts = []
    for disk in [found.disk(disk.name) for disk in guest.disks]:
        rotation = rotate(disk.tracking(), Owner(REPOSITORY, group, f"vm/{disk.device}"), parent, epoch)
        parts.append(
            Part(await prepare(vm.monitor, found, disk, scratch), rotation, disk.size if rotation.since else 0)
        )
    async with vm.order:
        frozen = await vm.freeze(DEADLINE_S)
        try:
            await vm.take(frozen, parts)
            copied = [scratch / f"{disk.name}.clone" for disk in guest.disks] if clones else []
            for disk, clone in zip(guest.disks, copied, strict=False):
                shutil.copyfile(disk.image(guest.directory), clone)
        finally:
            await vm.thaw(frozen)
    return parts, copied


def scratch_that(fault: str, size: int) -> dict[str, object]:
    """QAPI BlockdevOptions of what takes a scratch image's place: each write of it fails, or takes 2.5 s."""
    if fault == "hangs":
        return {"driver": "null-co", "size": size, "latency-ns": 2_500_000_000}
    image = {"driver": "null-co", "size": size}
    each = {"event": "none", "iotype": "write", "errno": errno.EIO, "once": False}
    return {"driver": "blkdebug", "image": image, "inject-error": [each]}


async def ours(vm: Vm) -> list[str]:
    """What of us is in the guest's QEMU."""
    nodes = await vm.monitor.execute("query-named-block-nodes", {"flat": True})
    return [node["node-name"] for node in nodes if node["node-name"].startswith(OURS)]


def same_disk(clone: Path, clone_format: str, other: Path, other_format: str) -> bool:
    command = ["qemu-img", "compare", "-q", "-f", clone_format, "-F", other_format, str(clone), str(other)]
    done = subprocess.run(command, check=False, timeout=STAGE_S)
    return done.returncode == 0


def test_what_is_staged_is_what_the_disks_held_at_the_cut(guest: LiveGuest, tmpfs_path: Path) -> None:
    async def check() -> None:
        async with monitored(guest, tmpfs_path) as vm:
            for epoch in range(1, 4):
                parts, clones = await cut(vm, guest, tmpfs_path, "all", 0, epoch)
                guest.wait_until_it_writes()
                for disk, part, clone in zip(guest.disks, parts, clones, strict=True):
                    staged = await stage(vm, part, lambda: WHOLE, STAGE_S)
                    await remove(vm.monitor, part.view)
                    assert same_disk(clone, disk.format, staged.image, "qcow2"), (epoch, disk.name)
                    staged.image.unlink()
            assert await ours(vm) == []
            guest.wait_until_it_writes()

    asyncio.run(check())


def test_a_bitmap_that_somebody_stopped_is_not_believed_until_the_next_point(
    guest: LiveGuest, tmpfs_path: Path
) -> None:
    async def check() -> None:
        async with monitored(guest, tmpfs_path) as vm:
            for point, epoch, reads_bitmaps in ((0, 1, False), (1, 2, False), (1, 3, False), (3, 4, True)):
                parts, _ = await cut(vm, guest, tmpfs_path, "stopped", point, epoch)
                for part in parts:
                    assert (part.rotation.changed != ()) == reads_bitmaps, epoch
                    await remove(vm.monitor, part.view)
                    if epoch == 1:
                        arguments = {"node": part.view.disk.node, "name": part.rotation.add}
                        await vm.monitor.execute("block-dirty-bitmap-disable", arguments)

    asyncio.run(check())


def test_what_bitmaps_name_is_all_that_changed_also_over_aborted_epochs(guest: LiveGuest, tmpfs_path: Path) -> None:
    """Of most of them nothing is read, as if they had been aborted."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    copies = [tmpfs_path / f"{disk.name}.copy" for disk in guest.disks]
    for disk, copy in zip(guest.disks, copies, strict=True):
        with copy.open("wb") as file:
            file.truncate(disk.size)

    async def check() -> None:
        async with monitored(guest, tmpfs_path) as vm:
            point = 0
            for epoch in range(1, CUTS + 1):
                is_read = epoch in (1, 2, CUTS) or dice.random() < READ_SHARE
                parts, clones = await cut(vm, guest, tmpfs_path, CHANGED, point, epoch, clones=is_read)
                assert all((part.rotation.compare == "") == (point > 0) for part in parts)
                for disk, part, clone, copy in zip(guest.disks, parts, clones, copies, strict=False):
                    staged = await stage(vm, part, lambda: WHOLE, STAGE_S)
                    written = write_staged(staged.image, copy)
                    assert point == 0 or 0 < written <= disk.size // 2, "the guest writes the first half alone"
                    staged.image.unlink()
                    assert same_disk(clone, disk.format, copy, "raw"), (epoch, disk.name)
                for part in parts:
                    await remove(vm.monitor, part.view)
                if is_read:
                    point = epoch
                    await tidy(vm, guest, point)
            assert await ours(vm) == []

    asyncio.run(check())


@pytest.mark.parametrize("fault", ["fails", "hangs"])
def test_a_scratch_image_that_fails_or_hangs_breaks_the_view_and_no_guest(
    guest: LiveGuest, tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Every write of the guest goes there first; one that waits does so once, for CBW_TIMEOUT_S."""

    async def add_faulty(monitor: Monitor, node: str, path: Path) -> None:
        size = max(disk.size for disk in guest.disks)
        await monitor.execute("blockdev-add", {**scratch_that(fault, size), "node-name": node})

    async def check() -> None:
        async with monitored(guest, tmpfs_path) as vm:
            with monkeypatch.context() as patched:
                patched.setattr("workers.agent.views.add_image", add_faulty)
                parts, _ = await cut(vm, guest, tmpfs_path, fault, 0, 1, clones=False)
            for _ in range(3):
                guest.wait_until_it_writes()
            for part in parts:
                with pytest.raises(UnavailableError, match="the view broke"):
                    await stage(vm, part, lambda: WHOLE, STAGE_S)
                await remove(vm.monitor, part.view)
            assert await ours(vm) == []
            assert (await vm.monitor.execute("query-status"))["status"] == "running", "and not io-error"
            guest.wait_until_it_writes()

            parts, clones = await cut(vm, guest, tmpfs_path, fault, 0, 2)
            for disk, part, clone in zip(guest.disks, parts, clones, strict=True):
                staged = await stage(vm, part, lambda: WHOLE, STAGE_S)
                await remove(vm.monitor, part.view)
                assert same_disk(clone, disk.format, staged.image, "qcow2")
                staged.image.unlink()

    asyncio.run(check())


def test_a_disk_that_cannot_be_staged_leaves_no_view_of_any(
    guest: LiveGuest, tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> Staged:
        raise UnavailableError("no room")

    async def check() -> None:
        async with monitored(guest, tmpfs_path) as vm:
            parts, _ = await cut(vm, guest, tmpfs_path, "failing", 0, 1)
            monkeypatch.setattr("workers.agent.service.stage", fail)
            with pytest.raises(UnavailableError, match="no room"):
                await stage_all(vm, parts, tmpfs_path / "staged", lambda: WHOLE)
            assert await ours(vm) == []
            guest.wait_until_it_writes()

    asyncio.run(check())


@pytest.mark.parametrize("step", ["add_image", "_windows", "_finish"])
def test_a_staging_that_is_cancelled_leaves_nothing_in_the_guest(
    guest: LiveGuest, tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """As when its epoch is aborted meanwhile, be it before the answer to a command that was carried out."""

    async def check() -> None:
        copying = asyncio.Event()
        begun = getattr(stage_module, step)

        async def endless(*words: object) -> None:
            if step != "_finish":
                await begun(*words)
            copying.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(stage_module, step, endless)
        async with monitored(guest, tmpfs_path) as vm:
            parts, _ = await cut(vm, guest, tmpfs_path, f"cancelled{step}", 0, 1)
            staging = asyncio.create_task(stage_all(vm, parts, tmpfs_path / "staged", lambda: WHOLE))
            await copying.wait()
            staging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await staging
            assert await ours(vm) == []
            assert list(tmpfs_path.rglob("*.qcow2")) == []
            guest.wait_until_it_writes()

    asyncio.run(check())


@pytest.mark.parametrize("thread", [False, True])
def test_a_snapshot_that_a_user_takes_below_a_filter_is_what_the_device_gets_back(
    guest_kit: GuestKit, tmpfs_path: Path, thread: bool
) -> None:
    async def check(guest: LiveGuest) -> None:
        async with monitored(guest, tmpfs_path) as vm, by_user(guest) as user:
            (part,), (clone,) = await cut(vm, guest, tmpfs_path, "below", 0, 1)
            await take_snapshot(user, part.view.disk.node, tmpfs_path / "overlay.qcow2")
            guest.wait_until_it_writes()
            (copy,) = await stage_all(vm, [part], tmpfs_path / "staged", lambda: WHOLE)
            assert same_disk(clone, "qcow2", Path(copy.path), "qcow2")
            assert await ours(vm) == []
            assert (await look_at(vm.monitor)).disk("v0").node == "overlay"
            guest.wait_until_it_writes()

    with running_guest(guest_kit, tmpfs_path / "guest", [LiveDisk("v0", iothread=thread)]) as running:
        asyncio.run(check(running))


@pytest.mark.parametrize("thread", [False, True])
def test_a_filter_below_a_snapshot_stays_until_its_user_has_left_it_out(
    guest_kit: GuestKit, tmpfs_path: Path, thread: bool
) -> None:
    async def check(guest: LiveGuest) -> None:
        async with monitored(guest, tmpfs_path) as vm, by_user(guest) as user:
            (part,), _ = await cut(vm, guest, tmpfs_path, "above", 0, 1)
            await take_snapshot(user, part.view.filter_node, tmpfs_path / "overlay.qcow2")
            with pytest.raises(RefusedError, match="v0 has overlay above the filter") as raised:
                await remove(vm.monitor, part.view)
            assert "block-stream, device overlay, base-node v0-node" in raised.value.remedy
            guest.wait_until_it_writes()
            assert [view for _, view in remembered(tmpfs_path)] == [part.view]
            heard = user.heard
            await user.execute("block-stream", {"job-id": "left-out", "device": "overlay", "base-node": "v0-node"})
            await user.wait_for(frozenset({"BLOCK_JOB_COMPLETED"}), heard, STAGE_S)
            await remove(vm.monitor, part.view)
            assert await ours(vm) == []
            assert list(remembered(tmpfs_path)) == []
            guest.wait_until_it_writes()

    with running_guest(guest_kit, tmpfs_path / "guest", [LiveDisk("v0", iothread=thread)]) as running:
        asyncio.run(check(running))


@asynccontextmanager
async def by_user(guest: LiveGuest) -> AsyncIterator[Monitor]:
    monitor = await Monitor.connect(guest.user, allowed=frozenset({"blockdev-snapshot-sync", "block-stream"}))
    try:
        yield monitor
    finally:
        await monitor.close()


async def take_snapshot(user: Monitor, node: str, path: Path) -> None:
    """Into a new image that is the node "overlay"."""
    overlay = {"snapshot-file": str(path), "snapshot-node-name": "overlay", "format": "qcow2"}
    await user.execute("blockdev-snapshot-sync", {"node-name": node, **overlay})


def test_doctor_tells_what_can_be_done_with_each_disk(guest: LiveGuest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--guest", str(guest.monitor)]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert "running" in checks[f"guest {guest.monitor}"]["detail"]
    for disk in guest.disks:
        told = checks[f"guest {guest.monitor} {disk.name}"]
        assert told["ok"], told
        assert told["detail"].startswith(f"{disk.format}, 64 MiB, {'IOThread' if disk.iothread else 'main loop'}")
        assert ("while the guest is stopped" in told["detail"]) == disk.iothread
        assert checks[f"guest {guest.monitor} {disk.name} bitmaps"]["ok"] == (disk.format == "qcow2")
    guest.wait_until_it_writes()


async def tidy(vm: Vm, guest: LiveGuest, point: int) -> None:
    found = await look_at(vm.monitor)
    for disk in [found.disk(disk.name) for disk in guest.disks]:
        for name in leftovers(disk.tracking(), Owner(REPOSITORY, CHANGED, f"vm/{disk.device}"), point):
            await vm.monitor.execute("block-dirty-bitmap-remove", {"node": disk.node, "name": name})


def write_staged(image: Path, copy: Path) -> int:
    """Write what an image holds, and nothing else, over a raw copy; how many bytes that was."""
    written = 0
    source = open_source(parse(str(image)), Sync.TOP, None, Access(["/"], []))
    try:
        with copy.open("r+b") as file:
            for extent in source.extents(0, source.size):
                data = bytearray(extent.length)
                if not extent.reads_as_zeroes:
                    source.read_into(extent.offset, memoryview(data))
                file.seek(extent.offset)
                written += file.write(data)
    finally:
        source.close()
    return written
