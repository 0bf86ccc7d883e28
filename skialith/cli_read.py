"""The commands that look and change nothing: status, agents, history, state."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .cli_settings import agent_of, looking, takes_settings
from .cli_show import emit, facts, group_line, note, payload, plural, printable, say, show, size, span, table, when
from .config import Config
from .errors import SkialithError, StoreError
from .records import Event, iso
from .runtime import Runtime
from .stores.base import AgentSummary
from .wal.group import Group
from .wal.status import ConsumerLag, WalStatus

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for machines.")]
AgentId = Annotated[str, typer.Argument(metavar="AGENT", help="The agent's id.", show_default=False)]

_PAGE_AGENTS = 500
_PEOPLE_EVENTS = 100
_PEOPLE_AGENTS = 100

DURABILITY = {
    "process": "an acknowledged record survives kill -9 of agent, writer and nats-server; a power loss can take up to "
    "the last 2 minutes",
    "power": "an acknowledged record survives a power loss too: the server syncs it to disk before it answers",
}
"""What ``durability`` means, in one line each."""


# ---- status


@takes_settings
def status(config: Config, as_json: Json = False) -> None:
    """Show the log's size, its lag, rows, dead letters and durability."""
    with looking(config) as engine:
        wal = engine.wal.status(config.timeout)
        database = _database(config, engine)
    if as_json:
        emit(_status_document(config, wal, database))
    else:
        show(facts(_status_facts(config, wal, database)))


def _database(config: Config, engine: Runtime) -> dict[str, Any]:
    """The database's rows, or why it does not tell."""
    if engine.config.store_url != config.store_url:
        absent = "it is not there yet: the first writer makes it"
        return {"kind": "sqlite", "url": config.store_url, "ok": False, "error": absent, "rows": None}
    about: dict[str, Any] = {
        "kind": engine.store.name,
        "url": engine.store.url,
        "ok": True,
        "error": None,
        "rows": None,
    }
    try:
        counts = engine.store.counts(engine.config.namespace)
    except StoreError as error:
        return {**about, "ok": False, "error": str(error)}
    rows = {
        "agent_events": counts.events,
        "agent_checkpoints": counts.checkpoints,
        "agent_traces": counts.traces,
        "dead_letters": counts.dead_letters,
    }
    return {**about, "rows": rows}


def _oldest(wal: WalStatus) -> float:
    """Age in seconds of the oldest record that the database does not have; 0 if there is none."""
    return next((lag.oldest_seconds for lag in wal.consumers if lag.name == "writer"), 0.0)


def _status_document(config: Config, wal: WalStatus, database: dict[str, Any]) -> dict[str, Any]:
    oldest = _oldest(wal)
    rows = database["rows"]
    return {
        "namespace": config.namespace,
        "server": {"name": wal.server, "version": wal.server_version, "embedded": config.embedded},
        "log": {
            "stream": wal.stream,
            "id": wal.wal_id,
            "messages": wal.messages,
            "bytes": wal.bytes,
            "max_bytes": wal.max_bytes,
            "last_seq": wal.last_seq,
            "replicas": wal.replicas,
            **_group_document(wal.group),
        },
        "consumers": [
            {
                "name": lag.name,
                "records": lag.records,
                "in_flight": lag.in_flight,
                "oldest_seconds": round(lag.oldest_seconds, 3),
                "writers_pulling": lag.pulls > 0,
                **_group_document(lag.group),
            }
            for lag in wal.consumers
        ],
        "oldest_unstored": {"at": iso(_ago(oldest)), "seconds": round(oldest, 3)} if oldest else None,
        "traces": wal.traces,
        "database": database,
        "dead_letters": {"table": rows["dead_letters"] if rows else None, "stream": wal.dead_letters},
        "durability": {"setting": config.durability, "meaning": _meaning(config, wal)},
    }


def _group_document(group: Group | None) -> dict[str, Any]:
    """Nothing for a log of one copy."""
    if group is None:
        return {}
    peers = [
        {
            "name": peer.name,
            "state": peer.state,
            "behind": peer.behind,
            "seen_seconds": None if peer.seen_seconds is None else round(peer.seen_seconds, 3),
        }
        for peer in group.peers
    ]
    return {"leader": group.leader, "writable": group.writable, "peers": peers}


