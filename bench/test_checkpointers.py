"""Question: what do a graph's checkpoints cost with SkialithCheckpointer, beside the savers of PostgreSQL, MySQL and SQLite?

Every saver has a process of its own; they take turns in short blocks, and each is idle while it is another one's turn. A block
goes on with a graph's run as LangGraph does (put_writes, put, put_writes, ...) and then reads the latest checkpoints. Only the
calls are timed. A thread of 10 checkpoints is a new one that grows to 20; a thread of 1,000 goes on growing through the rounds.

Skialith remembers the latest checkpoints that it read lately; "as in a new process" makes it forget before each call.

Skialith stores into MariaDB. With the writer off nothing is stored during a block's calls, and all of it before the last reads.
PostgreSQL's statistics are brought up to date before the reads, as autovacuum would within a minute: without them it reads at
half the speed.
"""

from __future__ import annotations

import itertools
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer

from .child import Child
from .conftest import versions
from .graph_run import GraphRun, Shape
from .measure import BLOCK_WARM_UP, FEW_ROUNDS, Samples, collect, scaled
from .postgres import Postgres
from .report import NO_SYNC, REDO_SYNCED, SQLITE_FULL, SYNC_ALWAYS, WAL_SYNCED, Report
from .savers import WAYS, Opened

SHORT, LONG = 10, 1000
BLOCK = 50
BLOCKS = scaled(2, least=1)

PACKAGES = (
    "langgraph-checkpoint",
    "langgraph-checkpoint-postgres",
    "langgraph-checkpoint-mysql",
    "langgraph-checkpoint-sqlite",
    "psycopg",
    "PyMySQL",
)

OURS = "SkialithCheckpointer"
SKIALITH, BUSY, SYNCED = f"{OURS}, writer off", f"{OURS}, writer on", f"{OURS}, sync_interval: always"
POSTGRES, MYSQL, SQLITE = "PostgresSaver", "PyMySQLSaver", "SqliteSaver"
SURVIVES = {
    SKIALITH: NO_SYNC,
    BUSY: NO_SYNC,
    SYNCED: SYNC_ALWAYS,
    POSTGRES: WAL_SYNCED,
    MYSQL: REDO_SYNCED,
    SQLITE: SQLITE_FULL,
}

PUT, PUT_WRITES, GET, GET_FRESH = "put", "put_writes", "get_tuple", "get_tuple, not stored yet"
GET_ANEW = "get_tuple, as in a new process"
CALLS = (PUT, PUT_WRITES, GET, GET_ANEW, GET_FRESH)
READS: dict[str, tuple[str, ...]] = {SKIALITH: (GET_FRESH, GET, GET_ANEW), BUSY: (), SYNCED: ()}
"""What is read with whom; ``GET`` alone with all others."""


class Case(NamedTuple):
    """A state, and how long its thread is."""

    state: str
    shape: Shape
    checkpoints: int

    @property
    def question(self) -> str:
        length = f"a thread of {self.checkpoints:,} checkpoints"
        return f"LangGraph: a state of {self.state}, {length} ({FEW_ROUNDS} rounds of {BLOCKS * BLOCK} calls)"


SMALL, GROWING, REPLACED = "2 KB", "200 KB, 2 KB of it change", "200 KB, all of it changes"
CASES = [
    Case(SMALL, Shape(documents=False), SHORT),
    Case(SMALL, Shape(documents=False), LONG),
    Case(GROWING, Shape(documents=True), SHORT),
    Case(GROWING, Shape(documents=True), LONG),
    Case(REPLACED, Shape(documents=True, replaced=True), SHORT),
]


# ---- in the child

_stack = ExitStack()
_opened: list[Opened] = []
_long: dict[Case, GraphRun] = {}


def open_side(way: str, *where: str) -> None:
    _opened.append(_stack.enter_context(WAYS[way](*where)))


def close_side() -> None:
    _stack.close()


def sqlite_settings() -> str:
    """How the SqliteSaver of this process runs."""
    connection = _opened[0].saver.conn  # type: ignore[attr-defined]
    mode, synchronous = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous"))
    return f"journal_mode={mode}, synchronous={synchronous}"


def fill() -> None:
    """Bring the threads that are long to their length."""
    for case in (case for case in CASES if case.checkpoints == LONG):
        _long[case] = _new_run(case)
    _opened[0].settle()


def _new_run(case: Case) -> GraphRun:
    run = GraphRun(_opened[0].saver, secrets.token_hex(8), case.shape)
    _opened[0].saver.put(*run.put())
    _go_on(run, case.checkpoints - 1, {PUT: [], PUT_WRITES: []})
    return run


def _go_on(run: GraphRun, steps: int, taken: dict[str, list[float]]) -> None:
    saver = _opened[0].saver
    for _ in range(steps):
        taken[PUT_WRITES].append(_seconds(saver.put_writes, *run.put_writes()))
        taken[PUT].append(_seconds(saver.put, *run.put()))


