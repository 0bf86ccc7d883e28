"""What an operator sees of a log with three replicas while nodes stop and go: status, doctor, within their timeout."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skialith import SkialithAgent
from skialith.config import load
from skialith.sidecar.metrics import Look, exposition
from skialith.wal.client import Wal
from skialith.wal.status import WalStatus
from tests.fixtures.cluster import Cluster
from tests.fixtures.command import Said, skialith
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.wal import new_namespace

ELECTED_SECONDS = 40.0
"""How long a cluster may take on a busy machine to see a loss and choose new leaders."""


class World:
    """A cluster, one agent's log on it, and the command beside it."""

    def __init__(self, cluster: Cluster, place: Path) -> None:
        self.cluster, self.place = cluster, place
        self.settings: dict[str, Any] = {
            "nats_url": ",".join(server.url for server in cluster.servers),
            "database_url": f"sqlite:///{place / 'skialith.db'}",
            "namespace": new_namespace(),
            "timeout": 20.0,
        }
        with SkialithAgent("a", **self.settings, replicas=3, wal_bytes=64 * 1024 * 1024) as agent:
            agent.save_event("e", 1)
            agent.flush(20)

    def run(self, *command: str, timeout: float = 20.0) -> Said:
        options = {"--nats-url": "nats_url", "--database-url": "database_url", "--namespace": "namespace"}
        words = [word for option, name in options.items() for word in (option, self.settings[name])]
        return skialith(*words, "--timeout", str(timeout), *command, cwd=self.place)

    def status(self) -> dict[str, Any]:
        said = self.run("status", "--json")
        assert said.code == 0, said.err
        document: dict[str, Any] = said.document
        return document

    def finding(self, check: str, timeout: float = 20.0) -> tuple[dict[str, str], int]:
        said = self.run("doctor", "--json", timeout=timeout)
        found = [each for each in said.document if each["check"] == check]
        assert len(found) == 1, said.out
        return found[0], said.code


def states(group: dict[str, Any]) -> dict[str, str]:
    return {peer["name"]: peer["state"] for peer in group["peers"]}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Cluster(tmp_path / "cluster") as cluster:
        yield World(cluster, tmp_path)


@pytest.fixture
def open_log(world: World) -> Iterator[Callable[[NatsServer], Wal]]:
    """Logs opened from one node, which need no process for a look."""
    opened: list[Wal] = []

    def make(server: NatsServer) -> Wal:
        opened.append(Wal(load(**{**world.settings, "nats_url": server.url}), lambda: server.url))
        opened[-1].open(20.0, create=False)
        return opened[-1]

    yield make
    for wal in opened:
        wal.close()


def whole(status: WalStatus) -> bool:
    groups = [status.group, *(lag.group for lag in status.consumers)]
    return len(groups) == 3 and all(group is not None and group.whole for group in groups)


def away(status: WalStatus) -> int:
    """As Prometheus is told."""
    text = exposition("", Look(status, database_ok=True, dead_in_table=0))[0].decode()
    found = re.search(r"^skialith_wal_peers_offline ([0-9.]+)$", text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def leader_of(cluster: Cluster, status: WalStatus) -> NatsServer:
    assert status.group is not None
    return next(server for server in cluster.servers if server.name == status.group.leader)


def test_nodes_that_stand_still(world: World, open_log: Callable[[NatsServer], Wal]) -> None:
    cluster = world.cluster
    leader = leader_of(cluster, open_log(cluster.servers[0]).status(20.0))
    one, other = (server for server in cluster.servers if server is not leader)
    wal = open_log(leader)
    wait_until(lambda: whole(wal.status(20.0)), ELECTED_SECONDS, "all replicas are current")
    assert away(wal.status(20.0)) == 0

    one.pause()
    wait_until(lambda: away(wal.status(20.0)) == 1, ELECTED_SECONDS, "one is missed")
    document = world.status()
    for group in (document["log"], *document["consumers"]):
        assert group["writable"]
        assert {group["leader"], *states(group)} == {server.name for server in cluster.servers}
    assert states(document["log"]) == {one.name: "silent", other.name: "current"}
    assert next(peer for peer in document["log"]["peers"] if peer["name"] == one.name)["seen_seconds"] >= 4.0
    said = world.run("status").out
    assert re.search(rf"^replicas +leader {leader.name}; .*{one.name} silent, seen ", said, re.MULTILINE)
    found, code = world.finding("replicas")
    assert code == 0 and found["level"] == "warn" and "start that node" in found["fix"]

    other.pause()  # for a while yet the leader holds itself for one, and answers if the other groups' leaders do

    def failed() -> bool:
        said = world.run("doctor", "--json", "--nats-url", leader.url, timeout=2.0)
        wrong = [each for each in said.document if each["level"] == "fail"]
        assert (said.code == 1) == bool(wrong)
        return bool(wrong) and all("a majority must run" in each["fix"] for each in wrong)

    wait_until(failed, ELECTED_SECONDS, "the doctor fails")


def test_two_nodes_that_are_killed(world: World, open_log: Callable[[NatsServer], Wal]) -> None:
    log = open_log(world.cluster.servers[0])
    leader = leader_of(world.cluster, log.status(20.0))
    log.close()
    left = next(server for server in world.cluster.servers if server is not leader)
    for server in world.cluster.servers:
        if server is not left:
            server.kill()
    began = time.monotonic()
    refused = world.run("status", timeout=2.0)
    assert time.monotonic() - began < 2.0 + 10.0, "the timeout, and the start of a process on a busy machine"
    assert refused.code == 1
    assert left.name in refused.err and "majority of the nodes is down" in refused.err
    found, code = world.finding("stream", timeout=2.0)
    assert code == 1 and found["level"] == "fail" and "a majority must run" in found["fix"]
