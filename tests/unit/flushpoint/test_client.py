"""The client library against a scripted API, each rule for both clients over one table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import httpx
import pytest

from coordinator.model.errors import (
    FlushpointError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from coordinator.model.job import JobSpec, State
from coordinator.model.view import JobView
from flushpoint import client as client_module
from flushpoint.calls import Event, Health
from flushpoint.client import AsyncClient, Client

SPEC = JobSpec(source="/disks/a.raw", target="nbd://backup/a")
ADDRESS = "http://coordinator:7410"
Handler = Callable[[httpx.Request], httpx.Response]


def view(job_id: str = "1f", state: State = State.RUNNING) -> dict[str, Any]:
    return JobView(id=job_id, spec=SPEC, state=state, version=3, rate=5.0).model_dump(mode="json")


def problem(status: int, code: str) -> httpx.Response:
    document = {"type": f"urn:flushpoint:{code}", "title": "t", "status": status, "detail": "it is so"}
    return httpx.Response(status, json={**document, "remedy": "do this", "code": code})


class SyncFace:
    """Calls a method of `Client` by name; a stream's answers as a list."""

    def call(self, handler: Handler, name: str, *args: object, **options: object) -> Any:
        with Client(ADDRESS, transport=httpx.MockTransport(handler)) as client:
            answer = getattr(client, name)(*args, **options)
            return list(answer) if isinstance(answer, Iterator) else answer


class AsyncFace:
    """The same of `AsyncClient`, in an event loop of its own."""

    def call(self, handler: Handler, name: str, *args: object, **options: object) -> Any:
        async def converse() -> Any:
            async with AsyncClient(ADDRESS, transport=httpx.MockTransport(handler)) as client:
                answer = getattr(client, name)(*args, **options)
                if isinstance(answer, AsyncIterator):
                    return [item async for item in answer]
                return await answer

        return asyncio.run(converse())


Face = SyncFace | AsyncFace


