"""Writers on a SQLite file that is locked, has no room or may not be written, and go on when it is over."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .company import HASTY, OFF, Log, wait_drained
from .conftest import Report
from .evidence import APPENDS
from .world import Child, World, rounds

pytestmark = pytest.mark.chaos
ROOM_BYTES = 100_000
"""A file of a writer may get no longer than this when there is no room: less than SQLite's own log has in use."""


def file_of(world: World) -> Path:
    return Path(urlsplit(world.database_url).path[1:])


@contextmanager
def locked(world: World, pair: list[Child]) -> Iterator[None]:
    """By another process, for another purpose."""
    with closing(sqlite3.connect(file_of(world), isolation_level=None, timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def no_room(world: World, pair: list[Child]) -> Iterator[None]:
    """Files of the writers may not grow; their system says so in other words than on a full disk, SQLite in the same."""
    for child in pair:
        resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (ROOM_BYTES, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        for child in pair:
            resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


FAULTS = {
    locked: "database is locked; another process writes to it for long",
    no_room: "(disk I/O error; check the disk|database or disk is full; free space)",
}


def test_whatever_ails_the_sqlite_file(sqlite_world: World, report: Report) -> None:
    world, happened = sqlite_world, 0
    pair = [world.spawn("write", "writer", limits=HASTY) for _ in range(2)]
    agents = world.spawn(agents=["one", "two"], large=0.05, pace=0.05, settings=OFF)
    browser = world.spawn("browse", "browser", agents=["one"], pace=0.2, settings=OFF)
    for child in (*pair, agents, browser):
        child.wait_ready()
    for _ in range(rounds(1)):
        for fault in world.dice.sample([*FAULTS], len(FAULTS)):
            agents.wait_writes(20)
            logs = [Log(child) for child in pair]
            with fault(world, pair):
                for log in logs:
                    log.wait_for(FAULTS[fault])
                agents.wait_writes(20)
            print(f"{fault.__name__}: all is stored {wait_drained(world):.1f} s after it is over")
            happened += 1
    for child in (agents, browser, *pair):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report("24 whatever ails the SQLite file of two writers", happened, verdict)
    assert not verdict.problems, str(verdict)
    assert not world.evidence().errors(*APPENDS)


@pytest.fixture
def kept_world(tmp_path: Path, nats_url: str, seed: int) -> Iterator[World]:
    """A world whose file is in a directory of its own."""
    folder = tmp_path / "kept"
    with World(tmp_path, nats_url, f"sqlite:///{folder / 'skialith.db'}", seed) as each:
        yield each
    folder.chmod(0o700)


def test_a_sqlite_file_that_may_not_be_written(kept_world: World, report: Report) -> None:
    """Writers that start on it wait, and go on when they may."""
    world = kept_world
    first = world.spawn("write", "first")
    first.wait_ready()
    assert first.stop() == 0, first.tail()
    agents = world.spawn(agents=["one"], pace=0.05, settings=OFF)
    agents.wait_ready()
    file = file_of(world)
    file.chmod(0o444)
    file.parent.chmod(0o555)
    pair = [world.spawn("write", "writer", limits=HASTY, meek=True) for _ in range(2)]
    for child in pair:
        Log(child).wait_for("(check the permissions of the file|and the permissions of its directory)")
    agents.wait_writes(20)
    file.chmod(0o600)
    file.parent.chmod(0o700)
    print(f"all is stored {wait_drained(world):.1f} s after it is over")
    for child in (agents, *pair):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report("24 a SQLite file that may not be written", 1, verdict)
    assert not verdict.problems, str(verdict)
    assert not world.evidence().errors(*APPENDS)
