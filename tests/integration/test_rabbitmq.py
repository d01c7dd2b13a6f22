"""The broker is exchangeable by URL: doorbells over RabbitMQ, the ledger in Valkey."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import (
    MIB,
    Process,
    continue_process,
    random_disk,
    running_stack,
    same_bytes,
    stop_process,
    wait_until,
)

pytestmark = pytest.mark.needs("rabbitmq-server")
SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""Debian's wrapper on the PATH insists on the system's own node and user."""


def free_ports(count: int) -> list[int]:
    with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in with_ports]
    for listener in with_ports:
        listener.close()
    return ports


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class RabbitMQ(Process):
    """A server of its own; `uri` is where doorbells go."""

    uri = ""


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Iterator[RabbitMQ]:
    port, dist, epmd = free_ports(3)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "RABBITMQ_NODENAME": "flushpoint-test@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(dist),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(epmd),
        "RABBITMQ_MNESIA_BASE": str(tmp_path / "mnesia"),
        "RABBITMQ_LOG_BASE": str(tmp_path / "log"),
        "RABBITMQ_PID_FILE": str(tmp_path / "pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(tmp_path / "plugins"),
        "RABBITMQ_CONFIG_FILE": str(tmp_path / "none"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(tmp_path / "none.config"),
        "RABBITMQ_CONF_ENV_FILE": str(tmp_path / "none.env"),
    }
    program = str(SERVER) if SERVER.exists() else str(shutil.which("rabbitmq-server"))
    server = RabbitMQ([program], tmp_path / "rabbitmq.log", environment)
    try:
        wait_until(lambda: accepts(port), "RabbitMQ", 60)
        server.uri = f"amqp://guest:guest@127.0.0.1:{port}//"
        yield server
    finally:
        server.terminate(30)
        subprocess.run(["epmd", "-port", str(epmd), "-kill"], check=False, capture_output=True, timeout=10)


def test_a_job_runs_with_its_doorbells_over_rabbitmq(rabbitmq: RabbitMQ, tmp_path: Path) -> None:
    source = random_disk(tmp_path / "source.img", 80 * MIB)
    with running_stack(tmp_path / "stack", env={"FLUSHPOINT_BROKER_URL": rabbitmq.uri}) as stack:
        job = stack.mirror(source, tmp_path / "target.img")
        assert job.error == "", stack.logs()
    assert same_bytes(source, tmp_path / "target.img")


def test_a_broker_that_hangs_holds_up_no_decision_and_is_used_again(rabbitmq: RabbitMQ, tmp_path: Path) -> None:
    source = random_disk(tmp_path / "source.img", MIB)
    with running_stack(tmp_path / "stack", env={"FLUSHPOINT_BROKER_URL": rabbitmq.uri}) as stack:
        assert stack.mirror(source, tmp_path / "first.img").error == ""
        frozen = [member.pid for member in rabbitmq.family()]
        for pid in frozen:
            stop_process(pid)
        try:
            waits = stack.submit(source, tmp_path / "second.img")
            other = stack.submit(source, tmp_path / "third.img")
            stack.client.cancel(other.id)  # needs the control loop, and no worker
            assert stack.wait(other.id, timeout_s=20).cancelled
        finally:
            for pid in frozen:
                continue_process(pid)
        assert stack.wait(waits.id).error == "", stack.logs()
    assert same_bytes(source, tmp_path / "second.img")
