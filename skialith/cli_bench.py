"""The bench command: what an acknowledged event costs on these servers, beside a plain INSERT into this database."""

from __future__ import annotations

import itertools
import os
import secrets
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from .cli_place import own_directory, remove_streams
from .cli_read import DURABILITY, Json
from .cli_settings import agent_of, takes_settings
from .cli_show import console, emit, say, show, table
from .cli_sql import sqlite_file
from .config import Config
from .runtime import acquire
from .stores.mysql import MySqlStore
from .urls import redact

_ROUNDS = 3
_BLOCK = 50
_WARM_UP = 5
"""Calls at the start of a block that are not counted: they find the caches full of the other side."""
_DATA = {"kind": "thought", "text": "x" * 180}
_BODY = b"x" * 200
_RECORD_BYTES = 2048
"""More than one event takes in the log."""
_CREATE = "CREATE TABLE {} (id INTEGER PRIMARY KEY {}, agent_id VARCHAR(64), event_id VARCHAR(64), body BLOB)"
_SURVIVES = {"process": "kill -9", "power": "kill -9, power loss"}
_INSERT = "INSERT INTO {} (agent_id, event_id, body) VALUES (?, ?, ?)"


@dataclass
class Side:
    """One way to have an event acknowledged. ``survives``: as the setting ``durability``; ``why``: the settings behind it."""

    name: str
    survives: str
    why: str
    call: Callable[[], object]
    rounds: list[list[float]] = field(default_factory=list)

    def at(self, percent: int) -> float:
        """Median over the rounds of their percentile, in microseconds."""
        cuts = (statistics.quantiles(each, n=100, method="inclusive") for each in self.rounds)
        return statistics.median(cut[percent - 1] for cut in cuts) * 1e6


@takes_settings
def bench(
    config: Config,
    calls: Annotated[int, typer.Option("--calls", min=100, max=20_000, help="Calls of each side in a round.")] = 1000,
    as_json: Json = False,
) -> None:
    """Measure save_event beside a plain INSERT, on your servers.

    Both take turns in one run. It works in a namespace, a table and a directory of its own, on the same servers and disk,
    and removes them. Without a NATS server it starts an embedded one, without a database it inserts into a SQLite file.
    """
    with _place(config, calls) as placed, ExitStack() as stack:
        with console(error=True).status("measuring"):
            version, save = stack.enter_context(_save_event(placed))
            sides = [save, *stack.enter_context(_inserts(config, Path(placed.directory)))]
            for _ in range(_ROUNDS):
                _take_turns(sides, calls)
        about = _about(config, version)
    if as_json:
        emit({"calls": calls, "rounds": _ROUNDS, "sides": [_document(side) for side in sides], **about})
    else:
        _say(sides, calls, about)


def _take_turns(sides: list[Side], calls: int) -> None:
    taken: list[list[float]] = [[] for _ in sides]
    while (left := calls - len(taken[0])) > 0:
        for side, seconds in zip(sides, taken, strict=True):
            for _ in range(_WARM_UP):
                side.call()
            for _ in range(min(_BLOCK, left)):
                began = time.perf_counter()
                side.call()
                seconds.append(time.perf_counter() - began)
    for side, seconds in zip(sides, taken, strict=True):
        side.rounds.append(seconds)


# ---- where it happens


@contextmanager
def _place(config: Config, calls: int) -> Iterator[Config]:
    """Settings that leave nothing behind, on the disk and the servers of those given."""
    file = sqlite_file(config)
    below = file.parent if file is not None else config.path if config.embedded else None
    while below is not None and not below.exists():
        below = below.parent
    with own_directory(".skialith-bench-", below) as directory:
        placed = replace(
            config,
            directory=str(directory),
            database_url=f"sqlite:///{quote(str(directory / 'empty.db'))}",  # resume() looks for a past that is not there
            namespace=f"bench-{secrets.token_hex(6)}",
            wal_bytes=64 * 1024 * 1024 + _ROUNDS * calls * _RECORD_BYTES,
        )
        try:
            yield placed
        finally:
            if not config.embedded:
                remove_streams(placed)


# ---- the sides


@contextmanager
def _save_event(config: Config) -> Iterator[tuple[str, Side]]:
    """The server's version, and the agent's call; the agent owns itself, and no writer runs here."""
    engine = acquire(config)
    try:
        with agent_of(engine, "bench") as agent:
            agent.resume()
            numbers = itertools.count()
            why = f"durability={config.durability}"
            if config.replicas > 1:
                why += f", {config.replicas} replicas"
            yield (
                engine.wal.status(config.timeout).server_version,
                Side(
                    "save_event (NATS PubAck)",
                    config.durability,
                    why,
                    lambda: agent.save_event(f"e{next(numbers)}", _DATA),
                ),
            )
    finally:
        engine.release()


