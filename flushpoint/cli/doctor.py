"""`flushpoint doctor`: what is there, what is missing, and which package brings it; and what guests can do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from flushpoint.cli import output


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    guest: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Look at the guest of this QMP socket instead; may be given several times."),
    ] = None,
    guest_agent: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Ask the guest agent behind this socket; may be given several times."),
    ] = None,
    as_json: output.JsonOption = False,
) -> None:
    """Check what Flushpoint needs on this machine, or what guests on it can do; fails if a required part is missing."""
    from flushpoint import diagnosis

    asked = guest or guest_agent
    findings = diagnosis.examine_guests(guest or [], guest_agent or []) if asked else diagnosis.examine()
    is_fit = all(finding.ok or not finding.required for finding in findings)
    if as_json:
        output.write_json({"ok": is_fit, "checks": [asdict(finding) for finding in findings]})
    else:
        rows = [(_MARKS[finding.ok, finding.required], finding.name, finding.detail) for finding in findings]
        print(output.table(rows))
        for finding in findings:
            if not finding.ok and finding.remedy:
                output.say(f"{finding.name}: {finding.remedy}")
    raise typer.Exit(0 if is_fit else 1)


_MARKS = {(True, True): "ok", (True, False): "ok", (False, True): "MISSING", (False, False): "no"}
