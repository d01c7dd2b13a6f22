"""A tiny Linux guest for tests: a distribution's kernel, busybox and a script of the test's, booted without KVM.

    packages, unpacked by `config/setup.sh guest`      vmlinuz, *.ko, busybox
       │  GuestKit.get()
       ▼
    kernel, and a first cpio archive: busybox, drivers in the order of their dependencies, /init
       │  kit.initramfs(…)
       ▼
    the test's initramfs: that archive, followed by a second one with /test/script and the test's files
       │  kit.command(…)
       ▼
    run_guest(…), or a Guest to do things to while it runs

/init mounts /proc, /sys and /dev, loads the drivers, runs the script by `sh -e`, says on the console what it ended with
and powers off. The kernel unpacks archives that follow one another
(Documentation/driver-api/early-userspace/buffer-format.rst), so nothing is built anew for a test.
"""

from __future__ import annotations

import lzma
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import zstandard

from tests.stack import Process, wait_until

BOOT_S = 90.0
"""Until a guest has booted and done what a test wants; two seconds where nobody else wants the processors."""
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "ext4")
_UNPACK: Mapping[str, Callable[[bytes], bytes]] = {
    ".ko": bytes,
    ".ko.xz": lzma.decompress,
    ".ko.zst": zstandard.decompress,
}
"""How Debian 12, Debian 13 and Ubuntu 24.04 ship modules. Busybox only loads what is not compressed."""
_ENDING = re.compile(r"^guest: the script ended with (\d+)$", re.MULTILINE)
_INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for driver in {drivers}; do insmod /drivers/$driver.ko; done
sh -e /test/script
echo "guest: the script ended with $?"
poweroff -f
"""


class NoGuestError(Exception):
    """This machine has nothing to boot; the message tells why and what to do about it."""


@dataclass(frozen=True)
class GuestKit:
    """What every guest boots: the path of the kernel, and the archive that each initramfs begins with."""

    kernel: Path
    base: bytes

    @classmethod
    def get(cls) -> Self:
        """From the packages in the user's cache; NoGuestError if they are not there."""
        packages = _unpacked("guest")
        drivers = _drivers(_only(packages, "lib/modules/*", "usr/lib/modules/*"))
        files = {f"drivers/{name}.ko": _File(0o644, content) for name, content in drivers.items()}
        files["bin/busybox"] = _File(0o755, _only(packages, "bin/busybox", "usr/bin/busybox").read_bytes())
        files["init"] = _File(0o755, _INIT.format(drivers=" ".join(drivers)).encode())
        return cls(_only(packages, "boot/vmlinuz-*"), _cpio(files))

    def initramfs(self, directory: Path, script: str, files: Mapping[str, bytes] | None = None) -> Path:
        """Made in `directory`. The script finds `files` in /test and may mount on /mnt; its first failure ends it."""
        mine = {"test/script": _File(0o644, script.encode())}
        for name, content in (files or {}).items():
            mine[f"test/{name}"] = _File(0o644, content)
        path = directory / "initramfs"
        path.write_bytes(self.base + _cpio(mine))
        return path

    def command(
        self, initramfs: Path, drives: Sequence[str], *, memory_mib: int = 128, extra: Sequence[str] = ()
    ) -> list[str]:
        """QEMU's command line. `drives` are values of -drive without `if` and `id`: /dev/vda, /dev/vdb and so on.

        The first has the node d0 and the device v0. Anything else a test wants, an IOThread or a monitor, is `extra`.
        """
        words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
        words += ["-machine", "q35,accel=tcg", "-cpu", "max", "-m", str(memory_mib)]
        words += ["-kernel", str(self.kernel), "-initrd", str(initramfs), "-append", "console=ttyS0 quiet panic=-1"]
        words += ["-no-reboot"]  # with panic=-1: a guest that panics ends
        for number, drive in enumerate(drives):
            words += ["-drive", f"{drive},if=none,id=d{number}"]
            words += ["-device", f"virtio-blk-pci,drive=d{number},id=v{number}"]
        return [*words, *extra]