def _seconds(call: Callable[..., object], *args: Any) -> float:
    began = time.perf_counter()
    call(*args)
    return time.perf_counter() - began


def block(case: Case, reads: tuple[str, ...]) -> dict[str, list[float]]:
    """Seconds of each of ``BLOCK`` calls of every kind."""
    taken: dict[str, list[float]] = {PUT_WRITES: [], PUT: []}
    runs = [_long[case]] if case in _long else [_new_run(case) for _ in range(BLOCK // SHORT)]
    for run in runs:
        _go_on(run, BLOCK_WARM_UP if case in _long else 0, {PUT: [], PUT_WRITES: []})
        _go_on(run, BLOCK // len(runs), taken)
    if GET_FRESH in reads:
        taken[GET_FRESH] = _read(runs)
    _opened[0].settle()
    if GET in reads:
        taken[GET] = _read(runs)
    if GET_ANEW in reads:
        taken[GET_ANEW] = _read(runs, anew=True)
    return taken


def _read(runs: list[GraphRun], *, anew: bool = False) -> list[float]:
    saver = _opened[0].saver
    taken = []
    for n in range(BLOCK_WARM_UP + BLOCK):
        config = runs[n % len(runs)].config()
        if anew:
            _opened[0].forget(config["configurable"]["thread_id"])
        taken.append(_seconds(saver.get_tuple, config))
    for run in runs:
        found = saver.get_tuple(run.config())
        assert found is not None and found.checkpoint["id"] == run.checkpoint_id
        assert found.checkpoint["channel_values"] == run.values
    return taken[BLOCK_WARM_UP:]


# ---- in the bench


@pytest.fixture(scope="module")
def children(
    nats: NatsServer,
    synced_nats: NatsServer,
    mariadb: MariaDB,
    postgres: Postgres,
    tmp_path_factory: pytest.TempPathFactory,
    report: Report,
) -> Iterator[dict[str, Child]]:
    """A process for each saver, with the saver open."""
    names = itertools.count()

    def store() -> str:
        return mariadb.url(f"checkpoints_{next(names)}")

    sides: dict[str, tuple[str, ...]] = {
        SKIALITH: ("skialith", nats.url, store(), "off"),
        BUSY: ("skialith", nats.url, store(), "on"),
        SYNCED: ("skialith", synced_nats.url, store(), "off"),
        POSTGRES: ("postgres", postgres.url("checkpoints")),
        MYSQL: ("mysql", store()),
        SQLITE: ("sqlite", str(tmp_path_factory.mktemp("sqlite") / "checkpoints.db")),
    }
    with ExitStack() as stack:
        opened = {name: stack.enter_context(Child()) for name in sides}
        for name, where in sides.items():
            opened[name].run(open_side, *where)
            opened[name].run(fill)
        report.facts["SqliteSaver"] = opened[SQLITE].run(sqlite_settings)
        report.facts["savers"] = versions(*PACKAGES)
        yield opened
        for child in opened.values():
            child.run(close_side)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.state}-{case.checkpoints}")
def test_checkpointers(benchmark: BenchmarkFixture, case: Case, children: dict[str, Child], report: Report) -> None:
    taken: dict[str, dict[str, Samples]] = {call: {} for call in CALLS}
    shuffle = random.Random(case.question).shuffle

    def take_round() -> None:
        seconds: dict[str, dict[str, list[float]]] = {call: {} for call in CALLS}
        for _ in range(BLOCKS):
            order = list(children)
            shuffle(order)
            for name in order:
                for call, each in children[name].run(block, case, READS.get(name, (GET,))).items():
                    seconds[call].setdefault(name, []).extend(each)
        for call, sides in seconds.items():
            collect(taken[call], sides)

    benchmark.pedantic(take_round, rounds=FEW_ROUNDS, iterations=1)
    _report(report, case, taken)


def _report(report: Report, case: Case, taken: dict[str, dict[str, Samples]]) -> None:
    for call, sides in taken.items():
        for name in (name for name in SURVIVES if name in sides):
            survives = SURVIVES[name] if call in (PUT, PUT_WRITES) else ""
            ratio = (
                f"{sides[name].over(taken[GET if call in (GET_FRESH, GET_ANEW) else call][SKIALITH], 50):.2f} x {OURS}"
            )
            label = OURS if name == SKIALITH and call in (GET, GET_FRESH, GET_ANEW) else name
            report.latency(case.question, f"{call}, {label}", sides[name], survives, ratio)
    report.bar(f"put postgres {case.state}", taken[PUT][POSTGRES].over(taken[PUT][SKIALITH], 50))
    report.bar(f"put mysql {case.state}", taken[PUT][MYSQL].over(taken[PUT][SKIALITH], 50))
    report.bar(f"get_tuple {case.state}", taken[GET][SKIALITH].over(taken[GET][POSTGRES], 50))
