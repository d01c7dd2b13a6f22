from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from coordinator.model.errors import NotFoundError, RefusedError, UnavailableError
from workers.access import Access
from workers.nbd.endpoint import Endpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


class TestPaths:
    def test_a_file_under_a_root_is_allowed_and_resolved(self, root: Path) -> None:
        (root / "disk").write_bytes(b"")
        (root / "link").symlink_to("disk")
        assert Access([str(root)], []).check_path(f"{root}/link", must_exist=True) == str(root / "disk")

    @pytest.mark.parametrize("name", ["../outside", "link", "directory/outside", "../root-sibling/x", "/etc/hostname"])
    def test_whatever_leads_outside_is_refused(self, name: str, root: Path) -> None:
        (root.parent / "outside").write_bytes(b"")
        (root.parent / "root-sibling").mkdir()
        (root / "link").symlink_to("../outside")
        (root / "directory").symlink_to("..")
        with pytest.raises(RefusedError) as caught:
            Access([str(root)], []).check_path(str(root / name), must_exist=False)
        assert str(root) in caught.value.message
        assert "FLUSHPOINT_ALLOWED_ROOTS" in caught.value.remedy

    def test_a_root_may_itself_be_a_link(self, root: Path) -> None:
        (root.parent / "alias").symlink_to(root)
        (root / "disk").write_bytes(b"")
        Access([f"{root.parent}/alias"], []).check_path(str(root / "disk"), must_exist=True)

    def test_the_root_of_everything_allows_everything(self, root: Path) -> None:
        assert Access(["/"], []).check_path(str(root / "new"), must_exist=False) == str(root / "new")

    def test_without_roots_nothing_is_allowed(self, root: Path) -> None:
        with pytest.raises(RefusedError, match="none"):
            Access([], []).check_path(str(root), must_exist=True)

    def test_outside_the_roots_it_is_not_told_what_exists(self, root: Path) -> None:
        with pytest.raises(RefusedError) as caught:
            Access([str(root)], []).check_path(f"{root.parent}/none", must_exist=True)
        assert not isinstance(caught.value, NotFoundError)

    def test_a_missing_file_is_found_missing_only_if_it_must_exist(self, root: Path) -> None:
        access = Access([str(root)], [])
        access.check_path(f"{root}/new", must_exist=False)
        with pytest.raises(NotFoundError):
            access.check_path(f"{root}/new", must_exist=True)

    def test_what_cannot_be_looked_up_is_refused_by_its_name(self, root: Path) -> None:
        path = f"{root}/{'n' * 300}"
        with pytest.raises(RefusedError, match="cannot be looked up: File name too long") as caught:
            Access([str(root)], []).exists(path)
        assert path in caught.value.message

    def test_a_dangling_link_out_of_the_roots_is_refused(self, root: Path) -> None:
        (root / "link").symlink_to("../not-yet")
        with pytest.raises(RefusedError, match="allowed roots"):
            Access([str(root)], []).check_path(f"{root}/link", must_exist=False)

    def test_an_open_file_is_judged_by_where_it_is(self, root: Path) -> None:
        (root.parent / "outside").write_bytes(b"")
        fd = os.open(root.parent / "outside", os.O_RDONLY)
        try:
            with pytest.raises(RefusedError):
                Access([str(root)], []).check_open_file(fd, f"{root}/disk")
        finally:
            os.close(fd)


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


class TestEndpoints:
    @pytest.mark.parametrize("entry", ["*", "10.0.0.0/8", "10.1.2.3", "10.1.2.3:10809"])
    def test_an_address_is_allowed_by_each_kind_of_entry(self, entry: str) -> None:
        Access([], [entry]).check_endpoint(Endpoint.parse("nbd://10.1.2.3/x"))

    @pytest.mark.parametrize("entry", ["10.2.0.0/16", "10.1.2.3:10810", "host", "::/0", ""])
    def test_an_address_that_no_entry_covers_is_refused(self, entry: str) -> None:
        with pytest.raises(RefusedError) as caught:
            Access([], [entry]).check_endpoint(Endpoint.parse("nbd://10.1.2.3/x"))
        assert "FLUSHPOINT_ALLOWED_ENDPOINTS" in caught.value.remedy

    @pytest.mark.parametrize("entry", ["2001:db8::/32", "[2001:db8::1]:10809", "2001:db8::1"])
    def test_ipv6_is_allowed_by_each_kind_of_entry(self, entry: str) -> None:
        Access([], [entry]).check_endpoint(Endpoint.parse("nbd://[2001:db8::1]/x"))

    @pytest.mark.parametrize(
        "host",
        [
            "169.254.169.254",
            "[fe80::1]",
            "[fd00:ec2::254]",
            "[::ffff:169.254.169.254]",
            "[64:ff9b::a9fe:a9fe]",
        ],
    )
    def test_metadata_and_link_local_addresses_are_never_allowed(self, host: str) -> None:
        with pytest.raises(RefusedError, match="link-local or metadata"):
            Access([], ["*", "169.254.0.0/16", "::/0"]).check_endpoint(Endpoint.parse(f"nbd://{host}/x"))

    def test_a_name_that_leads_to_a_metadata_address_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        resolving(monkeypatch, "10.0.0.1", "169.254.169.254")
        with pytest.raises(RefusedError, match="link-local or metadata"):
            Access([], ["*"]).check_endpoint(Endpoint.parse("nbd://store.example/x"))

    def test_every_address_of_a_name_has_to_be_allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        resolving(monkeypatch, "10.0.0.1", "192.0.2.1")
        with pytest.raises(RefusedError, match=r"192\.0\.2\.1"):
            Access([], ["10.0.0.0/8"]).check_endpoint(Endpoint.parse("nbd://store.example/x"))

    def test_a_listed_name_is_connected_to_by_the_address_that_was_checked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resolving(monkeypatch, "10.0.0.1", "10.0.0.2")
        checked = Access([], ["Store.example:10809"]).check_endpoint(Endpoint.parse("nbds://store.example/x"))
        assert [e.host for e in checked] == ["10.0.0.1", "10.0.0.2"]
        assert {e.server_name for e in checked} == {"store.example"}

    def test_a_name_without_an_address_is_unavailable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def getaddrinfo(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        with pytest.raises(UnavailableError, match=r"store\.example"):
            Access([], ["*"]).check_endpoint(Endpoint.parse("nbd://store.example/x"))

    def test_a_unix_socket_has_to_lie_under_a_root_or_be_listed(self, root: Path) -> None:
        path = root.parent / "s"
        path.touch()
        endpoint = Endpoint.parse(f"nbd+unix:///x?socket={path}")
        with pytest.raises(RefusedError):
            Access([str(root)], ["*"]).check_endpoint(endpoint)
        Access([str(root.parent)], []).check_endpoint(endpoint)
        Access([str(root)], [str(path)]).check_endpoint(endpoint)

    def test_a_directory_of_certificates_has_to_lie_under_a_root(self, root: Path) -> None:
        endpoint = Endpoint.parse("nbds://10.0.0.1/x?tls-certificates=/etc")
        with pytest.raises(RefusedError, match="/etc"):
            Access([str(root)], ["*"]).check_endpoint(endpoint)
