"""Every call of the API, described once and executed by nobody here: `flushpoint.client` does that, in two ways.

A `Call` is one request with the function that reads its answer. A `Conversation` is a generator that yields
calls, is sent their answers, and yields (in `Item`) what the caller is to see. Neither knows whether it runs
synchronously or not.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeAlias, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError

from coordinator.model.errors import (
    FlushpointError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from coordinator.model.group import GroupSpec, GroupVerb
from coordinator.model.job import JobSpec, State, Verb
from coordinator.model.point import PointRecord, RepositoryRecord
from coordinator.model.view import CheckpointView, CompletionView, GroupView, JobView

T = TypeVar("T")
Ending = TypeVar("Ending", CheckpointView, CompletionView)

POLL_S = 30.0
"""Length of one long poll: below the 60 s that the API grants and that proxies in between cut at."""
PAGE = 100


class Event(BaseModel):
    """One event of the deployment's stream; `time` in Unix seconds, `id` grows strictly."""

    id: str
    time: float
    event: str
    job: str
    data: dict[str, Any]


class EventPage(BaseModel):
    events: list[Event]
    next: str


class JobPage(BaseModel):
    jobs: list[JobView]
    next: str | None


class RepositoryList(BaseModel):
    repositories: list[RepositoryRecord]


class PointPage(BaseModel):
    points: list[PointRecord]
    next: int | None


class GroupList(BaseModel):
    groups: list[GroupView]
    unreadable: dict[str, str]
    """By name, why the record of a group cannot be read."""


