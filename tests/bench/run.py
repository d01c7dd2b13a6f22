"""`make bench`: Flushpoint against nbdcopy, qemu-img, s5cmd, rclone and cp on this machine, through the whole path.

The embedded stack runs with two movers in a directory of its own; disks and servers are in memory where there
is room. A copy is timed from before it is submitted until its job has concluded. Sources are promised to be frozen
(--source-frozen): the others read once too, and would not notice a writer. Writes
docs/bench/results.json and docs/bench/results.png, or nothing with --quick.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from coordinator.model.errors import FlushpointError
from flushpoint.client import Client, connect
from tests.bench import report, scenarios
from tests.bench.backups import BackupBench
from tests.bench.many_points import ManyPointsBench
from tests.bench.scenarios import FULL, QUICK, Bench, Scale
from tests.demo.lab import GIB, Lab, LabError, peak_memory, wait_until
from tests.object_servers import ENVIRONMENT

MOVERS = 2
OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "bench"
START_S = 20.0


def measure(scale: Scale, console: Console) -> dict[str, Any]:
    begin = time.monotonic()
    with Lab("bench", 3 * scale.copy_bytes + GIB) as lab:
        start_up = scenarios.start_up(lab, scale.rounds)
        with connect() as client:
            results = {**_measure(lab, client, scale, console), "start_up": start_up}
    results["took_seconds"] = time.monotonic() - begin
    return results


def _measure(lab: Lab, client: Client, scale: Scale, console: Console) -> dict[str, Any]:
    if not wait_until(lambda: len(lab.stack.movers()) >= MOVERS, START_S):
        raise LabError(f"the embedded stack runs {len(lab.stack.movers())} movers instead of {MOVERS}")

    def say(line: str) -> None:
        console.print(f"  {line}", style="dim")

    def mover_peak() -> int:
        return max(peak_memory(mover.pid) for mover in lab.stack.movers())

    bench = Bench(lab, client, scale, say)
    return {
        "machine": report.machine(),
        "scale": asdict(scale),
        "movers": MOVERS,
        "fixed_cost": bench.fixed_cost(),
        "bulk": bench.bulk(),
        "scattered": bench.scattered(),
        "latency": bench.latency(),
        # They live as long as the stack, so their largest size is the largest over all of the above.
        "mover_peak_bytes": mover_peak(),
        "planning": bench.planning(),
        "backups": BackupBench(bench, lab, say).measure(),
        "mover_peak_bytes_with_backups": mover_peak(),
        "many_points": ManyPointsBench(lab, scale, say).measure(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little data and few rounds; writes no files")
    quick = parser.parse_args().quick
    os.environ["FLUSHPOINT_WORKER_SLOTS"] = str(MOVERS)
    os.environ |= ENVIRONMENT
    os.environ.pop("AWS_CA_BUNDLE", None)  # rclone does not start with one
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    try:
        results = measure(QUICK if quick else FULL, console)
    except (LabError, FlushpointError) as error:
        console.print(f"[red]bench: {error}[/]", soft_wrap=True)
        return 1
    report.show(results, console)
    if not quick:
        report.write(results, OUTPUT)
        console.print(f"Wrote {OUTPUT}/results.json and results.png")
    console.print(f"Took {results['took_seconds']:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
