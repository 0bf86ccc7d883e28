"""The report of a run: one table of everything that was measured, and one of the bars with hit or miss."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from .measure import ROUNDS, SCALE, Samples

WIDTH = 190
_COLUMNS = {"": 60, "p50": 9, "p95": 9, "p99": 9, "figure": 26, "ratio": 32, "survives the loss of": 31}
_NUMBERS = ("p50", "p95", "p99", "figure", "wanted", "measured")
_LEGEND = """
  survives the loss of a process: nothing acknowledged is lost when anything is killed, but a power loss may take what the server
  has not synced (nats-server syncs every two minutes by default); of power: each record is synced before it is acknowledged"""

NO_SYNC = "process"
SYNC_ALWAYS = "power (sync_interval: always)"
REDO_SYNCED = "power (redo log synced)"
BINLOG_SYNCED = "power (redo log, binlog synced)"
WAL_SYNCED = "power (WAL synced)"
SQLITE_FULL = "power (synchronous=FULL)"
SQLITE_NORMAL = "process (synchronous=NORMAL)"
NOT_A_WRITE = ""


@dataclass
class Row:
    """One line: a latency in seconds, or a figure of another kind as text, and what its acknowledgement survives."""

    question: str
    way: str
    survives: str
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    figure: str = ""
    ratio: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: of the fast path, of the checkpointer, of steps."""

    figure: str
    sense: Literal["<=", ">="]
    limit: float
    unit: str = ""

    def met(self, value: float) -> bool:
        return value <= self.limit if self.sense == "<=" else value >= self.limit

    def worse(self, one: float, other: float) -> float:
        return max(one, other) if self.sense == "<=" else min(one, other)


_STATES = ("2 KB", "200 KB, 2 KB of it change", "200 KB, all of it changes")

BARS = {
    "p50 uvloop": Bar("save_event p50 / floor p50, idle writer, uvloop", "<=", 1.3),
    "p50 asyncio": Bar("save_event p50 / floor p50, idle writer, stock asyncio", "<=", 1.8),
    "p99 uvloop": Bar("save_event p99 / floor p99, uvloop", "<=", 1.6),
    "p99 asyncio": Bar("save_event p99 / floor p99, stock asyncio", "<=", 1.6),
    "inserts": Bar("both INSERTs / save_event as a share of the ceiling INSERT / floor, p50, uvloop", ">=", 0.75),
    "hop": Bar("INSERT one 0.5 ms hop away / save_event with the log local, p50", ">=", 10),
    "bridge uvloop": Bar("the obvious bridge / save_event, p50, uvloop", ">=", 4),
    "bridge asyncio": Bar("the obvious bridge / save_event, p50, stock asyncio", ">=", 4),
    "paced writer": Bar("save_event p99 / idle, this process's writer storing 10,000 events/s", "<=", 1.5),
    "backlog": Bar("save_event p99 / idle, this process's writer clearing a backlog at full speed", "<=", 4),
    "pipelined": Bar(
        "one process, pipelined, 200-byte events (save_events of an agent that owns itself)", ">=", 70_000, "/s"
    ),
    "drain both": Bar("drain into MariaDB, both tables", ">=", 40_000, " events/s"),
    "drain share": Bar("drain into MariaDB, events table alone / bulk ceiling", ">=", 0.6),
    "resume": Bar("resume p50, the slowest of 10^2 to 10^6 stored events", "<=", 1.0, " ms"),
    "resume flat": Bar("resume p50 at 10^6 stored events / at 10^2 (flat: up to 1.25)", "<=", 1.25),
    "cpu": Bar("client CPU per save_event", "<=", 30, " us"),
    **{f"put postgres {state}": Bar(f"PostgresSaver.put / ours, p50, {state}", ">=", 3) for state in _STATES},
    **{f"put mysql {state}": Bar(f"PyMySQLSaver.put / ours, p50, {state}", ">=", 6) for state in _STATES},
    **{f"get_tuple {state}": Bar(f"get_tuple / PostgresSaver's, p50, {state}", "<=", 1) for state in _STATES},
    "step postgres": Bar("DBOS step on PostgreSQL / agent.step, p50", ">=", 15),
    "step sqlite": Bar("DBOS step on SQLite / agent.step, p50", ">=", 15),
    "http": Bar("an event over HTTP / (the empty handler + save_event in process), p50", "<=", 1.6),
}


