"""Settings: FLUSHPOINT_* in the environment over the TOML file $FLUSHPOINT_CONFIG; see config/flushpoint.toml.

Below both lie the defaults of whoever starts this process, one JSON object in $FLUSHPOINT_DEFAULTS: the embedded
stack allows all that its user may do, unless that user says otherwise, in whichever of the two places.
Timeouts that depend on each other are checked together, when the settings load.
"""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from coordinator.model.errors import UsageError

URL_SCHEMES = {
    "redis_url": ("redis", "rediss", "unix"),
    # No sentinel: kombu needs the name of its master, for which there is no setting.
    "broker_url": ("redis", "rediss", "redis+socket", "amqp", "amqps"),
}
_SEPARATORS = {"allowed_roots": ":", "agent_sockets": ":", "allowed_endpoints": ","}
"""A path may hold a comma, an endpoint has colons."""


class Settings(BaseSettings):
    """Times are in seconds, sizes in bytes."""

    # A misspelt name in the file is an error: a limit that does nothing is worse than none.
    model_config = SettingsConfigDict(env_prefix="FLUSHPOINT_", extra="forbid", frozen=True)

    redis_url: str = "redis://127.0.0.1:6379/0"
    """The ledger: Redis or Valkey with AOF and maxmemory-policy noeviction. redis://, rediss:// or unix://."""
    redis_prefix: str = "fp:"
    broker_url: str = "redis://127.0.0.1:6379/1"
    """The doorbells: redis://, rediss://, redis+socket://, amqp:// or amqps://."""

    api_socket: str = ""
    """Unix socket of the API; with it nothing listens on TCP."""
    api_host: str = "127.0.0.1"
    api_port: int = Field(default=7410, ge=1, le=65535)

    worker_slots: int = Field(default=2, ge=1, le=256)
    worker_budget_s: float = Field(default=60.0, gt=0)
    """How long a woken worker goes on claiming before it gives its slot back to the broker."""
    allowed_roots: Annotated[tuple[str, ...], NoDecode] = ()
    """Directories under which a worker reads and writes files, and an agent lets guests go on with other images and
    finds those of machines that are off; none: no files at all. As text /a:/b or JSON."""
    cache_dir: str = ""
    """Where a worker remembers which blocks a repository holds already; "": it does not, and stores them once more."""
    allowed_endpoints: Annotated[tuple[str, ...], NoDecode] = ()
    """NBD peers a worker may talk to: CIDR, host, host:port; "*" allows all but link-local and metadata addresses.
    As text separated by commas, or JSON."""

    lease_s: float = Field(default=15.0, gt=0)
    renew_s: float = Field(default=0.2, gt=0)
    """A renewal also fetches pause, cancel and speed, so it is what makes verbs answer quickly."""
    io_timeout_s: float = Field(default=30.0, gt=0)
    """How long a peer may stay silent while requests are in flight."""
    unit_slice_s: float = Field(default=3.0, gt=0)
    """A unit that takes longer (a slow peer, a low speed) is flushed and given back in part, which shows progress."""
    max_attempts: int = Field(default=5, ge=1)
    retry_delay_s: float = Field(default=1.0, ge=0)
    quarantine_s: float = Field(default=5.0, ge=0)
    """Beyond the lease, how long a write of a dead holder may still be on its way to a mutable target."""

    keep_concluded: int = Field(default=1000, ge=100)
    """Concluded jobs that are kept; older ones are dismissed. Not so few that one is gone before whoever waits for it
    has seen how it ended."""

    depth: int = Field(default=16, ge=1, le=128)
    """Requests in flight of one mover."""
    connections: int = Field(default=2, ge=1, le=16)
    """Connections of one mover to one NBD export."""

    guard_socket: str = "/run/flushpoint/guard"
    """Where the guard of a host listens for its agent."""
    agent_host: str = ""
    """How the host of an agent is called in groups; "": by its own name."""
    agent_sockets: Annotated[tuple[str, ...], NoDecode] = ()
    """Directories below which an agent connects to monitors and guest agents; none: wherever a group says that they
    are, so whoever may write groups chooses. As text /a:/b or JSON."""
    scratch_dir: str = "/var/lib/flushpoint/scratch"
    """Where an agent keeps old blocks of disks while they are copied, and what was staged; on a disk of the host's."""
    scratch_reserve: int = Field(default=1024**3, ge=0)
    """Bytes that are to stay free on its disk: an epoch that would take them is aborted, before a view of it breaks."""
    view_limit: int = Field(default=0, ge=0)
    """Bytes that what a guest writes over may take there for one view, before the epoch is aborted; 0: any number."""
    journal_dir: str = "/var/lib/flushpoint/frozen"
    """Where an agent writes which guests it has stopped."""

    relay_host: str = ""
    """Address of an agent's host where movers elsewhere fetch staged images, by NBD, and at ports that the kernel takes
    fleeces; "": movers are on this host, or see its scratch directory."""
    relay_port: int = Field(default=10810, ge=1, le=65535)
    relay_tls_dir: str = ""
    """Certificates, named as QEMU names them, of one authority for all: at an agent ca-cert.pem, server-cert.pem and
    server-key.pem; at a mover ca-cert.pem, client-cert.pem and client-key.pem. Needed, but on loopback."""

    leader_ttl_s: float = Field(default=10.0, gt=0)
    cycle_s: float = Field(default=0.5, gt=0)
    """Longest pause between two looks at the ledger without a wake-up."""
    doorbell_ttl_s: float = Field(default=10.0, gt=0)
    """An unanswered doorbell no longer counts after this."""
    visibility_timeout_s: int = Field(default=300, ge=1)
    """Redis transport: redelivery of an unacknowledged doorbell."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls, _config_file())
        starter = InitSettingsSource(settings_cls, json.loads(os.environ.get("FLUSHPOINT_DEFAULTS") or "{}"))
        return init_settings, env_settings, toml, starter

    @field_validator("allowed_roots", "agent_sockets", "allowed_endpoints", mode="before")
    @classmethod
    def _list_from_text(cls, value: object, info: ValidationInfo) -> object:
        """An environment variable is text: a JSON list, or the names with a separator between them."""
        if not isinstance(value, str):
            return value
        separator = _SEPARATORS[str(info.field_name)]
        if not value.lstrip().startswith("["):
            return tuple(part.strip() for part in value.split(separator) if part.strip())
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError(f"is no JSON list; names with {separator!r} between them will do") from None

    @field_validator("allowed_roots", "agent_sockets")
    @classmethod
    def _directories_are_absolute(cls, directories: tuple[str, ...]) -> tuple[str, ...]:
        for directory in directories:
            if not directory.startswith("/"):
                raise ValueError(f"{directory!r} is no absolute path")
        return directories

    @field_validator("redis_url", "broker_url")
    @classmethod
    def _scheme_is_known(cls, url: str, info: ValidationInfo) -> str:
        """The libraries would answer with a traceback. The URL may hold a password and is not repeated."""
        known = URL_SCHEMES[str(info.field_name)]
        scheme, separator, _ = url.partition("://")
        if not separator or scheme not in known:
            found = f"the scheme {scheme!r} is unknown" if separator else "that is no URL"
            raise ValueError(f"{found}; it begins with one of {', '.join(f'{one}://' for one in known)}")
        try:
            _ = urlsplit(url).port
        except ValueError:
            raise ValueError("its host or port is malformed") from None
        return url

    @model_validator(mode="after")
    def _timeouts_fit_together(self) -> Self:
        rules = (
            (
                not self.relay_host or self.relay_tls_dir != "" or _is_loopback(self.relay_host),
                "relay_host needs relay_tls_dir: what guests have written would cross the network in the clear",
            ),
            (self.renew_s * 4 <= self.lease_s, "renew_s must be at most a quarter of lease_s"),
            (
                # The last claim at the end of the budget runs for a slice, whose last request may wait for its peer.
                self.visibility_timeout_s > self.worker_budget_s + self.unit_slice_s + self.io_timeout_s,
                "visibility_timeout_s must exceed worker_budget_s + unit_slice_s + io_timeout_s, "
                "or doorbells are delivered twice",
            ),
            (self.cycle_s * 4 <= self.leader_ttl_s, "cycle_s must be at most a quarter of leader_ttl_s"),
            (self.cycle_s < self.lease_s, "cycle_s must be less than lease_s, or expired leases are found late"),
        )
        broken = [message for holds, message in rules if not holds]
        if broken:
            raise ValueError("; ".join(broken))
        return self


def load_settings() -> Settings:
    """Settings of this process; UsageError names what does not fit."""
    file = _config_file()
    try:
        if file is not None:
            file.open().close()  # pydantic-settings takes a file that is not there for an empty one
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            name, reason = f"{name} in {file}", "there is no such setting"
        elif name:
            name = f"FLUSHPOINT_{name.upper()}"
        raise UsageError(f"{name or 'the settings'}: {reason}", "see config/flushpoint.toml") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the settings: {error}", "check $FLUSHPOINT_CONFIG") from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _config_file() -> Path | None:
    chosen = os.environ.get("FLUSHPOINT_CONFIG")
    return Path(chosen) if chosen else None
