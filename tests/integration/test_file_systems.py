"""File systems of a real guest, frozen through its agent: what a cut is then worth, and that they are thawed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from coordinator.ledger import RedisLedger, open_barrier
from coordinator.model.epoch import Consistency, CutFacts, Epoch, EpochSpec, Participant, Phase
from flushpoint.cli import main
from tests.contract.conftest import running_valkey
from tests.guest import GuestKit
from tests.guest_agent_relay import Relay
from tests.hosts import STEP_S, Host
from tests.live_guest import LiveGuest, needs_recovery, running_with_files
from tests.stack import wait_until
from workers.agent.files import SHARE
from workers.agent.guard import GuardLink
from workers.agent.guest_agent import GuestAgent, GuestAgentError
from workers.agent.journal import Journal
from workers.agent.monitor import Monitor

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "mke2fs", "dumpe2fs", "e2fsck")

GROUP = "shop"
HOUR_MS = 3_600_000
FREEZE_MS = 2_000
"""What the guest is promised here, on a machine that has two processors for all of this."""
SLACK_S = 2.0
"""From the deadline until the console of such a guest shows that it writes."""
FROZEN_S = 0.5
"""For how long nothing is written before a guest is taken for one that cannot: it does so dozens of times a second."""


class Bench:
    """A guest with an agent and files, its host, and a ledger; the test is the coordinator."""

    def __init__(self, host: Host, guest: LiveGuest, ledger: RedisLedger, url: str) -> None:
        self.host = host
        self.guest = guest
        self.url = url
        self._ledger = ledger
        term = ledger.lead("leader", HOUR_MS)
        assert term is not None
        ledger.adopt_run(term, 0)
        self._term = term

    def open(
        self,
        consistency: Consistency = Consistency.FILESYSTEM,
        agent: Path | str | None = None,
        freeze_ms: int = FREEZE_MS,
        prepare_ms: int = 10_000,
        others: tuple[Participant, ...] = (),
    ) -> Epoch:
        """`agent`: by default the guest's own."""
        guest = Participant(
            vm=self.guest.directory.name,
            host=self.host.name,
            qmp=str(self.guest.monitor),
            guest_agent=str(self.guest.agent if agent is None else agent),
            disks=("v0",),
        )
        spec = EpochSpec(
            participants=(guest, *others),
            repository="0a1b",
            prepare_ms=prepare_ms,
            freeze_ms=freeze_ms,
            hold_ms=HOUR_MS,
            consistency=consistency,
        )
        return self._ledger.open_epoch(self._term, GROUP, spec)

    def now(self) -> Epoch:
        epoch = self._ledger.newest_epoch(GROUP)
        assert epoch is not None
        return epoch

    def wait_for(self, *phases: Phase) -> Epoch:
        wait_until(lambda: self.now().phase in phases, f"an epoch to be {' or '.join(phases)}", STEP_S)
        return self.now()

    def facts(self) -> CutFacts:
        """Of the epoch that is open, once it can be read."""
        epoch = self.wait_for(Phase.READABLE, Phase.ABORTED)
        assert epoch.phase is Phase.READABLE, epoch.why
        return epoch.cuts[self.guest.directory.name]

    def end(self) -> None:
        if not self.now().is_over:
            self._ledger.give_up_epoch(self._term, GROUP, self.now().number, "the test has seen what it wanted")

    def needs_recovery(self) -> bool:
        """The file system in the image that was staged."""
        staged = self.host.staged(self.now())
        image = staged.with_suffix(".raw")
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(staged), str(image)], check=True, timeout=60)
        try:
            return needs_recovery(image)
        finally:
            image.unlink()

    def wrote(self) -> int:
        return self.guest.guest.console().count("wrote ")

    def has_stopped_writing(self) -> bool:
        before = self.wrote()
        time.sleep(FROZEN_S)  # that something does not happen is no event
        return self.wrote() == before


@pytest.fixture(scope="module")
def bench_(guest_kit: GuestKit, guest_agent: Mapping[str, bytes], module_tmpfs_path: Path) -> Iterator[Bench]:
    with (
        running_with_files(guest_kit, guest_agent, module_tmpfs_path / "files") as guest,
        running_valkey() as valkey,
        closing(RedisLedger(valkey.url)) as ledger,
    ):
        host = Host("hv1", module_tmpfs_path / "hv1", guest, {"FLUSHPOINT_REDIS_URL": valkey.url})
        try:
            yield Bench(host, guest, ledger, valkey.url)
        finally:
            host.kill()


@pytest.fixture
def bench(bench_: Bench) -> Iterator[Bench]:
    """One for all tests, with an agent that was just started, and a guest that writes before and after."""
    bench_.host.start_agent()
    bench_.guest.wait_until_it_writes()
    yield bench_
    bench_.end()
    bench_.guest.wait_until_it_writes()


