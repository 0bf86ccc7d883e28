"""Processes killed, and connections cut, with hundreds of records of one process under way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from skialith import SkialithAgent

from .conftest import Report
from .world import Child, World, rounds

pytestmark = pytest.mark.chaos
UNDER_WAY = 300
WAYS: dict[str, dict[str, Any]] = {
    "save_events": {"batches": 0.6, "nowait": 0.0},
    "save_event_nowait": {"batches": 0.1, "nowait": 0.6},
}
each_way = pytest.mark.parametrize(
    "way",
    [
        "save_events",
        pytest.param(
            "save_event_nowait",
            marks=pytest.mark.xfail(
                not hasattr(SkialithAgent, "save_event_nowait"), reason="there is no save_event_nowait yet"
            ),
        ),
    ],
)


def lose(world: World, way: str, report: Report, scenario: str, end: Callable[[Child], None]) -> None:
    """Agents at work, again and again, each of whom is killed, or whatever ``end`` does, and resumed by the next."""
    kills, most = rounds(4), 0
    for number in range(kills):
        # Owned agents, and by every other child with a thread alone: its calls have nobody to share frames with.
        threads = 1 if number % 4 == 3 else 4
        child = world.spawn(agents=["one", "two"], threads=threads, most=900, large=0.05, **WAYS[way])
        child.wait_ready()
        child.wait_writes(3)
        time.sleep(world.dice.uniform(0, 0.4))
        end(child)
        most = max(most, child.in_flight())
    print(f"at most {most} in flight")
    verdict = world.verdict(steady=True)
    report(f"{scenario}, {way}", kills, verdict)
    assert not verdict.problems, str(verdict)
    assert most >= UNDER_WAY


@each_way
def test_killed_with_hundreds_in_flight(sqlite_world: World, report: Report, way: str) -> None:
    lose(sqlite_world, way, report, "16 killed with hundreds in flight", Child.kill)
