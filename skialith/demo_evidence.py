"""The demo's evidence and its verdict: read from outside with plain SQL, a text file and the stream's own numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from .cli_sql import Query
from .demo_agent import PLAN, answer_of

SIGKILLED = -9


class Plan(NamedTuple):
    """What the demo set out to do. ``cut``: step killed in its LLM call; ``between``: step killed before its checkpoint."""

    namespace: str
    agent_id: str
    sampler_id: str
    cut: int
    between: int
    samples: int

    @property
    def calls_without_a_log(self) -> int:
        """LLM calls of an agent that starts from the beginning after each kill."""
        return self.cut + self.between + len(PLAN)


class Evidence(NamedTuple):
    """What was found from outside.

    ``exits``: exit codes of the agent's processes in order. ``calls``: the steps in the calls file, one per LLM call.
    ``acknowledged``: event ids whose save_event returned in the agent. ``events``: event ids of its rows. ``samples``: rows
    of the sampler. ``checkpoints``: steps of its checkpoint rows. ``traces``: rows of both in agent_traces, None when
    traces are off. ``duplicates``: what GROUP BY ... HAVING COUNT(*) > 1 found, over all tables. ``state``: step and data
    of the last checkpoint. ``unstored``: records in the log that the database lacks. ``dead_letters``: in table and log.
    """

    exits: tuple[int, ...]
    calls: tuple[int, ...]
    acknowledged: tuple[str, ...]
    events: tuple[str, ...]
    samples: int
    checkpoints: tuple[int, ...]
    traces: int | None
    duplicates: int
    state: tuple[int, Any]
    unstored: int
    dead_letters: int


class Verdict(NamedTuple):
    """One promise, and whether the evidence bears it out."""

    promise: str
    held: bool
    found: str


def judge(plan: Plan, evidence: Evidence) -> list[Verdict]:
    """Every promise of the demo against the evidence; pure, so that it can be tried with wrong evidence."""
    steps = range(1, len(PLAN) + 1)
    calls = Counter(evidence.calls)
    expected_calls = Counter({step: 2 if step == plan.cut else 1 for step in steps})
    missing = sorted(set(evidence.acknowledged) - set(evidence.events))
    foreign = sorted(set(evidence.events) - set(evidence.acknowledged))
    step, data = evidence.state
    notes = [answer_of(each) for each in steps]
    rows = len(evidence.events) + evidence.samples
    return [
        Verdict(
            "the agent was killed twice with SIGKILL and finished at the third start",
            evidence.exits == (SIGKILLED, SIGKILLED, 0),
            f"exit codes {list(evidence.exits)}",
        ),
        Verdict(
            "no finished step was paid for twice",
            calls == expected_calls,
            _calls_found(calls, expected_calls),
        ),
        Verdict(
            "every acknowledged event is in the database",
            not missing and evidence.samples >= plan.samples,
            f"missing: {', '.join(missing) or 'none'}; {evidence.samples:,} of {plan.samples:,} samples",
        ),
        Verdict(
            "nothing else is in the database",
            not foreign
            and evidence.samples <= plan.samples
            and len(evidence.events) == len(set(evidence.events)) == len(PLAN),
            f"{len(evidence.events)} events (unknown: {', '.join(foreign) or 'none'}), {evidence.samples:,} samples",
        ),
        Verdict("no row is there twice", evidence.duplicates == 0, f"{evidence.duplicates} duplicates"),
        Verdict(
            "each step has its one checkpoint",
            Counter(evidence.checkpoints) == Counter(steps),
            f"checkpoints of steps {list(evidence.checkpoints)}",
        ),
        Verdict(
            "agent_traces has every event",
            evidence.traces is None or evidence.traces == rows,
            "traces are off" if evidence.traces is None else f"{evidence.traces:,} traces of {rows:,} events",
        ),
        Verdict(
            "resume() gives the finished state",
            step == len(PLAN) and isinstance(data, dict) and data.get("notes") == notes,
            f"step {step}: {data!r}"[:300],
        ),
        Verdict(
            "nothing is left over in the log",
            evidence.unstored == 0 and evidence.dead_letters == 0,
            f"{evidence.unstored} records not stored, {evidence.dead_letters} dead letters",
        ),
    ]


def _calls_found(calls: Counter[int], expected: Counter[int]) -> str:
    wrong = {step: calls[step] for step in sorted(calls.keys() | expected.keys()) if calls[step] != expected[step]}
    times = "".join(f"; step {step} was called {count} times, not {expected[step]}" for step, count in wrong.items())
    return f"{calls.total()} calls{times}"


def read_calls(path: Path) -> tuple[int, ...]:
    """The step of every LLM call, in order: one line each."""
    return tuple(int(line) for line in path.read_text("ascii").splitlines())


# ---- the database, by plain SQL


class Rows(NamedTuple):
    """What the database holds of the demo's two agents; ``counts`` is rows per table, the rest as in :class:`Evidence`."""

    counts: dict[str, int]
    events: tuple[str, ...]
    samples: int
    checkpoints: tuple[int, ...]
    duplicates: int
    dead_letters: int


_IDENTITIES = (
    ("agent_events", "record_key"),
    ("agent_events", "agent_id, event_id"),
    ("agent_checkpoints", "record_key"),
    ("agent_traces", "record_key"),
    ("agent_traces", "agent_id, event_id"),
)


def read_rows(query: Query, plan: Plan) -> Rows:
    """Count what a database holds of the plan's agents."""
    ours = "namespace = ? AND agent_id IN (?, ?)"
    values = (plan.namespace, plan.agent_id, plan.sampler_id)
    counts = {
        table: int(query(f"SELECT COUNT(*) FROM {table} WHERE {ours}", values)[0][0])
        for table in ("agent_events", "agent_checkpoints", "agent_traces")
    }
    duplicates = sum(
        len(query(f"SELECT {key}, COUNT(*) FROM {table} WHERE {ours} GROUP BY {key} HAVING COUNT(*) > 1", values))
        for table, key in _IDENTITIES
    )
    agent = "namespace = ? AND agent_id = ?"
    order = "ORDER BY store_time_ns, seq"
    events = query(f"SELECT event_id FROM agent_events WHERE {agent} {order}", values[:2])
    steps = query(f"SELECT step_index FROM agent_checkpoints WHERE {agent} {order}", values[:2])
    samples = query(f"SELECT COUNT(*) FROM agent_events WHERE {agent}", (plan.namespace, plan.sampler_id))
    dead = query(f"SELECT COUNT(*) FROM dead_letters WHERE {ours}", values)
    return Rows(
        counts=counts,
        events=tuple(_text(event_id) for (event_id,) in events),
        samples=int(samples[0][0]),
        checkpoints=tuple(int(step) for (step,) in steps),
        duplicates=duplicates,
        dead_letters=int(dead[0][0]),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
