"""A repository that is open: its store, its keys, and what can be found in it."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES
from coordinator.model.point import Decision, Member
from coordinator.model.repository_uri import RepositoryUri
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.repository import keyring as keys
from workers.repository.decisions import Decisions
from workers.repository.keyring import Keyring
from workers.repository.layout import FORMAT, ID_BYTES, REPOSITORY_KEY, DamageError, plain_seal
from workers.repository.prefetch import Prefetcher
from workers.repository.reader import SPAN_BYTES, Fetcher, PointDisk
from workers.repository.relocations import Relocations
from workers.repository.root import Root, RootRef
from workers.repository.secret import begun_repository, new_owners_key, owners_key
from workers.repository.store import open_store
from workers.repository.store.contract import MissingObjectError, ObjectStore

DEFAULT_LEVEL = 1
"""zstd's; on two cores level 3 costs twice the time for a tenth less to store."""
_PORTS = {"http": 80, "https": 443}


class RepositoryRecord(BaseModel):
    """repository.json: written once, by init."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: int
    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    block_bytes: int
    segment_bytes: int
    compression_level: int = Field(ge=1, le=22)
    encrypted: bool
    created_at: float
    made_by: str = ""
    """The job that made it, which may be done again after a crash."""


class Repository:
    """`with Repository.open(uri, access) as repository:`. Thread-safe."""

    def __init__(self, store: ObjectStore, record: RepositoryRecord, keyring: Keyring) -> None:
        self.store = store
        self.record = record
        self.keyring = keyring
        self.prefetcher = Prefetcher()
        self.decisions = Decisions(store, keyring, self.prefetcher)
        self.relocations = Relocations(store, keyring)
        self.fetcher = Fetcher(store, keyring, self.relocations, self.prefetcher)

    @classmethod
    def open(cls, uri: RepositoryUri, access: Access) -> Self:
        """RefusedError for a newer format, a wrong or missing key; NotFoundError if there is no repository."""
        store = allowed_store(uri, access)
        try:
            record = read_record(store)
            return cls(store, record, _keyring(store, record, uri, access))
        except BaseException:
            store.close()
            raise

    @classmethod
    def init(cls, uri: RepositoryUri, access: Access, level: int = DEFAULT_LEVEL, made_by: str = "") -> Self:
        """Make an empty repository, encrypted if the URI names a key. RefusedError if there is one that was not made
        by the job `made_by` itself."""
        store = allowed_store(uri, access)
        try:
            if store.size(REPOSITORY_KEY) is not None:
                there = read_record(store)
                if made_by and there.made_by == made_by:
                    return cls(store, there, _keyring(store, there, uri, access))
                raise RefusedError(f"there is a repository at {store.name} already", "use it, or name another place")
            record = RepositoryRecord(
                format=FORMAT,
                id=begun_repository(uri, store) or secrets.token_hex(ID_BYTES),
                block_bytes=BLOCK_BYTES,
                segment_bytes=SEGMENT_BYTES,
                compression_level=level,
                encrypted=uri.key != "",
                created_at=time.time(),
                made_by=made_by,
            )
            ours = keys.new_keys(store, new_owners_key(uri, access, store, record.id)) if uri.key else []
            sealed = {**record.model_dump(), "seal": plain_seal(record.model_dump())}
            if not store.put_if_absent(REPOSITORY_KEY, json.dumps(sealed, indent=1).encode()):
                store.delete(ours)  # or they would be taken for those of the one that was made
                raise RefusedError(f"somebody else has just made a repository at {store.name}", "use that")
            return cls(store, record, _keyring(store, record, uri, access))
        except BaseException:
            store.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.prefetcher.close()
        self.store.close()

    @property
    def id(self) -> str:
        return self.record.id

    def root(self, member: Member) -> Root:
        """The root of one disk of a point."""
        try:
            return Root.load(root_ref(member), self.store, self.keyring)
        except MissingObjectError as error:
            raise DamageError("a root that is missing, wanted", member.root) from error

    def whole_root(self, member: Member) -> Root:
        """The same, all of whose pages were read: DamageError also if one of them is damaged."""
        root = self.root(member)
        for _, reading in self.prefetcher.each(root.page, range(len(root.pages))):
            reading.result()
        return root

    def disk(self, point: Decision, name: str, span_bytes: int = SPAN_BYTES) -> PointDisk:
        """One disk of a point; `name` may be "" if it has only one. NotFoundError names those it has."""
        if not name and len(point.members) == 1:
            name = point.members[0].disk
        member = point.member(name)
        if member is None:
            there = ", ".join(m.disk for m in point.members) or "none, being a step on the way to the first point"
            raise NotFoundError(
                f"point {point.epoch} of group {point.group!r} has no disk {name!r}; it has: {there}",
                "name one of these with --disk",
            )
        return self.disk_of(member, span_bytes)

    def disk_of(self, member: Member, span_bytes: int = SPAN_BYTES) -> PointDisk:
        """One disk of a point, or what was seeded of it."""
        return PointDisk(member.disk, self.root(member), self.fetcher, span_bytes)


def root_ref(member: Member) -> RootRef:
    digest = bytes.fromhex(member.root_digest)
    return RootRef(member.root, member.directory_offset, member.directory_length, digest)


def allowed_store(uri: RepositoryUri, access: Access) -> ObjectStore:
    """The store at `uri`, if this worker may go there."""
    if uri.kind == "file":
        access.check_path(uri.path, must_exist=False)
    else:
        if uri.s3.ca:
            access.check_path(uri.s3.ca, must_exist=True)
        where = urlsplit(uri.s3.endpoint or f"https://s3.{uri.s3.region or 'us-east-1'}.amazonaws.com")
        port = where.port or _PORTS[where.scheme]
        access.check_endpoint(Endpoint(where.hostname, port, None, ""))
    return open_store(uri)


def read_record(store: ObjectStore) -> RepositoryRecord:
    """What can be known of a repository without its keys."""
    try:
        data = store.get(REPOSITORY_KEY)
    except MissingObjectError:
        raise NotFoundError(
            f"there is no repository at {store.name}", "make one with flushpoint repository init, or check the URI"
        ) from None
    try:
        fields: dict[str, Any] = json.loads(data)
        found = fields.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise RefusedError(
                f"the repository {store.name} has format {found}, and this program knows up to {FORMAT}",
                "use a newer version of Flushpoint",
            )
        record = RepositoryRecord.model_validate(fields)
        if fields.get("seal") != plain_seal(fields):
            raise ValueError("another seal")
    except (ValueError, ValidationError, AttributeError) as error:
        raise DamageError("the record", REPOSITORY_KEY) from error
    if (record.block_bytes, record.segment_bytes) != (BLOCK_BYTES, SEGMENT_BYTES):
        raise RefusedError(
            f"the repository {store.name} has blocks of {record.block_bytes} bytes, which this program does not read",
            "use the version it was made with",
        )
    return record


def _keyring(store: ObjectStore, record: RepositoryRecord, uri: RepositoryUri, access: Access) -> Keyring:
    repository = bytes.fromhex(record.id)
    if not record.encrypted:
        if uri.key:
            raise RefusedError(f"the repository {store.name} is not encrypted, and a key was named", "leave out key=")
        return Keyring(repository)
    if not uri.key:
        raise RefusedError(
            f"the repository {store.name} is encrypted, and no key was named",
            "add key=env:NAME, key=file:/path or key=kms:KEY to its URI",
        )
    return keys.load(store, repository, owners_key(uri, access, store, record.id))
