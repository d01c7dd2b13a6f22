"""A guest on a recovery point that `flushpoint serve` offers: it reads, writes, and the point stays as it was."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from tests.guest import Guest, GuestKit, run_guest
from tests.stack import MIB, Stack, running_stack, same_bytes

pytestmark = pytest.mark.needs("qemu-system-x86_64", "mke2fs")

COMMAND_S = 90
DISK_MIB = 64
READ = """\
mount -o ro,noload /dev/vda /mnt  # without noload the kernel would want to write the journal
cd /mnt
sha256sum -c /test/sums
test ! -e written
"""
WRITE = """\
mount /dev/vda /mnt
cd /mnt
sha256sum -c /test/sums
echo 'from the guest' > written
rm etc/motd
sync
"""
READ_WHAT_WAS_WRITTEN = """\
mount /dev/vda /mnt
cd /mnt
grep 'from the guest' written
test ! -e etc/motd
grep -v etc/motd /test/sums | sha256sum -c
cd /
umount /mnt
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Shop:
    """A repository with one point of group shop, the disk it was made from, and what is on that."""

    directory: Path
    repository: str
    disk: Path
    sums: bytes
    """As sha256sum writes them."""


@pytest.fixture
def shop(stack: Stack, tmpfs_path: Path) -> Shop:
    tree = tmpfs_path / "tree"
    dice = random.Random(11)
    files = {"etc/motd": b"welcome\n", "var/empty": b""}
    files |= {f"var/{number}": dice.randbytes(size) for number, size in enumerate((1, 4096, 70_001, 9 * MIB))}
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    disk = tmpfs_path / "disk.img"
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(disk), f"{DISK_MIB}M"]
    subprocess.run(command, check=True, timeout=COMMAND_S)
    repository = f"repo+file://{tmpfs_path}/repository"
    flushpoint(stack, "repository", "init", repository)
    flushpoint(stack, "mirror", disk, repository, "--name", "shop")
    sums = "".join(f"{sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
    return Shop(tmpfs_path, repository, disk, sums.encode())


def environ_of(stack: Stack) -> dict[str, str]:
    return {**os.environ, "FLUSHPOINT_API": f"unix://{stack.api_socket}"}


def flushpoint(stack: Stack, *argv: object) -> None:
    command = [sys.executable, "-P", "-m", "flushpoint", *map(str, argv)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_S, check=False, env=environ_of(stack)
    )
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True, slots=True)
class Served:
    process: subprocess.Popen[str]
    uri: str


@contextlib.contextmanager
def serving(stack: Stack, shop: Shop, *options: object) -> Iterator[Served]:
    """The point's only disk, until the block ends."""
    words = ["serve", "shop@1", "-r", shop.repository, *map(str, options)]
    command = [sys.executable, "-P", "-m", "flushpoint", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ_of(stack)) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], COMMAND_S)[0], "serve does not say where"
            yield Served(process, process.stdout.readline().strip())
            process.terminate()
            assert process.wait(COMMAND_S) in (0, -signal.SIGKILL), "it ended by itself"
        finally:
            process.kill()


def drive(served: Served, *options: str) -> str:
    return ",".join([f"file={served.uri}", "format=raw", *options])


def boot(kit: GuestKit, shop: Shop, served_drive: str, script: str) -> str:
    initramfs = kit.initramfs(shop.directory, script, {"sums": shop.sums})
    return run_guest(kit.command(initramfs, [served_drive]), shop.directory / "console")


def test_a_guest_writes_on_a_served_point_finds_it_again_and_the_point_stays_as_it_was(
    stack: Stack, shop: Shop, guest_kit: GuestKit
) -> None:
    overlay = shop.directory / "overlay"
    with serving(stack, shop, "--writable", overlay) as served:
        console = boot(guest_kit, shop, drive(served), f"{WRITE}cd /; umount /mnt")
    assert console.count(": OK\n") == len(shop.sums.splitlines())
    with serving(stack, shop, "--writable", overlay) as served:
        boot(guest_kit, shop, drive(served), READ_WHAT_WAS_WRITTEN)

    flushpoint(stack, "verify", "shop@1", "-r", shop.repository)
    flushpoint(stack, "restore", "shop@1", "-r", shop.repository, "--to", shop.directory / "back.img")
    assert same_bytes(shop.disk, shop.directory / "back.img")
    with serving(stack, shop) as served:
        console = boot(guest_kit, shop, drive(served, "readonly=on"), READ)
    assert console.count(": OK\n") == len(shop.sums.splitlines())


def test_what_a_guest_has_synced_outlives_guest_and_server_that_are_killed(
    stack: Stack, shop: Shop, guest_kit: GuestKit
) -> None:
    overlay = shop.directory / "overlay"
    initramfs = guest_kit.initramfs(shop.directory, f"{WRITE}echo all is synced; sleep 1000", {"sums": shop.sums})
    with (
        serving(stack, shop, "--writable", overlay) as served,
        Guest(guest_kit.command(initramfs, [drive(served)]), shop.directory / "console") as guest,
    ):
        guest.wait_for("\nall is synced\n")
        served.process.kill()
    with serving(stack, shop, "--writable", overlay) as served:
        boot(guest_kit, shop, drive(served), READ_WHAT_WAS_WRITTEN)
