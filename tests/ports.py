"""Ports for servers that must be told one before they start."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 1000


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of 127.0.0.1 that nobody listens on.

    They lie below the range from which the kernel takes ports for outgoing connections: one of those would be given
    away to any client, the server's own parts among them, before the server has come so far as to listen on it.
    """
    below = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32768
    found: set[int] = set()
    for _ in range(_TRIES):
        port = random.SystemRandom().randrange(10000, below)
        if port not in found and _is_free(port):
            found.add(port)
        if len(found) == count:
            return list(found)
    raise AssertionError(f"no {count} free ports between 10000 and {below}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
