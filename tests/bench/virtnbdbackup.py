"""An incremental backup of one live guest by virtnbdbackup, in turns with a checkpoint of another by Flushpoint.

``python -m tests.bench.virtnbdbackup`` prints the figures, which tests.bench.groups writes with its own. Libvirt wants
a QEMU's monitor for itself, so Flushpoint cannot protect its domain: it protects a twin, which has booted the same
kernel and initramfs and writes a disk of the same size at the same pace. Both write all the time, so an increment holds
what its guest has written in either's turn.

Wall time is that of the command, with the start of its Python, or from asking for a checkpoint until it is published.
virtnbdbackup sleeps for a second before it connects to the NBD server (`connect` in its nbdcli/client.py), which is
part of what it takes; a second ratio leaves that out. CPU seconds are those of the command, without libvirtd, or those
of coordinator, Valkey, worker, agent and guard for as long as the checkpoint takes; neither have QEMU's in them. We
compress what we store, virtnbdbackup does not by default, so of bytes only its written and our sent are alike.

libvirtd runs as a user's, not the system's, which puts all of its state where the XDG variables say; for root that
takes a user namespace. It daemonizes each QEMU: the namespace of its processes, and a shell in it to reap them, make
them its descendants, which end when it is killed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.model.group import GroupPolicy
from tests.bench.report import summary
from tests.demo.lab import processes, run
from tests.deployment import Deployment, member_of
from tests.guest import BOOT_S, GuestKit
from tests.live_guest import MIB, LiveDisk, wandering_guest
from tests.stack import Process, running_stack, wait_until

INCREMENT_S = 2.0
"""For how long both guests write before each increment of either."""
ITS_SLEEP_S = 1.0
DISK = 256 * MIB
PROGRAMS = ("virtnbdbackup", "virsh", "libvirtd", "unshare")
_AS_USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
_WITH_INIT = [*_AS_USER, "--pid", "--fork", "--kill-child", "--mount-proc"]
_CONFIG = 'stdio_handler = "file"\nsecurity_driver = "none"\n'  # no virtlogd is here, and nothing to confine
_NAME = "peer"
# The kernel is QEMU's business here: virtnbdbackup would copy one that it sees, and its initrd, into every increment.
_DOMAIN = """\
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <cpu mode='maximum'/>
  <on_reboot>destroy</on_reboot>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/><source file='{image}'/><target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{console}'/></serial>
    <controller type='usb' model='none'/><memballoon model='none'/><video><model type='none'/></video>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-kernel'/><qemu:arg value='{kernel}'/>
    <qemu:arg value='-initrd'/><qemu:arg value='{initramfs}'/>
    <qemu:arg value='-append'/><qemu:arg value='console=ttyS0 quiet panic=-1'/>
  </qemu:commandline>
</domain>
"""


@dataclass(frozen=True, slots=True)
class Increment:
    seconds: float
    cpu_seconds: float
    written: int
    """Bytes that it added to where backups are."""


class Domain:
    """A libvirtd of its own and a running domain whose disk virtnbdbackup has copied once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._output = directory / "backups"
        places = {name: directory / name.lower() for name in ("RUNTIME_DIR", "CONFIG_HOME", "CACHE_HOME", "DATA_HOME")}
        for place in places.values():
            place.mkdir(parents=True)
        # Without autostart: a client would start one where ours has died.
        self._environ = ["LIBVIRT_AUTOSTART=0", *(f"XDG_{name}={place}" for name, place in places.items())]
        settings = places["CONFIG_HOME"] / "libvirt" / "qemu.conf"
        settings.parent.mkdir()
        settings.write_text(_CONFIG)
        self._socket = places["RUNTIME_DIR"] / "libvirt" / "libvirt-sock"

    @contextmanager
    def running(self, kernel: Path, initramfs: Path) -> Iterator[None]:
        command = ["env", *self._environ, *_WITH_INIT, "sh", "-c", "libvirtd & wait"]
        libvirtd = Process(command, self._directory / "libvirtd.log")
        try:
            wait_until(self._socket.exists, f"libvirtd, see {libvirtd.log}")
            self._boot(kernel, initramfs)
            self._backup("full")
            yield
        finally:
            libvirtd.kill()

    def increment(self) -> Increment:
        seconds, cpu_seconds = self._backup("inc")
        (data,) = self._output.glob("vda.inc.*.data")
        written = data.stat().st_size
        data.unlink()  # the next one does not need it
        return Increment(seconds, cpu_seconds, written)

    def _boot(self, kernel: Path, initramfs: Path) -> None:
        image, console, domain = (self._directory / name for name in ("vda.qcow2", "console", "domain.xml"))
        run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(DISK)])
        words = {"name": _NAME, "image": image, "console": console, "kernel": kernel, "initramfs": initramfs}
        domain.write_text(_DOMAIN.format(**words))
        self._client(["virsh", "-q", "-c", "qemu:///session", "define", str(domain)])
        self._client(["virsh", "-q", "-c", "qemu:///session", "start", _NAME])
        wait_until(lambda: "wrote " in console.read_text(errors="replace"), f"writes in {console}", BOOT_S)

    def _backup(self, level: str) -> tuple[float, float]:
        """Seconds, and CPU seconds."""
        words = ["virtnbdbackup", "-U", "qemu:///session", "-d", _NAME, "-l", level, "-n", "-o", str(self._output)]
        return self._client([*words, "-S", str(self._directory), "-f", str(self._directory / "nbd")])

    def _client(self, command: Sequence[str]) -> tuple[float, float]:
        done = run(["env", *self._environ, *_AS_USER, *command])
        return done.seconds, done.cpu_seconds


