"""Question: what does the database side of the writer cost, how near is it to the database's limit, and who waits for it?

The log is a list in memory, so that only decoding, rows, statements, JSON and the database are measured.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import threading
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skialith import _fastpath, _rows, payloads, trace_json
from skialith.config import DATABASE_STATEMENT_ROWS, TRACE_JSON_BYTES, TRACE_JSON_DEPTH, WRITER_BATCH_ROWS
from skialith.records import DeadLetter, Message, Position, Record
from skialith.stores import open_store, rows
from skialith.stores.mysql import MySqlStore, _Session
from skialith.stores.sqlite import SqliteStore
from skialith.writer.batch import decode, decode_run
from skialith.writer.drain import Drain
from skialith.writer.sinks import EventSink, Sink, TraceSink, traces_of
from tests.fixtures.mariadb import MariaDB

from .measure import FEW_ROUNDS, Samples, collect, median_ratio
from .report import REDO_SYNCED, SQLITE_NORMAL, Report, duration, rate

NAMESPACE = "rows"
RECORDS = 20_000
STEADY = 10_000
"""Events per second of the writer that is not in a hurry."""


class MemoryLog:
    """A consumer whose messages are all there already; ``pace``: how many of them come per second (None: all at once)."""

    def __init__(self, messages: list[Message], pace: int | None = None) -> None:
        self._messages = messages
        self._pace = pace
        self._at = 0
        self._began = time.monotonic()
        self._done = 0
        self.over = threading.Event()

    def pull(self, rows: int, size: int, linger: float, wait: float) -> list[Message]:
        if self._pace is not None:
            time.sleep(linger)
            rows = min(rows, int((time.monotonic() - self._began) * self._pace) - self._at)
        taken = self._messages[self._at : self._at + rows]
        self._at += len(taken)
        if not taken:
            time.sleep(0.01)
        return taken

    def ack(self, messages: Sequence[Message]) -> None:
        self._done += len(messages)
        if self._done == len(self._messages):
            self.over.set()

    def nak(self, messages: Sequence[Message], delay: float = 0.0) -> None:
        raise AssertionError("nothing fails here")

    def in_progress(self, messages: Sequence[Message]) -> None: ...

    def read_body(self, record: Record) -> bytes:
        raise AssertionError("no record is large here")

    def bury(self, letter: DeadLetter) -> None:
        raise AssertionError("nothing fails here")


def messages(count: int, first: int = 0) -> list[Message]:
    """Events of 200 bytes as the log delivers them."""
    body = payloads.encode({"kind": "thought", "text": "x" * 180})
    made = []
    for n in range(first, first + count):
        key = _fastpath.event_key(NAMESPACE, "agent", f"e{n}")
        data = _fastpath.encode_record(1, "agent", f"e{n}", key, n, "thought", 1_767_225_600_000_000 + n, 0, body, None)
        position = Position(1_767_225_600_000_000_000 + n * 1000, 1_767_225_600_000_000 + n)
        made.append(Message("skialith.rows.log.event.agent", data, position, f"$JS.ACK.{n}", 1, 1))
    return made


@contextmanager
def draining(
    store: MySqlStore | SqliteStore, made: list[Message], pace: int | None = None, tables: int = 2
) -> Iterator[list[MemoryLog]]:
    """The writer's two threads at work."""
    logs = [MemoryLog(made, pace) for _ in range(tables)]
    sinks: list[Sink] = [EventSink(store), TraceSink(store)]
    drains = [Drain(log, sink, NAMESPACE) for log, sink in zip(logs, sinks, strict=False)]
    for drain in drains:
        drain.start()
    try:
        yield logs
    finally:
        for drain in drains:
            assert drain.stop(10)


def drained(store: MySqlStore | SqliteStore, made: list[Message], tables: int = 2) -> float:
    """Events per second."""
    began = time.perf_counter()
    with draining(store, made, tables=tables) as logs:
        for log in logs:
            assert log.over.wait(60)
        return len(made) / (time.perf_counter() - began)


