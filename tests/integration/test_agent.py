"""Agents and guards of two hosts as processes, each with a guest; agents that are killed or sleep in every phase."""

from __future__ import annotations

import asyncio
import copy
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from coordinator.ledger import RedisLedger
from coordinator.ledger.keys import DEFAULT_PREFIX, Keys
from coordinator.model.epoch import Epoch, EpochSpec, Participant, Phase
from tests.contract.conftest import ValkeyServer, running_valkey
from tests.guest import GuestKit
from tests.hosts import STEP_S, Host
from tests.live_guest import MIB, LiveDisk, LiveGuest, first_number, running_guest, running_pair
from tests.ports import free_ports
from tests.stack import wait_until
from tests.turning_guests import asked
from workers.agent.guest import OURS, look_at
from workers.agent.monitor import Monitor

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc")

GROUP = "shop"
HOUR_MS = 3_600_000
FREEZE_MS = 1500
"""What guests are promised here, on a machine that has two processors for all of this."""
BEFORE_CUT = ("between-prepare-and-prepared", "between-stop-and-frozen", "between-go-and-cut")


class Group:
    """Guests, each on a host of its own; the test is their coordinator."""

    def __init__(self, hosts: list[Host], ledger: RedisLedger, server: ValkeyServer) -> None:
        self.name = GROUP
        self.hosts = hosts
        self.server = server
        self._ledger = ledger
        term = ledger.lead("leader", HOUR_MS)
        assert term is not None
        ledger.adopt_run(term, 0)
        self._term = term

    def beside(self, name: str) -> Group:
        """Another group of the same guests."""
        other = copy.copy(self)
        other.name = name
        return other

    def open(self, hold_ms: int = HOUR_MS, disks: tuple[str, ...] = ()) -> Epoch:
        """By default of all disks."""
        parts = [
            Participant(
                vm=host.guest.directory.name,
                host=host.name,
                qmp=str(host.guest.monitor),
                disks=disks or tuple(disk.name for disk in host.guest.disks),
            )
            for host in self.hosts
        ]
        times = {"prepare_ms": 5_000, "freeze_ms": FREEZE_MS, "hold_ms": hold_ms}
        spec = EpochSpec(participants=tuple(parts), repository="0a1b", **times)
        return self._ledger.open_epoch(self._term, self.name, spec)

    def now(self) -> Epoch:
        epoch = self._ledger.newest_epoch(self.name)
        assert epoch is not None
        return epoch

    def wait_for(self, *phases: Phase) -> Epoch:
        wait_until(lambda: self.now().phase in phases, f"an epoch to be {' or '.join(phases)}", STEP_S)
        return self.now()

    def expire(self) -> list[tuple[str, str]]:
        return self._ledger.expire_epochs(self._term)

    def adopt(self) -> None:
        """The ledger's server, which was started again."""
        self._ledger.adopt_run(self._term, 0)

    def give_up(self) -> None:
        self._ledger.give_up_epoch(self._term, self.name, self.now().number, "the test gives it up")

    def check_an_epoch(self) -> None:
        """Of two guests that write in turns: it is taken and can be read, and no effect is in it without its cause."""
        self.check_and_retire(self.open())

    def check_and_retire(self, epoch: Epoch) -> None:
        read = self.wait_for(Phase.READABLE, Phase.ABORTED)
        assert read.phase is Phase.READABLE, read.why
        images = [host.staged(epoch) for host in self.hosts]
        assert [str(image) for image in images] == [
            copy.path for vm in epoch.spec.vms for copy in read.reads[vm].copies
        ]
        lead, follow = map(first_number, images)
        assert follow <= lead <= follow + 1
        self._ledger.retire_epoch(self._term, self.name, epoch.number)
        wait_until(lambda: not any(image.exists() for image in images), "images to go", STEP_S)

    def check_that_all_write(self) -> None:
        for host in self.hosts:
            host.guest.wait_until_it_writes()

    def check_that_nothing_is_left(self) -> None:
        """Of ours in the guests, whose agents are ended for that."""
        for host in self.hosts:
            host.end_agent()
            assert asyncio.run(left_in(host.guest)) == []


@pytest.fixture(scope="module")
def cluster(guest_kit: GuestKit, module_tmpfs_path: Path) -> Iterator[Group]:
    with (
        running_pair(guest_kit, module_tmpfs_path / "pair", LiveDisk("a"), LiveDisk("b", iothread=True)) as guests,
        running_valkey() as valkey,
        closing(RedisLedger(valkey.url)) as ledger,
    ):
        hosts = [
            Host(f"hv{n}", module_tmpfs_path / f"hv{n}", guest, {"FLUSHPOINT_REDIS_URL": valkey.url})
            for n, guest in enumerate(guests, start=1)
        ]
        try:
            yield Group(hosts, ledger, valkey)
        finally:
            for host in hosts:
                host.kill()


