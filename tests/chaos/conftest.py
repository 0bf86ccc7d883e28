"""Fixtures of the chaos tests, and the summary at the end of the run."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.fixtures.chaos_summary import Report
from tests.fixtures.nats_proxy import NatsProxy

from .evidence import ROUNDS
from .world import World

__all__ = ["Report"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("chaos") is not None:
            item.add_marker(pytest.mark.timeout(180 * max(1.0, ROUNDS)))


@pytest.fixture
def seed() -> int:
    """The seed of this test; ``SKIALITH_CHAOS_SEED`` sets it."""
    chosen = int(os.environ.get("SKIALITH_CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"SKIALITH_CHAOS_SEED={chosen}")
    return chosen


@pytest.fixture
def sqlite_world(tmp_path: Path, nats_url: str, seed: int) -> Iterator[World]:
    """A world on SQLite and the shared nats-server."""
    with World(tmp_path, nats_url, f"sqlite:///{tmp_path / 'skialith.db'}", seed) as each:
        yield each


@pytest.fixture
def nats_proxy(sqlite_world: World) -> Iterator[NatsProxy]:
    """A proxy in front of the server of ``sqlite_world``."""
    server = urlsplit(sqlite_world.nats_url)
    with NatsProxy(server.hostname or "", server.port or 0, sqlite_world.seed) as each:
        yield each


@pytest.fixture
def mariadb_world(tmp_path: Path, nats_url: str, mariadb_url: str, seed: int) -> Iterator[World]:
    """A world on a database of its own in the shared MariaDB, and the shared nats-server."""
    with World(tmp_path, nats_url, mariadb_url, seed) as each:
        yield each


@pytest.fixture(params=["sqlite_world", "mariadb_world"])
def world(request: pytest.FixtureRequest) -> World:
    """A world on each database in turn."""
    each = request.getfixturevalue(request.param)
    assert isinstance(each, World)
    return each
