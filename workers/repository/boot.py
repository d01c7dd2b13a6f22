"""How to boot a VM from served disks: a command line of QEMU to start from. Pure.

Each word of it was tried with QEMU 7.2. No network: a copy of a machine that is in production must not come up beside
it. A guest whose server ends is paused by werror and rerror, and goes on with `cont` once it is served again.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from workers.nbd.endpoint import Endpoint

_MACHINE = ("-machine", "q35", "-accel", "kvm", "-accel", "tcg", "-cpu", "max", "-m", "2G", "-nic", "none")
_CLOSING = (
    "  (add what the machine had: -bios /usr/share/ovmf/OVMF.fd for UEFI; -device ide-hd instead of virtio-blk-pci for"
    " a guest without virtio)"
)


@dataclass(frozen=True, slots=True)
class Served:
    """One export; `size` in bytes."""

    disk: str
    """DISK or VM/DISK."""
    at: Endpoint
    size: int
    read_only: bool


def boot_hints(served: Sequence[Served]) -> Iterator[str]:
    """Lines that say how to boot each VM. Under TLS there are none: QEMU wants objects that only its user knows."""
    for vm, disks in groupby(sorted(served, key=lambda one: one.disk), key=lambda one: one.disk.rpartition("/")[0]):
        members = list(disks)
        if any(one.at.tls for one in members):
            continue
        thrown_away = any(one.read_only for one in members)
        yield f"to boot {vm or members[0].disk}, its writes {'thrown away' if thrown_away else 'kept in the overlay'}:"
        name = ["-name", vm] if vm else []
        lines = [["qemu-system-x86_64", *name, *_MACHINE]]
        for number, one in enumerate(members):
            first = ",bootindex=1" if number == 0 else ""
            lines.append(
                [
                    *_drive(f"d{number}", one),
                    "-device",
                    f"virtio-blk-pci,drive=d{number}{first},werror=stop,rerror=stop",
                ]
            )
        yield " \\\n".join(f"{'    ' if n else '  '}{shlex.join(words)}" for n, words in enumerate(lines))
    if served and not any(one.at.tls for one in served):
        yield _CLOSING


def _drive(node: str, one: Served) -> list[str]:
    if one.read_only:  # a guest wants to write: QEMU keeps that in a file that goes with it
        return ["-drive", f"file={_quoted(str(one.at))},format=raw,if=none,id={node},snapshot=on"]
    if one.at.socket_path is not None:
        server = f"server.type=unix,server.path={_quoted(one.at.socket_path)}"
    else:
        server = f"server.type=inet,server.host={one.at.host},server.port={one.at.port}"
    return ["-blockdev", f"driver=nbd,node-name={node},{server},export={_quoted(one.at.export)}"]


def _quoted(value: str) -> str:
    """Within an option of QEMU a comma is written twice."""
    return value.replace(",", ",,")
