"""The results as tables, JSON and a picture."""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.demo.lab import MIB, run

_BULK = {"nbd_to_nbd": "NBD to NBD", "nbd_to_file": "NBD to file"}
_MANY_POINTS = {
    "list": "open and list",
    "plan": "plan the restore of all disks of the newest",
    "check": "check",
    "prune": "prune, dry run",
}
_BACKUPS = {"to_s3": "file to S3", "from_s3": "S3 to file", "to_directory": "file to directory"}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "cpus": len(models) or None,
        "cpu": models[0] if models else platform.machine(),
        "memory_bytes": int(memory.split()[1]) * 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": run(["qemu-img", "--version"]).stdout.splitlines()[0].partition(" (")[0],
        "nbdcopy": run(["nbdcopy", "--version"]).stdout.splitlines()[0],
        "nbdkit": run(["nbdkit", "--version"]).stdout.splitlines()[0],
        "seaweedfs": run([Path(sys.executable).with_name("weed"), "version"]).stdout.strip(),
        "s5cmd": run(["s5cmd", "version"]).stdout.strip(),
        "rclone": run(["rclone", "version"]).stdout.splitlines()[0],
    }


def summary(figures: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(figures), "most": max(figures), "least": min(figures), "count": len(figures)}


def write(results: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    _draw(results, directory / "results.png")


def show(results: dict[str, Any], console: Console) -> None:
    facts = results["machine"]
    console.print(
        f"{facts['cpus']} × {facts['cpu']}, Linux {facts['kernel']}, Python {facts['python']}, {facts['qemu']}"
    )
    for key, title in _BULK.items():
        _show_bulk(title, results["bulk"][key], console)
    for kind in ("incompressible", "compressible"):
        for key, title in _BACKUPS.items():
            _show_bulk(f"{kind} {title}", results["backups"][kind][key], console)
    table = Table(title="the rest", show_header=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, title in (("nbd_to_nbd", "served by qemu-nbd"), ("qcow2_to_nbd", "the image itself")):
        one = results["scattered"][name]
        disk, dirty = results["scattered"]["disk_bytes"] / MIB / 1024, results["scattered"]["dirty_bytes"] / MIB
        table.add_row(
            f"{disk:.0f} GiB disk, {dirty:.0f} MiB dirty in scattered 64 KiB blocks, {title}",
            f"{one['median_seconds']:.2f} s, sent {one['sent_per_dirty']:.3f} × dirty",
        )
    late = results["latency"]
    table.add_row(
        f"{late['blocks']} blocks, {late['delay_ms']} ms a write; one at a time {late['serial_seconds']:.1f} s",
        f"{late['median_seconds']:.2f} s, {late['speedup']:.1f} × as fast",
    )
    start = results["start_up"]
    table.add_row(
        "a first command, which starts the embedded stack; the next, which finds it running",
        f"{start['first_median_seconds']:.2f} s; {start['second_median_seconds']:.2f} s",
    )
    fixed = results["fixed_cost"]
    table.add_row(
        f"empty disk, submit to concluded, median of {len(fixed['seconds'])}",
        f"{fixed['median_seconds'] * 1000:.0f} ms",
    )
    table.add_row("largest memory of a mover, over all mirroring", f"{results['mover_peak_bytes'] / MIB:.0f} MiB")
    table.add_row("with the backups, too", f"{results['mover_peak_bytes_with_backups'] / MIB:.0f} MiB")
    for kind in ("incompressible", "compressible"):
        one = results["backups"][kind]["to_s3"]["stored"]
        table.add_row(
            f"backup of {kind} data to a fresh repository",
            f"{one['objects']} objects for {one['units']} units, {one['bytes'] / MIB:,.1f} MiB",
        )
    for name, one in results["backups"]["increments"].items():
        disk = one["disk_bytes"] / MIB / 1024
        table.add_row(
            f"increment on S3, {disk:.0f} GiB disk, {one['dirty_bytes'] / MIB:.1f} MiB dirty: {name}",
            f"{one['median_seconds']:.2f} s, {one['objects']} objects for {one['units']} units, "
            f"{one['bytes'] / MIB:.1f} MiB",
        )
    for name, title in (("model", "extents made by a generator"), ("nbd", "block status of a real bitmap")):
        planned = results["planning"][name]
        table.add_row(
            f"plan 16 TiB, {planned['extents']:,} dirty extents, {title}",
            f"{planned['seconds']:.2f} s, {planned['units']:,} units, memory + {planned['growth_bytes'] / MIB:.0f} MiB",
        )
    _add_many_points(table, results["many_points"])
    console.print(table)


def _add_many_points(table: Table, result: dict[str, Any]) -> None:
    for where, title in (("directory", "in a directory"), ("s3", "on S3")):
        for name, one in result[where].items():
            table.add_row(
                f"{result['points']:,} points of {result['disks']} disks {title}: {_MANY_POINTS[name]}",
                f"{one['seconds']:.2f} s, memory + {one['growth_bytes'] / MIB:.0f} MiB",
            )


def _show_bulk(title: str, result: dict[str, Any], console: Console) -> None:
    rounds = len(result["runs"]["flushpoint"])
    table = Table(title=f"{title}, {result['bytes'] / MIB:,.0f} MiB, medians of {rounds} rounds")
    headings = ("program", "s", "MiB/s", "CPU s", "movers' CPU s", "server's CPU s", "we are", "our CPU", "movers' CPU")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "program" else "right")
    for name, median in result["medians"].items():
        ratio = result["ratios"].get(name)
        movers, server = median.get("mover_cpu_seconds"), median.get("server_cpu_seconds")
        table.add_row(
            name,
            f"{median['seconds']:.2f}",
            f"{median['mib_per_second']:,.0f}",
            f"{median['cpu_seconds']:.2f}",
            f"{movers:.2f}" if movers is not None else "",
            f"{server:.2f}" if server else "",
            f"{ratio['speed']:.2f} × as fast" if ratio else "",
            f"{ratio['cpu']:.2f} ×" if ratio else "",
            f"{ratio['mover_cpu']:.2f} ×" if ratio else "",
        )
    console.print(table)


def _draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    names = list(results["bulk"]["nbd_to_nbd"]["medians"])
    colours = ("#1f6f8b", "#b0b7bf", "#7d8791")
    for axis, field, title in (
        (axes[0], "mib_per_second", "MiB/s (more is better)"),
        (axes[1], "cpu_seconds", "CPU seconds (less is better)"),
    ):
        for n, name in enumerate(names):
            values = [results["bulk"][key]["medians"][name][field] for key in _BULK]
            bars = axis.bar(
                [x + (n - 1) * 0.27 for x in range(len(values))], values, 0.25, label=name, color=colours[n]
            )
            axis.bar_label(bars, fmt="%.0f" if field == "mib_per_second" else "%.2f", fontsize=8)
        axis.set_xticks(range(len(_BULK)), list(_BULK.values()))
        axis.set_title(f"{results['bulk']['nbd_to_nbd']['bytes'] / MIB:,.0f} MiB of data: {title}", fontsize=10)
    axes[0].legend(fontsize=8)
    axes[1].set_xlabel("ours: every process of the stack; the hatched part is the movers", fontsize=8)
    movers = [results["bulk"][key]["medians"]["flushpoint"]["mover_cpu_seconds"] for key in _BULK]
    axes[1].bar([x - 0.27 for x in range(len(movers))], movers, 0.25, fill=False, hatch="///", edgecolor="white")
    late = results["latency"]
    bars = axes[2].bar(
        ["one at a time", "flushpoint"],
        [late["serial_seconds"], late["median_seconds"]],
        color=(colours[1], colours[0]),
    )
    axes[2].bar_label(bars, fmt="%.2f s", fontsize=8)
    axes[2].set_title(
        f"{late['blocks']} blocks, {late['delay_ms']} ms a write: {late['speedup']:.0f} × as fast", fontsize=10
    )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.12)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
