"""Question: what does the first fenced write of an agent cost when its lease is one of 10,000 that the server has not in memory?

The server checks the lease of every fenced write. Leases are scattered over the log by an event of 20 KB after each claim, then
the server is restarted. The first write of an agent reads its lease again, because it is another server; the second is warm.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from tests.fixtures.nats import NatsServer

from .child import Child
from .measure import FEW_ROUNDS, Samples, collect, scaled, timed
from .report import NO_SYNC, Report, duration
from .sides import PAYLOAD

LEASES = scaled(10_000)
WRITES = scaled(1000)
BETWEEN_BYTES = 20_000
QUESTION = f"Fenced writes after a restart of the server, {LEASES:,} scattered leases ({FEW_ROUNDS} rounds of {WRITES})"
COLD, AGAIN, WARM = "first write of an agent", "second write", "third write"

_agents: list[SkialithAgent] = []


def claim(url: str, leases: int) -> None:
    """Own many agents, their leases far apart in the log. Runs in the child."""
    noise = random.Random(1).randbytes
    settings = {"nats_url": url, "namespace": "leases", "writer": "off", "wal_bytes": 2**30, "timeout": 25}
    for n in range(leases):
        agent = SkialithAgent(f"agent-{n}", **settings)
        agent.resume()
        agent.save_event("between", {"noise": noise(BETWEEN_BYTES)})
        _agents.append(agent)
    random.Random(2).shuffle(_agents)


def writes(number: int, count: int) -> dict[str, list[float]]:
    """Seconds of three writes of each of ``count`` agents that have not written since the restart. Runs in the child."""
    mine = [_agents.pop() for _ in range(count)]
    with SkialithAgent("nobody", **asdict(mine[0].config)) as other:
        other.save_event(f"reconnected-{number}", PAYLOAD)
    taken: dict[str, list[float]] = {COLD: [], AGAIN: [], WARM: []}
    for agent, name in itertools.product(mine, taken):
        taken[name] += timed(lambda agent=agent, name=name: agent.save_event(name, PAYLOAD), 1)  # type: ignore[misc]
    for agent in mine:
        agent.close()
    return taken


def close_rest() -> None:
    while _agents:
        _agents.pop().close()


def test_cold_lease(benchmark: BenchmarkFixture, tmp_path: Path, report: Report) -> None:
    taken: dict[str, Samples] = {}
    with NatsServer(tmp_path / "nats") as nats, Child() as child:
        child.run(claim, nats.url, LEASES)

        def restart() -> None:
            nats.stop()
            nats.start()

        def take_round() -> None:
            collect(taken, child.run(writes, len(taken), WRITES))

        benchmark.pedantic(take_round, setup=restart, rounds=FEW_ROUNDS, iterations=1)
        child.run(close_rest)
    for name, samples in taken.items():
        ratio = f"{samples.over(taken[WARM], 50):.2f} x warm, p99 {samples.over(taken[WARM], 99):.2f}"
        worst = max(max(each) for each in samples.rounds)
        report.latency(QUESTION, name, samples, NO_SYNC, ratio, f"max {duration(worst)}")
