"""Servers and the one table: every bench adds rows, the end of the run prints them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer


@dataclass(frozen=True)
class Row:
    """One way of doing one thing: its figures, and what its acknowledgement survives."""

    question: str
    way: str
    figures: str
    durability: str


_rows: list[Row] = []


@pytest.fixture
def table() -> list[Row]:
    """Rows of the table printed at the end."""
    return _rows


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """p50, p95 and p99 in microseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return cuts[49] * 1e6, cuts[94] * 1e6, cuts[98] * 1e6


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    server = MariaDB(Path(tmp_path_factory.mktemp("mariadb")))
    server.start()
    yield server
    server.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("Skialith bench")
    for question in dict.fromkeys(row.question for row in _rows):
        write(question)
        for row in _rows:
            if row.question == question:
                write(f"  {row.way:<44} {row.figures:<58} {row.durability}")
