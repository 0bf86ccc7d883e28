"""The sidecar's own settings and limits; those of the engine behind it are in ``skialith.config``.

A setting is an option of ``skialith serve`` or an environment variable ``SKIALITH_<NAME>``; the option wins.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from ipaddress import ip_address
from typing import Any

from ..errors import ConfigurationError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7420

LOG_FORMATS = ("auto", "json", "console")

# ---- requests
BODY_BYTES = 16 * 1024 * 1024
"""Default limit of one request's body; a record's own limit (``max_record_bytes``) holds too."""
BODIES_BYTES = 256 * 1024 * 1024
"""Bytes of request bodies that one worker holds at once; further ones are told to come back (503)."""
BODY_SECONDS = 30.0
"""How long a client may take to send its body."""
CONCURRENT_REQUESTS = 2000
"""Requests and idle connections that one worker has at once; further ones are told to come back (503)."""
IDLE_CONNECTION_SECONDS = 75.0
"""How long a connection is kept for its next request."""
HEAD_BYTES = 64 * 1024
"""Longest request line with all headers."""
HEAD_SECONDS = 30.0
"""How long a new connection may take to send its first request's line and headers."""
TLS_CLOSE_SECONDS = 1.0
"""How long a client may take to confirm the end of an encrypted connection when all it is owed is sent."""
SHUTDOWN_SECONDS = 15
"""How long requests that are under way may take to be answered once the sidecar is told to stop."""
RETRY_AFTER_SECONDS = 1
"""What a client is told to wait when the log is away or full, whole seconds."""
MAX_WORKERS = 64
"""Most processes of one sidecar."""
WORKER_HANGS_SECONDS = 30
"""A worker that does not answer its supervisor for so long is killed and replaced."""
REQUEST_ID_CHARACTERS = 128
"""Longest request id that is taken over from a client."""

# ---- pages
PAGE_DEFAULT = 100
"""Entries of one page, unless the request says otherwise."""
PAGE_LARGEST = 1000
"""Most entries of one page."""
PAGE_BYTES = 8 * 1024 * 1024
"""A page ends behind the entry with which its payloads pass this."""
PAGE_SCANNED = 5000
"""Entries that one page of a filtered list looks at; what is not found by then is the next page's."""
BATCH_EVENTS = 1000
"""Most events of one batch."""

# ---- readiness
LAG_RECORDS = 100_000
"""Default number of records waiting for the database over which the sidecar is not ready."""
LAG_SECONDS = 60.0
"""Default age of the oldest of them over which the sidecar is not ready."""
STATUS_SECONDS = 2.0
"""How long the log may take to say how it is."""
STATUS_FRESH_SECONDS = 1.0
"""What the log said is repeated for so long, so that probes cost nothing; the drains' counts are published as often."""

# ---- leases
LEASE_SECONDS = 24 * 3600.0
"""Life of an owner's lease, unless ``lease_seconds`` is longer: the sidecar cannot tell whether an owner that waits still
lives, so a lease is renewed by the writes that carry it, and by nothing else."""
OWNER_CHARACTERS = 255
"""Longest text by which an owner is named to whoever it is replaced by, and the other way round."""


@dataclass(frozen=True, slots=True)
class SidecarConfig:
    """The settings of one sidecar. Make it with :func:`load`.

    ``token``: what every request must carry as ``Authorization: Bearer``, None for none. ``cors_origins``: origins of browsers'
    pages that may call. ``lag_records``, ``lag_seconds``: ``/ready`` says no over these. ``tls_client_ca``: only clients with a
    certificate of this authority are let in. ``log_format``: ``auto`` is ``console`` where stderr is a terminal, else ``json``.
    ``access_log``: a line for every request.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    token: str | None = None
    insecure: bool = False
    workers: int = 1
    body_bytes: int = BODY_BYTES
    lag_records: int = LAG_RECORDS
    lag_seconds: float = LAG_SECONDS
    cors_origins: tuple[str, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    log_format: str = "auto"
    access_log: bool = False

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@]+")
_ENVIRONMENT = {"token": "SKIALITH_TOKEN"} | {
    field.name: f"SKIALITH_HTTP_{field.name.upper()}" for field in fields(SidecarConfig) if field.name != "token"
}


def load(environ: Mapping[str, str] | None = None, **options: Any) -> SidecarConfig:
    """Build the settings from options and variables; an option that is None counts as not given.

    Raises :class:`~skialith.errors.ConfigurationError` naming the setting, also for an address that others reach without a
    token.
    """
    env = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for name, variable in _ENVIRONMENT.items():
        given, text = options.pop(name, None), env.get(variable)
        if given is not None:
            values[name] = given
        elif text:
            values[name] = _read(name, variable, text)
    if options:
        raise ConfigurationError(f"unknown setting {min(options)!r}")
    if "cors_origins" in values:
        values["cors_origins"] = tuple(origin.rstrip("/").lower() for origin in values["cors_origins"])
    return _checked(SidecarConfig(**values))


def _read(name: str, variable: str, text: str) -> Any:
    kind = type(getattr(SidecarConfig(), name))
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("1", "0", "true", "false", "yes", "no"):
            raise ConfigurationError(f"{variable} must be 1 or 0, not {text!r}")
        return text.lower() in ("1", "true", "yes")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ConfigurationError(f"{variable} must be a number, not {text!r}") from None
    return text


def _checked(config: SidecarConfig) -> SidecarConfig:
    for name, least, most in (("port", 0, 65535), ("workers", 1, MAX_WORKERS), ("body_bytes", 1, 2**31)):
        value = getattr(config, name)
        if not least <= value <= most:
            raise ConfigurationError(f"{name} {value}: use {least} to {most}")
    for origin in config.cors_origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigurationError(f"cors_origins {origin!r}: use scheme://host or scheme://host:port, or * for any")
    if config.log_format not in LOG_FORMATS:
        raise ConfigurationError(f"log_format {config.log_format!r}: use one of {', '.join(LOG_FORMATS)}")
    if config.lag_records < 0 or not config.lag_seconds >= 0:
        raise ConfigurationError("lag_records and lag_seconds must not be negative")
    if config.token is not None and (
        not config.token.isascii() or not config.token.isprintable() or " " in config.token
    ):
        raise ConfigurationError("SKIALITH_TOKEN must be printable ASCII without spaces")
    if (config.tls_cert is None) != (config.tls_key is None) or (config.tls_client_ca and config.tls_cert is None):
        raise ConfigurationError("TLS needs both --tls-cert and --tls-key; --tls-client-ca comes on top of them")
    if not config.loopback and config.token is None and not config.insecure:
        raise ConfigurationError(
            f"{config.host} can be reached from other machines, and there is no token: set SKIALITH_TOKEN (any long random text, "
            "`openssl rand -hex 32`), or say --insecure if something in front of the sidecar keeps strangers out"
        )
    return config


_METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The name is prometheus_client's, which looks at it when it is imported."""


def share_metrics(folder: str | None) -> None:
    """Have the processes started from here on count in files of ``folder``; None: each one for itself.

    In this process it counts too, unless prometheus_client was imported before.
    """
    os.environ.pop(_METRICS_FOLDER, None)
    if folder is not None:
        os.environ[_METRICS_FOLDER] = folder


def metrics_folder() -> str | None:
    """Where the workers of this sidecar count together; None in a sidecar of one process."""
    return os.environ.get(_METRICS_FOLDER)
