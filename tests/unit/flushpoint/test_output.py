"""Numbers as people read them."""

from __future__ import annotations

import pytest

from coordinator.model.job import IoStatus, JobSpec, State
from coordinator.model.view import JobView
from flushpoint.cli import output

SPEC = JobSpec(source="/a", target="/b")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1024**4, "1.0 TiB"), (1024**6, "1024.0 PiB")],
)
def test_sizes_are_powers_of_1024(count: int, text: str) -> None:
    assert output.size_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1:00"), (3725.4, "1:02:05")])
def test_durations_are_clock_like_from_a_minute_on(seconds: float, text: str) -> None:
    assert output.duration_text(seconds) == text


def test_what_is_not_planned_yet_is_expected_to_be_as_full_as_what_is() -> None:
    job = JobView(id="a", spec=SPEC, disk_size=1000, plan_cursor=250, len=100, offset=50)
    assert output.expected_len(job) == 400
    assert output.progress_text(job) == "12%"
    assert output.expected_len(job.model_copy(update={"plan_done": True})) == 100


def test_a_disk_without_data_is_done_when_it_is_concluded() -> None:
    job = JobView(id="a", spec=SPEC, disk_size=1000, plan_done=True)
    assert output.progress_text(job) == "-"
    concluded = job.model_copy(update={"state": State.CONCLUDED})
    assert output.progress_text(concluded) == "100%"
    for given_up in ({"cancel_requested": "soft"}, {"fatal": True}):
        assert output.progress_text(concluded.model_copy(update=given_up)) == "-"


@pytest.mark.parametrize("state", [State.PAUSED, State.STANDBY])
def test_only_a_pause_with_an_io_status_is_a_stop_by_an_error(state: State) -> None:
    assert not output.stopped_by_error(JobView(id="a", spec=SPEC, state=state))
    assert output.stopped_by_error(JobView(id="a", spec=SPEC, state=state, io_status=IoStatus.FAILED))
    assert not output.stopped_by_error(JobView(id="a", spec=SPEC, io_status=IoStatus.FAILED))
