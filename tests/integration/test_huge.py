"""A disk of 16 TiB virtual size with little data: every source that can tell its holes, to every target."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.disks import loop_device
from tests.stack import MIB, QemuNbd, Stack, make_disk, running_stack

pytestmark = pytest.mark.needs("qemu-nbd", "qemu-img", "qemu-io", "losetup")

SIZE = 16 * 1024**4
DATA = {0: MIB, 3 * 1024**4 + 512: 70_000, 8 * 1024**4: 64 * 1024, SIZE - 4096: 4096}
"""offset -> bytes of data"""
# A block device cannot tell holes from data, so that all 16 TiB of one would have to be read: it is only a target.
PAIRS = list(itertools.product(("raw", "qcow2", "nbd"), ("raw", "qcow2", "nbd", "device")))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


def qemu_img(*arguments: object) -> str:
    return subprocess.run(
        ["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.mark.parametrize(("source_kind", "target_kind"), PAIRS)
def test_its_data_alone_is_copied(stack: Stack, tmpfs_path: Path, source_kind: str, target_kind: str) -> None:
    """Files in memory, since ext4 holds none of 16 TiB."""
    if not _holds(tmpfs_path):
        pytest.skip(f"{tmpfs_path} holds no file of 16 TiB")
    original = make_disk(tmpfs_path / "original.img", SIZE, {at: os.urandom(length) for at, length in DATA.items()})
    image = tmpfs_path / f"target.{'qcow2' if target_kind == 'qcow2' else 'img'}"
    with contextlib.ExitStack() as servers:
        source, target = str(original), str(image)
        if source_kind == "qcow2":
            source = str(tmpfs_path / "source.qcow2")
            qemu_img("convert", "-f", "raw", "-O", "qcow2", original, source)
        elif source_kind == "nbd":
            source = servers.enter_context(QemuNbd(original, "--read-only")).uri
        if target_kind in ("nbd", "device"):  # with old data, which must not shine through
            make_disk(image, SIZE, {MIB: b"old" * 1000, 9 * 1024**4: b"old" * 1000})
        if target_kind == "nbd":
            target = servers.enter_context(QemuNbd(image)).uri
        elif target_kind == "device":
            target = str(servers.enter_context(loop_device(image)))
        # A comparing pass would read every byte of a device, of which nobody knows what is zero.
        job = stack.mirror(source, target, source_frozen=True)
        assert job.error == "", stack.logs()
    assert job.disk_size == SIZE
    assert job.bytes_sent <= 2 * MIB
    target_format = "qcow2" if target_kind == "qcow2" else "raw"
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", target_format, original, image)


def _holds(directory: Path) -> bool:
    try:
        make_disk(directory / "probe.img", SIZE, {}).unlink()
    except OSError:
        return False
    return True
