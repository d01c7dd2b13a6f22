"""Requests that wait for something to happen: woken by it alone, in nobody's way, sent away when the API ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from coordinator.api import feed as feed_module
from coordinator.api.app import make_api
from coordinator.api.feed import EventFeed
from coordinator.ledger import MemoryLedger
from coordinator.model.job import JobSpec, State

SPEC = JobSpec(source="/disks/a.img", target="/disks/b.img")
THREADS = 40
"""What anyio gives the handlers of an application together."""


class Api:
    """The application in this event loop, over a ledger that tells when it was looked at."""

    def __init__(self, client: httpx.AsyncClient, ledger: MemoryLedger, feed: EventFeed) -> None:
        self.client = client
        self.ledger = ledger
        self.feed = feed
        self.looks = threading.Semaphore(0)
        real_job, real_events = ledger.job, ledger.events

        def job(job_id: str) -> object:
            self.looks.release()
            return real_job(job_id)

        def events(after: str, *, limit: int, job_id: str = "", wait_s: float = 0.0) -> object:
            if job_id:
                self.looks.release()
            return real_events(after, limit=limit, job_id=job_id, wait_s=wait_s)

        ledger.__dict__.update(job=job, events=events)

    def get(self, path: str, **params: object) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(self.client.get(path, params={k: str(v) for k, v in params.items()}))

    async def looked(self, times: int) -> None:
        """Wait until the ledger was looked at so often since the last call."""
        for _ in range(times):
            while not self.looks.acquire(blocking=False):
                await asyncio.sleep(0)


@asynccontextmanager
async def running_api() -> AsyncIterator[Api]:
    ledger = MemoryLedger()
    ledger.submit("job", SPEC)
    feed = EventFeed(ledger)
    app = make_api(ledger, lambda: True, feed)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://flushpoint", timeout=60) as client,
    ):
        yield Api(client, ledger, feed)


def in_api(test: Callable[[Api], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(30), running_api() as api:
            await test(api)

    asyncio.run(run())


@pytest.fixture(autouse=True)
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an event, or the end, can end a wait."""
    monkeypatch.setattr(feed_module, "LOOK_AGAIN_S", 60.0)


def test_a_wait_ends_with_the_event_of_its_job() -> None:
    async def test(api: Api) -> None:
        of_job = api.get("/v1/jobs/job", wait=60, until="running")
        of_all = api.get("/v1/events", wait=60, after=api.ledger.last_event_id())
        await api.looked(1)
        api.ledger.update("job", 1, {"state": State.RUNNING})
        assert (await of_job).json()["state"] == "running"
        assert [event["data"]["status"] for event in (await of_all).json()["events"]] == ["running"]

    in_api(test)


def test_an_event_wakes_nobody_who_waits_for_another_job() -> None:
    async def test(api: Api) -> None:
        waits = api.get("/v1/jobs/job", wait=60)
        await api.looked(1)
        api.ledger.submit("other", SPEC)
        of_all = api.get("/v1/events", wait=60, after=api.ledger.last_event_id())
        api.ledger.update("other", 1, {"state": State.RUNNING})
        await of_all
        api.ledger.update("job", 1, {"state": State.CONCLUDED})
        await waits
        await api.looked(1)
        assert not api.looks.acquire(blocking=False), "looked for the sake of another job"

    in_api(test)


def test_any_number_of_requests_that_wait_hold_up_no_other() -> None:
    async def test(api: Api) -> None:
        waiting = [api.get("/v1/jobs/job", wait=60) for _ in range(THREADS)]
        waiting += [api.get("/v1/events", wait=60, job="job", after="9999999999999") for _ in range(THREADS)]
        await api.looked(THREADS)
        paused = await asyncio.wait_for(api.client.post("/v1/jobs/job/pause"), 5)
        assert paused.json()["pause_requested"]
        assert not any(task.done() for task in waiting)
        api.feed.close()
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {503}

    in_api(test)


def test_the_end_of_the_api_sends_away_who_waits_and_says_that_it_may_ask_again() -> None:
    async def test(api: Api) -> None:
        waits = api.get("/v1/jobs/job", wait=60)
        await api.looked(1)
        api.feed.close()
        for answer in (await waits, await api.get("/v1/events", wait=60, after="9999999999999")):
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert answer.json()["remedy"]
        assert (await api.get("/v1/jobs/job", wait=60, until="created")).status_code == 200, "it need not wait"

    in_api(test)


def test_a_request_that_is_cancelled_says_that_it_may_be_made_again() -> None:
    async def test(api: Api) -> None:
        waits = api.get("/v1/jobs/job", wait=60)
        await api.looked(1)
        waits.cancel()
        answer = await waits
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")

    in_api(test)


def test_a_ledger_that_was_away_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises; and who waits looks for itself, for the event may have been missed."""
    monkeypatch.setattr(feed_module, "RETRY_S", 0.01)

    async def test(api: Api) -> None:
        last_event_id = api.ledger.last_event_id
        troubles = [ZeroDivisionError("a bug")]

        def fail_once() -> str:
            if troubles and threading.current_thread().name == "events":
                raise troubles.pop()
            return last_event_id()

        api.ledger.__dict__.update(last_event_id=fail_once)
        events = api.ledger.events

        def fail_once_too(*args: object, **kwargs: object) -> object:
            if troubles and threading.current_thread().name == "events":
                raise troubles.pop()
            return events(*args, **kwargs)

        api.ledger.__dict__.update(events=fail_once_too)
        waits = api.get("/v1/jobs/job", wait=60, until="running")
        await api.looked(1)
        api.ledger.submit("other", SPEC)  # ends the read that the reader is at
        while troubles:
            await asyncio.sleep(0)
        api.ledger.update("job", 1, {"state": State.RUNNING})
        assert (await waits).json()["state"] == "running"

    in_api(test)
