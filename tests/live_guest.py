"""Live guests of tests: a Linux in a QEMU, with disks and IOThreads as wanted, that writes all the time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.job import Sync
from coordinator.model.uri import parse
from tests.guest import Guest, GuestKit
from tests.stack import make_disk, wait_until
from workers.access import Access
from workers.sources import open_source

MIB = 1024 * 1024
WRITES_S = 30.0
_SCRIPT = """\
chmod +x /test/writer
for disk in {names}; do until test -b $disk; do sleep 0.1; done; done
{wait}/test/writer {words}
"""
_WAIT_FOR_PORT = "until test -c /dev/vport*p1; do sleep 0.1; done\n"
_FILES_SCRIPT = """\
chmod +x /test/ld.so /test/qemu-ga
until test -b /dev/vda && test -c /dev/vport*p1; do sleep 0.1; done
mount -t ext4 /dev/vda /mnt
/test/ld.so --library-path /test /test/qemu-ga -m virtio-serial -p $(ls /dev/vport*p1) -t /test -f /test/pid &
n=0
while true; do
    n=$((n + 1)); echo $n > /mnt/$((n % 64))
    if test $((n % 16)) = 0; then sync; echo "wrote $n"; fi
done
"""
_WRITER = Path(__file__).with_name("guest_writer.c")


@dataclass(frozen=True, slots=True)
class LiveDisk:
    """A disk with the device `name` and the node `name`-node."""

    name: str
    bus: str = "virtio-blk"
    """Or virtio-scsi."""
    format: str = "qcow2"
    iothread: bool = False
    size: int = 64 * MIB

    @property
    def node(self) -> str:
        return f"{self.name}-node"

    def image(self, directory: Path) -> Path:
        return directory / f"{self.name}.{self.format}"


@dataclass(frozen=True, slots=True)
class LiveGuest:
    guest: Guest
    monitor: Path
    """For whoever is tested."""
    directory: Path
    disks: tuple[LiveDisk, ...]

    @property
    def agent(self) -> Path:
        """Of a guest with files: the socket of its own agent. Not there for others."""
        return self.directory / "agent"

    @property
    def user(self) -> Path:
        """A second monitor, for its user."""
        return self.directory / "user"

    def pid(self) -> int:
        return self.guest.pid

    def wait_until_it_writes(self) -> None:
        """More than it has until now."""
        seen = self.guest.console().count("wrote ")
        wait_until(lambda: self.guest.console().count("wrote ") > seen, f"more writes of {self.directory}", WRITES_S)


@contextmanager
def running_guest(kit: GuestKit, directory: Path, disks: Sequence[LiveDisk]) -> Iterator[LiveGuest]:
    """A guest whose disks are written at random until it is killed at the end. Images that are there are kept."""
    with _running(kit, directory, disks, " ".join(_in_guest(disks)), "", []) as guest:
        guest.guest.wait_for("wrote ")
        yield guest


@contextmanager
def wandering_guest(
    kit: GuestKit, directory: Path, disks: Sequence[LiveDisk], pace: str = "wander"
) -> Iterator[LiveGuest]:
    """The same, but it writes a little at a time (`pace` stroll: less), at no place of a disk twice before it was at
    all of them."""
    with _running(kit, directory, disks, f"{pace} {' '.join(_in_guest(disks))}", "", []) as guest:
        guest.guest.wait_for("wrote ")
        yield guest


@contextmanager
def running_with_files(kit: GuestKit, agent: Mapping[str, bytes], directory: Path) -> Iterator[LiveGuest]:
    """A guest that runs QEMU's guest agent, and writes files on the ext4 of its one disk until it is killed."""
    directory.mkdir(exist_ok=True)
    disk = LiveDisk("v0", format="raw")
    initramfs = kit.initramfs(directory, _FILES_SCRIPT, agent)
    make_disk(disk.image(directory), disk.size, {})
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(disk.image(directory))], check=True, timeout=30)
    extra = ["-chardev", f"socket,id=ga0,path={directory}/agent,server=on,wait=off", "-device", "virtio-serial-pci"]
    extra += ["-device", "virtserialport,chardev=ga0,name=org.qemu.guest_agent.0"]
    with _booted(kit, directory, [disk], initramfs, extra) as guest:
        guest.guest.wait_for("wrote ")
        yield guest


