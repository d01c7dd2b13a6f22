"""`flushpoint bitmap …`: dirty bitmaps of a qcow2 image, or of a live guest's disk on this host."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Annotated, Any

import typer

from coordinator.model.errors import FlushpointError, UsageError
from coordinator.model.job import parse_bytes
from flushpoint.cli import output

TIMEOUT_S = 300.0
DiskArgument = Annotated[
    str, typer.Argument(metavar="DISK", help="A qcow2 image that nobody has open, or qemu+unix:///DEVICE?qmp=PATH.")
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Of the bitmap.")]

app = typer.Typer(name="bitmap", help="Remember what is written to a disk.", rich_markup_mode=None)


def register(parent: typer.Typer) -> None:
    parent.add_typer(app)


@app.command()
def enable(
    disk: DiskArgument,
    name: NameArgument,
    granularity: Annotated[
        str, typer.Option(metavar="SIZE", help="What one bit stands for, as in 64K; 0 leaves it to QEMU.")
    ] = "0",
    as_json: output.JsonOption = False,
) -> None:
    """Record what is written from now on, in a new bitmap, or in one that is there."""
    try:
        size = parse_bytes(granularity)
    except ValueError as error:
        raise UsageError(str(error), "write a power of two, such as 64K") from error
    _act(as_json, "enable", disk, name, "--granularity", str(size))


@app.command()
def query(disk: DiskArgument, as_json: output.JsonOption = False) -> None:
    """List the bitmaps of a disk, and how much each calls dirty."""
    _act(as_json, "query", disk)


@app.command()
def fill(
    disk: DiskArgument,
    name: NameArgument,
    base: Annotated[
        str, typer.Option(metavar="PATH", help="A backing file; by default the one right below the image.")
    ] = "",
    as_json: output.JsonOption = False,
) -> None:
    """Add to a bitmap what the disk's images hold above a base, as if it had recorded since they were put on top."""
    _act(as_json, "fill", disk, name, *(("--base", base) if base else ()))


@app.command()
def disable(
    disk: DiskArgument,
    name: NameArgument,
    remove: Annotated[bool, typer.Option("--remove", help="Forget the bitmap, too.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Record no more in a bitmap; what it says stays."""
    _act(as_json, "remove" if remove else "disable", disk, name)


def _act(as_json: bool, *words: str) -> None:
    # The parts are run by their commands; -P, so that the directory it is started in shadows no module.
    command = [sys.executable, "-P", "-m", "workers.agent.bitmaps", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        told: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise FlushpointError(f"the bitmaps of {words[1]} cannot be reached: {error}") from error
    if "error" in told:
        raise _error_of(told["error"])
    if as_json:
        output.write_json(told)
        return
    head = ("BITMAP", "RECORDS", "DIRTY", "GRANULARITY", "KEPT")
    rows = [
        (
            one["name"],
            "inconsistent" if one["is_inconsistent"] else "yes" if one["is_recording"] else "no",
            "-" if one["dirty"] is None else output.size_text(one["dirty"]),
            output.size_text(one["granularity"]),
            "yes" if one["is_persistent"] else "until the guest ends",
        )
        for one in told["bitmaps"]
    ]
    print(output.table([head, *rows]))


def _error_of(told: dict[str, Any]) -> FlushpointError:
    error = FlushpointError(told["message"], told["remedy"])
    error.code, error.exit_code = told["code"], told["exit_code"]
    return error
