"""Question: what does an agent cost when its namespace has 10^3, 10^4, 10^5 of them, and what grows with their number?

One server, one MariaDB, one namespace that grows from size to size. One process owns all agents but those that another one
resumes; each has saved an event and a checkpoint. ``SKIALITH_BENCH_AGENTS`` is the largest size (10,000 at scale 1).
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from skialith.config import LEASE_SECONDS
from tests.fixtures.command import skialith
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer

from .child import Child
from .measure import SCALE, Samples, timed
from .report import NO_SYNC, NOT_A_WRITE, Report, duration, rate
from .sides import PAYLOAD

AGENTS = int(os.environ.get("SKIALITH_BENCH_AGENTS") or 10_000 * SCALE)
SIZES = [size for size in (1000, 10_000, 100_000) if size <= max(1000, AGENTS)]
THREADS = 8
SAMPLE = 400
"""Calls of each kind that are timed, by one thread; the agents are others than those that the volume is made of."""
PURGES = 30
IDLE_SECONDS = 4.0
STATE = {"messages": [{"role": "user", "content": "x" * 80}] * 10}
SETTINGS: dict[str, Any] = {"namespace": "scale", "wal_bytes": 8 * 2**30, "timeout": 25}
Taken = dict[str, list[float]]


def question(size: int) -> str:
    return f"{size:,} agents in one namespace, each with an event, a checkpoint and a lease (one round, {SAMPLE} calls)"


# ---- in the child that owns them

_owned: dict[str, SkialithAgent] = {}


def own(settings: dict[str, Any], first: int, last: int) -> Taken:
    """Own these agents, each with an event and a checkpoint; the times of the last ``SAMPLE``, one after the other."""

    def make(n: int) -> tuple[float, float]:
        agent = SkialithAgent(f"agent-{n}", writer="off", **settings)
        began = time.perf_counter()
        agent.resume()
        resumed = time.perf_counter()
        agent.save_event("first", PAYLOAD)
        saved = time.perf_counter()
        agent.checkpoint(1, STATE)
        _owned[agent.agent_id] = agent
        return resumed - began, saved - resumed

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(make, range(first, last - SAMPLE), chunksize=100):
            pass
    each = [make(n) for n in range(last - SAMPLE, last)]
    return {"resume() of a new agent": [a for a, _ in each], "its first save_event": [b for _, b in each]}


def save_unowned(settings: dict[str, Any], name: str) -> None:
    """Checkpoints of agents that nobody owns."""
    for n in range(SAMPLE):
        with SkialithAgent(f"{name}-{n}", writer="off", **settings) as agent:
            agent.save_event("first", PAYLOAD)
            agent.checkpoint(1, STATE)


def memory_of(pid: int = 0) -> int:
    """Resident bytes of a process, this one unless given."""
    text = Path(f"/proc/{pid or os.getpid()}/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))) * 1024


def idle_cpu() -> float:
    """Share of a processor that this process takes while nobody calls it."""
    began, wall = time.process_time(), time.perf_counter()
    time.sleep(IDLE_SECONDS)
    return (time.process_time() - began) / (time.perf_counter() - wall)


def renew_all() -> tuple[float, list[float]]:
    """Have every lease renewed at once: seconds until all are, and those of each save_event meanwhile."""
    agent = next(iter(_owned.values()))
    owning = agent._runtime.wal.log.owning
    planned = owning._calendar
    leases = [lease for _, _, lease in planned if lease.users]
    for lease in leases:
        lease.renewed_at = 0.0
    planned[:] = [(0.0, n, lease) for n, lease in enumerate(leases)]
    began, taken = time.perf_counter(), []
    while leases[-1].renewed_at == 0.0 or any(lease.renewed_at == 0.0 for lease in leases):
        taken += timed(lambda: agent.save_event("first", PAYLOAD), 50)
    return time.perf_counter() - began, taken


def cold_writes(name: str) -> Taken:
    """After a restart of the server: the first write of each of some agents, and the next."""
    agents = random.Random(name).sample(sorted(_owned), SAMPLE)
    taken: Taken = {"first": [], "second": []}
    _owned[next(iter(_owned))].save_event(f"reconnected-{name}", PAYLOAD)
    for agent_id in agents:
        for which, times in taken.items():
            times.extend(timed(lambda a=_owned[agent_id], e=f"{which}-{name}": a.save_event(e, PAYLOAD), 1))  # type: ignore[misc]
    return taken


def close_owned() -> float:
    """Seconds that it takes to give up some of them, each, and to end."""
    mine = [_owned.pop(agent_id) for agent_id in sorted(_owned)[:SAMPLE]]
    seconds = statistics.median(timed(lambda: mine.pop().close(), len(mine)))
    _owned.clear()
    return seconds


# ---- in the child that comes later


def resumes(settings: dict[str, Any], name: str) -> Taken:
    """resume() of agents that others made, and close()."""
    with SkialithAgent("keeper", writer="off", **settings):
        agents = [SkialithAgent(f"{name}-{n}", writer="off", **settings) for n in range(SAMPLE)]
        resumed = [seconds for agent in agents for seconds in timed(agent.resume, 1)]
        closed = [seconds for agent in agents for seconds in timed(agent.close, 1)]
    return {"resume": resumed, "close": closed}


def purges(settings: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Seconds of each purge of a class that is empty but for what this child appends, and the stream's figures."""
    with SkialithAgent("purger", writer="off", **settings) as agent:
        wal = agent._runtime.wal
        taken = []
        for n in range(PURGES):
            seq = agent.save_event(f"{time.time_ns()}-{n}", PAYLOAD).seq
            body = {"filter": wal.stream.subjects.events, "seq": seq}
            taken += timed(lambda body=body: _purge(wal, body), 1)  # type: ignore[misc]
        info = wal.call(lambda: wal.stream.api.call(f"STREAM.INFO.{wal.stream.name}"), 20.0)
        return taken, info["state"]


