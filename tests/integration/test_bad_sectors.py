"""One bad sector: the policy is obeyed, the range is named, everything else is copied (I6)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.model.job import State
from tests.stack import MIB, Nbdkit, Stack, random_disk, running_stack, same_bytes

pytestmark = pytest.mark.needs("nbdkit")
BAD = 5 * MIB + 65536
SIZE = 12 * MIB


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


class BadSector(Nbdkit):
    """A disk one sector of which cannot be read (nbdkit's sh plugin) until `mended` exists."""

    def __init__(self, image: Path) -> None:
        self.mended = image.with_name("mended")
        script = image.with_name("bad.sh")
        script.write_text(
            "#!/bin/sh\n"
            'case "$1" in\n'
            f"get_size) echo {SIZE} ;;\n"
            f"pread) if [ ! -e {self.mended} ] && [ $4 -le {BAD} ] && [ $(($4 + $3)) -gt {BAD} ]; then\n"
            '         echo "EIO bad sector" >&2; exit 1; fi\n'
            f"       dd if={image} bs=65536 iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none ;;\n"
            "thread_model) echo parallel ;;\n"
            "can_multi_conn) exit 0 ;;\n"
            "*) exit 2 ;;\n"
            "esac\n"
        )
        script.chmod(0o700)
        super().__init__(image, "--readonly", "sh", str(script))


def test_report_names_the_range_that_failed(stack: Stack, tmp_path: Path) -> None:
    with BadSector(random_disk(tmp_path / "source.img", SIZE)) as server:
        job = stack.mirror(server.uri, tmp_path / "target.img")
    assert job.failed
    (event,) = [e for e in stack.events(job.id) if e["event"] == "BLOCK_JOB_ERROR"]
    assert event["offset"] <= BAD < event["offset"] + event["length"]  # type: ignore[operator]
    assert event["errno"] == errno.EIO
    assert event["operation"] == "read"


def test_stop_keeps_the_sector_dirty_and_copies_all_else(stack: Stack, tmp_path: Path) -> None:
    source = random_disk(tmp_path / "source.img", SIZE)
    with BadSector(source) as server:
        job = stack.submit(server.uri, tmp_path / "target.img", on_source_error="stop")
        paused = stack.wait(job.id, State.PAUSED)
        assert paused.io_status == "failed"
        assert paused.len - paused.offset == MIB
        server.mended.touch()
        stack.client.resume(job.id)
        ended = stack.wait(job.id)
    assert ended.error == ""
    assert ended.io_status == "ok"
    assert ended.bytes_sent == SIZE
    assert same_bytes(source, tmp_path / "target.img")
