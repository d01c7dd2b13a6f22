"""Network namespaces on a bridge: hosts with addresses of their own, which can be cut off."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PREFIX_BITS = 24


@dataclass(frozen=True, slots=True)
class Namespace:
    """A host of its own, as far as the network goes."""

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """Before a command that is to run there, which keeps its process id."""
        return ("ip", "netns", "exec", self.name)

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """No packet comes or goes; connections are not told."""
        _run("ip", "-n", self.name, "link", "set", "eth0", "down")
        try:
            yield
        finally:
            _run("ip", "-n", self.name, "link", "set", "eth0", "up")


@contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    """So many, that reach each other and nothing else."""
    mark = secrets.token_hex(2)
    bridge = f"fp{mark}"
    made = [Namespace(f"fp{mark}-{number}", f"10.77.0.{number + 1}") for number in range(count)]
    _run("ip", "link", "add", bridge, "type", "bridge")
    try:
        _run("ip", "link", "set", bridge, "up")
        for number, one in enumerate(made):
            _run("ip", "netns", "add", one.name)
            outside = f"{bridge}v{number}"
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", one.name)
            _run("ip", "link", "set", outside, "master", bridge, "up")
            _run("ip", "-n", one.name, "address", "add", f"{one.address}/{PREFIX_BITS}", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", one.name, "link", "set", link, "up")
        yield made
    finally:
        for one in made:
            subprocess.run(["ip", "netns", "del", one.name], check=False, timeout=30, capture_output=True)
        _run("ip", "link", "del", bridge)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30)