def by_user(guest: LiveGuest, command: str) -> dict[str, Any]:
    """Says it on the monitor of the guest's user."""

    async def say() -> dict[str, Any]:
        monitor = await Monitor.connect(guest.user)
        try:
            answer: dict[str, Any] = await monitor.execute(command)
            return answer
        finally:
            await monitor.close()

    return asyncio.run(say())


def status(agent: Path) -> str:
    """What the guest's agent tells to a client that comes now."""

    async def ask() -> str:
        connection = await GuestAgent.connect(agent)
        with closing(connection):
            await connection.greet()
            return str(await connection.execute("guest-fsfreeze-status"))

    return asyncio.run(ask())


def is_freeze(said: dict[str, Any]) -> bool:
    return said.get("execute") == "guest-fsfreeze-freeze"


def heard_by_guard(relay: Relay, said: dict[str, Any], line: bytes) -> bytes | None:
    """Reached: the guard is told that all is thawed."""
    if str(said.get("id")).startswith("flushpoint-guard") and said.get("return") == "thawed":
        relay.reached.set()
    return line


def test_what_is_cut_with_frozen_file_systems_has_nothing_to_recover(bench: Bench) -> None:
    for _ in range(3):
        bench.open(Consistency.FILESYSTEM)
        facts = bench.facts()
        assert (facts.filesystem_consistent, facts.fallback) == (True, "")
        assert not bench.needs_recovery()
        bench.end()
        bench.open(Consistency.CRASH)
        facts = bench.facts()
        assert (facts.filesystem_consistent, facts.fallback) == (False, "")
        assert bench.needs_recovery()
        bench.end()
        bench.guest.wait_until_it_writes()


def test_a_guest_whose_agent_is_not_named_or_not_there_is_cut_without(bench: Bench, tmpfs_path: Path) -> None:
    for agent, why in (("", "no guest agent is named"), (tmpfs_path / "none", "there is no guest agent's socket at")):
        bench.open(agent=agent)
        facts = bench.facts()
        assert not facts.filesystem_consistent
        assert why in facts.fallback
        assert bench.needs_recovery()
        bench.end()


def test_a_guest_whose_agent_lies_where_its_host_connects_to_nothing_is_cut_without(
    bench: Bench, tmpfs_path: Path
) -> None:
    def hear(relay: Relay, said: dict[str, Any], line: bytes) -> bytes | None:
        relay.reached.set()
        return line

    bench.host.start_agent(environ={"FLUSHPOINT_AGENT_SOCKETS": str(bench.guest.directory)})
    with Relay(tmpfs_path / "relay", bench.guest.agent, command=hear) as relay:
        bench.open(agent=relay.path)
        facts = bench.facts()
        assert not facts.filesystem_consistent
        assert "lies in no directory for sockets of guests" in facts.fallback
        assert not relay.reached.is_set()
        bench.end()
    bench.open()
    assert bench.facts().filesystem_consistent


def test_a_guest_whose_agent_is_silent_is_cut_without(bench: Bench, tmpfs_path: Path) -> None:
    """Nobody waits for it for so long that others would be waited for in vain."""

    def swallow(relay: Relay, said: dict[str, Any], line: bytes) -> bytes | None:
        return None

    with Relay(tmpfs_path / "relay", bench.guest.agent, command=swallow) as relay:
        for prepare_ms, waited in ((10_000, "2 s"), (3_000, "1.5 s")):
            bench.open(agent=relay.path, prepare_ms=prepare_ms)
            facts = bench.facts()
            assert not facts.filesystem_consistent
            assert facts.fallback == f"the guest agent did not answer for {waited}"
            bench.end()


def test_a_guest_whose_agent_refuses_is_cut_without(bench: Bench, tmpfs_path: Path) -> None:
    def refuse(relay: Relay, said: dict[str, Any], line: bytes) -> bytes | None:
        if not is_freeze(said):
            return line
        return json.dumps({**said, "execute": "guest-no-such-thing"}).encode()

    with Relay(tmpfs_path / "relay", bench.guest.agent, command=refuse) as relay:
        bench.open(agent=relay.path)
        facts = bench.facts()
    assert not facts.filesystem_consistent
    assert facts.fallback.startswith("not frozen: the guest agent refused: "), facts.fallback
    assert "guest-no-such-thing" in facts.fallback


