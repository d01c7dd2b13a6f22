"""Groups whose guests go on with their targets: passes, the stop, the move, whoever is lost on the way."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.model.group import GroupPolicy, GroupSpec
from coordinator.model.mirror import MirrorSpec
from coordinator.model.view import CompletionView
from tests.deployment import FREEZE_S, Command, Deployment, member_of
from tests.guest import GuestKit
from tests.hosts import STEP_S, Host
from tests.live_guest import MIB, LiveDisk, running_pair, wandering_guest
from tests.stack import running_stack, wait_until
from tests.turning_guests import asked as asked_of
from tests.turning_guests import at, digest, disk_of, name_of, newest_of, standing_still
from workers.agent.guest import look_at

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc")

DOWNTIME_S = 2.0


class Moving:
    """Two guests on a host each, as group `shop`, that move from targets to targets."""

    def __init__(self, deployment: Deployment, hosts: tuple[Host, Host]) -> None:
        self.deployment = deployment
        self.hosts = hosts
        self._moves = 0
        self.targets: dict[str, str] = {}

    def apply(self) -> None:
        """With new targets."""
        self._moves += 1
        ending = "qcow2" if self._moves % 2 else "raw"
        self.targets = {
            name_of(host): f"{self.deployment.directory}/{name_of(host)}-{self._moves}.{ending}" for host in self.hosts
        }
        mirror = {f"{name_of(host)}/{disk_of(host)}": self.targets[name_of(host)] for host in self.hosts}
        spec = GroupSpec(
            repository=self.deployment.repository,
            policy=GroupPolicy(freeze_timeout=FREEZE_S, prepare_timeout=10),
            members=tuple(member_of(host) for host in self.hosts),
            mirror=MirrorSpec(targets=mirror),
        )
        self.deployment.stack.client.apply_group("shop", spec)

    def ask(self) -> CompletionView:
        return self.deployment.stack.client.ask_to_complete_group("shop", pivot=True, downtime_s=DOWNTIME_S)

    def check_moved(self, asked: CompletionView) -> None:
        ended = self.deployment.stack.client.completion("shop", asked.id)
        assert ended.done, f"{ended.why}\n{self.deployment.stack.logs()}"
        assert set(ended.downtimes_ms) == {"lead", "follow"}
        self.check_disks()

    def check_disks(self) -> None:
        """All guests run on their targets, and have lost no write."""
        for host in self.hosts:
            assert at(host.guest)[1] == self.targets[name_of(host)]
            host.guest.wait_until_it_writes()
            assert "a write failed" not in host.guest.guest.console()
        with ExitStack() as stack:
            for host in self.hosts:
                stack.enter_context(standing_still(host.guest))
            lead, follow = (newest_of(host, self.targets[name_of(host)]) for host in self.hosts)
        assert follow <= lead <= follow + 1


@pytest.fixture(scope="module")
def moving(module_tmpfs_path: Path, guest_kit: GuestKit) -> Iterator[Moving]:
    disks = LiveDisk("a", size=16 * MIB), LiveDisk("b", iothread=True, size=16 * MIB)
    with running_stack(module_tmpfs_path / "stack") as stack, ExitStack() as opened:
        deployment = Deployment(stack, module_tmpfs_path)
        guests = opened.enter_context(running_pair(guest_kit, deployment.directory / "pair", *disks))
        first, second = (opened.enter_context(deployment.host(f"hv{n}", guest)) for n, guest in enumerate(guests, 1))
        yield Moving(deployment, (first, second))


def test_all_guests_of_a_group_go_on_with_its_targets(moving: Moving) -> None:
    run = Command(moving.deployment)
    before = [at(host.guest)[1] for host in moving.hosts]
    moving.apply()
    told = run("complete", "shop", "--pivot", "--downtime", DOWNTIME_S).splitlines()
    assert told[0].endswith("moved to its targets")
    assert [line.split()[0] for line in told[1:]] == ["lead", "follow"]
    assert all(0 < float(line.split()[-2]) < DOWNTIME_S * 1000 for line in told[1:])
    moving.check_disks()
    left = [digest(path) for path in before]
    moving.check_disks()
    assert [digest(path) for path in before] == left

    assert "is complete" in run("checkpoint", "shop", code=3)
    assert "run on its targets" in run("resume", "shop", code=3)
    shown = json.loads(run("group", "shop", "--json"))
    assert (shown["completed"], shown["completion"]["pivoted"]) == (True, True)
    point = moving.deployment.point("shop", shown["point"])
    assert [(disk.sync, disk.target) for disk in point.mirrors] == [
        ("pivot", moving.targets[v]) for v in moving.targets
    ]
    events = [event for event in moving.deployment.stack.client.events() if event.event == "GROUP_COMPLETED"]
    assert [event.data["pivoted"] for event in events] == [True]


def test_passes_go_on_where_a_machine_cannot_move_yet(moving: Moving) -> None:
    """Its agent is lost before the decision: all stay, and move once it is back."""
    _, second = moving.hosts
    moving.apply()
    second.start_agent("between-pending-and-frozen:kill")
    asked = moving.ask()
    wait_until(second.trip.exists, "the second machine to stand still", 2 * STEP_S)
    for host in moving.hosts:
        host.guest.wait_until_it_writes()
        assert at(host.guest)[1] != moving.targets[name_of(host)]
    second.start_agent()
    moving.check_moved(asked)


def test_after_the_decision_the_others_follow(moving: Moving) -> None:
    """One machine's agent is lost when the other moves; the coordinator is killed meanwhile, too."""
    first, second = moving.hosts
    moving.apply()
    second.start_agent("between-go-and-switch:stop")
    asked = moving.ask()
    wait_until(second.trip.exists, "the second machine to be about to move", 2 * STEP_S)
    stack = moving.deployment.stack
    stack.processes["coordinator"].kill()
    wait_until(lambda: at(first.guest)[1] == moving.targets["lead"], "the first machine to have moved", STEP_S)
    second.guest.wait_until_it_writes()
    second.signal_agent(signal.SIGCONT)
    assert at(second.guest)[1] != moving.targets["follow"]
    stack.start_coordinator()
    moving.check_moved(asked)


