"""Whether a QEMU can be read is found out once for every program, and again where it was not found out."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from workers.agent import probe as probe_module
from workers.agent.probe import Probe


@dataclass
class Tries:
    """In the place of QEMUs."""

    seen: list[bool] = field(default_factory=list)
    hangs: bool = False

    async def __call__(self, program: int, user: tuple[int, int], *, iothread: bool) -> str:
        self.seen.append(iothread)
        while self.hangs:
            await asyncio.sleep(0.01)
        return "it died" if iothread else ""


@dataclass
class Monitor:
    """Of a process that runs the program of another, or none."""

    pid: int

    def pid_of_qemu(self) -> int:
        return self.pid

    def user_of_qemu(self) -> tuple[int, int]:
        return os.geteuid(), os.getegid()


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Tries:
    tries = Tries()
    monkeypatch.setattr(probe_module, "_tried", tries)
    return tries


async def why_not(probe: Probe, pid: int = 0, *, iothread: bool = False, timeout_s: float = 5.0) -> str:
    return await probe.why_not(Monitor(pid or os.getpid()), iothread=iothread, timeout_s=timeout_s)  # type: ignore[arg-type]


def test_a_program_is_tried_once_with_an_iothread_and_once_without(tries: Tries) -> None:
    async def ask() -> list[str]:
        probe = Probe()
        kinds = (False, True, False, True)
        return await asyncio.gather(*(why_not(probe, iothread=iothread) for iothread in kinds))

    assert asyncio.run(ask()) == ["", "it died", "", "it died"]
    assert tries.seen == [False, True]


def test_another_program_is_tried_as_well_and_one_that_was_replaced_again(
    tries: Tries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the kernel says of the file: its name may stay the same."""
    program = tmp_path / "qemu"
    program.write_bytes(b"old")
    opened = os.open

    async def ask() -> None:
        probe = Probe()
        for times in (1, 1, 2, 2):
            if times == 2 and len(tries.seen) == 1:
                (tmp_path / "new").write_bytes(b"new")
                (tmp_path / "new").replace(program)
            assert await why_not(probe) == ""
            assert len(tries.seen) == times

    monkeypatch.setattr(os, "open", lambda path, flags: opened(program, flags))
    asyncio.run(ask())


def test_what_was_not_found_out_in_time_is_tried_again(tries: Tries) -> None:
    async def ask() -> None:
        probe = Probe()
        tries.hangs = True
        assert (
            await why_not(probe, timeout_s=0.05)
            == "whether the guest's QEMU can be read was not found out within 0.05 s"
        )
        tries.hangs = False
        assert await why_not(probe) == ""
        assert tries.seen == [False, False]

    asyncio.run(ask())


def test_a_process_that_cannot_be_looked_into_is_not_read(tries: Tries) -> None:
    told = asyncio.run(why_not(Probe(), pid=2**22 + 1))
    assert told == "the program of the guest's QEMU cannot be tried: No such file or directory"
    assert tries.seen == []
