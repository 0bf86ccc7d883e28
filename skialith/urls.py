"""URLs in settings: refused before anything connects, and shown without their passwords."""

from __future__ import annotations

from urllib.parse import urlsplit

from .errors import ConfigurationError


def check_nats(name: str, value: str | None) -> None:
    """Raises ``ConfigurationError`` naming the setting, unless its URLs, separated by commas, are ``nats://`` or ``tls://``."""
    for url in value.split(",") if value else ():
        if _scheme(name, url) not in ("nats", "tls"):
            raise ConfigurationError(
                f"{name} {redact(url)!r} is not supported: use nats://host:4222 or tls://host:4222 "
                "(several separated by commas), or leave it out" + " for the embedded server" * (name == "nats_url")
            )


def check_database(url: str | None) -> None:
    """Raises ``ConfigurationError`` unless it is a ``mysql://`` or ``sqlite://`` URL, or None."""
    if url is not None and _scheme("database_url", url) not in ("mysql", "sqlite"):
        raise ConfigurationError(
            f"database_url {redact(url)!r} is not supported: "
            "use mysql://user:password@host:3306/database or sqlite:///path/to/file.db"
        )


def _scheme(name: str, url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        if parts.scheme in ("nats", "tls") and (parts.hostname is None or parts.port == 0):
            raise ValueError("it names no host")
    except ValueError:
        raise ConfigurationError(
            f"{name} {redact(url)!r} cannot be parsed: in user and password write / as %2F, # as %23, ? as %3F, @ as %40"
        ) from None
    return parts.scheme


def redact(url: str) -> str:
    """The URL with its password (or NATS token) replaced by ``***``, for messages and logs, however malformed it is."""
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    if not at:
        return url
    user, colon, _ = credentials.partition(":")
    return f"{scheme}{separator}{user}:***@{host}" if colon else f"{scheme}{separator}***@{host}"
