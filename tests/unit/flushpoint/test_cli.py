"""What the commands print where, and the codes they leave with."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.model.errors import RefusedError
from coordinator.model.job import IoStatus, State
from flushpoint.cli import main
from tests.unit.flushpoint.fake_api import UNCONNECTED_SOCKET_LEAKS, FakeApi

DONE = {"state": State.CONCLUDED, "len": 4096, "offset": 4096, "bytes_sent": 4096, "plan_done": True}


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_mirror_submits_absolute_names_and_waits(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    api.add("feed", {"state": State.CREATED}, {"state": State.RUNNING}, DONE)
    code, out, err = run(
        capsys,
        "mirror",
        "a.raw",
        "nbd://backup/a",
        "--speed",
        "1M",
        "--on-source-error",
        "stop",
        "--overwrite",
    )
    (_, path, body) = api.received[0]
    assert path == "/v1/jobs"
    assert (body["source"], body["target"]) == (f"{tmp_path}/a.raw", "nbd://backup/a")
    assert (body["speed"], body["on_source_error"], body["overwrite"]) == (1024**2, "stop", True)
    assert (code, out) == (0, "")
    assert err == "flushpoint: job feed is done: 4.0 KiB in 0.0 s, 4.0 KiB sent\n"


def test_mirror_json_is_one_document_on_stdout(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.add("feed", DONE)
    code, out, _ = run(capsys, "mirror", "/a", "/b", "--json")
    assert code == 0
    assert json.loads(out)["state"] == "concluded"


def test_a_promise_that_the_source_is_frozen_is_submitted(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "mirror", "/a", "/b", "--detach")
    run(capsys, "mirror", "/a", "/b", "--detach", "--source-frozen")
    assert [body["source_frozen"] for _, _, body in api.received] == [False, True]


def test_detach_prints_the_id_alone(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "mirror", "/a", "/b", "--detach") == (0, "feed\n", "")


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"fatal": True, "error_code": "usage"}, 2),
        ({"fatal": True, "error_code": "not-found"}, 3),
        ({"fatal": True, "error_code": "refused"}, 3),
        ({"fatal": True, "error_code": "unavailable"}, 4),
        ({"fatal": True, "error_code": "io-error"}, 1),
        ({"fatal": True, "error_code": ""}, 1),
        ({"cancel_requested": "soft"}, 1),
        ({}, 0),
    ],
)
def test_a_concluded_job_leaves_with_what_its_error_means(
    api: FakeApi, capsys: pytest.CaptureFixture[str], end: dict[str, Any], code: int
) -> None:
    api.add("feed", {**DONE, "disk_size": 4096, **end, "error": "the target is full" if end.get("fatal") else ""})
    found, _, err = run(capsys, "mirror", "/a", "/b")
    assert found == code
    assert ("failed: the target is full. /disks/b.raw is" in err) == bool(end.get("fatal"))
    assert ("/disks/b.raw is no whole copy" in err) == (code != 0)


@pytest.mark.parametrize(
    "end", [{"fatal": True, "error": "no source", "error_code": "not-found"}, {"cancel_requested": "soft"}]
)
def test_a_disk_that_was_never_written_is_not_called_a_copy(
    api: FakeApi, capsys: pytest.CaptureFixture[str], end: dict[str, Any]
) -> None:
    """It may be anybody's disk, or even the source itself."""
    api.add("feed", {"state": State.CONCLUDED, "disk_size": 0, **end})
    _, _, err = run(capsys, "mirror", "/a", "/b")
    assert err.endswith(". Nothing was copied to /disks/b.raw\n")
    assert "no whole copy" not in err


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"epoch": 3, "group": "shop"}, "No recovery point of group shop was published"),
        ({"epoch": 3, "group": "shop", "published": True}, "Recovery point shop@3 had been published before"),
    ],
)
def test_what_became_of_a_recovery_point_is_told_when_its_job_is_cancelled(
    api: FakeApi, capsys: pytest.CaptureFixture[str], record: dict[str, Any], told: str
) -> None:
    api.add("feed", {"state": State.CONCLUDED, "cancel_requested": "soft", "disk_size": 4096, **record})
    assert run(capsys, "mirror", "/a", "/b")[2].endswith(f". {told}\n")


