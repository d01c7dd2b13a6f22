"""Which disk is behind a name, and what lies under it: so that no disk is mirrored onto itself.

What cannot be told apart from here: two names of one host elsewhere, a network file system mounted twice, and the
files behind a server on another host.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import struct
from pathlib import Path

from workers.nbd.endpoint import Endpoint

Identity = tuple[str | int, ...]
"""Two disks of one identity are one disk: ("inode", dev, ino), ("blockdev", rdev) or ("nbd", address, port, export)."""

THIS_HOST = "this host"
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
    """The files and devices that the process behind a unix socket has open, as far as they can be seen."""
    if endpoint.socket_path is None:
        return frozenset()
    found: set[Identity] = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{_peer(endpoint.socket_path)}/fd").iterdir():
            with contextlib.suppress(OSError):
                status = entry.stat()
                if stat.S_ISBLK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size > 0):
                    found.add(identity_of_file(status))
    return frozenset(found)


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
