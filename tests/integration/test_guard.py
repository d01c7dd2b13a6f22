"""Whatever happens to the agent, the guard or both: a guest that was stopped runs again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from coordinator.model.errors import RefusedError, UnavailableError
from tests.guest import GuestKit
from tests.live_guest import LiveDisk, LiveGuest, running_guest
from tests.stack import Process, wait_until
from workers.agent.cut import Vm, let_run
from workers.agent.guard import Guard, GuardLink
from workers.agent.journal import Journal
from workers.agent.monitor import Monitor

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc")

LONG_S = 30.0
"""A deadline that nobody waits for."""
AGENT = """
import asyncio, sys, time
from pathlib import Path
from workers.agent.cut import Vm
from workers.agent.guard import GuardLink
from workers.agent.journal import Journal
from workers.agent.monitor import Monitor

async def main():
    monitor, guard, journal, deadline_s = sys.argv[1:]
    vm = Vm(await Monitor.connect(Path(monitor)), GuardLink(Path(guard)), Journal(Path(journal)))
    frozen = await vm.freeze(float(deadline_s))
    print("frozen", flush=True)
    time.sleep(60)  # an agent that hangs

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def booted(guest_kit: GuestKit, module_tmpfs_path: Path) -> Iterator[LiveGuest]:
    with running_guest(guest_kit, module_tmpfs_path / "guest", [LiveDisk("v0")]) as running:
        yield running


@pytest.fixture
def guest(booted: LiveGuest) -> LiveGuest:
    """One for all tests, which runs when a test begins, whatever the one before has done."""
    asyncio.run(run_on(booted))
    booted.wait_until_it_writes()
    return booted


async def run_on(guest: LiveGuest) -> None:
    monitor = await Monitor.connect(guest.monitor)
    await monitor.execute("cont")
    await monitor.close()


@pytest.fixture
def guard(tmpfs_path: Path) -> Iterator[Process]:
    path = tmpfs_path / "guard"
    command = [sys.executable, "-m", "flushpoint", "guard"]
    process = Process(command, tmpfs_path / "guard.log", {**os.environ, "FLUSHPOINT_GUARD_SOCKET": str(path)})
    wait_until(path.exists, "the guard's socket")
    try:
        yield process
    finally:
        process.kill()


def agent_that_hangs(guest: LiveGuest, directory: Path, deadline_s: float) -> Process:
    words = [str(guest.monitor), str(directory / "guard"), str(directory / "journal"), str(deadline_s)]
    process = Process([sys.executable, "-c", AGENT, *words], directory / "agent.log")
    wait_until(lambda: "frozen" in (directory / "agent.log").read_text(), "the guest to be frozen")
    return process


def has_stopped_writing(guest: LiveGuest) -> bool:
    """Whether its processor has done nothing for a while."""
    before = _guest_cpu(guest)
    subprocess.run(["sleep", "0.3"], check=True)
    return _guest_cpu(guest) - before <= 1


