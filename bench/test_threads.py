"""Question: what does save_event cost, and how many does a process get done, when 1, 4 and 16 threads call it at once?"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from contextlib import ExitStack
from typing import NamedTuple

from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from tests.fixtures.nats import NatsServer

from .child import Child
from .measure import FEW_ROUNDS, Samples, median_ratio, scaled, timed
from .report import NO_SYNC, Report, rate
from .sides import PAYLOAD

CALLS = scaled(8000)
THREADS = (1, 4, 16)
QUESTION = f"save_event from several threads ({FEW_ROUNDS} rounds of {CALLS} calls, all threads together)"


class Crowd(NamedTuple):
    """So many threads; each with an agent of its own, or all with one."""

    threads: int
    shared: bool

    @property
    def label(self) -> str:
        if self.threads == 1:
            return "1 thread"
        return f"{self.threads} threads, {'all on one agent' if self.shared else 'an agent each'}"


CROWDS = [Crowd(count, shared) for count in THREADS for shared in (False, True) if count > 1 or not shared]


def one_round(url: str, calls: int) -> dict[Crowd, tuple[float, list[float]]]:
    """Records per second and the seconds of each call, for each crowd. Runs in the child."""
    with ExitStack() as stack:
        settings = {"nats_url": url, "namespace": "threads", "writer": "off", "wal_bytes": 2**30}
        agents = [stack.enter_context(SkialithAgent(f"agent-{n}", **settings)) for n in range(max(THREADS))]
        for agent in agents:
            agent.resume()
        found = {}
        for crowd in CROWDS:
            agents_of_crowd = [agents[0 if crowd.shared else n] for n in range(crowd.threads)]
            for each in (calls // 10, calls):  # the first is the warm-up
                found[crowd] = _run(agents_of_crowd, each // crowd.threads)
        return found


_numbers = itertools.count()


def _run(agents: list[SkialithAgent], calls: int) -> tuple[float, list[float]]:
    taken: list[list[float]] = []
    start = threading.Barrier(len(agents) + 1)

    def work(agent: SkialithAgent) -> None:
        save = agent.save_event
        prefix = f"{next(_numbers)}-{time.time_ns()}"
        ids = itertools.count()
        start.wait()
        taken.append(timed(lambda: save(f"{prefix}-{next(ids)}", PAYLOAD), calls))

    threads = [threading.Thread(target=work, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    assert sum(map(len, taken)) == calls * len(agents)
    return calls * len(agents) / seconds, [second for each in taken for second in each]


def test_threads(benchmark: BenchmarkFixture, nats: NatsServer, report: Report) -> None:
    rates: dict[Crowd, list[float]] = {crowd: [] for crowd in CROWDS}
    samples = {crowd: Samples() for crowd in CROWDS}
    with Child() as child:

        def take_round() -> None:
            for crowd, (per_second, seconds) in child.run(one_round, nats.url, CALLS).items():
                rates[crowd].append(per_second)
                samples[crowd].add(seconds)

        benchmark.pedantic(take_round, rounds=FEW_ROUNDS, iterations=1)
    alone = rates[CROWDS[0]]
    for crowd in CROWDS:
        ratio = f"{median_ratio(rates[crowd], alone):.2f} x one thread's rate"
        figure = rate(statistics.median(rates[crowd]))
        report.latency(QUESTION, crowd.label, samples[crowd], NO_SYNC, ratio, figure)
