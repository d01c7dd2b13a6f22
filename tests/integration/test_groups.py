"""Groups of live guests, from the file that people write to disks that are restored: all of it or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.model.epoch import Participant
from coordinator.model.group import GroupPolicy, GroupSpec
from coordinator.model.view import CheckpointState, CheckpointView
from tests.guest import GuestKit
from tests.hosts import Host
from tests.live_guest import LiveDisk, first_number, running_pair
from tests.repositories import make_repository
from tests.stack import Stack, running_stack

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc")

FREEZE_S = 1.5
"""What guests are promised here, on a machine that has two processors for all of this."""


class Shop:
    """Two guests on a host each, a deployment, and a repository."""

    def __init__(self, stack: Stack, hosts: list[Host], directory: Path) -> None:
        self.stack = stack
        self.hosts = hosts
        self.directory = directory
        make_repository(directory / "repository").close()

    @property
    def repository(self) -> str:
        return f"repo+file://{self.directory}/repository"

    def spec(self) -> GroupSpec:
        members = [
            Participant(
                vm=host.guest.directory.name,
                host=host.name,
                qmp=str(host.guest.monitor),
                disks=tuple(disk.name for disk in host.guest.disks),
            )
            for host in self.hosts
        ]
        policy = GroupPolicy(freeze_timeout=FREEZE_S)
        return GroupSpec(repository=self.repository, policy=policy, members=tuple(members))

    def checkpoint(self) -> CheckpointView:
        client = self.stack.client
        return client.checkpoint("shop", client.ask_for_checkpoint("shop").id)

    def numbers(self, point: int) -> list[int]:
        """What each guest had written last, by its restored disk."""
        found = []
        for host in self.hosts:
            (disk,) = host.guest.disks
            source = f"{self.repository}?group=shop&disk={host.guest.directory.name}/{disk.name}&point={point}"
            target = self.directory / f"{host.name}.img"
            job = self.stack.mirror(source, target, overwrite=True)
            assert job.error == "", job.error
            found.append(first_number(target))
        return found


@pytest.fixture(scope="module")
def shop(guest_kit: GuestKit, module_tmpfs_path: Path) -> Iterator[Shop]:
    with (
        running_pair(guest_kit, module_tmpfs_path / "pair", LiveDisk("a"), LiveDisk("b", iothread=True)) as guests,
        running_stack(module_tmpfs_path / "stack") as stack,
    ):
        environ = {"FLUSHPOINT_REDIS_URL": stack.env["FLUSHPOINT_REDIS_URL"]}
        hosts = [Host(f"hv{n}", module_tmpfs_path / f"hv{n}", guest, environ) for n, guest in enumerate(guests, 1)]
        try:
            for host in hosts:
                host.start_agent()
            yield Shop(stack, hosts, module_tmpfs_path)
        finally:
            for host in hosts:
                host.kill()


def test_every_point_of_a_group_is_one_cut(shop: Shop) -> None:
    shop.stack.client.apply_group("shop", shop.spec())
    last = 0
    for number in range(1, 6):
        done = shop.checkpoint()
        assert (done.state, done.point) == (CheckpointState.PUBLISHED, number), done.why
        lead, follow = shop.numbers(number)
        assert follow <= lead <= follow + 1
        assert lead > last
        last = lead