def test_what_several_passes_copied_is_told_with_their_number(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.add("feed", {**DONE, "pass_number": 2})
    assert run(capsys, "mirror", "/a", "/b")[2] == (
        "flushpoint: job feed is done: 4.0 KiB in 2 passes and 0.0 s, 4.0 KiB sent\n"
    )
    assert "4.0 KiB of 4.0 KiB (100%) in 2 passes\n" in run(capsys, "job", "feed")[1]
    api.add("feed", {**DONE, "pass_number": 1})
    assert "passes" not in run(capsys, "job", "feed")[1]


def test_a_ready_job_without_auto_complete_is_done_and_names_the_command(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"source": "/a", "target": "/b", "auto_complete": False}
    api.add("feed", {"state": State.RUNNING, "spec": spec}, {"state": State.READY, "spec": spec})
    code, _, err = run(capsys, "mirror", "/a", "/b", "--no-auto-complete")
    assert code == 0
    assert "complete it with: flushpoint complete feed" in err


def test_a_ready_job_that_completes_by_itself_is_waited_for(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.add("feed", {"state": State.READY}, {"state": State.WAITING}, DONE)
    assert "is done" in run(capsys, "mirror", "/a", "/b")[2]


def test_a_pending_job_without_auto_finalize_names_the_command(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.add("feed", {"state": State.PENDING, "spec": {"source": "/a", "target": "/b", "auto_finalize": False}})
    code, _, err = run(capsys, "mirror", "/a", "/b", "--no-auto-finalize")
    assert code == 0
    assert "finalize it with: flushpoint finalize feed" in err


def test_a_stop_by_an_error_is_told_once(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = {"state": State.PAUSED, "target_io_status": IoStatus.NOSPACE, "error": "the target is full"}
    api.add("feed", {"state": State.RUNNING}, stopped, stopped, {"state": State.RUNNING}, DONE)
    code, _, err = run(capsys, "mirror", "/a", "/b")
    assert code == 0
    assert err.count("job feed is paused: the target is full. Go on with: flushpoint resume feed\n") == 1


def test_a_pause_by_a_person_is_no_message(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.add("feed", {"state": State.PAUSED}, DONE)
    assert "paused" not in run(capsys, "mirror", "/a", "/b")[2]


@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["text", "json"])
def test_sigint_detaches_and_says_how_to_watch_again(api: FakeApi, json_option: list[str]) -> None:
    api.add("feed", {"state": State.RUNNING})
    command = [sys.executable, "-P", "-m", "flushpoint", "mirror", "/a", "/b", *json_option]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        try:
            assert api.looked.wait(20)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 4
    assert err == "flushpoint: job feed goes on without you; watch it again with: flushpoint job feed --wait\n"
    assert (json.loads(out)["id"] if json_option else out) == ("feed" if json_option else "")
    assert [path for _, path, _ in api.received] == ["/v1/jobs"]


@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["text", "json"])
def test_an_api_that_is_lost_ends_the_waiting_and_says_how_to_watch_again(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, json_option: list[str]
) -> None:
    monkeypatch.setattr("flushpoint.client.PATIENCE_S", 0.0)
    api.add("feed", {"state": State.RUNNING})
    api.lost_while_waiting = True
    code, out, err = run(capsys, "mirror", "/a", "/b", *json_option)
    assert code == 4
    assert err.endswith("; job feed is not lost: watch it again with: flushpoint job feed --wait\n")
    if json_option:
        assert "flushpoint job feed --wait" in json.loads(out)["error"]["remedy"]


@pytest.mark.parametrize(
    ("led", "workers", "says"),
    [
        (True, {}, "no worker is alive; start one with: flushpoint worker"),
        (False, {"w": 2}, "no coordinator leads; start one with: flushpoint coordinator"),
        (True, {"w": 2}, ""),
    ],
)
def test_a_job_that_nobody_is_there_to_move_is_told_once(
    api: FakeApi,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    led: bool,
    workers: dict[str, int],
    says: str,
) -> None:
    monkeypatch.setattr("flushpoint.cli.waiting.STANDSTILL_S", 0.0)
    api.led, api.workers = led, workers
    still = {"state": State.RUNNING, "units_ready": 1}
    api.add("feed", still, still, still, still, DONE)
    code, _, err = run(capsys, "mirror", "/a", "/b")
    assert code == 0
    assert err.count("\n") == (2 if says else 1)
    assert err.startswith(f"flushpoint: job feed waits: {says}\n" if says else "flushpoint: job feed is done")


@pytest.mark.parametrize("moves", [{"units_leased": 1}, {"state": State.PAUSED}])
def test_a_job_that_is_worked_on_or_rests_asks_for_nobody(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moves: dict[str, Any]
) -> None:
    monkeypatch.setattr("flushpoint.cli.waiting.STANDSTILL_S", 0.0)
    api.workers = {}
    still = {"state": State.RUNNING, **moves}
    api.add("feed", still, still, still, DONE)
    assert "waits" not in run(capsys, "mirror", "/a", "/b")[2]


@pytest.mark.parametrize(
    ("argv", "path", "body"),
    [
        (["pause", "abc"], "pause", {}),
        (["resume", "abc"], "resume", {}),
        (["set-speed", "abc", "2M"], "set-speed", {"speed": 2 * 1024**2}),
        (["complete", "abc"], "complete", {}),
        (["complete", "--pivot", "abc"], "complete", {"pivot": True}),
        (["cancel", "abc"], "cancel", {}),
        (["cancel", "abc", "--force"], "cancel", {"force": True}),
        (["finalize", "abc"], "finalize", {}),
        (["dismiss", "abc"], "dismiss", {}),
    ],
)
def test_a_verb_takes_an_unambiguous_beginning(
    api: FakeApi, capsys: pytest.CaptureFixture[str], argv: list[str], path: str, body: object
) -> None:
    api.add("abcd01", {"state": State.CONCLUDED})
    api.add("ffff02")
    code, out, err = run(capsys, *argv)
    assert api.received == [("POST", f"/v1/jobs/abcd01/{path}", body)]
    assert (code, err) == (0, "")
    assert out == f"abcd01  {'dismissed' if path == 'dismiss' else 'concluded'}\n"


@pytest.mark.parametrize(
    ("verb", "states", "reached"),
    [
        ("pause", [State.RUNNING, State.RUNNING, State.PAUSED], "paused"),
        ("pause", [State.READY, State.STANDBY], "standby"),
        ("resume", [State.PAUSED, State.RUNNING], "running"),
        ("complete", [State.READY, State.WAITING, State.PENDING, State.CONCLUDED], "concluded"),
        ("cancel", [State.RUNNING, State.ABORTING, State.CONCLUDED], "concluded"),
        ("finalize", [State.PENDING, State.CONCLUDED], "concluded"),
    ],
)
def test_a_verb_shows_the_state_that_it_leads_to(
    api: FakeApi, capsys: pytest.CaptureFixture[str], verb: str, states: list[State], reached: str
) -> None:
    views = [{"state": state} for state in states]
    api.add("abcd01", *views)
    assert run(capsys, verb, "abc") == (0, f"abcd01  {reached}\n", "")
    api.add("abcd01", *views)
    _, out, _ = run(capsys, verb, "abc", "--json")
    assert json.loads(out)["state"] == reached


def test_complete_ends_with_a_job_that_does_not_finalize_by_itself(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"source": "/a", "target": "/b", "auto_finalize": False}
    api.add("abcd01", {"state": State.READY, "spec": spec}, {"state": State.PENDING, "spec": spec})
    assert run(capsys, "complete", "abc")[1] == "abcd01  pending\n"


def test_a_state_that_does_not_follow_in_time_is_shown_with_what_was_asked_for(
    api: FakeApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flushpoint.cli.verbs.FOLLOW_S", 0.05)
    api.add("abcd01", {"state": State.RUNNING})
    assert run(capsys, "pause", "abc") == (0, "abcd01  running (pause asked for)\n", "")


REFUSED = {
    "state": State.READY,
    "spec": {"source": "/a", "target": "/b", "auto_complete": False},
    "error": "the source still changes. Stop its writer, then complete it again",
    "error_code": "refused",
}


@pytest.mark.parametrize("argv", [["complete", "abc"], ["job", "abc", "--wait"]])
def test_a_refused_complete_is_code_3_and_one_remedy(
    api: FakeApi, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    api.add("abcd01", {**REFUSED, "complete_requested": True, "error": "", "error_code": ""}, REFUSED)
    code, out, err = run(capsys, *argv)
    assert code == 3
    assert out == ("abcd01  ready\n" if argv[0] == "complete" else "")
    assert err == f"flushpoint: job abcd01 is ready, but was not completed: {REFUSED['error']}\n"
    api.add("abcd01", REFUSED)
    _, out, _ = run(capsys, *argv, "--json")
    assert json.loads(out)["error_code"] == "refused"


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        ({}, 0, ""),
        (
            {"fatal": True, "error": "the target is full", "error_code": "io-error", "disk_size": 1},
            1,
            "flushpoint: job abcd01 failed: the target is full. /disks/b.raw is no whole copy\n",
        ),
    ],
    ids=["done", "failed"],
)
def test_complete_waits_for_its_end_and_leaves_with_what_that_means(
    api: FakeApi,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    end: dict[str, Any],
    code: int,
    says: str,
) -> None:
    monkeypatch.setattr("flushpoint.cli.verbs.FOLLOW_S", 0.0)
    still = {"state": State.READY, "complete_requested": True}
    api.add("abcd01", still, still, still, {**DONE, **end})
    assert run(capsys, "complete", "abc") == (code, "abcd01  concluded\n", says)


def test_an_ambiguous_beginning_is_a_usage_error(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.add("abcd01")
    api.add("abcd02")
    code, _, err = run(capsys, "pause", "abcd")
    assert code == 2
    assert err == "flushpoint: 2 jobs begin with abcd: abcd01, abcd02. Write more of the id\n"
    assert api.received == []


def test_a_whole_id_wins_over_what_it_begins_and_lists_no_jobs(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many have concluded."""
    api.add("abcd", {"state": State.PAUSED})
    api.add("abcdef")
    assert run(capsys, "pause", "abcd")[0] == 0
    assert api.listed == 0


@pytest.mark.parametrize("command", ["job", "pause", "resume", "complete", "cancel", "finalize", "dismiss"])
def test_an_unknown_job_is_code_3(api: FakeApi, capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, err = run(capsys, command, "nope")
    assert (code, out) == (3, "")
    assert err == "flushpoint: there is no job nope. See flushpoint jobs\n"


@pytest.mark.parametrize(("problem", "exit_code"), [("usage", 2), ("refused", 3), ("unavailable", 4), ("failed", 1)])
def test_a_refusal_of_the_api_is_one_line_and_a_json_problem(
    api: FakeApi,
    capsys: pytest.CaptureFixture[str],
    problem: str,
    exit_code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flushpoint.client.PATIENCE_S", 0.0)
    api.refusal = (problem, "the target is in use", "name another target")
    code, out, err = run(capsys, "mirror", "/a", "/b", "--json")
    assert code == exit_code
    assert err == "flushpoint: the target is in use. Name another target\n"
    assert json.loads(out)["error"] == {
        "code": problem,
        "detail": "the target is in use",
        "remedy": "name another target",
        "exit_code": exit_code,
    }


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["mirror", "/a"], "missing argument"),
        (["mirror", "/a", "/b", "--speed", "fast"], "'fast' is no size"),
        (["mirror", "/a", "/b", "--sync", "sideways"], "sideways"),
        (["mirror", "/a", "/b", "--sync", "dirty"], "sync=dirty wants bitmap=NAME"),
        (["mirror", "/a", "/b", "--sync", "top", "--bitmap", "b0"], "sync=top reads no bitmap"),
        (["mirror", "ftp://a", "/b"], "unknown scheme"),
        (["mirror", "nbd://bob:s3cret@h/a", "/b"], "nbd://h has user info"),
        (["mirror", "/a", "b.vmdk"], "not supported"),
        (["set-speed", "abc", "-"], "'-' is no size"),
        (["nonsense"], "nonsense"),
        (["jobs", "--nonsense"], "--nonsense"),
        (["pause", ""], "an empty id names no job"),
    ],
)
def test_usage_errors_are_one_line_and_code_2(
    api: FakeApi, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("flushpoint: ")
    assert says in err
    assert "s3cret" not in err
    assert api.received == []


@UNCONNECTED_SOCKET_LEAKS
def test_an_api_that_is_away_is_code_4(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUSHPOINT_API", "unix:///nonexistent/api.sock")
    code, out, err = run(capsys, "jobs")
    assert (code, out) == (4, "")
    assert err.startswith("flushpoint: the API at unix:///nonexistent/api.sock does not answer")


def test_jobs_are_a_table_or_a_document(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.add("abcd01", {**DONE, "spec": {"source": "nbd://h/a", "target": "/b"}})
    api.add("abcd02", {"state": State.RUNNING, "len": 100, "offset": 25, "plan_done": True, "rate": 1536.0})
    _, out, _ = run(capsys, "jobs")
    head, first, second = out.splitlines()
    assert head.split() == ["ID", "STATE", "DONE", "RATE", "SOURCE", "TARGET"]
    assert first.split()[:3] == ["abcd01", "done", "100%"]
    assert "nbd://h/a" in first
    assert second.split()[1:5] == ["running", "25%", "1.5", "KiB/s"]
    _, out, _ = run(capsys, "jobs", "--json")
    assert [job["id"] for job in json.loads(out)["jobs"]] == ["abcd01", "abcd02"]


def test_job_shows_one_and_waits_if_told(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.add("abcd01", {"state": State.RUNNING, "error": "was interrupted"})
    code, out, _ = run(capsys, "job", "abc")
    assert code == 0
    assert "state:        running\n" in out
    assert "error:        was interrupted\n" in out
    api.add("abcd01", {"state": State.RUNNING}, {**DONE, "fatal": True, "error": "x", "error_code": "io-error"})
    assert run(capsys, "job", "abc", "--wait")[0] == 1


def test_events_are_a_line_each(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.events = [
        {"id": "1-0", "time": 0.0, "event": "JOB_STATUS_CHANGE", "job": "abc", "data": {"status": "running"}},
        {
            "id": "2-0",
            "time": 0.0,
            "event": "BLOCK_JOB_ERROR",
            "job": "abc",
            "data": {"error": "no space left"},
        },
    ]
    _, out, _ = run(capsys, "events", "--json")
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["1-0", "2-0"]
    _, out, _ = run(capsys, "events")
    assert out.splitlines()[0].endswith("abc  JOB_STATUS_CHANGE  status=running")
    assert out.splitlines()[1].endswith('abc  BLOCK_JOB_ERROR  error="no space left"')


def test_the_events_of_a_dismissed_job_are_shown(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.add("feed")
    gone = {"id": "1-0", "time": 0.0, "event": "JOB_STATUS_CHANGE", "job": "dead", "data": {"status": "null"}}
    api.events = [gone, {**gone, "id": "2-0", "job": "feed"}]
    code, out, _ = run(capsys, "events", "--job", "dead", "--json")
    assert (code, json.loads(out)) == (0, gone)
    code, _, err = run(capsys, "events", "--job", "nobody")
    assert (code, err) == (3, "flushpoint: there is no job nobody. See flushpoint jobs\n")


@pytest.mark.parametrize("argv", [["events"], ["events", "--json"], ["jobs"], ["jobs", "--json"]])
def test_a_reader_that_has_had_enough_is_no_failure(api: FakeApi, argv: list[str]) -> None:
    api.add("feed")
    event = {"id": "1-0", "time": 0.0, "event": "JOB_STATUS_CHANGE", "job": "feed", "data": {"status": "running"}}
    api.events = [event] * 10
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-P", "-m", "flushpoint", *argv]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("no_color", ["1", ""], ids=["NO_COLOR", "unset"])
def test_no_color_means_no_escape_codes_even_on_a_terminal(api: FakeApi, no_color: str) -> None:
    """An empty variable counts as unset (no-color.org); then the bar shows that the test can see escape codes."""
    api.add("feed", {"state": State.RUNNING, "len": 100, "offset": 25}, DONE)
    environ = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm-256color"}
    said = b""
    for argv in (["mirror", "/a", "/b"], ["jobs"], ["--help"], ["nonsense"]):
        said += on_a_terminal([sys.executable, "-P", "-m", "flushpoint", *argv], environ)
    assert b"is done" in said
    assert b"STATE" in said
    assert (b"\x1b" in said) == (not no_color)


def on_a_terminal(command: list[str], environ: dict[str, str]) -> bytes:
    """What `command` writes to a terminal that is its standard output and error."""
    ours, theirs = os.openpty()
    try:
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
            os.close(theirs)
            said = b""
            # EIO tells that the last writer has closed the terminal (Linux, pty(7)).
            with contextlib.suppress(OSError):
                while chunk := os.read(ours, 4096):
                    said += chunk
            process.wait(20)
        return said
    finally:
        os.close(ours)


@pytest.mark.parametrize("part", ["coordinator", "worker"])
def test_a_part_says_as_json_which_process_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda path, command, environ: became.append(command))
    code, out, _ = run(capsys, part, "--json")
    assert (code, json.loads(out)) == (0, {"pid": os.getpid()})
    assert became[0][-2:] == ["-m", "workers" if part == "worker" else part]


def test_up_says_as_json_where_the_api_is_once_it_is_sure_to_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLUSHPOINT_STATE_DIR", str(tmp_path))

    def run_it(state: object, environ: object, announce: Callable[[], None]) -> int:
        announce()
        return 0

    def refuse(*_: object) -> int:
        raise RefusedError("an embedded stack already runs")

    monkeypatch.setattr("flushpoint.supervisor.run", run_it)
    code, out, _ = run(capsys, "up", "--json")
    assert (code, json.loads(out)) == (0, {"api": f"unix://{tmp_path}/api.sock", "pid": os.getpid()})
    monkeypatch.setattr("flushpoint.supervisor.run", refuse)
    code, out, _ = run(capsys, "up", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (3, "refused")


def test_version_and_help_are_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--version")
    assert (code, out.count("."), err) == (0, 2, "")
    for argv in ((), ("--help",), ("mirror", "-h")):
        code, out, err = run(capsys, *argv)
        assert (code, err) == (0, "")
        assert "Usage: flushpoint" in out


def test_help_loads_no_http_stack() -> None:
    program = "import sys; from flushpoint.cli import main; main(['--help']); sys.exit('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, timeout=30).returncode == 0


def test_a_time_of_day_in_a_file_of_a_group_needs_no_quotes(
    api: FakeApi, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """To YAML 1.1 it is a number in base 60, to YAML 1.2 and editors that check the schema it is text."""
    file = tmp_path / "group.yaml"
    file.write_text(
        """
        apiVersion: flushpoint/v1
        kind: ConsistencyGroup
        metadata: {name: shop}
        spec:
          repository: repo+file:///r
          members: [{vm: db, host: hv1, qmp: /run/db.qmp, disks: [vda]}]
          policy:
            speed: 1048576
            speedWindows:
              - {from: 22:00, to: 06:00, speed: 0}
        """
    )
    assert run(capsys, "apply", "-f", str(file), "--dry-run") == (0, "shop  would be made\n", "")


def test_the_list_of_groups_shows_which_are_paused_and_which_miss_their_objective(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {"repository": "repo+file:///r", "members": [{"vm": "v", "host": "h", "qmp": "/q", "disks": ["a", "b"]}]}
    late = {"name": "late", "version": 1, "spec": {**spec, "policy": {"rpo": "5s"}}, "point": 7, "rpo_s": 9.0}
    round_ = {"id": "r", "stage": "copying", "number": 8, "begun_at": 1.0}
    api.groups = [
        {**late, "rpo_missed": True, "paused": True, "round": round_},
        {"name": "rests", "version": 1, "spec": spec, "paused": True},
        {**late, "name": "shop", "rpo_s": 2.0, "round": round_},
    ]
    assert run(capsys, "groups")[1].splitlines() == [
        "GROUP  POINT  AGE    RPO            DOES             MACHINES  DISKS  REPOSITORY",
        "late   7      9.0 s  5.0 s, missed  copying, paused  1         2      repo+file:///r",
        "rests  -      -      -              paused           1         2      repo+file:///r",
        "shop   7      2.0 s  5.0 s          copying          1         2      repo+file:///r",
    ]


def test_a_group_whose_record_cannot_be_read_is_named_beside_the_list(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.unreadable_groups = {"mail": "Invalid JSON"}
    code, out, err = run(capsys, "groups")
    assert (code, out.count("\n")) == (0, 1)
    assert err.endswith("record of group mail cannot be read: Invalid JSON; flushpoint delete mail removes it\n")
    assert json.loads(run(capsys, "groups", "--json")[1]) == {"groups": [], "unreadable": api.unreadable_groups}
