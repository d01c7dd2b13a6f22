"""How much to give a peer at once, when it does not say how fast it is.

A pause or a cancel waits for what is in flight, so that should take a fraction of a second. Both classes start small,
grow while answers are quick, and shrink while they are slow. What is asked for in one go is a `Step` (a range to be
zeroed, a range whose extents are asked for): a server that punches holes is given gigabytes, one that writes the zeroes
megabytes. How many requests are in flight is a `Window`: 16 for a disk nearby, one or two for a thin line.

They shrink only where more takes longer. A peer that takes its time over each request, whatever its size and whatever
else is under way, would do no more for smaller or fewer ones.
"""

from __future__ import annotations

import math

LEAST_BYTES = 1024 * 1024
"""The first step: as much as one write, which any server does in one go."""
QUICK_S = 0.2
SLOW_S = 0.5
"""Half of the second within which a verb is to be felt."""
FREE = 1.5
"""An answer that took at most so many times the quickest one did not take longer for being one of more."""


class _Judge:
    """What the time of an answer says about more at once."""

    def __init__(self) -> None:
        self._least_s = math.inf

    def change(self, seconds: float) -> int:
        """1: more at once; -1: less; 0: as it is."""
        self._least_s = min(self._least_s, seconds)
        if seconds < QUICK_S or seconds < self._least_s * FREE:
            return 1
        return -1 if seconds > SLOW_S else 0


class Step:
    """`bytes` to ask for: a power of two times LEAST_BYTES, up to `most`. Not thread-safe."""

    def __init__(self, most: int) -> None:
        self.bytes = LEAST_BYTES
        self._most = most
        self._judge = _Judge()

    def took(self, length: int, seconds: float) -> None:
        """`length` bytes were asked for and answered. Less than a whole step, or an older one, tells nothing."""
        if length == self.bytes:
            change = self._judge.change(seconds)
            self.bytes = max(LEAST_BYTES, min(self._most, int(self.bytes * 2.0**change)))


class Window:
    """`size` requests may be in flight, up to `most`. Not thread-safe."""

    def __init__(self, most: int) -> None:
        self.size = 1
        self._most = most
        self._judge = _Judge()

    def took(self, seconds: float) -> None:
        """A request was answered."""
        self.size = max(1, min(self._most, self.size + self._judge.change(seconds)))
