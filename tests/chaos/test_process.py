"""Processes that fork, and processes that end without close()."""

from __future__ import annotations

import pytest

from .conftest import Report
from .world import World, rounds

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("first", ["parent", "child"])
def test_fork_with_an_open_agent(world: World, report: Report, first: str) -> None:
    """Both write on, through the agent that was open before the fork and through their own; either may end first."""
    forks = rounds(1)
    for _ in range(forks):
        parent = world.spawn("fork", "family", forks=1, first=first, steps=4, pace=0.05)
        assert parent.wait() == 0, parent.tail()
    world.wait_closed("forked", forks)
    verdict = world.verdict()
    report(f"11 fork, {first} exits first, {world.database}", forks, verdict)
    assert not verdict.problems, str(verdict)


def test_prefork_of_four(world: World, report: Report) -> None:
    """Four children of a parent with an open agent; the parent's database connection still works afterwards."""
    forks = rounds(1)
    for _ in range(forks):
        parent = world.spawn("fork", "prefork", forks=4, steps=3)
        assert parent.wait() == 0, parent.tail()
    world.wait_closed("forked", 4 * forks)
    verdict = world.verdict()
    report(f"11 prefork of four, {world.database}", forks, verdict)
    assert not verdict.problems, str(verdict)


def test_processes_end_without_close(sqlite_world: World, report: Report) -> None:
    """sys.exit, an exception inside ``with``, os._exit: everything acknowledged is there after the next start."""
    world, ends = sqlite_world, ["sys.exit", "raise", "os._exit"] * rounds(1)
    world.dice.shuffle(ends)
    for ending in ends:
        child = world.spawn(agents=["one", "two"], threads=2, steps=5, batches=0.5, ending=ending)
        assert child.wait() == (1 if ending == "raise" else 0), child.tail()
    verdict = world.verdict(steady=True)
    report("12 ends without close", len(ends), verdict)
    assert not verdict.problems, str(verdict)
