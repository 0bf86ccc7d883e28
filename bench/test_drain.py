"""Question: how fast does the writer move records from the log into the database, beside the same rows inserted in bulk?

The writer runs in a process of its own, as `skialith writer` does; the time runs from before it opens until the last row can
be read. The ceiling is one connection that sends ready-made multi-row INSERTs of the very same rows into the same, empty
tables, each statement a transaction.
"""

from __future__ import annotations

import itertools
import sqlite3
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from tests.fixtures.command import skialith
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer
from tests.fixtures.stores import outside

from .child import Child
from .measure import FEW_ROUNDS, median_ratio, scaled
from .report import REDO_SYNCED, SQLITE_NORMAL, Report, rate
from .sides import PAYLOAD

RECORDS = scaled(60_000)
ROWS_OF_A_STATEMENT = 500
QUESTION = f"Draining {RECORDS} events of 200 bytes out of the log, until the last is stored ({FEW_ROUNDS} rounds)"
EVENTS, TRACES = "agent_events", "agent_traces"
WAIT_SECONDS = 240.0


class Target(NamedTuple):
    """Which database, and whether the namespace has traces."""

    kind: str
    tables: tuple[str, ...]

    @property
    def label(self) -> str:
        name = "MariaDB" if self.kind == "mariadb" else "SQLite"
        return f"{name}, {'both tables' if TRACES in self.tables else 'agent_events alone'}"


TARGETS = [Target(kind, tables) for kind in ("mariadb", "sqlite") for tables in ((EVENTS,), (EVENTS, TRACES))]


# ---- in the child

_writers: list[SkialithAgent] = []


def open_writer(settings: dict[str, Any]) -> None:
    """Start the writer of a namespace."""
    _writers.append(SkialithAgent("writer", writer="on", **settings))


def close_writer() -> None:
    _writers.pop().close()


# ---- in the bench


