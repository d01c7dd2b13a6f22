"""Members of groups that nobody runs: bare disks, and machines that are shut off at night."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from coordinator.model.epoch import Consistency, Participant
from coordinator.model.errors import FlushpointError, RefusedError
from coordinator.model.group import GroupPolicy, GroupSpec
from coordinator.model.mirror import MirrorSpec
from coordinator.model.point import TRACKING, Member
from coordinator.model.view import CheckpointState
from tests.contract.disks import loop_device
from tests.deployment import FREEZE_S, Command, Deployment, member_of
from tests.group_disks import Disks
from tests.guest import GuestKit
from tests.hosts import STEP_S, Host
from tests.live_guest import MIB, LiveDisk, LiveGuest, running_guest
from tests.stack import Process, running_stack, wait_until
from workers.access import Access
from workers.agent.guest import look_at
from workers.agent.monitor import Monitor
from workers.agent.participant import FORGETS, OFF
from workers.agent.standin import MACHINE, QEMU, StandIns

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc", "qemu-io", "setpriv")

SIZE = 64 * MIB
POLICY = GroupPolicy(freeze_timeout=FREEZE_S, prepare_timeout=10)


@pytest.fixture(scope="module")
def deployment(module_tmpfs_path: Path) -> Iterator[Deployment]:
    with running_stack(module_tmpfs_path / "stack") as stack:
        yield Deployment(stack, module_tmpfs_path)


@pytest.fixture(scope="module")
def busy(deployment: Deployment, guest_kit: GuestKit) -> Iterator[Host]:
    """A guest that writes all the time, and its host, on which there are other disks, too."""
    with (
        running_guest(guest_kit, deployment.directory / "busy", [LiveDisk("a")]) as guest,
        deployment.host("hv1", guest) as host,
    ):
        yield host


@pytest.fixture
def host(busy: Host) -> Host:
    """With an agent that was just started."""
    busy.start_agent()
    return busy


class Bare:
    """A disk that nobody runs, alone in a group of its own unless it is put into another one."""

    def __init__(self, deployment: Deployment, name: str, ending: str = "qcow2") -> None:
        self.deployment = deployment
        self.name = name
        self.format = ending
        self.image = deployment.directory / f"{name}.{ending}"
        subprocess.run(["qemu-img", "create", "-q", "-f", ending, self.image, str(SIZE)], check=True, timeout=30)
        self.write(0, 3 * MIB, 1)

    def member(self, host: str = "hv1") -> Participant:
        return Participant(vm=self.name, host=host, disks=("data",), images={"data": f"file://{self.image}"})

    def apply(self, policy: GroupPolicy = POLICY) -> None:
        self.deployment.apply_members(self.name, [self.member()], policy)

    def write(self, offset: int, length: int, byte: int) -> None:
        """Offline, as any tool of QEMU's does."""
        done = self._written(offset, length, byte)
        assert done.returncode == 0, done.stderr

    def refuses_to_be_written(self) -> bool:
        return 'Failed to get "write" lock' in self._written(0, MIB, 9).stderr

    def _written(self, offset: int, length: int, byte: int) -> subprocess.CompletedProcess[str]:
        command = ["qemu-io", "-f", self.format, "-c", f"write -P {byte} {offset} {length}", self.image]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    def content(self) -> bytes:
        return content_of(self.image, self.format)

    def bitmaps(self) -> list[str]:
        """Ours, as its header names them."""
        command = ["qemu-img", "info", "-U", "--output=json", "-f", "qcow2", self.image]
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        found = json.loads(told)["format-specific"]["data"].get("bitmaps", [])
        return [bitmap["name"] for bitmap in found if bitmap["name"].startswith(TRACKING)]

    def check(self, point: int, group: str = "") -> Member:
        """That a point has all of it; what that point says of it."""
        group, disk = group or self.name, f"{self.name}/data"
        assert self.deployment.bytes_of(group, point, disk) == self.content()
        member = self.deployment.point(group, point).member(disk)
        assert member is not None
        return member


def content_of(image: Path, image_format: str) -> bytes:
    raw = image.with_name(f"{image.name}.content")
    command = ["qemu-img", "convert", "-f", image_format, "-O", "raw", str(image), str(raw)]
    subprocess.run(command, check=True, timeout=30)
    return raw.read_bytes()


def is_by_bitmap(member: Member, parent: int) -> bool:
    return (member.sync, member.parent) == ("incremental", parent) and member.reason.startswith("by bitmap ")


def greets(path: Path) -> bool:
    async def connect() -> None:
        monitor = await Monitor.connect(path)
        await monitor.close()

    try:
        asyncio.run(connect())
    except FlushpointError:
        return False
    return True


@contextmanager
def held_by_another(bare: Bare) -> Iterator[None]:
    """By a QEMU whose monitor nobody named. It greets once it has the image; to try the lock would be to hold it."""
    monitor = bare.image.with_name("other.qmp")
    node = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": str(bare.image)}}
    words = [QEMU, *MACHINE, "-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=n"]
    words += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    other = Process(words, bare.image.with_name("other.log"))
    try:
        wait_until(lambda: greets(monitor), f"a QEMU to open {bare.image}", STEP_S)
        yield
    finally:
        other.kill()


