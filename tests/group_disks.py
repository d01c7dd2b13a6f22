"""A group of one guest, whose points are compared with clones of its disks that were made in the stop of a cut."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from coordinator.model.view import CheckpointState
from tests.deployment import Deployment
from tests.hosts import STEP_S, Host
from tests.live_guest import LiveDisk
from tests.stack import wait_until


class Disks:
    """One guest with a disk of each kind, and clones of them that were made in the stop of a cut."""

    def __init__(
        self, deployment: Deployment, host: Host, group: str, environ: Mapping[str, str] | None = None
    ) -> None:
        """`environ` is for the agent."""
        self.deployment = deployment
        self.host = host
        self.group = group
        self.environ = environ
        self.clones = deployment.directory / "clones"
        self.clones.mkdir(exist_ok=True)

    def cloned_point(self) -> int:
        """A point, and clones of the disks as they were at its cut: the agent sleeps in the stop until they are
        there. A stop that gets too long for that ends the epoch, and another is tried."""
        for _ in range(5):
            self.host.start_agent("between-go-and-cut:stop", self.environ)
            asked = self.deployment.stack.client.ask_for_checkpoint(self.group)
            wait_until(self.host.trip.exists, "the agent to sleep in the stop", STEP_S)
            for disk in self.host.guest.disks:
                shutil.copyfile(disk.image(self.host.guest.directory), self.clone(disk))
            self.host.signal_agent(signal.SIGCONT)
            done = self.deployment.ended(asked)
            if done.state is CheckpointState.PUBLISHED:
                return done.point
        raise AssertionError(done.why)

    def clone(self, disk: LiveDisk) -> Path:
        return self.clones / disk.image(self.clones).name

    def is_clone(self, name: str, copy: Path) -> bool:
        """Whether an image, raw or qcow2 by its ending, equals the clone of this disk."""
        (disk,) = [disk for disk in self.host.guest.disks if disk.name == name]
        copy_format = "qcow2" if copy.suffix == ".qcow2" else "raw"
        command = ["qemu-img", "compare", "-U", "-q", "-f", disk.format, "-F", copy_format, self.clone(disk), copy]
        return subprocess.run(command, check=False, timeout=60).returncode == 0

    def check(self, point: int) -> None:
        for disk in self.host.guest.disks:
            raw = self.clones / "raw"
            command = ["qemu-img", "convert", "-f", disk.format, "-O", "raw", str(self.clone(disk)), str(raw)]
            subprocess.run(command, check=True, timeout=30)
            vm = self.host.guest.directory.name
            is_equal = self.deployment.bytes_of(self.group, point, f"{vm}/{disk.name}") == raw.read_bytes()
            assert is_equal, disk

    def aborted(self, failpoint: str) -> None:
        """An epoch whose agent is killed there; its bitmaps stay."""
        self.host.start_agent(f"{failpoint}:kill", self.environ)
        asked = self.deployment.stack.client.ask_for_checkpoint(self.group)
        wait_until(self.host.trip.exists, f"the agent to reach {failpoint}", STEP_S)
        self.host.start_agent(environ=self.environ)
        assert self.deployment.ended(asked).state is CheckpointState.FAILED
