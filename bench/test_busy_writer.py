"""Question: what does the writer of the same process cost those who call save_event in it?

Calls come in bursts with pauses in which the writer stores what the burst saved, so that "idle" is idle. The load comes from
another process: 10,000 events a second into the same namespace, or a backlog that waits when the writer starts. Idle and busy
phases alternate in one process, with one agent, one connection and one writer.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from typing import Any, NamedTuple

from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from skialith.config import WRITER_LINGER_SECONDS
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer

from .child import Child
from .measure import BLOCK_WARM_UP, FEW_ROUNDS, ROUNDS, Samples, scaled, timed
from .report import NO_SYNC, Report, rate
from .sides import PAYLOAD

PER_SECOND = 10_000
BURST = 50
PAUSE_SECONDS = 0.06
BURSTS = scaled(20, least=10)
BACKLOG = scaled(100_000)
BACKLOG_BURSTS = scaled(40, least=10)
BACKLOG_PAUSE_SECONDS = 0.005
QUESTION = "save_event while this process's writer stores into MariaDB, both tables (bursts of 50 calls)"


class Phase(NamedTuple):
    """Seconds of each call, and what the writer stored per second meanwhile."""

    seconds: list[float]
    stored: float


# ---- in the child that saves and has the writer

_agents: list[SkialithAgent] = []
_numbers = itertools.count()


def open_agent(settings: dict[str, Any]) -> None:
    """The agent that is measured, with the writer on."""
    agent = SkialithAgent("measured", writer="on", **settings)
    agent.resume()
    _agents.append(agent)


def close_agent() -> None:
    _agents.pop().close()


def bursts(count: int, pause: float = PAUSE_SECONDS) -> list[float]:
    """Seconds of each call in ``count`` bursts."""
    taken = []
    for _ in range(count):
        timed(_save, BLOCK_WARM_UP)
        taken += timed(_save, BURST)
        time.sleep(pause)
    return taken


def _save() -> None:
    _agents[0].save_event(f"e{next(_numbers)}", PAYLOAD)


# ---- in the child that makes the load

_stopping = threading.Event()
_loaders: list[threading.Thread] = []


def fill(settings: dict[str, Any], name: str, records: int) -> None:
    """Leave a backlog in the log."""
    with SkialithAgent("filler", writer="off", timeout=25, **settings) as agent:
        agent.save_events([(f"{name}-{n}", PAYLOAD) for n in range(records)])


def start_load(settings: dict[str, Any], name: str) -> None:
    """Append ``PER_SECOND`` events a second until :func:`stop_load`."""
    _stopping.clear()
    _loaders.append(threading.Thread(target=_load, args=(settings, name)))
    _loaders[0].start()


def _load(settings: dict[str, Any], name: str) -> None:
    batch = PER_SECOND // 100
    with SkialithAgent("load", writer="off", **settings) as agent:
        began = time.perf_counter()
        for turn in itertools.count():
            agent.save_events([(f"{name}-{turn}-{n}", PAYLOAD) for n in range(batch)])
            due = began + (turn + 1) * batch / PER_SECOND
            if _stopping.wait(max(0.0, due - time.perf_counter())):
                return


def stop_load() -> None:
    _stopping.set()
    _loaders.pop().join()


# ---- in the bench


class _Rows:
    """What the database has."""

    def __init__(self, mariadb: MariaDB, database: str) -> None:
        self._mariadb, self._database = mariadb, database

    def count(self, table: str = "agent_events") -> int:
        return int(self._mariadb.run(f"SELECT COUNT(*) FROM {table}", database=self._database)[0][0])

    def settle(self) -> None:
        """Wait until nothing more is stored: as many traces as events, twice the same."""
        seen = -1
        while seen != (now := self.count()) or now != self.count("agent_traces"):
            seen = now
            time.sleep(3 * WRITER_LINGER_SECONDS)

    def during(self, child: Child, count: int, pause: float) -> Phase:
        """Run bursts in the child and see what was stored meanwhile."""
        before, began = self.count(), time.perf_counter()
        seconds = child.run(bursts, count, pause)
        passed = time.perf_counter() - began
        return Phase(seconds, (self.count() - before) / passed)


def _settings(nats: NatsServer, mariadb: MariaDB, name: str) -> dict[str, Any]:
    namespace = f"busy-{name}"
    return {
        "nats_url": nats.url,
        "database_url": mariadb.url(f"busy_{name}"),
        "namespace": namespace,
        "wal_bytes": 2**30,
    }


def test_paced_writer(benchmark: BenchmarkFixture, nats: NatsServer, mariadb: MariaDB, report: Report) -> None:
    settings = _settings(nats, mariadb, "paced")
    idle, busy = Samples(), Samples()
    stored: list[float] = []
    rows = _Rows(mariadb, "busy_paced")
    with Child() as child, Child() as other:
        child.run(open_agent, settings)
        child.run(bursts, 4)

        def take_round() -> None:
            rows.settle()
            idle.add(child.run(bursts, BURSTS))
            other.run(start_load, settings, str(next(_numbers)))
            child.run(bursts, 8)  # until the load runs evenly
            phase = rows.during(child, BURSTS, PAUSE_SECONDS)
            other.run(stop_load)
            busy.add(phase.seconds)
            stored.append(phase.stored)

        benchmark.pedantic(take_round, rounds=ROUNDS, iterations=1)
        child.run(close_agent)
    report.latency(QUESTION, "writer idle", idle, NO_SYNC)
    _report_busy(report, f"writer storing {PER_SECOND:,} events/s of another process", busy, idle, stored)
    report.bar("paced writer", busy.over(idle, 99))


def test_backlog(benchmark: BenchmarkFixture, nats: NatsServer, mariadb: MariaDB, report: Report) -> None:
    settings = _settings(nats, mariadb, "backlog")
    idle, busy = Samples(), Samples()
    stored: list[float] = []
    rows = _Rows(mariadb, "busy_backlog")
    with Child() as child, Child() as other:
        child.run(open_agent, settings)
        child.run(close_agent)

        def take_round() -> None:
            before = rows.count()
            other.run(fill, settings, str(next(_numbers)), BACKLOG)
            child.run(open_agent, settings)
            phase = rows.during(child, BACKLOG_BURSTS, BACKLOG_PAUSE_SECONDS)
            assert rows.count() < before + BACKLOG, "the backlog was cleared before the calls were done: make it longer"
            busy.add(phase.seconds)
            stored.append(phase.stored)
            rows.settle()
            idle.add(child.run(bursts, BACKLOG_BURSTS))
            child.run(close_agent)

        benchmark.pedantic(take_round, rounds=FEW_ROUNDS, iterations=1)
    report.latency(QUESTION, "writer idle again", idle, NO_SYNC)
    _report_busy(report, f"writer clearing a backlog of {BACKLOG:,} at full speed", busy, idle, stored)
    report.bar("backlog", busy.over(idle, 99))


def _report_busy(report: Report, way: str, busy: Samples, idle: Samples, stored: list[float]) -> None:
    ratio = f"p50 {busy.over(idle, 50):.2f}, p99 {busy.over(idle, 99):.2f} x idle"
    report.latency(QUESTION, way, busy, NO_SYNC, ratio, f"{rate(statistics.median(stored), 'stored')}")
