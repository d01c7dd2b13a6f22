"""Our server and the clients it will meet: libnbd's tools, QEMU's, nbdkit's; whole images are compared."""

from __future__ import annotations

import json
import os
import subprocess
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nbd_servers import MIB, run, served, storage_daemon

from coordinator.model.extent import Status
from tests.unit.nbd.raw_client import serving, unix
from tests.unit.nbd.served_disks import MemoryDisk
from workers.nbd.endpoint import Endpoint
from workers.nbd.server import Server
from workers.nbd.session import Session

SIZE = 64 * MIB
DATA_EXTENTS = [(0, MIB), (8 * MIB, 4 * MIB), (31 * MIB + 65536, 65536), (SIZE - 8192, 8192)]


class CountingDisk(MemoryDisk):
    """Knows how many clients were connected at the same time while it was used."""

    server: Server | None = None
    most_clients = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.server is not None:
            self.most_clients = max(self.most_clients, self.server.connections)
        super().read_into(offset, buffer)


@pytest.fixture
def disk() -> CountingDisk:
    """Data at DATA_EXTENTS, and holes."""
    disk = CountingDisk(SIZE)
    for offset, length in DATA_EXTENTS:
        disk.fill(offset, os.urandom(length))
    return disk


@pytest.fixture
def endpoint(tmpfs_path: Path, disk: CountingDisk) -> Iterator[Endpoint]:
    """The disk, writable, and as "1" an empty one that is not."""
    endpoint = unix(tmpfs_path)
    with serving(endpoint, disk, MemoryDisk(3 * MIB + 512, read_only=True)) as server:
        disk.server = server
        yield endpoint


@pytest.fixture
def image(tmpfs_path: Path) -> Path:
    """A sparse raw file, as large as the disk, with other content."""
    image = tmpfs_path / "other.raw"
    with image.open("wb") as file:
        file.truncate(SIZE)
        for at in range(0, SIZE, 16 * MIB):
            file.seek(at + 4096)
            file.write(os.urandom(3 * MIB))
    return image


def nbd_options(endpoint: Endpoint) -> str:
    """The endpoint as QEMU's --image-opts and --blockdev name it."""
    return f"driver=nbd,server.type=unix,server.path={endpoint.socket_path},export={endpoint.export}"


@pytest.mark.needs("nbdinfo")
def test_nbdinfo_reads_every_property_of_every_export(endpoint: Endpoint) -> None:
    told = json.loads(run("nbdinfo", "--json", "--list", str(endpoint)))
    by_name = {export["export-name"]: export for export in told["exports"]}
    assert told["structured"]
    assert set(by_name) == {"disk", "1"}
    writable, read_only = by_name["disk"], by_name["1"]
    assert writable["export-size"] == SIZE
    assert writable["contexts"] == ["base:allocation"]
    capabilities = ("can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_multi_conn", "can_df")
    assert all(writable[capability] for capability in capabilities)
    assert not writable["is_read_only"]
    assert (writable["block_size_minimum"], writable["block_size_maximum"]) == (1, 32 * MIB)
    assert read_only["is_read_only"]
    assert read_only["export-size"] == 3 * MIB + 512


@pytest.mark.needs("nbdinfo", "qemu-img")
def test_nbdinfo_and_qemu_map_the_disk_as_it_is(endpoint: Endpoint, disk: CountingDisk) -> None:
    disk.write_zeroes(9 * MIB, MIB, may_trim=False)
    expected = list(disk.extents(0, SIZE))
    assert {extent.status for extent in expected} == {Status.DATA, Status.ZERO, Status.HOLE}
    type_of = {Status.DATA: 0, Status.ZERO: 2, Status.HOLE: 3}
    by_nbdinfo = json.loads(run("nbdinfo", "--map", "--json", str(endpoint)))
    assert [(e["offset"], e["length"], e["type"]) for e in by_nbdinfo] == [
        (extent.offset, extent.length, type_of[extent.status]) for extent in expected
    ]
    by_qemu = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", nbd_options(endpoint)))
    assert [(e["start"], e["length"], e["data"], e["zero"]) for e in by_qemu] == [
        (extent.offset, extent.length, extent.status != Status.HOLE, extent.status != Status.DATA)
        for extent in expected
    ]


