"""A flush that fails loses what was written before it, whoever wrote it, and is told once (I2, I6).

The server is our own (tests/volatile_server.py): what it shows is not what it would hold after a power failure.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.model.job import IoStatus, State
from coordinator.model.units import UNIT_BYTES
from tests.stack import MIB, QemuNbd, Stack, random_disk, running_stack
from tests.volatile_server import volatile_server


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), slots=2) as running:
        yield running


@pytest.mark.parametrize(("policy", "number"), [("enospc", errno.ENOSPC), ("stop", errno.ENOSPC), ("stop", errno.EIO)])
def test_an_incremental_writes_again_what_a_failed_flush_lost_before_a_pause(
    stack: Stack, tmpfs_path: Path, policy: str, number: int
) -> None:
    """After the resume the target shows the new bytes, which are not durable: to compare them proves nothing."""
    source = random_disk(tmpfs_path / "source.img", 8 * MIB)
    with volatile_server(tmpfs_path / "s", 8 * MIB) as server:
        server.flush_error = number
        job = stack.submit(source, server.uri, sync="incremental", on_target_error=policy)
        if number == errno.ENOSPC:  # nothing can be hoped of trying again
            assert stack.wait(job.id, State.PAUSED).target_io_status is IoStatus.NOSPACE
            stack.client.resume(job.id)
        ended = stack.wait(job.id)
        assert ended.error == "", stack.logs()
        assert server.lost
        assert server.durable == source.read_bytes()


def test_units_of_other_movers_are_written_again_when_one_mover_is_told_of_the_loss(
    stack: Stack, tmpfs_path: Path
) -> None:
    """Two units are written, one mover's FLUSH fails and forgets both, the other's then succeeds."""
    size = 2 * UNIT_BYTES
    source = random_disk(tmpfs_path / "source.img", size)
    with volatile_server(tmpfs_path / "s", size) as server:
        server.flush_error = errno.EIO
        server.fail_when = lambda dirty: sum(length for _, length in dirty) == size
        ended = stack.mirror(source, server.uri)
        assert ended.error == "", stack.logs()
        assert sum(length for _, length in server.lost) == size, "the units did not overlap: nothing was tested"
        assert server.durable == source.read_bytes()
        assert ended.len == ended.offset == size
    told = [e for e in stack.events(ended.id) if e["event"] == "BLOCK_JOB_ERROR"]
    assert [e["errno"] for e in told] == [errno.EIO]


@pytest.mark.needs("qemu-nbd")
def test_a_flush_that_fails_on_a_fast_path_is_tried_again_as_on_any_other(stack: Stack, tmpfs_path: Path) -> None:
    source = random_disk(tmpfs_path / "source.img", 8 * MIB)
    with QemuNbd(source, "--read-only") as origin, volatile_server(tmpfs_path / "s", 8 * MIB) as server:
        server.flush_error = errno.EIO
        ended = stack.mirror(origin.uri, server.uri, on_target_error="report", source_frozen=True)
        assert ended.error == "", stack.logs()
        assert server.lost
        assert server.durable == source.read_bytes()
