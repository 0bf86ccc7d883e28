"""Programs of steps killed at random moments and at every named point: each result recorded once and then only returned."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from . import faults, outside, stepping
from .checker import Verdict
from .conftest import Report
from .world import World, rounds

pytestmark = pytest.mark.chaos
THREADS = 2
OFF = {"writer": "off"}


def judge(world: World, steps: int) -> Verdict:
    """The verdict on all runs; the database's index of steps must hold what is stored and nothing else."""
    world.settle()
    world.check_exits()
    tables = outside.read_tables(world.database_url, world.namespace)
    verdict = stepping.judge(world.evidence(), tables, THREADS, steps)
    with outside.database(world.database_url) as run:
        indexed = run("SELECT record_key FROM agent_steps WHERE namespace = ?", (world.namespace,))
    if {bytes(key) for (key,) in indexed} != {row.key for row in tables.events}:
        verdict.fault(f"INDEX: {len(indexed)} steps in it, {len(tables.events)} stored")
    return verdict


def finish(world: World, steps: int) -> Verdict:
    """A last run that nobody kills, and the verdict."""
    last = world.spawn("steps", agents=["one"], threads=THREADS, steps=steps)
    assert last.wait() == 0, last.tail()
    verdict = judge(world, steps)
    expected = sum(1 + len(inner) for _, _, _, inner in stepping.program(0, steps)) * THREADS
    if verdict.stored != expected:
        verdict.fault(f"{verdict.stored} steps are stored, the program has {expected}")
    return verdict


def test_killed_at_random_and_begun_again(world: World, report: Report) -> None:
    """Sometimes the next child begins before the last one is killed, which is fenced then."""
    kills, steps = rounds(6), 150
    for n in range(kills):
        writing = world.dice.random() < 0.5
        options: dict[str, Any] = {
            "threads": THREADS,
            "steps": steps,
            "pace": 0.01,
            "large": 0.03,
            "settings": {} if writing else OFF,
        }
        child = world.spawn("steps", agents=["one"], **options)
        if world.dice.random() < 0.8:
            child.wait_ready()
        time.sleep(world.dice.uniform(0, 0.5))
        if n % 3 == 2:
            world.spawn("steps", "rival", agents=["one"], **options).wait_ready()
            time.sleep(world.dice.uniform(0, 0.2))
            world.children[-1].kill()
        child.kill()
    verdict = finish(world, steps)
    report(f"18 steps killed at random, {world.database}", kills, verdict)
    assert not verdict.problems, str(verdict)


def test_killed_at_every_named_point_of_a_step(world: World, report: Report) -> None:
    points, steps = list(faults.STEP_POINTS) * rounds(1), 60
    world.dice.shuffle(points)
    for point in points:
        passage = world.dice.randrange(1, 12)
        print(point, passage)
        child = world.spawn(
            "steps", agents=["one"], threads=THREADS, steps=steps, large=0.1, die={point: passage}, settings=OFF
        )
        assert child.wait() in (-signal.SIGKILL, 0), child.tail()
    verdict = finish(world, steps)
    report(f"19 steps killed at every named point, {world.database}", len(points), verdict)
    assert not verdict.problems, str(verdict)


@pytest.mark.parametrize(("canary", "caught"), [("forget steps", "CALLED AGAIN"), ("return unrecorded steps", "LOST")])
def test_a_broken_step_is_caught(sqlite_world: World, report: Report, canary: str, caught: str) -> None:
    world = sqlite_world
    for _ in range(2):
        broken = world.spawn("steps", agents=["one"], threads=THREADS, steps=20, break_=canary, settings=OFF)
        assert broken.wait() == 0, broken.tail()
    verdict = judge(world, 20)
    report(f"canary: {canary}", 2, verdict)
    assert any(text.startswith(caught) for text in verdict.problems), verdict
