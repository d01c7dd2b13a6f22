"""One object, sent to S3 while it is being made: as one PUT if it is small, else in parts, several at once.

write ──► part being filled ── full ──► sent by a thread ──► its ETag
              ▲                              │
              └──────── buffer is free ◄─────┘      at most PARTS_AT_ONCE + 1 buffers
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import structlog

from coordinator.model.errors import FlushpointError
from workers.failpoint import pass_point
from workers.repository.store.contract import Buffer
from workers.repository.store.retry import Effort
from workers.repository.store.s3_errors import MissingUploadError
from workers.repository.store.s3_requests import S3Requests, body_of

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client
    from types_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 16 * 1024 * 1024
"""S3 wants parts of 5 MiB at least and takes 10,000 of them: objects up to 156 GiB."""
PARTS_AT_ONCE = 2
ABORT_PATIENCE_S = 5.0
"""Of removing the parts of a failed upload; `abort_uploads` finds what is left."""

Answer = TypeVar("Answer")
log = structlog.get_logger()


class S3Upload:
    """See `Upload`. `threads` may be shared with other uploads."""

    def __init__(self, requests: S3Requests, key: str, threads: Executor) -> None:
        self._requests = requests
        self._key = key
        self._threads = threads
        self._where = requests.where(key)
        self._stopped = threading.Event()
        self._id = ""
        self._part = _new_buffer()
        self._filled = 0
        self._size = 0
        self._sending: deque[tuple[Future[CompletedPartTypeDef], memoryview]] = deque()
        self._sent: list[CompletedPartTypeDef] = []
        self._committed = False

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self._size += len(view)
        while view:
            if self._filled == PART_BYTES:
                self._ship()
                self._part = _new_buffer() if len(self._sending) < PARTS_AT_ONCE else self._settle_oldest()
                self._filled = 0
            count = min(len(view), PART_BYTES - self._filled)
            self._part[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]

    def commit(self) -> None:
        data = self._part[: self._filled]
        if self._id:
            self._ship()
            while self._sending:
                self._settle_oldest()
            self._complete()
        else:
            parameters = self._requests.written(self._key) | self._requests.checksum(data)
            self._send(lambda s3: s3.put_object(Body=body_of(data), **parameters))
        self._committed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._id and not self._committed:
            self._abort()

    def _ship(self) -> None:
        """Hand the part being filled to a thread."""
        if not self._id:
            self._id = self._create()
        number = len(self._sent) + len(self._sending) + 1
        future = self._threads.submit(self._send_part, number, self._part[: self._filled])
        self._sending.append((future, self._part))

    def _settle_oldest(self) -> memoryview:
        """Wait until the oldest part is sent, or raise what kept it from that; returns its buffer."""
        future, buffer = self._sending[0]
        self._sent.append(future.result())
        self._sending.popleft()
        pass_point("part-sent")
        return buffer

    def _create(self) -> str:
        parameters = self._requests.written(self._key)
        if self._requests.checksums:
            parameters["ChecksumAlgorithm"] = "CRC32"
        return self._send(lambda s3: s3.create_multipart_upload(**parameters))["UploadId"]

    def _send_part(self, number: int, data: memoryview) -> CompletedPartTypeDef:
        checksum = self._requests.checksum(data)
        parameters: dict[str, Any] = {**self._where, "UploadId": self._id, "PartNumber": number, **checksum}
        answer = self._send(lambda s3: s3.upload_part(Body=body_of(data), **parameters))
        part: CompletedPartTypeDef = {"PartNumber": number, "ETag": answer["ETag"]}
        if checksum:
            part["ChecksumCRC32"] = checksum["ChecksumCRC32"]
        return part

    def _complete(self) -> None:
        effort = Effort(stopped=self._stopped)
        parts: Any = {"Parts": self._sent}
        parameters: dict[str, Any] = {**self._where, "UploadId": self._id, "MultipartUpload": parts}
        try:
            self._requests.send(lambda s3: s3.complete_multipart_upload(**parameters), self._key, effort)
        except MissingUploadError:
            # An earlier attempt may have completed it, and only its answer was lost.
            if not effort.doubtful or self._requests.size(self._key) != self._size:
                raise

    def _abort(self) -> None:
        """A part that is still under way would outlive the abort: they end first."""
        self._stopped.set()
        for future, _ in self._sending:
            future.cancel()
        wait([future for future, _ in self._sending])
        parameters: dict[str, Any] = {**self._where, "UploadId": self._id}
        effort = Effort(patience_s=ABORT_PATIENCE_S)
        try:
            self._requests.send(lambda s3: s3.abort_multipart_upload(**parameters), self._key, effort)
        except MissingUploadError:
            pass
        except FlushpointError as error:
            log.warning("the parts of an upload could not be removed", key=self._key, error=error.message)

    def _send(self, request: Callable[[S3Client], Answer]) -> Answer:
        return self._requests.send(request, self._key, Effort(stopped=self._stopped))


def _new_buffer() -> memoryview:
    """Of a whole part; its pages cost nothing before they are written."""
    return memoryview(bytearray(PART_BYTES))