class Recorder:
    """Takes the statements of a session instead of a server."""

    longest_statement = 1 << 22

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def query(self, sql: bytes) -> None:
        self.sent.append(sql)


def bulk(store: MySqlStore, made: list[Message], tables: int) -> float:
    """Events per second of the same statements made beforehand, in the same transactions, one connection per table."""
    work: list[list[list[bytes]]] = [[] for _ in range(tables)]
    for start in range(0, len(made), WRITER_BATCH_ROWS):
        records = [decode(NAMESPACE, message) for message in made[start : start + WRITER_BATCH_ROWS]]
        for table, transactions in enumerate(work):
            recorder = Recorder()
            if table == 0:
                store._insert_records(_Session(recorder), records)
            else:
                store._insert_traces(_Session(recorder), traces_of(records))
            transactions.append(recorder.sent)

    def run(transactions: list[list[bytes]]) -> None:
        with store._pool.connection() as connection:
            for statements in transactions:
                connection.query("START TRANSACTION")
                for statement in statements:
                    connection.query(statement)
                connection.commit()

    threads = [threading.Thread(target=run, args=(transactions,)) for transactions in work]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(made) / (time.perf_counter() - began)


def empty(store: MySqlStore | SqliteStore) -> None:
    """Start again with empty tables: what a full one costs is another question."""
    for table in ("agent_events", "agent_traces"):
        with store.reading() as session:
            session.run(f"{'TRUNCATE' if store.name == 'mysql' else 'DELETE FROM'} {table}")


def lateness(seconds: float) -> list[float]:
    """How late a thread that sleeps 200 us at a time gets to run, in seconds."""
    late = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        time.sleep(0.0002)
        late.append(time.perf_counter() - began - 0.0002)
    return late


def test_per_record(benchmark: BenchmarkFixture, report: Report) -> None:
    """CPU of each step, single-threaded; what holds the GIL and what does not is said beside."""
    batch = messages(WRITER_BATCH_ROWS)
    records = [decode(NAMESPACE, message) for message in batch]
    events, _, _ = rows.of_records(records)
    traces = traces_of(records)
    trace_rows = rows.of_traces(traces)
    packed = [record.body or b"" for record in records]
    value = payloads.decode(0, packed[0])
    few = DATABASE_STATEMENT_ROWS
    steps: dict[str, tuple[int, Callable[[], object], str]] = {
        "decode a message alone": (len(batch), lambda: [decode(NAMESPACE, message) for message in batch], "GIL"),
        "decode a message in a run": (len(batch), lambda: decode_run(NAMESPACE, batch, EventSink.kinds), "GIL"),
        "sort by key": (len(batch), lambda: rows.in_order(records), "GIL in part"),
        "row of an event": (len(batch), lambda: rows.of_records(records), "GIL"),
        "event as SQL": (few, lambda: _rows.insert(b"", b"", events, 0, few, 1 << 22, (), 255), "GIL in part"),
        "payload as JSON": (len(batch), lambda: _rows.json_texts(packed, TRACE_JSON_DEPTH, TRACE_JSON_BYTES), "no GIL"),
        "payload as JSON in Python": (1, lambda: trace_json.to_json(value), "GIL"),
        "trace with its JSON": (len(batch), lambda: traces_of(records), "GIL in part"),
        "row of a trace": (len(batch), lambda: rows.of_traces(traces), "GIL"),
        "trace as SQL": (few, lambda: _rows.insert(b"", b"", trace_rows, 0, few, 1 << 22, (2, 3), 255), "GIL in part"),
    }
    question = "The writer's steps for one event of 200 bytes, CPU (best of 5)"
    for name, (count, step, gil) in steps.items():
        best = min(timeit.repeat(step, number=20, repeat=5)) / 20 / count
        report.figure(question, name, duration(best), ratio=gil)
    benchmark.pedantic(steps["event as SQL"][1], rounds=20, iterations=5)


