"""Question: do resume() and history() stay as fast when an agent has a million stored events, and with a tail in the log?

The tables are filled in bulk through the store, in the order of the keys, with a checkpoint for each hundred events. What is
measured reads with the writer off, so that a tail stays in the log. Every resume() is the first of its agent: it claims.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ormsgpack
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent, _fastpath
from skialith.records import Codec, Kind, Position, Record
from skialith.stores import open_store
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer

from .child import Child
from .measure import FEW_ROUNDS, SCALE, Samples, collect, scaled, timed
from .report import Report, rate
from .sides import PAYLOAD

SIZES = [size for size in (100, 1000, 10_000, 100_000, 1_000_000) if size <= max(1000, 1_000_000 * SCALE)]
TAIL_STORED, TAIL = 10_000, 1000
PAGE = 256
RESUMES = scaled(200)
PAGES = scaled(30, least=20)
BATCH = 5000
EVENTS_OF_A_CHECKPOINT = 100
TIME_NS = 1_767_225_600_000_000_000
STATE = {"messages": [{"role": "user", "content": "x" * 80}] * 10}
NAMES = {"mariadb": "MariaDB", "sqlite": "SQLite"}


# ---- in the child


def fill(settings: dict[str, Any]) -> None:
    """Store the events and checkpoints of all agents, and append the tail of one."""
    with SkialithAgent("first", **{**settings, "writer": "on"}):
        pass  # makes the tables and binds them to this log
    store = open_store(settings["database_url"])
    for agent_id, size in (*((f"stored-{size}", size) for size in SIZES), ("tail", TAIL_STORED)):
        for batch in _batches(_records(settings["namespace"], agent_id, size)):
            store.write_records(batch)
    store.close()
    with SkialithAgent("tail", **settings) as agent:
        agent.save_events([(f"tail-{n}", PAYLOAD) for n in range(TAIL)])
        agent.checkpoint(1, STATE)


def _records(namespace: str, agent_id: str, events: int) -> Iterator[Record]:
    body, state = ormsgpack.packb(PAYLOAD), ormsgpack.packb(STATE)
    ids = (f"e{n}" for n in range(events))
    keys = sorted((_fastpath.event_key(namespace, agent_id, event_id), event_id) for event_id in ids)
    for n, (key, event_id) in enumerate(keys):
        rest = (TIME_NS // 1000 + n, Codec.MSGPACK)
        at = Position(TIME_NS + 1000 * n, n + 1)
        yield Record(Kind.EVENT, namespace, agent_id, event_id, key, 0, "thought", *rest, body, at)
        if n % EVENTS_OF_A_CHECKPOINT == 0:
            yield Record(Kind.CHECKPOINT, namespace, agent_id, "", key, n, "", *rest, state, at)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    while batch := list(itertools.islice(records, BATCH)):
        yield batch


def resumes(settings: dict[str, Any], agent_ids: list[str], calls: int) -> dict[str, list[float]]:
    """Seconds of each resume(), the agents taking turns."""
    taken: dict[str, list[float]] = {agent_id: [] for agent_id in agent_ids}
    with SkialithAgent("keeps-the-runtime", **settings):
        for turn, agent_id in itertools.product(range(calls + 5), agent_ids):
            with SkialithAgent(agent_id, **settings) as agent:
                seconds = timed(agent.resume, 1)
            if turn >= 5:
                taken[agent_id] += seconds
    return taken


def pages(settings: dict[str, Any], agent_ids: list[str], calls: int) -> dict[str, list[float]]:
    """Seconds until the first page of history() is read."""
    taken: dict[str, list[float]] = {agent_id: [] for agent_id in agent_ids}
    with ExitStack() as stack:
        agents = [stack.enter_context(SkialithAgent(agent_id, **settings)) for agent_id in agent_ids]
        for turn, agent in itertools.product(range(calls + 2), agents):
            seconds = timed(lambda agent=agent: list(agent.history(limit=PAGE)), 1)  # type: ignore[misc]
            if turn >= 2:
                taken[agent.agent_id] += seconds
    return taken


def whole(settings: dict[str, Any], agent_id: str, expected: int) -> float:
    """Events per second of a whole history()."""
    with SkialithAgent(agent_id, **settings) as agent:
        began = time.perf_counter()
        count = sum(1 for _ in agent.history())
        seconds = time.perf_counter() - began
    assert count == expected, (count, expected)
    return count / seconds


# ---- in the bench


@pytest.mark.parametrize("kind", NAMES)
def test_reading(
    benchmark: BenchmarkFixture, kind: str, nats: NatsServer, mariadb: MariaDB, tmp_path: Path, report: Report
) -> None:
    settings = {
        "nats_url": nats.url,
        "database_url": mariadb.url("reading") if kind == "mariadb" else f"sqlite:///{tmp_path / 'reading.db'}",
        "namespace": f"reading-{kind}",
        "wal_bytes": 2**30,
        "writer": "off",
    }
    sizes = {**{f"stored-{size}": size for size in SIZES}, "tail": TAIL_STORED + TAIL}
    resumed: dict[str, Samples] = {}
    paged: dict[str, Samples] = {}
    rates: dict[str, list[float]] = {agent_id: [] for agent_id in sizes}
    with Child() as child:
        child.run(fill, settings)

        def take_round() -> None:
            collect(resumed, child.run(resumes, settings, list(sizes), RESUMES))
            collect(paged, child.run(pages, settings, list(sizes), PAGES))
            for agent_id, size in sizes.items():
                if size < 1_000_000 or not rates[agent_id]:
                    rates[agent_id].append(child.run(whole, settings, agent_id, size))

        benchmark.pedantic(take_round, rounds=FEW_ROUNDS, iterations=1)
    _report_rows(report, NAMES[kind], resumed, paged, rates)
    if kind == "mariadb" and SIZES[-1] == 1_000_000:
        report.bar("resume", max(samples.at(50) for samples in resumed.values()) * 1e3)
        report.bar("resume flat", resumed[f"stored-{SIZES[-1]}"].over(resumed[f"stored-{SIZES[0]}"], 50))


def _report_rows(
    report: Report, name: str, resumed: dict[str, Samples], paged: dict[str, Samples], rates: dict[str, list[float]]
) -> None:
    smallest = f"stored-{SIZES[0]}"
    for question, found in (("resume(), claiming the agent", resumed), (f"history(), the first {PAGE} events", paged)):
        for agent_id, samples in found.items():
            ratio = f"{samples.over(found[smallest], 50):.2f} x {SIZES[0]} events"
            report.latency(f"{question}, {name} ({FEW_ROUNDS} rounds)", _label(agent_id), samples, "", ratio)
    for agent_id, each in rates.items():
        question = f"history(), all of it, {name} ({FEW_ROUNDS} rounds; 10^6 events once)"
        report.figure(question, _label(agent_id), rate(statistics.median(each), "events"))


def _label(agent_id: str) -> str:
    if agent_id == "tail":
        return f"{TAIL_STORED:,} events stored, {TAIL:,} and a checkpoint in the log"
    return f"{int(agent_id.removeprefix('stored-')):,} events stored"
