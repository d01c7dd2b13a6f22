"""How much of a disk is copied at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from workers.agent.room import Room

MIB = 1024**2


@pytest.mark.parametrize("limit", [1, MIB - 1, MIB, 1_000_000_000, 3 * MIB + 65535, 0])
def test_a_slice_ends_where_an_image_can_be_written_without_its_neighbour(tmp_path: Path, limit: int) -> None:
    room = Room(tmp_path, 0)
    found = room.slice(limit, 1)
    assert found > 0
    assert found % MIB == 0
    assert found <= max(limit, MIB) or limit == 0


def test_those_who_share_the_room_leave_half_of_it(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    room = Room(tmp_path, max(0, free - 64 * MIB))
    assert room.slice(0, 4) <= 9 * MIB
    assert Room(tmp_path, 1 << 60).slice(0, 4) == MIB, "it goes on, however little there is"
