"""The one door: jobs and events over HTTP. Handlers only check, ask the ledger and translate."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from coordinator.api import problems
from coordinator.api.feed import EventFeed
from coordinator.api.groups import add_groups
from coordinator.ledger.contract import ConflictError, Ledger, NewEvent, Versioned
from coordinator.model.errors import RefusedError, UsageError
from coordinator.model.job import JobRecord, JobSpec, State, Verb
from coordinator.model.point import PointRecord, RepositoryRecord
from coordinator.model.progress import eta_of, rate_of
from coordinator.model.step import VerbArguments, apply_verb
from coordinator.model.uri import parse
from coordinator.model.view import JobView

API_VERSION = "0.1.0"
CAS_TRIES = 20
"""A verb competes with the control loop and with movers; each try reads the job afresh."""


class VerbBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    speed: int | None = Field(default=None, ge=0, description="bytes per second, 0 is unlimited (set-speed)")
    force: bool = Field(default=False, description="do not drain requests in flight (cancel)")
    pivot: bool = Field(default=False, description="switch the guest to the copy (complete)")


class JobPage(BaseModel):
    jobs: list[JobView]
    next: str | None


class EventRecord(BaseModel):
    id: str
    time: float
    event: str
    job: str
    data: dict[str, object]


class EventPage(BaseModel):
    events: list[EventRecord]
    next: str


class RepositoryList(BaseModel):
    repositories: list[RepositoryRecord]


class PointPage(BaseModel):
    points: list[PointRecord]
    next: int | None = Field(description="the epoch to go on after; null at the end")


class Health(BaseModel):
    status: str
    version: str
    leader: bool = Field(description="the coordinator that answers leads")
    led: bool = Field(description="that one leads, or another")
    workers: dict[str, int]
    warnings: list[str] = Field(description="what the configuration of the ledger's server may cost")


def make_api(ledger: Ledger, leads: Callable[[], bool], feed: EventFeed) -> FastAPI:
    """The application. Handlers are plain functions, each blocking call in a thread of its own, of which there are
    forty; but those that wait for something to happen do so in `feed`, and use a thread only to look."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with feed.running():
            yield

    app = FastAPI(title="Flushpoint", version=API_VERSION, lifespan=lifespan)
    problems.install(app)

    def shown(versioned: Versioned) -> JobView:
        return _view(versioned.job, versioned.version)

    @app.get("/v1/health")
    def health() -> Health:
        ledger.ping()
        return Health(
            status="ok",
            version=API_VERSION,
            leader=leads(),
            led=ledger.led(),
            workers=ledger.workers(),
            warnings=[f"the ledger's server: {shortcoming}" for shortcoming in ledger.shortcomings()],
        )

    @app.post("/v1/jobs", status_code=201)
    def submit(spec: JobSpec, idempotency_key: Annotated[str, Header(max_length=255)] = "") -> JobView:
        if spec.is_of_a_group:
            raise RefusedError(f"this is a job of a group {spec.group}", "ask for a checkpoint of the group instead")
        for name in (spec.source, spec.target) if spec.task is None else ():
            parse(name)
        if spec.task is None and spec.source == spec.target:
            raise RefusedError(f"source and target are both {spec.source}", "name another target")
        job = ledger.submit(secrets.token_hex(8), spec, idempotency_key)
        return shown(ledger.job(job.id))

    @app.get("/v1/jobs")
    def jobs(after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> JobPage:
        page = ledger.jobs(after=after, limit=limit)
        return JobPage(jobs=[_view(job) for job in page], next=page[-1].id if len(page) == limit else None)

    @app.get("/v1/jobs/{job_id}")
    async def job(
        job_id: str,
        wait: Annotated[float, Query(ge=0, le=60)] = 0.0,
        until: str = State.CONCLUDED,
    ) -> JobView:
        wanted = _states(until)
        return shown(await feed.wait_for(lambda: ledger.job(job_id), lambda at: at.job.state in wanted, job_id, wait))

    @app.post("/v1/jobs/{job_id}/{verb}", response_model=None, responses={200: {"model": JobView}})
    def act(job_id: str, verb: Verb, response: Response, body: VerbBody | None = None) -> JobView | Response:
        asked = body or VerbBody()
        arguments = VerbArguments(asked.speed, asked.force, asked.pivot)
        for _ in range(CAS_TRIES):
            found = ledger.job(job_id)
            if found.job.spec.group and verb is not Verb.DISMISS:
                raise RefusedError(
                    f"job {job_id} is one of group {found.job.spec.group}, whose jobs go together",
                    f"{verb} the group instead",
                )
            step = apply_verb(found.job, verb, arguments)
            try:
                if verb is Verb.DISMISS:
                    ledger.dismiss(job_id, found.version)
                    return Response(status_code=204)
                events = [NewEvent(name, data) for name, data in step.events]
                ledger.update(
                    job_id, found.version, step.changes, events=events, retry_quarantined=step.retry_quarantined
                )
            except ConflictError:
                continue
            return shown(ledger.job(job_id))
        raise ConflictError(f"job {job_id} changes too fast to {verb}", "try again")

    add_groups(app, ledger, feed)

    @app.get("/v1/repositories")
    def repositories() -> RepositoryList:
        """Those of which the ledger remembers something. A scan task teaches it the rest."""
        return RepositoryList(repositories=ledger.repositories())

    @app.get("/v1/repositories/{repository}/groups")
    def point_groups(repository: str) -> dict[str, int]:
        """How many recovery points of each group are remembered."""
        return ledger.point_groups(repository)

    @app.get("/v1/repositories/{repository}/groups/{group}/points")
    def points(
        repository: str,
        group: str,
        after: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> PointPage:
        """Oldest first, as the ledger remembers them; what it has not been told of is found by a scan task."""
        page = ledger.points(repository, group, after=after, limit=limit)
        return PointPage(points=page, next=page[-1].epoch if len(page) == limit else None)

    @app.get("/v1/events")
    async def events(
        after: Annotated[str, Query(pattern=r"^\d+(-\d+)?$")] = "0",
        job: str = "",
        wait: Annotated[float, Query(ge=0, le=60)] = 0.0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> EventPage:
        position = after

        def look() -> EventPage:
            nonlocal position
            last = ledger.last_event_id()
            records = [EventRecord.model_validate(e) for e in ledger.events(position, limit=limit, job_id=job)]
            if records:
                position = records[-1].id
            elif job:
                position = last  # other jobs' events are passed over, once
            return EventPage(events=records, next=position)

        return await feed.wait_for(look, lambda page: bool(page.events), job, wait)

    return app


def _view(job: JobRecord, version: int = 0) -> JobView:
    now = time.time()
    fields = job.model_dump()
    return JobView(**fields, version=version, rate=rate_of(job, now), eta_s=eta_of(job, now))


def _states(text: str) -> frozenset[State]:
    try:
        return frozenset(State(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"until={text!r} names no job state", f"one or more of {', '.join(State)}") from None
