"""Question: what do three replicas cost, fenced and not, one record at a time and in batches, beside one server?

Three nodes on this machine, so they share its cores: what replication costs in CPU is here, what a network costs is not.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from skialith.errors import ConfigurationError, WalUnavailable
from tests.fixtures.nats import NatsServer, free_port, wait_until

from . import sides
from .child import Child
from .measure import FEW_ROUNDS, Call, Samples, collect, median_ratio, scaled, take_turns
from .report import NO_SYNC, Report, rate
from .sides import PAYLOAD

CALLS = scaled(500)
RECORDS = scaled(5000)
R3_SURVIVES = "process; power of one node of 3"
LATENCY = f"Three replicas on three local nodes, one record at a time ({FEW_ROUNDS} rounds of {CALLS})"
BATCHES = f"Three replicas on three local nodes, save_events of {RECORDS} ({FEW_ROUNDS} rounds)"
SINGLE = {"R1": 1, "R3": 3}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[NatsServer]]:
    """Three running nodes with a leader."""
    folder = tmp_path_factory.mktemp("cluster")
    routes = [free_port() for _ in range(3)]
    peers = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
    nodes = [
        NatsServer(folder / f"n{n}", config=f'cluster {{ name: c, listen: "127.0.0.1:{port}", routes: [{peers}] }}')
        for n, port in enumerate(routes)
    ]

    def has_leader() -> bool:
        try:
            SkialithAgent(
                "probe", nats_url=nodes[0].url, namespace="probe", replicas=3, writer="off", wal_bytes=2**20
            ).close()
        except (WalUnavailable, ConfigurationError):
            return False
        return True

    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.kill)
            node.start()
        wait_until(has_leader, 60, "a cluster with a leader")
        yield nodes


# ---- in the child

_stack = ExitStack()
_sides: dict[str, Call] = {}
_batches: dict[str, SkialithAgent] = {}


def open_sides(urls: dict[str, str]) -> None:
    """The same sides on one server and on three."""
    for name, url in urls.items():
        replicas = SINGLE[name]
        settings = {"nats_url": url, "replicas": replicas, "writer": "off", "wal_bytes": 2**28, "timeout": 25}
        ways = {
            f"raw socket, {name}": sides.floor(url, replicas=replicas),
            f"save_event, {name}": sides.save_event(url, replicas=replicas, wal_bytes=2**28),
            f"save_event, never resumed, {name}": sides.save_event(
                url, fenced=False, replicas=replicas, wal_bytes=2**28
            ),
        }
        for way, side in ways.items():
            _sides[way] = _stack.enter_context(side)
        for way, fenced in ((f"fenced, {name}", True), (f"never resumed, {name}", False)):
            agent = _stack.enter_context(SkialithAgent("batches", namespace=f"batches-{fenced}", **settings))
            if fenced:
                agent.resume()
            _batches[way] = agent
    take_turns(_sides, 50)


def singles(calls: int) -> dict[str, list[float]]:
    return take_turns(_sides, calls)


_numbers = itertools.count()


def batches(records: int) -> dict[str, float]:
    """Records per second of one large save_events of each agent."""
    found = {}
    for way, agent in _batches.items():
        number = next(_numbers)
        events = [(f"{number}-{n}", PAYLOAD) for n in range(records)]
        began = time.perf_counter()
        agent.save_events(events)
        found[way] = records / (time.perf_counter() - began)
    return found


def close_sides() -> None:
    _stack.close()


# ---- in the bench


def test_replicas(benchmark: BenchmarkFixture, nats: NatsServer, cluster: list[NatsServer], report: Report) -> None:
    taken: dict[str, Samples] = {}
    rates: dict[str, list[float]] = {}
    with Child() as child:
        child.run(open_sides, {"R1": nats.url, "R3": cluster[0].url})
        child.run(batches, RECORDS // 5)

        def take_round() -> None:
            collect(taken, child.run(singles, CALLS))
            for way, per_second in child.run(batches, RECORDS).items():
                rates.setdefault(way, []).append(per_second)

        benchmark.pedantic(take_round, rounds=FEW_ROUNDS, iterations=1)
        child.run(close_sides)
    for way, samples in taken.items():
        name = way[-2:]
        ratio = f"{samples.over(taken[f'raw socket, {name}'], 50):.2f} x its floor"
        if name == "R3":
            ratio += f", {samples.over(taken[way.replace('R3', 'R1')], 50):.1f} x R1"
        report.latency(LATENCY, way, samples, NO_SYNC if name == "R1" else R3_SURVIVES, ratio)
    for way, each in rates.items():
        ratio = f"{median_ratio(each, rates[way.replace('R3', 'R1')]):.2f} x R1" if way.endswith("R3") else ""
        survives = NO_SYNC if way.endswith("R1") else R3_SURVIVES
        report.figure(BATCHES, way, rate(statistics.median(each), "events"), survives, ratio)
