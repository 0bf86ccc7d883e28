"""One database of each kind; every test in this folder runs on both.

``SKIALITH_TEST_DATABASE_URL`` points the MySQL half at another server (MySQL 8, TiDB): an existing database of its own,
whose Skialith tables are dropped before and after every test.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from skialith.stores import Store, open_store

from ..fixtures.stores import TABLES, Run, outside


def _drop_tables(url: str) -> None:
    with outside(url) as run:
        for table in TABLES:
            run(f"DROP TABLE IF EXISTS {table}")


@pytest.fixture(params=["sqlite", "mysql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database."""
    given = os.environ.get("SKIALITH_TEST_DATABASE_URL")
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
    elif given:
        _drop_tables(given)
        yield given
        _drop_tables(given)
    else:
        yield request.getfixturevalue("mariadb_url")


@pytest.fixture
def empty_store(store_url: str) -> Iterator[Store]:
    """A store without tables."""
    store = open_store(store_url)
    yield store
    store.close()


@pytest.fixture
def store(empty_store: Store) -> Store:
    """A store with its tables."""
    empty_store.migrate()
    return empty_store


@pytest.fixture
def sql(store_url: str) -> Iterator[Run]:
    """The database from outside."""
    with outside(store_url) as run:
        yield run