@pytest.mark.needs("nbdcopy")
@pytest.mark.parametrize(
    "options", [(), ("--synchronous",), ("--connections=4", "--threads=4", "--request-size=1048576")]
)
def test_nbdcopy_reads_and_writes_whole_disks(
    endpoint: Endpoint, disk: CountingDisk, image: Path, tmpfs_path: Path, options: tuple[str, ...]
) -> None:
    copy = tmpfs_path / "copy.raw"
    run("nbdcopy", *options, str(endpoint), str(copy))
    assert copy.read_bytes() == disk.content
    run("nbdcopy", *options, "--flush", str(image), str(endpoint))
    assert disk.content == image.read_bytes()
    assert disk.calls[-1] == "flush"


@pytest.mark.needs("nbdcopy")
def test_nbdcopy_uses_as_many_connections_as_it_likes(endpoint: Endpoint, disk: CountingDisk) -> None:
    run("nbdcopy", "--connections=4", "--threads=4", "--no-extents", str(endpoint), "null:")
    assert disk.most_clients == 4


@pytest.mark.needs("qemu-img")
def test_qemu_img_converts_and_compares_both_ways(
    endpoint: Endpoint, disk: CountingDisk, image: Path, tmpfs_path: Path
) -> None:
    copy = tmpfs_path / "copy.qcow2"
    target = nbd_options(endpoint)
    run("qemu-img", "convert", "-W", "-m", "8", "-O", "qcow2", "--image-opts", target, str(copy))
    run("qemu-img", "convert", "-O", "raw", str(copy), str(tmpfs_path / "copy.raw"))
    assert (tmpfs_path / "copy.raw").read_bytes() == disk.content
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(copy), str(endpoint))
    run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "--target-image-opts", str(image), target)
    assert disk.content == image.read_bytes()
    assert any(call.startswith("zero") for call in disk.calls)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), str(endpoint))


@pytest.mark.needs("qemu-io")
def test_qemu_io_writes_zeroes_trims_and_flushes(endpoint: Endpoint, disk: CountingDisk) -> None:
    commands = [
        "write -P 7 1M 64k", "write -f -P 8 5M 1000k", "write -z 1M 4k", "write -z -u 5M 64k", "discard 6M 1M",
        "flush", "read -P 7 1052672 60k", "read -P 0 1M 4k", "read -P 0 5M 64k", "read -P 0 60M 3M",
    ]  # fmt: skip
    run(
        "qemu-io",
        "-t",
        "writeback",
        "-f",
        "raw",
        *(part for command in commands for part in ("-c", command)),
        str(endpoint),
    )
    written = [
        f"write {MIB} {64 * 1024}", f"write {5 * MIB} {1000 * 1024}", "flush", f"zero {MIB} 4096 keep",
        f"zero {5 * MIB} {64 * 1024} trim", f"trim {6 * MIB} {MIB}", "flush",
    ]  # fmt: skip
    assert disk.calls[: len(written)] == written
    assert disk.content[MIB : MIB + 65536] == bytes(4096) + b"\x07" * (60 * 1024)


@pytest.mark.needs("qemu-io")
def test_qemu_io_may_not_write_what_is_read_only(endpoint: Endpoint) -> None:
    read_only = Endpoint(None, 0, endpoint.socket_path, "1")
    with pytest.raises(subprocess.CalledProcessError):
        run("qemu-io", "-f", "raw", "-c", "write 0 512", str(read_only))
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 3145728", str(read_only))


def use(target: Session, disk: MemoryDisk) -> None:
    """Eight threads write and read back; at last the disk holds what was written, and nothing else has changed."""
    expected = bytearray(disk.content)

    def write(at: int) -> None:
        content = os.urandom(3 * MIB)
        offset = at * 8 * MIB + 512 * at
        target.write(offset, content)
        expected[offset : offset + len(content)] = content
        back = bytearray(len(content))
        target.read_into(offset, memoryview(back))
        assert back == content

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    target.write_zeroes(40 * MIB, MIB)
    expected[40 * MIB : 41 * MIB] = bytes(MIB)
    target.flush()
    assert disk.content == expected
    assert disk.calls[-1] == "flush"


