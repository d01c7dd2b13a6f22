"""How a repository, and a disk in it, is named. Like every name it is stored and shown, so it holds no secret.

=================================================  =====================================================
``repo+file:///DIR``                                 a directory
``s3://BUCKET/PREFIX``                               a prefix of a bucket; credentials as boto3 finds them
``…?key=env:NAME``, ``file:/PATH`` or ``kms:KEY``    where the worker finds the key of an encrypted one
``…?endpoint=https://…&region=…&addressing=…``       an S3-compatible server (see `S3Options`)
``…?group=G&disk=D[&point=N]``                       one disk of a group: as a target, or of point N as a source
``…&since=M``                                        as a source: what differs from point M, with sync top
=================================================  =====================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from coordinator.model.errors import UsageError

SCHEMES = frozenset({"s3", "repo+file"})
LATEST = 0
"""Instead of an epoch: the newest recovery point."""
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_EXAMPLE = "write s3://bucket/prefix or repo+file:///directory"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_KEY_REFERENCE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*|file:/.+|kms:[A-Za-z0-9:/_-]+")
_ALLOWED = {
    "addressing": ("auto", "path", "virtual"),
    "checksums": ("when_required", "when_supported"),
    "sse": ("AES256", "aws:kms"),
    "lock_mode": ("GOVERNANCE", "COMPLIANCE"),
}


@dataclass(frozen=True, slots=True)
class S3Options:
    """How to speak to the server; "" leaves it to boto3. In a URI, underscores are written as hyphens."""

    endpoint: str = ""
    """https://host[:port] of an S3-compatible server."""
    region: str = ""
    profile: str = ""
    """Of the worker's ~/.aws files."""
    addressing: str = "auto"
    """"path": endpoint/bucket/key; "virtual": bucket.endpoint/key."""
    ca: str = ""
    """Path, on the worker's host, of a PEM file of authorities."""
    checksums: str = "when_required"
    """boto3's request_checksum_calculation; compatibles may refuse "when_supported"."""
    storage_class: str = ""
    """Of packs."""
    sse: str = ""
    sse_kms_key: str = ""
    """Key id or ARN, with sse=aws:kms."""
    lock_mode: str = ""
    """Object lock: with it every object is locked for `lock_days`."""
    lock_days: int = 0


@dataclass(frozen=True, slots=True)
class RepositoryUri:
    """`bucket` and `prefix` for s3, `path` for a directory. Without `group`, `disk` and `point` it is the whole."""

    kind: Literal["s3", "file"]
    bucket: str = ""
    prefix: str = ""
    path: str = ""
    key: str = ""
    group: str = ""
    disk: str = ""
    point: int = LATEST
    since: int = 0
    """An older point, from which `point` is told by what differs; 0: none."""
    s3: S3Options = S3Options()

    @property
    def repository(self) -> RepositoryUri:
        """The repository alone."""
        return replace(self, group="", disk="", point=LATEST, since=0)

    def warnings(self) -> list[str]:
        """What its user should know of how it is named, each in a sentence with what to do about it."""
        where = urlsplit(self.s3.endpoint)
        if where.scheme != "http" or where.hostname in _LOOPBACK:
            return []
        if self.key:
            return [
                "over plain http anybody on the way learns the names and sizes of objects and may destroy them: name an"
                " https endpoint"
            ]
        return [
            "over plain http anybody on the way can read and change what is stored: name an https endpoint, or encrypt"
            " with key=…"
        ]

    def __str__(self) -> str:
        pairs = [("key", self.key), ("group", self.group), ("disk", self.disk)]
        pairs += [(name, str(epoch)) for name, epoch in (("point", self.point), ("since", self.since)) if epoch]
        pairs += [
            (field.name.replace("_", "-"), str(getattr(self.s3, field.name)))
            for field in fields(S3Options)
            if getattr(self.s3, field.name) != field.default
        ]
        query = urlencode([(name, value) for name, value in pairs if value], safe=":/")
        where = f"s3://{self.bucket}/{quote(self.prefix)}" if self.kind == "s3" else f"repo+file://{quote(self.path)}"
        return f"{where}?{query}" if query else where


