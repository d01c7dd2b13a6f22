"""The broker is exchangeable by URL: doorbells over RabbitMQ, the ledger in Valkey."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import MIB, Process, random_disk, running_stack, same_bytes, wait_until

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


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Iterator[str]:
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
    server = Process([program], tmp_path / "rabbitmq.log", environment)
    try:
        wait_until(lambda: accepts(port), "RabbitMQ", 60)
        yield f"amqp://guest:guest@127.0.0.1:{port}//"
    finally:
        server.terminate(30)
        subprocess.run(["epmd", "-port", str(epmd), "-kill"], check=False, capture_output=True, timeout=10)


def test_a_job_runs_with_its_doorbells_over_rabbitmq(rabbitmq: str, tmp_path: Path) -> None:
    source = random_disk(tmp_path / "source.img", 80 * MIB)
    with running_stack(tmp_path / "stack", env={"FLUSHPOINT_BROKER_URL": rabbitmq}) as stack:
        job = stack.mirror(source, tmp_path / "target.img")
        assert job.error == "", stack.logs()
    assert same_bytes(source, tmp_path / "target.img")
