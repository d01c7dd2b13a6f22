"""`make demo`: mirrors a disk, changes a part of it, mirrors that part, and compares.

Everything is real: images and servers of QEMU, and the command `flushpoint` with the embedded stack, which
the first of the commands starts. The files live in a temporary directory and are gone at the end.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.demo.lab import GIB, MIB, Lab, LabError, run

BITMAP = "nightly"
DISK_BYTES = 3 * GIB
BASE_BYTES = 2 * GIB
CHANGES = 400
"""Scattered writes between the two rounds, each of 4 KiB to 256 KiB."""
NEED_BYTES = 9 * GIB
"""Base, overlay, and two copies, each with less than 2 GiB of data in it."""

console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Copied:
    """A finished mirror job, as the command reported it."""

    what: str
    seconds: float
    read: int
    sent: int


def build_base(path: Path) -> None:
    """2 GiB: random data, repetitive text, written zeroes, and holes between them."""
    page = os.urandom(MIB)
    text = (b"all disks reach the point, or none does\n" * (MIB // 40 + 1))[:MIB]
    noise = random.Random(1)
    with path.open("wb") as file:
        for _ in range(640):
            file.write(noise.randbytes(16) + page[16:])
        file.seek(768 * MIB)
        for _ in range(512):
            file.write(text)
        for _ in range(128):
            file.write(bytes(MIB))
        file.truncate(BASE_BYTES)


def qemu_io(image: Path, commands: list[str]) -> None:
    """Write to a qcow2 image through QEMU, which keeps its bitmaps."""
    run(["qemu-io", "-f", "qcow2", image], stdin="\n".join([*commands, "quit", ""]))


def build_overlay(path: Path, base: Path, scratch: Path) -> None:
    """A larger qcow2 image over the base, with data of its own, zeroes over the base's data, and a bitmap."""
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, path, str(DISK_BYTES)])
    scratch.write_bytes(os.urandom(64 * MIB))
    qemu_io(
        path,
        [
            f"write -q -s {scratch} 100M 64M",
            f"write -q -s {scratch} 2200M 64M",
            f"write -q -s {scratch} 2900M 64M",
            "write -q -z 300M 32M",
            "write -q -P 0 400M 8M",
        ],
    )
    scratch.unlink()
    run(["qemu-img", "bitmap", "--add", path, BITMAP])


def change(path: Path) -> None:
    """What a guest might do in a night: small writes all over, one large one, some zeroes."""
    dice = random.Random(2)
    commands = []
    for _ in range(CHANGES):
        length = dice.choice((4096, 16384, 65536, 262144))
        offset = dice.randrange((DISK_BYTES - length) // 4096) * 4096
        commands.append(f"write -q -P {dice.randrange(1, 256)} {offset} {length}")
    commands += ["write -q -P 77 1500M 24M", "write -q -z 50M 4M", "discard -q 2210M 2M"]
    qemu_io(path, commands)


def dirty_bytes(lab: Lab, image: Path) -> int:
    """What the bitmap calls dirty, asked of QEMU's own server by libnbd's tool."""
    with lab.serving("count", lab.qemu_nbd("count", image, "qcow2", "-r", "-B", BITMAP)) as uri:
        answer = run(["nbdinfo", "--json", "--totals", f"--map=qemu:dirty-bitmap:{BITMAP}", uri])
    return sum(int(row["size"]) for row in json.loads(answer.stdout) if row["type"] == 1)


def flushpoint(*words: str) -> tuple[dict[str, Any], float]:
    """The command, its answer as JSON, and how long it took."""
    done = run([Path(sys.executable).parent / "flushpoint", *words, "--json"])
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise LabError(f"flushpoint {' '.join(words)} printed no JSON: {done.stdout[-500:]!r}") from None
    return answer, done.seconds


def mirror(what: str, source: str, target: str, *options: str) -> Copied:
    command = shlex.join(["flushpoint", "mirror", *options, source, target])
    console.print(f"$ {command}", markup=False, soft_wrap=True)
    job, seconds = flushpoint("mirror", *options, source, target)
    copied = Copied(what, seconds, int(job["bytes_read"]), int(job["bytes_sent"]))
    console.print(f"    {seconds:.2f} s, read {mib(copied.read)}, sent {mib(copied.sent)}")
    return copied


def compare(image: Path, copy: str) -> None:
    """LabError unless QEMU finds both equal, byte for byte."""
    run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", image, copy])


def mib(count: int) -> str:
    return f"{count / MIB:,.1f} MiB"


def demonstrate(lab: Lab) -> list[Copied]:
    base, disk = lab.path / "base.raw", lab.path / "disk.qcow2"
    remote, local = lab.path / "remote.raw", lab.path / "local.raw"

    begin = time.monotonic()
    build_base(base)
    build_overlay(disk, base, lab.path / "scratch")
    with remote.open("wb") as file:
        file.truncate(DISK_BYTES)
    seconds = time.monotonic() - begin
    console.print(f"Built {disk.name} in {seconds:.1f} s: {DISK_BYTES // GIB} GiB over a backing file")

    results = []
    lab.serve("remote", lab.qemu_nbd("remote", remote, "raw", "--discard=unmap"))
    with lab.serving("disk", lab.qemu_nbd("disk", disk, "qcow2", "-r")) as source:
        results.append(mirror("all: NBD to NBD", source, lab.uri("remote"), "--source-frozen"))
    results.append(mirror("all: qcow2 to file", str(disk), str(local)))
    for name, copy in (("the NBD server", lab.uri("remote")), ("the file", str(local))):
        compare(disk, copy)
        console.print(f"{name} holds the same as the disk")

    change(disk)
    dirty = dirty_bytes(lab, disk)
    console.print(f"Changed a part: the bitmap {BITMAP} says {mib(dirty)} are dirty")
    options = ("--sync", "dirty", "--bitmap", BITMAP)
    for what, copy in (("dirty: qcow2 to NBD", lab.uri("remote")), ("dirty: qcow2 to file", str(local))):
        copied = mirror(what, str(disk), copy, *options)
        results.append(copied)
        if copied.sent > dirty:
            raise LabError(f"sent {mib(copied.sent)} where only {mib(dirty)} were dirty")
        compare(disk, copy)
        console.print("    the same as the disk again")
    return results


def report(results: list[Copied], movers: int) -> None:
    table = Table(title=f"{DISK_BYTES // GIB} GiB disk, {movers} movers")
    for heading in ("what", "seconds", "read", "sent"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in results:
        table.add_row(row.what, f"{row.seconds:.2f}", mib(row.read), mib(row.sent))
    console.print(table)
    console.print("Seconds are of the whole command; the first one started the embedded stack.")


def main() -> int:
    os.environ.setdefault("FLUSHPOINT_WORKER_SLOTS", "2")
    try:
        with Lab("demo", NEED_BYTES) as lab:
            results = demonstrate(lab)
            report(results, len(lab.stack.movers()))
    except LabError as error:
        console.print(f"[red]demo: {error}[/]", soft_wrap=True)
        return 1
    console.print("All copies are equal to the disk; nothing is left running or on disk.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
