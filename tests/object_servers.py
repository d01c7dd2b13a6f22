"""S3 servers as processes, for tests and benches: SeaweedFS, which people run, and moto, for AWS's own features."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from coordinator.model.repository_uri import RepositoryUri, parse_repository
from tests.ports import free_ports

START_S = 30.0
ACCESS_KEY, SECRET_KEY = "flushpoint-tests", "not-a-secret-of-anybody"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_REGION": "us-east-1",  # rclone's and s5cmd's
    "AWS_DEFAULT_REGION": "us-east-1",  # boto3's
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
_SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """A server on a loopback port, and the environment in which boto3 may use it."""

    endpoint: str
    pid: int

    @property
    def env(self) -> dict[str, str]:
        return ENVIRONMENT

    def uri(self, bucket: str, prefix: str, options: str = "") -> RepositoryUri:
        """`options` as in a URI: ``lock-mode=GOVERNANCE&lock-days=1``."""
        query = f"endpoint={self.endpoint}&region=us-east-1&addressing=path{'&' if options else ''}{options}"
        return parse_repository(f"s3://{bucket}/{prefix}?{query}")


@contextmanager
def running_seaweedfs() -> Iterator[ObjectServer]:
    """Master, volume server, filer and S3 gateway in one process; answers after about 2.5 s, most of them its sleeps.

    Without peers the master elects itself at once. It is killed: told to end, it waits 15 s for its own streams.
    """
    directory = Path(tempfile.mkdtemp(prefix="flushpoint-weed-", dir=_SHM if _SHM.is_dir() else None))
    parts, numbers = ("master", "volume", "filer", "s3"), free_ports(8)
    ports = dict(zip(parts, numbers[:4], strict=True))
    grpc_ports = dict(zip(parts, numbers[4:], strict=True))
    options = [f"-{part}.port={port}" for part, port in ports.items()]
    options += [f"-{part}.port.grpc={port}" for part, port in grpc_ports.items()]
    options += [f"-{part}.localSocket={directory}/{part}.sock" for part in ("filer", "s3")]
    options += ["-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
    options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.peers=none"]
    options += ["-master.volumeSizeLimitMB=512", "-volume.max=100", f"-dir={directory}"]
    command = [_program("weed"), f"-logdir={directory}", "-logtostderr=false", "server", *options]
    try:
        with _running(command, ports["s3"], "/healthz", directory / "log") as server:
            yield server
    finally:
        shutil.rmtree(directory)
        for part, port in grpc_ports.items():  # it offers no other place for these
            Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)


@contextmanager
def running_moto() -> Iterator[ObjectServer]:
    """Everything in memory. Its conditional PUT looks before it writes, and so has a race."""
    [port] = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="flushpoint-moto-") as directory:
        command = [sys.executable, "-P", "-m", "moto.server", "--host=127.0.0.1", f"--port={port}"]
        with _running(command, port, "/moto-api/data.json", Path(directory) / "log") as server:
            yield server


@contextmanager
def _running(command: list[str], port: int, health: str, log: Path) -> Iterator[ObjectServer]:
    server = ObjectServer(f"http://127.0.0.1:{port}", 0)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ | server.env
        )
    try:
        deadline = time.monotonic() + START_S
        while not _is_healthy(port, health):
            assert process.poll() is None, f"{command[0]} ended: {log.read_text(errors='replace')[-3000:]}"
            assert time.monotonic() < deadline, f"{command[0]} does not answer"
            time.sleep(0.02)
        yield ObjectServer(server.endpoint, process.pid)
    finally:
        process.kill()
        process.wait()


def _is_healthy(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _program(name: str) -> str:
    """Of this virtual environment, which need not be on the PATH."""
    return str(Path(sys.executable).with_name(name))


def client_of(server: ObjectServer) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=server.env["AWS_SECRET_ACCESS_KEY"],
    )


def make_bucket(server: ObjectServer, name: str) -> None:
    with closing(client_of(server)) as client:
        client.create_bucket(Bucket=name)
