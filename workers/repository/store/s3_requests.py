"""The connection of a process to one S3 store: a client of boto3 as the repository's URI wants it, and its retries.

What is uploaded is not hashed for the signature (UNSIGNED-PAYLOAD): over https TLS already protects it, and the SHA-256
of a pack would cost more than all else. Over http nothing protects it, nor what is read. A CRC-32 is sent where it is
asked for (checksums=when_supported) or demanded (object lock); it is computed here, once, and not in botocore, which
over https would wrap the body into chunks for it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import boto3.session
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.loaders import create_loader
from botocore.utils import parse_timestamp

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError
from coordinator.model.repository_uri import RepositoryUri
from workers.repository.store.contract import MissingObjectError, StoreError, check_key
from workers.repository.store.retry import Effort, Pace, Retrier
from workers.repository.store.s3_errors import Explainer

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

MOST_REQUESTS = 16
"""Under way at once in all threads of a store; as many connections are kept."""
CONNECT_TIMEOUT_S = 10.0
"""Also of sending one block of 128 KiB: urllib3 sends under the time-out of connecting."""
READ_TIMEOUT_S = 60.0
"""Without a byte. Completing an upload keeps some servers busy for long before they answer."""
_WAITED_FOR_BYTES = 1024 * 1024
"""A body from this size on is sent after the server's 100 Continue, so that a refusal does not cost the transfer."""
_A_SECOND = timedelta(seconds=1)
"""Servers keep the end of a lock in whole seconds."""
_PACKS = "packs/"
"""Objects that are large, and read rarely: they alone have the storage class."""
_DESCRIPTIONS = create_loader()
"""Of the requests of S3, parsed once: without it every repository that is opened costs a tenth of a second."""
_NEED_CHECKSUM = ("DeleteObjects", "PutObjectRetention")
_OF_OBJECTS: dict[str, Any] = {
    "storage_class": "",
    "sse": "",
    "sse_kms_key": "",
    "lock_mode": "",
    "lock_days": 0,
}
"""Options that a client does not have; each request carries them."""

_SPARE_S = 60.0
_SPARES = 4

Answer = TypeVar("Answer")


