"""How S3 is spoken to, and what is made of its answers: against a server that answers as written down."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from scripted_s3 import OK, Answer, Opener, ScriptedS3, error, refusal_before_the_body

from coordinator.model.errors import RefusedError, UnavailableError
from workers.repository.store import MissingObjectError, StoreError, s3_requests, s3_upload
from workers.repository.store.s3 import S3Store
from workers.repository.store.s3_upload import PART_BYTES

MIB = 1024 * 1024
SLOW_DOWN = error(503, "SlowDown")


def crc32(data: bytes) -> str:
    return base64.b64encode(binascii.crc32(data).to_bytes(4)).decode()


# -- what is sent ----------------------------------------------------------------------------------------


def test_what_is_uploaded_is_neither_hashed_nor_checksummed(s3: ScriptedS3, store: S3Store) -> None:
    store.put("k", b"data")
    [request] = s3.requests
    assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert not [name for name in request.headers if "checksum" in name or name == "content-md5"]
    assert request.body == b"data"


@pytest.mark.parametrize("options", ["checksums=when_supported", "lock-mode=COMPLIANCE&lock-days=1"])
@pytest.mark.parametrize("size", [4, MIB])
def test_a_checksum_is_a_header_computed_once(s3: ScriptedS3, open_s3: Opener, options: str, size: int) -> None:
    data = bytes(size)
    open_s3(s3, options).put("k", data)
    [request] = s3.requests
    assert request.headers["x-amz-checksum-crc32"] == crc32(data)
    assert request.headers["x-amz-sdk-checksum-algorithm"] == "CRC32"
    assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert "x-amz-trailer" not in request.headers
    assert request.body == data


@pytest.mark.parametrize("written", ["2026-01-31T12:00:00.000Z", "Sat, 31 Jan 2026 12:00:00 GMT", "1769860800"])
def test_times_of_a_listing_are_read_in_any_form(s3: ScriptedS3, store: S3Store, written: str) -> None:
    entry = f"<Contents><Key>p/k</Key><Size>1</Size><LastModified>{written}</LastModified></Contents>"
    listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entry}</ListBucketResult>"
    s3.will_answer(Answer(body=listing.encode()))
    [info] = store.list("k")
    assert info.modified == datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_deletions_carry_the_checksum_that_every_server_knows(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(Answer(body=b"<DeleteResult/>"))
    store.delete(["a", "b"])
    [request] = s3.requests
    assert request.headers["content-md5"] == base64.b64encode(hashlib.md5(request.body).digest()).decode()
    assert not [name for name in request.headers if "checksum" in name]


def test_deletions_carry_a_crc_where_it_is_asked_for(s3: ScriptedS3, open_s3: Opener) -> None:
    s3.will_answer(Answer(body=b"<DeleteResult/>"))
    open_s3(s3, "checksums=when_supported").delete(["a"])
    [request] = s3.requests
    assert request.headers["x-amz-checksum-crc32"] == crc32(request.body)


def test_a_large_body_is_not_sent_to_a_server_that_refuses_it(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(refusal_before_the_body(507, "InsufficientStorage"))
    with pytest.raises(StoreError, match="has no room for k"):
        store.put("k", bytes(4 * MIB))
    [request] = s3.requests
    assert request.headers["expect"] == "100-continue"


def test_a_small_body_does_not_wait_for_an_invitation(s3: ScriptedS3, store: S3Store) -> None:
    store.put("k", b"data")
    assert "expect" not in s3.requests[0].headers


def test_one_connection_serves_one_thread(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(error(404, "NoSuchKey"), OK, SLOW_DOWN, OK, Answer(body=b"x"))
    with pytest.raises(MissingObjectError):
        store.get("k")
    store.put("k", bytes(2 * MIB))
    store.put("k", b"data")
    assert store.get("k") == b"x"
    assert len({request.connection for request in s3.requests}) == 1


def test_as_many_connections_are_kept_as_threads_may_ask(s3: ScriptedS3, store: S3Store) -> None:
    for _ in range(3):
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda number: store.put(f"k{number}", b"data"), range(64)))
    assert len({request.connection for request in s3.requests}) <= 16


@pytest.mark.usefixtures("credentials")
def test_a_bucket_may_be_addressed_by_a_host_name(s3: ScriptedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve, port = socket.getaddrinfo, int(s3.endpoint.rpartition(":")[2])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: resolve("127.0.0.1", port, type=socket.SOCK_STREAM))
    uri = s3.uri()
    options = replace(uri.s3, endpoint=f"http://s3.test:{port}", addressing="virtual")
    with closing(S3Store(replace(uri, s3=options))) as store:
        store.put("k", b"x")
    assert (s3.requests[0].headers["host"], s3.requests[0].path) == (f"bucket.s3.test:{port}", "/prefix/k")


# -- what is sent again ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        error(500, "InternalError"),
        error(502, "BadGateway"),
        error(503, "ServiceUnavailable"),
        error(400, "RequestTimeout"),
        error(429, "TooManyRequests"),
        Answer(reset=True),
        Answer(body=b"ha", claimed=4),
        Answer(502, body=b"<html>a proxy speaks</html>"),
    ],
    ids=["500", "502", "503", "timeout", "429", "reset", "reset_in_mid_body", "html"],
)
def test_a_failure_that_passes_is_tried_again(s3: ScriptedS3, store: S3Store, failure: Answer) -> None:
    s3.will_answer(failure, failure, Answer(body=b"data"))
    assert store.get("k") == b"data"
    assert s3.asked() == ["GET /k"] * 3


@pytest.mark.parametrize("status", [503, 429, 500])
def test_retry_after_is_obeyed(s3: ScriptedS3, store: S3Store, status: int) -> None:
    s3.will_answer(error(status, "SlowDown", Retry_After="1"))
    store.put("k", b"data")
    first, second = s3.requests
    assert second.at_s - first.at_s >= 1
    assert first.body == second.body == b"data"


def test_no_thread_asks_while_the_server_wants_to_be_left_alone(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(error(503, "SlowDown", Retry_After="1"))
    store_busy = ThreadPoolExecutor(8)
    with store_busy as threads:
        first = threads.submit(store.put, "first", b"data")
        while not s3.requests:
            time.sleep(0.001)
        while store._requests._retrier._pace._not_before_s == 0:  # its answer has been read
            time.sleep(0.001)
        list(threads.map(lambda number: store.put(f"k{number}", b"data"), range(20)))
        first.result()
    refused, *others = s3.requests
    assert len(others) == 21
    assert min(request.at_s for request in others) - refused.at_s >= 1


def test_a_server_that_asks_for_too_long_a_wait_is_given_up(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(error(503, "SlowDown", Retry_After="3600"))
    with pytest.raises(
        UnavailableError, match=r"503 SlowDown \(1 attempt in 0 s, and it asks to be left alone for 3600 s"
    ):
        store.get("k")


def test_what_is_uploaded_again_is_whole(s3: ScriptedS3, store: S3Store) -> None:
    data = bytes(range(256)) * 8192
    s3.will_answer(Answer(reset=True), error(500, "InternalError"))
    store.put("k", data)
    assert [request.body == data for request in s3.requests] == [True] * 3


def test_keys_that_a_busy_server_did_not_delete_are_deleted_again(s3: ScriptedS3, store: S3Store) -> None:
    refused = b"<DeleteResult><Error><Key>prefix/a</Key><Code>SlowDown</Code></Error></DeleteResult>"
    s3.will_answer(Answer(body=refused), Answer(body=b"<DeleteResult/>"))
    store.delete(["a", "b"])
    assert len(s3.requests) == 2


def test_a_deletion_refused_is_an_error(s3: ScriptedS3, store: S3Store) -> None:
    refused = b"<DeleteResult><Error><Key>prefix/a</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    s3.will_answer(Answer(body=refused))
    with pytest.raises(RefusedError, match="denies the worker DeleteObjects of a"):
        store.delete(["a", "b"])


# -- writing what must not be there yet ------------------------------------------------------------------

PRECONDITION_FAILED = error(412, "PreconditionFailed")
CONFLICT = error(409, "ConditionalRequestConflict")
LOST = Answer(reset=True)


def test_a_conditional_put_is_sent_as_such(s3: ScriptedS3, store: S3Store) -> None:
    assert store.put_if_absent("k", b"mine")
    assert s3.requests[0].headers["if-none-match"] == "*"


def test_a_first_answer_that_it_exists_is_believed(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(PRECONDITION_FAILED)
    assert not store.put_if_absent("k", b"mine")
    assert s3.asked() == ["PUT /k"]


@pytest.mark.parametrize("failure", [LOST, error(500, "InternalError"), SLOW_DOWN], ids=["lost", "500", "503"])
@pytest.mark.parametrize(("there", "won"), [(b"mine", True), (b"theirs", False)])
def test_after_an_answer_was_lost_what_is_there_decides(
    s3: ScriptedS3, store: S3Store, failure: Answer, there: bytes, won: bool
) -> None:
    s3.will_answer(failure, PRECONDITION_FAILED, Answer(body=there))
    assert store.put_if_absent("k", b"mine") is won
    assert s3.asked() == ["PUT /k", "PUT /k", "GET /k"]


def test_what_was_deleted_before_it_could_be_compared_was_not_ours(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(LOST, PRECONDITION_FAILED, error(404, "NoSuchKey"))
    assert not store.put_if_absent("k", b"mine")


def test_a_conflict_is_tried_again_and_leaves_no_doubt(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(CONFLICT, CONFLICT)
    assert store.put_if_absent("k", b"mine")
    s3.will_answer(CONFLICT, PRECONDITION_FAILED)
    assert not store.put_if_absent("k", b"mine")
    assert s3.asked() == ["PUT /k"] * 5


# -- uploads in parts ------------------------------------------------------------------------------------

CREATED = Answer(body=b"<InitiateMultipartUploadResult><UploadId>id</UploadId></InitiateMultipartUploadResult>")
COMPLETED = Answer(body=b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>")
GONE = error(404, "NoSuchUpload")
TWO_PARTS = PART_BYTES + 1


def upload(store: S3Store, size: int) -> None:
    with store.upload("k") as upload:
        upload.write(bytes(size))
        upload.commit()


def test_an_upload_of_one_part_is_one_request(s3: ScriptedS3, store: S3Store) -> None:
    upload(store, PART_BYTES)
    assert s3.asked() == ["PUT /k"]


def test_the_completion_names_every_part_in_order_with_its_checksum(s3: ScriptedS3, open_s3: Opener) -> None:
    s3.will_answer(CREATED, OK, OK, COMPLETED)
    upload(open_s3(s3, "checksums=when_supported"), TWO_PARTS)
    created, *_, completion = s3.requests
    assert created.headers["x-amz-checksum-algorithm"] == "CRC32"
    checksums = [crc32(bytes(PART_BYTES)), crc32(bytes(1))]
    parts = re.findall(rb"<Part>.*?<PartNumber>(\d+)</PartNumber>.*?</Part>", completion.body)
    assert parts == [b"1", b"2"]
    assert re.findall(rb"<ChecksumCRC32>(.*?)</ChecksumCRC32>", completion.body) == [c.encode() for c in checksums]
    assert re.findall(rb"<ETag>(.*?)</ETag>", completion.body) == [b'"etag"'] * 2


def test_a_part_that_fails_is_sent_again(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(CREATED, SLOW_DOWN, LOST, OK, OK, COMPLETED)
    upload(store, TWO_PARTS)
    assert (
        s3.asked().count("PUT /k?uploadId=id&partNumber=1") + s3.asked().count("PUT /k?uploadId=id&partNumber=2") == 4
    )


def test_a_part_that_is_refused_aborts_the_upload(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(CREATED, error(403, "AccessDenied"), error(403, "AccessDenied"))
    with pytest.raises(RefusedError, match="denies the worker UploadPart of k"):
        upload(store, TWO_PARTS)
    assert s3.asked()[-1] == "DELETE /k?uploadId=id"


def test_a_failure_stops_what_other_parts_wait_for(
    s3: ScriptedS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "ABORT_PATIENCE_S", 0.1)
    s3.will_answer(CREATED, error(500, "InternalError", Retry_After="30"))

    def fail_while_a_part_waits() -> None:
        with store.upload("k") as upload:
            upload.write(bytes(TWO_PARTS))
            while len(s3.requests) < 2:
                time.sleep(0.001)
            raise ZeroDivisionError

    started_s = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        fail_while_a_part_waits()
    assert time.monotonic() - started_s < 15
    assert s3.asked()[-1] == "DELETE /k?uploadId=id"


def test_a_completion_whose_answer_was_lost_is_recognised(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(CREATED, OK, OK, LOST, GONE, Answer(claimed=TWO_PARTS))
    upload(store, TWO_PARTS)
    assert s3.asked()[-1] == "HEAD /k"


@pytest.mark.parametrize(
    "answers",
    [(GONE, Answer(claimed=TWO_PARTS)), (LOST, GONE, Answer(body=b"other"))],
    ids=["never_lost", "another_size"],
)
def test_a_completion_of_a_lost_upload_is_an_error(s3: ScriptedS3, store: S3Store, answers: tuple[Answer, ...]) -> None:
    s3.will_answer(CREATED, OK, OK, *answers)
    with pytest.raises(StoreError, match=r"the upload of k to .* is gone"):
        upload(store, TWO_PARTS)


def test_an_error_within_a_successful_completion_is_seen(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(CREATED, OK, OK, Answer(body=error(500, "InternalError").body), COMPLETED)
    upload(store, TWO_PARTS)
    assert s3.asked().count("POST /k?uploadId=id") == 2


def test_memory_is_bounded_however_large_the_object(
    s3: ScriptedS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(s3_upload, "PART_BYTES", 64 * 1024)
    new_buffer = s3_upload._new_buffer
    monkeypatch.setattr(s3_upload, "_new_buffer", lambda: made.append(1) or new_buffer())
    s3.will_answer(CREATED, *[OK] * 50, COMPLETED)
    upload(store, 50 * 64 * 1024)
    assert len(made) <= s3_upload.PARTS_AT_ONCE + 1


# -- odd servers -----------------------------------------------------------------------------------------


def test_a_server_that_ignores_ranges_is_an_error(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(Answer(body=bytes(100)))
    with pytest.raises(StoreError, match="sends the whole of k when asked for a part"):
        store.get_range("k", 5, 10)


def test_a_stream_that_breaks_off_is_read_again_from_its_start(s3: ScriptedS3, store: S3Store) -> None:
    data = bytes(range(100))
    s3.will_answer(Answer(206, body=data[:60], claimed=100), Answer(206, body=data))
    pieces: list[bytes] = []
    store.stream_range("k", 5, 100, lambda read: pieces.extend(bytes(read(50)) for _ in range(2)))
    assert pieces == [data[:50], data[:50], data[50:]]


def test_a_client_is_used_again_until_it_is_refused_or_circumstances_change(
    s3: ScriptedS3, open_s3: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connection() -> object:
        store = open_s3(s3)
        with closing(store):
            store.size("k")
        return s3.requests[-1].connection

    first = connection()
    s3.will_answer(error(404, "NoSuchKey"))
    with closing(open_s3(s3)) as other, pytest.raises(MissingObjectError):
        other.get("k")
    assert connection() == first
    s3.will_answer(error(403, "AccessDenied"))
    with closing(open_s3(s3)) as refused, pytest.raises(RefusedError):
        refused.get("k")
    second = connection()
    assert second != first
    assert connection() == second
    store, once_more = open_s3(s3), open_s3(s3)
    for closed in (store, store, once_more):
        closed.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    third = connection()
    assert third not in (first, second)
    monkeypatch.setattr(s3_requests, "_SPARE_S", 0.0)
    assert connection() not in (first, second, third), "one that is old has old credentials"


def test_a_client_is_one_stores_at_a_time(s3: ScriptedS3, open_s3: Opener) -> None:
    one = open_s3(s3)
    one.close()
    one.close()
    first, second = open_s3(s3), open_s3(s3)
    assert first._requests._client is not second._requests._client


def test_a_request_within_a_stream_does_not_wait_for_the_streams_turn(
    s3: ScriptedS3, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a key that was added since; here a store that lets one request through at a time."""
    monkeypatch.setattr(store._requests._retrier._pace, "_limit", 1.0)
    s3.will_answer(Answer(206, body=bytes(100)), Answer(body=b"key"))
    found: list[bytes] = []
    store.stream_range("k", 0, 100, lambda read: found.extend([bytes(read(100)), store.get("keys/k")]))
    assert found == [bytes(100), b"key"]
    assert store._requests._retrier._pace._under_way == 0


def test_an_answer_that_does_not_say_its_length_is_read(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(Answer(206, {"Transfer-Encoding": "chunked"}, b"64\r\n" + bytes(100) + b"\r\n0\r\n\r\n"))
    assert store.get_range("k", 0, 100) == bytes(100)


def test_a_directory_made_by_a_console_is_not_listed(s3: ScriptedS3, store: S3Store) -> None:
    entry = "<Contents><Key>prefix/{}</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
    listed = "".join(entry.format(name) for name in ("", "packs/", "packs/p"))
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
    s3.will_answer(Answer(body=body.encode()))
    assert [info.key for info in store.list("")] == ["packs/p"]
