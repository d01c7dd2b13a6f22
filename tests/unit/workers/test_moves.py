"""How QEMU is told to open what a guest moves to."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.model.errors import RefusedError
from coordinator.model.uri import parse
from workers.agent.guest import GuestDisk
from workers.agent.moves import blockdev_options, runs_on, target_node

FILE = {"driver": "file", "filename": "/x/disk", "discard": "unmap"}


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("/x/disk", {"driver": "raw", "file": FILE}),
        ("/x/disk?format=qcow2", {"driver": "qcow2", "file": FILE}),
        ("file:///x/a%20disk", {"driver": "raw", "file": {**FILE, "filename": "/x/a disk"}}),
        (
            "nbd://store/vm/vda",
            {
                "driver": "nbd",
                "server": {"type": "inet", "host": "store", "port": "10809"},
                "export": "vm/vda",
            },
        ),
        (
            "nbd://[fd00::1]:7/",
            {"driver": "nbd", "server": {"type": "inet", "host": "fd00::1", "port": "7"}, "export": ""},
        ),
        (
            "nbd+unix:///a%20b?socket=/run/%3F",
            {"driver": "nbd", "server": {"type": "unix", "path": "/run/?"}, "export": "a b"},
        ),
    ],
)
def test_a_target_is_opened_by_its_uri(uri: str, options: dict[str, object]) -> None:
    assert blockdev_options(parse(uri), "fp-x", "file") == {**options, "node-name": "fp-x", "discard": "unmap"}


def test_a_block_device_has_a_driver_of_its_own() -> None:
    file = {**FILE, "driver": "host_device"}
    assert blockdev_options(parse("/x/disk"), "fp-x", "host_device")["file"] == file


@pytest.mark.parametrize("uri", ["null:", "repo+file:///r", "nbds://store/vda", "nbds+unix:///vda?socket=/s"])
def test_what_a_guest_cannot_go_on_with_is_refused(uri: str) -> None:
    with pytest.raises(RefusedError, match=r"cannot go on with|no TLS credentials"):
        blockdev_options(parse(uri), "fp-x", "file")


def disk(node: str, file: str) -> GuestDisk:
    return GuestDisk(
        device="vda",
        path="/machine/peripheral/vda",
        node=node,
        driver="qcow2",
        file=file,
        size=1,
        is_read_only=False,
        keeps_bitmaps=True,
        iothread="",
        bitmaps=(),
    )


def test_a_guest_is_known_to_run_on_its_target_however_it_came_there(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.touch()
    (tmp_path / "link").symlink_to(image)
    assert runs_on(disk(target_node("/x/disk"), "/y"), "/x/disk")
    assert runs_on(disk("mine", str(image)), f"{tmp_path}/link?format=qcow2")
    assert not runs_on(disk("mine", str(image)), f"{tmp_path}/other")
    assert runs_on(disk("mine", "nbd://store:10809/vda"), "nbd://store/vda")
    assert not runs_on(disk("mine", "nbd://store:10809/vdb"), "nbd://store/vda")
    assert not runs_on(disk("mine", 'json:{"driver":"nbd"}'), "nbd://store/vda")
    assert not runs_on(disk("mine", "nbd://store/vda"), str(image))


def test_a_target_has_one_name_in_every_attempt_and_no_two_have_the_same() -> None:
    assert target_node("/x/disk") == target_node("/x/disk")
    assert target_node("/x/disk") != target_node("/x/disk2")
    assert len(target_node("/x/disk")) <= 31, "QEMU takes no longer names"
