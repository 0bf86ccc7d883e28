"""Question: what does the writer of the same process cost those who call save_event in it?

Calls come in bursts with pauses in which the writer stores what the burst saved, so that "idle" is idle. The load comes from
another process: 10,000 events a second into the same namespace, or a backlog that waits when the writer starts. Idle and busy
phases alternate in one process, with one agent, one connection and one writer.

A bystander, a third process with a raw socket, calls in the same phases: what it feels comes from the machine and the server,
which everybody shares, and not from the writer in the process.
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

from . import sides
from .child import Child
from .measure import BLOCK_WARM_UP, FEW_ROUNDS, ROUNDS, Call, Samples, scaled, timed
from .report import NO_SYNC, Report, rate
from .sides import PAYLOAD

PER_SECOND = 10_000
BURST = 50
PAUSE_SECONDS = 0.06
BURSTS = scaled(20, least=10)
BACKLOG = scaled(100_000)
BACKLOG_BURSTS = scaled(40, least=10)
BACKLOG_PAUSE_SECONDS = 0.005
QUESTION = f"save_event while this process's writer stores into MariaDB, both tables (bursts of {BURST} calls)"


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
    return _bursts(_save, count, pause)


def _bursts(call: Call, count: int, pause: float) -> list[float]:
    taken = []
    for _ in range(count):
        timed(call, BLOCK_WARM_UP)
        taken += timed(call, BURST)
        time.sleep(pause)
    return taken


def _save() -> None:
    _agents[0].save_event(f"e{next(_numbers)}", PAYLOAD)


# ---- in the bystander


def bystand(url: str, count: int, pause: float = PAUSE_SECONDS) -> list[float]:
    """Seconds of each call of a raw socket in ``count`` bursts."""
    with sides.floor(url) as call:
        return _bursts(call, count, pause)


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


class _Phases:
    """Everybody's samples, idle and busy, and what the writer stored per second."""

    def __init__(self) -> None:
        self.idle, self.busy = Samples(), Samples()
        self.bystander_idle, self.bystander_busy = Samples(), Samples()
        self.stored: list[float] = []

    def add_busy(self, phase: Phase, bystander: list[float]) -> None:
        self.busy.add(phase.seconds)
        self.bystander_busy.add(bystander)
        self.stored.append(phase.stored)

    def add_idle(self, seconds: list[float], bystander: list[float]) -> None:
        self.idle.add(seconds)
        self.bystander_idle.add(bystander)

    def report(self, report: Report, busy: str, idle: str) -> None:
        """Four rows."""
        figure = rate(statistics.median(self.stored), "stored")
        report.latency(QUESTION, idle, self.idle, NO_SYNC)
        report.latency(QUESTION, busy, self.busy, NO_SYNC, _over(self.busy, self.idle), figure)
        report.latency(QUESTION, "  raw socket in another process, writer idle", self.bystander_idle, NO_SYNC)
        ratio = _over(self.bystander_busy, self.bystander_idle)
        report.latency(QUESTION, "  raw socket in another process, writer busy", self.bystander_busy, NO_SYNC, ratio)


def _over(busy: Samples, idle: Samples) -> str:
    return f"p50 {busy.over(idle, 50):.2f}, p99 {busy.over(idle, 99):.2f} x idle"


def test_paced_writer(benchmark: BenchmarkFixture, nats: NatsServer, mariadb: MariaDB, report: Report) -> None:
    settings = _settings(nats, mariadb, "paced")
    phases, rows = _Phases(), _Rows(mariadb, "busy_paced")
    with Child() as child, Child() as other, Child() as bystander:
        child.run(open_agent, settings)
        child.run(bursts, 4)

        def take_round() -> None:
            rows.settle()
            phases.add_idle(child.run(bursts, BURSTS), bystander.run(bystand, nats.url, BURSTS))
            other.run(start_load, settings, str(next(_numbers)))
            child.run(bursts, 8)  # until the load runs evenly
            phase = rows.during(child, BURSTS, PAUSE_SECONDS)
            phases.add_busy(phase, bystander.run(bystand, nats.url, BURSTS))
            other.run(stop_load)

        benchmark.pedantic(take_round, rounds=ROUNDS, iterations=1)
        child.run(close_agent)
    phases.report(report, f"writer storing {PER_SECOND:,} events/s of another process", "writer idle")
    report.bar("paced writer", phases.busy.over(phases.idle, 99))


def test_backlog(benchmark: BenchmarkFixture, nats: NatsServer, mariadb: MariaDB, report: Report) -> None:
    settings = _settings(nats, mariadb, "backlog")
    phases, rows = _Phases(), _Rows(mariadb, "busy_backlog")
    with Child() as child, Child() as other, Child() as bystander:
        child.run(open_agent, settings)
        child.run(close_agent)
        bystander.run(bystand, nats.url, 1)

        def take_round() -> None:
            before = rows.count()
            other.run(fill, settings, str(next(_numbers)), BACKLOG)
            child.run(open_agent, settings)
            phase = rows.during(child, BACKLOG_BURSTS, BACKLOG_PAUSE_SECONDS)
            phases.add_busy(phase, bystander.run(bystand, nats.url, BACKLOG_BURSTS // 2, BACKLOG_PAUSE_SECONDS))
            assert rows.count() < before + BACKLOG, "the backlog was cleared before the calls were done: make it longer"
            rows.settle()
            phases.add_idle(child.run(bursts, BACKLOG_BURSTS), bystander.run(bystand, nats.url, BACKLOG_BURSTS // 2))
            child.run(close_agent)

        benchmark.pedantic(take_round, rounds=FEW_ROUNDS, iterations=1)
    phases.report(report, f"writer clearing a backlog of {BACKLOG:,} at full speed", "writer idle, after the backlog")
    report.bar("backlog", phases.busy.over(phases.idle, 99))
