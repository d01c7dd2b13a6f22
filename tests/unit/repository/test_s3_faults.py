"""What an S3 server may answer, and what becomes of it: asked again as it wishes, or one clear message."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError
from coordinator.model.repository_uri import parse_repository
from workers.repository.store import MissingObjectError, ObjectStore, StoreError, open_store, retry


class Answer:
    """One scripted answer; `code` is S3's own, in an XML body."""

    def __init__(self, status: int, code: str = "", body: bytes = b"", **headers: str) -> None:
        self.status = status
        text = f"<Error><Code>{code}</Code><Message>because</Message></Error>".encode()
        self.body = text if code else body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Server(ThreadingHTTPServer):
    def __init__(self, script: list[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.asked: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self._play()

    do_HEAD = do_PUT = do_DELETE = do_GET

    def _play(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path))
        answer = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        if answer.status == 0:  # breaks off in the middle of a body
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the test's terminal."""


@contextmanager
def playing(monkeypatch: pytest.MonkeyPatch, *script: Answer) -> Iterator[tuple[ObjectStore, Server]]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY-SECRET")
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    server = Server(list(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    where = f"http://127.0.0.1:{server.server_port}"
    store = open_store(parse_repository(f"s3://bucket/prefix?endpoint={where}&region=us-east-1&addressing=path"))
    try:
        yield store, server
    finally:
        store.close()
        server.shutdown()
        thread.join()
        server.server_close()


OK = Answer(200, body=b"content", ETag='"x"')


@pytest.mark.parametrize(
    "failure",
    [Answer(500, "InternalError"), Answer(503, "SlowDown"), Answer(429, "TooManyRequests"), Answer(0), Answer(502)],
)
def test_a_passing_failure_is_asked_again(monkeypatch: pytest.MonkeyPatch, failure: Answer) -> None:
    with playing(monkeypatch, failure, failure, OK) as (store, server):
        assert store.get("key") == b"content"
        assert len(server.asked) == 3


def test_retry_after_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with playing(monkeypatch, Answer(503, "SlowDown", Retry_After="1"), OK) as (store, _):
        paused = retry._pause_s

        def noted(attempts: int, failure: retry.Again) -> float:
            waits.append(paused(attempts, failure))
            return waits[-1]

        monkeypatch.setattr(retry, "_pause_s", noted)
        assert store.get("key") == b"content"
    assert len(waits) == 1
    assert waits[0] >= 1


def test_patience_ends_in_a_message_that_tells_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry.Effort.__init__, "__defaults__", (0.3, *retry.Effort.__init__.__defaults__[1:]))  # type: ignore[index]
    with playing(monkeypatch, Answer(503, "SlowDown")) as (store, server):
        with pytest.raises(UnavailableError, match=r"attempts? in"):
            store.get("key")
        assert len(server.asked) > 1


@pytest.mark.parametrize(
    ("answer", "error", "named"),
    [
        (Answer(404, "NoSuchKey"), MissingObjectError, "key"),
        (Answer(404, "NoSuchBucket"), NotFoundError, "bucket"),
        (Answer(403, "InvalidAccessKeyId"), RefusedError, ""),
        (Answer(403, "SignatureDoesNotMatch"), RefusedError, ""),
        (Answer(403, "AccessDenied"), RefusedError, "bucket"),
        (Answer(403, "RequestTimeTooSkewed"), RefusedError, "clock"),
        (Answer(507, "InsufficientStorage"), StoreError, ""),
    ],
)
def test_what_no_repetition_helps_is_said_at_once_with_a_remedy_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, error: type[FlushpointError], named: str
) -> None:
    with playing(monkeypatch, answer) as (store, server):
        with pytest.raises(error) as caught:
            store.get("key")
        assert len(server.asked) == 1
    assert caught.value.remedy
    assert named in str(caught.value).lower()
    assert "CANARY" not in str(caught.value)


def test_without_credentials_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    with playing(monkeypatch, OK) as (store, server):
        store.close()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, "/dev/null")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        where = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(RefusedError, match="credentials"):
            open_store(parse_repository(f"s3://bucket/prefix?endpoint={where}&region=us-east-1")).get("key")
        assert server.asked == []


def test_a_lost_answer_to_a_conditional_write_is_settled_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt got through although its answer was lost: what is there is ours."""
    with playing(monkeypatch, Answer(500, "InternalError"), Answer(412, "PreconditionFailed"), OK) as (store, _):
        assert store.put_if_absent("key", b"content")
    with playing(monkeypatch, Answer(412, "PreconditionFailed"), OK) as (store, _):
        assert not store.put_if_absent("key", b"content")
