"""An HTTP server that answers what a test has written down, and remembers what it was asked."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from coordinator.model.repository_uri import RepositoryUri, parse_repository
from workers.repository.store.s3 import S3Store

SECRET = "the-secret-key-that-nobody-may-see"


@dataclass(frozen=True, slots=True)
class Answer:
    """`claimed` is the Content-Length of a body that breaks off; `reset` breaks off before any answer.

    `early`: without reading the request's body, nor inviting it by 100 Continue.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    claimed: int | None = None
    reset: bool = False
    early: bool = False


OK = Answer(headers={"ETag": '"etag"'})


def error(status: int, code: str, **headers: str) -> Answer:
    """As S3 says it; underscores in names of headers are hyphens."""
    body = f"<Error><Code>{code}</Code><Message>said by the server</Message></Error>".encode()
    return Answer(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


def refusal_before_the_body(status: int, code: str) -> Answer:
    return Answer(status, {"Connection": "close"}, error(status, code).body, early=True)


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    at_s: float
    """Of the monotonic clock."""
    connection: Any
    """Its peer's address."""


class ScriptedS3:
    """Answers in the order they were written down, then OK for ever."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.requests: list[Request] = []
        self._answers: list[Answer] = []
        self._lock = threading.Lock()

    def will_answer(self, *answers: Answer) -> None:
        self._answers += answers

    def next_answer(self) -> Answer:
        with self._lock:
            return self._answers.pop(0) if self._answers else OK

    def uri(self, options: str = "") -> RepositoryUri:
        query = f"endpoint={self.endpoint}&region=us-east-1&addressing=path{'&' if options else ''}{options}"
        return parse_repository(f"s3://bucket/prefix?{query}")

    def asked(self) -> list[str]:
        """Method and path of each request, without the bucket and what is common to all."""
        return [f"{r.method} {r.path.removeprefix('/bucket').removeprefix('/prefix')}" for r in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: ScriptedS3
    answer = OK

    def handle_expect_100(self) -> bool:
        self.answer = self.script.next_answer()
        if self.answer.early:
            return True
        return super().handle_expect_100()

    def _serve(self) -> None:
        expected = self.headers.get("Expect") is not None
        answer = self.answer if expected else self.script.next_answer()
        body = b"" if answer.early else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.script.requests.append(
            Request(self.command, self.path, headers, body, time.monotonic(), self.client_address)
        )
        if answer.reset:
            self._reset()
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Transfer-Encoding" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body) if answer.claimed is None else answer.claimed))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        if answer.claimed is not None:
            self._reset()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _reset(self) -> None:
        """Close with RST instead of FIN."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None: ...

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without a FIN first: the linger option decides


@contextmanager
def scripted_s3(tls: ssl.SSLContext | None = None) -> Iterator[ScriptedS3]:
    script = ScriptedS3("")
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"script": script}))
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    script.endpoint = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Opener:
    """Opens stores of a server with options of a URI; all are closed with the stack."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def __call__(self, server: ScriptedS3, options: str = "") -> S3Store:
        store = S3Store(server.uri(options))
        self._stack.callback(store.close)
        return store