@contextmanager
def running_pair(
    kit: GuestKit, directory: Path, lead: LiveDisk, follow: LiveDisk
) -> Iterator[tuple[LiveGuest, LiveGuest]]:
    """Two guests that write in turns: the first writes n, tells the second, which writes n and answers."""
    directory.mkdir(exist_ok=True)
    line = directory / "line"
    chardev = f"socket,id=line,path={line}"
    ends = {"lead": [f"{chardev},server=on,wait=off"], "follow": [chardev]}
    port = ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=line,name=line"]
    with ExitStack() as stack:
        guests = []
        for (part, words), disk in zip(ends.items(), (lead, follow), strict=True):
            writer = f"{part} /dev/vport*p1 {_in_guest([disk])[0]}"
            extra = ["-chardev", *words, *port]
            guest = _running(kit, directory / part, [disk], writer, _WAIT_FOR_PORT, extra)
            guests.append(stack.enter_context(guest))
        for one in guests:
            one.guest.wait_for("wrote ")
        yield guests[0], guests[1]


@contextmanager
def _running(
    kit: GuestKit, directory: Path, disks: Sequence[LiveDisk], words: str, wait: str, extra: Sequence[str]
) -> Iterator[LiveGuest]:
    directory.mkdir(exist_ok=True)
    script = _SCRIPT.format(names=" ".join(_in_guest(disks)), words=words, wait=wait)
    initramfs = kit.initramfs(directory, script, {"writer": compiled(directory)})
    for disk in disks:
        if disk.image(directory).exists():  # of a guest before this one, which was killed
            continue
        command = ["qemu-img", "create", "-q", "-f", disk.format, str(disk.image(directory)), str(disk.size)]
        subprocess.run(command, check=True, timeout=30)
    with _booted(kit, directory, disks, initramfs, extra) as guest:
        yield guest


@contextmanager
def _booted(
    kit: GuestKit, directory: Path, disks: Sequence[LiveDisk], initramfs: Path, extra: Sequence[str]
) -> Iterator[LiveGuest]:
    monitor, user = directory / "qmp", directory / "user"
    qmp = ["-chardev", f"socket,id=m0,path={monitor},server=on,wait=off", "-mon", "chardev=m0,mode=control"]
    qmp += ["-chardev", f"socket,id=m1,path={user},server=on,wait=off", "-mon", "chardev=m1,mode=control"]
    command = kit.command(initramfs, [], extra=[*qmp, *extra, *_words(disks, directory)])
    with Guest(command, directory / "console") as guest:
        yield LiveGuest(guest, monitor, directory, tuple(disks))


def _in_guest(disks: Sequence[LiveDisk]) -> list[str]:
    """How the guest calls them: each bus in the order of the command line."""
    counts = {"virtio-blk": 0, "virtio-scsi": 0}
    names = []
    for disk in disks:
        letter = chr(ord("a") + counts[disk.bus])
        counts[disk.bus] += 1
        names.append(f"/dev/{'vd' if disk.bus == 'virtio-blk' else 'sd'}{letter}")
    return names


def _words(disks: Sequence[LiveDisk], directory: Path) -> list[str]:
    words = []
    for disk in disks:
        file = {"driver": "file", "filename": str(disk.image(directory)), "discard": "unmap"}
        words += ["-blockdev", json.dumps({"driver": disk.format, "node-name": disk.node, "file": file})]
        thread = f",iothread={disk.name}-thread" if disk.iothread else ""
        if disk.iothread:
            words += ["-object", f"iothread,id={disk.name}-thread"]
        if disk.bus == "virtio-scsi":
            words += ["-device", f"virtio-scsi-pci,id={disk.name}-bus{thread}"]
            words += ["-device", f"scsi-hd,id={disk.name},drive={disk.node},bus={disk.name}-bus.0"]
        else:
            words += ["-device", f"virtio-blk-pci,id={disk.name},drive={disk.node}{thread}"]
    return words


def needs_recovery(image: Path) -> bool:
    """Whether the ext4 in a raw image has a journal to replay. AssertionError if it has not and e2fsck still finds
    something to do."""
    told = subprocess.run(["dumpe2fs", "-h", image], capture_output=True, text=True, check=True, timeout=60).stdout
    features = next(line for line in told.splitlines() if line.startswith("Filesystem features:")).split()
    if "needs_recovery" in features:
        return True
    checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False, timeout=60)
    assert checked.returncode == 0, checked.stdout
    return False


def compiled(directory: Path) -> bytes:
    """The writer, as a program that needs nothing of the guest."""
    program = directory / "writer"
    subprocess.run(["gcc", "-static", "-O2", "-Wall", "-o", str(program), str(_WRITER)], check=True, timeout=60)
    return program.read_bytes()


def first_number(image: Path) -> int:
    """What the first block of a staged image holds over and over."""
    source = open_source(parse(str(image)), Sync.FULL, None, Access(["/"], []))
    try:
        block = bytearray(4096)
        source.read_into(0, memoryview(block))
    finally:
        source.close()
    numbers = {int.from_bytes(block[at : at + 8], "little") for at in range(0, len(block), 8)}
    assert len(numbers) == 1, f"a block is half written: {numbers}"
    return numbers.pop()
