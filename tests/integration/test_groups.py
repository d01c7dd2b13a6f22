"""Groups of live guests, from the file that people write to disks that are restored: all of it or none."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from coordinator.model.epoch import Consistency
from coordinator.model.group import GroupPolicy, GroupSpec
from coordinator.model.view import CheckpointState
from tests.deployment import FREEZE_S, Command, Deployment, member_of
from tests.group_disks import Disks
from tests.guest import GuestKit, run_guest
from tests.hosts import STEP_S, Host
from tests.live_guest import (
    MIB,
    LiveDisk,
    needs_recovery,
    running_guest,
    running_pair,
    running_with_files,
    wandering_guest,
)
from tests.stack import flushpoint, running_stack, wait_until
from workers.agent.monitor import Monitor

pytestmark = pytest.mark.needs("qemu-system-x86_64", "gcc")

POINTS = 24


@pytest.fixture(scope="module")
def deployment(module_tmpfs_path: Path) -> Iterator[Deployment]:
    with running_stack(module_tmpfs_path / "stack") as stack:
        yield Deployment(stack, module_tmpfs_path)


@pytest.fixture(scope="module")
def shop(deployment: Deployment, guest_kit: GuestKit) -> Iterator[tuple[Host, Host]]:
    """Two guests on a host each, that write in causal order, as group `shop`."""
    with ExitStack() as stack:
        disks = LiveDisk("a"), LiveDisk("b", iothread=True)
        guests = stack.enter_context(running_pair(guest_kit, deployment.directory / "pair", *disks))
        first, second = (
            stack.enter_context(deployment.host(f"hv{number}", guest)) for number, guest in enumerate(guests, 1)
        )
        deployment.apply("shop", first, second)
        yield first, second


def test_no_published_point_has_an_effect_without_its_cause(deployment: Deployment, shop: tuple[Host, Host]) -> None:
    last = 0
    for _ in range(POINTS):
        number = deployment.published("shop")
        lead, follow = (deployment.number_in("shop", number, disk) for disk in ("lead/a", "follow/b"))
        assert follow <= lead <= follow + 1
        assert lead > last, "the guests write between two cuts, or this proves nothing"
        last = lead


def test_a_point_tells_how_it_was_made(deployment: Deployment, shop: tuple[Host, Host]) -> None:
    before = deployment.published("shop")
    point = deployment.point("shop", deployment.published("shop"))
    assert [member.disk for member in point.members] == ["lead/a", "follow/b"]
    for member in point.members:
        assert (member.sync, member.parent) == ("incremental", before)
        assert member.reason == f"by bitmap flushpoint:{point.repository}:shop:{member.disk}:{before}"
        assert 0 < member.bytes_sent <= member.bytes_read < 16 * MIB
    assert [machine.vm for machine in point.machines] == ["lead", "follow"]
    for machine in point.machines:
        assert 0 < machine.freeze_ms < FREEZE_S * 1000
        assert point.cut_at <= machine.cut_at <= point.decided_at
    assert GroupSpec.model_validate(point.spec) == deployment.stack.client.group("shop").spec


KILLED_AT = (
    "between-prepare-and-prepared",
    "between-stop-and-frozen",
    "between-go-and-cut",
    "before-stage",
    "before-stage",
)


def test_a_point_equals_clones_of_the_disks_made_in_its_stop(deployment: Deployment, guest_kit: GuestKit) -> None:
    """Over cuts of which some come to nothing, and over deaths of agents and of the guest itself."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    disks = (
        LiveDisk("a", iothread=True, size=128 * MIB),
        LiveDisk("b", bus="virtio-scsi", size=128 * MIB),
        LiveDisk("c", format="raw", size=128 * MIB),
    )
    directory = deployment.directory / "three"
    for life in range(2):
        with (
            wandering_guest(guest_kit, directory, disks) as guest,
            deployment.host(f"life{life}", guest) as host,
        ):
            deployment.apply("disks", host)
            tested = Disks(deployment, host, "disks")
            tested.check(tested.cloned_point())
            for _ in range(2):
                for _ in range(dice.randrange(3)):
                    deployment.published("disks")
                for _ in range(dice.randrange(1, 3)):
                    tested.aborted(dice.choice(KILLED_AT))
                    guest.wait_until_it_writes()
                tested.check(tested.cloned_point())


