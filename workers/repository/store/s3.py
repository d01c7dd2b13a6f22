"""Objects in a bucket of S3, or of a server that speaks like it.

Imported when such a store is opened, and not before: boto3 takes its time. How it is spoken to is in `s3_requests`,
what failures mean in `s3_errors`, when a request is repeated in `retry`, large objects in `s3_upload`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from botocore.exceptions import ClientError, IncompleteReadError

from coordinator.model.repository_uri import RepositoryUri
from workers.repository.store.contract import (
    Buffer,
    MissingObjectError,
    ObjectInfo,
    ReadNext,
    ShortObjectError,
    StoreError,
    check_prefix,
)
from workers.repository.store.retry import Effort
from workers.repository.store.s3_errors import MissingUploadError, PreconditionFailedError
from workers.repository.store.s3_requests import S3Requests, body_of
from workers.repository.store.s3_upload import PARTS_AT_ONCE, S3Upload

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from types_boto3_s3.client import S3Client
    from types_boto3_s3.type_defs import ErrorTypeDef, ListMultipartUploadsOutputTypeDef, MultipartUploadTypeDef

_DELETED_AT_ONCE = 1000
"""S3 takes no more keys in one request."""
_PARTIAL_CONTENT = 206


class S3Store:
    """An ObjectStore; its keys live under the URI's prefix."""

    def __init__(self, uri: RepositoryUri) -> None:
        self._requests = S3Requests(uri)
        self._threads = ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="s3-part")

    @property
    def name(self) -> str:
        return self._requests.name

    def get(self, key: str) -> bytes:
        where = self._requests.where(key)

        def request(s3: S3Client) -> bytes:
            return cast("bytes", s3.get_object(**where)["Body"].read())

        return self._requests.send(request, key)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        found: list[Buffer] = []
        self.stream_range(key, offset, length, lambda read_next: found.append(read_next(length)))
        return cast("bytes", found[-1])

    def stream_range(self, key: str, offset: int, length: int, consume: Callable[[ReadNext], None]) -> None:
        parameters = {**self._requests.where(key), "Range": f"bytes={offset}-{offset + length - 1}"}

        def request(s3: S3Client) -> None:
            answer = s3.get_object(**parameters)
            with closing(answer["Body"]) as body:
                if answer["ResponseMetadata"]["HTTPStatusCode"] != _PARTIAL_CONTENT:
                    raise StoreError(
                        f"{self.name} sends the whole of {key} when asked for a part", "take another server"
                    )
                if answer.get("ContentLength", length) != length:  # a proxy may leave it out
                    raise ShortObjectError(
                        f"{key} in {self.name} ends before byte {offset + length}", "run flushpoint repository check"
                    )
                consume(partial(_read_exactly, body))

        self._requests.send(request, key)

    def size(self, key: str) -> int | None:
        return self._requests.size(key)

    def put(self, key: str, data: Buffer) -> None:
        with self.upload(key) as upload:
            upload.write(data)
            upload.commit()

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        view = memoryview(data).cast("B")
        parameters = {**self._requests.written(key), "IfNoneMatch": "*", **self._requests.checksum(view)}
        effort = Effort()
        try:
            self._requests.send(lambda s3: s3.put_object(Body=body_of(view), **parameters), key, effort)
        except PreconditionFailedError:
            return effort.doubtful and self._holds(key, view)
        return True

    def upload(self, key: str) -> S3Upload:
        return S3Upload(self._requests, key, self._threads)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        parameters: dict[str, Any] = {
            "Bucket": self._requests.bucket,
            "Prefix": self._requests.prefix + check_prefix(prefix),
        }
        more = True
        while more:
            page = self._requests.send(lambda s3: s3.list_objects_v2(**parameters))
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._requests.prefix)
                if key and not key.endswith("/"):  # consoles make such objects to show a directory
                    yield ObjectInfo(key, found["Size"], found["LastModified"])
            more = page["IsTruncated"]
            parameters["ContinuationToken"] = page.get("NextContinuationToken", "")

    def delete(self, keys: Iterable[str]) -> None:
        wanted = iter(keys)
        while batch := list(islice(wanted, _DELETED_AT_ONCE)):
            self._delete(batch)

    def abort_uploads(self, older_than_s: float) -> int:
        aborted = 0
        for page in self._pages_of_uploads():
            # Both times are the store's, whatever the clock of this host says.
            date = page["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(date) if date else datetime.now(UTC)
            for upload in page.get("Uploads", []):
                if now - upload["Initiated"] >= timedelta(seconds=older_than_s):
                    aborted += self._abort(upload)
        return aborted

    @property
    def locks(self) -> bool:
        return self._requests.locks

    def extend_lock(self, key: str) -> None:
        self._requests.extend_lock(key)

    def close(self) -> None:
        self._threads.shutdown()
        self._requests.close()

    def _holds(self, key: str, data: memoryview) -> bool:
        try:
            return self.get(key) == data
        except MissingObjectError:  # deleted since: it was there, and nobody knows whose it was
            return False

    def _delete(self, keys: Sequence[str]) -> None:
        objects = [{"Key": self._requests.where(key)["Key"]} for key in keys]
        parameters: dict[str, Any] = {"Bucket": self._requests.bucket, "Delete": {"Objects": objects, "Quiet": True}}

        def request(s3: S3Client) -> None:
            for error in s3.delete_objects(**parameters).get("Errors", []):
                if error.get("Code") != "NoSuchKey":
                    raise _as_answer(error)

        if objects:
            self._requests.send(request, keys[0])

    def _pages_of_uploads(self) -> Iterator[ListMultipartUploadsOutputTypeDef]:
        parameters: dict[str, Any] = {"Bucket": self._requests.bucket, "Prefix": self._requests.prefix}
        more = True
        while more:
            page = self._requests.send(lambda s3: s3.list_multipart_uploads(**parameters))
            yield page
            more = page.get("IsTruncated", False)
            parameters["KeyMarker"] = page.get("NextKeyMarker", "")
            parameters["UploadIdMarker"] = page.get("NextUploadIdMarker", "")

    def _abort(self, upload: MultipartUploadTypeDef) -> int:
        """1, or 0 if it has ended meanwhile."""
        parameters: dict[str, Any] = {
            "Bucket": self._requests.bucket,
            "Key": upload["Key"],
            "UploadId": upload["UploadId"],
        }
        try:
            self._requests.send(lambda s3: s3.abort_multipart_upload(**parameters), upload["Key"])
        except MissingUploadError:
            return 0
        return 1


def _read_exactly(body: StreamingBody, count: int) -> bytes:
    data: bytes = body.read(count)
    while len(data) < count:
        more = body.read(count - len(data))
        if not more:
            raise IncompleteReadError(actual_bytes=len(data), expected_bytes=count)
        data += more
    return data


def _as_answer(error: ErrorTypeDef) -> ClientError:
    """One object's failure within a successful DeleteObjects, as if it had been the answer to a request of its own."""
    detail: Any = {"Error": {"Code": error.get("Code", ""), "Message": error.get("Message", "")}}
    return ClientError(detail, "DeleteObjects")
