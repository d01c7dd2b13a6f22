"""A machine's part in an epoch: prepare, freeze, take views, thaw, and tell the ledger of each (DESIGN §6).

File systems are frozen first and thawed last, where that is asked for; whether it comes about is the label's business,
and never the epoch's.

What is acted on is the ledger's go key, never a clock of this host's. Whatever fails here, the guest runs again, and
the ledger hears why nothing came of the cut, now or when it answers again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial

from coordinator.ledger.barrier import Barrier
from coordinator.model.bitmap import Owner, rotate
from coordinator.model.epoch import Consistency, CutFacts, DiskView, Epoch, GoKey, Phase, Standing, ViewKind
from coordinator.model.errors import FlushpointError, RefusedError, UnavailableError
from workers.agent.choice import Choice
from workers.agent.cut import Part, Vm
from workers.agent.feed import Feed
from workers.agent.files import FileSystems
from workers.agent.fleece import Fleece
from workers.agent.guest import Guest, GuestDisk, look_at
from workers.agent.guest_agent import ANSWER_S
from workers.agent.moves import runs_on
from workers.agent.muster import Moment, Muster
from workers.agent.probe import Probe
from workers.agent.room import Room
from workers.agent.sockets import Sockets
from workers.agent.standin import refuse_other_image
from workers.agent.views import prepare, remove
from workers.failpoint import pass_point

AGAIN = "its agent was started again"
MUSTER_SHARE = 0.25
"""Of the deadline, for which a machine that could be stopped waits for others of its host."""
FORGETS = "its image keeps no bitmap while nobody runs it: it is raw, or qcow2 with compat=0.10"
OFF = "no guest ran, and how the last one left its file systems is not known"


@dataclass(frozen=True, slots=True)
class Taken:
    """A cut that counts, as far as this machine is concerned: `parts` in the order of its disks."""

    parts: Sequence[Part]
    facts: CutFacts
    standing: Standing
    """Of the epoch, when this machine was CUT."""
    fleece: Fleece | None = None
    """What its QEMU listens at, if one of its disks is read there."""


class AbortedError(FlushpointError):
    """The epoch was aborted; nothing of it is left in the guest."""

    code = "epoch-aborted"


class Machine:
    """One machine, its monitor, where its scratch images go, and the sockets its guest agent may be among."""

    def __init__(
        self, name: str, vm: Vm, room: Room, sockets: Sockets, muster: Muster, probe: Probe | None = None
    ) -> None:
        """For one epoch. With the others of `muster` it is stopped at once; `probe` knows which QEMUs can be read."""
        self.name = name
        self.vm = vm
        self._room = room
        self._sockets = sockets
        self._muster = muster
        self._probe = probe or Probe()

    async def take_part(self, epoch: Epoch, barrier: Barrier, feed: Feed) -> Taken:
        """From the preparation to the cut, one epoch at a time: one that was aborted after its go may be about to cut
        when the next is opened. AbortedError where nothing comes of it; whatever else fails aborts the epoch too, and
        is raised."""
        async with self.vm.turn:
            parts: list[Part] = []
            patience_s = epoch.spec.prepare_ms / 1000 / 2
            choice = Choice(self.vm, self._probe, self._room.directory, epoch.spec.views, patience_s)
            try:
                await self._prepare(epoch, parts, choice)
                await self.vm.arm()
                with closing(await self._file_systems(epoch)) as files:
                    pass_point("between-prepare-and-prepared")
                    standing = await barrier.prepared(epoch, self.name)
                    standing = await feed.until(epoch, standing, lambda s: s.phase is not Phase.PREPARING)
                    refuse_aborted(epoch, standing)
                    taken = await self._cut(epoch, parts, files, barrier, feed)
                    return replace(taken, fleece=choice.fleece)
            except BaseException as error:
                self._muster.leave(self.name)
                await asyncio.gather(self._tell(epoch, barrier, error), self._drop(parts, choice))  # others wait
                with suppress(FlushpointError):  # an entry too many lets a guest run that does already
                    await self.vm.disarm()
                raise

    async def _prepare(self, epoch: Epoch, parts: list[Part], choice: Choice) -> None:
        """Adds to `parts` what is there, so that it can be dropped after an error."""
        guest = await look_at(self.vm.monitor)
        left = self._room.left()
        for name in epoch.participant(self.name).disks:
            disk = guest.disk(name)
            part = await self._prepared(epoch, guest, disk, choice, left)
            parts.append(part)
            if part.kind is ViewKind.STAGE:
                left -= disk.dirty(part.rotation.changed)
            await asyncio.to_thread(write_back, disk.file)

    async def _prepared(self, epoch: Epoch, guest: Guest, disk: GuestDisk, choice: Choice, left: int) -> Part:
        """`left` is how many bytes may be staged."""
        spec, name, mine = epoch.spec, disk.device, epoch.participant(self.name)
        if name in mine.images and not self.vm.is_off:
            refuse_other_image(disk, mine.images[name])
        if (target := spec.targets.get(f"{self.name}/{name}")) and runs_on(disk, target):
            raise RefusedError(f"the guest runs on {target}, which would be written", "name another target")
        parent = spec.parent(self.name, name)
        owner = Owner(spec.repository, epoch.group, f"{self.name}/{name}")
        resized = spec.sizes.get(owner.disk, disk.size) != disk.size
        useless = "the disk has changed its size" if resized else FORGETS if self.vm.forgets(disk) else ""
        rotation = rotate(disk.tracking(), owner, parent, epoch.number, useless)
        held = spec.seeded.get(owner.disk, disk.size) if rotation.since else 0
        kind, why = await choice.of(disk, rotation, held, len(mine.disks))
        if kind is ViewKind.STAGE and disk.dirty(rotation.changed) > left:
            # After a long outage, say: the whole disk goes in parts, and what was written does not.
            useless = f"the scratch directory has no room for all that was written since point {parent}"
            rotation, held = rotate(disk.tracking(), owner, parent, epoch.number, useless), 0
        view = await prepare(self.vm.monitor, guest, disk, self._room.directory)
        return Part(view, rotation, held, kind, why)

    async def _file_systems(self, epoch: Epoch) -> FileSystems:
        guard, journal = self.vm.guard, self.vm.journal
        if epoch.spec.consistency is Consistency.CRASH:
            return FileSystems(None, guard, journal)
        if self.vm.is_off:
            return FileSystems(None, guard, journal, OFF)
        timeout_s = min(ANSWER_S, epoch.spec.prepare_ms / 1000 / 2)  # a silent one must not be what ends the epoch
        path = epoch.participant(self.name).guest_agent
        return await FileSystems.open(path, self._sockets, guard, journal, timeout_s)

    async def _cut(
        self, epoch: Epoch, parts: Sequence[Part], files: FileSystems, barrier: Barrier, feed: Feed
    ) -> Taken:
        try:
            cut_at, stood_s = await self._stand_still(epoch, parts, files, barrier, feed)
        except TimeoutError as error:  # the guest runs by now, so there is time to ask why
            refuse_aborted(epoch, await barrier.time_out(epoch))
            raise UnavailableError(
                f"the ledger told nothing while {self.name} stood still", "look at the ledger's server and the network"
            ) from error
        views = tuple(DiskView(disk=part.view.disk.device, kind=part.kind, why=part.why) for part in parts)
        facts = CutFacts(
            cut_at=cut_at,
            freeze_ms=stood_s * 1000,
            filesystem_consistent=files.consistent,
            fallback=files.fallback,
            views=views,
        )
        standing = await barrier.cut(epoch, self.name, facts)
        if standing.phase is Phase.ABORTED:
            raise AbortedError(f"epoch {epoch.name} was aborted: {standing.why}")
        return Taken(parts, facts, standing)

    async def _stand_still(
        self, epoch: Epoch, parts: Sequence[Part], files: FileSystems, barrier: Barrier, feed: Feed
    ) -> tuple[float, float]:
        """When it was cut (Unix time), and for how many seconds it stood still. TimeoutError if the ledger does not
        answer in time; whatever comes, the guest runs when this returns, and can write."""
        deadline_s = epoch.spec.freeze_ms / 1000
        try:
            async with self.vm.order:
                ends_at = time.monotonic() + deadline_s
                await files.freeze(self.vm.monitor, deadline_s)
                pass_point("between-files-and-stop")
                return await self._stop_and_cut(epoch, parts, ends_at - time.monotonic(), barrier, feed, files)
        finally:
            await files.thaw()

    async def _stop_and_cut(
        self,
        epoch: Epoch,
        parts: Sequence[Part],
        left_s: float,
        barrier: Barrier,
        feed: Feed,
        files: FileSystems,
    ) -> tuple[float, float]:
        if left_s <= 0:
            raise UnavailableError(f"{self.name} was not stopped in time", "look at what its host is busy with")
        wait, share_s = partial(self._muster.wait, name=self.name), MUSTER_SHARE * left_s
        frozen = await self.vm.freeze(left_s, partial(wait, Moment.STOP, timeout_s=share_s))
        try:
            pass_point("between-stop-and-frozen")
            # Before any other may go on: as long as all stand still, nobody takes the processors from those who cut.
            await self.vm.take(frozen, parts)
            async with asyncio.timeout(max(0.0, frozen.ends_at - time.monotonic())):
                standing = await self._muster.frozen(self.name, partial(barrier.frozen, epoch), share_s)
                refuse_aborted(epoch, await feed.until(epoch, standing, lambda s: s.key is not GoKey.OPEN))
            pass_point("between-go-and-cut")
            cut_at = time.time()  # all stand still, and its disks hold what they held at its stop
            # With its file systems held it waits for nobody: whoever writes them waits until they are thawed.
            wait_s = 0.0 if files.are_held else share_s
            stood_s, has_run = await self.vm.go_on(frozen, partial(wait, Moment.GONE_ON, timeout_s=wait_s))
        except BaseException:
            self._muster.leave(self.name)  # first, or another tells of it as of one that stands still
            await self.vm.thaw(frozen)
            raise
        if has_run:
            raise has_run
        return cut_at, stood_s

    async def _drop(self, parts: Sequence[Part], choice: Choice) -> None:
        for part in parts:
            with suppress(FlushpointError):  # the guest is gone, or an agent that starts finds what is left
                await remove(self.vm.monitor, part.view)
        with suppress(FlushpointError):
            await choice.drop()

    async def _tell(self, epoch: Epoch, barrier: Barrier, error: BaseException) -> None:
        if not isinstance(error, AbortedError):
            with suppress(FlushpointError):  # its agent says it again
                await fail(epoch, self.name, barrier, why_of(error))


def refuse_aborted(epoch: Epoch, standing: Standing) -> None:
    """AbortedError if the go key says so."""
    if standing.key is GoKey.ABORT:
        raise AbortedError(f"epoch {epoch.name} was aborted: {standing.why}")


def why_of(error: BaseException) -> str:
    return error.message if isinstance(error, FlushpointError) else f"its agent failed: {error!r}"


async def fail(epoch: Epoch, vm: str, barrier: Barrier, why: str) -> None:
    """End the epoch, whatever it is at, unless it is over or all can be read. Any number of times."""
    standing = await barrier.abort(epoch, vm, why)
    if standing.phase in (Phase.CUTTING, Phase.TAKEN):
        await barrier.fail_cut(epoch, vm, why)


async def recover(epoch: Epoch, vm: str, barrier: Barrier) -> bool:
    """For an agent that was started again and has taken its views away: whether its part had come so far that the epoch
    goes on without them. Of what was fleeced nothing can be read any more: where that ends no epoch, it fails copies.
    Nobody is to wait for what else it had begun."""
    if vm not in epoch.reads or epoch.fleeced(vm):
        with suppress(RefusedError):  # meanwhile all can be read, as far as the ledger knows
            await fail(epoch, vm, barrier, AGAIN)
    return vm in epoch.reads


def write_back(path: str) -> None:
    """`stop` flushes: what the host's cache holds of an image is written before, while the guest runs."""
    with suppress(OSError):  # a device, or a file that the agent may not open: then the stop takes longer
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