@pytest.mark.needs("mount")
def test_a_disk_far_larger_than_its_scratch_is_protected_while_it_is_written(
    deployment: Deployment, guest_kit: GuestKit
) -> None:
    """In parts, of which one that fails is copied again and no other."""
    disk = LiveDisk("a", iothread=True, size=256 * MIB)
    directory, small = deployment.directory / "large", deployment.directory / "small"
    for one in (directory, small):
        one.mkdir()
    filled = directory / "filled"
    filled.write_bytes(os.urandom(disk.size))
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(filled), str(disk.image(directory))],
        check=True,
        timeout=60,
    )
    filled.unlink()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={64 * MIB}", "none", str(small)], check=True)
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "--lazy", str(small)], check=True)
        guest = stack.enter_context(wandering_guest(guest_kit, directory, [disk], "stroll"))
        host = stack.enter_context(deployment.host("narrow", guest))
        scratch = {"FLUSHPOINT_SCRATCH_DIR": str(small), "FLUSHPOINT_SCRATCH_RESERVE": str(MIB)}
        host.start_agent(environ=scratch)
        policy = GroupPolicy(freeze_timeout=FREEZE_S, prepare_timeout=10)
        deployment.apply_members("large", [member_of(host)], policy)
        client = deployment.stack.client
        asked = client.ask_for_checkpoint("large")
        wait_until(lambda: bool(client.group("large").seeding), "a part to be copied", 60)
        host.end_agent()
        assert deployment.ended(asked).state is CheckpointState.FAILED
        tested = Disks(deployment, host, "large", scratch)
        tested.aborted("before-stage")
        ((copied, size),) = client.group("large").seeding.values()
        assert 0 < copied < size == disk.size
        assert "seeding, " in Command(deployment)("points", "large", "--repository", deployment.repository)

        first = deployment.point("large", deployment.published("large"))
        assert [member.disk for member in first.members] == ["large/a"]
        assert client.group("large").seeding == {}
        steps = [deployment.point("large", number) for number in range(first.members[0].parent, first.epoch)]
        assert all(copied <= step.seeding[0].seeded < size for step in steps if step.is_point)
        guest.wait_until_it_writes()
        tested.check(tested.cloned_point())

        (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - 12 * MIB))
        for _ in range(4):  # four MiB each
            guest.wait_until_it_writes()
        asked = client.ask_for_checkpoint("large")
        wait_until(lambda: bool(client.group("large").seeding), "a part to be copied anew", 60)
        (small / "filler").unlink()
        again = deployment.point("large", deployment.ended(asked).point)
        step = deployment.point("large", again.members[0].parent)
        while step.seeding[0].reason.startswith("by bitmap"):
            step = deployment.point("large", step.seeding[0].parent)
        assert step.seeding[0].reason.startswith("the scratch directory has no room for all that was written")


def test_a_group_by_its_file_and_commands(deployment: Deployment, shop: tuple[Host, Host], tmp_path: Path) -> None:
    run = Command(deployment)
    members = [member_of(host).model_dump(mode="json") for host in shop]
    spec = {
        "repository": deployment.repository,
        "policy": {"freezeTimeout": f"{FREEZE_S}s", "prepareTimeout": "10s"},
        "members": members,
    }
    document = {"apiVersion": "flushpoint/v1", "kind": "ConsistencyGroup", "metadata": {"name": "shop"}, "spec": spec}
    file = tmp_path / "shop.yaml"
    file.write_text(yaml.safe_dump(document))
    assert run("apply", "-f", file) == "shop  unchanged\n"
    spec["policy"]["retention"] = {"last": 3}  # type: ignore[index]
    file.write_text(yaml.safe_dump(document))
    assert "policy.retention.last: 0 -> 3" in run("apply", "--dry-run", "-f", file)
    told = json.loads(run("apply", "-f", file, "--json"))["groups"]
    assert told == [{"group": "shop", "changes": {"policy.retention.last": [0, 3]}}]
    assert run("apply", "-f", file) == "shop  unchanged\n"
    wait_until(lambda: len(json.loads(run("points", "shop", "--json"))) == 3, "all but three points to go", 60)

    assert run("pause", "shop") == "shop  paused\n"
    assert "resume it first" in run("checkpoint", "shop", code=3).lower()
    run("resume", "shop")
    assert "at most 100.0 MiB/s" in run("set-speed", "shop", "100M")
    point = run("checkpoint", "shop").strip()
    number = int(point.removeprefix("shop@"))
    assert ["shop", str(number)] in [line.split()[:2] for line in run("groups").splitlines()]
    assert "published" in run("group", "shop").splitlines()[-1]
    assert json.loads(run("points", "shop", "--json"))[-1]["epoch"] == number
    assert "at work on no recovery point" in run("cancel", "shop", code=3)

    run("verify", point)
    run("restore", point, "--to", f"{tmp_path}/back/")
    for disk in ("lead/a", "follow/b"):
        assert (tmp_path / "back" / f"{disk}.raw").read_bytes() == deployment.bytes_of("shop", number, disk)
    run("apply", "-f", file)