@contextmanager
def _inserts(config: Config, directory: Path) -> Iterator[list[Side]]:
    """A plain INSERT into the database of these settings; for SQLite as it comes, and in the mode that Skialith uses."""
    if sqlite_file(config) is None:
        with _mysql_insert(config) as side:
            yield [side]
        return
    with ExitStack() as stack:
        default = stack.enter_context(closing(sqlite3.connect(directory / "default.db", isolation_level=None)))
        wal = stack.enter_context(closing(sqlite3.connect(directory / "wal.db", isolation_level=None)))
        wal.execute("PRAGMA journal_mode = WAL")
        wal.execute("PRAGMA synchronous = NORMAL")
        name = "INSERT, sqlite3, autocommit"
        yield [
            Side(f"{name}, SQLite's defaults", "power", "journal_mode=DELETE, synchronous=FULL", _sqlite_call(default)),
            Side(f"{name}, WAL mode", "process", "journal_mode=WAL, synchronous=NORMAL", _sqlite_call(wal)),
        ]


def _sqlite_call(connection: sqlite3.Connection) -> Callable[[], object]:
    connection.execute(_CREATE.format("events", ""))
    insert, numbers = _INSERT.format("events"), itertools.count()
    return lambda: connection.execute(insert, ("bench", f"e{next(numbers)}", _BODY))


@contextmanager
def _mysql_insert(config: Config) -> Iterator[Side]:
    """In a table of its own, by a session in autocommit."""
    store = MySqlStore(config.store_url)
    name = f"skialith_bench_{secrets.token_hex(6)}"
    try:
        with store.reading() as session:
            session.run(_CREATE.format(name, "AUTO_INCREMENT"))
            try:
                insert, numbers = _INSERT.format(name), itertools.count()
                survives, why = _mysql_durability(session)
                yield Side(
                    "INSERT, mysqlclient, autocommit",
                    survives,
                    why,
                    lambda: session.run(insert, ("bench", f"e{next(numbers)}", _BODY)),
                )
            finally:
                session.run(f"DROP TABLE {name}")
    finally:
        store.close()


def _mysql_durability(session: Any) -> tuple[str, str]:
    """What a commit survives. A binary log that is not synced may take commits back: recovery follows it."""
    flush, binlog, sync = session.rows("SELECT @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog")[0]
    survives = "power" if flush == 1 and (not binlog or sync == 1) else "process"
    binlog_text = f"sync_binlog={sync}" if binlog else "no binlog"
    return survives, f"innodb_flush_log_at_trx_commit={flush}, {binlog_text}"


# ---- what is said


def _about(config: Config, version: str) -> dict[str, str]:
    nats = "embedded" if config.embedded else ", ".join(map(redact, (config.nats_url or "").split(",")))
    loop = "uvloop" if find_spec("uvloop") is not None else "asyncio"
    return {
        "nats": f"nats-server {version} ({nats})",
        "database": redact(config.store_url),
        "client": f"{loop}, {os.cpu_count()} CPUs",
    }


def _document(side: Side) -> dict[str, Any]:
    times = {f"p{percent}_us": round(side.at(percent), 1) for percent in (50, 95, 99)}
    return {"name": side.name, **times, "survives": side.survives, "because": side.why}


def _say(sides: list[Side], calls: int, about: dict[str, str]) -> None:
    say(f"One event of 200 bytes, in turns; medians of {_ROUNDS} rounds of {calls:,} calls of each\n")
    shown = table("", "p50", "p95", "p99", "SURVIVES", "SAID BY", right=("p50", "p95", "p99"))
    for side in sides:
        times = (f"{side.at(percent):,.0f} us" for percent in (50, 95, 99))
        shown.add_row(side.name, *times, _SURVIVES[side.survives], side.why)
    show(shown)
    say()
    save, *others = sides
    for other in others:
        say(
            f"{other.name}: {other.at(50) / save.at(50):.1f} times save_event at p50, {other.at(99) / save.at(99):.1f} at p99"
        )
    say(f"durability {save.survives!r}: {DURABILITY[save.survives]}")
    for name, value in about.items():
        say(f"{name}: {value}", style="dim")
