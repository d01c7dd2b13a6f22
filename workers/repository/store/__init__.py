"""Object stores: a directory or S3, behind one contract (`contract`). `probe` finds out what a store cannot do."""

from __future__ import annotations

from coordinator.model.repository_uri import RepositoryUri
from workers.repository.store.contract import (
    Buffer,
    MissingObjectError,
    ObjectInfo,
    ObjectStore,
    ShortObjectError,
    StoreError,
    Upload,
)
from workers.repository.store.local import LocalStore
from workers.repository.store.probe import Findings, probe

__all__ = [
    "Buffer",
    "Findings",
    "LocalStore",
    "MissingObjectError",
    "ObjectInfo",
    "ObjectStore",
    "ShortObjectError",
    "StoreError",
    "Upload",
    "open_store",
    "probe",
]


def open_store(uri: RepositoryUri) -> ObjectStore:
    """The store that `uri` names. An absent directory is an error here, an absent bucket in the first request."""
    if uri.kind == "file":
        return LocalStore(uri.path)
    from workers.repository.store.s3 import S3Store  # boto3 takes a fifth of a second

    return S3Store(uri)