def is_repository(text: str) -> bool:
    """Whether `text` names a repository, rather than a disk."""
    return text.partition("://")[0] in SCHEMES


def parse_repository(text: str) -> RepositoryUri:
    """UsageError names what is wrong."""
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES:
        raise UsageError(f"{text.partition('?')[0]!r} is no repository", _EXAMPLE)
    if "@" in parts.netloc or parts.fragment:
        raise UsageError("a repository's URI has neither user info nor a fragment", _EXAMPLE)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query = dict(pairs)
    if len(query) != len(pairs):
        raise UsageError(f"the URI of the repository {parts.netloc}{parts.path} gives a key twice", _EXAMPLE)
    key = query.pop("key", "")
    if key and not is_key_reference(key):
        raise UsageError(
            "key= is no reference to a key", "write key=env:NAME, key=file:/path or key=kms:KEY; never the key itself"
        )
    group, disk = query.pop("group", ""), query.pop("disk", "")
    for what, name in (("group", group), *(("disk", part) for part in disk.split("/") if disk)):
        if name and not is_name(name):
            raise UsageError(f"{name!r} is no name of a {what}", "letters, digits, dots, hyphens and underscores")
    if disk.count("/") > 1:
        raise UsageError(f"{disk!r} is no name of a disk", "write DISK or VM/DISK")
    point, since = _point(query.pop("point", "")), _point(query.pop("since", ""))
    if parts.scheme == "s3":
        return RepositoryUri(
            "s3",
            bucket=_bucket(parts.netloc),
            prefix=unquote(parts.path).strip("/"),
            key=key,
            group=group,
            disk=disk,
            point=point,
            since=since,
            s3=_s3_options(query),
        )
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"repo+file://{parts.netloc} names a host", "write repo+file:///directory")
    if query:
        raise UsageError(f"unknown option {min(query)!r} of a repository in a directory", "it takes key=")
    path = unquote(parts.path)
    if not path.strip("/"):
        raise UsageError("the directory of the repository is missing", _EXAMPLE)
    return RepositoryUri("file", path=path.rstrip("/"), key=key, group=group, disk=disk, point=point, since=since)


def is_name(text: str) -> bool:
    """Whether a group, or a part of a disk's name, can be called so."""
    return _NAME.fullmatch(text) is not None


def is_key_reference(text: str) -> bool:
    return _KEY_REFERENCE.fullmatch(text) is not None


def _bucket(name: str) -> str:
    if not _BUCKET.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a bucket", "3 to 63 lower-case letters, digits, dots and hyphens")
    return name


def _point(text: str) -> int:
    if text in ("", "latest"):
        return LATEST
    if not text.isdigit() or int(text) == 0:
        raise UsageError(f"{text!r} is no recovery point", "give the number of one, or latest")
    return int(text)


def _s3_options(query: dict[str, str]) -> S3Options:
    known = {field.name for field in fields(S3Options)}
    given = {name.replace("-", "_"): value for name, value in query.items()}
    unknown = sorted(set(given) - known)
    if unknown:
        options = ", ".join(sorted(name.replace("_", "-") for name in known))
        raise UsageError(f"unknown option {unknown[0]!r} of a repository on S3", f"it takes key, {options}")
    for name, choices in _ALLOWED.items():
        if given.get(name) and given[name] not in choices:
            raise UsageError(f"{name.replace('_', '-')}={given[name]} is unknown", f"one of {', '.join(choices)}")
    days = given.pop("lock_days", "0")
    if not days.isdigit():
        raise UsageError(f"lock-days={days} is no number of days", "give a whole number")
    endpoint = given.get("endpoint", "")
    if endpoint:
        where = urlsplit(endpoint)
        if where.scheme not in ("http", "https") or not where.hostname or "@" in where.netloc or where.query:
            raise UsageError("endpoint= is no address of a server", "write endpoint=https://host:port")
    if bool(given.get("lock_mode")) != (int(days) > 0):
        raise UsageError("lock-mode and lock-days go together", "give both or neither")
    if given.get("sse_kms_key") and given.get("sse") != "aws:kms":
        raise UsageError("sse-kms-key goes with sse=aws:kms", "give both")
    return S3Options(**given, lock_days=int(days))