def test_a_guest_and_a_disk_that_nobody_runs_have_points_together(deployment: Deployment, host: Host) -> None:
    bare = Bare(deployment, "archive")
    policy = POLICY.model_copy(update={"consistency": Consistency.FILESYSTEM})
    deployment.apply_members("mixed", [member_of(host), bare.member()], policy)
    first = deployment.published("mixed")
    bare.check(first, "mixed")

    bare.write(5 * MIB, MIB, 2)
    host.guest.wait_until_it_writes()
    second = deployment.published("mixed")
    member = bare.check(second, "mixed")
    assert is_by_bitmap(member, first)
    assert MIB <= member.bytes_read < 2 * MIB
    guest, disk = deployment.point("mixed", second).machines
    assert guest.freeze_ms > 0
    assert (disk.vm, disk.freeze_ms, disk.fallback) == ("archive", 0, OFF)
    guests = deployment.point("mixed", second).member("busy/a")
    assert guests is not None
    assert is_by_bitmap(guests, first)


def test_a_guest_that_is_shut_off_and_started_again_goes_on_incrementally(
    deployment: Deployment, guest_kit: GuestKit
) -> None:
    disk = LiveDisk("a")  # QEMU 7.2 may hang as it quits while an IOThread of its own is busy
    directory = deployment.directory / "nightly"
    image = disk.image(directory)
    with running_guest(guest_kit, directory, [disk]) as guest, deployment.host("hv2", guest) as host:
        member = member_of(host).model_copy(update={"images": {"a": str(image)}})
        deployment.apply_members("nightly", [member], POLICY)
        tested = Disks(deployment, host, "nightly")
        first = tested.cloned_point()
        tested.check(first)
        guest.wait_until_it_writes()
        asyncio.run(shut_off(guest))

        second = deployment.published("nightly")
        by_night = deployment.bytes_of("nightly", second, "nightly/a")
        assert by_night == content_of(image, "qcow2")
        told = deployment.point("nightly", second)
        assert is_by_bitmap(told.members[0], first)
        assert told.members[0].bytes_read > 0, "it has written since the first point, or this proves nothing"
        assert told.machines[0].freeze_ms == 0

        with running_guest(guest_kit, directory, [disk]):
            third = tested.cloned_point()
            tested.check(third)
            told = deployment.point("nightly", third)
            assert is_by_bitmap(told.members[0], second)
            assert told.machines[0].freeze_ms > 0
            assert deployment.bytes_of("nightly", third, "nightly/a") != by_night

            wrong = member.model_copy(update={"images": {"a": str(deployment.directory / "old.qcow2")}})
            deployment.apply_members("nightly", [wrong], POLICY)
            assert f"the guest's disk a is in {image}, and not in " in deployment.checkpoint("nightly").why


async def shut_off(guest: LiveGuest) -> None:
    """As its user does."""
    monitor = await Monitor.connect(guest.user, allowed=frozenset({"quit"}))
    try:
        await monitor.execute("quit")
    finally:
        await monitor.close()
    wait_until(guest.guest.is_off, "the guest to be off", STEP_S)


def test_an_image_that_somebody_else_has_is_let_be(deployment: Deployment, host: Host) -> None:
    bare = Bare(deployment, "taken")
    bare.apply()
    with held_by_another(bare):
        done = deployment.checkpoint("taken")
        assert done.state is CheckpointState.FAILED
        assert f"another process has the image {bare.image} open" in done.why
    bare.check(deployment.published("taken"))


def test_nobody_else_writes_an_image_before_it_is_staged(deployment: Deployment, host: Host) -> None:
    bare = Bare(deployment, "kept")
    bare.apply()
    host.start_agent("before-stage:stop")
    asked = deployment.stack.client.ask_for_checkpoint("kept")
    wait_until(host.trip.exists, "the agent to be about to stage", STEP_S)
    assert bare.refuses_to_be_written()
    host.signal_agent(signal.SIGCONT)
    bare.check(deployment.ended(asked).point)
    bare.write(0, MIB, 2)


def test_an_image_is_handed_from_one_stand_in_to_the_next(deployment: Deployment) -> None:
    """An epoch that was given up is still letting go of it when the next one wants it."""
    bare = Bare(deployment, "wanted")
    nobody: Any = SimpleNamespace()
    standins = StandIns(deployment.directory, Access([str(deployment.directory)], []), nobody, nobody)

    async def take() -> None:
        async with standins.open(bare.member()) as vm:
            assert (await look_at(vm.monitor)).disk("data").size == SIZE

    async def run() -> None:
        await asyncio.gather(*(take() for _ in range(3)))

    asyncio.run(run())


