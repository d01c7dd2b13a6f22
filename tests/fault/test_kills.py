"""Kill -9 anything in mid-copy: the job ends complete and byte-identical, and little is copied twice (I1, I5, I7)."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.broker import make_app, ring
from coordinator.model.messages import MOVER_ROLE, Doorbell
from coordinator.model.units import UNIT_BYTES
from coordinator.settings import Settings
from tests.stack import (
    MIB,
    QemuNbd,
    Stack,
    continue_process,
    make_disk,
    random_disk,
    running_stack,
    same_bytes,
    stop_process,
    wait_until,
)

pytestmark = pytest.mark.needs("qemu-nbd", "nbdkit")

SIZE = 512 * MIB
SPEED = 32 * MIB
"""So that a copy takes long enough to be hit in its middle."""


@pytest.fixture
def stack(tmpfs_path: Path) -> Iterator[Stack]:
    with running_stack(tmpfs_path / "stack") as running:
        yield running


@pytest.fixture
def source(tmpfs_path: Path) -> Path:
    return random_disk(tmpfs_path / "source.img", SIZE)


def bytes_written(stack: Stack) -> int:
    """By the living movers since they started, through whatever call: little but the target."""
    return sum(mover.io_counters().write_chars for mover in stack.movers())


SLACK = 16 * MIB
"""Of `bytes_written`: what is said to the ledger, and what is written between two looks."""


def test_a_killed_worker_costs_at_most_the_units_in_flight(stack: Stack, source: Path, tmpfs_path: Path) -> None:
    target = tmpfs_path / "target.img"
    job = stack.submit(source, target, speed=SPEED)
    stack.wait_for_progress(job.id, SIZE // 4)
    before = bytes_written(stack)
    stack.kill("worker")
    stack.start_worker()
    stack.client.set_speed(job.id, 0)
    ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert same_bytes(source, target)
    assert ended.len == ended.offset == SIZE
    assert SIZE - SLACK <= before + bytes_written(stack) <= SIZE + 2 * UNIT_BYTES + SLACK


def test_a_terminated_worker_loses_and_repeats_nothing(stack: Stack, source: Path, tmpfs_path: Path) -> None:
    target = tmpfs_path / "target.img"
    job = stack.submit(source, target, speed=SPEED)
    stack.wait_for_progress(job.id, SIZE // 4)
    begun = time.monotonic()
    stack.processes.pop("worker").terminate()
    assert time.monotonic() - begun < 10
    stack.start_worker()
    stack.client.set_speed(job.id, 0)
    ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert ended.bytes_sent == ended.offset == SIZE
    assert same_bytes(source, target)


def test_one_killed_mover_is_replaced_by_the_others(stack: Stack, source: Path, tmpfs_path: Path) -> None:
    target = tmpfs_path / "target.img"
    job = stack.submit(source, target, speed=SPEED)
    stack.wait_for_progress(job.id, SIZE // 4)
    stack.movers()[0].send_signal(signal.SIGKILL)
    stack.client.set_speed(job.id, 0)
    assert stack.wait(job.id).error == "", stack.logs()
    assert same_bytes(source, target)


def test_a_killed_coordinator_goes_on_where_it_was(stack: Stack, source: Path, tmpfs_path: Path) -> None:
    target = tmpfs_path / "target.img"
    job = stack.submit(source, target, speed=SPEED)
    stack.wait_for_progress(job.id, SIZE // 4)
    stack.kill("coordinator")
    stack.start_coordinator()
    stack.client.set_speed(job.id, 0)
    ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert ended.bytes_sent == SIZE
    assert same_bytes(source, target)


def test_a_killed_redis_with_its_aof_loses_no_job(stack: Stack, source: Path, tmpfs_path: Path) -> None:
    target = tmpfs_path / "target.img"
    job = stack.submit(source, target, speed=SPEED)
    stack.wait_for_progress(job.id, SIZE // 4)
    stack.kill("redis")
    stack.start_redis()
    wait_until(stack.leads, "the coordinator to lead again", 30)
    stack.client.set_speed(job.id, 0)
    ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert ended.len == ended.offset == SIZE
    assert same_bytes(source, target)
    assert SIZE <= bytes_written(stack) <= SIZE + 2 * UNIT_BYTES + SLACK


def test_a_doorbell_delivered_twice_at_once_changes_nothing(stack: Stack, source: Path, tmpfs_path: Path) -> None:
    target = tmpfs_path / "target.img"
    settings = Settings(broker_url=stack.env["FLUSHPOINT_BROKER_URL"])
    job = stack.submit(source, target)
    with make_app(settings) as app:
        for _ in range(20):
            ring(app, Doorbell(role=MOVER_ROLE, bell="the same"))
    ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert ended.len == ended.offset == ended.bytes_sent == SIZE
    assert same_bytes(source, target)


def test_a_message_of_an_unknown_version_is_dropped_and_others_go_on(
    stack: Stack, source: Path, tmpfs_path: Path
) -> None:
    settings = Settings(broker_url=stack.env["FLUSHPOINT_BROKER_URL"])
    with make_app(settings) as app:
        ring(app, Doorbell(role=MOVER_ROLE, bell="new", version=99))
        app.send_task("flushpoint.doorbell", args=[{"garbage": True}])
        app.send_task("flushpoint.doorbell", args=["no mapping"])
    assert stack.mirror(source, tmpfs_path / "target.img").error == ""


# Each copies in another way: threads with buffers, copy_file_range, splice to a socket, splice to a file.
PAIRS = [("file", "nbd"), ("file", "file"), ("nbd", "nbd"), ("nbd", "file")]


@contextlib.contextmanager
def served_pair(source: Path, image: Path, kinds: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """The names of source and target for one of PAIRS."""
    with contextlib.ExitStack() as servers:
        names = [str(source), str(image)]
        if kinds[0] == "nbd":
            names[0] = servers.enter_context(QemuNbd(source, "--read-only")).uri
        if kinds[1] == "nbd":
            names[1] = servers.enter_context(QemuNbd(make_disk(image, source.stat().st_size, {}))).uri
        yield names[0], names[1]


@pytest.mark.parametrize("point", ["between-read-and-write", "before-flush", "before-finish"])
@pytest.mark.parametrize("kinds", PAIRS[:1] + PAIRS[2:3])
def test_a_mover_killed_at_each_point_leaves_a_whole_copy(tmpfs_path: Path, kinds: tuple[str, str], point: str) -> None:
    source = random_disk(tmpfs_path / "source.img", 96 * MIB)
    image = tmpfs_path / "target.img"
    marker = tmpfs_path / "passed"
    environment = {"FLUSHPOINT_FAILPOINT": f"{point}:kill:{marker}"}
    with served_pair(source, image, kinds) as pair, running_stack(tmpfs_path / "stack", env=environment) as stack:
        ended = stack.mirror(*pair, source_frozen=True)  # a comparing pass would mend what went wrong
        assert marker.exists()
        assert ended.error == "", stack.logs()
        assert ended.len == ended.offset == 96 * MIB
    assert same_bytes(source, image)


@pytest.mark.parametrize("kinds", PAIRS)
def test_a_zombie_mover_dies_before_it_writes_over_newer_data(tmpfs_path: Path, kinds: tuple[str, str]) -> None:
    """SIGSTOP between read and write, past the lease; the block is written anew by another; then SIGCONT (I4)."""
    source = make_disk(tmpfs_path / "source.img", 32 * MIB, {0: b"o" * (32 * MIB)})
    image = tmpfs_path / "target.img"
    marker = tmpfs_path / "stopped"
    environment = {"FLUSHPOINT_FAILPOINT": f"between-read-and-write:stop:{marker}"}
    with served_pair(source, image, kinds) as pair, running_stack(tmpfs_path / "stack", env=environment) as stack:
        job = stack.submit(*pair, source_frozen=True)
        wait_until(lambda: marker.exists() and marker.read_text() != "", "the stopped mover")
        zombie = int(marker.read_text())
        with source.open("r+b") as disk:  # what the zombie has read is old from now on
            disk.write(b"n" * (32 * MIB))
        ended = stack.wait(job.id)
        assert ended.error == "", stack.logs()
        assert same_bytes(source, image)
        continue_process(zombie)
        wait_until(lambda: zombie not in [m.pid for m in stack.movers()], "the zombie's death")
        assert same_bytes(source, image)


def test_a_target_with_a_volatile_cache_that_restarts_loses_no_unit(stack: Stack, tmpfs_path: Path) -> None:
    """nbdkit's cache filter holds writes until a flush; SIGKILL loses them. A unit counts only after its flush."""
    source = random_disk(tmpfs_path / "source.img", SIZE)
    image = make_disk(tmpfs_path / "target.img", SIZE, {})

    def serve() -> None:
        stack._spawn(
            "target",
            ["nbdkit", "-f", "-U", str(socket), "--filter=cache", "file", str(image), "cache=writeback"],
        )
        wait_until(socket.exists, "nbdkit")

    socket = tmpfs_path / "target.sock"
    serve()
    job = stack.submit(source, f"nbd+unix:///?socket={socket}", speed=SPEED)
    stack.wait_for_progress(job.id, UNIT_BYTES)
    stack.kill("target")
    socket.unlink(missing_ok=True)
    serve()
    stack.client.set_speed(job.id, 0)
    ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert same_bytes(source, image)


