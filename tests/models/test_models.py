"""The model of who may remove what (collection.pml), searched by spin: the model holds, and each mutation is found out.

A scenario is searched to its end: every order in which its processes can act. All of them in one would be far too many
states, so each scenario has what some rule is about. To look at what spin has found: see CONTRIBUTING.md.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

MODEL = Path(__file__).parent / "collection.pml"
MEMORY_MIB = 2000
DEPTH = 10_000
"""Steps of one history; the longest has some 400."""
SEARCH_S = 120.0
"""The longest takes 25 s here."""

_COMPACTION = ("COMPACTIONS=1", "FIRST_G2=B")
SCENARIOS = {
    "two writers": ("WRITERS_G=1", "WRITERS_H=1"),
    "two prunes": ("WRITERS_G=1", "PRUNES=2", "ROUNDS=3"),
    "two prunes and the index of blocks": ("WRITERS_H=1", "PRUNES=2", "ROUNDS=3"),
    "a reader": ("READERS=1", "PRUNES=2", "ROUNDS=3", "HOURS=1"),
    "a writer that sleeps": ("WRITERS_G=1", "ROUNDS=3", "HOURS=1"),
    "two writers of a group": ("WRITERS_G=2", "ROUNDS=1", "HOURS=1", "TAKES=0"),
    "a compaction": ("WRITERS_G=1", "ROUNDS=3", *_COMPACTION, "FIRST_H1=A"),
    "a compaction and the index of blocks": ("WRITERS_H=1", "ROUNDS=3", *_COMPACTION),
    "a compaction and a reader": ("READERS=1", "ROUNDS=3", *_COMPACTION, "HOURS=1"),
    "a compaction that sleeps": (
        "COMPACTIONS=1",
        "NOMINATED=1",
        "PRUNES=2",
        "ROUNDS=4",
        "HOURS=1",
        "KEEP_ALL=1",
        "ONE_LISTING",
    ),
    "two compactions": ("COMPACTIONS=2", "NOMINATED=1", "WRITERS_H=1", "TAKES=B", "ALL_PUBLISH", "ONE_LISTING"),
    "leftovers of writers": ("WRITERS_G=1", "WRITERS_H=1", "ROUNDS=1", "LAST_ROUNDS=2"),
    "leftovers of prunes": ("WRITERS_H=1", "PRUNES=2", "LAST_ROUNDS=2"),
    "leftovers of readers": ("READERS=1", "PRUNES=2", "LAST_ROUNDS=2"),
    "leftovers of compactions": ("WRITERS_G=1", "ROUNDS=1", "LAST_ROUNDS=2", *_COMPACTION),
}
MUTATIONS = {
    # what a writer does
    "LOOK_BEFORE_HOLD": "a writer that sleeps",
    "NO_INDEX_CHECK": "a writer that sleeps",
    "NO_PARENT_CHECK": "a writer that sleeps",
    "NO_MOVED_CHECK": "a compaction and the index of blocks",
    "MOVED_BEFORE_CONDEMNED": "a compaction and the index of blocks",
    "PLAIN_PUT": "two writers of a group",
    "LET_GO_FIRST": "a writer that sleeps",
    # what a prune does
    "OPEN_BEFORE_CONDEMN": "two writers",
    "NO_WAIT": "two writers",
    "NO_RECHECK": "two writers",
    "REMOVE_AT_ONCE": "two writers",
    "POINTS_FIRST": "two prunes",
    "PASS_OVER_VANISHED": "a compaction",
    "HELD_ONLY_WHEN_RETAINED": "a reader",
    "GONE_IS_NOT_OVER": "leftovers of writers",
    # what a compaction does
    "MOVE_AT_ONCE": "a compaction and the index of blocks",
    "NOMINATION_DROPPED": "two compactions",
    "SLEEPS_BEFORE_RECORD": "a compaction that sleeps",
}

pytestmark = pytest.mark.needs("spin", "gcc")


@dataclass(frozen=True)
class Searched:
    """What pan said; `is_complete` if no state is left that it has not seen."""

    said: str
    errors: int
    is_complete: bool


def search(directory: Path, defines: tuple[str, ...]) -> Searched:
    options = [f"-D{define}" for define in defines]
    _run(directory, "spin", "-a", *options, str(MODEL))
    # -w: what spin writes compiles with warnings
    _run(directory, "gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MIB}", "-o", "pan", "pan.c")
    # -E: who is told to wait for ever may; -b: a history cut short is an error; -n: no list of what was never reached
    said = _run(directory, "./pan", "-E", "-b", "-n", f"-m{DEPTH}")
    errors = re.search(r"errors: (\d+)", said)
    assert errors is not None, said
    return Searched(said, int(errors[1]), "Search not completed" not in said and "reached -DMEMLIM" not in said)


def _run(directory: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=directory, timeout=SEARCH_S, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_wanted_is_removed_in_whatever_order_all_act(tmp_path: Path, scenario: str) -> None:
    searched = search(tmp_path, SCENARIOS[scenario])
    assert (searched.errors, searched.is_complete) == (0, True), searched.said


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_step_left_out_or_done_too_early_is_found_out(tmp_path: Path, mutation: str) -> None:
    assert search(tmp_path, (*SCENARIOS[MUTATIONS[mutation]], mutation)).errors > 0


def test_every_mutation_of_the_model_is_tried() -> None:
    """A name that the model does not know would be found out by nobody, and one that nobody tries proves nothing."""
    switches = set(re.findall(r"(?:#ifn?def|defined\() *([A-Z_][A-Z_0-9]*)", MODEL.read_text()))
    scenario = {define.partition("=")[0] for defines in SCENARIOS.values() for define in defines}
    assert switches - scenario - {"FIRST_G1"} == set(MUTATIONS)