def test_a_guest_moves_with_all_of_its_disks(moving: Moving, guest_kit: GuestKit) -> None:
    """When the word is said, the targets of all are what the disks are."""
    deployment = moving.deployment
    disks = LiveDisk("a", iothread=True, size=16 * MIB), LiveDisk("b", bus="virtio-scsi", format="raw", size=16 * MIB)
    with (
        wandering_guest(guest_kit, deployment.directory / "twins", disks) as guest,
        deployment.host("hv3", guest) as host,
    ):
        targets = {disk.name: deployment.directory / f"twins-{disk.name}.raw" for disk in disks}
        spec = GroupSpec(
            repository=deployment.repository,
            policy=GroupPolicy(freeze_timeout=FREEZE_S, prepare_timeout=10),
            members=(member_of(host),),
            mirror=MirrorSpec(targets={f"twins/{disk}": str(path) for disk, path in targets.items()}),
        )
        client = deployment.stack.client
        client.apply_group("twins", spec)
        host.start_agent("between-go-and-switch:stop")
        asked = client.ask_to_complete_group("twins", pivot=True, downtime_s=10.0)
        wait_until(host.trip.exists, "the guest to stand still", STEP_S)
        for disk in disks:
            clones = [
                shutil.copyfile(path, f"{path}.clone") for path in (disk.image(guest.directory), targets[disk.name])
            ]
            compare = ["qemu-img", "compare", "-q", "-f", disk.format, "-F", "raw", *clones]
            subprocess.run(compare, check=True, timeout=STEP_S)
        host.signal_agent(signal.SIGCONT)
        ended = client.completion("twins", asked.id)
        assert ended.done, ended.why
        guest.wait_until_it_writes()
        attached = {disk.device: disk.file for disk in asked_of(guest, look_at).disks}
        assert attached == {disk: str(path) for disk, path in targets.items()}
