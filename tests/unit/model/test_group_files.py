"""Files of groups, and what groups must not share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from coordinator.model.epoch import Participant
from coordinator.model.errors import RefusedError, UsageError
from coordinator.model.group import (
    GroupFile,
    GroupRecord,
    GroupSpec,
    Round,
    respecified,
    share_a_machine,
    shared_disk,
    told_to_complete,
)
from coordinator.model.mirror import MirrorSpec

CONFIG = Path(__file__).parents[3] / "config"
EXAMPLE = yaml.safe_load((CONFIG / "group.yaml").read_text())
BARE = {"vm": "archive", "host": "hv2", "disks": ["data"], "images": {"data": "/archive.qcow2"}}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The example with one of its values replaced."""
    document: dict[str, Any] = json.loads(json.dumps(EXAMPLE))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = document
    for part in parents:
        place = place[part]
    place[last] = value
    return document


def test_the_example_says_what_it_seems_to() -> None:
    group = GroupFile.model_validate(EXAMPLE)
    assert group.metadata.name == "shop"
    assert group.spec.policy.freeze_timeout == 1.0
    assert group.spec.policy.hold_timeout == 600.0
    assert group.spec.disks == ("db/vda", "db/vdb", "web/vda")


def test_the_published_schema_is_that_of_the_model_and_takes_the_example() -> None:
    """After a change: flushpoint apply --schema > config/group.schema.json"""
    published = json.loads((CONFIG / "group.schema.json").read_text())
    assert published == GroupFile.schema_of_file()
    jsonschema.Draft202012Validator.check_schema(published)
    jsonschema.validate(EXAMPLE, published)


@pytest.mark.parametrize("document", [EXAMPLE, changed("spec.members.1", BARE)])
def test_a_group_reads_the_same_after_it_was_written(document: dict[str, Any]) -> None:
    group = GroupFile.model_validate(document)
    assert GroupFile.model_validate_json(group.model_dump_json()) == group
    assert '"freezeTimeout":1.0' in group.model_dump_json()


