"""Bitmaps of tracking: what they name together is at least what was written, or they are not believed."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from coordinator.model.bitmap import Tracking, epoch_of, leftovers, name_of, rotate

REPOSITORY, GROUP = "0a1b", "shop"


@dataclass
class Bitmap:
    """As QEMU keeps one: `is_stored` since it was last closed in peace."""

    is_recording: bool = True
    is_usable: bool = True
    is_stored: bool = False
    blocks: set[int] = field(default_factory=set)


class Disk(RuleBasedStateMachine):
    """A disk whose guest writes, is ended in peace or killed, while epochs are cut, published and aborted."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmaps: dict[str, Bitmap] = {}
        self.written: set[int] = set()
        """Since the cut of the newest point."""
        self.point = self.epoch = 0

    @rule(block=st.integers(0, 5))
    def write(self, block: int) -> None:
        self.written.add(block)
        for bitmap in self.bitmaps.values():
            if bitmap.is_recording:
                bitmap.blocks.add(block)

    @rule(is_published=st.booleans(), tidies=st.booleans())
    def cut(self, is_published: bool, tidies: bool) -> None:
        self.epoch += 1
        rotation = rotate(self._tracking(), REPOSITORY, GROUP, self.point, self.epoch)
        for name in rotation.disable:
            assert self.bitmaps[name].is_usable, "QEMU refuses to disable an inconsistent one"
            self.bitmaps[name].is_recording = False
        for name in rotation.remove:
            del self.bitmaps[name]
        self.bitmaps[rotation.add] = Bitmap()
        named = set().union(*(self.bitmaps[name].blocks for name in rotation.changed))
        assert rotation.compare or self.written <= named
        if is_published:
            self.point, self.written = self.epoch, set()
        if tidies:
            for name in leftovers(self._tracking(), REPOSITORY, GROUP, self.point):
                del self.bitmaps[name]

    @rule()
    def end_in_peace(self) -> None:
        for bitmap in self.bitmaps.values():
            bitmap.is_stored = True

    @rule()
    def be_killed(self) -> None:
        self.bitmaps = {
            name: Bitmap(is_recording=False, is_usable=False, is_stored=True)
            for name, bitmap in self.bitmaps.items()
            if bitmap.is_stored
        }

    @rule()
    def be_recorded_no_more(self) -> None:
        """A user, or a tool of his, disables what he does not know."""
        for bitmap in self.bitmaps.values():
            bitmap.is_recording = False

    def _tracking(self) -> list[Tracking]:
        return [Tracking(name, b.is_recording, b.is_usable) for name, b in self.bitmaps.items()]


TestDisk = Disk.TestCase
TestDisk.settings = settings(max_examples=300, stateful_step_count=30, deadline=None, print_blob=True)


def tracking(epoch: int, *, is_recording: bool = True, is_usable: bool = True) -> Tracking:
    return Tracking(name_of(REPOSITORY, GROUP, epoch), is_recording, is_usable)


def test_after_a_published_epoch_its_own_bitmap_is_all_there_is_to_read() -> None:
    rotation = rotate([tracking(7)], REPOSITORY, GROUP, 7, 8)
    assert (rotation.add, rotation.changed, rotation.compare) == (
        "flushpoint:0a1b:shop:8",
        ("flushpoint:0a1b:shop:7",),
        "",
    )
    assert rotation.disable == rotation.changed


def test_after_aborted_epochs_all_their_bitmaps_are_read_together() -> None:
    found = [tracking(7, is_recording=False), tracking(8, is_recording=False), tracking(9)]
    assert [epoch_of(REPOSITORY, GROUP, n) for n in rotate(found, REPOSITORY, GROUP, 7, 10).changed] == [7, 8, 9]


def test_a_bitmap_that_did_not_record_all_the_time_is_not_believed_after_an_aborted_epoch_neither() -> None:
    """Bitmap 7 was stopped by somebody; the cut of 8 adds one that records, and 8 is aborted."""
    stopped = rotate([tracking(7, is_recording=False)], REPOSITORY, GROUP, 7, 8)
    assert (stopped.remove, stopped.changed) == ((name_of(REPOSITORY, GROUP, 7),), ())
    assert rotate([tracking(8)], REPOSITORY, GROUP, 7, 9).compare == "no bitmap records what was written since point 7"
    assert rotate([tracking(8)], REPOSITORY, GROUP, 8, 9).compare == "", "published, it begins anew"


def test_bitmaps_of_others_mean_nothing() -> None:
    others = [
        "flushpoint:ffff:shop:7",
        "flushpoint:0a1b:other:7",
        "backup-7",
        "flushpoint:0a1b:shop:07",
        "flushpoint:0a1b:shop:x",
    ]
    rotation = rotate([Tracking(name, True, True) for name in others], REPOSITORY, GROUP, 7, 8)
    assert (rotation.disable, rotation.changed) == ((), ())
    assert rotation.compare == "no bitmap records what was written since point 7"


@given(st.text(max_size=40))
def test_a_name_means_an_epoch_only_if_it_is_what_we_would_call_it(text: str) -> None:
    for name in (text, f"flushpoint:{REPOSITORY}:{GROUP}:{text}"):
        epoch = epoch_of(REPOSITORY, GROUP, name)
        assert epoch is None or name == name_of(REPOSITORY, GROUP, epoch)
