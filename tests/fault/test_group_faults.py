"""Parts that die, sleep or are lost in the middle of a group's round: the point before it stays what it was, there is
never half a point, guests run, and the next point is whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from coordinator.model.group import Stage
from coordinator.model.view import CheckpointState
from tests.deployment import Deployment
from tests.guest import GuestKit
from tests.hosts import Host
from tests.live_guest import LiveDisk, running_pair
from tests.stack import running_stack, wait_until

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc")

STEP_S = 60.0
SETTINGS = {"FLUSHPOINT_LEADER_TTL_S": "2", "FLUSHPOINT_MAX_ATTEMPTS": "3"}
DISKS = ("lead/a", "follow/b")


class Shop:
    """Two guests that write in causal order, as group `shop`, and what must be so after each fault."""

    def __init__(self, deployment: Deployment, hosts: list[Host]) -> None:
        self.deployment = deployment
        self.stack = deployment.stack
        self.client = deployment.stack.client
        self.hosts = hosts

    def numbers(self, point: int) -> list[int]:
        return [self.deployment.number_in("shop", point, disk) for disk in DISKS]

    def point(self) -> int:
        number = self.deployment.published("shop")
        lead, follow = self.numbers(number)
        assert follow <= lead <= follow + 1
        return number

    @contextmanager
    def fault(self) -> Iterator[None]:
        """Around what goes wrong during one checkpoint."""
        before = self.point()
        held = self.numbers(before)
        asked = self.stack.client.ask_for_checkpoint("shop")
        yield
        done = self.deployment.ended(asked)
        if done.state is CheckpointState.PUBLISHED:
            lead, follow = self.numbers(done.point)
            assert follow <= lead <= follow + 1
        else:
            assert done.why
        assert self.numbers(before) == held
        for host in self.hosts:
            host.guest.wait_until_it_writes()
        assert self.point() > before

    def wait_for(self, stage: Stage) -> None:
        """Or for the end of the round, if it was quicker."""

        def reached() -> bool:
            at_work = self.stack.client.group("shop").round
            return at_work is None or at_work.stage == stage

        wait_until(lambda: self.stack.client.group("shop").round is not None, "the round", STEP_S)
        wait_until(reached, f"the round to be {stage}", STEP_S)


@pytest.fixture(scope="module")
def shop(guest_kit: GuestKit, module_tmpfs_path: Path) -> Iterator[Shop]:
    with ExitStack() as opened:
        stack = opened.enter_context(running_stack(module_tmpfs_path / "stack", env=SETTINGS))
        deployment = Deployment(stack, module_tmpfs_path)
        disks = LiveDisk("a"), LiveDisk("b", iothread=True)
        guests = opened.enter_context(running_pair(guest_kit, module_tmpfs_path / "pair", *disks))
        hosts = [opened.enter_context(deployment.host(f"hv{n}", guest)) for n, guest in enumerate(guests, 1)]
        deployment.apply("shop", *hosts)
        yield Shop(deployment, hosts)


LOST = [
    ("before-pack", "kill"),
    ("between-packs-and-root", "kill"),
    ("after-manifest", "kill"),
    ("before-pack", "stop"),
    ("between-root-and-manifest", "stop"),
]


@pytest.mark.parametrize(("point", "action"), LOST)
def test_a_mover_is_lost(shop: Shop, tmp_path: Path, point: str, action: str) -> None:
    """One that slept goes on when the next point is there."""
    trip = tmp_path / "tripped"
    with shop.fault():
        shop.stack.processes.pop("worker").terminate()
        shop.stack.start_worker(env={"FLUSHPOINT_FAILPOINT": f"{point}:{action}:{trip}"})
        wait_until(trip.exists, f"a mover to reach {point}", STEP_S)
    if action == "stop":
        os.kill(int(trip.read_text()), signal.SIGCONT)
        shop.point()
    shop.stack.processes.pop("worker").terminate()
    shop.stack.start_worker()


@pytest.mark.parametrize("stage", [Stage.OPENING, Stage.CUTTING, Stage.COPYING, Stage.PUBLISHING])
def test_the_coordinator_is_killed(shop: Shop, stage: Stage) -> None:
    with shop.fault():
        shop.wait_for(stage)
        shop.stack.kill("coordinator")
        shop.stack.start_coordinator()


@pytest.mark.parametrize("stage", [Stage.CUTTING, Stage.COPYING, Stage.PUBLISHING])
def test_the_coordinator_sleeps_while_another_one_leads(shop: Shop, stage: Stage, tmp_path: Path) -> None:
    """And goes on as if nothing had happened, which nobody is to notice."""
    with shop.fault():
        shop.wait_for(stage)
        old = shop.stack.processes.pop("coordinator")
        os.kill(old.pid, signal.SIGSTOP)
        shop.stack.start_coordinator()
    os.kill(old.pid, signal.SIGCONT)
    shop.point()
    old.terminate()
    shop.point()


@pytest.mark.parametrize("stage", [Stage.OPENING, Stage.CUTTING, Stage.COPYING, Stage.PUBLISHING])
def test_the_ledgers_server_is_killed(shop: Shop, stage: Stage) -> None:
    """Up to its last second may be lost with it."""
    with shop.fault():
        shop.wait_for(stage)
        shop.stack.kill("redis")
        for host in shop.hosts:
            host.guest.wait_until_it_writes()
        shop.stack.start_redis()
        wait_until(shop.stack.leads, "the coordinator to lead again", STEP_S)


def test_the_ledgers_server_sleeps_in_the_cut(shop: Shop) -> None:
    with shop.fault():
        shop.wait_for(Stage.CUTTING)
        server = shop.stack.processes["redis"]
        os.kill(server.pid, signal.SIGSTOP)
        for host in shop.hosts:
            host.guest.wait_until_it_writes()
        os.kill(server.pid, signal.SIGCONT)
