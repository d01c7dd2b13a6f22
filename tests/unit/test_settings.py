"""Settings check their timeouts against each other, and the documented file is the truth about defaults."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from coordinator.model.errors import UsageError
from coordinator.settings import URL_SCHEMES, Settings, load_settings

DOCUMENTED = Path(__file__).parents[2] / "config" / "flushpoint.toml"


def test_the_documented_file_names_every_setting_with_its_default() -> None:
    documented = tomllib.loads(DOCUMENTED.read_text())
    defaults = Settings.model_construct().model_dump()
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in defaults.items()} == documented


@pytest.mark.parametrize(
    ("name", "value"),
    [("RENEW_S", "14"), ("VISIBILITY_TIMEOUT_S", "93"), ("IO_TIMEOUT_S", "237"), ("CYCLE_S", "9"), ("LEASE_S", "0.4")],
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lease_sec = 9\n", "lease_sec in {file}: there is no such setting"),
        ("lease_s = [", "cannot read the settings"),
        (None, "cannot read the settings: .*No such file.*{file}"),
    ],
    ids=["unknown", "malformed", "missing"],
)
def test_a_file_that_says_nothing_is_a_usage_error(
    text: str | None, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "f.toml"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("FLUSHPOINT_CONFIG", str(file))
    with pytest.raises(UsageError, match=says.format(file=file)):
        load_settings()


def test_so_few_concluded_jobs_that_a_waiting_client_might_miss_its_own_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLUSHPOINT_KEEP_CONCLUDED", "99")
    with pytest.raises(UsageError, match="FLUSHPOINT_KEEP_CONCLUDED"):
        load_settings()


def test_an_empty_name_of_a_file_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUSHPOINT_CONFIG", "")
    assert load_settings().lease_s == Settings.model_fields["lease_s"].default


def test_a_visibility_timeout_just_above_what_a_doorbell_may_take_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUSHPOINT_VISIBILITY_TIMEOUT_S", "94")
    assert load_settings().visibility_timeout_s == 94


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("BROKER_URL", "bogus://u:s3cret@x"),
        ("BROKER_URL", "unix:///s3cret"),
        ("BROKER_URL", "s3cret"),
        ("REDIS_URL", "amqp://u:s3cret@x"),
        ("REDIS_URL", "redis+socket:///s3cret"),
        ("REDIS_URL", "redis://u:s3cret@h:port"),
        ("REDIS_URL", ""),
    ],
)
def test_a_url_that_no_library_takes_is_named_and_not_repeated(
    name: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FLUSHPOINT_{name}", url)
    with pytest.raises(UsageError, match=f"^FLUSHPOINT_{name}: ") as caught:
        load_settings()
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["redis_url", "broker_url"])
def test_every_scheme_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in URL_SCHEMES[name]:
        monkeypatch.setenv(f"FLUSHPOINT_{name.upper()}", f"{scheme}://h/0")
        assert getattr(load_settings(), name) == f"{scheme}://h/0"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("ALLOWED_ROOTS", "/dir", ("/dir",)),
        ("ALLOWED_ROOTS", "/a:/b,c:", ("/a", "/b,c")),
        ("ALLOWED_ROOTS", '["/a:b", "/c"]', ("/a:b", "/c")),
        ("ALLOWED_ROOTS", "", ()),
        ("AGENT_SOCKETS", "/run/vm:/run/libvirt", ("/run/vm", "/run/libvirt")),
        ("ALLOWED_ENDPOINTS", "*", ("*",)),
        ("ALLOWED_ENDPOINTS", "10.0.0.0/8, h:10809,[::1]:1", ("10.0.0.0/8", "h:10809", "[::1]:1")),
        ("ALLOWED_ENDPOINTS", '["10.0.0.0/8"]', ("10.0.0.0/8",)),
    ],
)
def test_lists_in_the_environment_are_separated_or_json(
    name: str, text: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FLUSHPOINT_{name}", text)
    assert getattr(load_settings(), name.lower()) == expected


@pytest.mark.parametrize("text", ["[/a", '["/a", 1]', "a,/b", '["a"]'])
def test_a_list_that_is_none_names_its_variable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUSHPOINT_ALLOWED_ROOTS", text)
    with pytest.raises(UsageError, match=r"^FLUSHPOINT_ALLOWED_ROOTS"):
        load_settings()


def test_a_list_of_the_file_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text('allowed_roots = ["/a:b", "/c"]\n')
    monkeypatch.setenv("FLUSHPOINT_CONFIG", str(file))
    assert load_settings().allowed_roots == ("/a:b", "/c")
