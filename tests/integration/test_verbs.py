"""Verbs are felt within about a second, whatever the movers are at, and a speed limit holds whatever is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.model.errors import RefusedError
from coordinator.model.job import State
from coordinator.model.view import JobView
from tests.stack import MIB, Nbdkit, Stack, make_disk, random_disk, running_stack, wait_until

pytestmark = pytest.mark.needs("nbdkit")

ANSWER_S = 3.0
"""About a second, and what a busy machine adds to it. With all of a mover's requests on their way to the servers below,
or a plan that is not interrupted, it would be 8 seconds at least."""
GIB = 1024 * MIB


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Work:
    """`begun` tells when the movers are in the middle of it."""

    source: str | Path
    target: str | Path
    begun: Callable[[JobView], bool]


def data_flows(directory: Path, _: ExitStack) -> Work:
    source = random_disk(directory / "source.img", 256 * MIB)
    return Work(source, directory / "target.img", lambda job: allocated(directory / "target.img") > 0)


def planning(directory: Path, servers: ExitStack) -> Work:
    """All of it is one hole, of which the server tells 2 GiB at most in a third of a second."""
    source = Nbdkit(directory / "source", "--filter=delay", "null", "size=8T", "delay-extents=300ms")
    return Work(
        servers.enter_context(source).uri,
        directory / "target.img",
        lambda job: job.units_leased > 0 and job.disk_size == 8 * 1024 * GIB,
    )


def zeroing(directory: Path, servers: ExitStack) -> Work:
    """The target zeroes 50 MiB a second, one request after the other."""
    lock = directory / "one-at-a-time"
    target = Nbdkit(
        directory / "target",
        *("eval", "get_size=echo 8G", "thread_model=echo parallel", "pread=head -c $3 /dev/zero"),
        f"zero=flock {lock} sleep $(($3 / 1048576 * 20))e-3",
        *(f"{name}=exit 0" for name in ("can_write", "can_flush", "can_zero", "can_multi_conn", "flush")),
    )
    source = make_disk(directory / "source.img", 8 * GIB, {})
    return Work(source, servers.enter_context(target).uri, lambda job: lock.exists())


def slow_target(directory: Path, servers: ExitStack) -> Work:
    """It takes 4 MiB a second, after the first 8 MiB."""
    image = make_disk(directory / "target.img", 64 * MIB, {})
    target = servers.enter_context(Nbdkit(image, "--filter=rate", "file", str(image), "rate=32M"))
    source = random_disk(directory / "source.img", 64 * MIB)
    return Work(source, target.uri, lambda job: allocated(image) > 10 * MIB)


def allocated(image: Path) -> int:
    return image.stat().st_blocks * 512 if image.exists() else 0


@pytest.mark.parametrize("busy_with", [data_flows, planning, zeroing, slow_target], ids=lambda f: f.__name__)
def test_verbs_answer_within_about_a_second(
    stack: Stack, tmp_path: Path, busy_with: Callable[[Path, ExitStack], Work]
) -> None:
    client = stack.client
    with ExitStack() as servers:
        work = busy_with(tmp_path, servers)
        job = stack.submit(work.source, work.target, speed=16 * MIB if busy_with is data_flows else 0)

        def timed(ask: Callable[[], object], done: State) -> float:
            begun = time.monotonic()
            ask()
            stack.wait(job.id, done)
            return time.monotonic() - begun

        wait_until(lambda: work.begun(client.job(job.id)), "a mover")
        assert timed(lambda: client.set_speed(job.id, 15 * MIB), State.RUNNING) < ANSWER_S
        assert timed(lambda: client.pause(job.id), State.PAUSED) < ANSWER_S
        assert client.job(job.id).units_leased == 0
        assert timed(lambda: client.resume(job.id), State.RUNNING) < ANSWER_S
        begun = time.monotonic()
        with pytest.raises(RefusedError, match="not possible"):
            client.complete(job.id)
        assert time.monotonic() - begun < ANSWER_S
        wait_until(lambda: client.job(job.id).units_leased > 0, "a mover")
        assert timed(lambda: client.cancel(job.id), State.CONCLUDED) < ANSWER_S
    ended = client.job(job.id)
    assert ended.cancelled
    assert ended.error == ""


def test_complete_answers_within_about_a_second(stack: Stack, tmp_path: Path) -> None:
    job = stack.submit(random_disk(tmp_path / "source.img", MIB), tmp_path / "target.img", auto_complete=False)
    stack.wait(job.id, State.READY)
    begun = time.monotonic()
    stack.client.complete(job.id)
    assert stack.wait(job.id).error == ""
    assert time.monotonic() - begun < ANSWER_S


@pytest.mark.parametrize("source_kind", ["file", "nbd"])
def test_a_cancel_by_force_does_not_wait_for_the_target(stack: Stack, tmp_path: Path, source_kind: str) -> None:
    """Each write takes 20 seconds. From a file the engine sends them, from an export they are spliced."""
    source: str | Path = random_disk(tmp_path / "source.img", 8 * MIB)
    image, log = make_disk(tmp_path / "target.img", 8 * MIB, {}), tmp_path / "requests"
    with ExitStack() as servers:
        slow = ("--filter=log", "--filter=delay", "file", str(image), f"logfile={log}", "wdelay=20")
        target = servers.enter_context(Nbdkit(image, *slow))
        servers.callback(target.kill)  # asked politely it would write on
        if source_kind == "nbd":
            source = servers.enter_context(Nbdkit(tmp_path / "source.img", "--readonly", "file", str(source))).uri
        job = stack.submit(source, target.uri)
        wait_until(lambda: "Write" in log.read_text(), "a write")
        begun = time.monotonic()
        stack.client.cancel(job.id)
        stack.client.cancel(job.id, force=True)
        ended = stack.wait(job.id)
        assert time.monotonic() - begun < ANSWER_S
    assert ended.cancelled
    assert ended.error == ""
    assert ended.bytes_sent == 0
    assert [e for e in stack.events(job.id) if e["event"] == "BLOCK_JOB_ERROR"] == []


def test_a_speed_holds_for_a_target_that_must_be_zeroed_by_hand(stack: Stack, tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source.img", 8 * GIB, {0: os.urandom(MIB)})
    image = make_disk(tmp_path / "target.img", 8 * GIB, {8 * GIB - 3: b"old"})
    speed = 8 * MIB
    with Nbdkit(image, "--filter=nozero", "file", str(image)) as target:
        begun = time.monotonic()
        job = stack.submit(source, target.uri, speed=speed)
        wait_until(lambda: stack.client.job(job.id).bytes_sent >= 2 * speed, "two seconds of zeroes")
        assert allocated(image) <= speed * (time.monotonic() - begun + 2) + 4 * MIB
        asked = time.monotonic()
        stack.client.cancel(job.id)
        assert stack.wait(job.id).cancelled
        assert time.monotonic() - asked < ANSWER_S
