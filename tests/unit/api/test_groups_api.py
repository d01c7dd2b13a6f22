"""Groups over the API: applied, looked at, asked for checkpoints; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from coordinator.api.app import make_api
from coordinator.api.feed import EventFeed
from coordinator.ledger import MemoryLedger
from coordinator.model.complete import Completing, Completion
from coordinator.model.group import OUTCOMES_KEPT, Outcome, Round

MEMBER = {"vm": "db", "host": "hv1", "qmp": "/run/db.qmp", "disks": ["vda"]}
SPEC: dict[str, Any] = {"repository": "repo+file:///r", "policy": {"freezeTimeout": "2s"}, "members": [MEMBER]}


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger()


@pytest.fixture
def api(ledger: MemoryLedger) -> Iterator[TestClient]:
    with TestClient(make_api(ledger, lambda: True, EventFeed(ledger)), raise_server_exceptions=False) as client:
        yield client


def test_a_group_is_applied_once_however_often_that_is_asked(api: TestClient, ledger: MemoryLedger) -> None:
    first = api.put("/v1/groups/shop", json=SPEC).json()
    assert first["spec"]["policy"]["freezeTimeout"] == 2.0
    assert api.put("/v1/groups/shop", json=SPEC).json() == first
    changed = api.put("/v1/groups/shop", json={**SPEC, "policy": {}}).json()
    assert changed["version"] == first["version"] + 1
    assert api.get("/v1/groups/shop").json() == changed
    assert api.get("/v1/groups").json() == {"groups": [changed], "unreadable": {}}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "repository"),
        ({**SPEC, "members": []}, "members"),
        ({**SPEC, "policy": {"freezeTimeout": "soon"}}, "soon"),
        ({**SPEC, "members": [MEMBER, MEMBER]}, "named twice"),
        ({**SPEC, "repository": "/r"}, "/r"),
        ({**SPEC, "mirror": True}, "mirror"),
    ],
)
def test_a_bad_spec_is_a_problem_that_names_what_is_wrong(
    api: TestClient, ledger: MemoryLedger, body: dict[str, Any], named: str
) -> None:
    answer = api.put("/v1/groups/shop", json=body)
    assert answer.status_code == 422
    assert named in answer.json()["detail"]
    assert ledger.groups() == []


def test_a_group_is_called_by_a_name(api: TestClient) -> None:
    assert api.put("/v1/groups/a%20shop", json=SPEC).status_code == 422
    assert api.get("/v1/groups/shop").status_code == 404


def test_a_disk_is_in_one_group(api: TestClient) -> None:
    api.put("/v1/groups/shop", json=SPEC)
    answer = api.put("/v1/groups/mail", json=SPEC)
    assert answer.status_code == 409
    assert answer.json()["detail"] == "db/vda is in group 'shop' already"
    assert api.put("/v1/groups/mail", json={**SPEC, "members": [{**MEMBER, "disks": ["vdb"]}]}).status_code == 200


def test_a_checkpoint_is_asked_for_and_looked_after(api: TestClient, ledger: MemoryLedger) -> None:
    api.put("/v1/groups/shop", json=SPEC)
    headers = {"Idempotency-Key": "k"}
    asked = api.post("/v1/groups/shop/checkpoints", headers=headers)
    assert (asked.status_code, asked.json()["state"]) == (202, "waiting")
    assert api.post("/v1/groups/shop/checkpoints", headers=headers).json() == asked.json()
    group = ledger.group("shop")
    assert group.requests == ("k",)
    running = Round(id="r", spec=group.spec, begun_at=1.0, requests=("k",))
    group = ledger.put_group(group.model_copy(update={"requests": (), "round": running}))
    found = api.get("/v1/groups/shop/checkpoints/k").json()
    assert (found["state"], found["stage"]) == ("running", "opening")
    assert api.delete("/v1/groups/shop").status_code == 409
    over = Outcome(round="r", requests=("k",), number=3, published=True, begun_at=1.0, ended_at=2.0)
    ledger.put_group(group.model_copy(update={"round": None, "outcomes": (over,)}))
    found = api.get("/v1/groups/shop/checkpoints/k?wait=10").json()
    assert (found["state"], found["point"]) == ("published", 3)
    assert api.post("/v1/groups/shop/checkpoints", headers=headers).json() == found
    assert api.get("/v1/groups/shop/checkpoints/other").status_code == 404
    assert api.post("/v1/groups/none/checkpoints").status_code == 404


def test_a_checkpoint_of_long_ago_is_not_said_to_have_never_been_asked_for(
    api: TestClient, ledger: MemoryLedger
) -> None:
    api.put("/v1/groups/shop", json=SPEC)
    asked = Outcome(round="r", requests=("k",), number=1, published=True, begun_at=1.0, ended_at=2.0)
    later = asked.model_copy(update={"requests": ()})
    group = ledger.group("shop")
    ledger.put_group(group.model_copy(update={"outcomes": (asked, *[later] * (OUTCOMES_KEPT - 1))}))
    assert api.get("/v1/groups/shop/checkpoints/k").json()["state"] == "published"
    ledger.put_group(ledger.group("shop").model_copy(update={"outcomes": (later,) * OUTCOMES_KEPT}))
    answer = api.get("/v1/groups/shop/checkpoints/k")
    assert answer.status_code == 404
    assert answer.json()["detail"] == (
        "checkpoint 'k' of group 'shop' is among none of its last 20 rounds: how it ended is forgotten, or it was never"
        " asked for"
    )
    assert "flushpoint points shop" in answer.json()["remedy"]


def test_a_groups_end_is_asked_for_once_and_looked_after(api: TestClient, ledger: MemoryLedger) -> None:
    api.put("/v1/groups/shop", json=SPEC)
    refused = api.post("/v1/groups/shop/complete", json={"pivot": True})
    assert (refused.status_code, "has no targets" in refused.json()["detail"]) == (409, True)
    mirror = {"targets": {"db/vda": "/copies/vda"}, "staged": True}
    api.put("/v1/groups/shop", json={**SPEC, "mirror": mirror})
    assert "are staged" in api.post("/v1/groups/shop/complete", json={"pivot": True}).json()["detail"]
    api.put("/v1/groups/shop", json={**SPEC, "mirror": {**mirror, "staged": False}})
    assert api.post("/v1/groups/shop/complete", json={"downtime": 100}).status_code == 422

    headers = {"Idempotency-Key": "k"}
    asked = api.post("/v1/groups/shop/complete", json={"pivot": True, "downtime": 2.5}, headers=headers)
    assert (asked.status_code, asked.json()["is_over"]) == (202, False)
    assert api.post("/v1/groups/shop/complete", json={"pivot": True}, headers=headers).json() == asked.json()
    assert "completing already" in api.post("/v1/groups/shop/complete", json={}).json()["detail"]
    completing = ledger.group("shop").completing
    assert completing is not None
    assert completing.downtime_s == 2.5
    assert api.get("/v1/groups/shop").json()["completing"]["passes"] == 0

    api.post("/v1/groups/shop/cancel")
    found = api.get("/v1/groups/shop/completions/k?wait=10").json()
    assert (found["is_over"], found["done"], found["why"]) == (True, False, "cancelled by its user")
    assert api.get("/v1/groups/shop/completions/other").status_code == 404
    api.post("/v1/groups/shop/pause")
    assert "is paused" in api.post("/v1/groups/shop/complete", json={}).json()["detail"]


def test_what_a_group_is_told_after_its_end(api: TestClient, ledger: MemoryLedger) -> None:
    spec = {**SPEC, "mirror": {"targets": {"db/vda": "/copies/vda"}}}
    api.put("/v1/groups/shop", json=spec)
    over = {
        "completed": True,
        "completion": Completion(id="k", done=True, pivoted=True, point=7),
        "live": ("/copies/vda",),
    }
    ledger.put_group(ledger.group("shop").model_copy(update=over))
    for words in ("checkpoints", "complete"):
        assert "is complete" in api.post(f"/v1/groups/shop/{words}", json={}).json()["detail"]
    assert "run on its targets" in api.post("/v1/groups/shop/resume").json()["detail"]
    api.put("/v1/groups/shop", json=spec)
    assert ledger.group("shop").completed, "applied again, it has nothing new to do"
    api.put("/v1/groups/shop", json={**SPEC, "policy": {"rpo": 5}})
    assert not ledger.group("shop").completed


def test_a_move_that_has_begun_is_given_up_by_force_alone(api: TestClient, ledger: MemoryLedger) -> None:
    api.put("/v1/groups/shop", json={**SPEC, "mirror": {"targets": {"db/vda": "/copies/vda"}}})
    torn = Completing(id="k", pivots=True, went=True)
    ledger.put_group(ledger.group("shop").model_copy(update={"completing": torn}))
    for body in ({}, {"force": False}):
        refused = api.post("/v1/groups/shop/cancel", json=body)
        assert refused.status_code == 409
        assert "cancel it by force" in refused.json()["detail"] + refused.json().get("remedy", "")
    assert api.post("/v1/groups/shop/cancel", json={"forced": True}).status_code == 422
    assert api.post("/v1/groups/shop/cancel", json={"force": True}).status_code == 200
    found = api.get("/v1/groups/shop/completions/k").json()
    assert (found["is_over"], found["done"]) == (True, False)
    assert "some machines may run on their targets" in found["why"]
    assert "run on its targets" in api.post("/v1/groups/shop/resume").json()["detail"], "no pass may write them"


def test_targets_are_named_for_all_disks_and_once(api: TestClient) -> None:
    for targets, said in (
        ({"db/vdx": "/copies/vda"}, "no disk of the group"),
        ({}, "at least 1"),
        ({"db/vda": "repo+file:///r"}, "no path and no NBD export"),
        ({"db/vda": "relative"}, "relative path"),
    ):
        answer = api.put("/v1/groups/shop", json={**SPEC, "mirror": {"targets": targets}})
        assert answer.status_code in (400, 422), answer.json()
        assert said in answer.text, answer.text


def test_a_group_is_forgotten(api: TestClient) -> None:
    api.put("/v1/groups/shop", json=SPEC)
    assert api.delete("/v1/groups/shop").status_code == 204
    assert api.delete("/v1/groups/shop").status_code == 404


def test_jobs_of_groups_are_made_by_groups_alone(api: TestClient, ledger: MemoryLedger) -> None:
    part = {"number": 1, "owner": "me", "parent": 0, "since": 0, "cut_at": 1.0}
    bodies: list[dict[str, Any]] = [
        {"source": "/a", "target": "repo+file:///r?group=shop&disk=db/vda", "part": part},
        {"task": {"kind": "abandon-epoch", "repository": "repo+file:///r", "group": "shop", "owner": "me"}},
    ]
    bodies[1]["task"] |= {"number": 1, "why": "because"}
    bodies.append({**bodies[0], "target": "repo+file:///r"})
    bodies.append({"source": "/a", "target": "/b", "of_group": "shop"})
    for body in bodies:
        answer = api.post("/v1/jobs", json=body)
        assert answer.status_code == 409, answer.json()
        assert "job of a group" in answer.json()["detail"]
    assert api.post("/v1/jobs", json={"task": "x"}).status_code == 422
    assert ledger.jobs() == []
