"""The coordinator as a process: how it ends, and what it does where it cannot listen."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.model.job import State
from flushpoint.client import AsyncClient, Client
from tests.stack import Stack, wait_until
from tests.unit.flushpoint.fake_api import UNCONNECTED_SOCKET_LEAKS

COMMAND = [sys.executable, "-P", "-m", "coordinator"]
ANSWER_S = 3.0
"""A second, and what a busy machine adds to it. Long polls last for 30 s."""
CLIENTS = 60
"""More than the API has threads."""


@pytest.fixture
def stack(tmpfs_path: Path) -> Iterator[Stack]:
    """Valkey alone, and a term of leadership that nobody wants to wait for."""
    stack = Stack(tmpfs_path / "stack", env={"FLUSHPOINT_LEADER_TTL_S": "60"})
    stack.start_redis()
    yield stack
    stack.stop()


def test_one_that_is_told_to_end_resigns_so_that_the_next_leads_at_once(stack: Stack) -> None:
    stack.start_coordinator()
    first = stack.processes.pop("coordinator")
    first.terminate()
    assert first.returncode == 0, first.log.read_text()
    stack.start_coordinator()  # waits 20 s for it to lead, a third of the term


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"FLUSHPOINT_API_SOCKET": "/nonexistent/api.sock"}, 2, "FLUSHPOINT_API_SOCKET"),
        ({"FLUSHPOINT_API_SOCKET": "", "FLUSHPOINT_API_HOST": "256.1.1.1"}, 2, "FLUSHPOINT_API_HOST"),
        ({"FLUSHPOINT_API_SOCKET": "", "FLUSHPOINT_API_PORT": "taken"}, 4, "FLUSHPOINT_API_PORT"),
    ],
)
def test_one_that_cannot_listen_says_why_and_never_leads(
    stack: Stack, settings: dict[str, str], code: int, named: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = {name: str(taken.getsockname()[1]) if value == "taken" else value for name, value in settings.items()}
        env = {**os.environ, **stack.env, **chosen}
        done = subprocess.run(COMMAND, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert named in done.stderr
    assert "leads" not in done.stderr


def test_many_who_wait_leave_the_api_free_for_others(stack: Stack, tmpfs_path: Path) -> None:
    """More of them than the API has threads; then all are sent away when it ends."""
    stack.start_coordinator()
    job = stack.submit(tmpfs_path / "absent.img", tmpfs_path / "copy.img")  # no worker is there to end it
    request = f"GET /v1/jobs/{job.id}?wait=50 HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    waiting = []
    for _ in range(60):
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(stack.api_socket))
        one.sendall(request)
        waiting.append(one)
    try:
        wait_until(lambda: stack.client.job(job.id).state == "running", "the control loop", 5)
        assert stack.client.health().leader
        coordinator = stack.processes.pop("coordinator")
        coordinator.terminate(10)
        assert coordinator.returncode == 0
        for one in waiting:
            one.settimeout(5)
            assert one.recv(100).startswith(b"HTTP/1.1 503")
    finally:
        for one in waiting:
            one.close()


def connections(stack: Stack) -> int:
    """That the API has open, besides the one it listens on."""
    (coordinator, *_) = stack.processes["coordinator"].family()
    return sum(one.laddr == str(stack.api_socket) for one in coordinator.net_connections("unix")) - 1


@UNCONNECTED_SOCKET_LEAKS
def test_clients_that_wait_when_it_ends_wait_on_at_the_next_one(stack: Stack) -> None:
    stack.start_coordinator()
    job = stack.submit("/nonexistent/source.img", "/nonexistent/target.img")
    with ThreadPoolExecutor(1) as pool, Client(f"unix://{stack.api_socket}") as client:
        before = connections(stack)
        waited = pool.submit(client.wait, job.id, timeout_s=60)
        wait_until(lambda: connections(stack) > before, "the client")
        stack.processes.pop("coordinator").terminate()
        stack.start_coordinator()
        stack.client.cancel(job.id)
        assert waited.result().state is State.CONCLUDED


def test_verbs_answer_at_once_however_many_clients_wait(stack: Stack) -> None:
    stack.start_coordinator()
    job = stack.submit("/nonexistent/source.img", "/nonexistent/target.img")
    stack.wait(job.id, State.RUNNING)
    (*_, last) = stack.client.events(job=job.id)

    def answers(ask: Callable[[], object]) -> None:
        begun = time.monotonic()
        ask()
        assert time.monotonic() - begun < ANSWER_S

    async def event(client: AsyncClient) -> str:
        async for found in client.events(after=last.id, job=job.id, follow=True):
            return found.event
        raise AssertionError("it never ends")

    async def crowd() -> None:
        async with AsyncClient(f"unix://{stack.api_socket}") as client:
            before = connections(stack)
            waits = [asyncio.create_task(client.wait(job.id)) for _ in range(CLIENTS // 2)]
            follows = [asyncio.create_task(event(client)) for _ in range(CLIENTS // 2)]
            await asyncio.to_thread(wait_until, lambda: connections(stack) == before + CLIENTS, "the clients")
            for ask in (
                lambda: stack.client.set_speed(job.id, 1000),
                stack.client.health,
                lambda: stack.client.cancel(job.id),
            ):
                await asyncio.to_thread(answers, ask)
            assert {ended.state for ended in await asyncio.gather(*waits)} == {State.CONCLUDED}
            assert set(await asyncio.gather(*follows)) == {"JOB_STATUS_CHANGE"}

    asyncio.run(crowd())
