"""What is listed of a whole namespace: its agents, and its traces by time or type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from ..records import Kind, Position, Trace
from . import rows
from .base import AgentSummary
from .read import NEWEST, OLDEST, WRITER, Queries, between, marks
from .rows import Row

_PER_QUERY = 32
"""Traces read at once; each payload may have a MiB."""
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - the columns are UTC and say nothing of it
_COLUMNS = "record_key, agent_id, event_id, step_index, event_type, payload, created_at, store_time_ns, seq"


# ---- agents


class _Group(NamedTuple):
    rows: int
    last_ns: int


def agents(session: Queries, namespace: str, after: str, prefix: str, limit: int) -> list[AgentSummary]:
    """Agents with rows in any table, ordered by the bytes of their id."""
    found: dict[bytes, dict[str, _Group]] = {}
    # Code points order as the bytes of UTF-8 do. One bound at each end, for of two a database may take the wider one.
    within, args = ("agent_id >= ?", [prefix]) if prefix > after else ("agent_id > ?", [after])
    end = _behind_all(prefix)
    if end is not None:
        within, args = f"{within} AND agent_id < ?", [*args, end]
    for table in ("dead_letters", "agent_events", "agent_checkpoints"):
        alone = f" AND sink = '{WRITER}' AND kind <> {int(Kind.GRAPH)}" if table == "dead_letters" else ""
        groups = session.rows(
            f"SELECT agent_id, COUNT(*), MAX(store_time_ns) FROM {table} WHERE namespace = ? AND {within}{alone} "
            "GROUP BY agent_id ORDER BY agent_id LIMIT ?",
            (namespace, *args, limit),
        )
        for agent_id, count, last_ns in groups:
            found.setdefault(rows.text(agent_id).encode(), {})[table] = _Group(count, last_ns)
    none = _Group(0, 0)
    return [
        AgentSummary(
            agent_id=key.decode(),
            events=found[key].get("agent_events", none).rows,
            checkpoints=found[key].get("agent_checkpoints", none).rows,
            step_index=_step(session, (namespace, key.decode()), found[key].keys()),
            last_us=max(group.last_ns for group in found[key].values()) // 1000,
        )
        for key in sorted(found)[:limit]
    ]


def _behind_all(prefix: str) -> str | None:
    """The least text behind all those that begin with ``prefix``; None if there is none."""
    prefix = prefix.rstrip("\U0010ffff")
    if not prefix:
        return None
    last = ord(prefix[-1]) + 1
    return prefix[:-1] + chr(0xE000 if last == 0xD800 else last)  # between these two there is no text


def _step(session: Queries, agent: tuple[str, str], tables: Iterable[str]) -> int:
    """The step of the last checkpoint, dead letters included; 0 without one."""
    newest: list[Row] = []
    columns = "SELECT store_time_ns, seq, step_index FROM"
    if "dead_letters" in tables:
        where = "namespace = ? AND agent_id = ? AND sink = ? AND kind = ?"
        newest += session.rows(f"{columns} dead_letters WHERE {where} {NEWEST}", (*agent, WRITER, int(Kind.CHECKPOINT)))
    if "agent_checkpoints" in tables:
        newest += session.rows(f"{columns} agent_checkpoints WHERE namespace = ? AND agent_id = ? {NEWEST}", agent)
    return int(max(newest, default=(0, 0, 0))[2])


# ---- traces


class Wanted(NamedTuple):
    """Which traces; see ``stores.base.Store.traces``."""

    namespace: str
    agent_id: str | None
    event_type: str | None
    after: Position
    until_ns: int | None


class _Place(NamedTuple):
    position: Position
    key: bytes
    event_type: str


def traces(
    session: Queries, wanted: Wanted, limit: int, max_bytes: int | None, max_scanned: int | None
) -> tuple[list[Trace], Position | None]:
    """A page of traces, and the position to go on behind.

    First where they are, by an index that fits the filter, then as many payloads as the page may hold.
    """
    most = limit + 1
    if wanted.agent_id is not None and wanted.event_type is not None:
        # No index has both: the agent's traces are looked through, in pages too.
        most = max_scanned or most
    places = list(_places(session, wanted, most))
    # A database may take 'a' for equal to 'a '.
    fitting = [place for place in places if wanted.event_type in (None, place.event_type)]
    following = places[-1].position if len(places) == most else None
    if len(fitting) > limit:
        fitting = fitting[:limit]
        following = fitting[-1].position
    found: list[Trace] = []
    size = 0
    for trace in _loaded(session, wanted.namespace, fitting):
        found.append(trace)
        size += len(trace.payload_json)
        if max_bytes is not None and size > max_bytes:
            return found, following if len(found) == len(fitting) else trace.position
    return found, following


def _places(session: Queries, wanted: Wanted, most: int) -> Iterator[_Place]:
    by, where, args = "position", "namespace = ?", [wanted.namespace]
    if wanted.agent_id is not None:
        by, where, args = "agent", f"{where} AND agent_id = ?", [*args, wanted.agent_id]
    elif wanted.event_type is not None:
        by, where, args = "type", f"{where} AND event_type = ?", [*args, wanted.event_type]
    within, bounds = between(wanted.after, None)
    if wanted.until_ns is not None:
        within, bounds = f"{within} AND store_time_ns < ?", (*bounds, wanted.until_ns)
    found = session.rows(
        f"SELECT store_time_ns, seq, record_key, event_type FROM agent_traces{session.by.format('agent_traces', by)} "
        f"WHERE {where} AND {within} {OLDEST}",
        (*args, *bounds, most),
    )
    for time_ns, seq, key, event_type in found:
        yield _Place(Position(time_ns, seq), key, rows.text(event_type))


def _loaded(session: Queries, namespace: str, places: list[_Place]) -> Iterator[Trace]:
    """The traces at these places, in order. Someone may delete rows of this table by hand: those are passed over."""
    for start in range(0, len(places), _PER_QUERY):
        keys = [place.key for place in places[start : start + _PER_QUERY]]
        found = session.rows(f"SELECT {_COLUMNS} FROM agent_traces WHERE record_key IN ({marks(keys)})", keys)
        there = {trace.key: trace for trace in (_trace(namespace, row) for row in found)}
        yield from (there[key] for key in keys if key in there)


def _trace(namespace: str, row: Row) -> Trace:
    key, agent_id, event_id, step, event_type, payload, created_at, time_ns, seq = row
    text = rows.text
    return Trace(
        key, namespace, text(agent_id), text(event_id), step, text(event_type), text(payload), _us(created_at),
        Position(time_ns, seq),
    )  # fmt: skip


def _us(at: Any) -> int:
    """Unix microseconds of a time as the databases give it."""
    moment = at if isinstance(at, datetime) else datetime.strptime(rows.text(at), "%Y-%m-%d %H:%M:%S.%f")  # noqa: DTZ007
    return (moment - _EPOCH) // timedelta(microseconds=1)
