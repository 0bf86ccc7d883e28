"""Servers for the benches, and the report at the end: tables, the chart, and the same figures in pytest-benchmark's JSON."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.mariadb import USER, MariaDB
from tests.fixtures.nats import NatsServer
from tests.fixtures.proxy import Proxy

from .chart import draw
from .postgres import Postgres
from .report import Report
from .sides import Database

HOP_SECONDS = 0.0005
"""Round trip that the delaying proxy adds."""
_FIRST = (
    "test_latency",
    "test_checkpointers",
    "test_steps",
    "test_threads",
    "test_pipelined",
    "test_busy_writer",
    "test_drain",
    "test_reading",
)

_report = Report()


@pytest.fixture(scope="session")
def report() -> Report:
    """What the tables at the end are made of."""
    return _report


# ---- servers


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """nats-server with default settings."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        _report.facts["nats-server"] = (
            f"{server.info['version']}, one server, file storage, sync_interval 2m (default), loopback TCP"
        )
        yield server


@pytest.fixture(scope="session")
def synced_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """nats-server that syncs before each PubAck."""
    with NatsServer(tmp_path_factory.mktemp("nats-synced"), jetstream_config="sync_interval: always") as server:
        yield server


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """MariaDB with its default durability and its default sizes."""
    sizes = ("--innodb-buffer-pool-size=128M", "--innodb-log-file-size=96M")
    with MariaDB(tmp_path_factory.mktemp("mariadb"), *sizes) as server:
        _note_mariadb("MariaDB", server)
        yield server


@pytest.fixture(scope="session")
def binlog_mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """MariaDB that also writes and syncs a binary log at each commit, as MySQL 8 does by default."""
    directory = tmp_path_factory.mktemp("mariadb-binlog")
    options = ("--innodb-buffer-pool-size=128M", "--innodb-log-file-size=96M", "--log-bin=binlog", "--sync-binlog=1")
    with MariaDB(directory, *options, "--server-id=1", "--binlog-format=ROW") as server:
        _note_mariadb("MariaDB with binlog", server)
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL with its default durability."""
    with Postgres() as server:
        names = ("fsync", "synchronous_commit", "wal_sync_method", "shared_buffers")
        settings = ", ".join(f"{name}={server.setting(name)}" for name in names)
        _report.facts["PostgreSQL"] = f"{server.setting('server_version')}, {settings}, loopback TCP"
        yield server


@pytest.fixture(scope="session")
def distant_mariadb(mariadb: MariaDB) -> Iterator[Database]:
    """The first MariaDB behind a proxy that adds half a millisecond of round trip; the delay is fitted to what is measured."""
    with Proxy("127.0.0.1", mariadb.port) as proxy:
        near, far = database(mariadb), Database(proxy.port, USER, mariadb.password)
        delay = HOP_SECONDS / 2
        for _ in range(4):
            proxy.delay(delay)
            added = _round_trip(far) - _round_trip(near)
            delay = max(0.0, delay + (HOP_SECONDS - added) / 2)
        proxy.delay(delay)
        added = _round_trip(far) - _round_trip(near)
        _report.facts["delaying proxy"] = (
            f"adds {added * 1e6:.0f} us of round trip (median of 400 pings, fitted to 500 us)"
        )
        yield far


def database(server: MariaDB) -> Database:
    """Where a server listens."""
    return Database(server.port, USER, server.password)


def versions(*names: str) -> str:
    """Installed versions of packages, for the report."""
    return ", ".join(f"{name} {version(name)}" for name in names)


def _round_trip(where: Database) -> float:
    connection = where.connect()
    taken = []
    for _ in range(400):
        began = time.perf_counter()
        connection.ping()
        taken.append(time.perf_counter() - began)
    connection.close()
    return statistics.median(taken)


def _note_mariadb(name: str, server: MariaDB) -> None:
    asked = "@@version, @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog"
    release, flush, log_bin, sync = server.run(f"SELECT {asked}")[0]
    _report.facts[name] = f"{release}, innodb_flush_log_at_trx_commit={flush}, log_bin={log_bin}, sync_binlog={sync}"


# ---- the run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chart", type=Path, help="draw the distributions of latency into this SVG file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The table begins with what matters most; nothing here is done within the time of a test."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(600))
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its table is of whole rounds


def pytest_sessionstart(session: pytest.Session) -> None:
    machine = f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()} {platform.machine()}"
    ours = versions("skialith", "nats-py", "uvloop", "mysqlclient")
    _report.facts["versions"] = f"Python {platform.python_version()}, {ours}"
    _report.facts["machine"] = machine


@pytest.fixture(scope="session", autouse=True)
def disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    """How long the disk of the servers takes to sync: no synced commit is faster."""
    path = tmp_path_factory.mktemp("disk") / "file"
    taken = []
    with path.open("wb", buffering=0) as file:
        for _ in range(200):
            file.write(b"x" * 512)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - began)
    _report.facts["disk"] = f"fdatasync takes {statistics.median(taken) * 1e6:.0f} us (median of {len(taken)})"


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["skialith"] = _report.document()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _report.rows:
        return
    terminalreporter.section("Skialith bench")
    terminalreporter.write(_report.text() + "\n")
    chart = config.getoption("chart")
    if chart is not None and _report.curves:
        draw(_report.curves, chart)
        terminalreporter.write_line(f"\nchart: {chart}")
