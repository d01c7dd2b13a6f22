"""What a server said about the export it opened, under the names that callers use."""

from __future__ import annotations

from dataclasses import dataclass

from workers.nbd.wire import BlockSizes, TransmissionFlag


@dataclass(frozen=True)
class Opened:
    """The outcome of NBD_OPT_GO and the options before it; `size` in bytes, `context_ids` by name."""

    size: int
    flags: int
    blocks: BlockSizes
    structured: bool
    context_ids: dict[str, int]


class ExportAttributes:
    """Attributes shared by `Connection` and `Session`. Sizes are bytes."""

    def __init__(self, opened: Opened) -> None:
        flags = TransmissionFlag(opened.flags)
        self.opened = opened
        self.size = opened.size
        self.flags = opened.flags
        self.read_only = TransmissionFlag.READ_ONLY in flags
        self.can_flush = TransmissionFlag.SEND_FLUSH in flags
        self.can_fua = TransmissionFlag.SEND_FUA in flags
        self.can_trim = TransmissionFlag.SEND_TRIM in flags
        self.can_zero = TransmissionFlag.SEND_WRITE_ZEROES in flags
        self.can_fast_zero = TransmissionFlag.SEND_FAST_ZERO in flags
        self.can_multi_conn = TransmissionFlag.CAN_MULTI_CONN in flags
        self.min_block = opened.blocks.minimum
        self.preferred_block = opened.blocks.preferred
        self.max_block = opened.blocks.maximum
        """What one request may carry; calls longer than this are split."""
        self.structured = opened.structured
        self.contexts = frozenset(opened.context_ids)
        """The meta contexts the server granted."""
