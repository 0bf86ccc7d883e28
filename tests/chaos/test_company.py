"""Writers in bad company: a database that is ill, a writer without a route, COMMITs that nobody answers, deadlocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.fixtures.mariadb import MariaDB

from .company import FAULTS, HASTY, OFF, Database, Fault, Log, examined, server, wait_drained
from .conftest import Report
from .evidence import APPENDS
from .world import Child, World, rounds

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    with server(tmp_path_factory.mktemp("company")) as each:
        yield each


@pytest.fixture
def database(own_server: MariaDB) -> Iterator[Database]:
    each = Database(own_server)
    yield each
    each.close()


@pytest.fixture
def company(
    tmp_path: Path, nats_url: str, database: Database, seed: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """A world on that database; the test reads it with more rights than its children have, and is as hasty as they are."""
    for path, value in HASTY.items():
        monkeypatch.setattr(f"skialith.{path}", value)
    with World(tmp_path, nats_url, database.admin_url, seed) as each:
        yield each


def writers(world: World, *urls: str, **given: Any) -> list[Child]:
    """A hasty writer on each URL, ready."""
    settings = given.pop("settings", {})
    made = [
        world.spawn("write", "writer", limits=HASTY, settings={**settings, "database_url": url}, **given)
        for url in urls
    ]
    for child in made:
        child.wait_ready()
    return made


def test_whatever_ails_the_database(company: World, database: Database, report: Report) -> None:
    """Both writers name the cause and what to do, callers notice nothing, and all is stored when it is over."""
    world, url = company, database.url()
    pair = writers(world, url, url)
    agents = world.spawn(agents=["one", "two"], batches=0.1, pace=0.3, settings={**OFF, "database_url": url})
    browser = world.spawn("browse", "browser", agents=["one"], pace=0.3, settings={**OFF, "database_url": url})
    for child in (agents, browser):
        child.wait_ready()
    agents.wait_writes(10)
    happened = 0
    for _ in range(rounds(1)):
        for fault in world.dice.sample(FAULTS, len(FAULTS)):
            one_fault(world, database, fault, pair)
            agents.wait_writes(5)
            happened += 1
    for child in (agents, browser, *pair):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report("24 whatever ails the database of two writers", happened, verdict)
    assert not verdict.problems, str(verdict)
    assert not world.evidence().errors(*APPENDS)


def one_fault(world: World, database: Database, fault: Fault, pair: list[Child]) -> None:
    logs = [Log(child) for child in pair]
    with cast("AbstractContextManager[None]", fault.happen(database)):
        for log in logs:
            log.wait_for(fault.said)
        found = " ".join(examined(world, database.url()))
        assert re.search(fault.said, found), f"{fault.name}: the doctor finds {found}"
    print(f"{fault.name}: all is stored {wait_drained(world):.1f} s after it is over")