@pytest.fixture
def group(cluster: Group) -> Group:
    """One for all tests, with agents that were just started."""
    for host in cluster.hosts:
        host.start_agent()
    return cluster


@pytest.fixture
def alone(guest_kit: GuestKit, tmpfs_path: Path) -> Iterator[Group]:
    """A group of one guest, which nobody else needs, and whose agent was just started."""
    with (
        running_valkey() as valkey,
        closing(RedisLedger(valkey.url)) as ledger,
        running_guest(guest_kit, tmpfs_path / "guest", [LiveDisk("v0"), LiveDisk("v1")]) as guest,
    ):
        host = Host("hv1", tmpfs_path / "hv1", guest, {"FLUSHPOINT_REDIS_URL": valkey.url})
        try:
            host.start_agent()
            yield Group([host], ledger, valkey)
        finally:
            host.kill()


async def left_in(guest: LiveGuest) -> list[str]:
    """What of ours is in a guest that no agent holds."""
    monitor = await Monitor.connect(guest.monitor)
    try:
        nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
        jobs = [job["id"] for job in await monitor.execute("query-jobs")]
        bitmaps = [bitmap.name for disk in (await look_at(monitor)).disks for bitmap in disk.bitmaps]
        assert len(bitmaps) == 1, f"the bitmap of the newest point and no other: {bitmaps}"
        return [*jobs, *(node["node-name"] for node in nodes if node["node-name"].startswith(OURS))]
    finally:
        await monitor.close()


def test_epoch_after_epoch_is_taken_and_nothing_is_left_in_the_guests(group: Group) -> None:
    for _ in range(8):
        group.check_an_epoch()
    group.check_that_all_write()
    group.check_that_nothing_is_left()


def test_a_machine_that_is_staged_before_another_is_cut_waits_for_it(group: Group) -> None:
    first, second = group.hosts
    group.check_an_epoch()
    while True:
        second.start_agent("between-go-and-cut:stop")
        epoch = group.open()
        wait_until(second.trip.exists, "the second machine to be about to be cut", STEP_S)
        wait_until(first.staged(epoch).exists, "the first one to be staged", STEP_S)
        second.signal_agent(signal.SIGCONT)
        if "deadline" not in group.wait_for(Phase.READABLE, Phase.ABORTED).why:  # the stop was not over meanwhile
            break
    group.check_and_retire(epoch)
    group.check_that_nothing_is_left()


@pytest.mark.parametrize("point", BEFORE_CUT)
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_an_agent_that_is_lost_before_its_cut_aborts_the_epoch_and_harms_nobody(
    group: Group, point: str, action: str
) -> None:
    _, second = group.hosts
    group.check_an_epoch()
    second.start_agent(f"{point}:{action}")
    group.open()
    wait_until(second.trip.exists, f"the agent to reach {point}", STEP_S)
    group.check_that_all_write()
    if action == "stop":
        group.wait_for(Phase.ABORTED, Phase.CUTTING)  # after GO it is waited for
        second.signal_agent(signal.SIGCONT)
    else:
        second.start_agent()
    aborted = group.wait_for(Phase.ABORTED)
    assert "follow" in aborted.why
    group.check_that_all_write()
    group.check_an_epoch()
    group.check_that_nothing_is_left()


def test_a_guest_that_hangs_ends_the_epoch_and_runs_once_it_is_well(group: Group) -> None:
    """Whatever it was told meanwhile, and by whom: it is let go of, and seen to."""
    first, second = group.hosts
    group.check_an_epoch()
    second.start_agent("between-stop-and-frozen:stop")
    group.open()
    wait_until(second.trip.exists, "the agent to have stopped it", STEP_S)
    assert second.agent is not None
    log = second.agent.log
    os.kill(second.guest.pid(), signal.SIGSTOP)
    try:
        second.signal_agent(signal.SIGCONT)
        assert "follow" in group.wait_for(Phase.ABORTED).why
        assert asked(first.guest, look_at).is_running, "it waits for the other to write, but runs"
        wait_until(lambda: "nothing comes of this machine" in log.read_text(), "its agent to let go of it", STEP_S)
    finally:
        os.kill(second.guest.pid(), signal.SIGCONT)
    group.check_that_all_write()
    group.check_an_epoch()
    group.check_that_nothing_is_left()


