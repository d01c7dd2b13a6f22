"""The broker is exchangeable by URL: doorbells over RabbitMQ, the ledger in Valkey."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import pools
from kombu.exceptions import OperationalError

from coordinator import broker
from coordinator.model.messages import MOVER_ROLE, Doorbell
from coordinator.settings import Settings
from tests.ports import free_ports
from tests.stack import (
    MIB,
    Process,
    Stack,
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


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class RabbitMQ:
    """A server of its own; `uri` is where doorbells go. What it has stored is there again when it is started again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port, dist, self._epmd = free_ports(3)
        self._environment = {
            **os.environ,
            "HOME": str(directory),
            "RABBITMQ_NODENAME": "flushpoint-test@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(dist),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(directory / "none"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "none.config"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "none.env"),
        }
        self.uri = f"amqp://guest:guest@127.0.0.1:{self._port}//"
        self.start()

    def start(self) -> None:
        program = str(SERVER) if SERVER.exists() else str(shutil.which("rabbitmq-server"))
        self._process = Process([program], self._directory / "rabbitmq.log", self._environment)
        wait_until(lambda: accepts(self._port), "RabbitMQ", 60)

    def stop(self) -> None:
        self._process.terminate(30)

    def close(self) -> None:
        self.stop()
        subprocess.run(["epmd", "-port", str(self._epmd), "-kill"], check=False, capture_output=True, timeout=10)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It keeps its connections and says nothing."""
        pids = [member.pid for member in self._process.family()]
        for pid in pids:
            stop_process(pid)
        try:
            yield
        finally:
            for pid in pids:
                continue_process(pid)


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    with contextlib.closing(RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))) as server:
        yield server


@pytest.fixture(scope="module")
def stack(rabbitmq: RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A doorbell that was lost is rung again after a second."""
    env = {"FLUSHPOINT_BROKER_URL": rabbitmq.uri, "FLUSHPOINT_DOORBELL_TTL_S": "1"}
    with running_stack(tmp_path_factory.mktemp("stack"), env=env) as running:
        yield running


def test_a_job_runs_with_its_doorbells_over_rabbitmq(stack: Stack, tmp_path: Path) -> None:
    source = random_disk(tmp_path / "source.img", 80 * MIB)
    job = stack.mirror(source, tmp_path / "target.img")
    assert job.error == "", stack.logs()
    assert same_bytes(source, tmp_path / "target.img")


def test_a_broker_that_hangs_holds_up_no_decision_and_is_used_again(
    stack: Stack, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    source = random_disk(tmp_path / "source.img", MIB)
    assert stack.mirror(source, tmp_path / "first.img").error == ""
    with rabbitmq.frozen():
        waits = stack.submit(source, tmp_path / "second.img")
        other = stack.submit(source, tmp_path / "third.img")
        stack.client.cancel(other.id)  # needs the control loop, and no worker
        assert stack.wait(other.id, timeout_s=8).cancelled
    assert stack.wait(waits.id).error == "", stack.logs()
    assert same_bytes(source, tmp_path / "second.img")


def test_a_job_begun_while_the_broker_is_away_goes_on_once_it_is_back(
    stack: Stack, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    source = random_disk(tmp_path / "source.img", MIB)
    assert stack.mirror(source, tmp_path / "first.img").error == ""
    log = stack.processes["coordinator"].log
    told = log.read_text().count("cannot ring")
    rabbitmq.stop()
    try:
        waits = stack.submit(source, tmp_path / "second.img")
        wait_until(lambda: log.read_text().count("cannot ring") > told, "a doorbell that nobody takes")
        assert stack.client.health().leader
    finally:
        rabbitmq.start()
    assert stack.wait(waits.id).error == "", stack.logs()
    assert same_bytes(source, tmp_path / "second.img")


def test_a_doorbell_that_the_broker_does_not_confirm_is_given_up(
    rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that is gone without a word would be waited for until TCP gives up, if it ever does."""
    monkeypatch.setattr(broker, "SILENCE_S", 0.5)
    bell = Doorbell(role=MOVER_ROLE, bell="of nobody")
    with broker.make_app(Settings(broker_url=rabbitmq.uri)) as app:
        broker.ring(app, bell)
        with rabbitmq.frozen(), pytest.raises(OperationalError):
            broker.ring(app, bell)
        broker.ring(app, bell)
        pools.reset()
