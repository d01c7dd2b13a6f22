"""The embedded stack as processes: started once, found again, restarted, stopped, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from coordinator.model.errors import UsageError
from coordinator.model.job import JobSpec, State
from flushpoint import embedded
from flushpoint.client import Client
from flushpoint.embedded import StateDir
from tests.stack import MIB, flushpoint, random_disk, same_bytes, wait_until


@pytest.fixture
def state(tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDir]:
    """A state directory, with a blank in its name, whose stack is stopped after the test."""
    monkeypatch.setenv("FLUSHPOINT_STATE_DIR", str(tmpfs_path / "state dir"))
    monkeypatch.delenv("FLUSHPOINT_API", raising=False)
    state = embedded.state_dir()
    yield state
    embedded.stop()


def family(state: StateDir) -> list[psutil.Process]:
    """The supervisor of `state` and all that descends from it."""
    pid = embedded.supervisor_pid(state)
    if pid is None:
        return []
    supervisor = psutil.Process(pid)
    return [supervisor, *supervisor.children(recursive=True)]


def part(state: StateDir, name: str) -> psutil.Process | None:
    """The child of the supervisor that runs module `name`, or the program of that name."""
    pid = embedded.supervisor_pid(state)
    for child in psutil.Process(pid).children() if pid else []:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just died is a zombie without a command line
            # A server that sets its title says nothing in its command line, and Python says nothing in its name.
            if child.name() == name or child.cmdline()[-1:] == [name]:
                return child
    return None


def all_gone(processes: list[psutil.Process]) -> bool:
    """Orphans are reaped by init, in its own time, so that a zombie counts as gone."""
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def test_the_first_command_starts_the_stack_and_copies(state: StateDir, tmpfs_path: Path) -> None:
    source = random_disk(tmpfs_path / "source.raw", 8 * MIB)
    target = tmpfs_path / "target.raw"
    done = flushpoint("mirror", str(source), str(target))
    assert done.returncode == 0, done.stderr
    assert same_bytes(source, target)
    assert flushpoint("jobs").stdout.count("done") == 1


def test_many_clients_at_once_start_one_stack(state: StateDir) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: flushpoint("jobs"), range(4)))
    assert [result.returncode for result in results] == [0] * 4, [result.stderr for result in results]
    assert [process.name() for process in family(state)].count("valkey-server") == 1
    assert state.log.read_text().count("already runs") == 0


def test_a_second_supervisor_leaves_the_first_alone(state: StateDir) -> None:
    embedded.ensure_running()
    first = embedded.supervisor_pid(state)
    second = flushpoint("up")
    assert second.returncode == 3
    assert "already runs" in second.stderr
    assert embedded.supervisor_pid(state) == first


@pytest.mark.parametrize("name", ["valkey-server", "coordinator", "workers"])
def test_a_part_that_is_killed_is_started_again(state: StateDir, name: str) -> None:
    embedded.ensure_running()
    wait_until(lambda: part(state, name) is not None, f"the {name}")
    before = part(state, name)
    assert before is not None
    children = before.children(recursive=True)
    before.send_signal(signal.SIGKILL)
    wait_until(lambda: (now := part(state, name)) is not None and now.pid != before.pid, f"a new {name}")
    wait_until(lambda: embedded.api_answers(state), "the API")
    assert all_gone(children)


def test_jobs_outlive_the_stack(state: StateDir, tmpfs_path: Path) -> None:
    spec = JobSpec(source=str(tmpfs_path / "missing.raw"), target=str(tmpfs_path / "t.raw"))
    with Client(embedded.ensure_running()) as client:
        job = client.wait(client.submit(spec).id, timeout_s=30)
    assert embedded.stop()
    with Client(embedded.ensure_running()) as client:
        assert client.job(job.id).state is State.CONCLUDED


def test_the_stack_stores_equal_blocks_of_two_disks_once(state: StateDir, tmpfs_path: Path) -> None:
    """By the index that it keeps in its state directory."""
    repository = f"repo+file://{tmpfs_path}/repository"
    assert flushpoint("repository", "init", repository).returncode == 0
    disks = [random_disk(tmpfs_path / "one.raw", 4 * MIB), tmpfs_path / "two.raw"]
    disks[1].write_bytes(disks[0].read_bytes())
    sent = []
    for disk in disks:
        done = flushpoint("mirror", str(disk), repository, "--json")
        assert done.returncode == 0, done.stderr
        sent.append(json.loads(done.stdout)["bytes_sent"])
    assert sent == [4 * MIB, 0]


def test_the_first_job_after_down_waits_for_nobody(state: StateDir, tmpfs_path: Path) -> None:
    """Neither for a term of leadership to end nor, beside a paused job, for leases that nobody holds: those take half a
    minute."""
    source = random_disk(tmpfs_path / "source.raw", 8 * MIB)
    with Client(embedded.ensure_running()) as client:
        paused = client.submit(JobSpec(source=str(source), target=str(tmpfs_path / "first.raw"), speed=MIB))
        wait_until(lambda: client.job(paused.id).offset > 0, "some progress")
        client.pause(paused.id)
        client.wait(paused.id, until=[State.PAUSED], timeout_s=30)
    assert flushpoint("down").returncode == 0
    begun = time.monotonic()
    done = flushpoint("mirror", str(source), str(tmpfs_path / "second.raw"))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 8


def test_down_leaves_no_process(state: StateDir) -> None:
    embedded.ensure_running()
    wait_until(lambda: part(state, "workers") is not None, "the worker")
    processes = family(state)
    assert len(processes) >= 4
    done = flushpoint("down")
    assert (done.returncode, done.stderr) == (0, "flushpoint: the embedded stack is stopped\n")
    assert all_gone(processes)
    assert "killing it" not in state.log.read_text()
    assert flushpoint("down").stderr == "flushpoint: the embedded stack does not run\n"


def test_a_killed_supervisor_leaves_no_orphan_and_no_obstacle(state: StateDir) -> None:
    embedded.ensure_running()
    wait_until(lambda: part(state, "workers") is not None, "the worker")
    worker = part(state, "workers")
    assert worker is not None
    wait_until(lambda: bool(worker.children()), "the worker's children")
    processes = family(state)
    processes[0].send_signal(signal.SIGKILL)
    embedded.ensure_running()
    wait_until(lambda: all_gone(processes), "the end of the old stack")
    assert not {process.pid for process in processes} & {process.pid for process in family(state)}


def test_settings_that_fit_nothing_are_told_with_the_log(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUSHPOINT_LEASE_S", "soon")
    with pytest.raises(UsageError, match="FLUSHPOINT_LEASE_S") as caught:
        embedded.ensure_running()
    assert str(state.log) in caught.value.remedy
    assert embedded.supervisor_pid(state) is None


def test_the_users_file_limits_the_stack_wherever_the_parts_run(
    state: StateDir, tmpfs_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmpfs_path / "mine.toml").write_text('allowed_roots = ["/nonexistent"]\n')
    monkeypatch.chdir(tmpfs_path)
    monkeypatch.setenv("FLUSHPOINT_CONFIG", "mine.toml")
    source = random_disk(tmpfs_path / "source.raw", MIB)
    done = flushpoint("mirror", str(source), str(tmpfs_path / "target.raw"))
    assert done.returncode == 3
    assert f"{source} is outside the worker's allowed roots: /nonexistent" in done.stderr
    assert not (tmpfs_path / "target.raw").exists()


def test_the_sockets_are_the_owners_alone(state: StateDir) -> None:
    embedded.ensure_running()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (state.path, state.api_socket, state.valkey_socket)}
    assert modes == {state.path.name: 0o700, "api.sock": 0o600, "valkey.sock": 0o600}


def test_ctrl_c_ends_a_stack_in_the_foreground_in_order(state: StateDir) -> None:
    command = [sys.executable, "-P", "-m", "flushpoint", "up"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ)) as process:
        try:
            wait_until(lambda: embedded.api_answers(state), "the API")
            processes = family(state)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert all_gone(processes)
