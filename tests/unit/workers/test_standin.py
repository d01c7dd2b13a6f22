"""Which images a stand-in opens, what QEMU is told of them, and what is said of those it does not open."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.model.epoch import Participant
from coordinator.model.errors import NotFoundError, RefusedError
from coordinator.model.uri import parse
from workers.access import Access
from workers.agent.standin import StandIns, command_of, node_of, refuse_other_image, refused

MIB = 1024 * 1024


def qemu_img(*words: object) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=30)


def member(**images: str) -> Participant:
    return Participant(vm="archive", host="hv1", disks=tuple(images), images=images)


def test_a_raw_image_is_opened_without_a_look_at_what_is_in_it(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    qemu_img("create", "-f", "qcow2", image, MIB)
    file = {"driver": "file", "filename": str(image), "locking": "on"}
    assert node_of(parse(str(image)), Access([str(tmp_path)], [])) == {"driver": "raw", "file": file}


def test_a_chain_is_opened_as_we_have_found_it(tmp_path: Path) -> None:
    base, top = tmp_path / "base.img", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "raw", base, MIB)
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", base, top)
    node = node_of(parse(str(top)), Access([str(tmp_path)], []))
    assert node["backing"] == {"driver": "raw", "file": {"driver": "file", "filename": str(base)}}
    outside = tmp_path / "only"
    outside.mkdir()
    moved = top.rename(outside / "top.qcow2")
    with pytest.raises(RefusedError, match=r"base\.img is outside the worker's allowed roots"):
        node_of(parse(str(moved)), Access([str(outside)], []))


def test_what_cannot_be_an_image_is_refused_by_its_name(tmp_path: Path) -> None:
    access = Access([str(tmp_path)], [])
    raw, empty = tmp_path / "raw", tmp_path / "empty"
    raw.write_bytes(bytes(MIB))
    empty.touch()
    for text, why in (
        (str(tmp_path), "is neither a file nor a block device"),
        (str(empty), "is empty"),
        (f"{raw}?format=qcow2", "not in qcow2 format"),
    ):
        with pytest.raises(RefusedError, match=why) as told:
            node_of(parse(text), access)
        assert text.partition("?")[0] in told.value.message


def test_images_are_opened_below_allowed_roots_alone(tmp_path: Path) -> None:
    roots, outside = tmp_path / "roots", tmp_path / "outside"
    roots.mkdir()
    outside.write_bytes(bytes(MIB))
    (roots / "link").symlink_to(outside)
    nobody: Any = SimpleNamespace()
    standins = StandIns(tmp_path, Access([str(roots)], []), nobody, nobody)

    async def opened(image: Path) -> None:
        async with standins.open(member(data=str(image))):
            raise AssertionError(f"{image} was opened")

    for image in (outside, roots / "link"):
        with pytest.raises(RefusedError, match=f"{image.name}.* is outside the worker's allowed roots"):
            asyncio.run(opened(image))
    with pytest.raises(NotFoundError, match="gone does not exist"):
        asyncio.run(opened(roots / "gone"))


def test_more_disks_than_the_machine_has_slots_share_them() -> None:
    words = command_of(Path("/m"), {f"d{number}": {"driver": "raw"} for number in range(100)})
    devices = [json.loads(words[at + 1]) for at, word in enumerate(words) if word == "-device"]
    assert [device["id"] for device in devices] == [f"d{number}" for number in range(100)]
    assert (devices[0]["addr"], devices[8]["addr"], devices[99]["addr"]) == ("2.0", "3.0", "e.3")
    assert len({device["addr"] for device in devices}) == 100


LOCKED = """\
qemu-system-x86_64: -blockdev {"driver": "qcow2", "file": {"filename": "/b.qcow2"}}: Failed to get "write" lock
Is another process using the image [/b.qcow2]?
"""
READ_ONLY = """\
qemu-system-x86_64: -blockdev {"driver": "raw", "file": {"filename": "/b"}}: Could not open '/b': Read-only file system
"""


def test_why_qemu_does_not_start_is_said_with_the_image_it_is_about() -> None:
    off = Participant(vm="db", host="hv1", qmp="/db", disks=("a", "b"), images={"a": "/a.qcow2", "b": "/b.qcow2"})
    told = refused(LOCKED, off, ["/a.qcow2", "/b.qcow2"])
    assert told.message == "another process has the image /b.qcow2 open, and nobody listens at /db"
    bare = refused(LOCKED, member(b="/b.qcow2"), ["/b.qcow2"])
    assert bare.message == "another process has the image /b.qcow2 open"
    told = refused(READ_ONLY, member(b="/b"), ["/b"])
    assert told.message == "no stand-in for archive (/b): Could not open '/b': Read-only file system"
    assert told.remedy == "name a file on a file system that can be written"


def test_a_guest_that_runs_on_another_image_than_the_group_says_is_refused(tmp_path: Path) -> None:
    image, link = tmp_path / "disk.qcow2", tmp_path / "link.qcow2"
    image.touch()
    link.symlink_to(image)

    def runs_on(file: str) -> Any:
        return SimpleNamespace(device="vda", file=file)

    refuse_other_image(runs_on(str(image)), f"file://{link}")
    refuse_other_image(runs_on("json:{}"), str(link))  # what QEMU has no path for
    with pytest.raises(RefusedError, match=r"the guest's disk vda is in /snapshot, and not in .*link\.qcow2"):
        refuse_other_image(runs_on("/snapshot"), str(link))
