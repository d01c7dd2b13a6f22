"""URIs, sizes, policies, settings: pure rules."""

from __future__ import annotations

import errno

import pytest

from coordinator.model.errors import Side, UsageError
from coordinator.model.job import ErrorPolicy, IoStatus, JobRecord, JobSpec, State, parse_bytes
from coordinator.model.policy import (
    Action,
    act_on_error,
    act_on_quarantine,
    io_status_after,
    policy_of,
    status_field,
)
from coordinator.model.progress import RATE_WINDOW_S, eta_of, rate_of
from coordinator.model.uri import DiskUri, absolute, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/d/a.img", DiskUri("file", "/d/a.img", "raw")),
        ("/d/a.qcow2", DiskUri("file", "/d/a.qcow2", "qcow2")),
        ("/d/a.qcow2?format=raw", DiskUri("file", "/d/a.qcow2", "raw")),
        ("/d/a?b.img", DiskUri("file", "/d/a?b.img", "raw")),
        ("file:///d/a%20b.img?format=qcow2", DiskUri("file", "/d/a b.img", "qcow2")),
        ("/d/A.QCOW2", DiskUri("file", "/d/A.QCOW2", "qcow2")),
        ("/d/a.vmdk?format=raw", DiskUri("file", "/d/a.vmdk", "raw")),
        ("nbd://h:1/e", DiskUri("nbd", nbd_uri="nbd://h:1/e")),
        ("nbd://[fe80::1%25eth0]/a@b", DiskUri("nbd", nbd_uri="nbd://[fe80::1%25eth0]/a@b")),
        ("nbds://h/e?tls-hostname=x", DiskUri("nbd", nbd_uri="nbds://h/e?tls-hostname=x")),
        ("nbd+unix:///e?socket=/s", DiskUri("nbd", nbd_uri="nbd+unix:///e?socket=/s")),
    ],
)
def test_a_disk_is_what_its_name_says(text: str, expected: DiskUri) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a.img",
        "s3://b/p",
        "file://host/a",
        "file:///",
        "file:///a#b",
        "/a?format=vmdk",
        "file:///a?format=raw&x=1",
        "nbd:///e",
        "nbd:h:10809",
        "nbd://h:0/e",
        "nbd://h:65536/e",
        "nbd://h/e#f",
        "nbd://h/e?socket=/s",
        "nbds://h/e?tls-hostname=a&tls-hostname=b",
        "nbd+unix:///e",
        "nbd+unix:///e?socket=",
        "nbd+unix://h/e?socket=/s",
    ],
)
def test_a_name_that_says_nothing_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(text)
    assert refused.value.remedy


@pytest.mark.parametrize(
    "text",
    [
        "nbd://bob:s3cret@host/disk",
        "nbds://s3cret@host:1/disk",
        "nbd+unix://bob:s3cret@/disk?socket=/s",
        "nbd://bob:s3cret",
        "nbd://bob:s3cret/with-a-slash@host/disk",
        "nbd://bob%3As3cret%40host/disk",
        "nbd://bob:s3cret@[host/disk",
        "nbd://bob:s3cret@ho\u2100st/disk",
        "nbd://host/disk?password=s3cret",
        "nbd://host/disk?s3cret",
        "nbd://host/disk#s3cret",
        "nbd:bob:s3cret@host",
        " nbd://bob:s3cret@host/disk",
        "bob:s3cret@host/disk",
        "s3cret@host/disk",
        "file://bob:s3cret@localhost/disk",
        "s3://bob:s3cret@bucket/disk",
    ],
)
def test_a_secret_in_a_name_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(text)
    assert "s3cret" not in str(refused.value)
    assert refused.value.remedy
    # The cause of an error is in its traceback, and urllib's messages repeat what they could not read.
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize("ending", ["vmdk", "vdi", "vhd", "vhdx", "qed", "VMDK", "VhdX"])
def test_containers_of_other_formats_are_not_copied_as_raw_by_mistake(ending: str) -> None:
    for text in (f"/d/a.{ending}", f"file:///d/a.{ending}", f"/d/a.{ending}?format="):
        with pytest.raises(UsageError, match="not supported") as refused:
            parse(text)
        assert "?format=raw" in refused.value.remedy
    assert parse(f"/d/a.{ending}?format=raw").format == "raw"


def test_relative_paths_belong_to_the_one_who_typed_them() -> None:
    assert absolute("a.img", "/home/u") == "/home/u/a.img"
    assert absolute("../a?format=qcow2", "/home/u") == "/home/a?format=qcow2"
    assert absolute("nbd://h/e", "/home/u") == "nbd://h/e"


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("50M", 50 << 20), ("1.5GiB/s", 3 << 29), ("4096", 4096)])
def test_sizes_are_powers_of_1024(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_a_size_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="fast"):
        parse_bytes("fast")


