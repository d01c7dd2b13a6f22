"""Keys of a repository: data keys wrapped by its owner's key, and from them one key for each object.

    owner's key ──AES key wrap──> data key ──HKDF(object's id)──> AES-256-GCM key of one pack or root
                             └──> digest key: keyed BLAKE3, so that a digest tells nothing of a block

An object's key is used for that object alone and a nonce is an offset in it, so no nonce is ever used twice however
much is written. A digest key is never rotated: equal blocks stay equal across data keys, so that runs can be shared.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Literal

import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap
from pydantic import BaseModel, ConfigDict, ValidationError

from coordinator.model.errors import FlushpointError, RefusedError
from workers.repository.layout import ID_BYTES, KEYS, DamageError, plain_seal
from workers.repository.store.contract import Buffer, ObjectStore

NO_KEY = bytes(ID_BYTES)
"""The key id of objects that are not encrypted."""
KEY_BYTES = 32
TAG_BYTES = 16
_KNOWN_OBJECTS = 4096
"""Bounds the memory of a reader of many packs."""
_SCRYPT = {"n": 2**15, "r": 8, "p": 1, "maxmem": 64 * 1024 * 1024}
"""For passphrases: a tenth of a second and 32 MiB a guess."""


class KeyRecord(BaseModel):
    """keys/<id>: a key of the repository as it is stored, wrapped (RFC 3394)."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    id: str
    use: Literal["data", "digest"]
    number: int
    """Grows; the data key of the highest number is written with."""
    salt: str
    """base64; for a passphrase's scrypt."""
    wrapped: str
    """base64."""
    seal: str = ""
    """See layout.plain_seal."""


class Seal:
    """Seals and opens the pieces of one object; a nonce is the piece's offset in it, or any number used once."""

    overhead = 0

    def seal(self, nonce: int, data: Buffer, context: bytes) -> Buffer:
        """`data` under authentication of `context`, `overhead` bytes longer."""
        return data

    def open(self, nonce: int, data: Buffer, context: bytes) -> Buffer:
        """The inverse; ValueError if it is not what was sealed there."""
        return data


_PLAIN = Seal()


class _GcmSeal(Seal):
    overhead = TAG_BYTES

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def seal(self, nonce: int, data: Buffer, context: bytes) -> Buffer:
        return self._cipher.encrypt(nonce.to_bytes(12, "big"), data, context)

    def open(self, nonce: int, data: Buffer, context: bytes) -> Buffer:
        try:
            return self._cipher.decrypt(nonce.to_bytes(12, "big"), data, context)
        except InvalidTag:
            raise ValueError("does not authenticate") from None


class Keyring:
    """The unwrapped keys of a repository; without any, nothing is encrypted and digests are plain. Thread-safe."""

    def __init__(
        self,
        repository: bytes,
        current: bytes = NO_KEY,
        data_keys: Mapping[bytes, bytes] | None = None,
        digest_key: bytes | None = None,
        reload: Callable[[], Mapping[bytes, bytes]] | None = None,
    ) -> None:
        """`current` is the id of the data key that is written with; `data_keys` are in the order of their age. `reload`
        gives them as they are now: somebody may have added one since."""
        self._reload = reload
        self.repository = repository
        self.current = current
        self._data_keys = dict(data_keys or {})
        self._digest_key = digest_key
        self._found: dict[bytes, Seal] = {}
        """Objects whose data key is known by now."""

    @property
    def encrypted(self) -> bool:
        return bool(self._data_keys)

    def digest(self, data: Buffer) -> bytes:
        """32 bytes that stand for `data`; keyed where the repository is encrypted."""
        if self._digest_key is None:
            return blake3.blake3(data).digest()
        return blake3.blake3(data, key=self._digest_key).digest()

    def seal(self, name: bytes) -> Seal:
        """For writing the object of that id or key."""
        return self._derived(self.current, name) if self.encrypted else _PLAIN

    def open(self, name: bytes, nonce: int, data: Buffer, context: bytes) -> Buffer:
        """What was sealed in the object `name` under any of the data keys, the newest tried first; ValueError."""
        if not self.encrypted:
            return data
        known = self._found.get(name)
        if known is not None:
            return known.open(nonce, data, context)
        tried = dict(self._data_keys)
        plain = self._tried(list(reversed(tried)), name, nonce, data, context)
        if plain is None and self._reload is not None:
            self._data_keys = dict(self._reload())
            plain = self._tried([k for k in self._data_keys if k not in tried], name, nonce, data, context)
        if plain is None:
            raise ValueError("does not authenticate under any key")
        return plain

    def _tried(self, key_ids: list[bytes], name: bytes, nonce: int, data: Buffer, context: bytes) -> Buffer | None:
        for key_id in key_ids:
            seal = self._derived(key_id, name)
            try:
                plain = seal.open(nonce, data, context)
            except ValueError:
                continue
            if len(self._found) >= _KNOWN_OBJECTS:
                self._found.clear()
            self._found[name] = seal
            return plain
        return None

    def _derived(self, key_id: bytes, name: bytes) -> Seal:
        info = b"flushpoint object " + name
        return _GcmSeal(HKDF(SHA256(), KEY_BYTES, salt=self.repository, info=info).derive(self._data_keys[key_id]))


