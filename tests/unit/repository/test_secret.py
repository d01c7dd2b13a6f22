"""How a repository is protected: the owner's key kept by AWS KMS, which moto plays; and warnings of what is not."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from coordinator.model.errors import RefusedError, UnavailableError
from coordinator.model.repository_uri import parse_repository
from coordinator.model.task import RepositoryTask, TaskKind
from tests.object_servers import ObjectServer, running_moto
from tests.repositories import backup, local_uri, read_point
from workers.access import Access
from workers.repository import chores, keyring
from workers.repository.layout import OWNERS, DamageError
from workers.repository.repository import Repository
from workers.repository.store.contract import StoreError
from workers.repository.store.local import LocalStore

ACCESS = Access(["/"], ["*"])
DATA = b"a disk" * 20000


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with running_moto() as running:
        yield running


@pytest.fixture
def kms(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    for name, value in {**server.env, "AWS_ENDPOINT_URL_KMS": server.endpoint}.items():
        monkeypatch.setenv(name, value)
    return boto3.client("kms")


@pytest.fixture
def key(kms: Any) -> str:
    return str(kms.create_key()["KeyMetadata"]["KeyId"])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "repository"
    made.mkdir()
    return made


def open_with(directory: Path, key: str) -> Repository:
    return Repository.open(local_uri(directory, key), ACCESS)


def test_a_repository_whose_key_kms_keeps_is_opened_with_its_name(key: str, directory: Path) -> None:
    with Repository.init(local_uri(directory, f"kms:{key}"), ACCESS) as repository:
        backup(repository, "shop", DATA)
    with open_with(directory, f"kms:{key}") as repository:
        assert read_point(repository, "shop") == DATA


def test_a_record_of_another_repository_is_not_decrypted(key: str, directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for place in (directory, other):
        Repository.init(local_uri(place, f"kms:{key}"), ACCESS).close()
    [record], [others] = ((place / OWNERS).iterdir() for place in (directory, other))
    record.write_bytes(others.read_bytes())
    with pytest.raises(RefusedError, match=f"KMS does not let this worker use the key {key}"):
        open_with(directory, f"kms:{key}")


def test_an_alias_and_an_arn_name_a_key_too(kms: Any, key: str, directory: Path) -> None:
    kms.create_alias(AliasName=f"alias/{key}", TargetKeyId=key)
    with Repository.init(local_uri(directory, f"kms:alias/{key}"), ACCESS) as repository:
        backup(repository, "shop", DATA)
    with open_with(directory, f"kms:alias/{key}") as repository:
        assert read_point(repository, "shop") == DATA


def test_another_kms_key_opens_nothing(kms: Any, key: str, directory: Path) -> None:
    Repository.init(local_uri(directory, f"kms:{key}"), ACCESS).close()
    other = kms.create_key()["KeyMetadata"]["KeyId"]
    with pytest.raises(RefusedError, match=f"no key that was encrypted by KMS under {other}"):
        open_with(directory, f"kms:{other}")


def test_a_key_that_kms_does_not_have_makes_no_repository(kms: Any, directory: Path) -> None:
    uri = local_uri(directory, "kms:arn:aws:kms:us-east-1:123456789012:key/none")
    with pytest.raises(RefusedError, match="KMS does not let"):
        Repository.init(uri, ACCESS)
    assert not (directory / "repository.json").exists()


def test_a_making_that_was_broken_off_after_kms_had_made_a_key_is_completed(
    key: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> bytes:
        raise RefusedError("KMS lets this worker make keys, but not use them")

    with monkeypatch.context() as patch:
        patch.setattr("workers.repository.secret._from_kms", denied)
        with pytest.raises(RefusedError):
            Repository.init(local_uri(directory, f"kms:{key}"), ACCESS)
    assert (directory / OWNERS).exists()
    with Repository.init(local_uri(directory, f"kms:{key}"), ACCESS) as repository:
        backup(repository, "shop", DATA)
    with open_with(directory, f"kms:{key}") as repository:
        assert read_point(repository, "shop") == DATA


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (400, "ThrottlingException", UnavailableError),
        (500, "KMSInternalException", UnavailableError),
        (403, "AccessDeniedException", RefusedError),
    ],
)
def test_a_busy_kms_is_told_from_one_that_refuses(
    key: str, directory: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, error: type[Exception]
) -> None:
    Repository.init(local_uri(directory, f"kms:{key}"), ACCESS).close()
    answer: Any = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}

    def refuse(*_: object, **__: object) -> None:
        raise ClientError(answer, "Decrypt")

    monkeypatch.setattr("botocore.client.BaseClient._make_api_call", refuse)
    with pytest.raises(error):
        open_with(directory, f"kms:{key}")


def test_rewrapping_with_the_same_key_is_refused(key: str, directory: Path) -> None:
    Repository.init(local_uri(directory, f"kms:{key}"), ACCESS).close()
    uri = str(local_uri(directory, f"kms:{key}"))
    task = RepositoryTask(kind=TaskKind.REWRAP_KEYS, repository=uri, new_key=f"kms:{key}")
    with pytest.raises(RefusedError, match="is the key it has"):
        chores.run(task, "job", ACCESS, lambda: None)


def test_a_kms_that_does_not_answer_is_said_to_be_away(
    key: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Repository.init(local_uri(directory, f"kms:{key}"), ACCESS).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:1")
    with pytest.raises(UnavailableError, match="KMS cannot be asked"):
        open_with(directory, f"kms:{key}")


def test_a_worker_asks_no_kms_beside_its_allowed_endpoints(key: str, directory: Path) -> None:
    Repository.init(local_uri(directory, f"kms:{key}"), ACCESS).close()
    with pytest.raises(RefusedError, match=r"127\.0\.0\.1"):
        Repository.open(local_uri(directory, f"kms:{key}"), Access(["/"], ["elsewhere.example:443"]))


def test_a_damaged_record_is_told_from_a_wrong_key(key: str, directory: Path) -> None:
    Repository.init(local_uri(directory, f"kms:{key}"), ACCESS).close()
    [record] = (directory / OWNERS).iterdir()
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, "ciphertext": "AAAA" + fields["ciphertext"][4:]}))
    with pytest.raises(DamageError, match=OWNERS):
        open_with(directory, f"kms:{key}")


def test_a_repository_moves_from_a_passphrase_to_kms_and_on_to_another_key(
    kms: Any, key: str, directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("a passphrase")
    other = f"kms:{kms.create_key()['KeyMetadata']['KeyId']}"
    chain = [f"file:{tmp_path}/key", f"kms:{key}", other]
    with Repository.init(local_uri(directory, chain[0]), ACCESS) as repository:
        backup(repository, "shop", DATA)
    for old, new in itertools.pairwise(chain):
        uri = str(local_uri(directory, old))
        task = RepositoryTask(kind=TaskKind.REWRAP_KEYS, repository=uri, new_key=new)
        assert chores.run(task, "job", ACCESS, lambda: None)["keys"] == 2
        with open_with(directory, new) as repository:
            assert read_point(repository, "shop") == DATA
        with pytest.raises(RefusedError):
            open_with(directory, old)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://bucket/p?endpoint=http://s3.example:9000", "read and change what is stored"),
        ("s3://bucket/p?endpoint=http://s3.example:9000&key=env:K", "names and sizes"),
        ("s3://bucket/p?endpoint=https://s3.example:9000", ""),
        ("s3://bucket/p?endpoint=http://127.0.0.1:9000", ""),
        ("s3://bucket/p", ""),
        ("repo+file:///backups", ""),
    ],
)
def test_plain_http_is_warned_of(uri: str, says: str) -> None:
    warnings = parse_repository(uri).warnings()
    assert len(warnings) == (says != "")
    assert says in "".join(warnings)


def test_a_new_repository_tells_what_its_user_should_know(directory: Path) -> None:
    task = RepositoryTask(kind=TaskKind.INIT, repository=str(local_uri(directory)))
    assert chores.run(task, "job", ACCESS, lambda: None)["warnings"] == []


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "image"])
def test_what_is_no_file_of_a_key_is_refused_and_neither_waited_for_nor_read_to_its_end(
    directory: Path, tmp_path: Path, kind: str
) -> None:
    key = tmp_path / "key"
    match kind:
        case "pipe":
            os.mkfifo(key)
        case "device":
            key.symlink_to("/dev/zero")
        case "directory":
            key.mkdir()
        case "image":
            key.touch()
            os.truncate(key, 2**40)
    with pytest.raises(RefusedError, match=r"which was named as the key, (is no regular file|has more than)"):
        Repository.init(local_uri(directory, f"file:{key}"), ACCESS)


def rewrap(directory: Path, old: str, new: str) -> dict[str, Any]:
    task = RepositoryTask(kind=TaskKind.REWRAP_KEYS, repository=str(local_uri(directory, old)), new_key=new)
    return chores.run(task, "job", ACCESS, lambda: None)


@pytest.fixture
def owners(directory: Path, tmp_path: Path) -> tuple[str, str]:
    """References to two keys, with a repository under the first."""
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
    old, new = f"file:{tmp_path}/old", f"file:{tmp_path}/new"
    with Repository.init(local_uri(directory, old), ACCESS) as repository:
        backup(repository, "shop", DATA)
    return old, new


def test_a_rewrap_that_was_broken_off_is_told_and_done_again_as_any_task_is(
    directory: Path, owners: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither key opens the repository then."""
    with monkeypatch.context() as patched:
        put, written = LocalStore.put, list[str]()

        def failing(store: LocalStore, key: str, content: bytes) -> None:
            if written:
                raise StoreError("no room")
            written.append(key)
            put(store, key, content)

        patched.setattr(LocalStore, "put", failing)
        with pytest.raises(StoreError):
            rewrap(directory, *owners)
    for key in owners:
        with pytest.raises(RefusedError, match="wrapped by two owners' keys") as caught:
            open_with(directory, key)
        assert "rewrap-keys once more, with the same two keys" in caught.value.remedy
    assert rewrap(directory, *owners)["keys"] == 2
    with open_with(directory, owners[1]) as repository:
        assert read_point(repository, "shop") == DATA


def test_a_data_key_that_is_added_while_keys_are_rewrapped_is_rewrapped_too(
    directory: Path, owners: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, adding = LocalStore.put, [True]

    def beside(store: LocalStore, key: str, content: bytes) -> None:
        if adding:
            adding.clear()
            keyring.rotate(store, b"old")
        put(store, key, content)

    monkeypatch.setattr(LocalStore, "put", beside)
    assert rewrap(directory, *owners)["keys"] == 3
    with open_with(directory, owners[1]) as repository:
        assert read_point(repository, "shop") == DATA


def test_keys_of_a_repository_that_has_none_are_not_rewrapped(directory: Path, tmp_path: Path) -> None:
    Repository.init(local_uri(directory), ACCESS).close()
    (tmp_path / "key").write_text("key")
    with pytest.raises(RefusedError, match="no key was named"):
        rewrap(directory, "", f"file:{tmp_path}/key")
    with pytest.raises(RefusedError, match="is not encrypted, and a key was named"):
        rewrap(directory, f"file:{tmp_path}/key", "env:NEW")
