"""What protecting live guests costs: how long they stand still, how old points become, what is copied.

``python -m tests.bench.groups`` boots Linux guests under TCG, each of which writes all the time, and writes
docs/bench/groups.json (nothing with --quick). The floor of a freeze is what the same QMP commands take when one process
sends them to all monitors at once, with nobody to agree with: all are stopped before any is cut, and each goes on once
it is. Both are measured in turns, on the same guests.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coordinator.model.group import GroupPolicy
from coordinator.model.mirror import MirrorSpec
from tests.bench import virtnbdbackup
from tests.bench.report import machine, summary
from tests.deployment import Deployment, member_of
from tests.guest import GuestKit
from tests.live_guest import MIB, LiveDisk, LiveGuest, wandering_guest
from tests.stack import running_stack, wait_until
from workers.agent import views
from workers.agent.guest import look_at
from workers.agent.monitor import Monitor

OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "bench" / "groups.json"
SIZES = (2, 4, 8)
PIVOT_S = 5.0
INCREMENT_S = 2.0
"""For how long a guest writes before each increment."""
FLOOR_BITMAP = "floor-"
_LATENCY = re.compile(r"(\d+) us a write")


@dataclass(frozen=True, slots=True)
class Scale:
    rounds: int
    rpo_s: float
    protected_s: float
    sizes: tuple[int, ...]
    pivots: int


FULL = Scale(10, 5.0, 45.0, SIZES, 5)
QUICK = Scale(3, 2.0, 10.0, (2,), 1)


@contextmanager
def running_guests(kit: GuestKit, directory: Path, count: int) -> Iterator[list[LiveGuest]]:
    """Each with one disk, half of them with an IOThread."""
    with ExitStack() as opened:
        yield [
            opened.enter_context(
                wandering_guest(kit, directory / f"vm{n}", [LiveDisk("a", iothread=n % 2 == 0, size=256 * MIB)])
            )
            for n in range(count)
        ]


class Floor:
    """Every guest by its user's monitor; nobody else is asked."""

    def __init__(self, guests: Sequence[LiveGuest], scratch: Path) -> None:
        self._guests = guests
        self._scratch = scratch

    def freezes_ms(self) -> list[float]:
        return asyncio.run(self._cut())

    async def _cut(self) -> list[float]:
        monitors = [await Monitor.connect(guest.user) for guest in self._guests]
        try:
            looked = [await look_at(monitor) for monitor in monitors]
            prepared = [
                await views.prepare(monitor, guest, guest.disk("a"), self._scratch)
                for monitor, guest in zip(monitors, looked, strict=True)
            ]
            for monitor, view in zip(monitors, prepared, strict=True):
                old = {"node": view.disk.node, "name": f"{FLOOR_BITMAP}old", "persistent": True}
                await monitor.execute("block-dirty-bitmap-add", old)
            begun: list[float] = []

            async def stop(monitor: Monitor) -> None:
                begun.append(time.monotonic())
                for command in ("query-status", "stop", "query-block"):
                    await monitor.execute(command)

            async def go_on(monitor: Monitor, view: views.View) -> float:
                old, new = ({"node": view.disk.node, "name": f"{FLOOR_BITMAP}{name}"} for name in ("old", "new"))
                added = {"type": "block-dirty-bitmap-add", "data": {**new, "persistent": True}}
                disabled = {"type": "block-dirty-bitmap-disable", "data": old}
                await monitor.execute("transaction", {"actions": [added, disabled]})
                for command in views.inserting(view):
                    await monitor.execute(*command)
                await monitor.execute("query-status")
                await monitor.execute("cont")
                return time.monotonic()

            await asyncio.gather(*map(stop, monitors))
            ended = await asyncio.gather(*map(go_on, monitors, prepared))
            for monitor, view in zip(monitors, prepared, strict=True):
                await views.remove(monitor, view)
                for name in ("old", "new"):
                    bitmap = {"node": view.disk.node, "name": f"{FLOOR_BITMAP}{name}"}
                    await monitor.execute("block-dirty-bitmap-remove", bitmap)
            return [(end - begin) * 1000 for begin, end in zip(begun, ended, strict=True)]
        finally:
            for monitor in monitors:
                await monitor.close()


@contextmanager
def protected(directory: Path, guests: Sequence[LiveGuest], name: str, rpo_s: float) -> Iterator[Deployment]:
    """All guests as one group, on two hosts."""
    with running_stack(directory / "stack") as stack, ExitStack() as opened:
        deployment = Deployment(stack, directory)
        hosts = [opened.enter_context(deployment.host(f"hv{n}", guest)) for n, guest in enumerate(guests[:2])]
        members = [
            member_of(hosts[n % 2]).model_copy(
                update={"vm": guest.directory.name, "qmp": str(guest.monitor), "disks": ("a",)}
            )
            for n, guest in enumerate(guests)
        ]
        deployment.apply_members(name, members, GroupPolicy(freeze_timeout=5, rpo=rpo_s))
        yield deployment