def test_a_source_server_killed_in_mid_request_is_waited_for(stack: Stack, source: Path, tmpfs_path: Path) -> None:
    server = QemuNbd(source, "--read-only")
    job = stack.submit(server.uri, tmpfs_path / "target.img", speed=SPEED)
    stack.wait_for_progress(job.id, UNIT_BYTES)
    server.kill()
    server = QemuNbd(source, "--read-only")
    try:
        stack.client.set_speed(job.id, 0)
        ended = stack.wait(job.id)
    finally:
        server.terminate()
    assert ended.error == "", stack.logs()
    assert same_bytes(source, tmpfs_path / "target.img")


def test_a_frozen_redis_stops_movers_within_their_lease_and_loses_nothing(
    stack: Stack, source: Path, tmpfs_path: Path
) -> None:
    target = tmpfs_path / "target.img"
    job = stack.submit(source, target, speed=SPEED)
    stack.wait_for_progress(job.id, SIZE // 4)
    movers = [m.pid for m in stack.movers()]
    redis = stack.processes["redis"].pid
    stop_process(redis)
    try:
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() - begun > 3, "more than a lease")
    finally:
        continue_process(redis)
    stack.client.set_speed(job.id, 0)
    ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert same_bytes(source, target)
    assert ended.len == ended.offset == SIZE
    assert movers


