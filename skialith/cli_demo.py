"""The demo command: an agent is killed twice in bad moments, resumes, and the evidence is counted from outside."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import demo_agent
from .cli_place import own_directory, remove_streams
from .cli_read import DURABILITY
from .cli_settings import agent_of, takes_settings
from .cli_show import facts, say, show, table
from .cli_sql import open_query
from .config import Config
from .demo_agent import MID_CALL, PLAN, UNCHECKPOINTED, Orders
from .demo_evidence import Evidence, Plan, Rows, Verdict, judge, read_calls, read_rows
from .errors import SkialithError
from .runtime import acquire
from .urls import redact
from .wal.status import WalStatus

_SAMPLES = 1000
_STEPS_BETWEEN_KILLS = 3
_PROCESS_SECONDS = 60.0
_SETTLE_SECONDS = 15.0
_STOP_SECONDS = 12.0
_WAL_BYTES = 256 * 1024 * 1024


@takes_settings
def demo(
    config: Config,
    crash_at: Annotated[
        int, typer.Option("--crash-at", min=1, max=len(PLAN), help="The step whose LLM call is killed.")
    ] = 3,
    given: frozenset[str] = frozenset(),
) -> None:
    """Kill an agent twice, let it resume, and count what is left.

    The agent is a real process, killed with SIGKILL in the middle of an LLM call and between save_event and checkpoint;
    what was lost or doubled is then counted from outside. Exit code 1 if anything is not as promised. It works in a
    temporary directory and removes it; give --directory to keep what it made.
    """
    run = secrets.token_hex(3)
    between = min(crash_at + _STEPS_BETWEEN_KILLS, len(PLAN))
    # A server or database of the user's own gets a namespace of the demo's own.
    own_namespace = "namespace" not in given and bool(config.nats_url or config.database_url)
    if own_namespace:
        config = replace(config, namespace=f"demo-{run}", wal_bytes=config.wal_bytes or _WAL_BYTES)
    with _place(config, "directory" in given) as placed:
        plan = Plan(placed.namespace, f"demo-{run}", f"demo-{run}-samples", crash_at, between, _SAMPLES)
        story = _Story(placed, plan)
        try:
            verdicts = story.tell()
        finally:
            if own_namespace:
                remove_streams(placed)
        held = all(verdict.held for verdict in verdicts)
        _say_next(placed, plan, kept="directory" in given, own_namespace=own_namespace, held=held)
    if not held:
        raise typer.Exit(1)


# ---- where it happens


@contextmanager
def _place(config: Config, keep: bool) -> Iterator[Config]:
    """The settings with the demo's directory; a temporary one is removed when its server has stopped."""
    if keep:
        Path(config.directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        yield config
        return
    with own_directory("skialith-demo-") as directory:
        yield replace(config, directory=str(directory))


# ---- what happens


class _Story:
    """Three processes of one agent, what they told, and what is found afterwards."""

    def __init__(self, config: Config, plan: Plan) -> None:
        self._config = config
        self._plan = plan
        self._calls_file = Path(config.directory) / f"llm-calls-{plan.agent_id}.txt"
        self._acknowledged: list[str] = []
        self._nanoseconds: list[int] = []

    def tell(self) -> list[Verdict]:
        """All of it; returns the verdict on each promise."""
        self._prepare()
        self._say_beginning()
        plan = self._plan
        exits = [
            self._live(1, (plan.cut, MID_CALL)),
            self._live(2, (plan.between, UNCHECKPOINTED)),
            self._live(3, None),
        ]
        evidence, rows, wal = self._gather(tuple(exits))
        verdicts = judge(plan, evidence)
        self._say_evidence(evidence, rows, wal)
        _say_verdicts(verdicts)
        return verdicts

    def _prepare(self) -> None:
        """Find out now, before the story begins, if log or database cannot be used."""
        engine = acquire(self._config)
        try:
            engine.store.ping()
        finally:
            engine.release()

    # ---- the agent's lives

    def _live(self, number: int, hold: tuple[int, str] | None) -> int:
        """Run the agent until it stands at ``hold`` and kill it there, or to its end; returns its exit code."""
        settings = {**asdict(self._config), "writer": "on"}
        samples = 0 if hold else self._plan.samples
        orders = Orders(settings, self._plan.agent_id, self._plan.sampler_id, str(self._calls_file), hold, samples)
        errors = Path(self._config.directory) / f"agent-{self._plan.agent_id}-{number}.log"
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", demo_agent.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
            watchdog = threading.Timer(_PROCESS_SECONDS, process.kill)
            watchdog.start()
            try:
                say(f"\nProcess {number} (pid {process.pid})", style="bold")
                code = self._follow(process, json.dumps(orders._asdict()))
            finally:
                watchdog.cancel()
                process.kill()
                process.wait()
        if code not in (0, -9):
            raise SkialithError(
                f"the demo's agent ended with exit code {code}:\n{errors.read_text('utf-8', 'replace')[-2000:]}"
            )
        return code

    def _follow(self, process: subprocess.Popen[str], orders: str) -> int:
        if process.stdin is None or process.stdout is None:
            raise SkialithError("the demo's agent has no pipes")
        with process.stdin as stdin:
            stdin.write(orders + "\n")
        with process.stdout as stdout:
            for line in stdout:
                told = json.loads(line)
                self._note(told)
                if told["what"] == "holding":
                    process.kill()  # SIGKILL: nothing in that process runs any more, no finally, no atexit
        return process.wait()

    def _note(self, told: dict[str, Any]) -> None:
        what, step = told["what"], int(told.get("step", 0))
        if what == "resumed":
            if told["is_new"] and not told["saved"]:
                say("  resume(): a new agent, step 0")
            else:
                say(f"  resume(): the last checkpoint is step {step}; history() has {len(told['saved'])} answers")
        elif what == "call":
            say(f"  step {step}  {PLAN[step - 1]:<24} LLM called", end="")
        elif what == "found":
            say(f"  step {step}  {PLAN[step - 1]:<24} answer found in history(), LLM ", end="")
            say("not", style="bold green", end="")
            say(" called", end="")
        elif what == "saved":
            self._acknowledged.append(told["event_id"])
            say(", answer saved", end="")
        elif what == "checkpoint":
            say(", checkpoint")
        elif what == "holding":
            say("\n  kill -9 ", style="bold red", end="")
            say(told["where"])
            say(f"  {_WHY[told['where']].format(step=step)}", style="dim")
        elif what == "measured":
            self._nanoseconds = told["nanoseconds"]
            say(f"  and {len(self._nanoseconds):,} more events by a second agent, to measure save_event")
        elif what == "flush":
            say("  flush(): until the database has it all, also what the killed processes had taken to store")
        elif what == "done":
            say("  finished")

    # ---- what is left

    def _gather(self, exits: tuple[int, ...]) -> tuple[Evidence, Rows, WalStatus]:
        config, plan = self._config, self._plan
        engine = acquire(replace(config, writer="on"))
        try:
            deadline = time.monotonic() + _SETTLE_SECONDS
            while True:
                wal = engine.wal.status(config.timeout)
                unstored = sum(lag.records for lag in wal.consumers)
                if not unstored or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            with agent_of(engine, plan.agent_id) as agent:
                state = agent.peek()
        finally:
            engine.release()
        with open_query(config) as query:
            rows = read_rows(query, plan)
        evidence = Evidence(
            exits=exits,
            calls=read_calls(self._calls_file),
            acknowledged=tuple(self._acknowledged),
            events=rows.events,
            samples=rows.samples,
            checkpoints=rows.checkpoints,
            traces=rows.counts["agent_traces"] if wal.traces else None,
            duplicates=rows.duplicates,
            state=(state.step_index, state.data),
            unstored=unstored,
            dead_letters=rows.dead_letters + wal.dead_letters,
        )
        return evidence, rows, wal

    # ---- what is said

    def _say_beginning(self) -> None:
        config = self._config
        say("An agent that is killed, and does not pay twice\n", style="bold")
        say(
            f"An agent works through {len(PLAN)} steps. Each step asks an LLM (here a slow local function that writes one"
        )
        say(
            "line per call into a file, since every call costs money), saves the answer with save_event() and its progress"
        )
        say(
            "with checkpoint(). Both return when the record is durable in the write-ahead log; the database follows behind."
        )
        say("We kill it with SIGKILL in two bad moments, start it again, and then count from outside.\n")
        log = redact(config.nats_url) if config.nats_url else "an embedded nats-server"
        show(facts([("log", f"{log}, namespace {config.namespace}"), ("database", redact(config.store_url))]))

    def _say_evidence(self, evidence: Evidence, rows: Rows, wal: WalStatus) -> None:
        plan = self._plan
        say("\nSeen from outside", style="bold")
        shown = table("", "FOUND", "", right=("FOUND",))
        paid = len(evidence.calls)
        without = plan.calls_without_a_log
        shown.add_row(
            "LLM calls: lines in the calls file",
            str(paid),
            f"{len(PLAN)} and the one that was cut; an agent without a log would have made {without}",
        )
        for name, count in rows.counts.items():
            shown.add_row(f"SELECT COUNT(*) FROM {name}", f"{count:,}", _ROWS[name].format(samples=f"{plan.samples:,}"))
        shown.add_row(
            "rows that are there twice", str(rows.duplicates), "GROUP BY key, and by event id, HAVING COUNT(*) > 1"
        )
        shown.add_row(
            "records in the log, not stored",
            str(evidence.unstored),
            f"stream {wal.stream}, {wal.messages} messages left",
        )
        shown.add_row("dead letters", str(evidence.dead_letters), "records that the database refused")
        show(shown)
        durability = self._config.durability
        p50, p95, p99 = (_percentile(self._nanoseconds, share) for share in (0.50, 0.95, 0.99))
        say(
            f"\nsave_event() over {len(self._nanoseconds):,} calls: p50 {p50} us, p95 {p95} us, p99 {p99} us",
            style="bold",
        )
        say(f"durability {durability!r}: {DURABILITY[durability]}")
        say("(the writer stored them from the same process meanwhile)")


_WHY = {
    MID_CALL: "What it held in memory is gone. Step {step} was not finished, so its call has to be made again; no other.",
    UNCHECKPOINTED: "The answer of step {step} is paid for and saved, but no checkpoint says so. "
    "With checkpoints alone it would be paid for twice.",
}
_ROWS = {
    "agent_events": f"{len(PLAN)} answers and {{samples}} measured",
    "agent_checkpoints": "one per step",
    "agent_traces": "the same events as JSON, for your SQL",
}


def _percentile(nanoseconds: list[int], share: float) -> int:
    """Whole microseconds."""
    ordered = sorted(nanoseconds)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1000) if ordered else 0


def _say_verdicts(verdicts: list[Verdict]) -> None:
    say("\nWhat was promised", style="bold")
    for verdict in verdicts:
        say("  ok    " if verdict.held else "  FAIL  ", style="green" if verdict.held else "bold red", end="")
        say(verdict.promise if verdict.held else f"{verdict.promise}: {verdict.found}")


def _say_next(config: Config, plan: Plan, *, kept: bool, own_namespace: bool, held: bool) -> None:
    say(
        "\nNothing lost, nothing paid twice." if held else "\nNot as promised: see FAIL above.",
        style="bold green" if held else "bold red",
    )
    say("\nWhat to type next", style="bold")
    if own_namespace:
        say(f"  the rows stay in the database under the namespace {config.namespace}; its streams were removed")
    elif kept:
        say(f"  skialith --directory {config.directory} history {plan.agent_id}")
        say(f"  skialith --directory {config.directory} state {plan.agent_id}")
        say(f"  skialith --directory {config.directory} status")
    else:
        say("  skialith demo --directory ./demo     keep what the demo makes, and look around in it")
    say("  skialith demo --crash-at 7           kill it at another step")
    say("  skialith up                          start a log here, and use it: `from skialith import SkialithAgent`")
