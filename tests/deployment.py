"""A coordinator, movers, a repository and hosts of live guests, for tests of groups."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from coordinator.model.epoch import Consistency, Participant
from coordinator.model.group import GroupPolicy, GroupSpec
from coordinator.model.point import Decision
from coordinator.model.repository_uri import parse_repository
from coordinator.model.view import CheckpointState, CheckpointView
from tests.hosts import Host
from tests.live_guest import LiveGuest
from tests.repositories import make_repository
from tests.stack import Stack, flushpoint
from workers.access import Access
from workers.repository.repository import Repository

FREEZE_S = 1.5
"""What guests are promised here, on a machine that has two processors for all of this."""
BLOCK = 4096


class Deployment:
    """A coordinator, movers and a repository; hosts come and go."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack = stack
        self.directory = directory
        make_repository(directory / "repository").close()

    @property
    def repository(self) -> str:
        return f"repo+file://{self.directory}/repository"

    @contextmanager
    def host(self, name: str, guest: LiveGuest) -> Iterator[Host]:
        environ = {name: self.stack.env[name] for name in ("FLUSHPOINT_REDIS_URL", "FLUSHPOINT_ALLOWED_ROOTS")}
        host = Host(name, self.directory / name, guest, environ)
        try:
            host.start_agent()
            yield host
        finally:
            host.kill()

    def apply(self, name: str, *hosts: Host, consistency: Consistency = Consistency.CRASH) -> None:
        policy = GroupPolicy(freeze_timeout=FREEZE_S, prepare_timeout=10, consistency=consistency)
        self.apply_members(name, [member_of(host) for host in hosts], policy)

    def apply_members(self, name: str, members: Sequence[Participant], policy: GroupPolicy) -> None:
        spec = GroupSpec(repository=self.repository, policy=policy, members=tuple(members))
        self.stack.client.apply_group(name, spec)

    def checkpoint(self, name: str) -> CheckpointView:
        return self.ended(self.stack.client.ask_for_checkpoint(name))

    def ended(self, asked: CheckpointView) -> CheckpointView:
        return self.stack.client.checkpoint(asked.group, asked.id)

    def published(self, name: str) -> int:
        done = self.checkpoint(name)
        assert done.state is CheckpointState.PUBLISHED, f"{done.why}\n{self.stack.logs()}"
        return done.point

    @contextmanager
    def opened(self) -> Iterator[Repository]:
        with Repository.open(parse_repository(self.repository), Access(["/"], [])) as repository:
            yield repository

    def point(self, name: str, number: int) -> Decision:
        with self.opened() as repository:
            return repository.decisions.point(name, number)

    def bytes_of(self, name: str, number: int, disk: str) -> bytearray:
        with self.opened() as repository:
            found = repository.disk(repository.decisions.point(name, number), disk)
            data = bytearray(found.size)
            found.read_into(0, memoryview(data))
            return data

    def number_in(self, name: str, number: int, disk: str) -> int:
        """What a guest had written last: its first block holds that over and over."""
        with self.opened() as repository:
            block = bytearray(BLOCK)
            repository.disk(repository.decisions.point(name, number), disk).read_into(0, memoryview(block))
        numbers = {int.from_bytes(block[at : at + 8], "little") for at in range(0, BLOCK, 8)}
        assert len(numbers) == 1, f"a block is half written: {numbers}"
        return numbers.pop()


def member_of(host: Host) -> Participant:
    guest = host.guest
    return Participant(
        vm=guest.directory.name,
        host=host.name,
        qmp=str(guest.monitor),
        guest_agent=str(guest.agent) if guest.agent.exists() else "",
        disks=tuple(disk.name for disk in guest.disks),
    )


class Command:
    """`flushpoint`, as an operator of the deployment gives it."""

    def __init__(self, deployment: Deployment) -> None:
        self._environ = {**deployment.stack.env, "FLUSHPOINT_API": f"unix://{deployment.stack.api_socket}"}

    def __call__(self, *words: object, code: int = 0) -> str:
        done = self._done(words, code)
        return done.stdout if code == 0 else done.stderr

    def says(self, *words: object) -> str:
        """What it tells beside its output."""
        return self._done(words, 0).stderr

    @contextmanager
    def started(self, *words: object) -> Iterator[subprocess.Popen[str]]:
        """Until the block ends; then it is terminated."""
        argv = [sys.executable, "-P", "-m", "flushpoint", *map(str, words)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=self._environ) as process:
            try:
                yield process
            finally:
                process.terminate()

    def _done(self, words: tuple[object, ...], code: int) -> subprocess.CompletedProcess[str]:
        done = flushpoint(*words, environ=self._environ)
        assert done.returncode == code, done.stderr
        return done
