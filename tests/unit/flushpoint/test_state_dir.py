"""Where the embedded stack lives and how it is found, without starting one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from coordinator.model.errors import RefusedError, UnavailableError, UsageError
from coordinator.settings import load_settings
from flushpoint import embedded, supervisor
from flushpoint.embedded import StateDir, locked, state_dir, supervisor_pid


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"FLUSHPOINT_STATE_DIR": "/s", "XDG_STATE_HOME": "/x"}, Path("/s")),
        ({"XDG_STATE_HOME": "/x"}, Path("/x/flushpoint")),
        ({"XDG_STATE_HOME": "relative"}, Path.home() / ".local/state/flushpoint"),
        ({"FLUSHPOINT_STATE_DIR": ""}, Path.home() / ".local/state/flushpoint"),
    ],
)
def test_the_environment_names_the_directory(environ: dict[str, str], path: Path) -> None:
    assert state_dir(environ).path == path


def test_the_directory_is_its_owners_alone(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "a" / "b")
    state.prepare()
    state.prepare()
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    with pytest.raises(RefusedError, match="chmod 700"):
        StateDir(tmp_path).prepare()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(RefusedError, match="cannot make"):
        StateDir(tmp_path / "f").prepare()


def test_a_socket_path_may_have_107_bytes_and_no_more() -> None:
    room = embedded.SOCKET_PATH_MAX_BYTES - len("/valkey.sock") - 1
    StateDir(Path("/" + "x" * room)).check_length()
    with pytest.raises(UsageError, match="108 bytes"):
        StateDir(Path("/" + "x" * (room + 1))).check_length()
    with pytest.raises(UsageError, match="FLUSHPOINT_STATE_DIR"):
        StateDir(Path("/" + "é" * (room // 2 + 1))).check_length()


def test_a_supervisor_is_known_by_its_lock_not_by_its_file(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    assert supervisor_pid(state) is None
    with locked(state.supervisor_lock, 0) as lock:
        assert lock is not None
        os.pwrite(lock, b"4711\n", 0)
        assert supervisor_pid(state) == 4711
    assert supervisor_pid(state) is None


def test_a_supervisor_that_cannot_be_started_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUSHPOINT_STATE_DIR", str(tmp_path / "s"))
    state = state_dir()
    state.prepare()
    state.log.mkdir()  # cannot be opened for writing, not even by root
    with pytest.raises(UnavailableError, match="cannot start the embedded stack") as caught:
        embedded.ensure_running(timeout_s=5)
    assert str(state.log) in caught.value.remedy


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    with locked(tmp_path / "l", 0) as first, locked(tmp_path / "l", 0.02) as second:
        assert first is not None
        assert second is None


def test_a_second_supervisor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOCK_WAIT_S", 0.02)
    tmp_path.chmod(0o700)
    state = StateDir(tmp_path)
    with locked(state.supervisor_lock, 0), pytest.raises(RefusedError, match="flushpoint down"):
        supervisor.run(state, {}, lambda: None)


def test_a_dead_socket_does_not_answer(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    assert not embedded.api_answers(state)
    state.api_socket.touch()
    assert not embedded.api_answers(state)


def test_the_parts_get_this_stacks_addresses_and_keep_the_users_limits() -> None:
    state = StateDir(Path("/s p"))
    environ = supervisor.environment(state, {"FLUSHPOINT_ALLOWED_ROOTS": '["/d"]', "FLUSHPOINT_REDIS_URL": "redis://x"})
    assert environ["FLUSHPOINT_REDIS_URL"] == "unix:///s%20p/valkey.sock?db=0"
    assert environ["FLUSHPOINT_BROKER_URL"] == "redis+socket:///s%20p/valkey.sock?virtual_host=1"
    assert environ["FLUSHPOINT_API_SOCKET"] == "/s p/api.sock"
    assert environ["FLUSHPOINT_ALLOWED_ROOTS"] == '["/d"]'


def test_the_stacks_defaults_lie_below_the_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f.toml").write_text('allowed_roots = ["/d"]\nworker_slots = 3\n')
    monkeypatch.chdir(tmp_path)
    chosen = {"FLUSHPOINT_CONFIG": "f.toml", "FLUSHPOINT_DEPTH": "4"}
    environ = supervisor.environment(StateDir(Path("/s")), chosen)
    monkeypatch.chdir("/")  # as the parts do
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.allowed_roots, settings.worker_slots, settings.depth) == (("/d",), 3, 4)
    assert settings.allowed_endpoints == ("*",)
    assert settings.api_socket == "/s/api.sock"