def freezes(kit: GuestKit, scale: Scale, directory: Path, count: int) -> dict[str, Any]:
    """Of a group of so many machines: the longest of each round, for us and for the floor."""
    with (
        running_guests(kit, directory / "guests", count) as guests,
        protected(directory, guests, "shop", 0) as deployment,
    ):
        floor = Floor(guests, directory)
        ours, floors, skews, took = [], [], [], []
        for number in range(scale.rounds + 1):
            least = max(floor.freezes_ms())
            begun = time.monotonic()
            point = deployment.point("shop", deployment.published("shop"))
            if number == 0:  # copies the disks whole
                continue
            took.append(time.monotonic() - begun)
            floors.append(least)
            ours.append(max(one.freeze_ms for one in point.machines))
            cuts = [one.cut_at for one in point.machines]
            skews.append((max(cuts) - min(cuts)) * 1000)
    return {
        "machines": count,
        "freeze_ms": summary(ours),
        "floor_ms": summary(floors),
        "ratio_of_medians": statistics.median(ours) / statistics.median(floors),
        "skew_ms": summary(skews),
        "checkpoint_s": summary(took),
    }


class OwnIncrements:
    """QEMU's own incremental backups of a guest's disk, by a client of its user's monitor: a job from the active disk
    to a qcow2 image, by a bitmap that it clears."""

    BITMAP = "peer"

    def __init__(self, guest: LiveGuest, directory: Path) -> None:
        self._guest = guest
        self._image = directory / "increment.qcow2"

    def begin(self) -> None:
        asyncio.run(self._begin())

    def take(self) -> float:
        """Seconds until it is there."""
        begun = time.monotonic()
        asyncio.run(self._take())
        took = time.monotonic() - begun
        self._image.unlink()
        return took

    @asynccontextmanager
    async def _monitor(self) -> AsyncIterator[Monitor]:
        monitor = await Monitor.connect(self._guest.user)
        try:
            yield monitor
        finally:
            await monitor.close()

    async def _begin(self) -> None:
        async with self._monitor() as monitor:
            new = {"node": self._guest.disks[0].node, "name": self.BITMAP}
            await monitor.execute("block-dirty-bitmap-add", new)

    async def _take(self) -> None:
        async with self._monitor() as monitor:
            await views.make_image(monitor, self._image, self._guest.disks[0].size)
            await views.add_image(monitor, "increment", self._image)
            what = {"sync": "bitmap", "bitmap": self.BITMAP, "bitmap-mode": "on-success"}
            ends = {"auto-finalize": True, "auto-dismiss": False}
            arguments = {"job-id": "increment", "device": self._guest.disks[0].node, "target": "increment"}
            await monitor.execute("blockdev-backup", {**arguments, **what, **ends})
            while True:
                (job,) = await monitor.execute("query-jobs")
                if job["status"] == "concluded":
                    assert "error" not in job, job
                    break
                await asyncio.sleep(0.002)
            await monitor.execute("job-dismiss", {"id": "increment"})
            await views.delete_node(monitor, "increment")


def increments(kit: GuestKit, scale: Scale, directory: Path) -> dict[str, Any]:
    """Of one machine, in turns with QEMU's own; between two of them the guest writes for as long."""
    with (
        running_guests(kit, directory / "guests", 1) as guests,
        protected(directory, guests, "shop", 0) as deployment,
    ):
        peer = OwnIncrements(guests[0], directory)
        deployment.published("shop")
        peer.begin()
        ours, theirs, sent = [], [], []
        for _ in range(scale.rounds):
            time.sleep(INCREMENT_S)
            begun = time.monotonic()
            point = deployment.point("shop", deployment.published("shop"))
            ours.append(time.monotonic() - begun)
            sent.append(sum(member.bytes_sent for member in point.members) / MIB)
            time.sleep(INCREMENT_S)
            theirs.append(peer.take())
    return {
        "sent_mib": summary(sent),
        "seconds": summary(ours),
        "blockdev_backup_seconds": summary(theirs),
        "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
    }


def pivots(kit: GuestKit, scale: Scale, directory: Path) -> dict[str, Any]:
    """How long one machine stands still when it goes on with another image; and for how long QEMU's own mirror, which
    does not stop it, keeps its writes waiting at the end. In turns, on one guest."""
    with (
        running_guests(kit, directory / "guests", 1) as guests,
        protected(directory, guests, "shop", 0) as deployment,
    ):
        client, guest = deployment.stack.client, guests[0]
        spec = client.group("shop").spec
        ours: list[float] = []
        theirs, took = [], []
        for number in range(scale.pivots):
            mirror = MirrorSpec(targets={spec.disks[0]: str(directory / f"ours-{number}.raw")})
            client.apply_group("shop", spec.model_copy(update={"mirror": mirror}))
            begun = time.monotonic()
            asked = client.ask_to_complete_group("shop", pivot=True, downtime_s=PIVOT_S)
            ended = client.completion("shop", asked.id)
            assert ended.done, ended.why
            took.append(time.monotonic() - begun)
            ours += ended.downtimes_ms.values()
            theirs.append(asyncio.run(own_pivot(guest, directory / f"theirs-{number}.raw")))
    return {
        "downtime_ms": summary(ours),
        "complete_s": summary(took),
        "mirror_job_complete_ms": summary(theirs),
        "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
    }