@pytest.mark.parametrize(
    ("policy", "errno_", "action"),
    [
        (ErrorPolicy.REPORT, errno.EIO, Action.REPORT),
        (ErrorPolicy.IGNORE, errno.ENOSPC, Action.IGNORE),
        (ErrorPolicy.STOP, errno.EIO, Action.STOP),
        (ErrorPolicy.ENOSPC, errno.ENOSPC, Action.STOP),
        (ErrorPolicy.ENOSPC, errno.EIO, Action.REPORT),
    ],
)
def test_policies_act_as_qemus(policy: ErrorPolicy, errno_: int, action: Action) -> None:
    assert act_on_error(policy, errno_) is action


def test_each_side_has_its_own_policy_and_status() -> None:
    spec = JobSpec(source="/s", target="/t", on_target_error=ErrorPolicy.STOP)
    assert policy_of(spec, Side.SOURCE) is ErrorPolicy.REPORT
    assert policy_of(spec, Side.TARGET) is ErrorPolicy.STOP
    assert status_field(Side.SOURCE) != status_field(Side.TARGET)
    assert io_status_after(errno.ENOSPC) is IoStatus.NOSPACE
    assert io_status_after(errno.EIO) is IoStatus.FAILED


def test_dirty_and_bitmap_go_together() -> None:
    with pytest.raises(ValueError, match="bitmap"):
        JobSpec.model_validate({"source": "/s", "target": "/t", "sync": "dirty"})
    with pytest.raises(ValueError, match="bitmap"):
        JobSpec.model_validate({"source": "/s", "target": "/t", "bitmap": "b"})


def advancing(**fields: object) -> JobRecord:
    """At 110 it has done 100 bytes since 100."""
    given = {
        "state": State.RUNNING,
        "rate_from_at": 100,
        "progress_at": 110,
        "disk_size": 1000,
        "plan_cursor": 1000,
        "plan_done": True,
        "len": 500,
        "offset": 100,
        **fields,
    }
    return JobRecord.model_validate({"id": "j", "spec": JobSpec(source="/s", target="/t"), **given})


def test_eta_counts_what_is_not_planned_yet() -> None:
    assert rate_of(advancing(), 110) == 10
    assert eta_of(advancing(), 110) == 40
    assert eta_of(advancing(plan_cursor=500, plan_done=False), 110) == 90


def test_without_progress_nobody_knows_when_it_ends() -> None:
    assert eta_of(advancing(rate_from_at=110), 110 + RATE_WINDOW_S) is None
    assert eta_of(advancing(rate_from_offset=100), 111) is None


def test_between_two_units_a_job_gets_no_slower_and_after_a_window_it_does() -> None:
    assert rate_of(advancing(), 110 + RATE_WINDOW_S) == 10
    assert rate_of(advancing(), 120 + RATE_WINDOW_S) == 5


def test_units_that_are_done_again_make_no_negative_rate() -> None:
    assert rate_of(advancing(rate_from_offset=400), 110) == 0


def test_a_concluded_job_has_the_rate_of_its_active_time() -> None:
    ended = {"state": State.CONCLUDED, "started_at": 100, "concluded_at": 3700, "active_s": 20}
    assert rate_of(advancing(**ended), 9999) == 5
    assert rate_of(advancing(**{**ended, "active_s": 0, "offset": 0}), 9999) == 0


@pytest.mark.parametrize("state", State)
def test_only_what_goes_on_has_a_rate_and_an_eta(state: State) -> None:
    goes_on = state in (State.RUNNING, State.READY, State.WAITING)
    assert rate_of(advancing(state=state), 110) == (10 if goes_on else 0)
    assert (eta_of(advancing(state=state), 110) is not None) == goes_on


R, I, S, E = ErrorPolicy.REPORT, ErrorPolicy.IGNORE, ErrorPolicy.STOP, ErrorPolicy.ENOSPC  # noqa: E741


@pytest.mark.parametrize(
    ("source", "target", "errors", "action"),
    [
        (R, R, [""], Action.REPORT),
        (S, R, [""], Action.STOP),
        (R, S, ["", "EIO"], Action.STOP),
        (E, R, [""], Action.STOP),
        (I, E, [""], Action.STOP),
        (I, S, ["EIO"], Action.IGNORE),
        (I, R, [""], Action.IGNORE),
        (I, I, ["EIO"], Action.IGNORE),
    ],
)
def test_given_up_units_ask_both_policies_unless_their_holder_could_tell_what_failed(
    source: ErrorPolicy, target: ErrorPolicy, errors: list[str], action: Action
) -> None:
    spec = JobSpec(source="/s", target="/t", on_source_error=source, on_target_error=target)
    assert act_on_quarantine(spec, errors) is action
