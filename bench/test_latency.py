"""Question: what does an acknowledged event cost beside the network floor and beside the INSERT it replaces?

The sides of one event loop share a process of their own and take turns in short blocks; the processes of the two loops take
turns round by round. Each process measures the floor too, so that every ratio is of figures from the same minute and process.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from pytest_benchmark.fixture import BenchmarkFixture

from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer

from . import sides
from .child import LOOPS, Child, Loop
from .conftest import database
from .measure import ROUNDS, Call, Samples, collect, scaled, take_turns
from .report import BINLOG_SYNCED, NO_SYNC, REDO_SYNCED, SYNC_ALWAYS, Report
from .sides import Database

CALLS = scaled(1000)
LATENCY_ROUNDS = 2 * ROUNDS - 1
"""More than elsewhere: whether client and server share a core or not changes from round to round."""
QUESTION = f"One acknowledged event of 200 bytes ({LATENCY_ROUNDS} rounds of {CALLS} calls of each)"

FLOOR = "raw socket, HPUB and PubAck: the floor"
FENCED_FLOOR = "raw socket, with a lease's headers"
SAVE = "save_event"
UNFENCED = "save_event, never resumed"
BRIDGE = "run_coroutine_threadsafe(js.publish())"
INSERT = "INSERT, MariaDB defaults, same host"
BINLOG = "INSERT, binlog, sync_binlog=1, same host"
HOP = "INSERT, through a proxy adding 0.5 ms"
SYNCED_FLOOR = "raw socket, sync_interval: always"
SYNCED_SAVE = "save_event, sync_interval: always"

ORDER = (FLOOR, FENCED_FLOOR, SAVE, UNFENCED, BRIDGE, INSERT, BINLOG, HOP, SYNCED_FLOOR, SYNCED_SAVE)
SURVIVES = {
    INSERT: REDO_SYNCED,
    BINLOG: BINLOG_SYNCED,
    HOP: REDO_SYNCED,
    SYNCED_FLOOR: SYNC_ALWAYS,
    SYNCED_SAVE: SYNC_ALWAYS,
}


@dataclass(frozen=True)
class Servers:
    """Where everything listens."""

    nats: str
    synced_nats: str
    mariadb: Database
    binlog: Database
    distant: Database


# ---- in the child

_stack = ExitStack()
_sides: dict[str, Call] = {}


def open_sides(loop: Loop, servers: Servers) -> None:
    """Open what this process measures; what has no event loop is measured beside uvloop only."""
    ways = {
        FLOOR: sides.floor(servers.nats),
        SAVE: sides.save_event(servers.nats),
        BRIDGE: sides.bridge(servers.nats),
    }
    if loop == "uvloop":
        ways |= {
            FENCED_FLOOR: sides.floor(servers.nats, fenced=True),
            UNFENCED: sides.save_event(servers.nats, fenced=False),
            INSERT: sides.insert(servers.mariadb),
            BINLOG: sides.insert(servers.binlog),
            HOP: sides.insert(servers.distant),
            SYNCED_FLOOR: sides.floor(servers.synced_nats),
            SYNCED_SAVE: sides.save_event(servers.synced_nats),
        }
    for name, way in ways.items():
        _sides[name] = _stack.enter_context(way)
    take_turns(_sides, 200)


def one_round(calls: int) -> dict[str, list[float]]:
    """Seconds of ``calls`` calls of each side."""
    return take_turns(_sides, calls)


def close_sides() -> None:
    _stack.close()


# ---- in the bench


def test_latency(
    benchmark: BenchmarkFixture,
    nats: NatsServer,
    synced_nats: NatsServer,
    mariadb: MariaDB,
    binlog_mariadb: MariaDB,
    distant_mariadb: Database,
    report: Report,
) -> None:
    servers = Servers(nats.url, synced_nats.url, database(mariadb), database(binlog_mariadb), distant_mariadb)
    measured: dict[Loop, dict[str, Samples]] = {loop: {} for loop in LOOPS}
    with ExitStack() as stack:
        children = {loop: stack.enter_context(Child(loop)) for loop in LOOPS}
        for loop, child in children.items():
            child.run(open_sides, loop, servers)

        def take_round() -> None:
            for loop, child in children.items():
                collect(measured[loop], child.run(one_round, CALLS))

        benchmark.pedantic(take_round, rounds=LATENCY_ROUNDS, iterations=1)
        for child in children.values():
            child.run(close_sides)
    _report_rows(report, measured)
    _report_bars(report, measured)


def _report_rows(report: Report, measured: dict[Loop, dict[str, Samples]]) -> None:
    for loop, taken in measured.items():
        for name in (name for name in ORDER if name in taken):
            samples = taken[name]
            label = f"{name} ({loop})" if name in (FLOOR, SAVE, BRIDGE) else name
            floor = SYNCED_FLOOR if name in (SYNCED_FLOOR, SYNCED_SAVE) else FLOOR
            ratio = f"{samples.over(taken[floor], 50):.2f} x floor"
            if name in (BRIDGE, INSERT, BINLOG, HOP):
                ratio += f", {samples.over(taken[SAVE], 50):.1f} x save_event"
            report.latency(QUESTION, label, samples, SURVIVES.get(name, NO_SYNC), ratio)
            report.curves[label] = samples


def _report_bars(report: Report, measured: dict[Loop, dict[str, Samples]]) -> None:
    for loop, taken in measured.items():
        report.bar(f"p50 {loop}", taken[SAVE].over(taken[FLOOR], 50))
        report.bar(f"p99 {loop}", taken[SAVE].over(taken[FLOOR], 99))
        report.bar(f"bridge {loop}", taken[BRIDGE].over(taken[SAVE], 50))
    taken = measured["uvloop"]
    # (INSERT / save_event) / (INSERT / floor): which INSERT it is cancels out.
    report.bar("inserts", taken[FLOOR].over(taken[SAVE], 50))
    report.bar("hop", taken[HOP].over(taken[SAVE], 50))
