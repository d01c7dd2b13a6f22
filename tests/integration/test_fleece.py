"""Disks that are read straight from their guests' QEMUs: points are right, and nobody is harmed by being read."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from coordinator.ledger import RedisLedger
from coordinator.model.epoch import DiskCopy, Epoch, Phase, ViewKind
from coordinator.model.errors import FlushpointError
from coordinator.model.group import GroupPolicy, GroupVerb
from coordinator.model.view import CheckpointState, CheckpointView, JobView
from tests.deployment import FREEZE_S, Deployment, member_of
from tests.group_disks import Disks
from tests.guest import GuestKit
from tests.hosts import STEP_S, Host
from tests.live_guest import MIB, LiveDisk, LiveGuest, wandering_guest
from tests.ports import free_ports
from tests.stack import accepts, running_stack, wait_until
from workers.agent.guest import OURS
from workers.agent.monitor import Monitor
from workers.nbd.connection import connect
from workers.nbd.endpoint import Endpoint

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-storage-daemon", "gcc", "mount")

POLICY = GroupPolicy(freeze_timeout=FREEZE_S, prepare_timeout=10, views=ViewKind.FLEECE)
SLOW = 1024
"""Bytes a second: so that a copy is not done before it is paused."""
USER = frozenset({"cont", "query-block-exports", "query-named-block-nodes", "query-status", "stop"})
SERVER = frozenset({"nbd-server-start", "nbd-server-stop"})
SIZE = 24 * MIB
SCRATCH = 16 * SIZE


@pytest.fixture(scope="module")
def deployment(module_tmpfs_path: Path) -> Iterator[Deployment]:
    with running_stack(module_tmpfs_path / "stack") as stack:
        yield Deployment(stack, module_tmpfs_path)


@pytest.fixture(scope="module")
def scratch(module_tmpfs_path: Path) -> Iterator[Path]:
    """That can be filled."""
    path = module_tmpfs_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SCRATCH}", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def host(deployment: Deployment, guest_kit: GuestKit, scratch: Path) -> Iterator[Host]:
    """Of a guest with disks that can be read, `a`, `b` and `d`, and one that many QEMUs die of, `c`."""
    disks = (
        LiveDisk("a", size=SIZE),
        LiveDisk("b", bus="virtio-scsi", size=SIZE),
        LiveDisk("c", iothread=True, size=SIZE),
        LiveDisk("d", size=SIZE),
    )
    with (
        wandering_guest(guest_kit, deployment.directory / "vm", disks) as guest,
        deployment.host("hv1", guest) as host,
    ):
        yield host


@pytest.fixture(scope="module")
def tested(deployment: Deployment, host: Host, scratch: Path) -> Disks:
    """The group of all disks but `d`, with a point to build on. Movers read as if they were elsewhere."""
    environ = {"FLUSHPOINT_SCRATCH_DIR": str(scratch), "FLUSHPOINT_SCRATCH_RESERVE": "0"}
    environ |= {"FLUSHPOINT_RELAY_HOST": "127.0.0.1", "FLUSHPOINT_RELAY_PORT": str(free_ports(1)[0])}
    host.start_agent(environ=environ)
    apply(deployment, host, "shop", "abc", POLICY)
    deployment.published("shop")
    host.guest = LiveGuest(host.guest.guest, host.guest.monitor, host.guest.directory, host.guest.disks[:3])
    return Disks(deployment, host, "shop", environ)


def apply(deployment: Deployment, host: Host, group: str, disks: str, policy: GroupPolicy) -> None:
    member = member_of(host).model_copy(update={"disks": tuple(disks)})
    deployment.apply_members(group, [member], policy)


def newest(deployment: Deployment, group: str) -> Epoch:
    with closing(RedisLedger(deployment.stack.env["FLUSHPOINT_REDIS_URL"])) as ledger:
        epoch = ledger.newest_epoch(group)
    assert epoch is not None
    return epoch


def views_of(epoch: Epoch) -> dict[str, str]:
    """Of each disk, why it was staged; "" for a fleece."""
    views = epoch.cuts["vm"].views
    assert all((view.kind is ViewKind.STAGE) == bool(view.why) for view in views)
    return {view.disk: view.why for view in views}


@contextmanager
def resting_round(tested: Disks, policy: GroupPolicy = POLICY) -> Iterator[tuple[CheckpointView, Epoch]]:
    """A round that is at its copies, which rest until the block ends."""
    deployment, client = tested.deployment, tested.deployment.stack.client
    apply(deployment, tested.host, "shop", "abc", policy.model_copy(update={"speed": SLOW}))
    before = newest(deployment, "shop").number
    asked = client.ask_for_checkpoint("shop")

    def is_read() -> bool:
        epoch = newest(deployment, "shop")
        return epoch.number > before and epoch.phase is Phase.READABLE

    try:
        wait_until(is_read, "a round to copy", STEP_S)
        epoch = newest(deployment, "shop")
        assert {"a", "b"} <= epoch.fleeced("vm")
        wait_until(lambda: [job.len > 0 for job in jobs_of(deployment, epoch)] == [True] * 3, "copies", STEP_S)
        client.act_on_group("shop", GroupVerb.PAUSE)
        yield asked, epoch
    finally:
        apply(deployment, tested.host, "shop", "abc", POLICY)
        client.act_on_group("shop", GroupVerb.RESUME)


def copies_of(epoch: Epoch) -> list[DiskCopy]:
    """Those that are fleeces."""
    return [copy for copy in epoch.reads["vm"].copies if copy.disk in epoch.fleeced("vm")]


def jobs_of(deployment: Deployment, epoch: Epoch) -> list[JobView]:
    """One a disk, once they are there."""
    sources = [copy.uri for copy in epoch.reads["vm"].copies]
    return [job for job in deployment.stack.client.jobs() if job.spec.source in sources]


def readers_of(host: Host) -> list[psutil.Process]:
    assert host.agent is not None
    found = psutil.Process(host.agent.pid).children(recursive=True)
    return [one for one in found if "workers.agent.reader" in one.cmdline()]


def by_user(guest: LiveGuest, *commands: tuple[str, dict[str, object]]) -> list[object]:
    """What QEMU answers to its user, whose monitor the agent does not have. GuestSilentError after ten seconds."""

    async def asked() -> list[object]:
        monitor = await Monitor.connect(guest.user, allowed=USER | SERVER)
        try:
            return [await monitor.execute(*command) for command in commands]
        finally:
            await monitor.close()

    return asyncio.run(asked())


def left_in(guest: LiveGuest) -> list[str]:
    """What of us is in there."""
    nodes, exports = by_user(guest, ("query-named-block-nodes", {"flat": True}), ("query-block-exports", {}))
    assert isinstance(nodes, list)
    assert isinstance(exports, list)
    names = [*(node["node-name"] for node in nodes), *(export["id"] for export in exports)]
    return [name for name in names if name.startswith(OURS)]


@contextmanager
def reading_much(uri: str) -> Iterator[None]:
    """So that there is always something in flight between a reader and its guest."""
    begun, ends = threading.Event(), threading.Event()

    def read() -> None:
        with suppress(FlushpointError), connect(Endpoint.parse(uri)) as reading:
            buffer = memoryview(bytearray(8 * MIB))
            while not ends.is_set():
                reading.read_into(0, buffer)
                begun.set()

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert begun.wait(STEP_S)
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join()


@contextmanager
def standing_still(guest: LiveGuest) -> Iterator[None]:
    """It is cut so, unless the block lets it run: all that it writes then is written over what a view needs."""
    guest.wait_until_it_writes()
    by_user(guest, ("stop", {}))
    try:
        yield
    finally:
        by_user(guest, ("cont", {}))


def wait_until_refused(host: Host) -> None:
    """Until its agent has said why nothing can be read any more, to the world and to whoever reads."""
    assert host.agent is not None
    log = host.agent.log
    wait_until(lambda: "is not read any more" in log.read_text(), "the view to be withdrawn", STEP_S)
    wait_until(lambda: len(readers_of(host)) == 1, "one that tells so", STEP_S)


def check_unharmed(guest: LiveGuest) -> None:
    """It writes, there is nothing of us in it, and it can be read by others."""
    wait_until(lambda: left_in(guest) == [], "the guest to be rid of us", STEP_S)
    guest.wait_until_it_writes()
    assert "error" not in guest.guest.console().lower()
    where = {"type": "unix", "data": {"path": str(guest.directory / "users.nbd")}}
    by_user(guest, ("nbd-server-start", {"addr": where}), ("nbd-server-stop", {}))


def check_failed(tested: Disks, asked: CheckpointView, why: str) -> None:
    """The round, and nothing else: its guest is as it was, and the next point is right."""
    done = tested.deployment.ended(asked)
    assert done.state is CheckpointState.FAILED
    assert why in done.why
    check_unharmed(tested.host.guest)
    tested.check(tested.cloned_point())
    assert views_of(newest(tested.deployment, "shop"))["a"] == ""


def test_points_that_are_read_from_guests_equal_clones_made_in_their_stops(tested: Disks) -> None:
    for _ in range(2):
        tested.check(tested.cloned_point())
        views = views_of(newest(tested.deployment, "shop"))
        assert views["a"] == views["b"] == ""
        assert views["c"] in ("", "its QEMU died (SIGABRT) when a disk with an IOThread was read")  # test_probe.py
        tested.host.guest.wait_until_it_writes()
    point = tested.deployment.point("shop", newest(tested.deployment, "shop").number)
    for member in point.members:
        assert member.reason.startswith("by bitmap")
        assert 0 < member.bytes_read <= member.size


def test_a_view_is_read_as_it_was_while_its_guest_writes_over_it(tested: Disks) -> None:
    held: dict[str, bytearray] = {}
    with resting_round(tested) as (asked, epoch):
        for copy in copies_of(epoch):
            with connect(Endpoint.parse(copy.path)) as reading:
                held[copy.disk] = bytearray(reading.size)
                reading.read_into(0, memoryview(held[copy.disk]))
        for _ in range(4):
            tested.host.guest.wait_until_it_writes()
    assert {"a", "b"} <= set(held)
    point = tested.deployment.ended(asked).point
    after = tested.deployment.published("shop")
    for disk, content in held.items():
        assert tested.deployment.bytes_of("shop", point, f"vm/{disk}") == content
        assert tested.deployment.bytes_of("shop", after, f"vm/{disk}") != content


def test_a_server_of_the_users_own_is_left_alone(tested: Disks) -> None:
    guest, path = tested.host.guest, tested.host.guest.directory / "users.nbd"
    where = {"type": "unix", "data": {"path": str(path)}}
    by_user(guest, ("nbd-server-start", {"addr": where}))
    tested.deployment.published("shop")
    views = views_of(newest(tested.deployment, "shop"))
    assert "NBD server already running" in views["a"]
    assert "NBD server already running" in views["b"]
    assert accepts(path)
    by_user(guest, ("nbd-server-stop", {}))
    check_unharmed(guest)


def test_a_guest_can_be_stopped_and_cut_for_another_group_while_it_is_read(tested: Disks) -> None:
    deployment, host = tested.deployment, tested.host
    with resting_round(tested) as (asked, epoch):
        with reading_much(copies_of(epoch)[0].path):
            by_user(host.guest, *[("stop", {}), ("cont", {})] * 10)
        apply(deployment, host, "side", "d", POLICY)
        deployment.published("side")
        deployment.published("side")
        assert "NBD server already running" in views_of(newest(deployment, "side"))["d"]
        assert newest(deployment, "shop").phase is Phase.READABLE
    assert tested.deployment.ended(asked).state is CheckpointState.PUBLISHED
    check_unharmed(tested.host.guest)


def test_a_reader_that_hangs_is_killed_and_keeps_no_guest_from_stopping(tested: Disks) -> None:
    """Its agent sleeps as well. What is in flight then is left unread."""
    host = tested.host
    with resting_round(tested) as (asked, epoch):
        with reading_much(copies_of(epoch)[0].path):
            (reader,) = readers_of(host)
            host.signal_agent(signal.SIGSTOP)
            try:
                os.kill(reader.pid, signal.SIGSTOP)
                by_user(host.guest, ("stop", {}), ("query-status", {}), ("cont", {}))
                wait_until(lambda: "killed what reads" in host.guard.log.read_text(), "the guard to act", STEP_S)
                host.guest.wait_until_it_writes()
            finally:
                host.signal_agent(signal.SIGCONT)
        wait_until_refused(host)
    check_failed(tested, asked, "the reader of the view was killed")


def test_a_scratch_directory_that_is_full_fails_the_round_and_not_the_guest(tested: Disks, scratch: Path) -> None:
    filler, guest = scratch / "filler", tested.host.guest
    with standing_still(guest), resting_round(tested) as (asked, _):
        with filler.open("wb") as file, suppress(OSError):
            while True:
                file.write(bytes(MIB))
        by_user(guest, ("cont", {}))
        guest.wait_until_it_writes()
        filler.unlink()
    check_failed(tested, asked, "the view broke")


def test_a_view_that_takes_too_much_of_the_scratch_directory_is_withdrawn(tested: Disks) -> None:
    tested.host.start_agent(environ={**tested.environ, "FLUSHPOINT_VIEW_LIMIT": str(2 * MIB)})
    with standing_still(tested.host.guest), resting_round(tested) as (asked, _):
        by_user(tested.host.guest, ("cont", {}))
        wait_until_refused(tested.host)
    check_failed(tested, asked, "GiB of scratch, and may take 0.00")


def test_a_view_is_not_held_for_longer_than_its_policy_says(tested: Disks) -> None:
    with resting_round(tested, POLICY.model_copy(update={"hold_timeout": 5.0})) as (asked, _):
        wait_until_refused(tested.host)
    check_failed(tested, asked, "views may be held for 5 s, and those of vm were")


def test_an_agent_that_is_killed_leaves_nothing_that_is_read(tested: Disks) -> None:
    with resting_round(tested) as (asked, _):
        (reader,) = readers_of(tested.host)
        tested.host.signal_agent(signal.SIGKILL)
        psutil.wait_procs([reader], STEP_S)
        assert not reader.is_running()
        tested.host.guest.wait_until_it_writes()
        tested.host.start_agent(environ=tested.environ)
    check_failed(tested, asked, "its agent was started again")


def test_a_guest_that_is_killed_while_it_is_read_leaves_nothing(tested: Disks, scratch: Path) -> None:
    """The last test: there is no guest after it."""
    with resting_round(tested) as (asked, _):
        tested.host.guest.guest.kill()
        wait_until_refused(tested.host)
    done = tested.deployment.ended(asked)
    assert done.state is CheckpointState.FAILED
    assert "its guest has ended" in done.why
    left = {"relay.qmp"}
    wait_until(lambda: {path.name for path in scratch.iterdir()} == left, "the scratch directory to be empty", STEP_S)