def test_a_disk_of_a_guest_is_mirrored_as_a_group_of_its_own(deployment: Deployment, shop: tuple[Host, Host]) -> None:
    first, _ = shop
    run = Command(deployment)
    run("delete", "shop")  # which has that disk
    where = f"qmp={first.guest.monitor}&host={first.name}"
    words = ("mirror", f"qemu+unix:///a?{where}", deployment.repository, "--name", "solo")
    run(*words, "--detach")
    made = deployment.stack.client.group("solo").spec
    assert [member.model_dump(exclude_defaults=True) for member in made.members] == [
        {"vm": first.guest.monitor.stem, "host": first.name, "qmp": str(first.guest.monitor), "disks": ("a",)}
    ]
    deployment.apply_members("solo", made.members, GroupPolicy(freeze_timeout=FREEZE_S, prepare_timeout=10))
    run(*words)
    number = int(run(*words, "--speed", "500M").strip().removeprefix("solo@"))
    (member,) = deployment.point("solo", number).members
    assert 0 < member.parent < number
    assert "bitmap" in member.reason
    assert deployment.number_in("solo", number, member.disk) > 0
    policy = deployment.stack.client.group("solo").spec.policy
    assert (policy.freeze_timeout, policy.speed) == (FREEZE_S, 500 * MIB), "what it was, and what was asked for"
    assert "of other disks" in run("mirror", f"qemu+unix:///b?{where}", *words[2:], code=2)
    assert "--overwrite does not go with" in run(*words, "--overwrite", code=2)
    assert "is no repository" in run(*words[:2], "/copy.raw", code=2)
    run("complete", "solo")  # or its bitmaps would stay
    run("delete", "solo")
    deployment.apply("shop", *shop)


def test_points_follow_one_another_in_time(deployment: Deployment, shop: tuple[Host, Host]) -> None:
    client = deployment.stack.client
    before = client.group("shop")
    policy = before.spec.policy.model_copy(update={"rpo": 4.0})
    client.apply_group("shop", before.spec.model_copy(update={"policy": policy}))
    wait_until(lambda: client.group("shop").point >= before.point + 3, "three points", 60)
    after = client.apply_group("shop", before.spec)
    cuts = [outcome.cut_at for outcome in after.outcomes if outcome.number > before.point]
    assert all(0 < later - earlier < 4 for earlier, later in itertools.pairwise(cuts))


@pytest.mark.needs("mke2fs", "dumpe2fs", "e2fsck")
def test_a_point_tells_whether_all_of_its_file_systems_were_frozen(
    deployment: Deployment, guest_kit: GuestKit, guest_agent: Mapping[str, bytes], tmp_path: Path
) -> None:
    with (
        running_with_files(guest_kit, guest_agent, deployment.directory / "files") as quiet,
        running_guest(guest_kit, deployment.directory / "other", [LiveDisk("a")]) as other,
        deployment.host("hv8", quiet) as first,
        deployment.host("hv9", other) as second,
    ):
        deployment.apply("quiet", first, consistency=Consistency.FILESYSTEM)
        point = deployment.point("quiet", deployment.published("quiet"))
        assert point.consistency == "filesystem"
        image = tmp_path / "image"
        image.write_bytes(deployment.bytes_of("quiet", point.epoch, "files/v0"))
        assert not needs_recovery(image)

        deployment.apply("quiet", first, second, consistency=Consistency.FILESYSTEM)
        point = deployment.point("quiet", deployment.published("quiet"))
        assert point.consistency == "crash"
        told = [(machine.filesystem_consistent, machine.fallback) for machine in point.machines]
        assert told == [(True, ""), (False, "no guest agent is named")]
    boot_all(deployment, guest_kit, f"quiet@{point.epoch}", {"files": MOUNTED, "other": READ})


MOUNTED = """\
mount /dev/vda /mnt
test -e /mnt/1
echo tried > /mnt/tried
umount /mnt
"""
READ = "dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null\ndd if=/dev/zero of=/dev/vda bs=4k count=1 2>/dev/null\n"


