"""Which sockets of its host an agent connects to. It may open any, and whoever writes groups names them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from coordinator.model.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Sockets:
    """Those below `directories`; all, if there are none."""

    directories: tuple[str, ...]

    def checked(self, path: str) -> Path:
        """What is to be connected to: `path`, with every symbolic link followed where it matters. RefusedError."""
        if not self.directories:
            return Path(path)
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(os.path.realpath(directory)) for directory in self.directories):
            led = f" (it leads to {real})" if str(real) != path else ""
            raise RefusedError(
                f"{path}{led} lies in no directory for sockets of guests: {', '.join(self.directories)}",
                "correct the group, or extend FLUSHPOINT_AGENT_SOCKETS on the host",
            )
        return real
