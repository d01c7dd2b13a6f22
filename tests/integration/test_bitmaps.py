"""`flushpoint bitmap`: what images and live guests remember of what was written."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest import GuestKit
from tests.live_guest import MIB, LiveDisk, LiveGuest, wandering_guest
from tests.stack import QemuNbd, flushpoint

pytestmark = pytest.mark.needs("qemu-img", "qemu-io", "qemu-nbd")

BLOCK = 65536


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bitmap(*words: object) -> dict[str, dict[str, Any]]:
    """The disk's bitmaps after the command, by name."""
    done = flushpoint("bitmap", *words, "--json")
    assert done.returncode == 0, done.stderr
    return {one["name"]: one for one in json.loads(done.stdout)["bitmaps"]}


def refused(*words: object) -> str:
    done = flushpoint("bitmap", *words)
    assert done.returncode == 3, done
    return done.stderr


def write(image: Path, *commands: str) -> None:
    run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), image)


@pytest.fixture
def image(tmpfs_path: Path) -> Path:
    """base <- middle <- top, each with some blocks of its own."""
    base, middle, top = (tmpfs_path / f"{name}.qcow2" for name in ("base", "middle", "top"))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "64M")
    write(base, "write 0 1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", middle)
    write(middle, "write 8M 128k")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    write(top, "write 16M 64k", "write -z 32M 64k")
    return top


def test_a_bitmap_of_an_image_records_until_it_is_told_not_to(image: Path) -> None:
    made = bitmap("enable", image, "nightly", "--granularity", "64K")["nightly"]
    assert (made["is_recording"], made["granularity"], made["dirty"]) == (True, BLOCK, 0)
    write(image, "write 40M 128k")
    assert bitmap("query", image)["nightly"]["dirty"] == 2 * BLOCK
    assert not bitmap("disable", image, "nightly")["nightly"]["is_recording"]
    write(image, "write 50M 64k")
    assert bitmap("query", image)["nightly"]["dirty"] == 2 * BLOCK
    assert bitmap("enable", image, "nightly")["nightly"]["is_recording"]
    assert bitmap("disable", image, "nightly", "--remove") == {}


def test_a_bitmap_is_filled_with_what_lies_above_a_base(image: Path) -> None:
    bitmap("enable", image, "top", "--granularity", "64K")
    assert bitmap("fill", image, "top")["top"]["dirty"] == 2 * BLOCK, "zeroes that hide what is below count, too"
    bitmap("enable", image, "both", "--granularity", "64K")
    assert bitmap("fill", image, "both", "--base", image.with_name("base.qcow2"))["both"]["dirty"] == 4 * BLOCK
    write(image, "write 40M 64k")
    assert bitmap("query", image)["both"]["dirty"] == 5 * BLOCK


def test_what_makes_no_sense_is_refused(image: Path, tmp_path: Path) -> None:
    assert "there is no bitmap 'nightly'" in refused("disable", image, "nightly")
    bitmap("enable", image, "nightly")
    assert "is no backing file of" in refused("fill", image, "nightly", "--base", tmp_path / "other.qcow2")
    assert "one of Flushpoint's own" in refused("enable", image, "flushpoint:1:shop:2")
    assert "none.qcow2" in refused("query", tmp_path / "none.qcow2")
    with QemuNbd(image, image_format="qcow2"):
        assert "lock" in refused("disable", image, "nightly")
    done = flushpoint("bitmap", "query", "qemu+unix:///vda")
    assert done.returncode == 2, done
    assert "names no disk of a guest" in done.stderr
    assert "there is no monitor at" in refused("query", f"qemu+unix:///vda?qmp={tmp_path}/none")


@pytest.fixture(scope="module")
def guest(guest_kit: GuestKit, module_tmpfs_path: Path) -> Iterator[LiveGuest]:
    disks = [LiveDisk("a", size=64 * MIB), LiveDisk("b", iothread=True, size=64 * MIB)]
    with wandering_guest(guest_kit, module_tmpfs_path / "guest", disks) as running:
        yield running


@pytest.mark.needs("qemu-system-x86_64", "gcc")
@pytest.mark.parametrize("device", ["a", "b"])
def test_a_live_guest_is_recorded_and_filled_and_goes_on(guest: LiveGuest, device: str) -> None:
    disk = f"qemu+unix:///{device}?qmp={guest.monitor}"
    made = bitmap("enable", disk, "nightly", "--granularity", "64K")["nightly"]
    assert (made["is_recording"], made["is_persistent"]) == (True, True)
    guest.wait_until_it_writes()
    assert bitmap("disable", disk, "nightly")["nightly"]["dirty"] > 0
    stays = bitmap("query", disk)["nightly"]["dirty"]
    guest.wait_until_it_writes()
    assert bitmap("query", disk)["nightly"]["dirty"] == stays
    bitmap("enable", disk, "nightly")
    path = guest.directory / f"{device}.qcow2"
    chain = json.loads(run("qemu-img", "map", "--output=json", "--force-share", "-f", "qcow2", path))
    allocated = sum(entry["length"] for entry in chain if entry["present"])
    filled = bitmap("fill", disk, "nightly")["nightly"]["dirty"]
    assert max(stays, allocated) <= filled
    guest.wait_until_it_writes()
    assert bitmap("disable", disk, "nightly", "--remove") == {}
