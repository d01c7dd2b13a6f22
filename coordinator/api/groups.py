"""The part of the API that is about consistency groups."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from coordinator.api.feed import EventFeed
from coordinator.ledger.contract import ConflictError, Ledger, UnreadableGroupError
from coordinator.model.epoch import checked_group
from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.group import (
    OUTCOMES_KEPT,
    GroupRecord,
    GroupSpec,
    GroupVerb,
    respecified,
    shared_disk,
    told,
    told_to_complete,
)
from coordinator.model.view import (
    CheckpointView,
    CompletionView,
    GroupView,
    view_of_checkpoint,
    view_of_completion,
    view_of_group,
)

CAS_TRIES = 20
"""A user's change competes with the control loop; each try reads the group afresh."""
REQUESTS = 1000
"""Checkpoints that may wait for one round: all are served by the next one."""


class CompleteArguments(BaseModel):
    """How a group is to end."""

    model_config = ConfigDict(extra="forbid")

    pivot: bool = False
    downtime: float = Field(default=5.0, gt=0, le=60, description="seconds for which a pivot may stop guests")


class GroupVerbBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    force: bool = Field(
        default=False, description="give a pivot up that has moved some machines: each stays where it is (cancel)"
    )


class GroupList(BaseModel):
    groups: list[GroupView]
    unreadable: dict[str, str]
    """By name, why the record of a group cannot be read."""


def add_groups(app: FastAPI, ledger: Ledger, feed: EventFeed) -> None:
    def changed(name: str, change: Callable[[GroupRecord], GroupRecord]) -> GroupRecord:
        for _ in range(CAS_TRIES):
            known = ledger.group(name)
            wanted = change(known)
            if wanted == known:
                return known
            try:
                return ledger.put_group(wanted)
            except ConflictError:
                continue
        raise ConflictError(f"group {name} changes too fast", "try again")

    @app.put("/v1/groups/{name}")
    def apply(name: str, spec: GroupSpec) -> GroupView:
        """Make the group, or change it: from its next round on. Applied again, it changes nothing."""
        wanted = GroupRecord(name=checked_group(name), spec=spec)
        for other in ledger.groups():
            if other.name != name and (disk := shared_disk(wanted, other)):
                remedy = "take it out of one of the two, and let a round end that is at work on it"
                raise RefusedError(f"{disk} is in group {other.name!r} already", remedy)
        try:
            group = changed(name, lambda known: respecified(known, spec))
        except NotFoundError:
            group = ledger.put_group(wanted)
        return view_of_group(group, time.time())

    @app.get("/v1/groups")
    def groups() -> GroupList:
        now = time.time()
        views = [view_of_group(group, now) for group in ledger.groups()]
        return GroupList(groups=views, unreadable=ledger.unreadable_groups())

    @app.get("/v1/groups/{name}")
    def group(name: str) -> GroupView:
        return view_of_group(ledger.group(name), time.time())

    @app.delete("/v1/groups/{name}", status_code=204)
    def remove(name: str) -> Response:
        """Forget a group. Its recovery points stay where they are. Where its record cannot be read nobody can go on
        with what it is at work on."""
        try:
            known = ledger.group(name)
            if known.round is not None:
                raise RefusedError(f"group {name!r} is at work on a recovery point", "wait for its end")
            if known.completing is not None:
                raise RefusedError(f"group {name!r} is completing", "wait for that, or cancel it")
            version = known.version
        except UnreadableGroupError as error:
            version = error.version
        ledger.remove_group(name, version)
        return Response(status_code=204)

    @app.post("/v1/groups/{name}/checkpoints", status_code=202)
    def checkpoint(name: str, idempotency_key: Annotated[str, Header(max_length=255)] = "") -> CheckpointView:
        """Ask for a recovery point that is cut after this call."""
        request = idempotency_key or secrets.token_hex(8)

        def asked(known: GroupRecord) -> GroupRecord:
            if known.knows(request):
                return known
            if known.paused:
                raise RefusedError(f"group {name!r} is paused", "resume it first")
            if known.completed:
                raise RefusedError(f"group {name!r} is complete", "resume it, or apply it with something else to do")
            if len(known.requests) >= REQUESTS:
                raise RefusedError(f"{REQUESTS} checkpoints of group {name!r} wait already", "wait for one of them")
            return known.model_copy(update={"requests": (*known.requests, request)})

        return _found(changed(name, asked), request)

    @app.get("/v1/groups/{name}/checkpoints/{request}")
    async def checkpoint_of(
        name: str, request: str, wait: Annotated[float, Query(ge=0, le=60)] = 0.0
    ) -> CheckpointView:
        return await feed.wait_for(lambda: _found(ledger.group(name), request), lambda found: found.is_over, "", wait)

    @app.post("/v1/groups/{name}/complete", status_code=202)
    def complete(
        name: str, asked: CompleteArguments, idempotency_key: Annotated[str, Header(max_length=255)] = ""
    ) -> CompletionView:
        """Make a last point, or let all guests go on with their targets; all of them, or none."""
        request = idempotency_key or secrets.token_hex(8)

        def told_so(known: GroupRecord) -> GroupRecord:
            return told_to_complete(known, request, pivots=asked.pivot, downtime_s=asked.downtime)

        return _found_end(changed(name, told_so), request)

    @app.get("/v1/groups/{name}/completions/{request}")
    async def completion(name: str, request: str, wait: Annotated[float, Query(ge=0, le=60)] = 0.0) -> CompletionView:
        return await feed.wait_for(
            lambda: _found_end(ledger.group(name), request), lambda found: found.is_over, "", wait
        )

    @app.post("/v1/groups/{name}/{verb}")
    def act(name: str, verb: GroupVerb, body: GroupVerbBody | None = None) -> GroupView:
        """pause: no round is begun, and the copies of one that is at work rest; resume; cancel: give up the round that
        is at work, or the end that was asked for. All of its disks, or none."""
        force = body is not None and body.force
        return view_of_group(changed(name, lambda known: told(known, verb, force=force)), time.time())


def _found_end(group: GroupRecord, request: str) -> CompletionView:
    found = view_of_completion(group, request)
    if found is None:
        raise NotFoundError(
            f"group {group.name!r} was not asked by {request!r} to complete, or was asked again since",
            f"see flushpoint group {group.name}",
        )
    return found


def _found(group: GroupRecord, request: str) -> CheckpointView:
    found = view_of_checkpoint(group, request)
    if found is None:
        raise NotFoundError(
            f"checkpoint {request!r} of group {group.name!r} is among none of its last {OUTCOMES_KEPT} rounds: how it"
            " ended is forgotten, or it was never asked for",
            f"see flushpoint points {group.name} for what was made since, or ask for a new one",
        )
    return found
