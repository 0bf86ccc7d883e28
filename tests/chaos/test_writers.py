"""Writers that are killed beside each other, a log that is full, and rows that the database refuses."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from . import outside
from .conftest import Report
from .evidence import APPENDS
from .world import World, rounds

pytestmark = pytest.mark.chaos
OFF = {"writer": "off"}


def test_two_writers_and_one_is_killed(world: World, report: Report) -> None:
    """Agents without a writer of their own, and always two writer processes of which one is killed at a random moment.

    A third one is frozen until others have stored what it holds, and then goes on with it.
    """
    kills = rounds(3)
    agents = world.spawn(agents=["one", "two"], threads=2, large=0.05, pace=0.03, settings=OFF)
    writers = [world.spawn("write", "writer") for _ in range(2)]
    point = world.dice.choice(["after pull", "after commit", "before ack"])
    frozen = world.spawn("write", "frozen", freeze={point: world.dice.randrange(1, 5)})
    browser = world.spawn("browse", "browser", agents=["one", "two"], pace=0.2, settings=OFF)
    for child in (agents, *writers, browser):
        child.wait_ready()
    frozen.wait_frozen()
    for _ in range(kills):
        time.sleep(world.dice.uniform(0.05, 0.8))
        writers.pop(world.dice.randrange(2)).kill()
        writers.append(world.spawn("write", "writer"))
        if world.dice.random() < 0.7:
            writers[-1].wait_ready()
    agents.wait_writes(20)
    for writer in writers:
        writer.wait_ready()  # SIGTERM ends a process that has not begun to listen for it
    for child in (agents, *writers):
        assert child.stop() == 0, child.tail()
    world.settle()
    frozen.signal(signal.SIGCONT)
    for child in (frozen, browser):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report(f"6 two writers, one killed, {world.database}", kills, verdict)
    assert not verdict.problems, str(verdict)
    assert not world.evidence().errors(*APPENDS)


def test_visitors_of_the_sqlite_file(sqlite_world: World, report: Report) -> None:
    """Processes that open the file and close it again never take SQLite's own log away from the writer."""
    world, visits = sqlite_world, rounds(25)
    child = world.spawn(agents=["one", "two"], pace=0.01)
    child.wait_ready()
    for _ in range(visits):
        child.wait_writes(3)
        outside.read_tables(world.database_url, world.namespace)
    child.kill()  # an orderly end would write what is only in a deleted log back into the file
    verdict = world.verdict(steady=True)
    report("6 visitors of the SQLite file", visits, verdict)
    assert not verdict.problems, str(verdict)


def test_the_log_is_full_and_drains(sqlite_world: World, report: Report) -> None:
    """Appends fail and say so, leases are renewed and claimed meanwhile, and a writer makes room again."""
    world = sqlite_world
    settings = {**OFF, "wal_bytes": 3 * 1024 * 1024, "lease_seconds": 2.0}
    child = world.spawn(agents=["one", "two"], large=0.3, batches=0.5, settings=settings)
    child.wait_ready()
    child.wait_for(lambda lines: sum(map(is_full, lines)) > 3, "the log is full")
    full_at = time.monotonic()
    newcomer = world.spawn(agents=["three"], own_ids=True, settings=settings)
    newcomer.wait_ready()
    time.sleep(max(0.0, full_at + 5.0 - time.monotonic()))  # longer than a lease lives without being renewed
    assert is_full([line for line in child.lines() if line["op"] in ("done", "fail")][-1])
    writer = world.spawn("write", "writer", settings={"wal_bytes": settings["wal_bytes"]})
    for each in (child, newcomer):
        each.wait_for(
            lambda lines: not is_full([x for x in lines if x["op"] in ("done", "fail")][-1]), "there is room again"
        )
        each.wait_writes(20)
    for each in (child, newcomer, writer):
        assert each.stop() == 0, each.tail()
    verdict = world.verdict()
    report("7 the log is full, then drains", 1, verdict)
    assert not verdict.problems, str(verdict)
    errors = {(call.error, call.outcome) for call in world.evidence().calls if call.error}
    # Of records that are in flight together one may be refused and a smaller one behind it be written.
    allowed = {("WalFull", "not_written"), ("BatchFailed", "not_written"), ("BatchFailed", "unknown")}
    assert errors <= allowed, errors
    causes = {line["cause"] for line in child.lines() if line.get("error") == "BatchFailed"}
    assert causes <= {"WalFull"}, causes


def is_full(line: dict[str, Any]) -> bool:
    return "WalFull" in (line.get("error"), line.get("cause"))


@pytest.mark.parametrize("letters", ["table", "stream"])
def test_a_row_the_database_refuses(world: World, report: Report, letters: str) -> None:
    """The others flow, that one is a dead letter (in the stream if the table refuses it too), and readers see it."""
    first = world.spawn(agents=["one"], steps=1)
    assert first.wait() == 0, first.tail()
    refused = ["3.0.0", "6.0.0", "9.0.0"]
    outside.refuse(world.database_url, refused, letters_too=letters == "stream")
    child = world.spawn(agents=["one", "two"], threads=2, steps=12)
    assert child.wait() == 0, child.tail()
    dead = [(agent, identity) for agent in ("one", "two") for identity in refused]
    verdict = world.verdict(dead=dead)
    report(f"8 refused rows, letters in the {letters}, {world.database}", 1, verdict)
    assert not verdict.problems, str(verdict)
    assert verdict.dead_letters == len(dead)
    flushed = [call.result["dead"] for call in world.evidence().of("flush") if call.ended]
    assert max(flushed, default=0) == len(dead)
