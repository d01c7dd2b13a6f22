"""How each disk of a machine will be read, decided while it prepares: staged, or as a fleece where that is safe."""

from __future__ import annotations

from pathlib import Path

from coordinator.model.bitmap import Rotation
from coordinator.model.epoch import ViewKind
from workers.agent.cut import Vm
from workers.agent.fleece import Fleece, begin, end
from workers.agent.guest import GuestDisk
from workers.agent.monitor import GuestRefusedError
from workers.agent.probe import PROBE_S, Probe


class Choice:
    """For one machine and one epoch. The guest's QEMU listens from the first disk on that will be read there."""

    def __init__(self, vm: Vm, probe: Probe, scratch: Path, asked: ViewKind, timeout_s: float) -> None:
        """`timeout_s` is how long to wait at most for what a probe finds out."""
        self.fleece: Fleece | None = None
        self._monitor = vm.monitor
        self._probe = probe
        self._scratch = scratch
        self._asked = asked
        self._timeout_s = min(PROBE_S, timeout_s)
        self._occupied = "nobody runs it" if vm.is_off else ""  # what stands in for it is to end soon

    async def of(self, disk: GuestDisk, rotation: Rotation, held: int, disks: int) -> tuple[ViewKind, str]:
        """The kind, and why it is not what was asked for. `held` is how many bytes of the disk its point has; the
        machine has so many `disks`. FlushpointError if the guest is gone, or the scratch directory full."""
        if self._asked is ViewKind.STAGE:
            return ViewKind.STAGE, ""
        why = self._occupied or _whole(disk, rotation, held) or await self._probed(disk) or await self._listen(disks)
        return (ViewKind.STAGE, why) if why else (ViewKind.FLEECE, "")

    async def drop(self) -> None:
        """Nothing comes of it. FlushpointError."""
        if self.fleece is not None:
            await end(self._monitor, self.fleece)

    async def _probed(self, disk: GuestDisk) -> str:
        return await self._probe.why_not(self._monitor, iothread=bool(disk.iothread), timeout_s=self._timeout_s)

    async def _listen(self, disks: int) -> str:
        if self.fleece is None:
            try:
                self.fleece = await begin(self._monitor, self._scratch, disks)
            except GuestRefusedError as error:
                self._occupied = f"the guest's QEMU cannot be read: {error.message}"
        return self._occupied


def _whole(disk: GuestDisk, rotation: Rotation, held: int) -> str:
    """Why much more may have to be copied than was written: a view is not held for that long, so such a disk goes in
    parts through the scratch directory."""
    if not rotation.changed:
        return f"all of it has to be copied: {rotation.compare}"
    return "it is being copied in parts yet" if held < disk.size else ""
