"""Bitmaps of tracking: what they name together is at least what was written, or they are not believed."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from coordinator.model.bitmap import Owner, Tracking, all_of, epoch_of, leftovers, name_of, rotate

OWNER = Owner("0a1b", "shop", "db/vda")


@dataclass
class Bitmap:
    """As QEMU keeps one: `is_stored` since it was last closed in peace."""

    is_recording: bool = True
    is_usable: bool = True
    is_stored: bool = False
    blocks: set[int] = field(default_factory=set)


class Disk(RuleBasedStateMachine):
    """A disk whose guest writes, is ended in peace or killed, while epochs are cut, published and aborted. What they
    build on is the newest point, or an older one, or none, where points cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmaps: dict[str, Bitmap] = {}
        self.written: dict[int, set[int]] = {0: set()}
        """By point, since its cut."""
        self.epoch = 0

    @rule(block=st.integers(0, 5))
    def write(self, block: int) -> None:
        for blocks in self.written.values():
            blocks.add(block)
        for bitmap in self.bitmaps.values():
            if bitmap.is_recording:
                bitmap.blocks.add(block)

    @rule(is_published=st.booleans(), removed=st.integers(0, 9), unread=st.integers(0, 2))
    def cut(self, is_published: bool, removed: int, unread: int) -> None:
        self.epoch += 1
        parent = sorted(self.written)[-1 - min(unread, len(self.written) - 1)]
        rotation = rotate(self._tracking(), OWNER, parent, self.epoch)
        for name in rotation.disable:
            assert self.bitmaps[name].is_usable, "QEMU refuses to disable an inconsistent one"
            self.bitmaps[name].is_recording = False
        named = set().union(*(self.bitmaps[name].blocks for name in rotation.changed))
        assert rotation.compare or self.written[parent] <= named
        for name in rotation.remove:
            del self.bitmaps[name]
        self.bitmaps[rotation.add] = Bitmap()
        if is_published:
            self.written[self.epoch] = set()
        for name in leftovers(self._tracking(), OWNER, max(self.written))[:removed]:
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
        """As QEMU lists them, the newest first."""
        return [Tracking(name, b.is_recording, b.is_usable) for name, b in reversed(self.bitmaps.items())]


TestDisk = Disk.TestCase
TestDisk.settings = settings(max_examples=300, stateful_step_count=30, deadline=None, print_blob=True)


def tracking(epoch: int, *, is_recording: bool = True, is_usable: bool = True) -> Tracking:
    return Tracking(name_of(OWNER, epoch), is_recording, is_usable)


def test_after_a_published_epoch_its_own_bitmap_is_all_there_is_to_read() -> None:
    rotation = rotate([tracking(7)], OWNER, 7, 8)
    assert (rotation.add, rotation.changed, rotation.compare) == (
        "flushpoint:0a1b:shop:db/vda:8",
        ("flushpoint:0a1b:shop:db/vda:7",),
        "",
    )
    assert rotation.disable == rotation.changed


def test_after_aborted_epochs_all_their_bitmaps_are_read_together() -> None:
    found = [tracking(7, is_recording=False), tracking(8, is_recording=False), tracking(9)]
    assert [epoch_of(OWNER, n) for n in rotate(found, OWNER, 7, 10).changed] == [7, 8, 9]


def test_a_bitmap_that_did_not_record_all_the_time_is_not_believed_after_an_aborted_epoch_neither() -> None:
    """Bitmap 7 was stopped by somebody; the cut of 8 adds one that records, and 8 is aborted."""
    stopped = rotate([tracking(7, is_recording=False)], OWNER, 7, 8)
    assert (stopped.remove, stopped.changed) == ((name_of(OWNER, 7),), ())
    assert rotate([tracking(8)], OWNER, 7, 9).compare == "no bitmap records what was written since point 7"
    assert rotate([tracking(8)], OWNER, 8, 9).compare == "", "published, it begins anew"


def test_bitmaps_of_others_mean_nothing() -> None:
    others = [
        "flushpoint:ffff:shop:db/vda:7",
        "flushpoint:0a1b:other:db/vda:7",
        "flushpoint:0a1b:shop:web/vda:7",
        "flushpoint:0a1b:shop:7",
        "backup-7",
        "flushpoint:0a1b:shop:db/vda:07",
        "flushpoint:0a1b:shop:db/vda:x",
    ]
    rotation = rotate([Tracking(name, True, True) for name in others], OWNER, 7, 8)
    assert (rotation.disable, rotation.changed) == ((), ())
    assert rotation.compare == "no bitmap records what was written since point 7"


def test_after_a_compare_no_bitmap_is_left_that_an_older_point_or_a_newer_one_could_be_told_by() -> None:
    """7 is a point that the cut of 9 did not see, so that 9 builds on 6; somebody has stopped bitmap 7."""
    stopped = [tracking(7, is_recording=False), tracking(6, is_recording=False), tracking(5, is_recording=False)]
    rotation = rotate(stopped, OWNER, 6, 9)
    assert rotation.remove == tuple(name_of(OWNER, number) for number in (5, 6, 7))
    assert rotate([tracking(7, is_recording=False)], OWNER, 0, 9).remove == (name_of(OWNER, 7),)


def test_a_disk_that_has_changed_its_size_is_compared() -> None:
    rotation = rotate([tracking(7)], OWNER, 7, 8, useless="the disk has changed its size")
    assert (rotation.since, rotation.compare) == (0, "the disk has changed its size")
    assert rotation.remove == (name_of(OWNER, 7),)


def test_what_tells_of_another_disk_goes_with_the_leftovers_and_all_with_a_disk_that_leaves() -> None:
    """Of two disks that were exchanged, say: it would record for ever."""
    exchanged = "flushpoint:0a1b:shop:web/vda:9"
    kept = ["flushpoint:0a1b:mail:db/vda:3", "nightly"]
    found = [tracking(10), tracking(7), *(Tracking(name, True, True) for name in (exchanged, *kept))]
    assert leftovers(found, OWNER, 10) == (name_of(OWNER, 7), exchanged)
    assert all_of(found, OWNER) == (name_of(OWNER, 7), exchanged, name_of(OWNER, 10))


def test_leftovers_go_oldest_first() -> None:
    """Were 6 gone before 5, and then 7 not to be read, 5 and 7 would tell less than what was written since 5."""
    found = [tracking(7), tracking(6, is_recording=False), tracking(5, is_recording=False)]
    assert leftovers(found, OWNER, 7) == tuple(name_of(OWNER, number) for number in (5, 6))


@given(st.text(max_size=40))
def test_a_name_means_an_epoch_only_if_it_is_what_we_would_call_it(text: str) -> None:
    for name in (text, f"flushpoint:0a1b:shop:db/vda:{text}"):
        epoch = epoch_of(OWNER, name)
        assert epoch is None or name == name_of(OWNER, epoch)