def test_redis_that_forgets_its_last_writes_costs_copies_and_nothing_else(
    stack: Stack, source: Path, tmpfs_path: Path
) -> None:
    """The AOF is cut in the middle of the job: units done are forgotten, leases too (FAULTS: lost last second)."""
    target = tmpfs_path / "target.img"
    job = stack.submit(source, target, speed=SPEED)
    stack.wait_for_progress(job.id, SIZE // 8)
    aof = next((stack.directory / "appendonlydir").glob("*.incr.aof"))
    early = aof.stat().st_size
    stack.wait_for_progress(job.id, SIZE // 2)
    stack.kill("redis")
    with aof.open("r+b") as log:
        log.truncate(early)
    stack.start_redis()
    wait_until(stack.leads, "the coordinator to lead again", 30)
    stack.client.set_speed(job.id, 0)
    ended = stack.wait(job.id)
    assert ended.error == "", stack.logs()
    assert same_bytes(source, target)
    assert ended.len == ended.offset == SIZE


def test_a_frozen_leader_is_deposed_and_its_successor_ends_the_job(tmpfs_path: Path, source: Path) -> None:
    with running_stack(tmpfs_path / "two", env={"FLUSHPOINT_LEADER_TTL_S": "1", "FLUSHPOINT_CYCLE_S": "0.1"}) as stack:
        target = tmpfs_path / "target.img"
        job = stack.submit(source, target, speed=SPEED)
        stack.wait_for_progress(job.id, SIZE // 4)
        leader = stack.processes.pop("coordinator")
        stop_process(leader.pid)
        try:
            stack.start_coordinator()
            stack.client.set_speed(job.id, 0)
            ended = stack.wait(job.id)
        finally:
            continue_process(leader.pid)
            leader.terminate()
        assert ended.error == "", stack.logs()
        assert same_bytes(source, target)
