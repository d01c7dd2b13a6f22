"""How a disk is named. The content of an image is never probed for its format.

=============================================  ==========================================
``/path/disk.img``, ``file:///path/disk.img``    raw file or block device
``/path/disk.qcow2``, ``…?format=qcow2``         qcow2 image, by its ending or by ``format``
``nbd://host:port/export``, ``nbds://…``         NBD over TCP, with TLS for nbds
``nbd+unix:///export?socket=PATH``, ``nbds+…``   NBD over a unix socket
=============================================  ==========================================
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from coordinator.model.errors import UsageError

NBD_SCHEMES = frozenset({"nbd", "nbds", "nbd+unix", "nbds+unix"})
FORMATS = ("raw", "qcow2")


@dataclass(frozen=True, slots=True)
class DiskUri:
    """`path` and `format` for a file or block device, `nbd_uri` for an export; the others are empty."""

    kind: Literal["file", "nbd"]
    path: str = ""
    format: Literal["raw", "qcow2"] = "raw"
    nbd_uri: str = ""

    def __str__(self) -> str:
        return self.nbd_uri if self.kind == "nbd" else self.path


def parse(text: str) -> DiskUri:
    """An absolute path or a URI. UsageError names what is wrong with it."""
    if text.startswith("/"):
        return _file(*_split_query(text))
    parts = urlsplit(text)
    if parts.scheme in NBD_SCHEMES:
        return DiskUri("nbd", nbd_uri=text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UsageError(f"{text!r} names a host", "write file:///path for a file of the worker's host")
        return _file(unquote(parts.path), parts.query)
    if not parts.scheme:
        raise UsageError(f"{text!r} is a relative path", "give an absolute path")
    raise UsageError(
        f"{text!r} has the unknown scheme {parts.scheme!r}",
        "use a path, file://, nbd://, nbds://, nbd+unix:// or nbds+unix://",
    )


def absolute(text: str, cwd: str) -> str:
    """`text` with a relative path made absolute against `cwd`; a URI with a scheme is only checked."""
    if not text:
        raise UsageError("an empty name is no disk", "give a path or a URI")
    if "://" not in text and not text.startswith("/"):
        text = posixpath.normpath(posixpath.join(cwd, _split_query(text)[0])) + _query_of(text)
    parse(text)
    return text


def without_credentials(text: str) -> str:
    """The name as it may be shown: user info in the authority is cut out."""
    parts = urlsplit(text)
    if not parts.scheme or "@" not in parts.netloc:
        return text
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _file(path: str, query: str) -> DiskUri:
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - {"format"})
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r} of {quote(path)}", "a file takes ?format=raw or qcow2")
    if not path or path == "/":
        raise UsageError("the path of a disk is missing", "write file:///path/to/disk")
    chosen = options.get("format") or ("qcow2" if path.endswith(".qcow2") else "raw")
    if chosen == "raw":
        return DiskUri("file", path=path, format="raw")
    if chosen == "qcow2":
        return DiskUri("file", path=path, format="qcow2")
    raise UsageError(f"unknown format {chosen!r} of {path}", f"one of {', '.join(FORMATS)}")


def _split_query(text: str) -> tuple[str, str]:
    """A path may hold a question mark: only `?format=` at its end is a query."""
    path, mark, query = text.rpartition("?")
    if mark and query.startswith("format="):
        return path, query
    return text, ""


def _query_of(text: str) -> str:
    query = _split_query(text)[1]
    return f"?{query}" if query else ""
