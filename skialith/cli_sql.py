"""The configured database by its plain driver: for looking at rows without the code that wrote them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from .config import Config

Query = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]
"""Runs one SELECT, with ``%s`` for its values, and returns all rows."""


@contextmanager
def open_query(config: Config) -> Iterator[Query]:
    """Queries on the database of these settings; raises the driver's own errors."""
    url = config.store_url
    lite = urlsplit(url).scheme == "sqlite"
    connection = _sqlite(url) if lite else _mysql(url)

    def query(sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with closing(connection.cursor()) as cursor:
            cursor.execute(sql.replace("%s", "?") if lite else sql, tuple(values))
            return list(cursor.fetchall())

    with closing(connection):
        yield query
