"""Records that the writer cannot bear: it raises of them, it dies of them; and no other record suffers for it."""

from __future__ import annotations

import signal
import time

import pytest

from . import outside
from .conftest import Report
from .poisoned import DEADLY, SURPRISES
from .world import END_SECONDS, World, rounds

pytestmark = pytest.mark.chaos
OFF = {"writer": "off"}
AGENTS = ["one", "two"]
DEAD = [(agent, event_id) for agent in AGENTS for event_id in SURPRISES]


SOON = {"writer.apart.WRITER_SUSPECT_DELIVERIES": 3}
"""Records are suspects after two deaths and not four, each of which takes a second."""


def records_of(world: World, large: float = 0.02) -> None:
    """Two agents that have written all they want, before any writer runs."""
    child = world.spawn(agents=AGENTS, steps=12, large=large, settings=OFF)
    assert child.wait() == 0, child.tail()


def drain(world: World, *poison: str, **options: object) -> int:
    """A writer with this fault, and another one whenever it has died, until the log is empty; how many died."""
    deaths, deadline = 0, time.monotonic() + END_SECONDS
    writer = world.spawn("write", "writer", poison=list(poison), **options)
    while not world.log().idle:
        assert time.monotonic() < deadline, f"{world.log()}\n{writer.tail()}"
        if not writer.running:
            deaths += 1
            writer = world.spawn("write", "writer", poison=list(poison), **options)
        time.sleep(0.05)
    assert writer.stop() == 0, writer.tail()
    return deaths


@pytest.mark.parametrize(("database", "place"), [("sqlite", "decode"), ("mariadb", "rows+json")])
def test_a_record_of_which_the_writer_raises(
    request: pytest.FixtureRequest, report: Report, database: str, place: str
) -> None:
    """It alone becomes a dead letter, with the error; a trace that cannot be made, one of its own kind."""
    world: World = request.getfixturevalue(f"{database}_world")
    records_of(world)
    assert drain(world, place, "raise") == 0
    verdict = world.verdict(steady=True, dead=DEAD)
    report(f"25 the writer raises, {place}, {world.database}", 2 * len(DEAD), verdict)
    assert not verdict.problems, str(verdict)
    for sink in ("writer", "trace_ingest"):
        letters = [each for each in letters_of(world) if each.sink == sink]
        assert sorted((each.agent, each.identity) for each in letters) == sorted(DEAD)
        assert all(SURPRISES[each.identity].__name__ in each.error for each in letters), letters
        assert all(each.decoded == (place != "decode") for each in letters)


def letters_of(world: World) -> list[outside.Letter]:
    return outside.read_tables(world.database_url, world.namespace).letters


@pytest.mark.parametrize(
    ("database", "place", "doing"), [("sqlite", "decode", "SIGSEGV"), ("mariadb", "rows", "SIGKILL")]
)
def test_a_record_of_which_the_writer_dies(
    request: pytest.FixtureRequest, report: Report, database: str, place: str, doing: str
) -> None:
    """Two writers die of it, then it is found, alone; it is not decoded by whoever gives it up, if it kills there."""
    world: World = request.getfixturevalue(f"{database}_world")
    world.bugs.discard(-signal.SIGSEGV)
    records_of(world)
    world.hurry()
    deaths = drain(world, place, doing)
    verdict = world.verdict(steady=True, dead=[(agent, DEADLY) for agent in AGENTS])
    report(f"25 the writer dies, {place}, {world.database}", deaths, verdict)
    assert not verdict.problems, str(verdict)
    assert deaths >= 2, "else nothing was tried"
    letters = letters_of(world)
    assert all(doing in each.error and each.decoded == (place != "decode") for each in letters), letters


def test_writers_that_are_killed_bury_nobody(sqlite_world: World, report: Report) -> None:
    """Everything is delivered again and again, because writers die before they acknowledge; nothing is wrong with any record."""
    world, kills = sqlite_world, rounds(4)
    records_of(world)
    world.hurry()
    for _ in range(kills):
        writer = world.spawn("write", "killed", die={world.dice.choice(["after pull", "before ack"]): 1})
        assert writer.wait() == -signal.SIGKILL, writer.tail()
    drain(world, limits=SOON)
    verdict = world.verdict(steady=True)
    report("25 killed writers bury nobody", kills, verdict)
    assert not verdict.problems, str(verdict)


def test_a_writer_that_buries_a_whole_batch_is_caught(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    records_of(world)
    drain(world, "rows", "raise", break_="bury the batch")
    verdict = world.verdict(steady=True, dead=DEAD)
    report("canary: the batch of a refused record is buried", 1, verdict)
    assert any("is a dead letter" in text for text in verdict.problems), verdict


def test_a_writer_that_buries_by_the_delivery_count_is_caught(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    records_of(world, large=0)  # whose bodies nobody would have read
    world.hurry()
    kills = 0
    while not world.log().again:
        writer = world.spawn("write", "killed", die={"before ack": 1})
        assert writer.wait() == -signal.SIGKILL, writer.tail()
        kills += 1
        assert kills < 20, world.log()
    drain(world, break_="bury by count", limits=SOON)
    verdict = world.verdict(steady=True)
    report("canary: buried by the delivery count (doubled is right here)", kills, verdict)
    assert any("is a dead letter" in text for text in verdict.problems), verdict
