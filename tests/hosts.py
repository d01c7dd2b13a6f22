"""Hosts of live guests: an agent and a guard each, as an operator would start them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from coordinator.model.epoch import Epoch
from tests.live_guest import LiveGuest
from tests.stack import Process, wait_until

STEP_S = 30.0


class Host:
    """An agent and a guard, as an operator would start them, and the guest they look after."""

    def __init__(
        self, name: str, directory: Path, guest: LiveGuest, environ: Mapping[str, str], prefix: Sequence[str] = ()
    ) -> None:
        """`prefix` is what comes before its commands."""
        self.name = name
        self._prefix = prefix
        self.guest = guest
        self.scratch = directory / "scratch"
        self.journal = directory / "frozen"
        self.guard_socket = directory / "guard"
        self._directory = directory
        directory.mkdir()
        self._environ = {
            **os.environ,
            **environ,
            "FLUSHPOINT_GUARD_SOCKET": str(self.guard_socket),
            "FLUSHPOINT_JOURNAL_DIR": str(self.journal),
            "FLUSHPOINT_SCRATCH_DIR": str(self.scratch),
        }
        self.start_guard()
        self.agent: Process | None = None

    def start_guard(self) -> None:
        """The one before, if there was one, has ended."""
        self.guard_socket.unlink(missing_ok=True)
        self.guard = self._started(["guard"], self._environ)
        wait_until(self.guard_socket.exists, "the guard's socket", STEP_S)

    def start_agent(self, failpoint: str = "", environ: Mapping[str, str] | None = None) -> None:
        """In the place of the one before, which has ended; ready when this returns. `failpoint` is NAME:ACTION."""
        self.end_agent()
        self.trip = self._directory / "tripped"
        self.trip.unlink(missing_ok=True)
        environ = {**self._environ, **(environ or {})}
        if failpoint:
            environ["FLUSHPOINT_FAILPOINT"] = f"{failpoint}:{self.trip}"
        (self._directory / "agent.log").unlink(missing_ok=True)
        self.agent = self._started(["agent", "--host", self.name], environ)
        log = self.agent.log
        wait_until(lambda: "ready" in log.read_text(), f"the agent of {self.name}", STEP_S)

    def end_agent(self) -> None:
        if self.agent is not None:
            self.agent.terminate()

    def kill_agent(self) -> None:
        assert self.agent is not None
        self.agent.kill()

    def signal_agent(self, number: signal.Signals) -> None:
        assert self.agent is not None
        os.kill(self.agent.pid, number)

    def _started(self, words: list[str], environ: dict[str, str]) -> Process:
        command = [*self._prefix, sys.executable, "-m", "flushpoint", *words]
        return Process(command, self._directory / f"{words[0]}.log", environ)

    def staged(self, epoch: Epoch) -> Path:
        disk = self.guest.disks[0].name
        return self.scratch / epoch.name / self.guest.directory.name / f"{disk}.qcow2"

    def kill(self) -> None:
        for process in (self.agent, self.guard):
            if process is not None:
                process.kill()