def new_keys(store: ObjectStore, secret: bytes) -> list[str]:
    """The first data key and the digest key of a new repository; the names of their objects. RefusedError if there are
    some already that `secret` does not open: they would keep the repository from ever being opened."""
    for record in _records(store):
        try:
            _unwrapped(record, secret, store.name)
        except RefusedError as error:
            raise RefusedError(
                f"{store.name} has keys of a repository whose making was broken off, or goes on, under another key",
                f"name that key, or remove what is in {KEYS} if nobody makes one there",
            ) from error
    new = [
        _wrapped(secrets.token_bytes(ID_BYTES), use, 1, secrets.token_bytes(KEY_BYTES), secret)
        for use in ("digest", "data")
    ]
    for record in new:
        _write(store, record)
    return [f"{KEYS}{record.id}" for record in new]


def load(store: ObjectStore, repository: bytes, secret: bytes) -> Keyring:
    """RefusedError if `secret` does not open the keys; DamageError for a record that is none."""
    data_keys, digest_key = _load(store, secret)

    def reload() -> Mapping[bytes, bytes]:
        try:
            return _load(store, secret)[0]
        except FlushpointError:  # what did not open is then said to be damaged, as it would be without
            return data_keys

    return Keyring(repository, list(data_keys)[-1], data_keys, digest_key, reload)


def _load(store: ObjectStore, secret: bytes) -> tuple[dict[bytes, bytes], bytes]:
    """(data keys in the order of their age, digest key)."""
    found: list[tuple[int, bytes, bytes]] = []
    digest_key: bytes | None = None
    records = _records(store)
    for record in records:
        try:
            key = _unwrapped(record, secret, store.name)
        except RefusedError as error:
            if not any(_is_opened(other, secret, store.name) for other in records):
                raise
            raise RefusedError(
                f"the keys of {store.name} are wrapped by two owners' keys: a rewrap-keys goes on or was broken off",
                "run flushpoint repository rewrap-keys once more, with the same two keys",
            ) from error
        if record.use == "digest":
            digest_key = key
        else:
            found.append((record.number, bytes.fromhex(record.id), key))
    if digest_key is None or not found:
        raise DamageError("the set of keys", KEYS)
    return {key_id: key for _, key_id, key in sorted(found)}, digest_key


def rotate(store: ObjectStore, secret: bytes) -> str:
    """Add a data key that everything new is written with; older objects keep theirs. Returns its id."""
    number = max(record.number for record in _records(store) if record.use == "data") + 1
    key_id = secrets.token_bytes(ID_BYTES)
    _write(store, _wrapped(key_id, "data", number, secrets.token_bytes(KEY_BYTES), secret))
    return key_id.hex()


def rewrap(store: ObjectStore, old: bytes, new: bytes) -> int:
    """Wrap every key anew with the owner's `new` key; the old one opens nothing afterwards. Returns how many.

    One that is wrapped with the new key already was so by a rewrap that was killed in the middle, which this completes.
    It looks again until it finds no more: somebody may add a data key meanwhile.
    """
    done: set[str] = set()
    while records := [record for record in _records(store) if record.id not in done]:
        for record, key in [(record, _unwrapped_by_either(record, old, new, store.name)) for record in records]:
            _write(store, _wrapped(bytes.fromhex(record.id), record.use, record.number, key, new))
            done.add(record.id)
    return len(done)


def _records(store: ObjectStore) -> list[KeyRecord]:
    records = []
    for info in store.list(KEYS):
        try:
            record = KeyRecord.model_validate_json(store.get(info.key))
        except ValidationError as error:
            raise DamageError("the key", info.key) from error
        if record.seal != plain_seal(record.model_dump()):
            raise DamageError("the key", info.key)
        records.append(record)
    return records


def _write(store: ObjectStore, record: KeyRecord) -> None:
    sealed = {**record.model_dump(), "seal": plain_seal(record.model_dump())}
    store.put(f"{KEYS}{record.id}", json.dumps(sealed, indent=1).encode())


def _wrapped(key_id: bytes, use: str, number: int, key: bytes, secret: bytes) -> KeyRecord:
    salt = secrets.token_bytes(16)
    wrapped = aes_key_wrap(_wrapping_key(secret, salt), key)
    return KeyRecord.model_validate(
        {
            "id": key_id.hex(),
            "use": use,
            "number": number,
            "salt": base64.b64encode(salt).decode(),
            "wrapped": base64.b64encode(wrapped).decode(),
        }
    )


def _unwrapped(record: KeyRecord, secret: bytes, where: str) -> bytes:
    try:
        wrapped, salt = base64.b64decode(record.wrapped), base64.b64decode(record.salt)
        return aes_key_unwrap(_wrapping_key(secret, salt), wrapped)
    except InvalidUnwrap:
        raise RefusedError(
            f"the key given does not open the repository {where}", "name the key it was made with, by key=…"
        ) from None
    except (ValueError, binascii.Error) as error:
        raise DamageError("the key", f"{KEYS}{record.id}") from error


def _is_opened(record: KeyRecord, secret: bytes, where: str) -> bool:
    try:
        _unwrapped(record, secret, where)
    except RefusedError:
        return False
    return True


def _unwrapped_by_either(record: KeyRecord, old: bytes, new: bytes, where: str) -> bytes:
    try:
        return _unwrapped(record, old, where)
    except RefusedError:
        try:
            return _unwrapped(record, new, where)
        except RefusedError:
            pass
        raise


def _wrapping_key(secret: bytes, salt: bytes) -> bytes:
    """64 hexadecimal digits are the key itself; anything else is a passphrase."""
    if len(secret) == 2 * KEY_BYTES:
        try:
            return bytes.fromhex(secret.decode())
        except ValueError:
            pass
    return hashlib.scrypt(secret, salt=salt, dklen=KEY_BYTES, **_SCRYPT)