class _Spares:
    """Clients that nobody uses at the moment: a job opens its repository several times, and making a client costs a
    tenth of a second of processor time. None is older than _SPARE_S, so that credentials renewed in a file count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[tuple[object, float, S3Client]] = []

    def take(self, key: object) -> tuple[S3Client, float] | None:
        """One that was made under the same circumstances, and when (monotonic)."""
        with self._lock:
            self._drop_old()
            for item in self._kept:
                if item[0] == key:
                    self._kept.remove(item)
                    return item[2], item[1]
        return None

    def give(self, key: object, made_at: float, client: S3Client) -> None:
        with self._lock:
            self._kept.append((key, made_at, client))
            self._drop_old()

    def _drop_old(self) -> None:
        young = [item for item in self._kept if time.monotonic() - item[1] < _SPARE_S][-_SPARES:]
        for item in self._kept:
            if item not in young:
                item[2].close()
        self._kept = young


_spares = _Spares()


class S3Requests:
    """Thread-safe, but of one process: a connection shared with a forked child would mix up their answers."""

    def __init__(self, uri: RepositoryUri) -> None:
        self.bucket = uri.bucket
        self.name = f"s3://{uri.bucket}/{uri.prefix}".rstrip("/")
        self.prefix = f"{uri.prefix}/" if uri.prefix else ""
        self._options = uri.s3
        self._process = os.getpid()
        self._bucket_seen = False
        environment = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
        self._circumstances = (self._process, replace(uri.s3, **_OF_OBJECTS), self.checksums, environment)
        spare = _spares.take(self._circumstances)
        self._client, self._made_at = spare or (self._connect(), time.monotonic())
        self._is_good = True
        self._is_closed = False
        self._explainer = Explainer(self.name, uri.bucket, self._client.meta.endpoint_url)
        self._retrier = Retrier(Pace(MOST_REQUESTS), self._explainer.explain)

    def send(self, request: Callable[[S3Client], Answer], key: str = "", effort: Effort | None = None) -> Answer:
        """The answer to `request`, which is called once for every attempt. Raises what the contract says."""
        if os.getpid() != self._process:
            raise RuntimeError(f"{self.name} was opened in another process")
        try:
            return self._retrier.call(lambda: request(self._client), key, effort or Effort())
        except RefusedError as error:
            if not isinstance(error, NotFoundError):
                self._is_good = False  # the next shall look for other credentials
            raise

    def where(self, key: str) -> dict[str, Any]:
        """Parameters that name an object."""
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    def written(self, key: str) -> dict[str, Any]:
        """Parameters of writing a new object, by PutObject or CreateMultipartUpload."""
        options = self.where(key)
        if self._options.storage_class and key.startswith(_PACKS):
            options["StorageClass"] = self._options.storage_class
        if self._options.sse:
            options["ServerSideEncryption"] = self._options.sse
        if self._options.sse_kms_key:
            options["SSEKMSKeyId"] = self._options.sse_kms_key
        if self.locks:
            options["ObjectLockMode"] = self._options.lock_mode
            options["ObjectLockRetainUntilDate"] = self._locked_until()
        return options

    @property
    def locks(self) -> bool:
        return bool(self._options.lock_mode)

    @property
    def checksums(self) -> bool:
        """Whether what is written carries a CRC-32. AWS refuses a locked object without one."""
        return self.locks or self._options.checksums == "when_supported"

    def extend_lock(self, key: str) -> None:
        """To the configured days from now, if there are any and it is not locked for longer."""
        where, until = self.where(key), self._locked_until()
        if not self.locks:
            return
        retention: Any = {"Mode": self._options.lock_mode, "RetainUntilDate": until}
        try:
            self.send(lambda s3: s3.put_object_retention(Retention=retention, **where), key)
        except RefusedError:  # so S3 says, too, where it would shorten a lock
            there = self.send(lambda s3: s3.head_object(**where), key).get("ObjectLockRetainUntilDate")
            if there is None or there < until - _A_SECOND:
                raise

    def checksum(self, data: memoryview) -> dict[str, str]:
        """Parameters of PutObject and UploadPart alike; under object lock AWS wants the algorithm named too."""
        if not self.checksums:
            return {}
        return {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": base64.b64encode(zlib.crc32(data).to_bytes(4)).decode()}

    def size(self, key: str) -> int | None:
        """Of an object in bytes, None if there is none."""
        where = self.where(key)
        try:
            return self.send(lambda s3: s3.head_object(**where), key)["ContentLength"]
        except MissingObjectError:
            self._check_bucket()
            return None
        except (RefusedError, StoreError):
            self._ask_why(where, key)
            raise

    def close(self) -> None:
        """Harmless when repeated."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._is_good:
            _spares.give(self._circumstances, self._made_at, self._client)
        else:
            self._client.close()

    def _ask_why(self, where: dict[str, Any], key: str) -> None:
        """RefusedError, if GET is refused too: its answer has a body, which tells clocks from keys and rights."""
        try:
            self.send(lambda s3: s3.get_object(Range="bytes=0-0", **where), key)["Body"].close()
        except FlushpointError as error:
            if isinstance(error, RefusedError) and not isinstance(error, MissingObjectError):
                raise

    def _check_bucket(self) -> None:
        """Once: the answer to HEAD has no body, so that a missing bucket looks like a missing object."""
        if not self._bucket_seen:
            try:
                self.send(lambda s3: s3.head_bucket(Bucket=self.bucket))
            except MissingObjectError as error:
                raise self._explainer.no_bucket() from error
            self._bucket_seen = True

    def _locked_until(self) -> datetime:
        return datetime.now(UTC) + timedelta(days=self._options.lock_days)

    def _connect(self) -> S3Client:
        ca = self._options.ca
        if ca and not Path(ca).is_file():
            raise NotFoundError(f"there is no file {ca} of authorities on this worker's host", "check ca=")
        try:
            client = self._new_client()
        except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that boto3 cannot read
            explainer = Explainer(self.name, self.bucket, self._options.endpoint)
            explained = explainer.explain(error, "")
            raise explained if isinstance(explained, FlushpointError) else explainer.unusable(error) from error
        if not self.checksums:
            for operation in _NEED_CHECKSUM:
                client.meta.events.register(f"before-call.s3.{operation}", _send_md5)
        return client

    def _new_client(self) -> S3Client:
        options = self._options
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            tcp_keepalive=True,
            max_pool_connections=MOST_REQUESTS,
            retries={"total_max_attempts": 1, "mode": "standard"},  # see retry.py
            request_checksum_calculation=options.checksums,
            response_checksum_validation=options.checksums,
            s3={"addressing_style": options.addressing, "payload_signing_enabled": False},
        )
        core = botocore.session.get_session()
        core.register_component("data_loader", _DESCRIPTIONS)
        core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
        paths = list(_DESCRIPTIONS.search_paths)
        session = boto3.session.Session(profile_name=options.profile or None, botocore_session=core)
        _DESCRIPTIONS.search_paths[:] = paths  # each session adds its own, and never takes it away
        client: S3Client = session.client(
            "s3",
            region_name=options.region or None,
            endpoint_url=options.endpoint or None,
            verify=options.ca or None,
            config=config,
        )
        return client


def _timestamp(text: str) -> datetime:
    """As listings write it, 2026-01-31T12:00:00.000Z: botocore's own parser, which takes any form, needs two thirds of
    the time of a listing for that."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return cast("datetime", parse_timestamp(text))


class Body:
    """A file of the bytes of a buffer, which are not copied: what urllib3 reads is sent as it is."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def read(self, size: int = -1) -> memoryview:
        end = len(self._data) if size < 0 else self._position + size
        data = self._data[self._position : end]
        self._position += len(data)
        return data

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def __len__(self) -> int:
        return len(self._data)


def body_of(data: memoryview) -> Any:
    """What to give boto3 for one attempt to send `data`. A bytearray is sent at once, a file after 100 Continue."""
    return bytearray(data) if len(data) < _WAITED_FOR_BYTES else Body(data)


def _send_md5(params: dict[str, Any], **_: object) -> None:
    """With checksums=when_required: where S3 demands a checksum, send the one that every server has known since 2006.

    botocore sends a CRC-32 instead, and older S3-compatibles refuse that: MissingContentMD5.
    """
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()
    params["context"].get("checksum", {}).pop("request_algorithm", None)
