"""Names of one disk are known for one disk, so that none is mirrored onto itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.model.job import Sync
from coordinator.model.uri import DiskUri, parse
from tests.contract.disks import MIB, access_to, loop_device, make_raw
from tests.stack import Nbdkit
from workers.access import Access
from workers.nbd.endpoint import Endpoint
from workers.sources import open_source
from workers.sources.identity import identity_of_export, name_in_fleet
from workers.targets import existing_target


@pytest.fixture
def access(tmp_path: Path) -> Access:
    return access_to(tmp_path, Path("/dev"))


def target_is_source(source: DiskUri, target: DiskUri, access: Access) -> bool:
    opened = open_source(source, Sync.FULL, None, access)
    try:
        there = existing_target(target, access)
        assert there is not None
        return there.is_read_by(opened)
    finally:
        opened.close()


@pytest.mark.needs("losetup")
def test_a_loop_device_is_the_file_behind_it(tmp_path: Path, access: Access) -> None:
    image = make_raw(tmp_path / "disk.img", b"x" * MIB)
    other = make_raw(tmp_path / "other.img", b"x" * MIB)
    with loop_device(image) as device:
        assert target_is_source(parse(str(image)), parse(str(device)), access)
        assert target_is_source(parse(str(device)), parse(str(image)), access)
        assert not target_is_source(parse(str(device)), parse(str(other)), access)


@pytest.mark.needs("nbdkit")
def test_an_export_is_the_file_its_server_has_open(tmp_path: Path, access: Access) -> None:
    """As seen through its socket. nbdkit takes no locks, unlike QEMU."""
    image = make_raw(tmp_path / "disk.img", b"x" * MIB)
    other = make_raw(tmp_path / "other.img", b"x" * MIB)
    with Nbdkit(image, "file", str(image)) as server:
        export = parse(server.uri)
        assert target_is_source(export, parse(str(image)), access)
        assert target_is_source(parse(str(image)), export, access)
        assert not target_is_source(export, parse(str(other)), access)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_all_addresses_of_this_host_are_one(host: str) -> None:
    assert identity_of_export(Endpoint.parse(f"nbd://{host}/x")) == identity_of_export(
        Endpoint.parse("nbd://127.0.0.1/x")
    )


@pytest.mark.parametrize("uri", ["nbd://127.0.0.1/y", "nbd://127.0.0.1:1/x", "nbd://192.0.2.1/x"])
def test_other_exports_ports_and_hosts_are_others(uri: str) -> None:
    assert identity_of_export(Endpoint.parse(uri)) != identity_of_export(Endpoint.parse("nbd://127.0.0.1/x"))


def test_a_fleet_knows_a_remote_export_by_one_name_and_a_file_by_its_host(tmp_path: Path) -> None:
    remote = identity_of_export(Endpoint.parse("nbd://192.0.2.1/x"))
    assert name_in_fleet(remote, "hv1") == name_in_fleet(remote, "hv2")
    for local in (("inode", 1, 2), ("blockdev", 3), identity_of_export(Endpoint.parse("nbd://127.0.0.1/x"))):
        assert name_in_fleet(local, "hv1") != name_in_fleet(local, "hv2")
