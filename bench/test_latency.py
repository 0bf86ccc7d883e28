"""Question: what does an acknowledged event cost beside the network floor and beside the INSERT it replaces?

All ways take turns, record by record, in one run on one machine. The floor is a blocking socket: HPUB, read the PubAck. The
peer is an autocommitted mysqlclient INSERT of the same row. Every way gets the same 200-byte payload.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import MySQLdb
from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer

from .conftest import Row, percentiles
from .floor import RawPublisher

ROUNDS = 3000
WARM_UP = 300
QUESTION = f"One acknowledged event of 200 bytes, {ROUNDS} of each, interleaved (us)"


def _inserter(url: str) -> tuple[Any, Callable[[bytes], None]]:
    from urllib.parse import parse_qs, unquote, urlsplit

    parts = urlsplit(url)
    options = {name: values[0] for name, values in parse_qs(parts.query).items()}
    connection = MySQLdb.connect(
        host=parts.hostname or "127.0.0.1",
        port=parts.port or 3306,
        user=unquote(parts.username or "root"),
        password=unquote(parts.password or ""),
        database=parts.path.lstrip("/"),
        **{name: value for name, value in options.items() if name == "unix_socket"},
    )
    connection.autocommit(True)
    cursor = connection.cursor()
    cursor.execute(
        "CREATE TABLE bench_insert (id BINARY(16) PRIMARY KEY, agent VARBINARY(64), body BLOB) ENGINE=InnoDB"
    )

    def insert(body: bytes) -> None:
        cursor.execute("INSERT INTO bench_insert VALUES (%s, %s, %s)", (os.urandom(16), b"agent", body))

    return connection, insert


def test_latency(
    benchmark: BenchmarkFixture, nats: NatsServer, mariadb: MariaDB, tmp_path: Path, table: list[Row]
) -> None:
    text = secrets.token_hex(90)
    payload = {"kind": "thought", "text": text}
    raw = RawPublisher(nats.url)
    raw.request(
        "$JS.API.STREAM.CREATE.FLOOR",
        b'{"name":"FLOOR","subjects":["floor.>"],"storage":"file","discard":"new","max_bytes":1000000000}',
    )
    connection, insert = _inserter(mariadb.url("bench"))
    database_url = f"sqlite:///{tmp_path / 'bench.db'}"
    agent = SkialithAgent("bench", nats_url=nats.url, database_url=database_url, namespace="latency", wal_bytes=2**30)
    quiet = SkialithAgent("quiet", nats_url=nats.url, namespace="quiet", writer="off", wal_bytes=2**30)
    for each in (agent, quiet):
        each.resume()
    numbers = iter(range(10**9))
    body = b"x" * 200
    ways: dict[str, tuple[Callable[[], object], str]] = {
        "raw socket (floor)": (lambda: raw.append("floor.a", os.urandom(16), body), "process crash (no sync)"),
        "save_event, fenced, writer elsewhere": (
            lambda: quiet.save_event(f"e{next(numbers)}", payload),
            "process crash (no sync)",
        ),
        "save_event, fenced, writer in process": (
            lambda: agent.save_event(f"e{next(numbers)}", payload),
            "process crash (no sync)",
        ),
        "mysqlclient INSERT, autocommit": (lambda: insert(body), "power loss (MariaDB defaults, redo log synced)"),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}

    def rounds() -> None:
        for n in range(ROUNDS + WARM_UP):
            for name, (call, _) in ways.items():
                began = time.perf_counter()
                call()
                if n >= WARM_UP:
                    taken[name].append(time.perf_counter() - began)

    benchmark.pedantic(rounds, rounds=1, iterations=1)
    floor = percentiles(taken["raw socket (floor)"])[0]
    for name, (_, durability) in ways.items():
        p50, p95, p99 = percentiles(taken[name])
        figures = f"p50 {p50:7.0f}  p95 {p95:7.0f}  p99 {p99:7.0f}  {p50 / floor:5.2f} x floor"
        table.append(Row(QUESTION, name, figures, durability))
    agent.close()
    quiet.close()
    raw.close()
    connection.close()
