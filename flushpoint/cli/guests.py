"""`flushpoint mirror` of a live guest's disk: a group of that disk alone, made when it is first copied."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from coordinator.model.epoch import Participant
from coordinator.model.errors import UsageError
from coordinator.model.group import GroupPolicy, GroupSpec
from coordinator.model.guest_uri import parse_guest_disk
from coordinator.model.repository_uri import is_repository, parse_repository
from flushpoint.cli import groups

if TYPE_CHECKING:
    from flushpoint.client import Client


def group_of(source: str, target: str, name: str, speed: int) -> tuple[str, GroupSpec]:
    """What the group is called, and what it is. UsageError."""
    disk = parse_guest_disk(source)
    if not is_repository(target):
        raise UsageError(
            f"{target} is no repository, and a live guest's disk is copied as recovery points",
            "name s3://bucket/prefix or repo+file:///dir, or give a group mirror.targets: flushpoint apply --schema",
        )
    uri = parse_repository(target)
    if replace(uri.repository, group=uri.group) != uri:
        raise UsageError(f"{target} names a disk or a point", "leave them out: it is called as its guest calls it")
    host = disk.host or socket.gethostname()
    member = Participant(vm=disk.vm, host=host, qmp=disk.qmp, disks=(disk.device,))
    spec = GroupSpec(repository=str(uri.repository), policy=GroupPolicy(speed=speed), members=(member,))
    return name or uri.group or disk.device, spec


def mirror(client: Client, name: str, spec: GroupSpec, *, detach: bool, as_json: bool) -> None:
    """A point of the group, which is made if there is none. One that is there keeps its policy, but for a speed that is
    asked for. UsageError if it is of other disks."""
    found = groups.known(client, name)
    if found is not None:
        if (found.spec.members, found.spec.repository) != (spec.members, spec.repository):
            raise UsageError(
                f"there is a group {name} of other disks, or with another repository",
                f"choose another with --name, or ask for a point of that one: flushpoint checkpoint {name}",
            )
        speed = spec.policy.speed or found.spec.policy.speed
        spec = found.spec.model_copy(update={"policy": found.spec.policy.model_copy(update={"speed": speed})})
    if found is None or found.spec != spec:
        client.apply_group(name, spec)
    groups.make_point(client, name, detach=detach, as_json=as_json)
