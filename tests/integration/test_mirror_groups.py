"""Groups whose disks are kept up to date on targets of their own: a point, or said to be none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.model.group import GroupPolicy, GroupSpec
from coordinator.model.mirror import MirrorSpec
from coordinator.model.view import CheckpointState
from tests.contract.disks import loop_device
from tests.deployment import FREEZE_S, Command, Deployment, member_of
from tests.group_disks import Disks
from tests.guest import GuestKit
from tests.live_guest import LiveDisk, wandering_guest
from tests.stack import Faulty, running_stack, wait_until

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc", "nbdkit", "losetup")

DISKS = (LiveDisk("a", iothread=True), LiveDisk("b", bus="virtio-scsi", format="raw"), LiveDisk("c"))


class Mirrored:
    """A guest with three disks, which go to a file, to an export that fails when told to, and to a block device."""

    def __init__(self, tested: Disks, image: Path, server: Faulty, device: Path, *, staged: bool) -> None:
        self.tested = tested
        self.server = server
        self._image = image
        self._device = device
        self._directory = image.parent
        self._vm = tested.host.guest.directory.name
        self.targets = {
            f"{self._vm}/a": str(self._directory / "a.copy.qcow2"),
            f"{self._vm}/b": server.uri,
            f"{self._vm}/c": str(device),
        }
        spec = GroupSpec(
            repository=tested.deployment.repository,
            policy=GroupPolicy(freeze_timeout=FREEZE_S, prepare_timeout=10),
            members=(member_of(tested.host),),
            mirror=MirrorSpec(targets=self.targets, staged=staged),
        )
        tested.deployment.stack.client.apply_group(tested.group, spec)

    def check(self) -> None:
        """Targets equal the clones of the last cut."""
        for disk, copy in (("a", self._directory / "a.copy.qcow2"), ("b", self._image), ("c", self._device)):
            assert self.tested.is_clone(disk, copy), disk

    def states(self) -> set[tuple[int, int]]:
        found = self.tested.deployment.stack.client.group(self.tested.group).mirrors
        return {(state.epoch, state.begun) for state in found.values()}


@pytest.fixture(scope="module")
def deployment(module_tmpfs_path: Path) -> Iterator[Deployment]:
    with running_stack(module_tmpfs_path / "stack") as stack:
        yield Deployment(stack, module_tmpfs_path)


@pytest.fixture(params=["written", "staged"])
def mirrored(request: pytest.FixtureRequest, deployment: Deployment, guest_kit: GuestKit) -> Iterator[Mirrored]:
    name = request.param
    directory = deployment.directory / name
    with ExitStack() as stack:
        guest = stack.enter_context(wandering_guest(guest_kit, directory, DISKS))
        host = stack.enter_context(deployment.host(f"host-{name}", guest))
        image = directory / "b.copy"
        with image.open("wb") as file:
            file.truncate(DISKS[1].size)
        server = stack.enter_context(Faulty(image, "error-pwrite-rate=100%", "error-zero-rate=100%"))
        behind = directory / "c.copy"
        with behind.open("wb") as file:
            file.truncate(DISKS[2].size)
        device = stack.enter_context(loop_device(behind))
        yield Mirrored(Disks(deployment, host, name), image, server, device, staged=name == "staged")


def test_targets_hold_a_point_or_are_said_to_hold_none(deployment: Deployment, mirrored: Mirrored) -> None:
    tested = mirrored.tested
    run, name = Command(deployment), tested.group
    is_staged = name == "staged"

    def at_targets(point: int) -> None:
        wait_until(lambda: mirrored.states() == {(point, 0)}, f"the targets to hold point {point}", 60)

    first = tested.cloned_point()
    at_targets(first)
    mirrored.check()
    tested.aborted("before-stage")
    second = tested.cloned_point()
    at_targets(second)
    mirrored.check()

    mirrored.server.trigger.touch()
    asked = deployment.stack.client.ask_for_checkpoint(name)
    wait_until(lambda: mirrored.states() == {(second, second + 1)}, "targets to be written", 60)
    ended = deployment.ended(asked)
    assert ended.state is (CheckpointState.PUBLISHED if is_staged else CheckpointState.FAILED)
    assert f"INCONSISTENT, some of {name}@{second + 1} over {name}@{second}" in run("group", name)
    points = ["points", name, "--repository", deployment.repository]
    told = run.says(*points)
    assert f"are INCONSISTENT: {name}@{second + 1} is written there" in told or is_staged, "without asking the ledger"
    mirrored.server.trigger.unlink()
    last = tested.cloned_point()
    at_targets(last)
    mirrored.check()
    assert "INCONSISTENT" not in run("group", name)
    changes = [
        event.data["synced"]
        for event in deployment.stack.client.events()
        if event.event == "MIRROR_STATE_CHANGE" and event.data.get("group") == name
    ]
    assert changes[:3] == [True, False, True]
    assert changes[-1]