def _status_facts(config: Config, wal: WalStatus, database: dict[str, Any]) -> list[tuple[str, str | Text]]:
    where = "embedded nats-server" if config.embedded else "nats-server"
    copies = f", {wal.replicas} replicas" if wal.replicas > 1 else ""
    used = f"{size(wal.bytes)} of {size(wal.max_bytes)} ({wal.bytes / wal.max_bytes:.1%})"
    oldest = _oldest(wal)
    lines: list[tuple[str, str | Text]] = [
        ("namespace", config.namespace),
        ("log", f"{wal.stream} on {where} {wal.server_version}{copies}"),
        ("", f"{used}, {plural(wal.messages, 'message')}"),
        *([("replicas", _group(wal.group))] if wal.group else []),
        *[(lag.name, _lag(lag)) for lag in wal.consumers],
        *[(f"{lag.name} peers", _group(lag.group)) for lag in wal.consumers if lag.group and not lag.group.whole],
    ]
    if not wal.traces:
        lines.append(("trace_ingest", "off for this namespace (`skialith traces on`)"))
    lines.append(("oldest unstored", f"{when(_ago(oldest))} ({span(oldest)} ago)" if oldest else "none: all is stored"))
    lines.append(("database", printable(database["url"])))
    if database["ok"]:
        lines.append(("", "  ".join(f"{name} {count:,}" for name, count in database["rows"].items())))
    else:
        lines.append(("", Text(f"not readable: {printable(database['error'])}", style="red")))
    lines.append(("dead letters", _dead(wal, database)))
    lines.append(("durability", f"{config.durability}: {_meaning(config, wal)}"))
    return lines


def _lag(lag: ConsumerLag) -> str | Text:
    if not lag.records:
        return "up to date"
    behind = f"{plural(lag.records, 'record')} behind, the oldest by {span(lag.oldest_seconds)}"
    if lag.pulls or lag.in_flight:
        return behind
    return Text(f"{behind}; nobody is storing them now (`skialith writer` does)", style="yellow")


def _group(group: Group) -> str | Text:
    text = group_line(group)
    return text if group.whole else Text(text, style="yellow" if group.writable else "red")


def _dead(wal: WalStatus, database: dict[str, Any]) -> str | Text:
    stored = database["rows"]["dead_letters"] if database["ok"] else 0
    if not stored and not wal.dead_letters:
        return "none" if database["ok"] else "none in the log"
    return Text(
        f"{stored:,} in the table, {wal.dead_letters:,} in the log: see `skialith dead-letters list`", style="yellow"
    )


def _meaning(config: Config, wal: WalStatus) -> str:
    if wal.replicas > 1 and config.durability == "process":
        return (
            f"an acknowledged record is on a majority of {wal.replicas} servers; it is lost only if a majority loses power "
            "within 2 minutes"
        )
    return DURABILITY[config.durability]


def _ago(seconds: float) -> int:
    return int((time.time() - seconds) * 1e6)


# ---- agents


@takes_settings
def agents(
    config: Config,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many (default 100; --json: all).")
    ] = None,
    after: Annotated[str, typer.Option("--after", metavar="AGENT", help="Only those behind this id.")] = "",
    as_json: Json = False,
) -> None:
    """List the agents that the database knows."""
    wanted = limit if as_json or limit else _PEOPLE_AGENTS
    with looking(config) as engine:
        found = list(islice(_agents(engine, after), None if wanted is None else wanted + 1))
        waiting = sum(lag.records for lag in engine.wal.status(config.timeout).consumers if lag.name == "writer")
    more = wanted is not None and len(found) > wanted
    found = found[:wanted]
    if as_json:
        emit([agent.document() for agent in found])
    elif found:
        rows = table("AGENT", "EVENTS", "CHECKPOINTS", "STEP", "LAST RECORD", right=("EVENTS", "CHECKPOINTS", "STEP"))
        for agent in found:
            counts = (f"{agent.events:,}", f"{agent.checkpoints:,}", str(agent.step_index))
            rows.add_row(printable(agent.agent_id), *counts, when(agent.last_us))
        show(rows)
    else:
        say(f"no agents in the database under the namespace {config.namespace}")
    if more:
        note(f"more follow: --after {found[-1].agent_id!r}, or --limit")
    if waiting:
        note(f"not counted here: {plural(waiting, 'record')} in the log that the database does not have yet")


