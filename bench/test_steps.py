"""Question: what does a step that does nothing cost with agent.step, beside a DBOS step and beside save_event?

Three processes take turns in short blocks: Skialith's, and one of DBOS on each of its databases. DBOS's steps run inside a
workflow, since outside of one they are plain calls; only the steps are timed. Each block is a new run of a new agent, or a new
workflow.
"""

from __future__ import annotations

import itertools
import random
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from tests.fixtures.nats import NatsServer

from .child import Child
from .conftest import versions
from .measure import BLOCK, BLOCK_WARM_UP, ROUNDS, Call, Samples, collect, scaled, timed
from .postgres import Postgres
from .report import NO_SYNC, SQLITE_FULL, SYNC_ALWAYS, WAL_SYNCED, Report
from .sides import PAYLOAD

BLOCKS = scaled(5, least=1)
QUESTION = f"A step that does nothing ({ROUNDS} rounds of {BLOCKS * BLOCK} calls)"
STEP, SAVE, SYNCED_STEP = "agent.step", "save_event", "agent.step, sync_interval: always"
DBOS_POSTGRES, DBOS_SQLITE = "DBOS step, PostgreSQL", "DBOS step, SQLite"
SURVIVES = {
    STEP: NO_SYNC,
    SAVE: NO_SYNC,
    SYNCED_STEP: SYNC_ALWAYS,
    DBOS_POSTGRES: WAL_SYNCED,
    DBOS_SQLITE: SQLITE_FULL,
}

_stack = ExitStack()


def nothing() -> None:
    """What every step does."""


# ---- in Skialith's child

_sides: dict[str, tuple[Callable[[SkialithAgent], Call], dict[str, Any]]] = {}
_numbers = itertools.count()


def open_skialith(nats_url: str, synced_url: str) -> None:
    """On each server an agent stays open, which keeps the runtime."""
    near, synced = ({"nats_url": url, "writer": "off", "wal_bytes": 2**30} for url in (nats_url, synced_url))
    for settings in (near, synced):
        settings["namespace"] = f"b{secrets.token_hex(6)}"
        _stack.enter_context(SkialithAgent("keeps-the-runtime", **settings))
    _sides.update({STEP: (_step, near), SAVE: (_save, near), SYNCED_STEP: (_step, synced)})


def _step(agent: SkialithAgent) -> Call:
    return lambda: agent.step("nothing", nothing)


def _save(agent: SkialithAgent) -> Call:
    return lambda: agent.save_event(f"e{next(_numbers)}", PAYLOAD)


def skialith_block(name: str) -> list[float]:
    """Seconds of each call of a new agent."""
    way, settings = _sides[name]
    with SkialithAgent(f"run-{next(_numbers)}", **settings) as agent:
        agent.resume()
        return _timed_block(way(agent))


def _timed_block(call: Call) -> list[float]:
    return timed(call, BLOCK_WARM_UP + BLOCK)[BLOCK_WARM_UP:]


# ---- in a child of DBOS

_workflow: list[Callable[[], list[float]]] = []


def open_dbos(url: str) -> str:
    """Start DBOS on its system database; returns what it runs with, for the report."""
    from dbos import DBOS

    dbos = DBOS(config={"name": "bench", "system_database_url": url, "log_level": "ERROR"})
    step = DBOS.step(name="nothing")(nothing)
    _workflow.append(DBOS.workflow(name="block")(lambda: _timed_block(step)))
    DBOS.launch()
    _stack.callback(DBOS.destroy)
    if not url.startswith("sqlite"):
        return ""
    with dbos._sys_db.engine.connect() as connection:
        names = ("journal_mode", "synchronous")
        settings = (f"{name}={connection.exec_driver_sql(f'PRAGMA {name}').scalar()}" for name in names)
        return ", ".join(settings)


def dbos_block() -> list[float]:
    """Seconds of each step of one workflow."""
    return _workflow[0]()


def close_side() -> None:
    _stack.close()


# ---- in the bench


def test_steps(
    benchmark: BenchmarkFixture,
    nats: NatsServer,
    synced_nats: NatsServer,
    postgres: Postgres,
    tmp_path: Path,
    report: Report,
) -> None:
    taken: dict[str, Samples] = {}
    with ExitStack() as stack:
        ours, dbos_postgres, dbos_sqlite = (stack.enter_context(Child()) for _ in range(3))
        ours.run(open_skialith, nats.url, synced_nats.url)
        dbos_postgres.run(open_dbos, postgres.url("dbos"))
        report.facts["DBOS"] = versions("dbos", "SQLAlchemy", "psycopg")
        report.facts["DBOS on SQLite"] = dbos_sqlite.run(open_dbos, f"sqlite:///{tmp_path / 'dbos.db'}")
        sides: dict[str, Callable[[], list[float]]] = {
            **{name: partial(ours.run, skialith_block, name) for name in (STEP, SAVE, SYNCED_STEP)},
            DBOS_POSTGRES: partial(dbos_postgres.run, dbos_block),
            DBOS_SQLITE: partial(dbos_sqlite.run, dbos_block),
        }
        shuffle = random.Random(QUESTION).shuffle

        def take_blocks(count: int) -> dict[str, list[float]]:
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(count):
                order = list(sides)
                shuffle(order)
                for name in order:
                    seconds[name] += sides[name]()
            return seconds

        take_blocks(1)  # the warm-up
        benchmark.pedantic(lambda: collect(taken, take_blocks(BLOCKS)), rounds=ROUNDS, iterations=1)
        for child in (ours, dbos_postgres, dbos_sqlite):
            child.run(close_side)
    for name, samples in taken.items():
        report.latency(QUESTION, name, samples, SURVIVES[name], f"{samples.over(taken[STEP], 50):.2f} x {STEP}")
    report.bar("step postgres", taken[DBOS_POSTGRES].over(taken[STEP], 50))
    report.bar("step sqlite", taken[DBOS_SQLITE].over(taken[STEP], 50))