def test_a_guest_that_is_killed_ends_the_epoch_and_takes_part_in_the_next(alone: Group, guest_kit: GuestKit) -> None:
    (host,) = alone.hosts
    with ExitStack() as opened:
        for point in (*BEFORE_CUT, "before-stage"):
            host.start_agent(f"{point}:stop")
            alone.open()
            wait_until(host.trip.exists, f"the agent to reach {point}", STEP_S)
            host.guest.guest.kill()
            host.signal_agent(signal.SIGCONT)
            assert alone.wait_for(Phase.ABORTED).why.startswith("guest: "), point
            host.guest = opened.enter_context(running_guest(guest_kit, host.guest.directory, host.guest.disks))
            alone.open()
            epoch = alone.wait_for(Phase.READABLE, Phase.ABORTED)
            assert epoch.phase is Phase.READABLE, (point, epoch.why)
            assert [path.name for path in host.scratch.iterdir()] == [epoch.name], "nothing of the guest that has ended"
            alone.give_up()


def test_an_agent_that_is_killed_while_it_stages_leaves_nothing_once_it_is_started_again(group: Group) -> None:
    _, second = group.hosts
    group.check_an_epoch()
    second.start_agent("before-stage:kill")
    group.open()
    group.wait_for(Phase.TAKEN)
    wait_until(second.trip.exists, "the agent to stage", STEP_S)
    group.check_that_all_write()
    second.start_agent()
    assert group.wait_for(Phase.ABORTED).why == "follow: its agent was started again"
    group.check_an_epoch()
    group.check_that_nothing_is_left()


def test_what_was_staged_outlives_its_agent(group: Group) -> None:
    """Killed after the epoch can be read, before, or when it is over: movers read on, or nothing is left."""
    first, second = group.hosts
    epoch = group.open()
    group.wait_for(Phase.READABLE)
    first.start_agent()
    group.check_and_retire(epoch)
    second.start_agent("between-stage-and-readable:kill")
    epoch = group.open()
    wait_until(second.trip.exists, "the agent to be killed before it could tell", STEP_S)
    second.start_agent()
    assert group.wait_for(Phase.ABORTED).why == "follow: its agent was started again"
    assert not second.staged(epoch).exists()
    epoch = group.open()
    group.wait_for(Phase.READABLE)
    second.end_agent()
    group.give_up()
    second.start_agent()
    assert not second.staged(epoch).exists()
    group.check_an_epoch()


def test_a_disk_that_cannot_be_staged_ends_the_epoch_at_once(group: Group) -> None:
    _, second = group.hosts
    group.check_an_epoch()
    place = second.scratch / f"{GROUP}@{group.now().number + 1}"
    place.write_text("in the way")
    group.open()
    aborted = group.wait_for(Phase.ABORTED)
    assert aborted.why.startswith("follow: "), aborted.why
    place.unlink()
    group.check_that_all_write()
    group.check_an_epoch()
    group.check_that_nothing_is_left()


def test_a_view_that_is_held_too_long_is_taken_away(group: Group) -> None:
    """An agent hangs and does not stage; the other has, and its guest has been free of its view for long."""
    _, second = group.hosts
    group.check_an_epoch()
    second.start_agent("before-stage:stop")
    epoch = group.open(hold_ms=2_000)
    wait_until(second.trip.exists, "the agent to hang", STEP_S)
    group.wait_for(Phase.TAKEN)
    assert group.expire() == []
    wait_until(lambda: group.expire() == [(epoch.name, "not readable in time: follow")], "its time to be over", STEP_S)
    second.signal_agent(signal.SIGCONT)
    group.check_that_all_write()
    wait_until(lambda: not any(host.staged(epoch).parent.parent.exists() for host in group.hosts), "its end", STEP_S)
    group.check_an_epoch()
    group.check_that_nothing_is_left()