@pytest.fixture(params=[SyncFace, AsyncFace], ids=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Face:
    made: Face = request.param()
    return made


class Script:
    """Answers requests one by one, and remembers them."""

    def __init__(self, answers: Iterable[httpx.Response | Exception]) -> None:
        self._answers = iter(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


METHODS = [
    ("submit", (SPEC,), {}, "POST", "/v1/jobs", SPEC.model_dump(mode="json")),
    ("job", ("1f",), {}, "GET", "/v1/jobs/1f", None),
    ("job", ("../events",), {}, "GET", "/v1/jobs/..%2Fevents", None),
    ("pause", ("1f",), {}, "POST", "/v1/jobs/1f/pause", {}),
    ("resume", ("1f",), {}, "POST", "/v1/jobs/1f/resume", {}),
    ("set_speed", ("1f", 4096), {}, "POST", "/v1/jobs/1f/set-speed", {"speed": 4096}),
    ("complete", ("1f",), {}, "POST", "/v1/jobs/1f/complete", {}),
    ("complete", ("1f",), {"pivot": True}, "POST", "/v1/jobs/1f/complete", {"pivot": True}),
    ("cancel", ("1f",), {}, "POST", "/v1/jobs/1f/cancel", {}),
    ("cancel", ("1f",), {"force": True}, "POST", "/v1/jobs/1f/cancel", {"force": True}),
    ("finalize", ("1f",), {}, "POST", "/v1/jobs/1f/finalize", {}),
]


@pytest.mark.parametrize(("name", "args", "options", "method", "path", "body"), METHODS)
def test_a_method_is_one_request(
    face: Face,
    name: str,
    args: tuple[object, ...],
    options: dict[str, object],
    method: str,
    path: str,
    body: object,
) -> None:
    script = Script([httpx.Response(200, json=view())])
    job = face.call(script, name, *args, **options)
    (request,) = script.requests
    assert (request.method, request.url.raw_path.decode()) == (method, path)
    assert (json.loads(request.content) if request.content else None) == body
    assert job == JobView.model_validate(view())


def test_dismiss_answers_nothing(face: Face) -> None:
    script = Script([httpx.Response(204)])
    assert face.call(script, "dismiss", "1f") is None
    assert script.requests[0].url.path == "/v1/jobs/1f/dismiss"


def test_health_names_the_workers(face: Face) -> None:
    document = {"status": "ok", "version": "0.1.0", "leader": True, "led": True, "workers": {"w1": 2}, "warnings": []}
    assert face.call(Script([httpx.Response(200, json=document)]), "health") == Health.model_validate(document)


@pytest.mark.parametrize(
    ("status", "code", "kind", "exit_code"),
    [
        (400, "usage", UsageError, 2),
        (422, "usage", UsageError, 2),
        (404, "not-found", NotFoundError, 3),
        (409, "refused", RefusedError, 3),
        (503, "unavailable", UnavailableError, 4),
        (500, "failed", FlushpointError, 1),
    ],
)
def test_a_problem_is_raised_as_the_class_it_was(
    face: Face, status: int, code: str, kind: type[FlushpointError], exit_code: int
) -> None:
    with pytest.raises(FlushpointError) as caught:
        face.call(Script([problem(status, code)]), "job", "1f")
    assert type(caught.value) is kind
    error = caught.value
    assert (error.message, error.remedy, error.exit_code) == ("it is so", "do this", exit_code)


@pytest.mark.parametrize(("status", "kind"), [(502, UnavailableError), (500, FlushpointError)])
def test_an_answer_of_a_proxy_is_an_error_too(face: Face, status: int, kind: type[FlushpointError]) -> None:
    with pytest.raises(FlushpointError, match=f"answered {status}") as caught:
        face.call(Script([httpx.Response(status, text="<html>")]), "job", "1f")
    assert type(caught.value) is kind


def test_another_kind_of_server_is_told_from_an_api(face: Face) -> None:
    """A document with a `code` is not enough: other APIs have such too."""
    foreign = [
        httpx.Response(200, text="welcome"),
        httpx.Response(404, text="<html>"),
        httpx.Response(301, headers={"Location": "/login"}),
        httpx.Response(404, json={"type": "about:blank", "code": "no_route"}),
    ]
    for answer in foreign:
        with pytest.raises(UsageError, match=f"{ADDRESS} answers, but is no Flushpoint API") as caught:
            face.call(Script([answer]), "job", "1f")
        assert "$FLUSHPOINT_API" in caught.value.remedy


def test_jobs_go_on_from_page_to_page(face: Face) -> None:
    pages = [{"jobs": [view("a"), view("b")], "next": "b"}, {"jobs": [view("c")], "next": None}]
    script = Script(httpx.Response(200, json=page) for page in pages)
    assert [job.id for job in face.call(script, "jobs")] == ["a", "b", "c"]
    assert [request.url.params.get("after") for request in script.requests] == [None, "b"]


def test_events_without_follow_end_with_what_there_is(face: Face) -> None:
    event = {"id": "7-0", "time": 1.5, "event": "BLOCK_JOB_READY", "job": "1f", "data": {"len": 3}}
    script = Script([httpx.Response(200, json={"events": [event], "next": "7-0"})])
    assert face.call(script, "events", after="3-0", job="1f") == [Event.model_validate(event)]
    params = script.requests[0].url.params
    assert (params["after"], params["job"], params["wait"]) == ("3-0", "1f", "0")


def test_followed_events_continue_after_the_newest_one() -> None:
    event = {"id": "7-0", "time": 1.5, "event": "BLOCK_JOB_READY", "job": "1f", "data": {}}
    pages = [
        {"events": [event], "next": "7-0"},
        {"events": [], "next": "9-0"},
        {"events": [{**event, "id": "10-0"}], "next": "10-0"},
    ]
    script = Script(httpx.Response(200, json=page) for page in pages)
    with Client(ADDRESS, transport=httpx.MockTransport(script)) as client:
        stream = client.events(follow=True)
        assert [next(stream).id, next(stream).id] == ["7-0", "10-0"]
    assert [request.url.params["after"] for request in script.requests] == ["0", "7-0", "9-0"]


def test_watch_asks_for_any_other_state_than_the_last(face: Face) -> None:
    states = [State.CREATED, State.RUNNING, State.CONCLUDED]
    script = Script(httpx.Response(200, json=view(state=state)) for state in states)
    assert [job.state for job in face.call(script, "watch", "1f")] == states
    asked = [set(request.url.params.get("until", "").split(",")) for request in script.requests]
    assert asked == [{""}, set(State) - {State.CREATED}, set(State) - {State.RUNNING}]


def test_wait_ends_with_the_state_that_was_asked_for(face: Face) -> None:
    script = Script(httpx.Response(200, json=view(state=state)) for state in (State.RUNNING, State.READY))
    assert face.call(script, "wait", "1f", until=[State.READY]).state is State.READY


def test_wait_gives_up_after_its_time(face: Face) -> None:
    script = Script([httpx.Response(200, json=view())])
    with pytest.raises(UnavailableError, match="still running after 0 s"):
        face.call(script, "wait", "1f", timeout_s=0.0)


def test_an_api_that_never_answered_is_unavailable_at_once(face: Face) -> None:
    script = Script([httpx.ConnectError("refused")])
    with pytest.raises(UnavailableError, match=r"http://coordinator:7410 does not answer: refused"):
        face.call(script, "job", "1f")
    assert len(script.requests) == 1


def test_a_restart_of_the_coordinator_does_not_end_a_wait(face: Face) -> None:
    answers: list[httpx.Response | Exception] = [
        httpx.Response(200, json=view()),
        httpx.ReadError("reset"),
        httpx.ConnectError("refused"),
        problem(503, "unavailable"),
        httpx.Response(200, json=view(state=State.CONCLUDED)),
    ]
    assert face.call(Script(answers), "wait", "1f").state is State.CONCLUDED


def test_a_verb_that_may_have_arrived_is_not_sent_again() -> None:
    script = Script([httpx.Response(200, json=view()), httpx.ReadError("reset")])
    with Client(ADDRESS, transport=httpx.MockTransport(script)) as client:
        client.job("1f")
        with pytest.raises(UnavailableError, match="reset"):
            client.complete("1f")
    assert len(script.requests) == 2


def test_a_submission_is_repeated_under_the_same_key() -> None:
    script = Script([httpx.Response(200, json=view()), httpx.ReadError("reset"), httpx.Response(201, json=view())])
    with Client(ADDRESS, transport=httpx.MockTransport(script)) as client:
        client.job("1f")
        client.submit(SPEC)
    first, second = (request.headers["Idempotency-Key"] for request in script.requests[1:])
    assert first == second


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PATIENCE_S", 0.2)

    def fails_after_the_first(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/jobs/1f":
            return httpx.Response(200, json=view())
        raise httpx.ConnectError("refused")

    with Client(ADDRESS, transport=httpx.MockTransport(fails_after_the_first)) as client:
        client.job("1f")
        with pytest.raises(UnavailableError):
            client.health()


def test_every_request_has_a_timeout_longer_than_its_wait(face: Face) -> None:
    script = Script(httpx.Response(200, json=view(state=state)) for state in (State.RUNNING, State.CONCLUDED))
    face.call(script, "wait", "1f", timeout_s=20)
    plain, waiting = (request.extensions["timeout"] for request in script.requests)
    assert plain == {"connect": 5.0, "read": 10.0, "write": 10.0, "pool": 10.0}
    assert 29 < waiting["read"] <= 30


@pytest.mark.parametrize(
    "address",
    [
        "",
        "coordinator:7410",
        "unix://relative",
        "ftp://x",
        "http://",
        "http:///v1",
        "http://host:port",
        "http://host:99999",
        "http://[::1",
        "http://a..b",
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_that_is_none_is_a_usage_error(kind: type[Client | AsyncClient], address: str) -> None:
    with pytest.raises(UsageError, match="FLUSHPOINT_API"):
        kind(address)
