"""Clocks that are set forward and back by minutes and hours: that of the log's server, and those of agents and writers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.clock import Clock
from tests.fixtures.nats import NatsServer

from .conftest import Report
from .evidence import APPENDS
from .world import Child, World, rounds

pytestmark = pytest.mark.chaos
HOUR = 3600
OFF = {"writer": "off"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(tmp_path / "nats") as made:
        yield made


@pytest.fixture
def world(tmp_path: Path, server: NatsServer, seed: int) -> Iterator[World]:
    with World(tmp_path, server.url, f"sqlite:///{tmp_path / 'skialith.db'}", seed) as made:
        yield made


def steps(world: World, count: int) -> list[int]:
    """Forward by hours and back, back by minutes, and right again at the end of each round."""
    dice = world.dice
    return [
        offset
        for _ in range(count)
        for offset in (dice.randrange(HOUR, 5 * HOUR), -dice.randrange(60, HOUR), 0, -dice.randrange(60, HOUR), 0)
    ]


def test_the_clock_of_the_server_steps(world: World, server: NatsServer, report: Report) -> None:
    """Newcomers in the midst of it find the last checkpoint, in the log and in the database, and every event."""
    clock = Clock(server.pid)
    clock.set(0)
    child = world.spawn(agents=["one", "two"], threads=2, pace=0.05, fenced="resume")
    child.wait_ready()
    offsets = steps(world, rounds(1))
    for offset in offsets:
        clock.set(offset)
        child.wait_writes(15)
        # Not in the moment of a step, when a history may end at the clock of before it.
        newcomer = world.spawn("browse", "newcomer", agents=["one", "two"], pace=0.02, settings=OFF)
        newcomer.wait_for(lambda lines: sum("events" in line for line in lines) >= 6, "it has read histories")
        assert newcomer.stop() == 0, newcomer.tail()
    assert child.stop() == 0, child.tail()
    again = world.spawn(agents=["one", "two"], steps=3)
    assert again.wait() == 0, again.tail()
    verdict = world.verdict(steady=True, by_sequence=True)
    report("25 the clock of the log's server steps", len(offsets), verdict)
    assert not verdict.problems, str(verdict)
    assert world.evidence().errors(*APPENDS) <= {"AgentFenced", "BatchFailed"}, (
        "a lease may end when the clock goes forward"
    )


def test_the_clocks_of_agents_and_writers_step(sqlite_world: World, report: Report) -> None:
    """No call fails or waits for it."""
    world = sqlite_world
    agents = world.spawn(agents=["one", "two"], pace=0.03, settings=OFF)
    writers = [world.spawn("write", f"writer{n}") for n in range(2)]
    children: list[Child] = [agents, *writers]
    for child in children:
        child.wait_ready()
    clocks = [Clock(child.process.pid) for child in children]
    offsets = steps(world, rounds(1))
    for offset in offsets:
        for clock in clocks:
            clock.set(world.dice.choice([offset, -offset]))
        agents.wait_writes(15)
    writers.pop().kill()
    for child in (agents, writers[0]):
        child.signal(signal.SIGTERM)
        assert child.wait() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report("25 the clocks of agents and writers step", len(offsets), verdict)
    assert not verdict.problems, str(verdict)
    assert not world.evidence().errors(*APPENDS)
    assert verdict.longest < 2.0
