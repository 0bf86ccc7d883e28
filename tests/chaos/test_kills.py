"""Children killed at random moments and at every named point, and resumed by the next."""

from __future__ import annotations

import signal
import time

import pytest

from . import faults
from .conftest import Report
from .world import World, rounds

pytestmark = pytest.mark.chaos


def test_killed_at_random_and_resumed(world: World, report: Report) -> None:
    """Again and again: a child works, is killed, and the next resumes its agents."""
    kills = rounds(6)
    for _ in range(kills):
        child = world.spawn(agents=["one", "two"], threads=2, large=0.05)
        if world.dice.random() < 0.8:
            child.wait_ready()
        time.sleep(world.dice.uniform(0, 0.6))
        child.kill()
    verdict = world.verdict()
    report(f"1 killed at random, {world.database}", kills, verdict)
    assert not verdict.problems, str(verdict)


@pytest.mark.parametrize("point", faults.POINTS)
def test_killed_at_a_named_point(world: World, report: Report, point: str) -> None:
    """The child kills itself at the nth passage of the point; the next one resumes and works to its end."""
    kills = rounds(2)
    for _ in range(kills):
        writer = point in faults.WRITER_POINTS
        passage = world.dice.randrange(1, 12 if writer else 40)
        child = world.spawn(agents=["one"], threads=2, large=0.1, pace=0.02 if writer else 0, die={point: passage})
        assert child.wait() == -signal.SIGKILL, child.tail()
    last = world.spawn(agents=["one"], steps=5)
    assert last.wait() == 0, last.tail()
    verdict = world.verdict()
    report(f"2 killed {point}, {world.database}", kills, verdict)
    assert not verdict.problems, str(verdict)