def _agents(engine: Runtime, after: str) -> Iterator[AgentSummary]:
    while True:
        page = engine.store.agents(engine.config.namespace, after=after, limit=_PAGE_AGENTS)
        yield from page
        if len(page) < _PAGE_AGENTS:
            return
        after = page[-1].agent_id


# ---- history and state


class UnknownAgent(SkialithError):
    """Nothing was ever saved under this agent id."""


@takes_settings
def history(
    config: Config,
    agent_id: AgentId,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many (default 100; --json: all).")
    ] = None,
    after: Annotated[str | None, typer.Option("--after", metavar="CURSOR", help="Continue behind this cursor.")] = None,
    kind: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Only events of this type.")] = None,
    as_json: Json = False,
) -> None:
    """Show an agent's events, oldest first.

    From the database and the log together; with --json one line each.
    """
    wanted = limit if as_json or limit else _PEOPLE_EVENTS
    shown: list[Event] = []
    last: Event | None = None
    more = False
    with looking(config) as engine, agent_of(engine, agent_id) as agent:
        events = (event for event in agent.history(after=after) if kind is None or event.event_type == kind)
        for number, event in enumerate(events):
            if number == wanted:
                more = True
                break
            last = event
            if as_json:
                emit(_event_document(event))
            else:
                shown.append(event)
        if last is None and agent.peek().is_new and not any(True for _ in agent.history(limit=1)):
            raise _unknown(config, agent_id)
    if shown:
        show(_event_table(shown))
    elif not as_json:
        say("no events" + (f" of type {printable(kind)}" if kind else "") + (" behind this cursor" if after else ""))
    if more and last is not None:
        note(f"more follow: --after {last.position.cursor()}, or --limit")


def _event_document(event: Event) -> dict[str, Any]:
    return {
        "event_id": event.event_id,
        "step_index": event.step_index,
        "type": event.event_type,
        "created_at": event.created_at.isoformat(timespec="microseconds"),
        "cursor": event.position.cursor(),
        "stored": event.stored,
        "dead": event.dead,
        "data": payload(event.data),
    }


def _event_table(events: list[Event]) -> Table:
    rows = table("SAVED", "STEP", "TYPE", "EVENT", "IN", "DATA", right=("STEP",))
    for column in rows.columns[:-1]:
        column.no_wrap = True  # a narrow terminal cuts the data, and nothing else
    for event in events:
        place = "dead letter" if event.dead else "database" if event.stored else "log"
        rows.add_row(
            when(int(event.created_at.timestamp() * 1e6)),
            str(event.step_index),
            printable(event.event_type),
            printable(event.event_id),
            place,
            Text(printable(json.dumps(payload(event.data), ensure_ascii=False)), no_wrap=True, overflow="ellipsis"),
        )
    return rows


@takes_settings
def state(config: Config, agent_id: AgentId, as_json: Json = False) -> None:
    """Show an agent's last checkpoint, without taking it over."""
    with looking(config) as engine, agent_of(engine, agent_id) as agent:
        now = agent.peek()
        if now.is_new and not any(True for _ in agent.history(limit=1)):
            raise _unknown(config, agent_id)
    if as_json:
        emit(
            {
                "agent_id": now.agent_id,
                "step_index": now.step_index,
                "is_new": now.is_new,
                "source": now.source,
                "database_ok": now.database_ok,
                "data": payload(now.data),
            }
        )
        return
    source = {"wal": "the log", "database": "the database", "none": "no checkpoint yet: it starts at step 0"}[
        now.source
    ]
    lines: list[tuple[str, Any]] = [
        ("agent", printable(agent_id)),
        ("step", str(now.step_index)),
        ("read from", source),
    ]
    if not now.database_ok:
        lines.append(("database", "did not answer; the log alone was read"))
    show(facts(lines))
    # JSON escapes control characters itself, and line ends are wanted here.
    say(json.dumps(payload(now.data), indent=2, ensure_ascii=False))


def _unknown(config: Config, agent_id: str) -> UnknownAgent:
    return UnknownAgent(
        f"nothing was ever saved by an agent {agent_id!r} in the namespace {config.namespace!r}: "
        "`skialith agents` lists those that there are"
    )
