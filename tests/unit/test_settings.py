"""Settings check their timeouts against each other, and the documented file is the truth about defaults."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from coordinator.model.errors import UsageError
from coordinator.settings import Settings, load_settings

DOCUMENTED = Path(__file__).parents[2] / "config" / "flushpoint.toml"


def test_the_documented_file_names_every_setting_with_its_default() -> None:
    documented = tomllib.loads(DOCUMENTED.read_text())
    defaults = Settings.model_construct().model_dump()
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in defaults.items()} == documented


@pytest.mark.parametrize(
    ("name", "value"),
    [("RENEW_S", "14"), ("VISIBILITY_TIMEOUT_S", "60"), ("CYCLE_S", "9"), ("LEASE_S", "0.4")],
)
def test_timeouts_that_do_not_fit_together_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FLUSHPOINT_{name}", value)
    with pytest.raises(UsageError, match="must"):
        load_settings()


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text("worker_slots = 3\ndepth = 4\n")
    monkeypatch.setenv("FLUSHPOINT_CONFIG", str(file))
    monkeypatch.setenv("FLUSHPOINT_WORKER_SLOTS", "5")
    settings = load_settings()
    assert (settings.worker_slots, settings.depth) == (5, 4)
