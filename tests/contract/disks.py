"""Disks of every kind with known content, for the contract tests of sources and targets."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.model.uri import DiskUri, parse
from workers.access import Access

MIB = 1024 * 1024
ODD_SIZE = 3 * MIB + 64 * 1024 + 1001
"""No multiple of 512, of a page, or of a cluster."""

WRITTEN: tuple[tuple[int, int, int], ...] = (
    (0, 10_000, 0x11),
    (1 * MIB, 64 * 1024, 0x22),
    (2 * MIB + 3, 100_001, 0x33),
    (ODD_SIZE - 1001, 1001, 0x44),
)
"""(offset, length, byte): what the disks hold; the rest are holes."""


@dataclass(frozen=True, slots=True)
class Disk:
    """Where a disk is, and the bytes it has."""

    uri: DiskUri
    content: bytes


def access_to(*roots: Path) -> Access:
    return Access([str(r) for r in roots], ["127.0.0.1"])


def sample_content(size: int = ODD_SIZE) -> bytes:
    content = bytearray(size)
    for offset, length, byte in WRITTEN:
        content[offset : offset + length] = bytes([byte]) * length
    return bytes(content)


def padded(content: bytes, unit: int = 512) -> bytes:
    return content + bytes(-len(content) % unit)


def open_descriptors() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def make_raw(path: Path, content: bytes) -> Path:
    """A sparse file: zeroes at whole 64 KiB are holes."""
    step = 64 * 1024
    with path.open("wb") as file:
        file.truncate(len(content))
        for offset in range(0, len(content), step):
            piece = content[offset : offset + step]
            if piece.strip(b"\0"):
                file.seek(offset)
                file.write(piece)
    return path


def qemu_io(path: Path, *commands: str) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    run("qemu-io", "-f", "qcow2", *arguments, str(path))


def make_chain(directory: Path) -> tuple[Path, bytes]:
    """base.raw <- middle.qcow2 <- top.qcow2, and what the top reads as.

    The top has 64 KiB of 0x77 at 1 MiB and a cluster of zeroes at 2 MiB; the middle 0x66 at 128 KiB.
    """
    content = bytearray(padded(sample_content()))
    base = make_raw(directory / "base.raw", bytes(content))
    middle, top = directory / "middle.qcow2", directory / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(middle))
    qemu_io(middle, "write -P 0x66 128k 64k")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", middle.name, str(top))
    qemu_io(top, "write -P 0x77 1M 64k", "write -z 2M 64k")
    content[128 * 1024 : 192 * 1024] = b"\x66" * 65536
    content[1 * MIB : 1 * MIB + 65536] = b"\x77" * 65536
    content[2 * MIB : 2 * MIB + 65536] = bytes(65536)
    return top, bytes(content)


def image_with_bitmap(directory: Path) -> Path:
    """4 MiB with data at 0 and, dirty in b0, data at 1 MiB and zeroes at 2 MiB."""
    path = directory / "bitmap.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "4M")
    qemu_io(path, "write -P 1 0 64k", "write -P 1 2M 64k")
    run("qemu-img", "bitmap", "--add", str(path), "b0")
    qemu_io(path, "write -P 2 1M 128k", "write -z 2M 64k")
    return path


_ACTIVATE = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 </dev/null'


@contextmanager
def serving(socket_path: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """An NBD server listening on `socket_path`, by socket activation: a client may connect at once."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        server = _activated(listener, command)
    try:
        yield server
    finally:
        server.kill()
        server.wait(timeout=10)
        socket_path.unlink(missing_ok=True)


@contextmanager
def serving_tcp(*command: str, address: str = "127.0.0.1") -> Iterator[int]:
    """The same on a free TCP port of `address`, which is yielded; the test is skipped without such an address."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        try:
            listener.bind((address, 0))
        except OSError as error:
            pytest.skip(f"no {address} on this host: {error}")
        port: int = listener.getsockname()[1]
        server = _activated(listener, command)
    try:
        yield port
    finally:
        server.kill()
        server.wait(timeout=10)


def _activated(listener: socket.socket, command: Sequence[str]) -> subprocess.Popen[bytes]:
    listener.listen(64)
    return subprocess.Popen(["sh", "-c", _ACTIVATE, "sh", *command], stdin=listener, stderr=subprocess.DEVNULL)


def nbd_uri(socket_path: Path, export: str = "") -> DiskUri:
    return parse(f"nbd+unix:///{export}?socket={socket_path}")


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[Path]:
    """A loop device over `path`; the test is skipped where this user cannot make one."""
    done = subprocess.run(
        ["losetup", "--find", "--show", *options, str(path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"no loop device to be had: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", str(device))


@contextmanager
def small_tmpfs(directory: Path, size: str) -> Iterator[Path]:
    """A file system of `size`; the test is skipped where this user cannot mount one."""
    mount_point = directory / "small"
    mount_point.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(mount_point)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        yield mount_point
    finally:
        run("umount", str(mount_point))


Maker = Callable[[Path, ExitStack], Disk]
"""Makes a disk in a directory; what it starts ends with the stack."""


def raw_file(directory: Path, _: ExitStack) -> Disk:
    content = sample_content()
    return Disk(parse(str(make_raw(directory / "disk.img", content))), content)


def block_device(directory: Path, stack: ExitStack) -> Disk:
    content = padded(sample_content())
    path = make_raw(directory / "loop.img", content)
    return Disk(parse(str(stack.enter_context(loop_device(path)))), content)


def qcow2_chain(directory: Path, _: ExitStack) -> Disk:
    top, content = make_chain(directory)
    return Disk(parse(str(top)), content)


def nbd_by_qemu(directory: Path, stack: ExitStack) -> Disk:
    content = padded(sample_content())
    path = make_raw(directory / "disk.img", content)
    listen = directory / "qemu.sock"
    stack.enter_context(serving(listen, "qemu-nbd", "-t", "-e", "0", "-f", "raw", "--discard=unmap", str(path)))
    return Disk(nbd_uri(listen), content)


def nbd_by_nbdkit(directory: Path, stack: ExitStack) -> Disk:
    """No block status: the filter hides what the file plugin knows. Odd sizes are kept."""
    content = sample_content()
    path = make_raw(directory / "disk.img", content)
    listen = directory / "nbdkit.sock"
    stack.enter_context(serving(listen, "nbdkit", "-f", "--filter=noextents", "file", str(path)))
    return Disk(nbd_uri(listen), content)


def nbd_single_connection(directory: Path, stack: ExitStack) -> Disk:
    """No CAN_MULTI_CONN and no WRITE_ZEROES."""
    content = sample_content()
    path = make_raw(directory / "disk.img", content)
    listen = directory / "single.sock"
    command = ("nbdkit", "-f", "--filter=multi-conn", "--filter=nozero", "file", str(path), "multi-conn-mode=disable")
    stack.enter_context(serving(listen, *command))
    return Disk(nbd_uri(listen), content)


def kind(maker: Maker, program: str) -> object:
    """A pytest parameter for `maker` that needs `program`."""
    return pytest.param(maker, marks=pytest.mark.needs(program), id=maker.__name__)