def test_a_view_that_takes_too_much_ends_its_epoch(group: Group) -> None:
    """Its guest has written a lot since the cut."""
    _, second = group.hosts
    group.check_an_epoch()
    second.start_agent("before-stage:stop", {"FLUSHPOINT_VIEW_LIMIT": str(MIB // 4)})
    group.open()
    wait_until(second.trip.exists, "the agent to hang", STEP_S)
    for _ in range(16):  # 64 KiB each
        second.guest.wait_until_it_writes()
    second.signal_agent(signal.SIGCONT)
    aborted = group.wait_for(Phase.ABORTED, Phase.READABLE)
    assert "GiB of scratch, and may take 0.00" in aborted.why, aborted.why
    group.check_that_all_write()
    second.start_agent()
    group.check_an_epoch()
    group.check_that_nothing_is_left()


def test_an_epoch_that_would_fill_the_scratch_disk_is_aborted(group: Group) -> None:
    """Before it begins, and while views are held."""
    _, second = group.hosts
    group.check_an_epoch()
    second.start_agent(environ={"FLUSHPOINT_SCRATCH_RESERVE": str(1 << 60)})
    group.open()
    aborted = group.wait_for(Phase.ABORTED)
    assert "follow: the scratch directory" in aborted.why
    assert "GiB are to stay so" in aborted.why
    group.check_that_all_write()

    free = shutil.disk_usage(second.scratch).free
    filled = second.scratch / "filler"
    second.start_agent("before-stage:stop", {"FLUSHPOINT_SCRATCH_RESERVE": str(free - 64 * MIB)})
    group.open()
    wait_until(second.trip.exists, "the agent to have its views", STEP_S)
    with filled.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 128 * MIB)
    second.signal_agent(signal.SIGCONT)
    assert "GiB are to stay so" in group.wait_for(Phase.ABORTED, Phase.READABLE).why
    filled.unlink()
    second.start_agent()
    group.check_that_all_write()
    group.check_an_epoch()
    group.check_that_nothing_is_left()


def test_a_cut_that_failed_while_the_ledger_was_away_ends_the_epoch_once_it_is_back(group: Group) -> None:
    """Else all others would wait for it until the time of views is over, with their filters in place."""
    _, second = group.hosts
    group.check_an_epoch()
    second.start_agent("between-go-and-cut:stop")
    group.open()
    wait_until(second.trip.exists, "the agent to be about to cut", STEP_S)
    second.guest.wait_until_it_writes()  # the guard let it run
    group.server.kill()
    assert second.agent is not None
    log = second.agent.log
    second.signal_agent(signal.SIGCONT)
    wait_until(lambda: "nothing comes of this machine" in log.read_text(), "the cut to fail", STEP_S)
    group.server.start()
    group.adopt()
    assert "follow: " in group.wait_for(Phase.ABORTED).why
    group.check_that_all_write()
    group.check_an_epoch()
    group.check_that_nothing_is_left()


def test_epochs_that_need_a_guest_at_once_share_its_monitor(alone: Group) -> None:
    parts = {"v0": alone, "v1": alone.beside("other")}
    for disk, group in parts.items():
        group.open(disks=(disk,))
    for group in parts.values():
        epoch = group.wait_for(Phase.READABLE, Phase.ABORTED)
        assert epoch.phase is Phase.READABLE, epoch.why


@pytest.mark.needs("qemu-storage-daemon", "qemu-nbd")
def test_what_was_staged_for_an_epoch_goes_whose_end_was_not_heard(alone: Group) -> None:
    """The ledger was away, and has forgotten the news; other epochs can still be read."""
    (host,) = alone.hosts
    port = str(free_ports(1)[0])
    host.start_agent(environ={"FLUSHPOINT_RELAY_HOST": "127.0.0.1", "FLUSHPOINT_RELAY_PORT": port})
    epochs = []
    for group in (alone.beside("read"), alone):
        epochs.append(group.open())
        assert group.wait_for(Phase.READABLE, Phase.ABORTED).phase is Phase.READABLE
    host.signal_agent(signal.SIGSTOP)
    alone.server.kill()
    alone.server.start()
    alone.adopt()
    alone.give_up()
    with closing(Redis.from_url(alone.server.url)) as redis:
        redis.delete(Keys(DEFAULT_PREFIX).epoch_news(host.name))
    host.signal_agent(signal.SIGCONT)
    kept, unheard = map(host.staged, epochs)
    wait_until(lambda: not unheard.exists(), "the image to go", STEP_S)
    assert kept.exists()
    listed = subprocess.run(["qemu-nbd", "-L", "-p", port], capture_output=True, text=True, timeout=STEP_S, check=True)
    assert re.findall(r"export: '(.*)'", listed.stdout) == [f"{epochs[0].name}/guest/{disk}" for disk in ("v0", "v1")]


def test_an_agent_connects_to_no_socket_elsewhere_than_it_may(alone: Group, tmpfs_path: Path) -> None:
    """Whatever a group names, and whichever links lead there."""
    (host,) = alone.hosts
    guest = host.guest
    host.start_agent(environ={"FLUSHPOINT_AGENT_SOCKETS": f"{tmpfs_path}/none:{guest.directory}"})
    outside = tmpfs_path / "outside"
    link = guest.directory / "link"
    link.symlink_to(outside)
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(outside))
        listening.listen()
        listening.setblocking(False)
        for monitor in (outside, link, guest.directory / ".." / "outside"):
            host.guest = replace(guest, monitor=monitor)
            alone.open()
            aborted = alone.wait_for(Phase.ABORTED, Phase.READABLE)
            assert f"lies in no directory for sockets of guests: {tmpfs_path}/none, {guest.directory}" in aborted.why
        with pytest.raises(BlockingIOError):
            listening.accept()
    host.guest = guest
    alone.open()
    epoch = alone.wait_for(Phase.READABLE, Phase.ABORTED)
    assert epoch.phase is Phase.READABLE, epoch.why