@pytest.mark.needs("losetup")
def test_a_device_of_a_machine_that_may_run_elsewhere_is_let_be(deployment: Deployment) -> None:
    """Locks of a device reach no other host; of one that is nobody's disk there is nobody to lock it out."""
    bare = Bare(deployment, "shared")
    with loop_device(bare.image) as device:
        images = {"data": f"file://{device}?format=qcow2"}
        member = Participant(vm="shared", host="hv1", disks=("data",), images=images)
        nobody: Any = SimpleNamespace()
        standins = StandIns(deployment.directory, Access(["/dev"], []), nobody, nobody)

        async def take(one: Participant) -> int:
            async with standins.open(one) as vm:
                return (await look_at(vm.monitor)).disk("data").size

        assert asyncio.run(take(member)) == SIZE
        with pytest.raises(RefusedError, match="may run on another host"):
            asyncio.run(take(member.model_copy(update={"qmp": "/run/vm/shared.qmp"})))


def test_a_raw_image_is_compared_and_copied_in_one_part(deployment: Deployment, host: Host) -> None:
    bare = Bare(deployment, "plain", "raw")
    bare.apply(POLICY.model_copy(update={"seed_slice": MIB}))
    first = deployment.published("plain")
    bare.check(first)
    bare.write(2 * MIB, MIB, 2)
    second = deployment.published("plain")
    member = bare.check(second)
    assert (member.parent, member.sync, member.reason) == (first, "incremental", FORGETS)
    assert member.bytes_sent < member.bytes_read


@pytest.mark.parametrize("place", ["between-prepare-and-prepared", "before-stage"])
def test_an_agent_that_is_killed_takes_its_stand_in_along(deployment: Deployment, host: Host, place: str) -> None:
    bare = Bare(deployment, f"killed-{place}")
    bare.apply()
    deployment.published(bare.name)
    bare.write(7 * MIB, MIB, 2)
    host.start_agent(f"{place}:stop")
    asked = deployment.stack.client.ask_for_checkpoint(bare.name)
    wait_until(host.trip.exists, f"the agent to reach {place}", STEP_S)
    assert len(stand_ins(bare)) == 1
    assert host.agent is not None
    psutil.Process(host.agent.pid).kill()  # alone, and not what it has started
    wait_until(lambda: stand_ins(bare) == [], "the stand-in to end", STEP_S)
    host.start_agent()
    assert deployment.ended(asked).state is CheckpointState.FAILED
    bare.write(8 * MIB, MIB, 3)
    bare.check(deployment.published(bare.name))
    assert list(host.scratch.glob("off-*")) == []


def test_a_point_after_an_agent_that_was_told_to_end_is_incremental(deployment: Deployment, host: Host) -> None:
    """Its stand-in has stored what the epoch that it gave up did to the bitmaps."""
    bare = Bare(deployment, "ended")
    bare.apply()
    first = deployment.published("ended")
    bare.write(7 * MIB, MIB, 2)
    host.start_agent("before-stage:stop")
    asked = deployment.stack.client.ask_for_checkpoint("ended")
    wait_until(host.trip.exists, "the agent to be about to stage", STEP_S)
    host.signal_agent(signal.SIGTERM)
    host.signal_agent(signal.SIGCONT)
    wait_until(lambda: stand_ins(bare) == [], "the stand-in to end", STEP_S)
    bare.write(8 * MIB, MIB, 3)
    host.start_agent()
    assert deployment.ended(asked).state is CheckpointState.FAILED
    member = bare.check(deployment.published("ended"))
    assert is_by_bitmap(member, first)
    assert 2 * MIB <= member.bytes_read < 3 * MIB


def stand_ins(bare: Bare) -> list[int]:
    """Process ids of whoever was told of its image on the command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(bare.image) in word for word in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


def test_bitmaps_do_not_pile_up_where_nobody_runs(deployment: Deployment, host: Host) -> None:
    """And go altogether with the last point."""
    bare = Bare(deployment, "tidy")
    bare.apply()
    point = deployment.published("tidy")
    for number in range(4):
        bare.write(number * MIB, MIB, 10 + number)
        before, point = point, deployment.published("tidy")
        assert is_by_bitmap(bare.check(point), before)
        assert len(bare.bitmaps()) <= 2
    Command(deployment)("complete", "tidy")
    wait_until(lambda: bare.bitmaps() == [], "its bitmaps to go", STEP_S)


def test_a_disk_that_nobody_runs_is_kept_up_to_date_on_a_target(deployment: Deployment, host: Host) -> None:
    bare = Bare(deployment, "mirrored")
    target = deployment.directory / "mirrored.copy.qcow2"
    spec = GroupSpec(
        repository=deployment.repository,
        policy=POLICY,
        members=(bare.member(),),
        mirror=MirrorSpec(targets={"mirrored/data": str(target)}),
    )
    deployment.stack.client.apply_group("mirrored", spec)
    for number in range(2):
        bare.write(number * MIB, 2 * MIB, 20 + number)
        deployment.published("mirrored")
        assert content_of(target, "qcow2") == bare.content()
    assert "has no monitor" in Command(deployment)("complete", "mirrored", "--pivot", code=3)