@pytest.mark.needs("qemu-nbd")
def test_qemu_nbd_passes_us_on(endpoint: Endpoint, disk: CountingDisk, tmpfs_path: Path) -> None:
    command = ("qemu-nbd", "-t", "-e", "4", "-f", "raw", str(endpoint))
    with served(tmpfs_path, *command) as passed_on, Session.open(passed_on, 2) as target:
        use(target, disk)


@pytest.mark.needs("qemu-storage-daemon")
def test_qemu_storage_daemon_passes_us_on(endpoint: Endpoint, disk: CountingDisk, tmpfs_path: Path) -> None:
    options = (
        "--blockdev", f"{nbd_options(endpoint)},node-name=n",
        "--export", "type=nbd,id=e,node-name=n,name=d,writable=on",
    )  # fmt: skip
    with storage_daemon(tmpfs_path, *options, export="d") as passed_on, Session.open(passed_on, 2) as target:
        use(target, disk)


@pytest.mark.needs("nbdkit")
@pytest.mark.parametrize("shared", [True, False])
def test_nbdkit_passes_us_on(endpoint: Endpoint, disk: CountingDisk, tmpfs_path: Path, shared: bool) -> None:
    command = ("nbdkit", "-f", "nbd", f"uri={endpoint}", f"shared={shared}")
    with served(tmpfs_path, *command) as passed_on, Session.open(passed_on, 3) as target:
        use(target, disk)


class Monitor:
    """A program of QEMU's that speaks QMP on stdin and stdout."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._events: deque[dict[str, Any]] = deque()
        assert self._stdout.readline(), "it greets"
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> None:
        """An underscore in a name of an argument stands for a hyphen."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._stdin.write(json.dumps({"execute": command, "arguments": named}).encode())
        self._stdin.flush()
        while "return" not in (message := json.loads(self._stdout.readline())):
            assert "error" not in message, message
            self._events.append(message)

    def event(self, name: str) -> dict[str, Any]:
        """The data of the next event of that name."""
        while True:
            message = self._events.popleft() if self._events else json.loads(self._stdout.readline())
            if message["event"] == name:
                return dict(message["data"])


@contextmanager
def monitored(*command: str) -> Iterator[Monitor]:
    """The program while it runs."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield Monitor(process)
        finally:
            process.kill()


QEMUS = {
    "qemu-storage-daemon": ("--chardev", "stdio,id=m", "--monitor", "m"),
    "qemu-system-x86_64": ("-M", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"),
}


@pytest.mark.parametrize("program", [pytest.param(name, marks=pytest.mark.needs(name)) for name in QEMUS])
def test_qemu_mirrors_into_us_and_backs_us_up(
    endpoint: Endpoint, disk: CountingDisk, image: Path, tmpfs_path: Path, program: str
) -> None:
    """blockdev-mirror with us as target, then blockdev-backup with us as source."""
    backup = tmpfs_path / "backup.raw"
    backup.touch()
    os.truncate(backup, SIZE)
    server = {"type": "unix", "path": endpoint.socket_path}
    with monitored(program, *QEMUS[program]) as monitor:
        monitor.execute("blockdev-add", driver="file", node_name="image", filename=str(image))
        monitor.execute("blockdev-add", driver="file", node_name="backup", filename=str(backup))
        monitor.execute("blockdev-add", driver="nbd", node_name="us", server=server, export="disk")
        monitor.execute("blockdev-mirror", job_id="m", device="image", target="us", sync="full")
        monitor.event("BLOCK_JOB_READY")
        monitor.execute("block-job-complete", device="m")
        assert "error" not in monitor.event("BLOCK_JOB_COMPLETED")
        monitor.execute("blockdev-backup", job_id="b", device="us", target="backup", sync="full")
        assert "error" not in monitor.event("BLOCK_JOB_COMPLETED")
    assert disk.content == image.read_bytes()
    assert "flush" in disk.calls
    assert backup.read_bytes() == disk.content
