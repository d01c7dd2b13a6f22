"""Names of one disk are known for one disk, so that none is mirrored onto itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from coordinator.model.job import Sync
from coordinator.model.uri import DiskUri, parse
from tests.contract.disks import MIB, access_to, loop_device, make_raw, serving_tcp
from tests.stack import Nbdkit
from tests.volatile_server import volatile_server
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


@pytest.mark.needs("nbdkit")
@pytest.mark.parametrize(
    ("listens", "named"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "[::ffff:127.0.0.1]"), ("::1", "[::1]")]
)
def test_an_export_over_tcp_is_the_file_that_a_server_of_this_host_has_open(
    tmp_path: Path, access: Access, listens: str, named: str
) -> None:
    image = make_raw(tmp_path / "disk.img", b"x" * MIB)
    other = make_raw(tmp_path / "other.img", b"x" * MIB)
    access = Access([str(tmp_path)], ["*"])
    with serving_tcp("nbdkit", "-f", "file", str(image), address=listens) as port:
        export = parse(f"nbd://{named}:{port}/")
        assert target_is_source(export, parse(str(image)), access)
        assert target_is_source(parse(str(image)), export, access)
        assert not target_is_source(export, parse(str(other)), access)


@pytest.mark.needs("nbdkit")
def test_a_file_that_is_open_beside_an_export_of_this_host_may_be_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a proxy, whose own descriptors tell nothing."""
    monkeypatch.setattr("workers.targets.CLOSE_TIMEOUT_S", 0)
    image = make_raw(tmp_path / "disk.img", b"x" * MIB)
    access = Access([str(tmp_path)], ["*"])
    with Nbdkit(image, "file", str(image)) as server, serving_tcp("nbdkit", "-f", "nbd", f"uri={server.uri}") as port:
        source = open_source(parse(f"nbd://127.0.0.1:{port}/"), Sync.FULL, None, access)
        there = existing_target(parse(f"{image}?format=qcow2"), access)
        assert there is not None
        assert not there.is_read_by(source)
        assert there.user_beside(source) == server.pid
        source.close()
        unserved = open_source(parse(str(make_raw(tmp_path / "other.img", b"x" * MIB))), Sync.FULL, None, access)
        assert there.user_beside(unserved) is None, "a file is known by what it is"
        unserved.close()


def test_a_file_that_is_being_closed_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a mover of a job that has just ended, say."""
    image = make_raw(tmp_path / "disk.img", b"x" * MIB)
    access = access_to(tmp_path)
    with (
        volatile_server(tmp_path / "s", MIB) as server,
        image.open("rb") as opened,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, stderr=opened) as user,
    ):
        assert user.stdin is not None
        ends = user.stdin

        def end(_: float) -> None:
            ends.close()
            user.wait()

        monkeypatch.setattr("workers.targets.time.sleep", end)
        source = open_source(parse(server.uri), Sync.FULL, None, access)
        there = existing_target(parse(str(image)), access)
        assert there is not None
        assert there.user_beside(source) is None
        assert user.returncode is not None
        source.close()


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
