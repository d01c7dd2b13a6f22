"""What a failed request to S3 means: whose fault it is, whether to send it again, and what a person should do.

Nothing of a credential is ever in a message. What the server says is quoted (shortly) only where it helps.
"""

from __future__ import annotations

import errno
import math
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import botocore.exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError
from workers.repository.store.contract import MissingObjectError, ShortObjectError, StoreError
from workers.repository.store.retry import Again

_QUOTED_CHARACTERS = 200
_MISSING = frozenset({"NoSuchKey", "404"})
_BUSY = frozenset(
    {"SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
    | {"BandwidthLimitExceeded", "RequestThrottled", "429", "503"}
)
_BUSY_STATUS = frozenset({429, 503})
_PASSING = frozenset({"InternalError", "RequestTimeout", "IncompleteBody", "BadDigest"})
_PASSING_STATUS = frozenset({408, 500, 502, 504})
_CONFLICTS = frozenset({"ConditionalRequestConflict", "OperationAborted"})
"""409: another request for the same key was under way, and this one has changed nothing."""
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"})
_DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "UnauthorizedAccess", "401", "403"})
_ELSEWHERE = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
)
_FULL = frozenset({"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "507"})
_CREDENTIALS = (boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.SSOError, boto.LoginError)
_BROKEN = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.ReadTimeoutError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    ResponseParserError,
)
"""No answer, half of one, or one that was damaged on its way."""
_UNREACHED = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)
_RIGHTS = "s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload"


class PreconditionFailedError(StoreError):
    """412: there is an object of that key."""


class MissingUploadError(StoreError):
    """The multipart upload has been completed or aborted."""


