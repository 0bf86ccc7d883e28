"""Ctrl-C and soft time limits at every moment of a call, thousands of times: no frame torn, no thread stuck, nothing lost."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.fixtures.cluster import clients
from tests.fixtures.nats import NatsServer

from .conftest import Report
from .world import World, rounds

pytestmark = pytest.mark.chaos
SECONDS = 2.5
LEAST_INTERRUPTS = 300
"""So many interrupts in that time, or the test proves little; about six times as many come on two idle cores."""


@pytest.mark.parametrize("writer", ["off", "on"])
def test_calls_interrupted_at_every_moment(tmp_path: Path, seed: int, report: Report, writer: str) -> None:
    """The main thread swallows each interrupt and goes on; other threads, and a writer, use the same connection.

    A torn frame would be an error of the server and end the connection: there is one connection, and it stays.
    """
    database = f"sqlite:///{tmp_path / 'skialith.db'}"
    with NatsServer(tmp_path / "nats", monitor=True) as server, World(tmp_path, server.url, database, seed) as world:
        agents, settings = ["owned", "free", "other-1", "other-2"], {"writer": writer}
        child = world.spawn("interrupt", agents=agents, large=0.02, batches=0.3, pace=0.005, settings=settings)
        child.wait_ready()
        until = time.monotonic() + rounds(1) * SECONDS
        while time.monotonic() < until and child.running:
            child.signal(signal.SIGINT)
            time.sleep(world.dice.uniform(0, 0.004))
        assert child.running, child.tail()
        child.wait_writes(10)
        connections = clients(server, "all")
        assert child.stop() == 0, child.tail()
        assert len(connections) == 1, connections
        assert "[ERR]" not in server.log.read_text("utf-8", "replace")
        interrupts = sum(note["count"] for note in world.evidence().notes if note["what"] == "interrupted")
        verdict = world.verdict(steady=True)
        report(f"14 interrupted by signals, writer {writer}", interrupts, verdict)
        assert not verdict.problems, str(verdict)
        assert interrupts >= rounds(1) * LEAST_INTERRUPTS
