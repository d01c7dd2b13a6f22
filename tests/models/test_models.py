"""The models, searched by spin: each holds, and each of its mutations is found out.

collection.pml: who may remove what from a repository. barrier.pml: the barrier of a group's epoch. rotation.pml: which
bitmaps tell what was written. decide.pml: how an epoch is decided. pivot.pml: how guests move to targets.

A scenario is searched to its end: every order in which its processes can act. All of them in one would be far too many
states, so each scenario has what some rule is about. To look at what spin has found: see CONTRIBUTING.md.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

DEPTH = 10_000
"""Steps of one history; the longest has some 400."""
SEARCH_S = 120.0
"""The longest takes 25 s here."""


@dataclass(frozen=True)
class Model:
    """Scenarios by name: their defines. Mutations: the scenario in which each is found out."""

    name: str
    scenarios: Mapping[str, tuple[str, ...]]
    mutations: Mapping[str, str]
    defaults: frozenset[str] = frozenset()
    """What a scenario could define and none does."""
    options: tuple[str, ...] = ()
    """Of the search."""
    memory_mib: int = 1000

    @property
    def path(self) -> Path:
        return Path(__file__).parent / f"{self.name}.pml"


_COMPACTION = ("COMPACTIONS=1", "FIRST_G2=B")
COLLECTION = Model(
    "collection",
    scenarios={
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
    },
    mutations={
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
    },
    defaults=frozenset({"FIRST_G1"}),
    options=("-E",),  # who is told to wait for ever may
    memory_mib=2000,
)
BARRIER = Model(
    "barrier",
    scenarios={
        "agents that are late": (),
        "agents that die": ("KILLS=2",),
        "three machines": ("VMS=3",),
        "three machines, and an agent that dies": ("VMS=3", "KILLS=1", "REPEATS=0"),
        "a paused machine": ("PAUSED=1", "RESUMES=1", "KILLS=1"),
        "an agent that does not wait": ("IMPATIENT=1", "KILLS=1"),
        "a ledger that forgets": ("LOSSES=1", "KILLS=1"),
    },
    mutations={
        # what the ledger decides
        "DEADLINE_IGNORED": "agents that are late",
        "FROZEN_COUNTED": "agents that are late",
        "CUTS_COUNTED": "agents that are late",
        "EARLY_COUNTS": "an agent that does not wait",
        "GO_OVER_ABORT": "agents that are late",
        "ABORT_OVER_GO": "agents that are late",
        # what an agent does
        "FREEZE_UNASKED": "agents that are late",
        "CUT_UNASKED": "agents that are late",
        "OWN_TIMEOUT": "agents that are late",
        "NO_PROOF": "agents that are late",
        "PROOF_BEFORE_CUT": "agents that are late",
        "STOP_BEFORE_JOURNAL": "agents that die",
        "UNJOURNAL_FIRST": "agents that die",
        "THAW_ALL": "a paused machine",
        # what a guard does
        "NO_GUARD": "agents that die",
        "GUARD_ACTS_ONCE": "agents that die",
    },
)
ROTATION = Model(
    "rotation",
    scenarios={
        "any point as a parent": ("ENDS=0", "EPOCHS=5"),
        "the newest point as the parent": ("OLDER=0",),
        "a QEMU that ends": (),
        "a raw image": ("KEEPS=0",),
        "two blocks": ("BLOCKS=2", "EPOCHS=3"),
    },
    mutations={
        # what bitmap.py concludes
        "NEWEST_ONLY": "the newest point as the parent",
        "GAPS_TRUSTED": "the newest point as the parent",
        "OTHERS_TRUSTED": "the newest point as the parent",
        "NONE_REMOVED": "the newest point as the parent",
        "ONLY_PARENTS_REMOVED": "any point as a parent",
        "NEWER_REMOVED": "the newest point as the parent",
        "NEWEST_REMOVED_FIRST": "any point as a parent",
        # what the agent, and others, do
        "TWO_AT_ONCE": "the newest point as the parent",
        "DISABLED_IN_BETWEEN": "the newest point as the parent",
    },
)
DECIDE = Model(
    "decide",
    scenarios={
        "leaders that sleep": ("TAKEOVERS=1", "WORKERS=2"),
        "jobs that fail": ("FAILURES=1", "WORKERS=2"),
        "a prune": ("PRUNES=1", "TAKEOVERS=1"),
        "a prune, and jobs that are late": ("PRUNES=1", "WORKERS=2", "ROUNDS=1"),
        "two prunes": ("PRUNES=2",),
        "a ledger that forgets, and a leader that sleeps": ("LOSSES=1", "TAKEOVERS=1"),
        "a ledger that forgets, and jobs that are late": ("LOSSES=1", "WORKERS=2", "ROUNDS=1"),
        "a ledger that forgets, and a prune": ("LOSSES=1", "PRUNES=1"),
        "a ledger that forgets everything": ("RUINS=1", "WORKERS=2"),
    },
    mutations={
        # what a leader does
        "HALF": "jobs that fail",
        "SEAL_RETIRES": "jobs that fail",
        "RUN_NOT_FENCED": "a ledger that forgets, and jobs that are late",
        # what the jobs of a round do
        "COUNTED_IS_PARENT": "jobs that fail",
        "OPEN_UNDECIDED": "a ledger that forgets everything",
        "PLAIN_PUT": "a prune",
        "PLAIN_TOMBSTONE": "a prune",
        # what a prune does
        "NO_TOMBSTONE": "a prune",
        "COLLECT_UNDECIDED": "a prune",
    },
    defaults=frozenset({"LAST"}),
)
PIVOT = Model(
    "pivot",
    scenarios={
        "all may be late": ("STORMS=3",),
        "agents that die": ("KILLS=1", "LEAVES=1"),
        "agents and guards that die": ("KILLS=1", "CRASHES=1", "FAILS=1"),
        "targets and monitors that do not answer": ("FAILS=3", "SILENT=3"),
        "monitors that do not answer, and guards that die": ("SILENT=3", "CRASHES=1"),
        "a ledger that forgets": ("LOSSES=1", "KILLS=1", "STORMS=1"),
    },
    mutations={
        # what the ledger keeps, and the coordinator concludes
        "RUN_NOT_LOOKED_AT": "a ledger that forgets",
        "GO_NOT_LOOKED_AT": "all may be late",
        # what an agent does
        "MOVES_UNASKED": "all may be late",
        "NO_CONFIRM": "all may be late",
        "ONLY_CONT_AT_START": "agents and guards that die",
        "BESIDE_A_GUARD": "agents and guards that die",
        "GOES_BACK_BY_ITSELF": "targets and monitors that do not answer",
        "ASKED_IN_VAIN": "targets and monitors that do not answer",
        "LETS_RUN_UNANSWERED": "targets and monitors that do not answer",
        # what a guard does
        "GUARD_ONLY_CONT": "agents that die",
        "REVERTS_WHAT_RAN": "targets and monitors that do not answer",
        "CLOSES_UNREAD": "targets and monitors that do not answer",
        "GUARD_ALONE": "monitors that do not answer, and guards that die",
    },
)
MODELS = (COLLECTION, BARRIER, ROTATION, DECIDE, PIVOT)

pytestmark = pytest.mark.needs("spin", "gcc")


@dataclass(frozen=True)
class Searched:
    """What pan said; `is_complete` if no state is left that it has not seen."""

    said: str
    errors: int
    is_complete: bool


def search(directory: Path, model: Model, defines: tuple[str, ...], optimize: str = "-O2") -> Searched:
    options = [f"-D{define}" for define in defines]
    _run(directory, "spin", "-a", *options, str(model.path))
    # -w: what spin writes compiles with warnings
    memory = f"-DMEMLIM={model.memory_mib}"
    _run(directory, "gcc", optimize, "-w", "-DSAFETY", "-DCOLLAPSE", memory, "-o", "pan", "pan.c")
    # -b: a history cut short is an error; -n: no list of what was never reached
    said = _run(directory, "./pan", *model.options, "-b", "-n", f"-m{DEPTH}")
    errors = re.search(r"errors: (\d+)", said)
    assert errors is not None, said
    return Searched(said, int(errors[1]), "Search not completed" not in said and "reached -DMEMLIM" not in said)


def _run(directory: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=directory, timeout=SEARCH_S, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


_SCENARIOS = [pytest.param(m, name, id=f"{m.name}-{name}") for m in MODELS for name in m.scenarios]
_MUTATIONS = [pytest.param(m, name, id=f"{m.name}-{name}") for m in MODELS for name in m.mutations]


@pytest.mark.parametrize(("model", "scenario"), _SCENARIOS)
def test_what_a_model_asserts_holds_in_whatever_order_all_act(tmp_path: Path, model: Model, scenario: str) -> None:
    searched = search(tmp_path, model, model.scenarios[scenario])
    assert (searched.errors, searched.is_complete) == (0, True), searched.said


@pytest.mark.parametrize(("model", "mutation"), _MUTATIONS)
def test_a_step_left_out_or_done_too_early_is_found_out(tmp_path: Path, model: Model, mutation: str) -> None:
    scenario = model.scenarios[model.mutations[mutation]]
    # Most are found sooner than pan is optimized.
    assert search(tmp_path, model, (*scenario, mutation), optimize="-O0").errors > 0


@pytest.mark.parametrize("model", [pytest.param(model, id=model.name) for model in MODELS])
def test_every_mutation_of_a_model_is_tried(model: Model) -> None:
    """A name that the model does not know would be found out by nobody, and one that nobody tries proves nothing."""
    switches = set(re.findall(r"(?:#ifn?def|defined\() *([A-Z_][A-Z_0-9]*)", model.path.read_text()))
    defined = {define.partition("=")[0] for defines in model.scenarios.values() for define in defines}
    assert switches - defined - model.defaults == set(model.mutations)
