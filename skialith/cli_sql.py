"""The configured database by plain SQL: for looking at rows without the code that wrote them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .config import Config
from .stores.mysql import MySqlStore
from .stores.sqlite import SqliteStore

Query = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]
"""Runs one SELECT, with ``?`` for its values, and returns all rows."""


def sqlite_file(config: Config) -> Path | None:
    """The file of a SQLite database, there or not; None for another database. Raises ``ConfigurationError``."""
    url = config.store_url
    return SqliteStore(url).path if urlsplit(url).scheme == "sqlite" else None


@contextmanager
def open_query(config: Config) -> Iterator[Query]:
    """Queries on the database of these settings: SQLite by Python's own driver, MySQL by a bare session."""
    file = sqlite_file(config)
    if file is not None:
        with closing(sqlite3.connect(file)) as connection:
            yield lambda sql, values: connection.execute(sql, values).fetchall()
        return
    store = MySqlStore(config.store_url)
    try:
        with store.reading() as session:
            yield session.rows
    finally:
        store.close()
