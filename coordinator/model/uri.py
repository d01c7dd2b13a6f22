"""How a disk is named. The content of an image is never probed for its format.

A name is stored, logged and shown, so it holds no secret: user info is refused, and nothing that may be one is
repeated in a message.

=============================================  ==========================================
``/path/disk.img``, ``file:///path/disk.img``    raw file or block device
``/path/disk.qcow2``, ``…?format=qcow2``         qcow2 image, by its ending or by ``format``
``nbd://host:port/export``, ``nbds://…``         NBD over TCP, with TLS for nbds
``nbd+unix:///export?socket=PATH``, ``nbds+…``   NBD over a unix socket
``s3://…``, ``repo+file:///…``                   a disk in a repository (see repository_uri)
``null:``                                        nowhere: what a recovery point is copied to when it is verified
=============================================  ==========================================
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from coordinator.model.errors import UsageError
from coordinator.model.guest_uri import is_guest_disk
from coordinator.model.repository_uri import RepositoryUri, is_repository, parse_repository

NBD_SCHEMES = frozenset({"nbd", "nbds", "nbd+unix", "nbds+unix"})
NBD_KEYS = frozenset({"socket", "tls-certificates", "tls-hostname", "tls-psk-file", "tls-username"})
"""What may stand in the query of an NBD URI (workers.nbd.endpoint reads it)."""
NOWHERE = "null:"
FORMATS = ("raw", "qcow2")
FOREIGN_ENDINGS = (".vmdk", ".vdi", ".vhd", ".vhdx", ".qed")
"""Containers of formats that are not supported; taken for raw, one would be copied with its headers as the disk."""
_NBD_EXAMPLE = "write nbd://host:port/export or nbd+unix:///export?socket=/path, with nbds for TLS"
_HOST = re.compile(r"[\w.:-]+(%[\w.-]+)?")
"""A name or an address, with the zone of a link-local one; "%40" and the like would hide user info."""


@dataclass(frozen=True, slots=True)
class DiskUri:
    """`path` and `format` for a file or block device, `nbd_uri` for an export, `repository`; the others are empty."""

    kind: Literal["file", "nbd", "repository", "nothing"]
    path: str = ""
    format: Literal["raw", "qcow2"] = "raw"
    nbd_uri: str = ""
    repository: RepositoryUri | None = None

    def __str__(self) -> str:
        if self.repository is not None:
            return str(self.repository)
        return NOWHERE if self.kind == "nothing" else self.nbd_uri or self.path


def parse(text: str) -> DiskUri:
    """An absolute path or a URI. UsageError names what is wrong with it."""
    if text.startswith("/"):
        return _file(*_split_query(text))
    if text == NOWHERE:
        return DiskUri("nothing")
    if is_repository(text):
        return DiskUri("repository", repository=parse_repository(text))
    try:
        parts = urlsplit(text)
    except ValueError:  # its message holds the authority, and so does the traceback of a cause
        raise UsageError("a URI with a malformed host names no disk", _NBD_EXAMPLE) from None
    if "@" in parts.netloc:
        raise UsageError(
            f"{_shown(parts)} has user info, which would be stored and logged",
            "leave out everything up to the @; to authenticate, use nbds with tls-certificates",
        )
    if parts.scheme in NBD_SCHEMES:
        _check_nbd(parts)
        return DiskUri("nbd", nbd_uri=text)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UsageError(f"{_shown(parts)} names a host", "write file:///path for a file of the worker's host")
        if parts.fragment:
            raise UsageError("a file URI has no fragment", "write %23 for a # in the path")
        return _file(unquote(parts.path), parts.query)
    if is_guest_disk(text):
        raise UsageError(
            "a disk of a live guest is cut by a group of its host's agent", "let flushpoint mirror make a group of it"
        )
    if parts.netloc and parts.scheme:
        raise UsageError(
            f"{_shown(parts)} has the unknown scheme {parts.scheme!r}",
            "use a path, file://, nbd://, nbds://, nbd+unix://, nbds+unix://, s3:// or repo+file://",
        )
    raise UsageError(f"{_without_user(text)!r} is a relative path", "give an absolute path or a URI")


def absolute(text: str, cwd: str) -> str:
    """`text` with a relative path made absolute against `cwd`; a URI with a scheme is only checked."""
    if not text:
        raise UsageError("an empty name is no disk", "give a path or a URI")
    # nbd:host:port is no path, but an old QEMU name.
    is_uri = "://" in text or text == NOWHERE or text.partition(":")[0] in NBD_SCHEMES
    if not is_uri and not text.startswith("/"):
        text = posixpath.normpath(posixpath.join(cwd, _split_query(text)[0])) + _query_of(text)
    parse(text)
    return text


def disk_name(uri: DiskUri) -> str:
    """What a disk is called in a repository when nobody says: its file's name without ending, or its export's."""
    if uri.kind == "nbd":
        parts = urlsplit(uri.nbd_uri)
        socket = dict(parse_qsl(parts.query)).get("socket", "")
        name = unquote(parts.path).strip("/") or posixpath.basename(socket) or parts.hostname or ""
    else:
        name = posixpath.basename(uri.path.rstrip("/"))
    stem = posixpath.splitext(name)[0] or name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:128] or "disk"


def _shown(parts: SplitResult) -> str:
    """Scheme and host alone: what a mistyped password cannot be part of."""
    host = parts.hostname or ""
    return f"{parts.scheme}://{host if _HOST.fullmatch(host) else '…'}"


def _without_user(text: str) -> str:
    """`text` from its last @ on: what is before one may be a user and a password."""
    _, mark, rest = text.rpartition("@")
    return f"…@{rest}" if mark else text


def _check_nbd(parts: SplitResult) -> None:
    """UsageError, which repeats scheme and host alone, if a worker could not use this URI."""
    shown = _shown(parts)
    try:
        has_port = parts.port != 0
    except ValueError:
        has_port = False
    if not has_port:
        raise UsageError(f"{shown} has a port that is none", "a port is a number from 1 to 65535")
    if parts.fragment:
        raise UsageError(f"{shown} has a fragment, which NBD URIs have not", _NBD_EXAMPLE)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = dict(pairs)
    if len(query) != len(pairs):
        raise UsageError(f"{shown} gives a key twice", _NBD_EXAMPLE)
    if not NBD_KEYS.issuperset(query):
        raise UsageError(f"{shown} has a key that NBD URIs have not", f"the keys are {', '.join(sorted(NBD_KEYS))}")
    if parts.scheme.endswith("+unix"):
        if parts.netloc:
            raise UsageError(f"{shown} names both a host and a unix socket", f"write {parts.scheme}:///export?socket=…")
        if not query.get("socket"):
            raise UsageError(f"{shown} names no socket", "add ?socket=/path/of/the/socket")
        return
    if "socket" in query:
        raise UsageError(f"{shown} has a socket but is a TCP URI", "write nbd+unix:///export?socket=PATH")
    if not _HOST.fullmatch(parts.hostname or ""):
        raise UsageError(f"{shown} names no host", _NBD_EXAMPLE)


def _file(path: str, query: str) -> DiskUri:
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - {"format"})
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r} of {quote(path)}", "a file takes ?format=raw or qcow2")
    if not path or path == "/":
        raise UsageError("the path of a disk is missing", "write file:///path/to/disk")
    ending = posixpath.splitext(path)[1].lower()
    if ending in FOREIGN_ENDINGS and not options.get("format"):
        raise UsageError(
            f"{path} looks like an image of the format {ending[1:]}, which is not supported",
            "convert it with qemu-img, or add ?format=raw to copy the container's bytes as they are",
        )
    chosen = options.get("format") or ("qcow2" if ending == ".qcow2" else "raw")
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
