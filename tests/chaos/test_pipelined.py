"""Hundreds of records of one process under way: it is killed, its connection is cut, its PubAcks come in any order."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.fixtures.nats_proxy import NatsProxy

from .behind import UNAVAILABLE, finish, spawn
from .conftest import Report
from .world import World, rounds

pytestmark = pytest.mark.chaos
UNDER_WAY = 300
WAYS: dict[str, dict[str, Any]] = {
    "save_events": {"batches": 0.6, "nowait": 0.0},
    "save_event_nowait": {"batches": 0.1, "nowait": 0.6},
}
each_way = pytest.mark.parametrize("way", list(WAYS))


@each_way
def test_killed_with_hundreds_in_flight(sqlite_world: World, report: Report, way: str) -> None:
    """Again and again: agents at work are killed, and resumed by the next child."""
    world, kills, most = sqlite_world, rounds(4), 0
    for number in range(kills):
        # Every fourth child has one thread an agent: its calls have nobody to share frames with.
        threads = 1 if number % 4 == 3 else 4
        child = world.spawn(agents=["one", "two"], threads=threads, most=900, large=0.05, **WAYS[way])
        child.wait_ready()
        child.wait_writes(3)
        time.sleep(world.dice.uniform(0, 0.4))
        child.kill()
        most = max(most, child.in_flight())
    print(f"at most {most} in flight")
    verdict = world.verdict(steady=True)
    report(f"16 killed with hundreds in flight, {way}", kills, verdict)
    assert not verdict.problems, str(verdict)
    assert most >= UNDER_WAY


@each_way
def test_reconnects_with_hundreds_in_flight(
    sqlite_world: World, nats_proxy: NatsProxy, report: Report, way: str
) -> None:
    """What is cut off was stored and its PubAck is lost, or it never arrived: both are sent again, and stored once."""
    world, dice, cuts, most = sqlite_world, sqlite_world.dice, rounds(5), 0
    child = spawn(world, nats_proxy, agents=["one", "two", "three"], threads=4, most=900, **WAYS[way])
    for _ in range(cuts):
        if dice.random() < 0.5:
            nats_proxy.hold()
        else:
            nats_proxy.stall(True, "up")
        time.sleep(dice.uniform(0.02, 0.3))
        most = max(most, child.in_flight())
        nats_proxy.cut(reset=dice.random() < 0.5)
        nats_proxy.release()
        nats_proxy.stall(False)
        child.wait_writes(12)
    print(f"at most {most} in flight")
    assert most >= UNDER_WAY
    finish(world, report, f"16 reconnect with hundreds in flight, {way}", cuts, UNAVAILABLE)


@each_way
def test_pubacks_out_of_order_and_twice(sqlite_world: World, nats_proxy: NatsProxy, report: Report, way: str) -> None:
    """Nobody gets another one's Ack, and nobody waits for ever."""
    world, mixes, most = sqlite_world, rounds(50), 0
    spawn(world, nats_proxy, agents=[f"a{n}" for n in range(6)], threads=3, most=300, **WAYS[way])
    nats_proxy.twice(0.2)
    nats_proxy.hold()
    for _ in range(mixes):
        time.sleep(world.dice.uniform(0.001, 0.04))
        most = max(most, nats_proxy.release(shuffled=True, on=True))
    nats_proxy.release()
    print(f"at most {most} PubAcks mixed")
    assert most >= 4
    finish(world, report, f"16 PubAcks out of order and twice, {way}", mixes, set())