class Explainer:
    """Makes sentences about one bucket at one endpoint ("" if boto3 has yet to choose it)."""

    def __init__(self, name: str, bucket: str, endpoint: str) -> None:
        self._name = name
        self._bucket = bucket
        self._where = f"{name} at {endpoint}" if endpoint else name

    def explain(self, error: Exception, key: str) -> FlushpointError | Again | None:
        """None for an exception that botocore did not make of an answer or the lack of one."""
        if isinstance(error, boto.ClientError):
            return self._answer(error, key)
        if isinstance(error, boto.NoCredentialsError):
            return RefusedError(
                f"the worker has no credentials for {self._where}",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in its environment, or name a profile with profile=",
            )
        if isinstance(error, boto.PartialCredentialsError):
            return RefusedError(
                f"the worker has only half of the credentials for {self._where}",
                "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or both in its profile",
            )
        if isinstance(error, _CREDENTIALS):
            return RefusedError(
                f"the worker cannot get its credentials for {self._where}", "renew its login or its profile in ~/.aws"
            )
        if isinstance(error, boto.SSLError):
            return self._tls(error)
        if _is_bug(error):
            return None
        if isinstance(error, _BROKEN):
            return self._broken(error)
        return self.unusable(error) if isinstance(error, boto.BotoCoreError) else None

    def unusable(self, error: Exception) -> RefusedError:
        """For what boto3 says of its settings before it asks anybody."""
        return RefusedError(
            f"{self._where} cannot be used: {error}", "check the options of the repository's URI, and ~/.aws"
        )

    def no_bucket(self) -> NotFoundError:
        return NotFoundError(f"there is no bucket {self._bucket} for {self._where}", "make it, or check endpoint=")

    def _answer(self, error: boto.ClientError, key: str) -> FlushpointError | Again:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        if code in _MISSING:
            return MissingObjectError(f"there is no object {key} in {self._where}", "run flushpoint repository check")
        if code == "PreconditionFailed" or status == 412:
            return PreconditionFailedError(f"there is an object {key} in {self._where} already")
        if code == "NoSuchUpload":
            return MissingUploadError(
                f"the upload of {key} to {self._where} is gone",
                "do not abort uploads that are under way, by a lifecycle rule or otherwise",
            )
        if refused := self._refused(error, code, key):
            return refused
        if code in _CONFLICTS:
            return Again(f"others keep writing {key} in {self._where}", "try again", undone=True)
        busy = code in _BUSY or status in _BUSY_STATUS
        if busy or code in _PASSING or status in _PASSING_STATUS:
            return Again(
                f"{self._where} answers {status} {code}",
                "run fewer workers, or give the store more room" if busy else "look at the server and its log",
                after_s=retry_after_s(headers, datetime.now(UTC)),
                busy=busy,
            )
        return self._store_error(error, code, status, key)

    def _refused(self, error: boto.ClientError, code: str, key: str) -> RefusedError | None:
        """What a person has to put right."""
        if code == "NoSuchBucket":
            return self.no_bucket()
        if code == "InvalidAccessKeyId":
            return RefusedError(
                f"{self._where} does not know the worker's access key", "check AWS_ACCESS_KEY_ID, or profile="
            )
        if code == "SignatureDoesNotMatch":
            return RefusedError(
                f"{self._where} does not accept the worker's signature",
                "check AWS_SECRET_ACCESS_KEY or profile=, then region= and any proxy that changes requests",
            )
        if code in _EXPIRED:
            return RefusedError(f"the worker's session for {self._where} has expired", "renew its credentials")
        if code in _DENIED:
            return RefusedError(
                f"{self._where} denies the worker {error.operation_name} of {key or 'the bucket'}",
                f"allow its user {_RIGHTS} there, and with lock-mode= s3:PutObjectRetention",
            )
        if code == "RequestTimeTooSkewed":
            return RefusedError(
                f"the clocks of the worker's host and of {self._where} are too far apart", "set both by NTP"
            )
        if code in _ELSEWHERE:
            region = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region", "")
            return RefusedError(f"{self._where} is in another region", f"write region={region or 'NAME'} in its URI")
        return None

    def _store_error(self, error: boto.ClientError, code: str, status: int, key: str) -> StoreError:
        if code in _FULL or status == 507:
            return StoreError(
                f"{self._where} has no room for {key}",
                "make room there, or let retention remove points",
                errno_=errno.ENOSPC,
            )
        if code == "InvalidRange":
            return ShortObjectError(f"{key} in {self._where} ends too early", "run flushpoint repository check")
        if code == "InvalidObjectState":
            return StoreError(
                f"{key} in {self._where} is archived", "restore it there first, and take another storage-class="
            )
        said = " ".join(error.response.get("Error", {}).get("Message", "").split())[:_QUOTED_CHARACTERS]
        if status == 501 or code == "NotImplemented":
            return StoreError(
                f"{self._where} cannot do {error.operation_name} of {key}: {said}", "update the server, or take another"
            )
        return StoreError(
            f"{self._where} refuses {error.operation_name} of {key}: {status} {code} {said}".rstrip(),
            "look at the server's log",
        )

    def _tls(self, error: boto.SSLError) -> RefusedError | Again:
        cause = _system_error(error)
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):  # a connection that broke, and no more
            return self._broken(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RefusedError(
                f"the certificate of {self._where} is not trusted: {cause.verify_message}",
                "name the PEM file of its authority with ca=, and its host as the certificate does",
            )
        why = getattr(cause, "reason", "") or type(cause).__name__
        return RefusedError(f"TLS to {self._where} failed: {why}", "check that endpoint= is an https address, and ca=")

    def _broken(self, error: Exception) -> Again:
        cause = _system_error(error)
        unreachable = isinstance(error, _UNREACHED)
        why = getattr(cause, "strerror", "") or _SENTENCES.get(type(error), "the connection broke")
        return Again(
            f"{self._where} cannot be reached: {why}" if unreachable else f"{self._where} does not answer: {why}",
            "check endpoint= and the network between" if unreachable else "look at the server and the network between",
            unreachable=unreachable,
        )


_SENTENCES: Mapping[type[Exception], str] = {
    boto.ConnectTimeoutError: "connecting took too long",
    boto.EndpointConnectionError: "no connection",
    boto.ProxyConnectionError: "its proxy does not answer",
    boto.ReadTimeoutError: "it took too long",
    boto.FlexibleChecksumError: "what it sent has another checksum",
    ResponseParserError: "what it sent is no answer of S3",
}


def retry_after_s(headers: Mapping[str, str], now: datetime) -> float:
    """What the answer asks to be waited, in seconds, 0 if nothing: a number or a date (RFC 9110, 10.2.3).

    S3 also has x-amz-retry-after, in milliseconds. `headers` have names in lower case.
    """
    milliseconds = headers.get("x-amz-retry-after", "")
    if milliseconds.isdigit():
        return int(milliseconds) / 1000
    text = headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(int(text)) if len(text) < 10 else math.inf
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds())


def _is_bug(error: Any) -> bool:
    """botocore wraps whatever happens below it, faults of a program included."""
    return type(error) is boto.HTTPClientError and not isinstance(error.kwargs.get("error"), OSError | HTTPError)


def _system_error(error: BaseException) -> BaseException | None:
    """The OSError at the bottom of what urllib3 and botocore have wrapped around it."""
    seen: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or current in seen:
            continue
        if isinstance(current, OSError) and not isinstance(current, boto.BotoCoreError) and current.errno:
            return current
        seen.append(current)
        kwargs = current.kwargs if isinstance(current, boto.BotoCoreError) else {}
        pending += [kwargs.get("error"), *current.args, current.__cause__, current.__context__]
    return None