def test_a_freeze_that_takes_too_long_is_undone_and_costs_no_epoch(bench: Bench, tmpfs_path: Path) -> None:
    """It begins only when the guest has been cut, and the thaw comes right behind it."""

    def hold(relay: Relay, said: dict[str, Any], line: bytes) -> bytes | None:
        if is_freeze(said):
            relay.release.wait(STEP_S)
        return line

    with Relay(tmpfs_path / "relay", bench.guest.agent, command=hold, answer=heard_by_guard) as relay:
        bench.open(agent=relay.path)
        facts = bench.facts()
        assert not relay.reached.is_set(), "the guest was cut before it was frozen"
        relay.release.set()
        relay.wait_until_reached()
        bench.guest.wait_until_it_writes()
    line = f"thawed file systems through {relay.path}: its agent has not heard it say so"
    assert line in bench.host.guard.log.read_text()
    assert not facts.filesystem_consistent
    assert facts.fallback.startswith("not frozen: the guest agent did not answer for "), facts.fallback


def test_file_systems_that_are_frozen_but_were_not_heard_to_be_are_thawed(bench: Bench, tmpfs_path: Path) -> None:
    def keep(relay: Relay, said: dict[str, Any], line: bytes) -> bytes | None:
        if isinstance(said.get("return"), int) and said["return"] == 1 and not relay.reached.is_set():
            relay.reached.set()
            relay.release.wait(FREEZE_MS * SHARE / 1000 + 0.5)
        return line

    with Relay(tmpfs_path / "relay", bench.guest.agent, answer=keep) as relay:
        bench.open(agent=relay.path)
        relay.wait_until_reached()
        facts = bench.facts()
        bench.guest.wait_until_it_writes()
    assert not facts.filesystem_consistent
    assert facts.fallback.startswith("not frozen: the guest agent did not answer for "), facts.fallback


def test_a_guest_that_its_user_paused_is_cut_without_and_stays_paused(bench: Bench) -> None:
    bench.open(Consistency.CRASH)  # the agent has its monitor
    bench.facts()
    bench.end()

    def pause(relay: Relay, said: dict[str, Any], line: bytes) -> bytes | None:
        if said.get("return") == "thawed":
            by_user(bench.guest, "stop")
        return line

    with Relay(bench.guest.directory / "relay", bench.guest.agent, answer=pause) as relay:
        bench.open(agent=relay.path)
        facts = bench.facts()
    try:
        assert (facts.filesystem_consistent, facts.fallback) == (False, "the guest was not running")
        assert by_user(bench.guest, "query-status")["status"] == "paused"
    finally:
        by_user(bench.guest, "cont")


def test_a_guest_that_is_paused_with_frozen_file_systems_writes_when_it_runs_again(
    bench: Bench, tmpfs_path: Path
) -> None:
    """Nobody in there can hear that they are to be thawed, until its user lets it run: long after the cut."""

    def pause(relay: Relay, said: dict[str, Any], line: bytes) -> bytes | None:
        if said.get("return") == 1 and not relay.reached.is_set():
            relay.reached.set()
            by_user(bench.guest, "stop")
        return line

    with Relay(tmpfs_path / "relay", bench.guest.agent, answer=pause) as relay:
        bench.open(agent=relay.path)
        facts = bench.facts()
        assert facts.freeze_ms == 0
        assert not facts.filesystem_consistent
        assert facts.fallback.startswith("not known to have stayed frozen: "), facts.fallback
        by_user(bench.guest, "cont")
        bench.guest.wait_until_it_writes()


def test_file_systems_that_somebody_thawed_before_the_cut_are_told_of(bench: Bench, tmpfs_path: Path) -> None:
    def thaw(relay: Relay, said: dict[str, Any], line: bytes) -> bytes | None:
        if said.get("return") == 1 and not relay.reached.is_set():
            relay.reached.set()
            relay.say("guest-fsfreeze-thaw")
        return line

    with Relay(tmpfs_path / "relay", bench.guest.agent, answer=thaw) as relay:
        bench.open(agent=relay.path)
        facts = bench.facts()
    assert not facts.filesystem_consistent
    assert facts.fallback == "somebody else thawed file systems before the guest was cut"


def test_what_somebody_else_has_frozen_is_let_alone(bench: Bench) -> None:
    async def say(command: str) -> None:
        connection = await GuestAgent.connect(bench.guest.agent)
        with closing(connection):
            await connection.greet()
            await connection.execute(command)

    asyncio.run(say("guest-fsfreeze-freeze"))
    try:
        bench.open()
        facts = bench.facts()
        assert not facts.filesystem_consistent
        assert facts.fallback == "somebody else has frozen file systems through the guest agent"
        assert status(bench.guest.agent) == "frozen"
    finally:
        asyncio.run(say("guest-fsfreeze-thaw"))


