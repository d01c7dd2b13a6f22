"""What a person is told when S3 cannot be used: one sentence that names the place, and what to do. Never a secret."""

from __future__ import annotations

import datetime
import errno
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import HTTPClientError, SSLError
from botocore.parsers import ResponseParserError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from scripted_s3 import SECRET, Answer, Opener, ScriptedS3, error, scripted_s3

from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError
from workers.repository.store import MissingObjectError, StoreError, retry
from workers.repository.store.retry import Again
from workers.repository.store.s3 import S3Store
from workers.repository.store.s3_errors import Explainer

ANSWERS = [
    ("InvalidAccessKeyId", 403, RefusedError, "does not know the worker's access key. Check AWS_ACCESS_KEY_ID"),
    ("SignatureDoesNotMatch", 403, RefusedError, "does not accept the worker's signature. Check AWS_SECRET_ACCESS_KEY"),
    ("ExpiredToken", 400, RefusedError, "session for .* has expired. Renew its credentials"),
    ("AccessDenied", 403, RefusedError, "denies the worker GetObject of k. Allow its user s3:ListBucket, s3:GetObject"),
    ("RequestTimeTooSkewed", 403, RefusedError, "clocks of the worker's host and of .* too far apart. Set both by NTP"),
    ("AuthorizationHeaderMalformed", 400, RefusedError, "is in another region. Write region=NAME in its URI"),
    ("NoSuchBucket", 404, NotFoundError, "no bucket bucket for .*. Make it, or check endpoint="),
    ("NoSuchKey", 404, MissingObjectError, "no object k in "),
    ("InvalidObjectState", 403, StoreError, "k in .* is archived. Restore it there first"),
    ("NotImplemented", 501, StoreError, "cannot do GetObject of k: said by the server. Update the server"),
    ("Strange", 418, StoreError, "refuses GetObject of k: 418 Strange said by the server. Look at the server's log"),
]


@pytest.mark.parametrize(("code", "status", "kind", "message"), ANSWERS, ids=[answer[0] for answer in ANSWERS])
def test_an_answer_that_says_no_is_explained_and_not_asked_for_again(
    s3: ScriptedS3, store: S3Store, code: str, status: int, kind: type[FlushpointError], message: str
) -> None:
    s3.will_answer(error(status, code))
    with pytest.raises(kind, match=message) as caught:
        store.get("k")
    assert type(caught.value) is kind
    assert f"s3://bucket/prefix at {s3.endpoint}" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert len(s3.requests) == 1


def test_the_region_of_a_bucket_elsewhere_is_named(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(
        Answer(301, {"x-amz-bucket-region": "eu-south-2"}), Answer(301, {"x-amz-bucket-region": "eu-south-2"})
    )
    with pytest.raises(RefusedError, match=r"is in another region. Write region=eu-south-2"):
        store.put("k", b"x")


@pytest.mark.parametrize("answer", [error(507, "XMinioStorageFull"), error(403, "QuotaExceeded"), error(507, "Other")])
def test_a_full_store_is_recognised(s3: ScriptedS3, store: S3Store, answer: Answer) -> None:
    s3.will_answer(answer)
    with pytest.raises(StoreError, match=r"has no room for k. Make room there") as caught:
        store.put("k", b"x")
    assert caught.value.errno == errno.ENOSPC


def test_other_errors_of_a_store_are_not_taken_for_a_full_one(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(error(400, "EntityTooLarge"))
    with pytest.raises(StoreError) as caught:
        store.put("k", b"x")
    assert caught.value.errno == errno.EIO


def test_a_head_that_is_denied_is_explained_without_a_body(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(Answer(403))
    with pytest.raises(RefusedError, match="denies the worker HeadObject of k"):
        store.size("k")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "RequestTimeTooSkewed", "clocks"),
        (403, "SignatureDoesNotMatch", "does not accept the worker's signature"),
        (400, "ExpiredToken", "session for .* has expired"),
        (403, "AccessDenied", "denies the worker GetObject of k"),
    ],
)
def test_why_a_head_is_refused_is_asked_by_a_request_whose_answer_has_a_body(
    s3: ScriptedS3, store: S3Store, status: int, code: str, said: str
) -> None:
    heads = ["HEAD /k"] if status == 403 else ["HEAD /k", "HEAD "]  # botocore takes 400 for a bucket elsewhere
    s3.will_answer(*[Answer(status)] * len(heads), error(status, code))
    with pytest.raises(RefusedError, match=said):
        store.size("k")
    assert s3.asked() == [*heads, "GET /k"]


@pytest.mark.parametrize("answer", [error(404, "NoSuchKey"), error(416, "InvalidRange"), Answer(206, body=b"x")])
def test_a_refused_head_stays_so_whatever_else_is_said_then(s3: ScriptedS3, store: S3Store, answer: Answer) -> None:
    s3.will_answer(Answer(403), answer)
    with pytest.raises(RefusedError, match="denies the worker HeadObject of k"):
        store.size("k")


