"""The guest that other tests boot: what it has, and what is said when it fails."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.guest import Guest, GuestKit, NoGuestError, run_guest
from tests.stack import MIB, make_disk

pytestmark = pytest.mark.needs("qemu-system-x86_64")


def test_a_guest_reads_its_drives_by_every_bus_and_what_the_test_gave_it(guest_kit: GuestKit, tmp_path: Path) -> None:
    """A disk on virtio-blk, one on virtio-scsi, and a port for an agent."""
    block = make_disk(tmp_path / "block", MIB, {0: b"by virtio-blk\n"})
    scsi = make_disk(tmp_path / "scsi", MIB, {0: b"by virtio-scsi\n"})
    script = "head -n 1 /dev/vda; head -n 1 /dev/sda; ls /dev/vport*; head -n 1 /test/note"
    extra = ["-device", "virtio-scsi-pci", "-drive", f"file={scsi},format=raw,if=none,id=s0"]
    extra += ["-device", "scsi-hd,drive=s0", "-device", "virtio-serial-pci", "-device", "virtserialport"]
    initramfs = guest_kit.initramfs(tmp_path, script, {"note": b"by the test\n"})
    command = guest_kit.command(initramfs, [f"file={block},format=raw"], extra=extra)
    console = run_guest(command, tmp_path / "console")
    lines = ["by virtio-blk", "by virtio-scsi", "/dev/vport", "by the test"]
    assert [line for line in lines if f"\n{line}" in f"\n{console}"] == lines, console


def test_a_script_that_fails_fails_the_test_with_what_it_said(guest_kit: GuestKit, tmp_path: Path) -> None:
    initramfs = guest_kit.initramfs(tmp_path, "echo before; cat /absent; echo after")
    with pytest.raises(AssertionError, match="before\ncat: can't open '/absent'") as raised:
        run_guest(guest_kit.command(initramfs, []), tmp_path / "console")
    assert "after" not in str(raised.value)


def test_a_guest_that_panics_ends_and_fails_the_test(guest_kit: GuestKit, tmp_path: Path) -> None:
    initramfs = guest_kit.initramfs(tmp_path, "echo c > /proc/sysrq-trigger")
    with pytest.raises(AssertionError, match="the script did not"):
        run_guest(guest_kit.command(initramfs, []), tmp_path / "console")


def test_a_guest_that_does_not_end_is_waited_for_no_longer_than_told_and_killed(
    guest_kit: GuestKit, tmp_path: Path
) -> None:
    initramfs = guest_kit.initramfs(tmp_path, "echo up; sleep 1000")
    with Guest(guest_kit.command(initramfs, []), tmp_path / "console") as guest:
        guest.wait_for("up")
        with pytest.raises(AssertionError, match="still waiting for the end"):
            guest.wait_until_off(0.1)
    assert not psutil.pid_exists(guest.pid)


def test_a_guest_that_ends_is_not_waited_for_any_longer(guest_kit: GuestKit, tmp_path: Path) -> None:
    initramfs = guest_kit.initramfs(tmp_path, "echo something else")
    with (
        Guest(guest_kit.command(initramfs, []), tmp_path / "console") as guest,
        pytest.raises(AssertionError, match="something else"),
    ):
        guest.wait_for("what it never says")


def test_without_its_packages_a_guest_names_what_fetches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path))
    with pytest.raises(NoGuestError, match="make system"):
        GuestKit.get()
