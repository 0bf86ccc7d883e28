"""The servers killed and the wires cut under load, while the children live."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.fixtures.nats import NatsServer

from .conftest import Report
from .world import World, rounds

pytestmark = pytest.mark.chaos


def test_nats_server_killed_and_restarted(tmp_path: Path, seed: int, report: Report) -> None:
    """Callers get answers by their deadlines, and what an error says of a record is true."""
    database = f"sqlite:///{tmp_path / 'skialith.db'}"
    with NatsServer(tmp_path / "nats") as server, World(tmp_path, server.url, database, seed) as world:
        limits = {"timeout": 2.0}
        agents = world.spawn(agents=["one", "two"], threads=2, large=0.05, settings=limits)
        careless = world.spawn(agents=["three"], retries=False, batches=0.5, settings={**limits, "writer": "off"})
        for child in (agents, careless):
            child.wait_ready()
        kills = rounds(6)
        for number in range(kills):
            time.sleep(world.dice.uniform(0.05, 0.8))
            server.kill()
            # Sometimes longer than a call may take.
            time.sleep(3.0 if number % 3 == 2 else world.dice.uniform(0, 1.0))
            server.start()
            agents.wait_writes(5)
            careless.wait_writes(5)
        for child in (agents, careless):
            assert child.stop() == 0, child.tail()
        verdict = world.verdict(limit=8.0)
        report("3 nats-server killed and restarted", kills, verdict)
        assert not verdict.problems, str(verdict)
        outcomes = {call.outcome for call in world.evidence().calls if call.error}
        assert outcomes, "no call failed although the server was away for longer than a call may take"
