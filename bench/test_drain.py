"""Question: how many records per second does the writer move from the log into the database, traces included and not?"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer

from .report import NO_SYNC, Report, rate

RECORDS = 20_000
QUESTION = f"Draining {RECORDS} events of 200 bytes that wait in the log (records/s until the last commit)"


@pytest.mark.parametrize("kind", ["sqlite", "mariadb"])
def test_drain(
    benchmark: BenchmarkFixture, kind: str, nats: NatsServer, mariadb: MariaDB, tmp_path: Path, report: Report
) -> None:
    url = f"sqlite:///{tmp_path / 'drain.db'}" if kind == "sqlite" else mariadb.url("drain")
    settings = {"nats_url": nats.url, "database_url": url, "namespace": f"drain-{kind}", "wal_bytes": 2**30}
    filler = SkialithAgent("filler", writer="off", **settings)
    body = {"kind": "thought", "text": "x" * 180}
    filler.save_events([(f"e{n}", body) for n in range(RECORDS)])

    def drain() -> float:
        began = time.perf_counter()
        with SkialithAgent("drainer", timeout=25, **settings):
            filler.flush(timeout=120)
            return time.perf_counter() - began

    seconds = benchmark.pedantic(drain, rounds=1, iterations=1)
    filler.close()
    synced = "MariaDB defaults (redo log synced)" if kind == "mariadb" else "SQLite WAL, synchronous=NORMAL"
    report.figure(QUESTION, f"writer and trace_ingest into {kind}", rate(RECORDS / seconds), synced)


def test_batch_append(benchmark: BenchmarkFixture, nats: NatsServer, report: Report) -> None:
    agent = SkialithAgent("batch", nats_url=nats.url, namespace="batch", writer="off", wal_bytes=2**30)
    agent.resume()
    body = {"kind": "thought", "text": "x" * 180}
    events = [(f"e{n}", body) for n in range(RECORDS)]

    def append() -> float:
        began = time.perf_counter()
        agent.save_events(events)
        return time.perf_counter() - began

    seconds = benchmark.pedantic(append, rounds=1, iterations=1)
    agent.close()
    question = f"Appending {RECORDS} events of 200 bytes with one save_events, fenced (records/s until the last PubAck)"
    report.figure(question, "save_events", rate(RECORDS / seconds), NO_SYNC)
