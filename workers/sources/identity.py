"""Which disk is behind a name, and what lies under it: so that no disk is mirrored onto itself.

What cannot be told apart from here: two names of one host elsewhere, a network file system mounted twice, the
files behind a server on another host, and those of a process that this one may not look into (another user's).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from workers.nbd.endpoint import Endpoint

Identity = tuple[str | int, ...]
"""Two disks of one identity are one disk: ("inode", dev, ino), ("blockdev", rdev) or ("nbd", address, port, export)."""

THIS_HOST = "this host"
_TCP_ESTABLISHED, _TCP_LISTEN = "01", "0A"  # <net/tcp_states.h>, as /proc/net/tcp prints them
_UCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


def identity_of_file(status: os.stat_result) -> Identity:
    if stat.S_ISBLK(status.st_mode):
        return ("blockdev", status.st_rdev)
    return ("inode", status.st_dev, status.st_ino)


def beneath_device(device: int) -> frozenset[Identity]:
    """The file behind a loop device of number `device`; nothing for another."""
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/loop/backing_file")
    with contextlib.suppress(OSError):
        return frozenset({identity_of_file(os.stat(name.read_text().rstrip("\n")))})  # noqa: PTH116 - two numbers
    return frozenset()


def identity_of_export(endpoint: Endpoint) -> Identity:
    """One server by whatever name: the socket's inode where there is one, and one name for all addresses of this host.

    Two servers of this host on different addresses but one port, with exports of one name, are taken for one:
    refusing what could be allowed is the safe side.
    """
    if endpoint.socket_path is not None:
        status = os.stat(endpoint.socket_path)  # noqa: PTH116 - two numbers, no path wanted
        return ("nbd", f"{status.st_dev}:{status.st_ino}", 0, endpoint.export)
    host = endpoint.host or ""
    return ("nbd", THIS_HOST if _is_this_host(host) else host, endpoint.port, endpoint.export)


def name_in_fleet(identity: Identity, host: str) -> str:
    """One name for a disk among all workers: a remote export's own, and `host`'s for what only it can mean."""
    elsewhere = identity[0] == "nbd" and identity[1] != THIS_HOST and identity[2] != 0
    return " ".join(map(str, identity if elsewhere else (host, *identity)))


def beneath_export(endpoint: Endpoint) -> frozenset[Identity]:
    """The files and devices that the processes behind an export of this host have open, as far as they can be seen.

    A server that has a process for each client is seen while one is connected.
    """
    found: set[Identity] = set()
    with contextlib.suppress(OSError):
        for pid in _servers(endpoint):
            for descriptor in _descriptors(pid):
                with contextlib.suppress(OSError):
                    status = os.stat(descriptor)  # noqa: PTH116 - two numbers
                    if stat.S_ISBLK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size > 0):
                        found.add(identity_of_file(status))
    return frozenset(found)


def is_export_of_this_host(identity: Identity) -> bool:
    return identity[0] == "nbd" and (identity[1] == THIS_HOST or identity[2] == 0)


def process_that_has_open(file: Identity) -> int | None:
    """Another process of this host that has a regular file open, as far as it can be seen; None if there is none."""
    if file[0] != "inode":
        return None
    inode = f"ino:\t{file[2]}\n"
    for pid in _processes() - {os.getpid()}:
        for descriptor in _descriptors(pid):
            with contextlib.suppress(OSError):
                if not _link(descriptor).startswith("/"):
                    continue
                # Asked first (Linux 5.14 and later): stat hangs for a file of a file server that is gone.
                if inode not in Path(descriptor.replace("/fd/", "/fdinfo/")).read_text():
                    continue
                if identity_of_file(os.stat(descriptor)) == file:  # noqa: PTH116 - two numbers
                    return pid
    return None


def _servers(endpoint: Endpoint) -> set[int]:
    if endpoint.socket_path is not None:
        return {_peer(endpoint.socket_path)}
    if not _is_this_host(endpoint.host or ""):
        return set()
    sockets = {f"socket:[{inode}]" for inode in _sockets_of_port(endpoint.port)}
    return {pid for pid in _processes() if any(_link(descriptor) in sockets for descriptor in _descriptors(pid))}


def _sockets_of_port(port: int) -> Iterator[str]:
    """Inodes of the TCP sockets that listen on a port of this host, whatever the address, and of those they accepted.

    A line of /proc/net/tcp (proc_pid_net(5)): number, local address:port in hex, remote one, state, 5 more, inode.
    """
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] in (_TCP_LISTEN, _TCP_ESTABLISHED):
                    yield fields[9]


# Paths as text below: a host may have some hundred thousand descriptors.


def _processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208


def _descriptors(pid: int) -> list[str]:
    """/proc/PID/fd/N of all; none for a process that is gone, or that this one may not look into."""
    with contextlib.suppress(OSError):
        return [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]  # noqa: PTH208
    return []


def _link(descriptor: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(descriptor)  # noqa: PTH115
    return ""


def _peer(socket_path: str) -> int:
    """The process that listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        probe.connect(socket_path)
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[0])


def _is_this_host(address: str) -> bool:
    """Whether an address, resolved before, is one of this host's: then a socket can be bound to it."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    parsed = mapped if mapped is not None else parsed
    if parsed.is_loopback or parsed.is_unspecified:
        return True
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    with socket.socket(family) as probe:
        try:
            probe.bind((str(parsed), 0))
        except OSError:
            return False
    return True