class Drained:
    """One namespace and its database: what it takes to drain it again and again."""

    def __init__(self, target: Target, nats_url: str, database_url: str, folder: Path) -> None:
        self._target = target
        self._folder = folder
        self._url = database_url
        name = f"drain-{target.kind}-{len(target.tables)}"
        self.settings = {"nats_url": nats_url, "database_url": database_url, "namespace": name, "wal_bytes": 2**30}
        self._filler = SkialithAgent("filler", writer="off", timeout=25, **self.settings)
        self._numbers = itertools.count()
        if TRACES not in target.tables:
            where = ("--nats-url", nats_url, "--database-url", database_url, "--namespace", name)
            done = skialith("traces", "off", *where, cwd=folder)
            assert done.code == 0, done

    def prepare(self, child: Child) -> None:
        """Empty the tables, of what there are, and fill the log."""
        with outside(self._url) as run:
            for table in self._target.tables:
                run(f"DELETE FROM {table}" if self._target.kind == "sqlite" else f"TRUNCATE TABLE {table}")
        number = next(self._numbers)
        self._filler.save_events([(f"{number}-{n}", PAYLOAD) for n in range(RECORDS)])

    def drain(self, child: Child) -> float:
        """Records per second."""
        began = time.perf_counter()
        child.run(open_writer, self.settings)
        self._filler.flush(WAIT_SECONDS)
        self._wait_for(self._target.tables)
        seconds = time.perf_counter() - began
        child.run(close_writer)
        return RECORDS / seconds

    def _wait_for(self, tables: Sequence[str]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        with outside(self._url) as run:
            for table in tables:
                while run(f"SELECT COUNT(*) FROM {table}")[0][0] < RECORDS:
                    assert time.monotonic() < deadline, f"{table} was not full in time"
                    time.sleep(0.01)

    def ceilings(self) -> list[float]:
        """Records per second when the rows that were stored are inserted in bulk; see the two functions below."""
        if self._target.kind == "sqlite":
            return [_sqlite_ceiling(self._url, self._target.tables)]
        return _mysql_ceilings(self._url, self._target.tables)

    def close(self) -> None:
        self._filler.close()


def _mysql_ceilings(url: str, tables: Sequence[str]) -> list[float]:
    """By one connection, and by one for each table at the same time."""
    connections = [_connect(url) for _ in tables]
    statements = [_statements(connection, table) for connection, table in zip(connections, tables, strict=True)]
    ceilings = []
    for parallel in (False, True)[: len(tables)]:
        for table in tables:
            connections[0].query(f"TRUNCATE TABLE {table}")
        began = time.perf_counter()
        if parallel:
            with ThreadPoolExecutor(len(tables)) as pool:
                list(pool.map(_send, connections, statements))
        else:
            for each in statements:
                _send(connections[0], each)
        ceilings.append(RECORDS / (time.perf_counter() - began))
    for connection in connections:
        connection.close()
    return ceilings


def _connect(url: str) -> Any:
    import MySQLdb

    parts = urlsplit(url)
    return MySQLdb.connect(
        host="127.0.0.1",
        port=parts.port or 0,
        user=parts.username or "",
        password=parts.password or "",
        database=parts.path[1:],
        autocommit=True,
        charset="utf8mb4",
        binary_prefix=True,
    )


def _statements(connection: Any, table: str) -> list[bytes]:
    """The table's rows as INSERTs, in the order of the log and in each statement in that of the key."""
    cursor = connection.cursor()
    cursor.execute(f"SELECT * FROM {table} ORDER BY store_time_ns, seq")
    rows = list(cursor.fetchall())
    assert len(rows) == RECORDS
    made = []
    for first in range(0, len(rows), ROWS_OF_A_STATEMENT):
        batch = sorted(rows[first : first + ROWS_OF_A_STATEMENT])
        literals = [b"(" + b", ".join(connection.literal(value) for value in row) + b")" for row in batch]
        made.append(f"INSERT INTO {table} VALUES ".encode() + b", ".join(literals))
    return made


def _send(connection: Any, statements: list[bytes]) -> None:
    for statement in statements:
        connection.query(statement)


def _sqlite_ceiling(url: str, tables: Sequence[str]) -> float:
    """SQLite's fastest way is one prepared statement run many times."""
    connection = sqlite3.connect(urlsplit(url).path[1:], isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    batches: list[tuple[str, list[Any]]] = []
    for table in tables:
        rows = connection.execute(f"SELECT * FROM {table} ORDER BY store_time_ns, seq").fetchall()
        assert len(rows) == RECORDS
        insert = f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})"
        for first in range(0, len(rows), ROWS_OF_A_STATEMENT):
            batches += [(insert, sorted(rows[first : first + ROWS_OF_A_STATEMENT]))]
        connection.execute(f"DELETE FROM {table}")
    began = time.perf_counter()
    for insert, rows in batches:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(insert, rows)
        connection.execute("COMMIT")
    seconds = time.perf_counter() - began
    connection.close()
    return RECORDS / seconds


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_drain(
    benchmark: BenchmarkFixture, target: Target, nats: NatsServer, mariadb: MariaDB, tmp_path: Path, report: Report
) -> None:
    sqlite = f"sqlite:///{tmp_path / 'drain.db'}"
    url = sqlite if target.kind == "sqlite" else mariadb.url(f"drain_{len(target.tables)}")
    drained: list[float] = []
    ceilings: list[list[float]] = []
    with Child() as child:
        namespace = Drained(target, nats.url, url, tmp_path)
        child.run(open_writer, namespace.settings)  # makes the tables
        child.run(close_writer)

        def prepare() -> None:
            if drained:
                ceilings.append(namespace.ceilings())
            namespace.prepare(child)

        benchmark.pedantic(
            lambda: drained.append(namespace.drain(child)), setup=prepare, rounds=FEW_ROUNDS, iterations=1
        )
        ceilings.append(namespace.ceilings())
        namespace.close()
    _report_rows(report, target, drained, [list(each) for each in zip(*ceilings, strict=True)])


def _report_rows(report: Report, target: Target, drained: list[float], ceilings: list[list[float]]) -> None:
    share = median_ratio(drained, ceilings[0])
    survives = SQLITE_NORMAL if target.kind == "sqlite" else REDO_SYNCED
    figure = rate(statistics.median(drained), "events")
    report.figure(QUESTION, f"writer, {target.label}", figure, survives, f"{share:.2f} of the ceiling")
    for each, how in zip(ceilings, ("the same rows in bulk, one connection", "one connection per table"), strict=False):
        report.figure(QUESTION, f"  ceiling: {how}", rate(statistics.median(each), "events"), survives)
    if target.kind == "mariadb" and TRACES in target.tables:
        report.bar("drain both", statistics.median(drained))
    elif target.kind == "mariadb":
        report.bar("drain share", share)
