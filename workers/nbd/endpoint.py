"""Where an export is and how to speak to it: NBD URIs (nbd/doc/uri.md), parsed and given back.

nbd://HOST[:PORT]/EXPORT                 nbds://HOST[:PORT]/EXPORT
nbd+unix:///EXPORT?socket=PATH           nbds+unix:///EXPORT?socket=PATH
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Self
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from coordinator.model.errors import UsageError
from workers.nbd.wire import MAX_STRING_BYTES

DEFAULT_PORT = 10809
_EXAMPLE = "Write nbd://host:port/export or nbd+unix:///export?socket=/path, with nbds for TLS"
_TLS_KEYS = frozenset({"tls-certificates", "tls-hostname", "tls-psk-file", "tls-username"})


@dataclass(frozen=True)
class Tls:
    """How the server is verified and how we show who we are. Paths only, never a secret.

    `certificates` is a directory with ca-cert.pem and, if the server wants to know its clients, client-cert.pem
    and client-key.pem; None trusts the system's authorities. `hostname` is the name the server's certificate must
    bear; None means the host of the URI, or localhost for a unix socket.
    """

    certificates: str | None = None
    hostname: str | None = None
    psk_file: str | None = None
    username: str | None = None

    def query(self) -> list[tuple[str, str]]:
        """The keys and values of a URI that say the same."""
        pairs = [
            ("tls-certificates", self.certificates),
            ("tls-hostname", self.hostname),
            ("tls-psk-file", self.psk_file),
            ("tls-username", self.username),
        ]
        return [(key, value) for key, value in pairs if value is not None]


@dataclass(frozen=True)
class Endpoint:
    """One export of one server; `socket_path` for a unix socket, else `host` and `port`."""

    host: str | None
    port: int
    socket_path: str | None
    export: str
    tls: Tls | None = None

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Raises UsageError for anything that is not a complete NBD URI."""
        try:
            parts = urlsplit(uri)
            port = parts.port
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
            export = unquote(parts.path.removeprefix("/"))
            export_bytes = len(export.encode())
        except ValueError as error:
            raise UsageError(f"{uri!r} is not a URI: {error}", _EXAMPLE) from error
        if parts.scheme not in ("nbd", "nbds", "nbd+unix", "nbds+unix"):
            raise UsageError(f"{uri!r} is not an NBD URI", _EXAMPLE)
        if parts.fragment or parts.username is not None or parts.password is not None:
            raise UsageError(f"{uri!r} has a user or a fragment, which NBD URIs have not", _EXAMPLE)
        query = dict(pairs)
        if len(query) != len(pairs):
            raise UsageError(f"{uri!r} gives a key twice", _EXAMPLE)
        tls = _tls(uri, query, encrypted=parts.scheme.startswith("nbds"))
        if export_bytes > MAX_STRING_BYTES:
            raise UsageError(f"the export name of {export_bytes} bytes is longer than NBD allows", _EXAMPLE)
        socket_path = _socket_path(uri, parts, query)
        unknown = sorted(set(query) - _TLS_KEYS - {"socket"})
        if unknown:
            raise UsageError(f"{uri!r} has the unknown key {unknown[0]!r}", _EXAMPLE)
        if socket_path is not None:
            return cls(None, 0, socket_path, export, tls)
        return cls(parts.hostname, DEFAULT_PORT if port is None else port, None, export, tls)

    @property
    def server_name(self) -> str:
        """The name a TLS certificate of this server must bear."""
        named = self.tls.hostname if self.tls else None
        return named or self.host or "localhost"

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        pairs = self.tls.query() if self.tls else []
        if self.socket_path is not None:
            pairs = [("socket", self.socket_path), *pairs]
            base = f"{scheme}+unix:///"
        else:
            host = f"[{self.host}]" if ":" in (self.host or "") else self.host
            base = f"{scheme}://{host}:{self.port}/" if self.port != DEFAULT_PORT else f"{scheme}://{host}/"
        query = f"?{urlencode(pairs, safe='/')}" if pairs else ""
        return f"{base}{quote(self.export)}{query}"


def _socket_path(uri: str, parts: SplitResult, query: dict[str, str]) -> str | None:
    if parts.scheme.endswith("+unix"):
        if parts.netloc:
            raise UsageError(f"{uri!r} names both a host and a unix socket", "Write three slashes after nbd+unix:")
        if not query.get("socket"):
            raise UsageError(f"{uri!r} names no socket", "Add ?socket=/path/of/the/socket")
        return query["socket"]
    if "socket" in query:
        raise UsageError(f"{uri!r} has a socket but is a TCP URI", "Write nbd+unix:///export?socket=PATH")
    if not parts.hostname:
        raise UsageError(f"{uri!r} names no host", _EXAMPLE)
    return None


def _tls(uri: str, query: dict[str, str], *, encrypted: bool) -> Tls | None:
    given = sorted(_TLS_KEYS & set(query))
    if not encrypted:
        if given:
            raise UsageError(f"{uri!r} sets {given[0]} but is not encrypted", "Write nbds instead of nbd")
        return None
    for key in given:
        if not query[key]:
            raise UsageError(f"{uri!r} leaves {key} empty", "Give it a value or leave it out")
    tls = Tls(
        certificates=query.get("tls-certificates"),
        hostname=query.get("tls-hostname"),
        psk_file=query.get("tls-psk-file"),
        username=query.get("tls-username"),
    )
    if tls.username and not tls.psk_file:
        raise UsageError(f"{uri!r} names a TLS user but no pre-shared key", "Add tls-psk-file=FILE")
    if tls.psk_file and not hasattr(ssl.SSLContext, "set_psk_client_callback"):
        raise UsageError(
            "TLS with a pre-shared key needs Python 3.13", "Use x509 certificates: tls-certificates=DIRECTORY"
        )
    return tls
