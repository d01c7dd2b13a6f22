"""Decompressing what nobody vouches for yet: bounded, whatever the data says of itself."""

from __future__ import annotations

import threading

import zstandard

from workers.repository.store.contract import Buffer

_local = threading.local()


def expanded(data: Buffer, limit: int) -> bytes:
    """The content of one zstd frame; ValueError if it is none, or larger than `limit` bytes.

    zstandard's own limit is for frames that do not say how large they are: any other is allocated as it says.
    """
    decompressor: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        if zstandard.frame_content_size(data) > limit:
            raise ValueError(f"it says that it is larger than {limit} bytes")
        return decompressor.decompress(data, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
