"""The command lines that boot a VM from served disks."""

from __future__ import annotations

from workers.nbd.endpoint import Endpoint, Tls
from workers.repository.boot import Served, boot_hints


def served(
    disk: str, *, read_only: bool = False, socket: str | None = "/run/a,b.sock", tls: Tls | None = None
) -> Served:
    at = Endpoint(None, 0, socket, disk, tls) if socket else Endpoint("::1", 10809, None, disk, tls)
    return Served(disk, at, 1 << 20, read_only)


def test_each_vm_has_a_command_and_its_first_disk_boots() -> None:
    text = "\n".join(boot_hints([served("db/vdb"), served("web/vda"), served("db/vda")]))
    db, web = text.split("to boot web")
    assert "-name db" in db
    assert db.index("export=db/vda") < db.index("export=db/vdb")
    assert db.count("bootindex=1") == 1
    assert "drive=d0,bootindex=1" in db
    assert "drive=d1,werror=stop" in db
    assert "-name web" in web
    assert "export=web/vda" in web


def test_commas_in_names_are_doubled_as_qemu_wants() -> None:
    [line] = [hint for hint in boot_hints([served("vda")]) if "-blockdev" in hint]
    assert "server.path=/run/a,,b.sock" in line


def test_writes_to_a_read_only_export_go_into_a_file_that_is_thrown_away() -> None:
    first, command, _ = boot_hints([served("vda", read_only=True, socket=None)])
    assert "thrown away" in first
    assert "file=nbd://[::1]/vda,format=raw,if=none,id=d0,snapshot=on" in command


def test_no_guest_comes_up_on_a_network() -> None:
    assert all("-nic none" in hint for hint in boot_hints([served("vda"), served("b/vda")]) if "qemu-system" in hint)


def test_under_tls_nothing_is_said() -> None:
    assert list(boot_hints([served("vda", tls=Tls())])) == []