class Twin:
    """A group of one guest, with a point."""

    def __init__(self, deployment: Deployment, parts: Iterable[Process]) -> None:
        """`parts` are all that works for it."""
        self._deployment = deployment
        self._parts = list(parts)
        deployment.published("shop")

    def increment(self) -> Increment:
        before, spent, begun = self._stored(), self._cpu_seconds(), time.monotonic()
        self._deployment.published("shop")
        seconds = time.monotonic() - begun
        return Increment(seconds, self._cpu_seconds() - spent, self._stored() - before)

    def sent(self) -> int:
        """Bytes, for the newest point."""
        number = self._deployment.stack.client.group("shop").point
        return sum(member.bytes_sent for member in self._deployment.point("shop", number).members)

    def _cpu_seconds(self) -> float:
        now = processes()
        pids = {member.pid for part in self._parts for member in part.family()}
        return sum(now[pid].cpu_seconds for pid in pids & now.keys())

    def _stored(self) -> int:
        files = (self._deployment.directory / "repository").rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def protected(kit: GuestKit, directory: Path) -> Iterator[tuple[Twin, Path]]:
    """The twin, and the initramfs it has booted."""
    with (
        wandering_guest(kit, directory / "twin", [LiveDisk("a", size=DISK)]) as guest,
        running_stack(directory / "stack") as stack,
    ):
        deployment = Deployment(stack, directory)
        with deployment.host("hv0", guest) as host:
            deployment.apply_members("shop", [member_of(host)], GroupPolicy(freeze_timeout=5, rpo=0))
            agent = [host.agent] if host.agent is not None else []
            yield Twin(deployment, [*stack.processes.values(), *agent, host.guard]), guest.directory / "initramfs"


def why_not() -> str | None:
    """What keeps it from running here."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: config/setup.sh bench does that"
    tried = subprocess.run([*_WITH_INIT, "true"], capture_output=True, text=True, check=False, timeout=10)
    return f"libvirtd wants namespaces: {tried.stderr.strip()}" if tried.returncode != 0 else None


def measure(kit: GuestKit, rounds: int, directory: Path) -> dict[str, Any] | str:
    """The figures, or why there are none."""
    reason = why_not()
    if reason is not None:
        return f"skipped: {reason}"
    theirs, ours, sent = [], [], []
    domain = Domain(directory / "libvirt")
    with protected(kit, directory) as (twin, initramfs), domain.running(kit.kernel, initramfs):
        for number in range(rounds + 1):
            time.sleep(INCREMENT_S)  # the guests write
            its = domain.increment()
            time.sleep(INCREMENT_S)
            own = twin.increment()
            if number == 0:  # holds what was written while the other booted
                continue
            theirs.append(its)
            ours.append(own)
            sent.append(twin.sent() / MIB)
    their_s, our_s = (statistics.median(one.seconds for one in increments) for increments in (theirs, ours))
    return {
        "version": run(["virtnbdbackup", "-V"]).stdout.strip(),
        "virtnbdbackup": figures(theirs),
        "flushpoint": figures(ours) | {"sent_mib": summary(sent)},
        "ratio_of_medians": our_s / their_s,
        "ratio_without_its_sleep": our_s / (their_s - ITS_SLEEP_S),
    }


def figures(increments: Sequence[Increment]) -> dict[str, Any]:
    return {
        "seconds": summary([one.seconds for one in increments]),
        "cpu_seconds": summary([one.cpu_seconds for one in increments]),
        "written_mib": summary([one.written / MIB for one in increments]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="flushpoint-", dir="/dev/shm") as directory:
        print(json.dumps(measure(GuestKit.get(), rounds, Path(directory)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
