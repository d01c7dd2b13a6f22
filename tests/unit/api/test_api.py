"""The API over the in-memory ledger: right status, a problem document that says what to do, nothing changed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from coordinator.api.app import make_api
from coordinator.api.feed import EventFeed
from coordinator.ledger import MemoryLedger, NewUnit
from coordinator.model.job import JobSpec, State
from coordinator.model.point import PointRecord
from coordinator.model.units import UnitKind

BODY = {"source": "/disks/a.img", "target": "/disks/b.img"}


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger()


@pytest.fixture
def api(ledger: MemoryLedger) -> Iterator[TestClient]:
    with TestClient(make_api(ledger, lambda: True, EventFeed(ledger)), raise_server_exceptions=False) as client:
        yield client


def test_a_submitted_job_is_created_and_listed(api: TestClient) -> None:
    created = api.post("/v1/jobs", json=BODY)
    assert created.status_code == 201
    job_id = created.json()["id"]
    assert created.json()["state"] == "created"
    assert [job["id"] for job in api.get("/v1/jobs").json()["jobs"]] == [job_id]
    assert api.get(f"/v1/jobs/{job_id}").json()["spec"]["source"] == BODY["source"]


def test_an_idempotency_key_makes_one_job(api: TestClient) -> None:
    first = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k"}).json()
    again = api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k"}).json()
    assert again["id"] == first["id"]
    other = api.post("/v1/jobs", json={**BODY, "speed": 1}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 409
    assert len(api.get("/v1/jobs").json()["jobs"]) == 1


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"source": "/a"}, 422, "target"),
        ({**BODY, "spede": 1}, 422, "spede"),
        ({**BODY, "speed": -1}, 422, "speed"),
        ({**BODY, "source": "relative.img"}, 422, "relative.img"),
        ({**BODY, "target": BODY["source"]}, 409, BODY["source"]),
        ({**BODY, "sync": "dirty"}, 422, "bitmap"),
    ],
)
def test_bad_bodies_are_problems_that_name_the_field(
    api: TestClient, body: dict[str, object], status: int, named: str
) -> None:
    answer = api.post("/v1/jobs", json=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert named in problem["detail"]
    assert problem["remedy"]
    assert api.get("/v1/jobs").json()["jobs"] == []


def test_unknown_things_are_404_and_illegal_verbs_409(api: TestClient) -> None:
    assert api.get("/v1/jobs/none").status_code == 404
    assert api.post("/v1/jobs/none/pause", json={}).status_code == 404
    job_id = api.post("/v1/jobs", json=BODY).json()["id"]
    refused = api.post(f"/v1/jobs/{job_id}/complete", json={})
    assert refused.status_code == 409
    assert "created" in refused.json()["detail"]
    assert api.post(f"/v1/jobs/{job_id}/explode", json={}).status_code == 422
    assert api.get(f"/v1/jobs/{job_id}").json()["state"] == "created"


def test_verbs_leave_their_mark(api: TestClient) -> None:
    job_id = api.post("/v1/jobs", json=BODY).json()["id"]
    assert api.post(f"/v1/jobs/{job_id}/pause").json()["pause_requested"] is True
    assert api.post(f"/v1/jobs/{job_id}/resume").json()["pause_requested"] is False
    assert api.post(f"/v1/jobs/{job_id}/set-speed", json={"speed": 7}).json()["speed"] == 7
    assert api.post(f"/v1/jobs/{job_id}/set-speed", json={}).status_code == 422
    assert api.post(f"/v1/jobs/{job_id}/cancel", json={"force": True}).json()["cancel_requested"] == "force"


def test_resume_makes_given_up_units_ready_again(api: TestClient, ledger: MemoryLedger) -> None:
    job_id = api.post("/v1/jobs", json=BODY).json()["id"]
    term = ledger.lead("leader", 60_000)
    assert term is not None
    ledger.adopt_run(term, 0)
    ledger.update(job_id, 1, {"state": State.RUNNING, "pass_number": 1}, new_unit=NewUnit(UnitKind.PLAN, 1))
    ledger.claim("worker", "token", 0)
    ledger.reap(term, max_attempts=1)
    ledger.update(job_id, ledger.job(job_id).version, {"state": State.PAUSED, "pause_requested": True})
    assert api.get(f"/v1/jobs/{job_id}").json()["units_quarantined"] == 1
    resumed = api.post(f"/v1/jobs/{job_id}/resume").json()
    assert (resumed["state"], resumed["units_quarantined"], resumed["units_ready"]) == ("running", 0, 1)


def test_a_long_poll_answers_when_the_state_comes(api: TestClient, ledger: MemoryLedger) -> None:
    job_id = api.post("/v1/jobs", json=BODY).json()["id"]
    answer = api.get(f"/v1/jobs/{job_id}", params={"wait": 30, "until": "created"})
    assert answer.json()["state"] == "created"
    found = ledger.job(job_id)
    ledger.update(job_id, found.version, {"state": State.RUNNING})
    assert api.get(f"/v1/jobs/{job_id}", params={"wait": 30, "until": "running,ready"}).json()["state"] == "running"
    assert api.get(f"/v1/jobs/{job_id}", params={"until": "asleep"}).status_code == 422


def test_pages_follow_one_another(api: TestClient, ledger: MemoryLedger) -> None:
    for n in range(7):
        ledger.submit(f"job{n}", JobSpec.model_validate(BODY))
    seen: list[str] = []
    after = ""
    while True:
        page = api.get("/v1/jobs", params={"limit": 3, "after": after}).json()
        seen += [job["id"] for job in page["jobs"]]
        after = page["next"]
        if after is None:
            break
    assert sorted(seen) == [f"job{n}" for n in range(7)]


def test_events_of_one_job_pass_over_the_others(api: TestClient, ledger: MemoryLedger) -> None:
    for name in ("one", "two"):
        ledger.submit(name, JobSpec.model_validate(BODY))
        ledger.update(name, ledger.job(name).version, {"state": State.RUNNING})
    page = api.get("/v1/events", params={"job": "two"}).json()
    assert {event["job"] for event in page["events"]} == {"two"}
    rest = api.get("/v1/events", params={"job": "two", "after": page["next"]}).json()
    assert rest["events"] == []
    assert api.get("/v1/events", params={"after": "yesterday"}).status_code == 422


def test_health_tells_who_leads(api: TestClient, ledger: MemoryLedger) -> None:
    health = {"status": "ok", "version": "0.1.0", "leader": True, "led": False, "workers": {}, "warnings": []}
    assert api.get("/v1/health").json() == health
    ledger.lead("another", 60_000)
    assert api.get("/v1/health").json() == {**health, "led": True}


def test_health_tells_what_the_ledgers_server_may_cost(
    api: TestClient, ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "shortcomings", lambda: ["it forgets"])
    assert api.get("/v1/health").json()["warnings"] == ["the ledger's server: it forgets"]


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("uri", ["nbd://bob:s3cret@host/disk", "nbd://host/disk?password=s3cret", "nbd://bob:s3cret"])
def test_a_secret_in_a_uri_is_refused_before_anything_is_stored(
    api: TestClient, ledger: MemoryLedger, side: str, uri: str
) -> None:
    answer = api.post("/v1/jobs", json={**BODY, side: uri}, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 422
    assert answer.json()["code"] == "usage"
    assert "s3cret" not in answer.text + str(answer.headers)
    assert ledger.jobs() == []
    assert ledger.events("0", limit=10) == []
    # The key was not used up either: the mended submission makes a job of its own.
    assert api.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": "k"}).status_code == 201


@pytest.mark.parametrize(
    "body",
    [
        {**BODY, "source": "nbd://bob:s3cret@host/" + "x" * 4096},
        {**BODY, "source": ["nbd://bob:s3cret@host/x"]},
        {**BODY, "sync": "s3cret"},
        {**BODY, "speed": "s3cret"},
        {"source": "nbd://bob:s3cret@host/x"},
        {"source": "nbd://bob:s3cret@host/x", "target": "/b", "sync": "dirty"},
        "nbd://bob:s3cret@host/x",
    ],
)
def test_what_does_not_validate_is_not_repeated(api: TestClient, body: object) -> None:
    answer = api.post("/v1/jobs", json=body)
    assert answer.status_code == 422
    assert "s3cret" not in answer.text
    assert "input" not in answer.json()


def test_points_are_told_page_by_page_as_the_ledger_remembers_them(api: TestClient, ledger: MemoryLedger) -> None:
    points = [PointRecord(group="shop", epoch=n, cut_at=1.5, decided_at=2.0, consistency="crash") for n in range(1, 6)]
    ledger.record_points("r1", "s3://bucket/p", points, ledger.points_mark())
    [known] = api.get("/v1/repositories").json()["repositories"]
    assert known == {"id": "r1", "uri": "s3://bucket/p", "scanned_at": 0.0}
    assert api.get("/v1/repositories/r1/groups").json() == {"shop": 5}
    path = "/v1/repositories/r1/groups/shop/points"
    page = api.get(path, params={"limit": 3}).json()
    assert [point["epoch"] for point in page["points"]] == [1, 2, 3]
    rest = api.get(path, params={"limit": 3, "after": page["next"]}).json()
    assert [point["epoch"] for point in rest["points"]] == [4, 5]
    assert rest["next"] is None
    assert api.get("/v1/repositories/none/groups/shop/points").json() == {"points": [], "next": None}
    assert api.get(path, params={"after": "x"}).status_code == 422
