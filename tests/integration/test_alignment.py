"""Odd sizes and odd extents onto a server that takes whole blocks of 4 KiB only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import MIB, Nbdkit, Stack, make_disk, random_disk, running_stack

pytestmark = pytest.mark.needs("nbdkit")
BLOCK = 4096


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


class StrictBlocks(Nbdkit):
    """Answers EINVAL to anything that is not whole blocks."""

    def __init__(self, image: Path) -> None:
        sizes = [f"blocksize-minimum={BLOCK}", f"blocksize-preferred={BLOCK}", "blocksize-maximum=32M"]
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
