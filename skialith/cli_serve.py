"""The commands that stay in the foreground: up (embedded server and writer) and writer (the writer alone)."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Annotated

import typer
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .cli_settings import takes_settings
from .cli_show import console, facts, plural, printable, say, size, span
from .config import Config, load
from .errors import ConfigurationError, WalError
from .runtime import Runtime, acquire
from .urls import redact
from .wal.status import WalStatus

log = logging.getLogger("skialith.cli")

_LIVE_SECONDS = 1.0
_DRAIN_POLL_SECONDS = 0.2


@takes_settings
def up(
    config: Config,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between status lines when piped.")] = 10.0,
) -> None:
    """Run the embedded server and the writer, and print their URLs.

    They run in the foreground until Ctrl-C. Programs started in the same directory find them without any URL.
    """
    if not config.embedded:
        raise ConfigurationError(
            "`skialith up` runs the embedded server, and a NATS server is configured (--nats-url, SKIALITH_NATS_URL): "
            "`skialith writer` is the command for that, or leave the URL out"
        )
    with _until_signal() as stopping, _engine(config) as engine:
        say("Skialith is up.", style="bold green")
        here = config.path == load({}).path
        say("Programs started in this directory find it by themselves. From elsewhere:\n" if here else "To use it:\n")
        say(f"  export SKIALITH_NATS_URL={engine.find_url()}")
        say(f"  export SKIALITH_DATABASE_URL={engine.config.store_url}")
        if config.namespace != "default":
            say(f"  export SKIALITH_NAMESPACE={config.namespace}")
        say(
            "\nThe NATS URL is a secret: whoever has its token can read and write all records.",
            style="yellow",
        )
        say("Ctrl-C stops it; what is acknowledged stays.\n")
        _show_until(stopping, engine, every)
    say("stopped")


@takes_settings
def writer(
    config: Config,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between status lines.")] = 10.0,
    until_empty: Annotated[bool, typer.Option("--until-empty", help="Stop when everything is stored.")] = False,
) -> None:
    """Run the writer alone: it moves records from the log to the database.

    It runs in the foreground until SIGTERM or Ctrl-C; any number of them may run.

    Exit code 0: it stopped when told to (or all is stored); what is not stored yet is safe in the log. 1: the log could
    not be reached at the start. 2: the settings are wrong. A second signal ends it at once.
    """
    logging.getLogger("skialith").setLevel(logging.INFO)
    with _until_signal() as stopping, _engine(config) as engine:
        names = ", ".join(drain.name for drain in engine.drain_status())
        server = "the embedded server" if config.embedded else redact(config.nats_url or "")
        say(f"{_clock()} writing the namespace {config.namespace} from {server} to {engine.store.url} ({names})")
        if until_empty:
            left = _drain(stopping, engine)
        else:
            while not stopping.wait(every):
                say(f"{_clock()} {_line(engine)}")
            left = -1
        stored = sum(drain.stored for drain in engine.drain_status() if drain.name == "writer")
    say(f"{_clock()} stopped; {plural(stored, 'record')} stored")
    if until_empty and left != 0:
        raise typer.Exit(1)


@contextmanager
def _engine(config: Config) -> Iterator[Runtime]:
    engine = acquire(replace(config, writer="on"))
    try:
        yield engine
    finally:
        engine.release()


class Stopping:
    """Whether to stop. A signal's handler may set it, at any moment of whoever waits: of a ``threading.Event`` that thread may
    hold the lock just then, for which the handler would wait for ever."""

    def __init__(self) -> None:
        self._set = False
        self._told: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        self._set = True
        self._told.put(None)

    def is_set(self) -> bool:
        return self._set

    def wait(self, seconds: float) -> bool:
        """Whether it is set, ``seconds`` from now at the latest."""
        if not self._set:
            with suppress(Empty):
                self._told.get(timeout=seconds)
        return self._set


@contextmanager
def _until_signal() -> Iterator[Stopping]:
    """What SIGINT and SIGTERM set; the second of them ends the process as it would any other."""
    stopping = Stopping()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    for number in numbers:
        signal.signal(number, on_signal)
    try:
        yield stopping
    finally:
        for number in numbers:
            signal.signal(number, before[number])


# ---- what it shows


def _show_until(stopping: Stopping, engine: Runtime, every: float) -> None:
    screen = console()
    if not screen.is_terminal:
        while not stopping.wait(every):
            say(_line(engine))
        return
    with Live(_panel(engine), console=screen, auto_refresh=False, transient=True) as live:
        while not stopping.wait(_LIVE_SECONDS):
            live.update(_panel(engine), refresh=True)


def _status(engine: Runtime) -> WalStatus | None:
    try:
        return engine.wal.status(_LIVE_SECONDS)
    except WalError as error:
        log.info("no status: %s", error)
        return None


def _line(engine: Runtime) -> str:
    """How it is, in one line."""
    now = _status(engine)
    drains = engine.drain_status()
    parts = [f"{drain.name}: {drain.stored:,} stored" for drain in drains]
    if now is None:
        parts.insert(0, "the log does not answer")
    else:
        behind = {lag.name: lag for lag in now.consumers}.get("writer")
        waiting = f"{plural(behind.records, 'record')} waiting" if behind else ""
        age = f", the oldest for {span(behind.oldest_seconds)}" if behind and behind.records else ""
        parts.insert(0, f"{waiting}{age}")
        parts.append(f"log {size(now.bytes)}")
    dead = sum(drain.dead_letters for drain in drains)
    if dead:
        parts.append(plural(dead, "dead letter"))
    down = next((drain.last_error for drain in drains if not drain.database_ok), None)
    if down is not None:
        parts.append(f"the database is away ({printable(down)[:200]})")
    return "; ".join(parts)


def _panel(engine: Runtime) -> Table:
    now = _status(engine)
    rows: list[tuple[str, str]] = []
    if now is None:
        rows.append(("log", "does not answer; it is started again when that is possible"))
    else:
        rows.append(("log", f"{size(now.bytes)} of {size(now.max_bytes)}, {plural(now.messages, 'message')}"))
        for lag in now.consumers:
            state = f"{plural(lag.records, 'record')} waiting, the oldest for {span(lag.oldest_seconds)}"
            rows.append((lag.name, state if lag.records else "up to date"))
    for drain in engine.drain_status():
        trouble = "" if drain.database_ok else f"; the database is away: {printable(drain.last_error)[:200]}"
        rows.append(
            (f"{drain.name} here", f"{drain.stored:,} stored in {plural(drain.batches, 'batch', 'batches')}{trouble}")
        )
    return facts(list(rows))


def _drain(stopping: Stopping, engine: Runtime) -> int:
    """Wait until nothing is left to be stored, showing how much is; returns how many records are (-1: not known)."""
    screen = console(error=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = -1
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("storing", total=None)
        most = 0
        while True:
            now = _status(engine)
            left = -1 if now is None else sum(lag.records for lag in now.consumers)
            most = max(most, left)
            progress.update(task, total=most or None, completed=most - max(0, left))
            if left == 0 or stopping.wait(_DRAIN_POLL_SECONDS):
                break
    if left:
        say(f"{'some' if left < 0 else f'{left:,}'} records are still in the log; they are safe there", error=True)
    return left


def _clock() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
