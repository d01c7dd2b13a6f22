"""NBD URIs: what is accepted, what comes back, what is refused with advice."""

from __future__ import annotations

import ssl
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.model.errors import UsageError
from workers.nbd.endpoint import DEFAULT_PORT, Endpoint, Tls


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("nbd://host/disk", Endpoint("host", DEFAULT_PORT, None, "disk")),
        ("nbd://host", Endpoint("host", DEFAULT_PORT, None, "")),
        ("nbd://[::1]:99/a/b%20c", Endpoint("::1", 99, None, "a/b c")),
        ("nbd+unix:///disk?socket=/run/x", Endpoint(None, 0, "/run/x", "disk")),
        ("nbd+unix://?socket=/run/x", Endpoint(None, 0, "/run/x", "")),
        ("nbds://host:1/d", Endpoint("host", 1, None, "d", Tls())),
        (
            "nbds+unix:///d?socket=/s&tls-certificates=/pki&tls-hostname=h",
            Endpoint(None, 0, "/s", "d", Tls(certificates="/pki", hostname="h")),
        ),
    ],
)
def test_a_uri_names_an_endpoint_and_comes_back(uri: str, expected: Endpoint) -> None:
    endpoint = Endpoint.parse(uri)
    assert endpoint == expected
    assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    "uri",
    [
        "http://host/x",
        "nbd:///x",
        "nbd://host:port/x",
        "nbd://host:70000/x",
        "nbd://user@host/x",
        "nbd://host/x#y",
        "nbd://host/x?socket=/s",
        "nbd://host/x?colour=red",
        "nbd://host/x?tls-hostname=h",
        "nbds://host/x?tls-certificates=",
        "nbds://host/x?tls-username=u",
        "nbds://host/x?tls-hostname=a&tls-hostname=b",
        "nbd+unix:///x",
        "nbd+unix://host/x?socket=/s",
        "nbd+unix:///x?socket=",
        "nbd://[::1/x",
        "",
    ],
)
def test_a_bad_uri_is_refused_with_a_remedy(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        Endpoint.parse(uri)
    assert caught.value.remedy


@pytest.mark.skipif(hasattr(ssl.SSLContext, "set_psk_client_callback"), reason="this Python can do it")
def test_a_pre_shared_key_below_python_3_13_is_refused_in_favour_of_x509() -> None:
    with pytest.raises(UsageError, match="x509"):
        Endpoint.parse("nbds://host/x?tls-psk-file=/k")


@given(st.text(max_size=60))
def test_arbitrary_text_raises_nothing_but_usage_error(text: str) -> None:
    for uri in (text, f"nbd://{text}", f"nbds+unix:///{text}?socket={text}"):
        with suppress(UsageError):
            Endpoint.parse(uri)


@given(
    export=st.text(st.characters(exclude_categories=["Cs"]), max_size=50),
    socket_path=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50),
)
def test_any_export_and_socket_name_survives_its_uri(export: str, socket_path: str) -> None:
    for endpoint in (Endpoint(None, 0, socket_path, export), Endpoint("h", 1, None, export)):
        assert Endpoint.parse(str(endpoint)) == endpoint