@dataclass
class Report:
    """Everything that one run measured."""

    rows: list[Row] = field(default_factory=list)
    bars: dict[str, float] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    """Versions and settings of what was measured."""
    curves: dict[str, Samples] = field(default_factory=dict)
    """What the chart shows."""

    def latency(
        self, question: str, way: str, samples: Samples, survives: str, ratio: str = "", figure: str = ""
    ) -> None:
        """A row of percentiles."""
        p50, p95, p99 = (samples.at(percent) for percent in (50, 95, 99))
        self.rows.append(Row(question, way, survives, p50, p95, p99, figure, ratio))

    def figure(self, question: str, way: str, figure: str, survives: str = NOT_A_WRITE, ratio: str = "") -> None:
        """A row with another figure than a latency."""
        self.rows.append(Row(question, way, survives, figure=figure, ratio=ratio))

    def bar(self, name: str, value: float) -> None:
        """The figure of one of ``BARS``; of several, the worst is kept."""
        assert name in BARS, name
        self.bars[name] = BARS[name].worse(value, self.bars.get(name, value))

    def document(self) -> dict[str, Any]:
        """The report as JSON."""
        bars = [
            {
                **asdict(bar),
                "value": self.bars.get(name),
                "met": bar.met(self.bars[name]) if name in self.bars else None,
            }
            for name, bar in BARS.items()
        ]
        return {"facts": self.facts, "rows": [asdict(row) for row in self.rows], "bars": bars, "scale": SCALE}

    def text(self) -> str:
        """Both tables for a terminal."""
        screen = Console(file=io.StringIO(), width=WIDTH, highlight=False, markup=False, emoji=False)
        self._print_figures(screen)
        for name, value in self.facts.items():
            screen.print(f"  {name}: {value}", soft_wrap=True)
        screen.print(f"  medians of {ROUNDS} interleaved rounds unless a line says otherwise; scale {SCALE:g}\n")
        screen.print(self._bars())
        written: str = screen.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in written.splitlines())

    def _print_figures(self, screen: Console) -> None:
        screen.print(_figures(header=True))
        for question in dict.fromkeys(row.question for row in self.rows):
            screen.print(f"\n{question}")
            table = _figures(header=False)
            for row in self.rows:
                if row.question == question:
                    times = (duration(row.p50), duration(row.p95), duration(row.p99))
                    table.add_row(f"  {row.way}", *times, row.figure, row.ratio, row.survives)
            screen.print(table)
        screen.print(_LEGEND)

    def _bars(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("bar", "wanted", "measured", ""):
            table.add_column(name, justify="right" if name in _NUMBERS else "left")
        for name, bar in BARS.items():
            value = self.bars.get(name)
            wanted = f"{bar.sense} {bar.limit:,g}{bar.unit}"
            if value is None:
                table.add_row(bar.figure, wanted, "", "not measured")
            else:
                text = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
                table.add_row(bar.figure, wanted, f"{text}{bar.unit}", "hit" if bar.met(value) else "MISS")
        return table


def _figures(*, header: bool) -> Table:
    """A table with columns of fixed width, so that those of several questions stand below each other."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=header)
    for name, width in _COLUMNS.items():
        table.add_column(name, width=width, justify="right" if name in _NUMBERS else "left")
    return table


def duration(seconds: float | None) -> str:
    """A time as people read it."""
    if seconds is None:
        return ""
    if seconds < 1e-6:
        return f"{seconds * 1e9:.0f} ns"
    if seconds < 1e-2:
        return f"{seconds * 1e6:,.0f} us" if seconds >= 1e-5 else f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def rate(per_second: float, what: str = "records") -> str:
    """A rate as people read it."""
    return f"{per_second:,.0f} {what}/s"