@pytest.mark.parametrize("point", ["between-files-and-stop", "between-stop-and-frozen", "between-go-and-cut"])
@pytest.mark.parametrize("action", ["kill", "stop"])
def test_file_systems_whose_agent_is_lost_are_thawed_within_the_deadline(bench: Bench, point: str, action: str) -> None:
    bench.host.start_agent(f"{point}:{action}")
    bench.open()
    wait_until(bench.host.trip.exists, f"the agent to reach {point}", STEP_S)
    reached = time.monotonic()
    if action == "stop":
        assert bench.has_stopped_writing()
    bench.guest.wait_until_it_writes()
    assert time.monotonic() - reached < FREEZE_MS / 1000 + SLACK_S
    if action == "stop":
        bench.host.signal_agent(signal.SIGCONT)
        aborted = bench.wait_for(Phase.ABORTED)
    else:
        bench.host.start_agent()
        aborted = bench.wait_for(Phase.ABORTED)
    assert aborted.why
    bench.guest.wait_until_it_writes()
    bench.open()
    assert bench.facts().filesystem_consistent


def test_what_agent_and_guard_left_frozen_is_thawed_when_an_agent_starts(bench: Bench) -> None:
    host = bench.host
    host.start_agent("between-files-and-stop:stop")
    bench.open(freeze_ms=30_000)
    wait_until(host.trip.exists, "file systems to be frozen", STEP_S)
    host.guard.kill()
    assert host.agent is not None
    host.agent.kill()
    assert status(bench.guest.agent) == "frozen"
    assert bench.has_stopped_writing()
    host.start_guard()
    host.start_agent()
    assert host.agent is not None
    assert f"thawed file systems through {bench.guest.agent}" in host.agent.log.read_text()
    bench.guest.wait_until_it_writes()
    assert status(bench.guest.agent) == "thawed"


@pytest.mark.parametrize("end", ["abort", "agent"])
def test_an_epoch_or_an_agent_that_ends_while_file_systems_are_frozen_thaws_them_at_once(
    bench: Bench, end: str
) -> None:
    """Far before the deadline: another machine cannot go on, or somebody ends the agent."""
    other = Participant(vm="other", host="elsewhere", disks=("v0",))

    async def wait_for_frozen() -> None:
        async with aclosing(open_barrier(bench.url)) as barrier:
            epoch = bench.open(freeze_ms=30_000, others=(other,))
            await barrier.prepared(epoch, "other")
            while "files" not in bench.now().frozen:
                await asyncio.sleep(0.01)
            assert bench.has_stopped_writing()
            if end == "abort":
                await barrier.abort(epoch, "other", "its disk hangs")

    asyncio.run(asyncio.wait_for(wait_for_frozen(), STEP_S))
    begun = time.monotonic()
    if end == "agent":
        bench.host.end_agent()
        assert status(bench.guest.agent) == "thawed"
    bench.guest.wait_until_it_writes()
    assert time.monotonic() - begun < SLACK_S
    if end == "abort":
        assert bench.wait_for(Phase.ABORTED).why == "other: its disk hangs"
    journal = Journal(bench.host.journal).files
    wait_until(lambda: list(journal.frozen()) == [], "the journal to forget it", STEP_S)


def test_file_systems_that_an_agent_freezes_after_its_deadline_are_thawed(bench: Bench) -> None:
    """As if it had slept between telling the guard and the freeze, and then for good."""
    bench.host.end_agent()
    guard = bench.host.guard.log

    async def late() -> None:
        connection = await GuestAgent.connect(bench.guest.agent)
        with closing(connection), closing(GuardLink(bench.host.guard_socket)) as link:
            await connection.greet()
            link.freeze_files("late", connection.fileno(), 0.1)
            wait_until(lambda: "thawed file systems through late" in guard.read_text(), "the deadline to be over")
            with suppress(GuestAgentError):  # the guard may have read that it is frozen
                await connection.execute("guest-fsfreeze-freeze")
            bench.guest.wait_until_it_writes()
            link.thawed("late")

    asyncio.run(late())


def test_a_guard_that_is_told_to_end_leaves_nothing_frozen(bench: Bench) -> None:
    host = bench.host
    host.start_agent("between-files-and-stop:stop")
    bench.open(freeze_ms=30_000)
    wait_until(host.trip.exists, "file systems to be frozen", STEP_S)
    assert bench.has_stopped_writing()
    host.guard.terminate()
    try:
        bench.guest.wait_until_it_writes()
    finally:
        assert host.agent is not None
        host.agent.kill()
        host.start_guard()


def test_doctor_tells_whether_a_guest_agent_answers(
    bench: Bench, tmpfs_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", "--json", "--guest-agent", str(bench.guest.agent), "--guest-agent", str(tmpfs_path / "none")]
    assert main(words) == 1
    there, not_there = json.loads(capsys.readouterr().out)["checks"]
    assert (there["ok"], there["detail"]) == (True, "answers, and no file system is frozen")
    assert not not_there["ok"]
    assert "there is no guest agent's socket" in not_there["detail"]