@pytest.mark.parametrize("tables", [1, 2])
def test_mariadb(benchmark: BenchmarkFixture, mariadb: MariaDB, report: Report, tables: int) -> None:
    """The writer beside the same statements made beforehand, taking turns."""
    store = open_store(mariadb.url(f"rows{tables}"))
    assert isinstance(store, MySqlStore)
    store.migrate()
    made = messages(RECORDS)
    figures: dict[str, list[float]] = {"writer": [], "bulk": []}

    def both() -> None:
        for way, function in (("writer", drained), ("bulk", bulk)):
            empty(store)
            figures[way].append(function(store, made, tables=tables))

    benchmark.pedantic(both, rounds=FEW_ROUNDS, iterations=1)
    store.close()
    what = "agent_events and agent_traces" if tables == 2 else "agent_events alone"
    question = f"{RECORDS} events of 200 bytes from memory into MariaDB ({FEW_ROUNDS} rounds)"
    share = f"{median_ratio(figures['writer'], figures['bulk']):.2f} of them ready-made"
    report.figure(question, what, rate(statistics.median(figures["writer"]), "events"), REDO_SYNCED, share)
    ready = rate(statistics.median(figures["bulk"]), "events")
    report.figure(question, f"  its statements ready-made, {tables} connections at once", ready, REDO_SYNCED)


def test_sqlite(benchmark: BenchmarkFixture, tmp_path: Path, report: Report) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'rows.db'}")
    assert isinstance(store, SqliteStore)
    store.migrate()
    figures: dict[int, list[float]] = {1: [], 2: []}
    numbers = iter(range(0, 10**9, RECORDS))

    def run() -> None:
        for tables, of in figures.items():
            of.append(drained(store, messages(RECORDS, next(numbers)), tables))

    benchmark.pedantic(run, rounds=FEW_ROUNDS, iterations=1)
    store.close()
    for tables, of in figures.items():
        question = f"{RECORDS} events of 200 bytes from memory into SQLite ({FEW_ROUNDS} rounds)"
        what = "agent_events and agent_traces" if tables == 2 else "agent_events alone"
        report.figure(question, what, rate(statistics.median(of), "events"), SQLITE_NORMAL)


@pytest.mark.parametrize("kind", ["mariadb", "sqlite"])
def test_stalls(benchmark: BenchmarkFixture, mariadb: MariaDB, tmp_path: Path, report: Report, kind: str) -> None:
    """How late another thread runs while the writer works; another process shares the processors with it, but no GIL."""
    store: Any = open_store(mariadb.url("stalls") if kind == "mariadb" else f"sqlite:///{tmp_path / 'stalls.db'}")
    store.migrate()
    late: dict[str, Samples] = {}
    numbers = iter(range(0, 10**9, 200_000))

    def look(round_: dict[str, list[float]], way: str, seconds: float) -> None:
        there = pool.apply_async(lateness, (seconds,))
        round_.setdefault(f"{way}, same process", []).extend(lateness(seconds))
        round_.setdefault(f"{way}, another process", []).extend(there.get())

    def run() -> None:
        round_: dict[str, list[float]] = {}
        look(round_, "idle", 0.5)
        for way, count, pace in ((f"{STEADY} events/s", STEADY, STEADY), ("full speed", 3 * RECORDS, None)):
            empty(store)
            made = messages(count, next(numbers))
            gc.freeze()  # so many objects that wait are the bench's own, and must not be looked through
            with draining(store, made, pace) as logs:
                while not all(log.over.is_set() for log in logs):
                    look(round_, way, 0.05)
            gc.unfreeze()
        collect(late, round_)

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(lateness, (0.01,))
        benchmark.pedantic(run, rounds=FEW_ROUNDS, iterations=1)
    store.close()
    question = "How late a thread that sleeps 200 us at a time runs, while the writer stores events and traces"
    for way, samples in late.items():
        worst = max(max(each) for each in samples.rounds)
        report.latency(
            f"{question} ({FEW_ROUNDS} rounds)", f"{kind}, {way}", samples, "", figure=f"max {duration(worst)}"
        )