def _guest_cpu(guest: LiveGuest) -> int:
    """Ticks of QEMU's threads (proc(5))."""
    fields = Path(f"/proc/{guest.pid()}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_guest_whose_agent_is_killed_runs_again_at_once(guest: LiveGuest, guard: Process, tmpfs_path: Path) -> None:
    agent = agent_that_hangs(guest, tmpfs_path, LONG_S)
    assert has_stopped_writing(guest)
    agent.kill()
    guest.wait_until_it_writes()
    gone = f"let {guest.monitor} run: its agent is gone"
    wait_until(lambda: gone in guard.log.read_text(), "the guard to see that")


def test_a_guest_whose_agent_sleeps_runs_again_at_its_deadline(
    guest: LiveGuest, guard: Process, tmpfs_path: Path
) -> None:
    agent = agent_that_hangs(guest, tmpfs_path, 1.0)
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        guest.wait_until_it_writes()
    finally:
        agent.kill()


def test_a_guest_that_a_late_agent_stops_after_its_deadline_runs_again(
    guest: LiveGuest, guard: Process, tmpfs_path: Path
) -> None:
    """As if the agent had slept between telling the guard and sending `stop`, and then again."""

    async def late() -> None:
        monitor = await Monitor.connect(guest.monitor)
        link = GuardLink(tmpfs_path / "guard")
        link.freeze("late", monitor.fileno(), 0.1)
        wait_until(lambda: "late" in guard.log.read_text(), "the guard to act on the deadline")
        await monitor.execute("stop")
        guest.wait_until_it_writes()
        link.thawed("late")
        link.close()
        await monitor.close()

    asyncio.run(late())


def test_a_guard_that_is_told_to_end_leaves_nobody_stopped(guest: LiveGuest, guard: Process, tmpfs_path: Path) -> None:
    agent = agent_that_hangs(guest, tmpfs_path, LONG_S)
    guard.terminate()
    assert guard.returncode == 0
    guest.wait_until_it_writes()
    agent.kill()


def test_what_agent_and_guard_left_stopped_runs_when_an_agent_starts(
    guest: LiveGuest, guard: Process, tmpfs_path: Path
) -> None:
    agent = agent_that_hangs(guest, tmpfs_path, LONG_S)
    guard.kill()
    agent.kill()
    assert has_stopped_writing(guest)
    journal = Journal(tmpfs_path / "journal")
    assert asyncio.run(let_run(journal)) == [f"let {guest.monitor} run, which stood still since its agent was killed"]
    guest.wait_until_it_writes()
    assert list(journal.frozen()) == []


def test_a_guest_that_its_user_paused_stays_paused(guest: LiveGuest, guard: Process, tmpfs_path: Path) -> None:
    async def cut() -> None:
        monitor, link = await Monitor.connect(guest.monitor), GuardLink(tmpfs_path / "guard")
        await monitor.execute("stop")
        vm = Vm(monitor, link, Journal(tmpfs_path / "journal"))
        frozen = await vm.freeze(LONG_S)
        await vm.confirm(frozen)
        assert await vm.go_on(frozen) == (0.0, None)
        assert await vm.thaw(frozen) == 0.0
        assert (await monitor.execute("query-status"))["status"] == "paused"
        link.close()
        await monitor.close()

    asyncio.run(cut())


def test_a_cut_in_which_somebody_let_the_guest_run_is_refused(
    guest: LiveGuest, guard: Process, tmpfs_path: Path
) -> None:
    async def cut() -> None:
        monitor, link = await Monitor.connect(guest.monitor), GuardLink(tmpfs_path / "guard")
        vm = Vm(monitor, link, Journal(tmpfs_path / "journal"))
        frozen = await vm.freeze(LONG_S)
        await monitor.execute("cont")
        await monitor.execute("stop")
        with pytest.raises(RefusedError, match="let the guest run while it was cut"):
            await vm.confirm(frozen)
        _, has_run = await vm.go_on(frozen)
        assert has_run is not None
        guest.wait_until_it_writes()
        link.close()
        await monitor.close()

    asyncio.run(cut())


def test_nothing_is_stopped_without_a_guard(tmpfs_path: Path) -> None:
    with pytest.raises(UnavailableError, match="without one no guest is stopped"):
        GuardLink(tmpfs_path / "guard")


def test_a_link_outlives_a_guard_that_sleeps_or_is_started_again(
    guest: LiveGuest, guard: Process, tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes no late answer for that of its next question."""
    monkeypatch.setattr(GuardLink, "TIMEOUT_S", 0.3)

    async def ask() -> None:
        monitor = await Monitor.connect(guest.monitor)
        link = GuardLink(tmpfs_path / "guard")
        os.kill(guard.pid, signal.SIGSTOP)
        with pytest.raises(UnavailableError, match="does not answer"):
            link.freeze("guest", monitor.fileno(), LONG_S)
        os.kill(guard.pid, signal.SIGCONT)
        wait_until(lambda: "its agent has left" in guard.log.read_text(), "the guard to notice")
        assert (await monitor.execute("query-status"))["running"], "the agent still hears what QEMU says"
        with pytest.raises(UnavailableError, match="at most a minute"):
            link.freeze("guest", monitor.fileno(), 1000)
        link.freeze("guest", monitor.fileno(), LONG_S)
        guard.terminate()
        with pytest.raises(UnavailableError, match=r"has ended|does not answer"):
            link.thawed("guest")
        with pytest.raises(UnavailableError, match="without one no guest is stopped"):
            link.freeze("guest", monitor.fileno(), LONG_S)
        other = Guard(tmpfs_path / "guard", print)
        serving = threading.Thread(target=other.run, args=(ended.is_set,))
        serving.start()
        link.freeze("guest", monitor.fileno(), LONG_S)
        link.close()
        ended.set()
        serving.join()
        other.close()
        await monitor.close()

    ended = threading.Event()
    asyncio.run(ask())
    guest.wait_until_it_writes()


def test_there_is_one_guard_a_host(tmpfs_path: Path) -> None:
    first = Guard(tmpfs_path / "guard", print)
    try:
        with pytest.raises(RefusedError, match="already"):
            Guard(tmpfs_path / "guard", print)
    finally:
        first.close()
    Guard(tmpfs_path / "guard", print).close()


def test_a_monitor_that_another_client_holds_is_told_from_one_that_is_gone(guest: LiveGuest) -> None:
    async def second() -> None:
        first = await Monitor.connect(guest.monitor)
        with pytest.raises(UnavailableError, match="another client holds this monitor"):
            await Monitor.connect(guest.monitor, timeout_s=0.5)
        await first.close()
        await (await Monitor.connect(guest.monitor)).close()

    asyncio.run(second())


def test_a_guest_that_was_let_run_is_not_taken_back(guest: LiveGuest, guard: Process, tmpfs_path: Path) -> None:
    """To what it was attached to before it was stopped, since it may have written to something else by now."""

    async def late() -> None:
        monitor, link = await Monitor.connect(guest.monitor), GuardLink(tmpfs_path / "guard")
        link.freeze("late", monitor.fileno(), 0.1)
        wait_until(lambda: "late" in guard.log.read_text(), "the guard to act on the deadline")
        with pytest.raises(UnavailableError, match="late was let run before"):
            link.revert("late", {"/machine/peripheral/v0": "v0-node"})
        link.thawed("late")
        with pytest.raises(UnavailableError, match="late was let run before"):
            link.revert("late", {"/machine/peripheral/v0": "v0-node"})
        link.close()
        await monitor.close()

    asyncio.run(late())


def test_a_guest_that_is_let_go_of_while_it_is_silent_runs_once_it_listens(
    guest: LiveGuest, guard: Process, tmpfs_path: Path
) -> None:
    """QEMU notices the end of a connection before it has read what was said there last."""

    async def let_go() -> None:
        vm = Vm(await Monitor.connect(guest.monitor), GuardLink(tmpfs_path / "guard"), Journal(tmpfs_path / "journal"))
        frozen = await vm.freeze(LONG_S)
        os.kill(guest.pid(), signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await vm.thaw(frozen)
        await vm.close()

    try:
        for _ in range(3):
            asyncio.run(let_go())
            subprocess.run(["sleep", "0.3"], check=True)  # a guard that gives its descriptor up has done so by then
            os.kill(guest.pid(), signal.SIGCONT)
            guest.wait_until_it_writes()
    finally:
        os.kill(guest.pid(), signal.SIGCONT)


def test_a_guest_runs_whose_agent_takes_long_to_end(guest: LiveGuest, guard: Process, tmpfs_path: Path) -> None:
    """Its connections have ended before it has, and QEMU had not read what it was told until then."""

    async def stop() -> tuple[Monitor, GuardLink]:
        monitor, link = await Monitor.connect(guest.monitor), GuardLink(tmpfs_path / "guard")
        link.freeze(str(guest.monitor), monitor.fileno(), LONG_S)
        await monitor.execute("stop")
        os.kill(guest.pid(), signal.SIGSTOP)
        link.close()
        await asyncio.to_thread(
            wait_until, lambda: "its agent has left" in guard.log.read_text(), "the guard to notice"
        )
        await monitor.close()
        return monitor, link

    try:
        asyncio.run(stop())
        subprocess.run(["sleep", "0.3"], check=True)
        os.kill(guest.pid(), signal.SIGCONT)
        guest.wait_until_it_writes()
    finally:
        os.kill(guest.pid(), signal.SIGCONT)


def test_a_guard_that_hangs_takes_no_guest_back_later(guest: LiveGuest, guard: Process, tmpfs_path: Path) -> None:
    """Whoever asked it in vain may let the guest run by himself."""

    async def ask() -> None:
        monitor, link = await Monitor.connect(guest.monitor), GuardLink(tmpfs_path / "guard")
        link.freeze(str(guest.monitor), monitor.fileno(), LONG_S)
        os.kill(guard.pid, signal.SIGSTOP)
        with pytest.raises(UnavailableError, match="does not answer"):
            link.revert(str(guest.monitor), {})
        link.close()
        await monitor.close()

    asyncio.run(ask())
    wait_until(lambda: psutil.Process(guard.pid).status() == psutil.STATUS_ZOMBIE, "the guard to be gone")


def test_a_guest_is_left_to_a_guard_that_has_not_heard_of_it(
    guest: LiveGuest, guard: Process, tmpfs_path: Path
) -> None:
    """As to one that was started since."""

    async def leave() -> None:
        monitor, link = await Monitor.connect(guest.monitor), GuardLink(tmpfs_path / "guard")
        await monitor.execute("stop")
        link.leave(str(guest.monitor), monitor.fileno())
        await monitor.close()
        link.close()

    asyncio.run(leave())
    guest.wait_until_it_writes()
    asyncio.run(run_on(guest))  # nobody holds its monitor


def test_a_guest_that_was_not_stopped_is_forgotten_with_its_connection(
    guest: LiveGuest, guard: Process, tmpfs_path: Path
) -> None:
    """Else it would be let run by whoever connects next, though its user has paused it meanwhile."""
    journal = Journal(tmpfs_path / "journal")

    async def arm() -> None:
        vm = Vm(await Monitor.connect(guest.monitor), GuardLink(tmpfs_path / "guard"), journal)
        assert await vm.arm()
        assert list(journal.frozen()) == [guest.monitor]
        await vm.close()

    asyncio.run(arm())
    assert list(journal.frozen()) == []


def test_a_guest_that_was_started_again_since_its_stop_is_not_let_run(
    guest: LiveGuest, guard: Process, tmpfs_path: Path
) -> None:
    journal = Journal(tmpfs_path / "journal")
    journal.write(guest.monitor, f"{guest.pid()}@1")

    async def pause() -> None:
        monitor = await Monitor.connect(guest.monitor)
        await monitor.execute("stop")
        await monitor.close()

    asyncio.run(pause())
    assert asyncio.run(let_run(journal)) == [f"{guest.monitor} was started again since it was stopped"]
    assert list(journal.frozen()) == []
    assert has_stopped_writing(guest)