def _purge(wal: Any, body: dict[str, Any]) -> None:
    wal.call(lambda: wal.stream.api.once(f"STREAM.PURGE.{wal.stream.name}", body, timeout=20.0), 20.0)


def saves_beside_purges(settings: dict[str, Any]) -> Taken:
    """save_event while nobody purges, and while all classes are purged once a second, as a writer does."""
    stopping, purging = threading.Event(), threading.Event()
    with SkialithAgent("saver", writer="off", **settings) as agent:
        agent.resume()
        wal = agent._runtime.wal
        kinds = [wal.stream.subjects.events, wal.stream.subjects.chunks, wal.stream.subjects.graphs]

        def purge() -> None:
            while not stopping.wait(1.0 if purging.is_set() else 0.01):
                for kind in kinds if purging.is_set() else ():
                    _purge(wal, {"filter": kind, "seq": wal.stream.tally.last_seq})

        thread = threading.Thread(target=purge)
        thread.start()
        taken: Taken = {"nobody trims": [], "trimmed once a second": []}
        for _ in range(3):
            for name, times in taken.items():
                (purging.set if name.startswith("trimmed") else purging.clear)()
                until = time.perf_counter() + 2.0
                while time.perf_counter() < until:
                    times.extend(timed(lambda: agent.save_event(f"{time.time_ns()}", PAYLOAD), 20))
        stopping.set()
        thread.join()
    return taken


# ---- in the bench


def drain(settings: dict[str, Any]) -> float:
    """Store all that is in the log, and trim; seconds. Runs in a child."""
    began = time.perf_counter()
    with SkialithAgent("~writer", writer="on", **settings) as writer:
        wal = writer._runtime.wal
        while any(lag.records for lag in wal.status(20.0).consumers):
            time.sleep(0.1)
        wal.trim()
    return time.perf_counter() - began


def wall(call: Callable[[], object]) -> float:
    return timed(call, 1)[0]


