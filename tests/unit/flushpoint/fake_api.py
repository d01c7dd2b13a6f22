"""A small API on a unix socket: real HTTP, scripted jobs."""

from __future__ import annotations

import json
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from coordinator.model.job import JobSpec, State
from coordinator.model.view import JobView

# httpcore 1.0.9, SyncBackend.connect_unix_socket: a socket that cannot be connected is left to the garbage collector.
UNCONNECTED_SOCKET_LEAKS = pytest.mark.filterwarnings("ignore:Exception ignored in.*socket.socket")

PROBLEM_STATUS = {"usage": 422, "not-found": 404, "refused": 409, "unavailable": 503, "failed": 500}


@dataclass
class FakeApi:
    """Jobs by id, each with the views it goes through; one is taken off at each look, the last one stays."""

    address: str
    jobs: dict[str, list[JobView]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Views of groups, as the API writes them."""
    unreadable_groups: dict[str, str] = field(default_factory=dict)
    led: bool = True
    workers: dict[str, int] = field(default_factory=lambda: {"w": 2})
    warnings: list[str] = field(default_factory=list)
    refusal: tuple[str, str, str] | None = None
    """code, detail and remedy with which every verb and submission is answered."""
    received: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, path and body of each request that changes something."""
    lost_while_waiting: bool = False
    """Whoever waits for a change is told that the API is unavailable."""
    listed: int = 0
    """How often all jobs were asked for."""
    looked: threading.Event = field(default_factory=threading.Event)
    """Set when a client waits for a change that does not come."""

    def add(self, job_id: str, *views: dict[str, Any]) -> None:
        spec = JobSpec(source="/disks/a.raw", target="/disks/b.raw")
        made = [JobView.model_validate({"spec": spec, **view, "id": job_id}) for view in views or [{}]]
        self.jobs[job_id] = made

    def answer(self, method: str, path: str, params: dict[str, str], body: Any) -> tuple[int, Any]:
        parts = [unquote(part) for part in path.strip("/").split("/")[1:]]
        if method == "POST":
            self.received.append((method, path, body))
            if self.refusal:
                return _problem(*self.refusal)
        match method, parts:
            case "GET", ["health"]:
                health = {"status": "ok", "version": "0", "leader": True, "led": self.led}
                return 200, {**health, "workers": self.workers, "warnings": self.warnings}
            case "GET", ["events"]:
                found = [event for event in self.events if params.get("job", "") in ("", event["job"])]
                return 200, {"events": found, "next": found[-1]["id"] if found else "0"}
            case "GET", ["jobs"]:
                self.listed += 1
                return 200, {
                    "jobs": [views[0].model_dump(mode="json") for views in self.jobs.values()],
                    "next": None,
                }
            case "GET", ["groups"]:
                return 200, {"groups": self.groups, "unreadable": self.unreadable_groups}
            case "POST", ["jobs"]:
                views = self.jobs.setdefault("feed", [JobView(id="feed", spec=JobSpec.model_validate(body))])
                return 201, views[0].model_dump(mode="json")
            case "GET", ["jobs", _] if self.lost_while_waiting and "until" in params:
                return _problem("unavailable", "the ledger does not answer", "start it")
            case "GET", ["jobs", job_id] if job_id in self.jobs:
                return 200, self._look(job_id, "until" in params)
            case "POST", ["jobs", job_id, "dismiss"] if job_id in self.jobs:
                return 204, None
            case "POST", ["jobs", job_id, _] if job_id in self.jobs:
                return 200, self.jobs[job_id][0].model_dump(mode="json")
        return _problem("not-found", f"there is no {path}", "")

    def _look(self, job_id: str, waits: bool) -> Any:
        views = self.jobs[job_id]
        if len(views) > 1:
            return views.pop(0).model_dump(mode="json")
        if waits and views[0].state is not State.CONCLUDED:
            self.looked.set()
        return views[0].model_dump(mode="json")


def _problem(code: str, detail: str, remedy: str) -> tuple[int, Any]:
    status = PROBLEM_STATUS[code]
    return status, {
        "type": f"urn:flushpoint:{code}",
        "title": code,
        "status": status,
        "detail": detail,
        "remedy": remedy,
        "code": code,
    }


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextmanager
def serve() -> Iterator[FakeApi]:
    """The API, on a socket of its own, as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="flushpoint-") as directory:
        path = Path(directory) / "api.sock"
        fake = FakeApi(f"unix://{path}")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                url = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                params = {name: values[0] for name, values in parse_qs(url.query).items()}
                status, document = fake.answer(self.command, url.path, params, json.loads(body or "null"))
                content = b"" if document is None else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _serve

            def log_message(self, *_: object) -> None:
                pass

        with _Server(str(path), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield fake
            finally:
                server.shutdown()
                thread.join()