def test_agents_that_know_of_no_images_are_told_of_none_where_there_are_none() -> None:
    assert "images" not in GroupFile.model_validate(EXAMPLE).model_dump_json()


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("5s", 5.0), ("0.5 m", 30.0), ("0.001h", 3.6), (2, 2.0), (0.25, 0.25)]
)
def test_durations_are_numbers_of_seconds_or_text_with_a_unit(text: object, seconds: float) -> None:
    assert GroupFile.model_validate(changed("spec.policy.freezeTimeout", text)).spec.policy.freeze_timeout == seconds


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("apiVersion", "flushpoint/v2", "flushpoint/v1"),
        ("kind", "Pod", "ConsistencyGroup"),
        ("metadata.name", "a shop", "pattern"),
        ("spec.repository", "s3://backups/shop?group=mail", "leave those out"),
        ("spec.repository", "/srv/backups", "no repository"),
        ("spec.policy.freezeTimeout", "a moment", "no duration"),
        ("spec.policy.freezeTimeout", 0, "greater than"),
        ("spec.policy.rpo", float("inf"), "less than or equal"),
        ("spec.policy.rpo", f"{'9' * 400}s", "less than or equal"),
        ("spec.policy.rpo", "9999d", "less than or equal"),
        ("spec.policy.prepareTimeout", "2h", "less than or equal"),
        ("spec.policy.speed", "99999T", "less than or equal"),
        ("spec.members.1", {"vm": "web", "host": "hv1", "qmp": "/run/vm/db.qmp", "disks": ["vdc"]}, "one monitor"),
        ("spec.policy.freezeTimeout", "10m", "less than or equal to 60"),
        ("spec.policy.freeze", "1s", "not permitted"),
        ("spec.members", [], "at least 1"),
        ("spec.members.0.disks", [], "at least 1"),
        ("spec.members.0.disks", ["vda", "vda"], "named twice"),
        ("spec.members.1.vm", "db", "named twice"),
        ("spec.members.0.qmp", "db.qmp", "absolute path"),
        ("spec.members.0.host", "hv 1", "no name"),
        ("spec.members.0.qmp", "", "neither qmp nor images"),
        ("spec.members.0.images", {"vda": "/a"}, "vdb is no disk of it, or has no image"),
        ("spec.members.0.images", {"vda": "/a", "vdb": "/b", "vdc": "/c"}, "vdc is no disk of it, or has no image"),
        ("spec.members.0.images", {"vda": "/a", "vdb": "b"}, "relative path"),
        ("spec.members.0.images", {"vda": "/a", "vdb": "nbd://nas/b"}, "no file and no block device of hv1"),
        ("spec.members.0.images", {"vda": "/a", "vdb": "/b.vmdk"}, "not supported"),
        ("spec.members.0.images", {"vda": "/a", "vdb": "file:///x/../a?format=qcow2"}, "one image, hv1:/a"),
        ("spec.members.1", {**BARE, "disks": ["1"], "images": {"1": "/a"}}, "begin with a letter"),
        ("spec.members.1", {**BARE, "guestAgent": "/run/vm/web.qga"}, "guestAgent and no qmp"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(path: str, value: object, message: str) -> None:
    with pytest.raises((ValidationError, UsageError), match=message):
        GroupFile.model_validate(changed(path, value))


def group(*members: Participant) -> GroupRecord:
    return GroupRecord(name="group", spec=GroupSpec(repository="repo+file:///r", members=members))


def test_a_disk_is_known_by_its_monitor_however_its_machine_is_called() -> None:
    db = Participant(vm="db", host="hv1", qmp="/db", disks=("vda", "vdb"))
    same = Participant(vm="other", host="hv1", qmp="/db", disks=("vdb",))
    free = Participant(vm="db", host="hv1", qmp="/db", disks=("vdc",))
    elsewhere = Participant(vm="db", host="hv2", qmp="/db", disks=("vda",))
    assert shared_disk(group(db), group(same)) == "db/vdb"
    assert shared_disk(group(db), group(free)) == ""
    assert shared_disk(group(db), group(elsewhere)) == ""
    assert share_a_machine(group(db).spec, group(free).spec)
    assert not share_a_machine(group(db).spec, group(elsewhere).spec)


def test_a_disk_is_in_a_group_until_the_round_that_began_with_it_ends() -> None:
    db = Participant(vm="db", host="hv1", qmp="/db", disks=("vda",))
    web = Participant(vm="web", host="hv2", qmp="/web", disks=("vda",))
    begun = Round(id="r", spec=group(db, web).spec, begun_at=1.0)
    left = group(web).model_copy(update={"round": begun})
    assert shared_disk(group(db), left) == "db/vda"
    assert shared_disk(group(db), left.model_copy(update={"round": None})) == ""


def bare(vm: str, host: str, **images: str) -> Participant:
    return Participant(vm=vm, host=host, disks=tuple(images), images=images)


def test_bare_disks_are_known_by_their_images_and_are_no_machine_together() -> None:
    archive = bare("archive", "hv1", data="/a.qcow2")
    off = Participant(vm="db", host="hv1", qmp="/db", disks=("vda",), images={"vda": "file:///a.qcow2"})
    assert shared_disk(group(archive), group(off)) == "archive/data"
    assert shared_disk(group(off), group(archive)) == "db/vda"
    assert shared_disk(group(archive), group(bare("archive", "hv2", data="/a.qcow2"))) == ""
    other = bare("archive", "hv1", data="/b.qcow2")
    assert shared_disk(group(archive), group(other)) == ""
    assert not share_a_machine(group(archive).spec, group(other).spec)
    assert group(archive, bare("other", "hv1", data="/b.qcow2")).spec.disks == ("archive/data", "other/data")


def test_a_disk_stays_in_its_group_that_gets_an_image_or_a_monitor() -> None:
    running = Participant(vm="db", host="hv1", qmp="/db", disks=("vda",))
    known = running.model_copy(update={"images": {"vda": "/a.qcow2"}})
    taken = known.model_copy(update={"qmp": ""})
    for before, after in ((running, known), (known, running), (known, taken), (taken, known)):
        assert respecified(group(before), group(after).spec).leaving == ()
    assert respecified(group(running), group(taken).spec).leaving == (running,)


def test_disks_that_leave_a_group_can_be_written_to_the_ledger_and_read_again() -> None:
    both = bare("archive", "hv1", a="/a.qcow2", b="/b.qcow2")
    smaller = respecified(group(both), group(bare("archive", "hv1", a="/a.qcow2")).spec)
    assert smaller.leaving == (bare("archive", "hv1", b="/b.qcow2"),)
    assert GroupRecord.model_validate_json(smaller.model_dump_json()) == smaller


def test_bare_disks_do_not_pivot() -> None:
    spec = group(bare("archive", "hv1", data="/a.qcow2")).spec
    mirrored = spec.model_copy(update={"mirror": MirrorSpec(targets={"archive/data": "/copy"})})
    with pytest.raises(RefusedError, match="archive of group 'group' has no monitor"):
        told_to_complete(GroupRecord(name="group", spec=mirrored), "end", pivots=True, downtime_s=1.0)
    assert told_to_complete(GroupRecord(name="group", spec=mirrored), "end", pivots=False, downtime_s=1.0).completing


def test_what_a_new_spec_takes_out_of_a_group_is_remembered_until_it_comes_back() -> None:
    db = Participant(vm="db", host="hv1", qmp="/db", disks=("vda", "vdb"))
    web = Participant(vm="web", host="hv2", qmp="/web", disks=("vda",))
    smaller = respecified(group(db, web), group(db.model_copy(update={"disks": ("vda",)})).spec)
    assert smaller.leaving == (db.model_copy(update={"disks": ("vdb",)}), web)
    again = respecified(smaller, smaller.spec.model_copy(update={"repository": "repo+file:///other"}))
    assert again.leaving == smaller.leaving
    assert respecified(smaller, group(db, web).spec).leaving == ()
