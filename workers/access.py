"""Which files and servers a worker may touch. Asked on the worker for every name; no message is trusted.

A path is followed to its end first, so a symbolic link leads nowhere it should not. Link-local and metadata
addresses are never allowed: what answers there hands out a host's credentials (FAULTS.md, Threats).
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.model.errors import NotFoundError, RefusedError, UnavailableError
from workers.nbd.endpoint import Endpoint

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ANY = "*"
ROOTS_SETTING = "FLUSHPOINT_ALLOWED_ROOTS"
ENDPOINTS_SETTING = "FLUSHPOINT_ALLOWED_ENDPOINTS"

_NEVER: tuple[Network, ...] = (
    ipaddress.ip_network("169.254.0.0/16"),
    ipaddress.ip_network("fe80::/10"),
    ipaddress.ip_network("fd00:ec2::254/128"),
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class _Rule:
    """One entry of the allowed endpoints; a field that is None does not restrict."""

    network: Network | None = None
    host: str | None = None
    port: int | None = None

    def covers(self, host: str, port: int, address: Address) -> bool:
        if self.port is not None and self.port != port:
            return False
        if self.network is not None:
            return address.version == self.network.version and address in self.network
        return self.host is None or self.host == host.lower().rstrip(".")


class Access:
    """The worker's settings `allowed_roots` (directories) and `allowed_endpoints`.

    An endpoint is "*", a CIDR or address, a host, or host:port ([v6]:port). A unix socket is allowed when it lies
    under an allowed root, or is itself listed by its absolute path.
    """

    def __init__(self, allowed_roots: Sequence[str], allowed_endpoints: Sequence[str]) -> None:
        self.roots = tuple(os.path.realpath(root) for root in allowed_roots)
        self._sockets = frozenset(os.path.realpath(e) for e in allowed_endpoints if e.startswith("/"))
        self._entries = tuple(allowed_endpoints)
        self._rules = tuple(_rule(e.strip()) for e in allowed_endpoints if not e.startswith("/"))

    def check_path(self, path: str, must_exist: bool) -> str:
        """`path` with every symbolic link followed; RefusedError outside the roots, NotFoundError if missing.

        A file that is still to be made is judged by the directory it will be in, which has to exist.
        """
        resolved = os.path.realpath(path)
        self._check_resolved(path, resolved)
        if must_exist and not _looks(path, Path(resolved).exists):
            raise NotFoundError(f"{path} does not exist", "check the path on the worker's host")
        if not _looks(path, Path(resolved).parent.is_dir):
            raise NotFoundError(f"the directory of {path} does not exist", "make it on the worker's host")
        return resolved

    def exists(self, path: str) -> bool:
        """Whether there is something at an allowed path. Errors as of `check_path`."""
        return _looks(path, Path(self.check_path(path, must_exist=False)).exists)

    def check_open_file(self, fd: int, path: str) -> None:
        """The same rule for what was opened: a directory may have become a link after check_path."""
        self._check_resolved(path, str(Path(f"/proc/self/fd/{fd}").readlink()))

    def check_endpoint(self, endpoint: Endpoint) -> tuple[Endpoint, ...]:
        """`endpoint` once for each address its host has now, all of them allowed; else RefusedError.

        The answers name addresses, so that what is connected to is what was checked, whatever the resolver says
        next; a TLS certificate still has to bear the name that was asked for.
        """
        for path in _tls_paths(endpoint):
            self.check_path(path, must_exist=True)
        if endpoint.socket_path is not None:
            if os.path.realpath(endpoint.socket_path) not in self._sockets:
                self.check_path(endpoint.socket_path, must_exist=True)
            return (endpoint,)
        host, port = endpoint.host or "", endpoint.port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise UnavailableError(
                f"the host {host!r} has no address: {error}", "check its name and the worker's resolver"
            ) from error
        addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
        for text in addresses:
            self._check_address(host, port, ipaddress.ip_address(text.partition("%")[0]))
        return tuple(_pinned(endpoint, text) for text in addresses)

    def _check_resolved(self, path: str, resolved: str) -> None:
        if any(resolved == root or resolved.startswith(root.rstrip("/") + "/") for root in self.roots):
            return
        led = f" (it leads to {resolved})" if resolved != path else ""
        roots = ", ".join(self.roots) or "none"
        raise RefusedError(
            f"{path}{led} is outside the worker's allowed roots: {roots}", f"extend {ROOTS_SETTING} on the worker"
        )

    def _check_address(self, host: str, port: int, address: Address) -> None:
        real = _unwrapped(address)
        if any(real.version == n.version and real in n for n in _NEVER):
            raise RefusedError(
                f"{host}:{port} is {real}, a link-local or metadata address", "these are never read or written"
            )
        if any(rule.covers(host, port, real) for rule in self._rules):
            return
        allowed = ", ".join(self._entries) or "none"
        raise RefusedError(
            f"{host}:{port} ({real}) is not among the worker's allowed endpoints: {allowed}",
            f"extend {ENDPOINTS_SETTING} on the worker",
        )


def _pinned(endpoint: Endpoint, address: str) -> Endpoint:
    tls = endpoint.tls
    return replace(endpoint, host=address, tls=tls and replace(tls, hostname=endpoint.server_name))


def _tls_paths(endpoint: Endpoint) -> list[str]:
    tls = endpoint.tls
    return [p for p in (tls.certificates, tls.psk_file) if p is not None] if tls else []


def _unwrapped(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one that only carries it."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _looks(path: str, look: Callable[[], bool]) -> bool:
    """Ask the file system about a path; what it will not tell is an error that names the path."""
    try:
        return look()
    except OSError as error:
        raise RefusedError(
            f"{path} cannot be looked up: {error.strerror}",
            "correct the path, or let the worker's user search its directories",
        ) from error


def _rule(entry: str) -> _Rule:
    if entry == ANY:
        return _Rule()
    host, port = entry, None
    if entry.startswith("["):
        host, _, rest = entry[1:].partition("]")
        port = int(rest[1:]) if rest.startswith(":") and rest[1:].isdigit() else None
    elif entry.count(":") == 1:
        host, _, digits = entry.partition(":")
        port = int(digits) if digits.isdigit() else None
    try:
        return _Rule(network=ipaddress.ip_network(host, strict=False), port=port)
    except ValueError:
        return _Rule(host=host.lower().rstrip("."), port=port)