async def own_pivot(guest: LiveGuest, image: Path) -> float:
    """A background mirror of QEMU's: milliseconds from job-complete until the guest is attached to the copy."""
    monitor = await Monitor.connect(guest.user)
    try:
        disk = (await look_at(monitor)).disk(guest.disks[0].name)
        with image.open("wb") as file:
            file.truncate(disk.size)
        target = {"driver": "raw", "node-name": image.stem, "file": {"driver": "file", "filename": str(image)}}
        await monitor.execute("blockdev-add", target)
        what = {"job-id": "peer", "device": disk.node, "target": image.stem, "sync": "full", "auto-dismiss": False}
        await monitor.execute("blockdev-mirror", what)
        await _until_job_is(monitor, "ready")
        begun = time.monotonic()
        await monitor.execute("job-complete", {"id": "peer"})
        await _until_job_is(monitor, "concluded")
        took_ms = (time.monotonic() - begun) * 1000
        await monitor.execute("job-dismiss", {"id": "peer"})
        return took_ms
    finally:
        await monitor.close()


async def _until_job_is(monitor: Monitor, status: str) -> None:
    async with asyncio.timeout(60):
        while True:
            (job,) = await monitor.execute("query-jobs")
            assert "error" not in job, job
            if job["status"] == status:
                return
            await asyncio.sleep(0.001)


def continuous(kit: GuestKit, scale: Scale, directory: Path, count: int) -> dict[str, Any]:
    """How old the newest point of a group becomes, and what that costs its guests."""
    with running_guests(kit, directory / "guests", count) as guests:
        without = latencies(guests, 10)
        with protected(directory, guests, "shop", scale.rpo_s) as deployment:
            client = deployment.stack.client
            wait_until(lambda: client.group("shop").point > 1, "two points", 120)
            first = client.group("shop").point
            with_it = latencies(guests, scale.protected_s)
            last = client.group("shop").point
            points = [deployment.point("shop", number) for number in range(first, last + 1)]
            missed = [event.event for event in client.events() if event.event == "RPO_MISSED"]
    ages = [later.decided_at - earlier.cut_at for earlier, later in itertools.pairwise(points)]
    members = [member for point in points[1:] for member in point.members]
    return {
        "machines": count,
        "rpo_s": scale.rpo_s,
        "points": len(points),
        "age_s": summary(ages) | {"p99": sorted(ages)[min(len(ages) - 1, int(len(ages) * 0.99))]},
        "missed": len(missed),
        "sent_per_dirtied": sum(m.bytes_sent for m in members) / sum(m.bytes_read for m in members),
        "freeze_ms": summary([one.freeze_ms for point in points for one in point.machines]),
        "write_us_without": summary(without),
        "write_us_with": summary(with_it),
    }


def latencies(guests: Sequence[LiveGuest], seconds: float) -> list[float]:
    """Means of 64 writes each, in the time that follows."""
    before = [len(_LATENCY.findall(guest.guest.console())) for guest in guests]
    time.sleep(seconds)  # what is measured goes on for as long
    return [
        float(one)
        for guest, seen in zip(guests, before, strict=True)
        for one in _LATENCY.findall(guest.guest.console())[seen:]
    ]


@contextmanager
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="flushpoint-", dir="/dev/shm") as directory:
        (Path(directory) / "guests").mkdir()
        yield Path(directory)


def measure(scale: Scale, wanted: Sequence[str]) -> dict[str, Any]:
    """Parts by their names; all, if none is wanted."""
    kit = GuestKit.get()
    parts: dict[str, Callable[[Path], Any]] = {
        **{f"freezes_{n}": partial(freezes, kit, scale, count=n) for n in scale.sizes},
        "increments": partial(increments, kit, scale),
        "virtnbdbackup": partial(virtnbdbackup.measure, kit, scale.rounds),
        "pivots": partial(pivots, kit, scale),
        "continuous": partial(continuous, kit, scale, count=min(4, max(scale.sizes))),
    }
    results: dict[str, Any] = {"machine": machine()}
    for name, part in parts.items():
        if wanted and name not in wanted:
            continue
        with place() as directory:
            results[name] = part(directory)
        print(name, json.dumps(results[name]), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds; writes no file")
    parser.add_argument("parts", nargs="*", help="such as freezes_4, increments, virtnbdbackup, pivots, continuous")
    given = parser.parse_args()
    results = measure(QUICK if given.quick else FULL, given.parts)
    if not given.quick:
        known = json.loads(OUTPUT.read_text()) if given.parts else {}
        OUTPUT.write_text(json.dumps(known | results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