class Health(BaseModel):
    """`leader`: the coordinator that answers leads; `led`: that one, or another. `workers` maps the name of each living
    worker to its slots. `warnings`: what the configuration may cost, each in a sentence with what to do about it."""

    status: str
    version: str
    leader: bool
    led: bool
    workers: dict[str, int]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. `wait_s` is how long the server may think about it by agreement."""

    method: str
    path: str
    parse: Callable[[bytes], T]
    params: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    repeatable: bool = False
    """Sending it twice does what sending it once does."""


@dataclass(frozen=True, slots=True)
class Item(Generic[T]):
    """What a conversation hands to its caller, between two calls."""

    value: T


Conversation: TypeAlias = Generator[Call[Any] | Item[T], Any, None]

_JOB = TypeAdapter(JobView).validate_json
_JOBS = TypeAdapter(JobPage).validate_json
_EVENTS = TypeAdapter(EventPage).validate_json
_POINTS = TypeAdapter(PointPage).validate_json
_REPOSITORIES = TypeAdapter(RepositoryList).validate_json
_POINT_GROUPS = TypeAdapter(dict[str, int]).validate_json
_GROUP = TypeAdapter(GroupView).validate_json
_GROUP_LIST = TypeAdapter(GroupList).validate_json
_COMPLETION = TypeAdapter(CompletionView).validate_json
_CHECKPOINT = TypeAdapter(CheckpointView).validate_json
_HEALTH = TypeAdapter(Health).validate_json


def submit(spec: JobSpec, idempotency_key: str = "") -> Call[JobView]:
    """Create a job. The same key again answers with the job that it made the first time."""
    key = idempotency_key or str(uuid.uuid4())
    body = spec.model_dump_json().encode()
    return Call("POST", "/v1/jobs", _JOB, body=body, headers={"Idempotency-Key": key}, repeatable=True)


def job(job_id: str) -> Call[JobView]:
    """One job; NotFoundError if there is none of this id."""
    return _get(_job_path(job_id), _JOB)


def pause(job_id: str) -> Call[JobView]:
    """Ask the job to stop copying; it keeps its place."""
    return _act(job_id, Verb.PAUSE)


def resume(job_id: str) -> Call[JobView]:
    """Go on after a pause or an error, and reset the I/O status."""
    return _act(job_id, Verb.RESUME)


def set_speed(job_id: str, bytes_per_s: int) -> Call[JobView]:
    """Limit the job over all its workers; 0 is unlimited."""
    return _act(job_id, Verb.SET_SPEED, b'{"speed":%d}' % bytes_per_s)


def complete(job_id: str, *, pivot: bool = False) -> Call[JobView]:
    """End a ready job with a clean copy, or fail and leave it running."""
    return _act(job_id, Verb.COMPLETE, b'{"pivot":true}' if pivot else b"{}")


def cancel(job_id: str, *, force: bool = False) -> Call[JobView]:
    """Give the job up; with `force` without draining requests in flight."""
    return _act(job_id, Verb.CANCEL, b'{"force":true}' if force else b"{}")


def finalize(job_id: str) -> Call[JobView]:
    """Conclude a pending job."""
    return _act(job_id, Verb.FINALIZE)


def dismiss(job_id: str) -> Call[None]:
    """Forget a concluded job."""
    return Call("POST", f"{_job_path(job_id)}/{Verb.DISMISS}", _nothing, body=b"{}")


def health() -> Call[Health]:
    """Whether the deployment works, and who works in it."""
    return _get("/v1/health", _HEALTH)


def jobs() -> Conversation[JobView]:
    """All jobs, newest first, page by page."""
    params = {"limit": str(PAGE)}
    while True:
        page: JobPage = yield _get("/v1/jobs", _JOBS, params)
        for found in page.jobs:
            yield Item(found)
        if page.next is None:
            return
        params = {**params, "after": page.next}


def repositories() -> Call[RepositoryList]:
    """Those of which the ledger remembers something."""
    return _get("/v1/repositories", _REPOSITORIES)


def point_groups(repository: str) -> Call[dict[str, int]]:
    """The groups of a repository, by its id, and how many recovery points of each the ledger remembers."""
    return _get(f"/v1/repositories/{quote(repository, safe='')}/groups", _POINT_GROUPS)


def points(repository: str, group: str, *, after: int = 0) -> Conversation[PointRecord]:
    """The recovery points of a group that the ledger remembers, oldest first, page by page; `after` an epoch.

    `repository` is its id, as a scan task tells it.
    """
    path = f"/v1/repositories/{quote(repository, safe='')}/groups/{quote(group, safe='')}/points"
    while True:
        page: PointPage = yield _get(path, _POINTS, {"after": str(after), "limit": str(PAGE)})
        for found in page.points:
            yield Item(found)
        if page.next is None:
            return
        after = page.next


def apply_group(name: str, spec: GroupSpec) -> Call[GroupView]:
    """Make a consistency group, or change it from its next round on."""
    return Call("PUT", _group_path(name), _GROUP, body=spec.model_dump_json().encode(), repeatable=True)


def group(name: str) -> Call[GroupView]:
    """One group; NotFoundError if there is none of this name."""
    return _get(_group_path(name), _GROUP)


def groups() -> Call[GroupList]:
    """All groups, by name."""
    return _get("/v1/groups", _GROUP_LIST)


def remove_group(name: str) -> Call[None]:
    """Forget a group; its recovery points stay."""
    return Call("DELETE", _group_path(name), _nothing)


def act_on_group(name: str, verb: GroupVerb, *, force: bool = False) -> Call[GroupView]:
    """pause, resume or cancel a group: all of its disks, or none; with `force` also a move that has begun."""
    return Call("POST", f"{_group_path(name)}/{verb}", _GROUP, body=b'{"force":true}' if force else b"{}")


def ask_for_checkpoint(name: str, idempotency_key: str = "") -> Call[CheckpointView]:
    """Ask for a recovery point of a group that is cut after this call; see `checkpoint`, which waits for it."""
    key = idempotency_key or str(uuid.uuid4())
    headers = {"Idempotency-Key": key}
    return Call("POST", f"{_group_path(name)}/checkpoints", _CHECKPOINT, headers=headers, body=b"{}", repeatable=True)


def checkpoint(name: str, request: str) -> Conversation[CheckpointView]:
    """What became of a checkpoint that was asked for, once it is over."""
    return _until_over(f"{_group_path(name)}/checkpoints/{quote(request, safe='')}", _CHECKPOINT)


def ask_to_complete_group(
    name: str, *, pivot: bool = False, downtime_s: float = 5.0, idempotency_key: str = ""
) -> Call[CompletionView]:
    """Make a last point of a group, or let its guests go on with its targets, and have no other; see `completion`."""
    headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
    body = json.dumps({"pivot": pivot, "downtime": downtime_s}).encode()
    return Call("POST", f"{_group_path(name)}/complete", _COMPLETION, headers=headers, body=body, repeatable=True)


def completion(name: str, request: str) -> Conversation[CompletionView]:
    """What became of it, once it is over."""
    return _until_over(f"{_group_path(name)}/completions/{quote(request, safe='')}", _COMPLETION)


def events(*, after: str = "0", job: str = "", follow: bool = False) -> Conversation[Event]:
    """Events newer than `after`, of one job if `job` is given; with `follow` never ends."""
    wait_s = POLL_S if follow else 0.0
    while True:
        params = {"after": after, "job": job, "wait": f"{wait_s:g}", "limit": str(PAGE)}
        page: EventPage = yield _get("/v1/events", _EVENTS, params, wait_s)
        for event in page.events:
            yield Item(event)
        after = page.next
        if not follow and len(page.events) < PAGE:
            return


def watch(
    job_id: str, *, until: Iterable[State] = (State.CONCLUDED,), every_s: float = POLL_S
) -> Conversation[JobView]:
    """The job now, then at each change of its state and at least each `every_s`; ends with a state of `until`."""
    last = frozenset(until)
    found: JobView = yield job(job_id)
    while True:
        yield Item(found)
        if found.state in last:
            return
        found = yield _await_change(job_id, found.state, every_s)


def wait(
    job_id: str, *, until: Iterable[State] = (State.CONCLUDED,), timeout_s: float | None = None
) -> Conversation[JobView]:
    """The job once, as soon as its state is in `until`; UnavailableError after `timeout_s`."""
    last = frozenset(until)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    found: JobView = yield job(job_id)
    while found.state not in last:
        left_s = POLL_S if deadline is None else deadline - time.monotonic()
        if left_s <= 0:
            raise UnavailableError(f"job {job_id} is still {found.state} after {timeout_s:g} s", "wait for it again")
        found = yield _await_change(job_id, found.state, min(left_s, POLL_S))
    yield Item(found)


def error_of(address: str, status: int, content: bytes) -> FlushpointError:
    """The error class that a problem document (RFC 9457) names; by its status where the answer is none of ours.

    A coordinator that breaks, or a proxy before it, answers with 5xx. All else without a problem is not Flushpoint.
    """
    try:
        problem = _PROBLEM(content)
    except ValidationError:
        if status < 500 and status not in _PASSING_STATUSES:
            return no_api(address, f"status {status} without a problem document")
        kind = UnavailableError if status in _PASSING_STATUSES else FlushpointError
        return kind(f"the API answered {status} without saying why", "see the coordinator's log")
    kind = _KINDS.get(problem.code, RefusedError if status == 409 else FlushpointError)
    error = kind(problem.detail or problem.title, problem.remedy)
    error.code = problem.code or error.code
    return error


def no_api(address: str, reason: str) -> UsageError:
    """What to say where something else listens, or another version."""
    return UsageError(
        f"{address} answers, but is no Flushpoint API: {reason}",
        "check $FLUSHPOINT_API, and that client and coordinator are of the same version",
    )


class _Problem(BaseModel):
    type: Annotated[str, StringConstraints(pattern="^urn:flushpoint:")]
    """Other APIs have documents with a `code` too."""
    title: str = ""
    detail: str = ""
    remedy: str = ""
    code: str


_PROBLEM = TypeAdapter(_Problem).validate_json
_PASSING_STATUSES = frozenset({429, 502, 503, 504})
_KINDS: dict[str, type[FlushpointError]] = {
    kind.code: kind for kind in (UsageError, NotFoundError, RefusedError, UnavailableError)
}


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _until_over(path: str, read: Callable[[bytes], Ending]) -> Conversation[Ending]:
    while True:
        found: Ending = yield _get(path, read, {"wait": f"{POLL_S:g}"}, POLL_S)
        if found.is_over:
            yield Item(found)
            return


def _group_path(name: str) -> str:
    return f"/v1/groups/{quote(name, safe='')}"


def _get(
    path: str, parse: Callable[[bytes], T], params: Mapping[str, str] | None = None, wait_s: float = 0.0
) -> Call[T]:
    return Call("GET", path, parse, params=params or {}, wait_s=wait_s, repeatable=True)


def _act(job_id: str, verb: Verb, body: bytes = b"{}") -> Call[JobView]:
    return Call("POST", f"{_job_path(job_id)}/{verb}", _JOB, body=body)


def _await_change(job_id: str, state: State, wait_s: float) -> Call[JobView]:
    others = ",".join(sorted(frozenset(State) - {state}))
    params = {"wait": f"{wait_s:.3f}", "until": others}
    return _get(_job_path(job_id), _JOB, params, wait_s)


def _nothing(_: bytes) -> None:
    return None
