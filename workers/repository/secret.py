"""The owner's key: what wraps the keys of a repository. The repository never holds it, a URI only refers to it.

``env:NAME``    of the worker's environment
``file:/PATH``  of the worker's host
``kms:KEY``     a key that AWS KMS has made: ``owners/<hash of KEY>.json`` holds it as KMS has encrypted it under KEY
                (an id, ARN or alias/NAME), so that it opens only for those whom KMS lets decrypt
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from coordinator.model.errors import NotFoundError, RefusedError, UnavailableError
from coordinator.model.repository_uri import RepositoryUri
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.repository.layout import OWNERS, DamageError, plain_seal
from workers.repository.store.contract import MissingObjectError, ObjectStore

_KMS_TIMEOUT_S = 20.0
_HTTPS = 443
_LONGEST_KEY = 1024 * 1024
"""Of a file. A pipe would be waited for, and /dev/zero read, without end."""
_SERVER_ERROR = 500
_BUSY = frozenset({"ThrottlingException", "LimitExceededException", "DependencyTimeoutException"})


class OwnerRecord(BaseModel):
    """owners/<hash>.json: an owner's key, encrypted by KMS under `kms_key` with the repository's id as context."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    kms_key: str
    repository: str
    """Its id, without which KMS decrypts nothing."""
    ciphertext: str
    """base64."""
    seal: str = ""
    """See layout.plain_seal."""


def owners_key(uri: RepositoryUri, access: Access, store: ObjectStore, repository: str) -> bytes:
    """What the URI's `key` refers to, for opening the repository of that id. The secret never leaves this host."""
    kind, _, name = uri.key.partition(":")
    if kind == "kms":
        return _from_kms(uri, name, access, store, repository)
    return _from_env(name) if kind == "env" else _from_file(name, access)


def new_owners_key(uri: RepositoryUri, access: Access, store: ObjectStore, repository: str) -> bytes:
    """The same for what is to be wrapped now: KMS makes a key, unless it has made one for this repository before."""
    kind, _, name = uri.key.partition(":")
    if kind == "kms" and store.size(_object_of(name)) is None:
        _make_with_kms(uri, name, access, store, repository)
    return owners_key(uri, access, store, repository)


def begun_repository(uri: RepositoryUri, store: ObjectStore) -> str:
    """The id of a repository whose making was broken off after KMS had made its key; "" if there is none."""
    kind, _, name = uri.key.partition(":")
    if kind != "kms" or store.size(_object_of(name)) is None:
        return ""
    return _record(name, store).repository


def _from_env(name: str) -> bytes:
    value = os.environ.get(name, "").encode().strip()
    if not value:
        raise NotFoundError(
            f"the worker's environment has no {name}, which was named as the key", "set it where the worker starts"
        )
    return value


def _from_file(name: str, access: Access) -> bytes:
    path = Path(access.check_path(name, must_exist=True))
    try:
        if not path.is_file():
            raise RefusedError(
                f"{name}, which was named as the key, is no regular file", "name one that holds a key or a passphrase"
            )
        with path.open("rb") as file:
            value = file.read(_LONGEST_KEY + 1)
    except OSError as error:
        raise RefusedError(
            f"{name}, which was named as the key, cannot be read: {error.strerror}", "give the worker's user access"
        ) from error
    if len(value) > _LONGEST_KEY:
        raise RefusedError(
            f"{name}, which was named as the key, has more than {_LONGEST_KEY} bytes", "name a file that holds a key"
        )
    value = value.strip()
    if not value:
        raise RefusedError(f"{name}, which was named as the key, is empty", "write a key or a passphrase into it")
    return value


def _object_of(kms_key: str) -> str:
    return f"{OWNERS}{hashlib.sha256(kms_key.encode()).hexdigest()[:32]}.json"


def _record(kms_key: str, store: ObjectStore) -> OwnerRecord:
    key = _object_of(kms_key)
    try:
        record = OwnerRecord.model_validate_json(store.get(key))
        base64.b64decode(record.ciphertext, validate=True)
    except MissingObjectError:
        raise RefusedError(
            f"the repository {store.name} has no key that was encrypted by KMS under {kms_key}",
            "name the key it was made with, by key=…",
        ) from None
    except (ValidationError, binascii.Error) as error:
        raise DamageError("the owner's key", key) from error
    if record.seal != plain_seal(record.model_dump()):
        raise DamageError("the owner's key", key)
    return record


def _from_kms(uri: RepositoryUri, kms_key: str, access: Access, store: ObjectStore, repository: str) -> bytes:
    ciphertext = base64.b64decode(_record(kms_key, store).ciphertext)
    answer = _ask(
        uri,
        kms_key,
        "kms:Decrypt",
        access,
        lambda kms: kms.decrypt(KeyId=kms_key, CiphertextBlob=ciphertext, EncryptionContext=_context(repository)),
    )
    return _hexadecimal(answer["Plaintext"])


def _make_with_kms(uri: RepositoryUri, kms_key: str, access: Access, store: ObjectStore, repository: str) -> None:
    answer = _ask(
        uri,
        kms_key,
        "kms:GenerateDataKey",
        access,
        lambda kms: kms.generate_data_key(KeyId=kms_key, KeySpec="AES_256", EncryptionContext=_context(repository)),
    )
    ciphertext = base64.b64encode(answer["CiphertextBlob"]).decode()
    record = OwnerRecord(kms_key=kms_key, repository=repository, ciphertext=ciphertext)
    sealed = {**record.model_dump(), "seal": plain_seal(record.model_dump())}
    store.put_if_absent(_object_of(kms_key), json.dumps(sealed, indent=1).encode())


def _context(repository: str) -> dict[str, str]:
    """KMS decrypts only for who names it again, and writes it into its audit log."""
    return {"flushpoint-repository": repository}


def _hexadecimal(key: bytes) -> bytes:
    """As the owner of a key would write it into a file; see keyring."""
    return key.hex().encode()


def _ask(
    uri: RepositoryUri, kms_key: str, permission: str, access: Access, request: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """With the profile of the URI, and in the key's region or the URI's."""
    import boto3.session  # takes its time, and few need it
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(connect_timeout=_KMS_TIMEOUT_S, read_timeout=_KMS_TIMEOUT_S, retries={"mode": "standard"})
    try:
        session = boto3.session.Session(profile_name=uri.s3.profile or None)
        kms = session.client("kms", region_name=_region(kms_key) or uri.s3.region or None, config=config)
        where = urlsplit(kms.meta.endpoint_url)
        access.check_endpoint(Endpoint(where.hostname, where.port or _HTTPS, None, ""))
        return request(kms)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status >= _SERVER_ERROR or error.response["Error"].get("Code") in _BUSY:
            raise UnavailableError(f"KMS is busy: {error}", "try again in a while") from error
        raise RefusedError(
            f"KMS does not let this worker use the key {kms_key}: {error.response['Error'].get('Message', error)}",
            f"give its credentials {permission} for that key, and look whether the key is enabled",
        ) from error
    except BotoCoreError as error:
        raise UnavailableError(
            f"KMS cannot be asked for the key {kms_key}: {error}", "check the worker's region, credentials and network"
        ) from error


def _region(kms_key: str) -> str | None:
    """Of an ARN, arn:aws:kms:REGION:ACCOUNT:key/ID."""
    parts = kms_key.split(":")
    return parts[3] if parts[0] == "arn" and len(parts) > 5 else None
