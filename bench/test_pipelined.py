"""Question: how many events per second can one process append when it does not wait for each PubAck?"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from tests.fixtures.nats import NatsServer

from .child import Child
from .floor import RawPublisher
from .measure import ROUNDS, median_ratio, scaled
from .report import NO_SYNC, Report, rate
from .sides import BODY, PAYLOAD

RECORDS = scaled(20_000)
AGENTS = 8
QUESTION = f"Pipelined: {RECORDS} events of 200 bytes from one process ({ROUNDS} rounds)"
FLOOR = "raw socket, frames ready: the floor"
FENCED = "save_events"
UNFENCED = "save_events, never resumed"
NOWAIT = "save_event_nowait"
NOWAIT_UNFENCED = "save_event_nowait, never resumed"
NOWAIT_MANY = f"save_event_nowait, {AGENTS} agents in turn"

_numbers = itertools.count()


def one_round(url: str, records: int) -> dict[str, float]:
    """Records per second of each side. Runs in the child."""
    with ExitStack() as stack:
        raw = RawPublisher(url, f"PIPELINED_{next(_numbers)}")
        stack.callback(raw.close)
        raw.make_stream()
        stack.callback(raw.remove_stream)
        settings = {"nats_url": url, "namespace": "pipelined", "writer": "off", "wal_bytes": 2**31}
        agents = [stack.enter_context(SkialithAgent(f"agent-{n}", **settings)) for n in range(AGENTS)]
        free = stack.enter_context(SkialithAgent("never-resumed", **settings))
        for agent in agents:
            agent.resume()
        found: dict[str, float] = {}
        for count in (records // 10, records):  # the first is the warm-up
            chunks = raw.chunks(BODY, count)
            sides: dict[str, Callable[[], object]] = {
                FLOOR: lambda chunks=chunks: raw.append_chunks(chunks),  # type: ignore[misc]
                FENCED: lambda count=count: agents[0].save_events(_events(count)),  # type: ignore[misc]
                UNFENCED: lambda count=count: free.save_events(_events(count)),  # type: ignore[misc]
                NOWAIT: lambda count=count: _nowait(agents[:1], count),  # type: ignore[misc]
                NOWAIT_UNFENCED: lambda count=count: _nowait([free], count),  # type: ignore[misc]
                NOWAIT_MANY: lambda count=count: _nowait(agents, count),  # type: ignore[misc]
            }
            for name, call in sides.items():
                began = time.perf_counter()
                call()
                found[name] = count / (time.perf_counter() - began)
        return found


def _events(count: int) -> list[tuple[str, object]]:
    number = next(_numbers)
    return [(f"{number}-{n}", PAYLOAD) for n in range(count)]


def _nowait(agents: Sequence[SkialithAgent], count: int) -> None:
    turns = itertools.cycle(agents)
    for future in [next(turns).save_event_nowait(event_id, data) for event_id, data in _events(count)]:
        future.result()


def test_pipelined(benchmark: BenchmarkFixture, nats: NatsServer, report: Report) -> None:
    rates: dict[str, list[float]] = {}
    with Child() as child:

        def take_round() -> None:
            for name, per_second in child.run(one_round, nats.url, RECORDS).items():
                rates.setdefault(name, []).append(per_second)

        benchmark.pedantic(take_round, rounds=ROUNDS, iterations=1)
    for name, each in rates.items():
        ratio = f"{median_ratio(each, rates[FLOOR]):.2f} x floor"
        report.figure(QUESTION, name, rate(statistics.median(each), "events"), NO_SYNC, ratio)
    report.bar("pipelined", statistics.median(rates[FENCED]))
