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
    kills = rounds(5)
    browser = world.spawn("browse", "browser", agents=["one", "two"], pace=0.2, settings={"writer": "off"})
    for _ in range(kills):
        child = world.spawn(agents=["one", "two"], threads=2, large=0.05)
        if world.dice.random() < 0.8:
            child.wait_ready()
        time.sleep(world.dice.uniform(0, 0.6))
        child.kill()
    assert browser.stop() == 0, browser.tail()
    verdict = world.verdict(steady=True)
    report(f"1 killed at random, {world.database}", kills, verdict)
    assert not verdict.problems, str(verdict)


def test_killed_at_every_named_point(world: World, report: Report) -> None:
    """Each child kills itself at the nth passage of a point; the next one resumes."""
    points = list(faults.POINTS) * rounds(1)
    world.dice.shuffle(points)
    for point in points:
        writing = point in faults.WRITER_POINTS
        passage = world.dice.randrange(1, 8 if writing else 40)
        print(point, passage)
        child = world.spawn(agents=["one"], threads=2, large=0.1, pace=0.02 if writing else 0, die={point: passage})
        assert child.wait() == -signal.SIGKILL, child.tail()
    last = world.spawn(agents=["one"], steps=5)
    assert last.wait() == 0, last.tail()
    verdict = world.verdict(steady=True)
    report(f"2 killed at every named point, {world.database}", len(points), verdict)
    assert not verdict.problems, str(verdict)
