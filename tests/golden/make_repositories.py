"""Makes the golden repositories anew: `python -m tests.golden.make_repositories`. Only for a new format.

One plain and one encrypted with KEY, each with every kind of object: a full point, one by comparison over it, an
aborted epoch, a pruned point, a pack that compaction moved, a disk whose size is no multiple of anything.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from coordinator.model.extent import BLOCK_BYTES, SEGMENT_BYTES
from coordinator.model.point import Retention
from tests.repositories import BytesSource, backup, make_repository, write_epoch
from workers.repository.collect import prune
from workers.repository.compact import compact
from workers.repository.epochs import abandon

HERE = Path(__file__).parent
KEY = "0f" * 32
KINDS = ("plain", "encrypted")
SIZE = SEGMENT_BYTES + 5 * BLOCK_BYTES + 777
POINTS = (3, 4)
"""The epochs that are left."""


def content(epoch: int) -> bytes:
    """What the disk held at an epoch: few blocks, some that do not compress, zeroes between them."""
    data = bytearray(SIZE)
    for number in range(1, epoch + 1):
        dice = random.Random(number)
        for block in (0, number, 3 * number, 128, 133):
            start, end = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, SIZE)
            patch = dice.randbytes(512) + bytes([number]) * (BLOCK_BYTES - 512)
            data[start:end] = patch[: end - start]
    return bytes(data)


def main() -> None:
    for kind in KINDS:
        directory = HERE / f"repository-1-{kind}"
        shutil.rmtree(directory, ignore_errors=True)
        key_file = HERE / "key"
        key_file.write_text(KEY)
        with make_repository(directory, f"file:{key_file}" if kind == "encrypted" else "") as repository:
            backup(repository, "golden", content(1))
            aborted = write_epoch(repository, "golden", BytesSource(content(2)), "compare")
            abandon(repository, "golden", aborted.epoch.number, "cancelled")
            backup(repository, "golden", content(3), "compare")
            backup(repository, "golden", content(4), "compare")
            prune(repository, None, Retention(last=2))
            compact(repository, live_share=1.0)
            prune(repository, None, Retention(last=2))
            prune(repository, None, Retention(last=2))


if __name__ == "__main__":
    main()