def agent_files() -> dict[str, bytes]:
    """QEMU's guest agent as a test gives it to its guest, as `qemu-ga`, with its loader, `ld.so`, and its libraries by
    their names; NoGuestError without its packages. The loader finds which of their libraries it needs."""
    packages = _unpacked("guest-agent")
    agent = _only(packages, "usr/sbin/qemu-ga", "usr/bin/qemu-ga")
    loader = _only(packages, "lib/*/ld-linux-x86-64.so.2", "usr/lib/*/ld-linux-x86-64.so.2")
    places = ":".join(map(str, [*packages.glob("lib/*-linux-gnu"), *packages.glob("usr/lib/*-linux-gnu")]))
    command = [str(loader), "--library-path", places, "--list", str(agent)]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    libraries = re.findall(rf"^\s*(\S+) => ({re.escape(str(packages))}\S+)", listed, re.MULTILINE)
    files = {name: Path(path) for name, path in libraries if "/" not in name}
    return {name: path.read_bytes() for name, path in {**files, "qemu-ga": agent, "ld.so": loader}.items()}


class Guest(Process):
    """A QEMU and the guest in it. As a context manager it is killed at the end, whatever it is doing."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        log.unlink(missing_ok=True)
        super().__init__(list(command), log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def console(self) -> str:
        """What it has shown so far, together with QEMU's own messages."""
        return self.log.read_text(errors="replace").replace("\r\n", "\n")

    def wait_for(self, text: str, timeout_s: float = BOOT_S) -> None:
        """Until the console has shown `text`; AssertionError if the guest ends without it."""
        wait_until(lambda: text in self.console() or self.is_off(), f"{text!r} in {self.log}", timeout_s)
        assert text in self.console(), self.console()

    def wait_until_off(self, timeout_s: float = BOOT_S) -> str:
        """The whole console; AssertionError unless the guest powered off after a script that succeeded."""
        wait_until(self.is_off, f"the end of the guest of {self.log}", timeout_s)
        console = self.console()
        ending = _ENDING.search(console)
        assert ending is not None, f"QEMU ended with {self.returncode}, the script did not:\n{console}"
        assert ending[1] == "0", f"the script failed:\n{console}"
        return console

    def is_off(self) -> bool:
        return self._child.poll() is not None


def run_guest(command: Sequence[str], log: Path, timeout_s: float = BOOT_S) -> str:
    """Boot a guest and wait for its end: what its console has shown. AssertionError unless its script succeeded."""
    with Guest(command, log) as guest:
        return guest.wait_until_off(timeout_s)


def _unpacked(name: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    packages = Path(cache) / "flushpoint-tests" / name
    if not packages.is_dir():
        raise NoGuestError(f"{packages} is not there: `make system` fetches it, through apt")
    return packages


def _only(packages: Path, *patterns: str) -> Path:
    """The one path that matches; distributions differ in whether /bin and /lib are in /usr."""
    found = [path for pattern in patterns for path in packages.glob(pattern)]
    if len(found) != 1:
        raise NoGuestError(f"{packages} has {len(found)} of {' or '.join(patterns)}: remove it, then run `make system`")
    return found[0]


# -- drivers --------------------------------------------------------------------------------------------------------


def _drivers(modules: Path) -> dict[str, bytes]:
    """Each module that DRIVERS need and the kernel has not built in, after those it depends on."""
    builtin = {_module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    files = {_module_name(path.name): path for path in modules.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in builtin or name in ordered:
            return
        if name not in files:
            raise NoGuestError(f"the kernel of {modules} has no driver {name}")
        path = files[name]
        content = _UNPACK["".join(path.suffixes)](path.read_bytes())
        for needed in _dependencies(content):
            add(needed)
        ordered[name] = content

    for driver in DRIVERS:
        add(driver)
    return ordered


def _module_name(path: str) -> str:
    """As in `depends=`, where it has underscores whatever its file has."""
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


def _dependencies(module: bytes) -> list[str]:
    """From its .modinfo section, where depmod finds them: the packages have no modules.dep."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return found[1].decode().split(",") if found is not None and found[1] else []


# -- cpio -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    permissions: int
    content: bytes


def _cpio(files: Mapping[str, _File]) -> bytes:
    """An archive in the format newc; directories one level deep are made."""
    directories = sorted({path.partition("/")[0] for path in files if "/" in path})
    entries = [_entry(n, path, 0o040755, b"") for n, path in enumerate(directories, 1)]
    for number, (path, file) in enumerate(files.items(), len(entries) + 1):
        entries.append(_entry(number, path, 0o100000 | file.permissions, file.content))
    return b"".join([*entries, _entry(0, "TRAILER!!!", 0, b"")])


def _entry(inode: int, path: str, mode: int, content: bytes) -> bytes:
    """A header of hexadecimal fields, the path and the content, either padded to four bytes.

    The fields: inode, mode, owner, group, links, time, length, four device numbers, length of the path, checksum.
    """
    name = path.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + "".join(f"{field:08X}" for field in fields).encode() + name
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
