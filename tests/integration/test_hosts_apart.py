"""Hosts, movers and the ledger in network namespaces of their own: staged images go over NBD with TLS, and a host that
is cut off harms no guest and leaves no half point."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.model.group import Stage
from coordinator.model.view import CheckpointState
from tests.certificates import make_pki
from tests.deployment import Deployment
from tests.guest import GuestKit
from tests.hosts import STEP_S, Host
from tests.live_guest import LiveDisk, running_pair
from tests.namespaces import Namespace, namespaces
from tests.stack import Stack, wait_until

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-storage-daemon", "gcc", "ip", "openssl")

REDIS_PORT = 6379
RELAY_PORT = 10810


class StackApart(Stack):
    """Server and coordinator in one namespace, movers in another; they see no file but the repository."""

    def __init__(self, directory: Path, core: Namespace, movers: Namespace, pki: Path) -> None:
        where = f"{core.address}:{REDIS_PORT}"
        super().__init__(
            directory,
            env={
                "FLUSHPOINT_REDIS_URL": f"redis://{where}/0",
                "FLUSHPOINT_BROKER_URL": f"redis://{where}/1",
                "FLUSHPOINT_ALLOWED_ROOTS": f"{directory.parent}/repository:{pki}",
                "FLUSHPOINT_RELAY_TLS_DIR": str(pki),
                "FLUSHPOINT_IO_TIMEOUT_S": "3",
            },
        )
        self._core = core
        self._movers = movers
        self.redis_options = {"port": str(REDIS_PORT), "bind": core.address, "protected-mode": "no"}

    def _spawn(self, name: str, command: list[str], env: dict[str, str] | None = None) -> None:
        where = self._movers if name == "worker" else self._core
        super()._spawn(name, [*where.prefix, *command], env)


class Apart:
    def __init__(self, deployment: Deployment, hosts: list[Host], networks: list[Namespace]) -> None:
        self.deployment = deployment
        self.hosts = hosts
        self.networks = networks

    def point(self) -> int:
        number = self.deployment.published("shop")
        lead, follow = (self.deployment.number_in("shop", number, disk) for disk in ("lead/a", "follow/b"))
        assert follow <= lead <= follow + 1
        return number

    def all_write(self) -> None:
        for host in self.hosts:
            host.guest.wait_until_it_writes()


@pytest.fixture(scope="module")
def apart(guest_kit: GuestKit, module_tmpfs_path: Path) -> Iterator[Apart]:
    with ExitStack() as opened:
        core, movers, *networks = opened.enter_context(namespaces(4))
        pki = module_tmpfs_path / "pki"
        pki.mkdir()
        make_pki(pki, *(f"IP:{one.address}" for one in networks))
        stack = StackApart(module_tmpfs_path / "stack", core, movers, pki)
        opened.callback(stack.stop)
        stack.start()
        deployment = Deployment(stack, module_tmpfs_path)
        disks = LiveDisk("a"), LiveDisk("b", iothread=True)
        guests = opened.enter_context(running_pair(guest_kit, module_tmpfs_path / "pair", *disks))
        hosts = []
        for number, (guest, network) in enumerate(zip(guests, networks, strict=True), 1):
            environ = {
                "FLUSHPOINT_REDIS_URL": stack.env["FLUSHPOINT_REDIS_URL"],
                "FLUSHPOINT_RELAY_HOST": network.address,
                "FLUSHPOINT_RELAY_PORT": str(RELAY_PORT),
                "FLUSHPOINT_RELAY_TLS_DIR": str(pki),
            }
            host = Host(f"hv{number}", module_tmpfs_path / f"hv{number}", guest, environ, network.prefix)
            opened.callback(host.kill)
            host.start_agent()
            hosts.append(host)
        deployment.apply("shop", *hosts)
        yield Apart(deployment, hosts, networks)


def test_points_are_made_by_movers_that_see_no_host(apart: Apart) -> None:
    for _ in range(3):
        apart.point()
    apart.all_write()


def test_a_relay_that_dies_is_started_anew(apart: Apart) -> None:
    agent = apart.hosts[1].agent
    assert agent is not None
    (relay,) = [child for child in agent.family() if child.name() == "qemu-storage-daemon"]
    relay.kill()
    apart.deployment.checkpoint("shop")  # may fail, if it was quicker than the new relay
    apart.point()


@pytest.mark.parametrize(
    "phase", ["between-prepare-and-prepared", "between-stop-and-frozen", "between-go-and-cut", "before-stage"]
)
def test_a_host_is_cut_off_while_it_takes_part(apart: Apart, phase: str) -> None:
    """Whatever it is at, its guest runs again in time; and when it is back, the next point is whole."""
    second, network = apart.hosts[1], apart.networks[1]
    before = apart.point()
    second.start_agent(f"{phase}:stop")
    asked = apart.deployment.stack.client.ask_for_checkpoint("shop")
    wait_until(second.trip.exists, f"the agent to reach {phase}", STEP_S)
    with network.cut_off():
        second.signal_agent(signal.SIGCONT)
        apart.all_write()
    apart.deployment.ended(asked)
    assert apart.point() > before
    apart.all_write()


def test_a_host_is_cut_off_while_it_is_copied(apart: Apart) -> None:
    network = apart.networks[1]
    before = apart.point()
    client = apart.deployment.stack.client
    asked = client.ask_for_checkpoint("shop")

    def is_copied() -> bool:
        at_work = client.group("shop").round
        return at_work is None or at_work.stage in (Stage.COPYING, Stage.PUBLISHING)

    wait_until(lambda: client.group("shop").round is not None, "the round", STEP_S)
    wait_until(is_copied, "the copies to begin", STEP_S)
    with network.cut_off():
        apart.all_write()
    done = apart.deployment.ended(asked)
    assert done.state is CheckpointState.PUBLISHED or done.why
    assert apart.point() > before
