"""A cluster of three under agents that write: a node that is retired (lame duck), and one that is killed."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skialith import SkialithAgent, SkialithError
from tests.fixtures.cluster import Cluster
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.wal import new_namespace

TIMEOUT = 25.0
"""Longer than a cluster takes to choose new leaders."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "cluster") as each:
        yield each


class Work:
    """One thread of one agent; ``saved`` are the ids that are durable, in order."""

    def __init__(self, agent: SkialithAgent, batch: int) -> None:
        self.agent = agent
        self.batch = batch
        self.saved: list[str] = []
        self.errors: list[SkialithError] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        while not self._stopping.wait(0.001):
            first = len(self.saved)
            items = [(f"e{first + n}", {"n": first + n}) for n in range(self.batch)]
            try:
                if self.batch == 1:
                    self.agent.save_event(*items[0])
                else:
                    self.agent.save_events(items)
            except SkialithError as error:
                self.errors.append(error)
                return
            self.saved += [event_id for event_id, _ in items]

    def wait_more(self) -> None:
        wanted = len(self.saved) + 5 * self.batch
        wait_until(lambda: len(self.saved) >= wanted or bool(self.errors), 2 * TIMEOUT, "more events")
        assert not self.errors, self.errors

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(2 * TIMEOUT)
        assert not self._thread.is_alive()
        assert not self.errors, self.errors


def agents_outlive(cluster: Cluster, place: Path, end: Callable[[NatsServer], None]) -> None:
    """Three agents (owned or not, one event or many at a time) know one node, which ends; they go on at another one."""
    settings: dict[str, Any] = {
        "nats_url": cluster.servers[0].url,
        "database_url": f"sqlite:///{place / 'skialith.db'}",
        "namespace": new_namespace(),
        "replicas": 3,
        "timeout": TIMEOUT,
        "wal_bytes": 256 * 1024 * 1024,
    }
    agents = [SkialithAgent(name, **settings) for name in ("owned", "free", "many")]
    try:
        for agent in (agents[0], agents[2]):
            agent.resume()
        works = [Work(agent, batch) for agent, batch in zip(agents, (1, 1, 100), strict=True)]
        for work in works:
            work.wait_more()
        first = cluster.serving()
        assert first is cluster.servers[0]
        end(first)
        for work in works:
            work.wait_more()
        assert cluster.serving() is not first
        for work in works:
            work.stop()
        agents[0].checkpoint(7, {"saved": len(works[0].saved)})
        agents[0].flush(timeout=40)
        for work in works:
            assert [event.event_id for event in work.agent.history()] == work.saved
            assert stored(place, work.agent.agent_id) == work.saved
        assert agents[0].resume().data == {"saved": len(works[0].saved)}
    finally:
        for agent in agents:
            agent.close()


def stored(place: Path, agent_id: str) -> list[str]:
    with sqlite3.connect(place / "skialith.db") as database:
        rows = database.execute(
            "SELECT CAST(event_id AS TEXT) FROM agent_events WHERE CAST(agent_id AS TEXT) = ? ORDER BY store_time_ns, seq",
            (agent_id,),
        )
        return [event_id for (event_id,) in rows]


def test_a_node_that_is_retired(cluster: Cluster, tmp_path: Path) -> None:
    agents_outlive(cluster, tmp_path, cluster.retire)


def test_a_node_that_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    agents_outlive(cluster, tmp_path, NatsServer.kill)