class Scale:
    """The namespace at one size after the other."""

    def __init__(self, nats: NatsServer, mariadb: MariaDB, folder: Path, report: Report) -> None:
        self.nats, self.mariadb, self.folder, self.report = nats, mariadb, folder, report
        self.settings = {**SETTINGS, "nats_url": nats.url, "database_url": mariadb.url("scale")}
        self.base = memory_of(nats.pid)

    def grow(self, owner: Child, other: Child, before: int, size: int) -> None:
        asked = question(size)
        began, empty = time.perf_counter(), owner.run(memory_of)
        made = owner.run(own, self.settings, before, size)
        seconds = time.perf_counter() - began
        self._latencies(asked, made)
        each = (owner.run(memory_of) - empty) / (size - before)
        self.report.figure(
            asked, f"made by {THREADS} threads of one process", rate((size - before) / seconds, "agents")
        )
        self.report.figure(asked, "memory of the process that owns them", f"{each:,.0f} bytes an agent")
        self._measure_resumes(asked, other, size)
        self._measure_log(asked, other, size)
        self._measure_leases(asked, owner, size)
        self._measure_lists(asked)
        self._measure_restart(asked, owner, size)

    def _latencies(self, asked: str, taken: Taken, note: str = "") -> None:
        for name, seconds in taken.items():
            samples = Samples()
            samples.add(seconds)
            self.report.latency(asked, name, samples, NO_SYNC, note, f"max {duration(max(seconds))}")

    def _measure_resumes(self, asked: str, other: Child, size: int) -> None:
        other.run(save_unowned, self.settings, f"in-log-{size}")
        taken = other.run(resumes, self.settings, f"in-log-{size}")
        self._latencies(asked, {"resume(), checkpoint in the log": taken["resume"]})
        other.run(save_unowned, self.settings, f"stored-{size}")
        with Child() as writer:
            seconds = writer.run(drain, self.settings)
        self.report.figure(asked, "log drained and trimmed, opening included", duration(seconds))
        taken = other.run(resumes, self.settings, f"stored-{size}")
        self._latencies(asked, {"resume(), checkpoint in the database": taken["resume"]})
        self._latencies(asked, {"close() of an agent that is owned": taken["close"]})

    def _measure_log(self, asked: str, other: Child, size: int) -> None:
        taken, state = other.run(purges, self.settings)
        self._latencies(asked, {"purge of one class": taken})
        self._latencies(
            asked,
            {f"save_event, {name}": times for name, times in other.run(saves_beside_purges, self.settings).items()},
        )
        server = memory_of(self.nats.pid)
        disk = sum(file.stat().st_size for file in self.nats.store.rglob("*") if file.is_file())
        figures = f"{server / 2**20:,.0f} MiB, {(server - self.base) / size:,.0f} bytes an agent"
        self.report.figure(asked, "memory of nats-server", figures)
        figures = f"{state['messages']:,} messages, {state['num_subjects']:,} subjects"
        self.report.figure(
            asked, "in the log when all is stored", figures, ratio=f"{state['bytes'] / size:,.0f} bytes an agent"
        )
        self.report.figure(asked, "its files", f"{disk / 2**20:,.1f} MiB")

    def _measure_leases(self, asked: str, owner: Child, size: int) -> None:
        self.report.figure(asked, "their owner at rest", f"{owner.run(idle_cpu):.2%} of a processor")
        seconds, saves = owner.run(renew_all)
        needed = f"{size / (LEASE_SECONDS / 3):,.1f} a second are needed"
        self.report.figure(
            asked, "all leases renewed at once", f"{duration(seconds)}: {rate(size / seconds, 'leases')}", ratio=needed
        )
        self._latencies(asked, {"save_event meanwhile": saves})

    def _measure_lists(self, asked: str) -> None:
        where = ("--nats-url", self.nats.url, "--database-url", self.settings["database_url"], "--namespace", "scale")
        for words in (("--version",), ("status", *where), ("agents", *where), ("agents", "--json", *where)):
            shown = " ".join(word for word in words if word not in where)
            seconds = min(wall(lambda words=words: skialith(*words, cwd=self.folder)) for _ in range(3))  # type: ignore[misc]
            self.report.figure(asked, f"skialith {shown} (best of 3)", duration(seconds))
        counts = [
            self.mariadb.run(f"SELECT COUNT(*) FROM {table}", database="scale")[0][0]
            for table in ("agent_events", "agent_checkpoints")
        ]
        self.report.figure(asked, "rows in MariaDB", f"{counts[0]:,} events, {counts[1]:,} checkpoints")

    def _measure_restart(self, asked: str, owner: Child, size: int) -> None:
        self.nats.stop()
        self.report.figure(asked, "start of nats-server", duration(wall(self.nats.start)), NOT_A_WRITE)
        taken = owner.run(cold_writes, str(size))
        self._latencies(asked, {f"fenced save_event after the restart, {name}": times for name, times in taken.items()})
        self.report.figure(
            asked, "memory of nats-server after a restart", f"{memory_of(self.nats.pid) / 2**20:,.0f} MiB"
        )


def test_scale(benchmark: BenchmarkFixture, tmp_path: Path, mariadb: MariaDB, report: Report) -> None:
    with NatsServer(tmp_path / "nats") as nats, Child() as owner, Child() as other:
        scale = Scale(nats, mariadb, tmp_path, report)

        def take_round() -> None:
            for before, size in zip((0, *SIZES), SIZES, strict=False):
                scale.grow(owner, other, before, size)

        benchmark.pedantic(take_round, rounds=1, iterations=1)
        seconds = owner.run(close_owned)
        report.figure(question(SIZES[-1]), "close() of one of them in their owner", duration(seconds))
