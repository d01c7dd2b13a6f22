"""Odd sizes and odd extents onto a server that takes whole blocks of 4 KiB only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import MIB, Nbdkit, Stack, make_disk, random_disk, running_stack, same_bytes

pytestmark = pytest.mark.needs("nbdkit")
BLOCK = 4096


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


class StrictBlocks(Nbdkit):
    """Answers EINVAL to anything that is not whole blocks of `block` bytes."""

    def __init__(self, image: Path, block: int = BLOCK) -> None:
        sizes = [f"blocksize-minimum={block}", f"blocksize-preferred={block}", "blocksize-maximum=32M"]
        options = [*sizes, "blocksize-error-policy=error"]
        super().__init__(image, "--filter=blocksize-policy", "file", str(image), *options)


@pytest.mark.parametrize("sync", ["full", "incremental"])
def test_odd_bytes_reach_a_target_of_whole_blocks(stack: Stack, tmp_path: Path, sync: str) -> None:
    size = 9 * MIB + 1234
    source = make_disk(
        tmp_path / "source.img", size, {100: os.urandom(5 * MIB + 77), 8 * MIB + 3: os.urandom(MIB + 99)}
    )
    image = random_disk(tmp_path / "target.img", 10 * MIB)
    beyond = image.read_bytes()[size:]
    with StrictBlocks(image) as server:
        job = stack.mirror(source, server.uri, sync=sync)
    assert job.error == "", stack.logs()
    copied = image.read_bytes()
    assert copied[:size] == source.read_bytes()
    assert copied[size:] == beyond


@pytest.mark.parametrize("sync", ["full", "incremental"])
def test_a_source_is_read_in_whole_blocks(stack: Stack, tmp_path: Path, sync: str) -> None:
    """Its data begins and ends in the middle of blocks, as a sparse file's does on a file system of smaller blocks."""
    data = {100: os.urandom(300_000), 9 * MIB + 77: os.urandom(5000), 16 * MIB - 4096: os.urandom(4096)}
    source = make_disk(tmp_path / "source.img", 16 * MIB, data)
    target = make_disk(tmp_path / "target.img", 16 * MIB, {})
    with StrictBlocks(source, 64 * 1024) as server:
        job = stack.mirror(server.uri, target, sync=sync)
    assert job.error == "", stack.logs()
    assert job.bytes_sent < MIB
    assert same_bytes(source, target)


def test_a_disk_that_ends_in_the_middle_of_a_block_is_refused_before_anything_is_written(
    stack: Stack, tmp_path: Path
) -> None:
    odd = random_disk(tmp_path / "odd.img", 2 * MIB + 1234)
    old = odd.read_bytes()
    source = random_disk(tmp_path / "source.img", MIB)
    with StrictBlocks(odd) as server:
        to_it = stack.mirror(source, server.uri)
        from_it = stack.mirror(server.uri, tmp_path / "copy.img")
    for job in (to_it, from_it):
        assert job.error_code == "refused"
        assert f"no multiple of its block size of {BLOCK}" in job.error
    assert odd.read_bytes() == old
    assert not (tmp_path / "copy.img").exists()
