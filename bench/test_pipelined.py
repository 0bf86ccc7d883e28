"""Question: how many events per second can one process append when it does not wait for each PubAck?"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
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
QUESTION = f"Pipelined: {RECORDS} events of 200 bytes from one process ({ROUNDS} rounds)"
FLOOR = "raw socket, frames ready: the floor"
FENCED = "save_events"
UNFENCED = "save_events, never resumed"

_numbers = itertools.count()


def one_round(url: str, records: int) -> dict[str, float]:
    """Records per second of each side. Runs in the child."""
    with ExitStack() as stack:
        raw = RawPublisher(url, f"PIPELINED_{next(_numbers)}")
        stack.callback(raw.close)
        raw.make_stream()
        stack.callback(raw.remove_stream)
        settings = {"nats_url": url, "namespace": "pipelined", "writer": "off", "wal_bytes": 2**31}
        fenced, unfenced = (stack.enter_context(SkialithAgent(name, **settings)) for name in ("fenced", "unfenced"))
        fenced.resume()
        found = {}
        for each in (records // 10, records):  # the first is the warm-up
            chunks = raw.chunks(BODY, each)
            number = next(_numbers)
            events = [(f"{number}-{n}", PAYLOAD) for n in range(each)]
            sides: dict[str, Callable[[], object]] = {
                FLOOR: lambda chunks=chunks: raw.append_chunks(chunks),  # type: ignore[misc]
                FENCED: lambda events=events: fenced.save_events(events),  # type: ignore[misc]
                UNFENCED: lambda events=events: unfenced.save_events(events),  # type: ignore[misc]
            }
            for name, call in sides.items():
                began = time.perf_counter()
                call()
                found[name] = each / (time.perf_counter() - began)
        return found


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
    report.bar("pipelined", max(statistics.median(rates[name]) for name in (FENCED, UNFENCED)))
