"""The connections to either server cut (also inside a frame), stalled, delayed and refused, by a proxy between."""

from __future__ import annotations

import random
import time
from urllib.parse import urlsplit

import pytest

from tests.fixtures.proxy import DIRECTIONS, Proxy

from .conftest import Report
from .evidence import APPENDS
from .world import World, rounds

pytestmark = pytest.mark.chaos


def disturb(proxy: Proxy, dice: random.Random) -> str:
    """One thing that happens to connections; over when it returns, except that a cut inside a frame may still come."""
    act = dice.choice(["cut", "cut inside a frame", "stall", "stall and cut", "delay", "refuse"])
    direction = dice.choice([*DIRECTIONS, None])
    if act == "cut":
        proxy.cut(reset=dice.random() < 0.5)
    elif act == "cut inside a frame":
        proxy.cut_after(dice.randrange(1, 4000), dice.choice(DIRECTIONS), reset=dice.random() < 0.5)
    elif act.startswith("stall"):
        proxy.stall(True, direction)
        time.sleep(dice.choice([dice.uniform(0, 0.3), 2.0]))
        if act == "stall and cut":
            proxy.cut(reset=dice.random() < 0.5)
        proxy.stall(False)
    elif act == "delay":
        proxy.delay(dice.uniform(0, 0.2), direction)
        time.sleep(dice.uniform(0.2, 0.6))
        proxy.delay(0.0)
    else:
        proxy.refuse()
        proxy.cut()
        time.sleep(dice.uniform(0, 1.0))
        proxy.refuse(False)
    return act


def test_the_wire_to_nats(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    server = urlsplit(world.nats_url)
    with Proxy(server.hostname or "", server.port or 0) as proxy:
        through = {"nats_url": f"nats://127.0.0.1:{proxy.port}", "timeout": 1.5}
        hasty = {**through, "writer": "off", "timeout": 1.0}
        children = [
            world.spawn(agents=["one", "two"], threads=2, large=0.05, pace=0.02, settings=through),
            world.spawn(agents=["three"], retries=False, batches=0.5, pace=0.02, settings=hasty),
        ]
        for child in children:
            child.wait_ready()
        acts = rounds(7)
        for _ in range(acts):
            time.sleep(world.dice.uniform(0, 0.2))
            print(disturb(proxy, world.dice))
            for child in children:
                child.wait_writes(3)
        for child in children:
            assert child.stop() == 0, child.tail()
    verdict = world.verdict()
    report("5 the wire to NATS", acts, verdict)
    assert not verdict.problems, str(verdict)
    errors = world.evidence().errors(*APPENDS)
    assert errors <= {"WalUnavailable", "BatchFailed"}, errors


def test_the_wire_to_mariadb(mariadb_world: World, report: Report) -> None:
    """Agents do not notice, and nothing is stored twice when a COMMIT's answer was lost."""
    world = mariadb_world
    server = urlsplit(world.database_url)
    with Proxy(server.hostname or "", server.port or 0) as proxy:
        where = f"{server.netloc.rpartition(':')[0]}:{proxy.port}"
        through = {"database_url": server._replace(netloc=where).geturl()}
        child = world.spawn(agents=["one", "two"], threads=2, large=0.02, pace=0.05, settings=through)
        child.wait_ready()
        acts = rounds(7)
        for _ in range(acts):
            time.sleep(world.dice.uniform(0, 0.4))
            print(disturb(proxy, world.dice))
            child.wait_writes(10)
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report("5 the wire to MariaDB", acts, verdict)
    assert not verdict.problems, str(verdict)
    assert not world.evidence().errors(*APPENDS)
