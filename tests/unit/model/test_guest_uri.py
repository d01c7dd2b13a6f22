"""Disks of live guests, as people name them."""

from __future__ import annotations

import pytest

from coordinator.model.errors import UsageError
from coordinator.model.guest_uri import GuestDiskUri, is_guest_disk, parse_guest_disk
from coordinator.model.uri import parse


def test_a_guests_disk_is_named_by_its_device_and_monitor() -> None:
    assert parse_guest_disk("qemu+unix:///vda?qmp=/run/vm/db.qmp") == GuestDiskUri("vda", "/run/vm/db.qmp")
    with_host = "qemu+unix:////machine/a%20b?host=hv2&qmp=/run/x%3F.sock"
    assert parse_guest_disk(with_host) == GuestDiskUri("/machine/a b", "/run/x?.sock", "hv2")


@pytest.mark.parametrize(
    ("qmp", "name"), [("/run/vm/db.qmp", "db"), ("/run/qmp", "qmp"), ("/run/-a b.sock", "a-b"), ("/run/...", "guest")]
)
def test_a_machine_is_called_after_its_monitor(qmp: str, name: str) -> None:
    assert GuestDiskUri("vda", qmp).vm == name


@pytest.mark.parametrize(
    "text",
    [
        "qemu+unix:///vda",
        "qemu+unix:///?qmp=/q",
        "qemu+unix://host/vda?qmp=/q",
        "qemu+unix:///vda?qmp=q",
        "qemu+unix:///vda?qmp=/q&qmp=/r",
        "qemu+unix:///vda?qmp=/q&hots=a",
        "qemu+unix:///vda?qmp=/q&host=",
        "qemu+unix:///vda?qmp=/q#a",
    ],
)
def test_what_names_no_disk_of_a_guest_is_refused(text: str) -> None:
    assert is_guest_disk(text)
    with pytest.raises(UsageError, match="names no disk of a guest"):
        parse_guest_disk(text)


def test_a_job_takes_no_disk_of_a_guest() -> None:
    with pytest.raises(UsageError, match="cut by a group"):
        parse("qemu+unix:///vda?qmp=/q")
