"""How a group file asks for consistent file systems and for views of a kind, and how that reaches the agents."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from coordinator.model.epoch import Consistency, EpochSpec, ViewKind
from coordinator.model.group import GroupFile, GroupRecord, GroupSpec, Round, Stage
from coordinator.model.round import Begin, Seen, next_action

MEMBER = {"vm": "db", "host": "hv1", "qmp": "/run/db.qmp", "guestAgent": "/run/db.qga", "disks": ["vda"]}


def spec(**policy: str) -> dict[str, Any]:
    return {"repository": "repo+file:///r", "policy": policy, "members": [MEMBER]}


def begun(group: GroupSpec) -> EpochSpec:
    """What its agents are told."""
    at_work = Round(id="r1", spec=group, begun_at=0.0, stage=Stage.STARTING, number=1)
    action = next_action(GroupRecord(name="shop", spec=group, round=at_work), Seen(), "r2", 1.0)
    assert isinstance(action, Begin)
    return action.spec


def test_what_a_group_file_asks_for_reaches_the_agents() -> None:
    metadata = {"name": "shop"}
    words = {"apiVersion": "flushpoint/v1", "kind": "ConsistencyGroup", "metadata": metadata}
    file = GroupFile.model_validate({**words, "spec": spec(consistency="filesystem", views="fleece")})
    told = EpochSpec.model_validate_json(begun(file.spec).model_dump_json())
    assert told.consistency is Consistency.FILESYSTEM
    assert told.views is ViewKind.FLEECE
    assert told.participants[0].guest_agent == "/run/db.qga"


def test_a_group_that_asks_for_nothing_is_crash_consistent_and_staged() -> None:
    told = begun(GroupSpec.model_validate(spec()))
    assert (told.consistency, told.views) == (Consistency.CRASH, ViewKind.STAGE)


def test_a_group_is_told_in_the_words_it_was_written_in() -> None:
    told = GroupSpec.model_validate(spec(consistency="filesystem")).model_dump(mode="json", exclude_defaults=True)
    assert told == spec(consistency="filesystem")


def test_a_guest_agent_is_a_path_of_its_host() -> None:
    with pytest.raises(ValidationError, match="guestAgent of db is no absolute path of a socket on hv1"):
        GroupSpec.model_validate({**spec(), "members": [{**MEMBER, "guestAgent": "db.qga"}]})
    with pytest.raises(ValidationError, match="consistency"):
        GroupSpec.model_validate(spec(consistency="application"))
    with pytest.raises(ValidationError, match="views"):
        GroupSpec.model_validate(spec(views="both"))