def boot_all(deployment: Deployment, kit: GuestKit, point: str, scripts: Mapping[str, str]) -> None:
    """Every machine of a point on the drives that `serve` tells, by the names of the machines; each may write."""
    command = Command(deployment)
    with command.started("serve", point, "--writable", deployment.directory / "trial") as serving:
        assert serving.stdout is not None
        uris = [serving.stdout.readline().strip() for _ in scripts]
        assert len({uri.partition("?")[0] for uri in uris}) == len(scripts)
        for (vm, script), uri in zip(scripts.items(), uris, strict=True):
            assert f"/{vm}/" in uri
            directory = deployment.directory / f"boot-{vm}"
            directory.mkdir()
            run_guest(kit.command(kit.initramfs(directory, script), [f"file={uri},format=raw"]), directory / "console")
    assert "damage" not in command.says("verify", point)


def bitmaps_of(host: Host) -> list[str]:
    """Of its guest's one disk, whose monitor the agent holds."""
    (disk,) = host.guest.disks
    uri = f"qemu+unix:///{disk.name}?qmp={host.guest.user}"
    described = json.loads(flushpoint("bitmap", "query", uri, "--json").stdout)
    return [one["name"] for one in described["bitmaps"]]


def test_a_group_that_is_complete_has_a_last_point_and_leaves_nothing_in_its_guests(
    deployment: Deployment, shop: tuple[Host, Host]
) -> None:
    deployment.apply("shop", *shop)
    before = deployment.published("shop")
    run = Command(deployment)
    told = run("complete", "shop")
    assert told == f"shop@{before + 1}  complete\n"
    lead, follow = (deployment.number_in("shop", before + 1, disk) for disk in ("lead/a", "follow/b"))
    assert follow <= lead <= follow + 1
    for host in shop:
        wait_until(lambda host=host: bitmaps_of(host) == [], "its bitmaps to go", STEP_S)  # type: ignore[misc]
    assert "is complete" in run("checkpoint", "shop", code=3)
    run("resume", "shop")
    assert "has no targets" in run("complete", "shop", "--pivot", code=3)
    point = deployment.point("shop", deployment.published("shop"))
    assert {member.reason for member in point.members} == {
        f"no bitmap records what was written since point {before + 1}"
    }


def test_a_machine_leaves_a_group_and_comes_back(deployment: Deployment, shop: tuple[Host, Host]) -> None:
    first, second = shop

    def bitmaps() -> list[str]:
        return bitmaps_of(second)

    deployment.apply("shop", first, second)
    before = deployment.published("shop")
    wait_until(lambda: len(bitmaps()) == 1, "the bitmap of the newest point alone", STEP_S)
    deployment.apply("shop", first)
    alone = deployment.point("shop", deployment.published("shop"))
    assert [member.disk for member in alone.members] == ["lead/a"]
    wait_until(lambda: bitmaps() == [], "its bitmaps to go", STEP_S)
    deployment.apply("shop", first, second)
    point = deployment.point("shop", deployment.published("shop"))
    returned = point.member("follow/b")
    assert returned is not None
    assert (returned.parent, returned.sync) == (before, "incremental")
    assert returned.reason == f"no bitmap records what was written since point {before}"
    lead, follow = (deployment.number_in("shop", point.epoch, disk) for disk in ("lead/a", "follow/b"))
    assert follow <= lead <= follow + 1


def test_a_disk_that_grew_is_compared_and_has_its_point(deployment: Deployment, shop: tuple[Host, Host]) -> None:
    first, second = shop
    deployment.apply("shop", first, second)
    deployment.published("shop")

    async def grow() -> None:
        monitor = await Monitor.connect(second.guest.user, allowed=frozenset({"block_resize"}))
        try:
            await monitor.execute("block_resize", {"node-name": "b-node", "size": 96 * MIB})
        finally:
            await monitor.close()

    asyncio.run(grow())
    point = deployment.point("shop", deployment.published("shop"))
    grown = point.member("follow/b")
    assert grown is not None
    assert (grown.size, grown.reason) == (96 * MIB, "the disk has changed its size")
    lead, follow = (deployment.number_in("shop", point.epoch, disk) for disk in ("lead/a", "follow/b"))
    assert follow <= lead <= follow + 1
    later = deployment.point("shop", deployment.published("shop")).member("follow/b")
    assert later is not None
    assert later.reason.startswith("by bitmap")
