"""Guests that write in turns move to other images: all of a guest's disks or none, and not a write is lost.

Every block on their disks tells which write it was, so that a disk is compared with what its guest has written.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from coordinator.ledger import RedisLedger
from coordinator.model.epoch import Epoch, EpochSpec, Participant, Phase
from tests.contract.conftest import running_valkey
from tests.guest import GuestKit
from tests.hosts import STEP_S, Host
from tests.live_guest import MIB, LiveDisk, running_pair
from tests.stack import Process, accepts, wait_until
from tests.turning_guests import at, digest, disk_of, name_of, newest_of, ours_in, standing_still
from workers.agent.cut import let_run
from workers.agent.journal import Journal
from workers.agent.moves import target_node

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-nbd", "gcc")

GROUP = "shop"
HOUR_MS = 3_600_000
FREEZE_MS = 1500
"""What guests are promised here, on a machine that has two processors for all of this."""
SIZE = 16 * MIB
BEFORE_GO = ("between-stop-and-delta", "between-pending-and-frozen")


class Group:
    """Two guests, each on a host of its own; the test is their coordinator, and makes the passes."""

    def __init__(self, hosts: list[Host], ledger: RedisLedger, directory: Path) -> None:
        self.hosts = hosts
        self._ledger = ledger
        self._directory = directory
        self._moves = 0
        term = ledger.lead("leader", HOUR_MS)
        assert term is not None
        ledger.adopt_run(term, 0)
        self._term = term

    def open(self, parent: int = 0, pivots: dict[str, str] | None = None) -> Epoch:
        parts = [
            Participant(vm=name_of(host), host=host.name, qmp=str(host.guest.monitor), disks=(disk_of(host),))
            for host in self.hosts
        ]
        times = {"prepare_ms": 5_000, "freeze_ms": FREEZE_MS, "hold_ms": HOUR_MS}
        parents = {f"{name_of(host)}/{disk_of(host)}": parent for host in self.hosts} if parent else {}
        spec = EpochSpec(participants=tuple(parts), repository="0a1b", parents=parents, pivots=pivots or {}, **times)
        return self._ledger.open_epoch(self._term, GROUP, spec)

    def now(self) -> Epoch:
        epoch = self._ledger.newest_epoch(GROUP)
        assert epoch is not None
        return epoch

    def retire(self) -> None:
        self._ledger.retire_epoch(self._term, GROUP, self.now().number)

    def end(self) -> None:
        """Whatever a test that failed has left."""
        if not self.now().is_over:
            self._ledger.give_up_epoch(self._term, GROUP, self.now().number, "the test is over")

    def wait_for(self, *phases: Phase) -> Epoch:
        wait_until(lambda: self.now().phase in phases, f"an epoch to be {' or '.join(phases)}", STEP_S)
        return self.now()

    def filled(self, format: str = "raw") -> Filled:
        """New targets, by a first pass, after which guests have written."""
        epoch = self.open()
        read = self.wait_for(Phase.READABLE, Phase.ABORTED)
        assert read.phase is Phase.READABLE, read.why
        self._moves += 1
        targets = []
        for host in self.hosts:
            target = self._directory / f"{name_of(host)}-{self._moves}.{format}"
            staged = str(host.staged(epoch))
            command = ["qemu-img", "convert", "-f", "qcow2", "-O", format, staged, str(target)]
            subprocess.run(command, check=True, timeout=30)
            targets.append(target)
        self.retire()
        self.check_that_all_write()
        return Filled(self, epoch.number, {name_of(h): str(t) for h, t in zip(self.hosts, targets, strict=True)})

    def check_that_all_write(self) -> None:
        """More than they have until now."""
        consoles = [host.guest.guest.console for host in self.hosts]
        seen = [console().count("wrote ") for console in consoles]
        for console, count in zip(consoles, seen, strict=True):
            wait_until(lambda read=console, n=count: read().count("wrote ") > n, "more writes", STEP_S)  # type: ignore[misc]
            assert "a write failed" not in console()

    def check_disks(self, uris: dict[str, str]) -> None:
        """Those that guests are attached to hold all that these have written, and no effect without its cause."""
        with ExitStack() as stack:
            for host in self.hosts:
                stack.enter_context(standing_still(host.guest))
            lead, follow = (newest_of(host, uris[name_of(host)]) for host in self.hosts)
        assert follow <= lead <= follow + 1

    def sources(self) -> dict[str, str]:
        """Where guests are."""
        return {name_of(host): at(host.guest)[1] for host in self.hosts}


class Filled:
    """Targets that hold the group as of the point `parent`, by the names of its machines."""

    def __init__(self, group: Group, parent: int, uris: dict[str, str]) -> None:
        self.group = group
        self.parent = parent
        self.uris = uris

    def open(self) -> Epoch:
        pivots = {f"{name_of(host)}/{disk_of(host)}": self.uris[name_of(host)] for host in self.group.hosts}
        return self.group.open(self.parent, pivots)

    def has_moved(self, host: Host) -> bool:
        return at(host.guest)[0] == target_node(self.uris[name_of(host)])

    def pivot(self) -> Epoch:
        """All have moved and lost nothing, and nothing is left in them but that."""
        self.open()
        moved = self.group.wait_for(Phase.READABLE, Phase.ABORTED)
        assert moved.phase is Phase.READABLE, moved.why
        assert all(self.has_moved(host) for host in self.group.hosts)
        self.group.check_that_all_write()
        self.group.check_disks(self.uris)
        for host in self.group.hosts:
            wait_until(lambda host=host: self.has_nothing_else(host), "what was used to go", STEP_S)  # type: ignore[misc]
        self.group.retire()
        return moved

    def has_nothing_else(self, host: Host) -> bool:
        jobs, nodes = ours_in(host.guest)
        moved_to = {at(host.guest)[0]}
        return not jobs and nodes <= moved_to

    def check_that_none_has_moved(self, sources: dict[str, str]) -> None:
        assert not any(self.has_moved(host) for host in self.group.hosts)
        assert self.group.sources() == sources
        self.group.check_that_all_write()


@pytest.fixture(scope="module")
def cluster(guest_kit: GuestKit, module_tmpfs_path: Path) -> Iterator[Group]:
    lead, follow = LiveDisk("a", size=SIZE), LiveDisk("b", iothread=True, size=SIZE)
    with (
        running_pair(guest_kit, module_tmpfs_path / "pair", lead, follow) as guests,
        running_valkey() as valkey,
        closing(RedisLedger(valkey.url)) as ledger,
    ):
        environ = {"FLUSHPOINT_REDIS_URL": valkey.url, "FLUSHPOINT_ALLOWED_ROOTS": str(module_tmpfs_path)}
        hosts = [Host(f"hv{n}", module_tmpfs_path / f"hv{n}", guest, environ) for n, guest in enumerate(guests, 1)]
        try:
            for host in hosts:
                host.start_agent()
            yield Group(hosts, ledger, module_tmpfs_path)
        finally:
            for host in hosts:
                host.kill()


@pytest.fixture
def group(cluster: Group) -> Iterator[Group]:
    """One for all tests; each leaves its agents as they are started, and no epoch open."""
    yield cluster
    cluster.end()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_guests_move_and_lose_no_write(group: Group, format: str) -> None:
    sources = group.sources()
    moved = group.filled(format).pivot()
    assert all(0 < facts.freeze_ms < FREEZE_MS for facts in moved.cuts.values())
    before = [digest(path) for path in sources.values()]
    group.check_that_all_write()
    assert [digest(path) for path in sources.values()] == before


def test_a_machine_that_cannot_move_keeps_all_where_they_are(group: Group) -> None:
    """Its target has another size, is none that its agent may open, was filled too long ago, or fails when it is
    written."""
    _, second = group.hosts
    before, filled = group.filled(), group.filled()
    sources, follow = group.sources(), Path(filled.uris["follow"])
    for uri, parent, why in (
        (f"{follow}.small", filled.parent, f"has {SIZE // 2} bytes, and the disk has {SIZE}"),
        ("/etc/hostname", filled.parent, "outside the worker's allowed roots"),
        (str(follow), before.parent, "has to be filled by another pass: no bitmap records"),
    ):
        if uri.endswith(".small"):
            Path(uri).write_bytes(bytes(SIZE // 2))
        Filled(group, parent, {**filled.uris, "follow": uri}).open()
        aborted = group.wait_for(Phase.ABORTED, Phase.READABLE)
        assert why in aborted.why, aborted.why
        filled.check_that_none_has_moved(sources)
    with served(follow, second) as server:
        second.start_agent("between-stop-and-delta:stop")
        Filled(group, filled.parent, {**filled.uris, "follow": server.uri}).open()
        wait_until(second.trip.exists, "the second machine to stand still", STEP_S)
        server.kill()
        second.signal_agent(signal.SIGCONT)
        aborted = group.wait_for(Phase.ABORTED, Phase.READABLE)
        assert aborted.why.startswith("follow: the target cannot be written"), aborted.why
        filled.check_that_none_has_moved(sources)
    for host in group.hosts:
        wait_until(lambda host=host: filled.has_nothing_else(host), "targets to be closed", STEP_S)  # type: ignore[misc]
    filled.pivot()


@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize("point", BEFORE_GO)
def test_an_agent_that_is_lost_before_all_may_move_keeps_all_where_they_are(
    group: Group, point: str, action: str
) -> None:
    sources, filled = group.sources(), group.filled()
    lose_agent(group, filled, point, action)
    aborted = group.wait_for(Phase.ABORTED, Phase.READABLE)
    assert "follow" in aborted.why, aborted.why
    filled.check_that_none_has_moved(sources)
    filled.pivot()


def test_what_agent_and_guard_left_half_moved_runs_where_it_was_when_an_agent_starts(group: Group) -> None:
    """And writes, before anything else is done: its pending jobs would not let it."""
    _, second = group.hosts
    sources, filled = group.sources(), group.filled()
    second.start_agent("between-pending-and-frozen:stop")
    filled.open()
    wait_until(second.trip.exists, "the second machine to wait for the decision", STEP_S)
    second.guard.kill()
    second.kill_agent()
    (said,) = asyncio.run(let_run(Journal(second.journal)))
    assert said.startswith(f"let {second.guest.monitor} run")
    group.check_that_all_write()
    second.start_guard()
    second.start_agent()
    assert "follow" in group.wait_for(Phase.ABORTED, Phase.READABLE).why
    filled.check_that_none_has_moved(sources)
    filled.pivot()


@pytest.mark.parametrize("action", ["kill", "stop"])
def test_an_agent_that_is_lost_before_it_can_move_its_machine_keeps_that_one_where_it_is(
    group: Group, action: str
) -> None:
    first, second = group.hosts
    sources, filled = group.sources(), group.filled()
    lose_agent(group, filled, "between-go-and-switch", action)
    aborted = group.wait_for(Phase.ABORTED, Phase.READABLE)
    lost = {"kill": "its agent was started again", "stop": "it was let run before it could move"}
    assert aborted.why.startswith(f"follow: {lost[action]}"), aborted.why
    assert filled.has_moved(first)
    assert at(second.guest)[1] == sources["follow"]
    group.check_disks({**filled.uris, "follow": sources["follow"]})
    filled.pivot()


@pytest.mark.parametrize("action", ["kill", "stop"])
def test_a_machine_has_moved_whatever_becomes_of_its_agent_after_that(group: Group, action: str) -> None:
    filled = group.filled()
    lose_agent(group, filled, "between-switch-and-ask", action)
    ended = group.wait_for(Phase.ABORTED, Phase.READABLE)
    assert ended.why == ("follow: its agent was started again" if action == "kill" else "")
    assert all(filled.has_moved(host) for host in group.hosts)
    group.check_disks(filled.uris)
    if ended.phase is Phase.READABLE:
        group.retire()
    filled.pivot()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_machine_whose_target_dies_at_last_goes_back(group: Group, fault: signal.Signals) -> None:
    """Its server is killed, or hangs, when all was written and nobody asks it any more."""
    first, second = group.hosts
    sources, filled = group.sources(), group.filled()
    with served(Path(filled.uris["follow"]), second) as server:
        remote = Filled(group, filled.parent, {**filled.uris, "follow": server.uri})
        second.start_agent("between-go-and-switch:stop")
        remote.open()
        wait_until(second.trip.exists, "the second machine to be about to move", STEP_S)
        os.kill(server.pid, fault)
        second.signal_agent(signal.SIGCONT)
        aborted = group.wait_for(Phase.ABORTED, Phase.READABLE)
        assert aborted.why.startswith("follow: it runs where it was, since its target cannot be read"), aborted.why
        group.check_that_all_write()
        assert remote.has_moved(first)
        assert at(second.guest)[1] == sources["follow"]
        group.check_disks({**filled.uris, "follow": sources["follow"]})
        server.kill()
        server.start()
        second.start_agent()
        remote.pivot()
        group.filled().pivot()


class Served:
    """A raw image that a server writes which may be lost."""

    def __init__(self, image: Path, host: Host) -> None:
        self._image = image
        self._socket = host.scratch / "nbd"
        self.uri = f"nbd+unix:///target?socket={self._socket}"
        self.start()

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        command = ["qemu-nbd", "--persistent", "--shared=4", "-f", "raw", "-x", "target", "-k", str(self._socket)]
        self._process = Process([*command, str(self._image)], self._image.with_suffix(".nbd.log"))
        self.pid = self._process.pid
        wait_until(lambda: accepts(self._socket), "the server of a target", STEP_S)

    def kill(self) -> None:
        self._process.kill()


@contextmanager
def served(image: Path, host: Host) -> Iterator[Served]:
    server = Served(image, host)
    try:
        yield server
    finally:
        server.kill()


def lose_agent(group: Group, filled: Filled, point: str, action: str) -> None:
    """That of the second host: killed and started again, or asleep until its guest has been let run. Both guests run
    meanwhile, as far as they are not one of those that wait for the ledger."""
    _, second = group.hosts
    second.start_agent(f"{point}:{action}")
    filled.open()
    wait_until(second.trip.exists, f"the agent to reach {point}", STEP_S)
    group.check_that_all_write()
    if action == "stop":
        second.signal_agent(signal.SIGCONT)
    else:
        second.start_agent()
        assert filled.has_nothing_else(second)
