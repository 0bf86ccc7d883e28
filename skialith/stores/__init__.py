"""Databases behind one Protocol: MySQL (MariaDB, TiDB) and SQLite."""

from __future__ import annotations

from urllib.parse import urlsplit

from ..errors import ConfigurationError
from ..urls import redact
from .base import Store

__all__ = ["Store", "open_store"]


def open_store(url: str, *, power: bool = False) -> Store:
    """The store behind ``mysql://...`` or ``sqlite:///...``; connects at its first use, not now.

    ``power``: a commit must survive a power loss. SQLite syncs every commit then; what a MySQL server does is its own
    setting (``innodb_flush_log_at_trx_commit``, ``sync_binlog``). Raises ``ConfigurationError`` for another URL or a
    missing driver.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise ConfigurationError(f"database_url cannot be parsed: {error}") from None
    if scheme == "mysql":
        from .mysql import MySqlStore

        return MySqlStore(url)
    if scheme == "sqlite":
        from .sqlite import SqliteStore

        return SqliteStore(url, power=power)
    raise ConfigurationError(
        f"database_url {redact(url)!r} is not supported: "
        "use mysql://user:password@host:3306/database or sqlite:///path/to/file.db"
    )
