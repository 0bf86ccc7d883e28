"""Awaited calls, hundreds at a time: cancelled at every moment, killed in the middle, cut off, taken over."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.fixtures.loops import KINDS, Kind
from tests.fixtures.nats_proxy import NatsProxy

from .behind import UNAVAILABLE, finish
from .conftest import Report
from .evidence import APPENDS
from .world import World, rounds

pytestmark = pytest.mark.chaos
each_loop = pytest.mark.parametrize("kind", KINDS)
UNDER_WAY = 100
LEAST_CANCELLED = 100
AGENTS = ["one", "two", "three"]


@each_loop
def test_cancelled_at_every_moment(sqlite_world: World, report: Report, kind: Kind) -> None:
    """What was acknowledged is stored once, nothing is stored that was not handed over, nothing is left of the rest."""
    world = sqlite_world
    child = world.spawn("await", agents=AGENTS, most=60, large=0.1, cancels=0.5, loop=kind)
    child.wait_ready()
    time.sleep(2.5 * rounds(1))
    assert child.stop() == 0, child.tail()
    cancelled = sum(note["count"] for note in world.evidence().notes if note["what"] == "cancelled")
    verdict = world.verdict(steady=True)
    report(f"17 awaited and cancelled, {kind}", cancelled, verdict)
    assert not verdict.problems, str(verdict)
    assert cancelled >= rounds(1) * LEAST_CANCELLED


@each_loop
def test_killed_with_awaited_calls_in_flight(world: World, report: Report, kind: Kind) -> None:
    """Again and again: the loop's process is killed, and the next one resumes its agents."""
    kills, most = rounds(3), 0
    for number in range(kills):
        cancels = 0.0 if number % 2 else 0.1
        child = world.spawn("await", agents=AGENTS, most=300, large=0.05, cancels=cancels, loop=kind)
        child.wait_ready()
        child.wait_writes(3)
        time.sleep(world.dice.uniform(0, 0.4))
        child.kill()
        most = max(most, child.in_flight())
    print(f"at most {most} in flight")
    verdict = world.verdict(steady=True)
    report(f"17 awaited and killed, {kind}, {world.database}", kills, verdict)
    assert not verdict.problems, str(verdict)
    assert most >= UNDER_WAY


@each_loop
def test_cut_off_with_awaited_calls_in_flight(
    sqlite_world: World, nats_proxy: NatsProxy, report: Report, kind: Kind
) -> None:
    world, dice, cuts = sqlite_world, sqlite_world.dice, rounds(4)
    settings: dict[str, Any] = {"nats_url": f"nats://127.0.0.1:{nats_proxy.port}"}
    child = world.spawn("await", agents=AGENTS, most=300, cancels=0.1, loop=kind, settings=settings)
    child.wait_ready()
    for _ in range(cuts):
        nats_proxy.stall(True, "up")
        time.sleep(dice.uniform(0.02, 0.3))
        nats_proxy.cut(reset=dice.random() < 0.5)
        nats_proxy.stall(False)
        child.wait_writes(12)
    finish(world, report, f"17 awaited and cut off, {kind}", cuts, {*UNAVAILABLE, "Interrupted"})


@each_loop
def test_taken_over_with_awaited_calls_in_flight(sqlite_world: World, report: Report, kind: Kind) -> None:
    """The older process is fenced in the midst of its calls; nothing of it stands behind the first record of the newer."""
    world, takeovers = sqlite_world, rounds(3)
    older = world.spawn("await", agents=["one"], most=40, loop=kind)
    older.wait_ready()
    for _ in range(takeovers):
        older.wait_writes(3)
        newer = world.spawn("await", agents=["one"], most=40, loop=kind)
        newer.wait_ready()
        assert older.wait() == 0, older.tail()
        older = newer
    assert older.stop() == 0, older.tail()
    verdict = world.verdict(steady=True)
    report(f"17 awaited and taken over, {kind}", takeovers, verdict)
    assert not verdict.problems, str(verdict)
    assert world.evidence().errors(*APPENDS) & {"AgentFenced", "BatchFailed"}
