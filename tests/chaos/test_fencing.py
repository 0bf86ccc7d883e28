"""Owners that are taken over while they write, frozen, or left with a lease that the next owner gave up."""

from __future__ import annotations

import signal
import time
from functools import partial
from typing import Any

import pytest

from tests.fixtures.nats import wait_until

from .conftest import Report
from .world import Child, World, rounds

pytestmark = pytest.mark.chaos
OFF = {"writer": "off"}
"""A writer of its own would hold records while the child is frozen, and keep the test waiting until they are delivered again."""


def owner(world: World, **given: Any) -> Child:
    """A child that owns the agent and writes events of its own in a loop; the first one comes with a writer."""
    if not world.children:
        world.spawn("write", "writer").wait_ready()
    child = world.spawn(name="owner", agents=["agent"], own_ids=True, batches=0.4, large=0.05, settings=OFF, **given)
    child.wait_ready()
    return child


def assert_fenced(child: Child) -> None:
    """It ended by itself, and because it was fenced."""
    assert child.wait() == 0, child.tail()
    errors = [(line["error"], line["cause"]) for line in child.lines() if line["op"] == "fail"]
    assert errors and "AgentFenced" in errors[-1], child.lines()[-3:]


def test_an_owner_is_taken_over_while_it_writes(sqlite_world: World, report: Report) -> None:
    world, takeovers = sqlite_world, rounds(5)
    old = owner(world)
    for _ in range(takeovers):
        time.sleep(world.dice.uniform(0, 0.3))
        new = owner(world)
        assert_fenced(old)
        old = new
    assert old.stop() == 0, old.tail()
    verdict = world.verdict()
    report("10 taken over while writing", takeovers, verdict)
    assert not verdict.problems, str(verdict)


def test_a_frozen_owner_wakes_up_after_a_takeover(sqlite_world: World, report: Report) -> None:
    """SIGSTOP, take over, SIGCONT: what it had begun fails, whether the new owner lives or has given the agent up."""
    world, takeovers = sqlite_world, rounds(4)
    for number in range(takeovers):
        old = owner(world)
        old.wait_writes(world.dice.randrange(1, 20))
        old.signal(signal.SIGSTOP)
        new = owner(world, steps=3) if number % 2 else owner(world)
        if number % 2:
            assert new.wait() == 0, new.tail()  # closed in order, so its lease is gone
        else:
            new.wait_writes(3)
        old.signal(signal.SIGCONT)
        assert_fenced(old)
        if new.running:
            assert new.stop() == 0, new.tail()
    verdict = world.verdict()
    report("10 frozen, taken over, woken", takeovers, verdict)
    assert not verdict.problems, str(verdict)


def test_a_frozen_owner_whose_lease_expired(sqlite_world: World, report: Report) -> None:
    """Nobody took over, but somebody could have: it is fenced, and owns the agent again once it resumed."""
    world, freezes = sqlite_world, rounds(1)
    world.spawn("write", "writer").wait_ready()
    short = {**OFF, "lease_seconds": 1.0}
    for _ in range(freezes):
        child = world.spawn(agents=["agent"], own_ids=True, pace=0.01, fenced="resume", settings=short)
        child.wait_ready()
        child.wait_writes(10)
        child.signal(signal.SIGSTOP)
        wait_until(lambda: world.log().leases == 0, 15.0, "the lease expires")
        child.signal(signal.SIGCONT)
        child.wait_for(
            lambda lines: any("AgentFenced" in (line.get("error"), line.get("cause")) for line in lines), "is fenced"
        )
        child.wait_writes(10)
        assert child.stop() == 0, child.tail()
    verdict = world.verdict()
    report("10 frozen until the lease expired", freezes, verdict)
    assert not verdict.problems, str(verdict)


def test_an_owner_is_fenced_after_the_next_one_released(sqlite_world: World, report: Report) -> None:
    """The lease of the one who took over is deleted on close; that must not revive the one before."""
    world, takeovers = sqlite_world, rounds(3)
    for _ in range(takeovers):
        old = owner(world, pace=0.6)
        new = owner(world, steps=1)
        assert new.wait() == 0, new.tail()
        assert_fenced(old)
    verdict = world.verdict()
    report("10 taken over, then released", takeovers, verdict)
    assert not verdict.problems, str(verdict)


def test_owners_that_take_the_agent_from_each_other(sqlite_world: World, report: Report) -> None:
    """Each one that is fenced resumes at once."""
    world = sqlite_world
    children = [owner(world, fenced="resume") for _ in range(3)]
    time.sleep(rounds(3))
    for child in children:
        assert child.stop() == 0, child.tail()
    takeovers = sum(1 for call in world.evidence().of("resume") if not call.error)
    verdict = world.verdict()
    report("10 taken from each other", takeovers, verdict)
    assert not verdict.problems, str(verdict)
    assert takeovers > 10


def had_turns(count: int, lines: list[dict[str, Any]]) -> bool:
    return [line.get("what") for line in lines].count("turn") >= count


def test_owners_that_take_turns(sqlite_world: World, report: Report) -> None:
    """Who resumes owns the agent, also one who had it before and was not told that it lost it."""
    world, turns = sqlite_world, rounds(10)
    world.spawn("write", "writer").wait_ready()
    children = [world.spawn("take_turns", "turner", agents=["agent"], settings=OFF) for _ in range(2)]
    for child in children:
        child.wait_ready()
    for number in range(turns):
        child = children[number % 2]
        child.signal(signal.SIGUSR1)
        child.wait_for(partial(had_turns, number // 2 + 1), "had its turn")
        assert child.running, child.tail()
    for child in children:
        assert child.stop() == 0, child.tail()
    verdict = world.verdict()
    report("10 taking turns", turns, verdict)
    assert not verdict.problems, str(verdict)