def test_the_bucket_is_looked_for_once_when_an_object_is_missing(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(Answer(404), Answer(200), Answer(404))
    assert store.size("k") is None
    assert store.size("k") is None
    assert s3.asked() == ["HEAD /k", "HEAD ", "HEAD /k"]


def test_a_missing_bucket_is_no_missing_object(s3: ScriptedS3, store: S3Store) -> None:
    s3.will_answer(Answer(404), Answer(404))
    with pytest.raises(NotFoundError, match="no bucket bucket for"):
        store.size("k")


# -- credentials -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("credentials")
def test_no_credentials(s3: ScriptedS3, open_s3: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RefusedError, match=r"has no credentials for s3://bucket/prefix at .*. Set AWS_ACCESS_KEY_ID"):
        open_s3(s3).get("k")
    assert s3.requests == []


@pytest.mark.usefixtures("credentials")
def test_half_of_the_credentials(s3: ScriptedS3, open_s3: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RefusedError, match="has only half of the credentials for s3://bucket/prefix"):
        open_s3(s3).get("k")


def test_a_profile_that_is_not_there(s3: ScriptedS3, open_s3: Opener) -> None:
    with pytest.raises(
        RefusedError, match=r"s3://bucket/prefix at .* cannot be used: .*\(nobody\).*. Check the options"
    ):
        open_s3(s3, "profile=nobody")


def test_credentials_of_a_profile_are_used(
    s3: ScriptedS3, open_s3: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    file.write_text(f"[backup]\naws_access_key_id = from-profile\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    open_s3(s3, "profile=backup").put("k", b"x")
    assert "Credential=from-profile/" in s3.requests[0].headers["authorization"]


# -- the way to the server -------------------------------------------------------------------------------


def unused_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "STRANGER_PATIENCE_S", 0.2)


@pytest.mark.usefixtures("impatient")
def test_an_endpoint_where_nobody_listens(open_s3: Opener) -> None:
    endpoint = unused_endpoint()
    message = rf"{endpoint} cannot be reached: Connection refused \(\d attempts? in 0 s\). Check endpoint="
    with pytest.raises(UnavailableError, match=f"s3://bucket/prefix at {message}"):
        open_s3(ScriptedS3(endpoint)).get("k")


@pytest.mark.usefixtures("impatient")
def test_an_endpoint_that_has_no_address(open_s3: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(UnavailableError, match="cannot be reached: Name or service not known"):
        open_s3(ScriptedS3("http://s3.test:9000")).get("k")


def self_signed(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's context for 127.0.0.1, and the PEM file of its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
    )
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(address, False).add_extension(x509.BasicConstraints(True, None), True)
    public, private = directory / "certificate.pem", directory / "key.pem"
    public.write_bytes(certificate.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context, public


@pytest.fixture
def tls_s3(tmp_path: Path) -> Iterator[tuple[ScriptedS3, Path]]:
    context, certificate = self_signed(tmp_path)
    with scripted_s3(context) as server:
        yield server, certificate


def test_an_authority_of_ones_own_is_trusted(tls_s3: tuple[ScriptedS3, Path], open_s3: Opener) -> None:
    server, certificate = tls_s3
    store = open_s3(server, f"ca={certificate}")
    store.put("k", bytes(2 * 1024 * 1024))
    store.put("k", b"x")
    assert len({request.connection for request in server.requests}) == 1


def test_a_certificate_of_nobody_known_is_refused(tls_s3: tuple[ScriptedS3, Path], open_s3: Opener) -> None:
    server, _ = tls_s3
    message = (
        "the certificate of s3://bucket/prefix at https://.* is not trusted: self.signed certificate. Name the PEM"
    )
    with pytest.raises(RefusedError, match=message):
        open_s3(server).get("k")


def test_a_server_without_tls_is_refused(s3: ScriptedS3, open_s3: Opener) -> None:
    s3.endpoint = s3.endpoint.replace("http:", "https:")
    with pytest.raises(RefusedError, match=r"TLS to s3://bucket/prefix at https://.* failed: .*. Check that endpoint="):
        open_s3(s3).get("k")


def test_an_authority_that_is_not_there(s3: ScriptedS3, open_s3: Opener) -> None:
    with pytest.raises(NotFoundError, match=r"no file /none.pem of authorities on this worker's host. Check ca="):
        open_s3(s3, "ca=/none.pem")


def test_an_authority_that_is_none(tls_s3: tuple[ScriptedS3, Path], open_s3: Opener, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(RefusedError, match=r"TLS to s3://bucket/prefix at .* failed: .*. Check .* ca="):
        open_s3(tls_s3[0], f"ca={tmp_path}/bad.pem").get("k")


# -- what only a broken library or program says ----------------------------------------------------------


@pytest.fixture
def explainer() -> Explainer:
    return Explainer("s3://bucket/prefix", "bucket", "")


def test_a_connection_that_ends_within_tls_is_worth_another_attempt(explainer: Explainer) -> None:
    cause = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol")
    assert isinstance(explainer.explain(SSLError(endpoint_url="https://x", error=cause), "k"), Again)


def test_what_is_no_answer_of_s3_is_worth_another_attempt(explainer: Explainer) -> None:
    explained = explainer.explain(ResponseParserError("garbage"), "k")
    assert isinstance(explained, Again)
    assert explained.message == "s3://bucket/prefix does not answer: what it sent is no answer of S3"


def test_a_system_call_that_failed_below_botocore_is_worth_another_attempt(explainer: Explainer) -> None:
    explained = explainer.explain(HTTPClientError(error=OSError(errno.ENETDOWN, "Network is down")), "k")
    assert isinstance(explained, Again)
    assert explained.message.endswith("Network is down")


def test_a_fault_of_a_program_is_not_taken_for_one_of_the_network(explainer: Explainer) -> None:
    assert explainer.explain(HTTPClientError(error=TypeError("a bug")), "k") is None
    assert explainer.explain(KeyError("a bug"), "k") is None
