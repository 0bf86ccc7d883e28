"""What stands in the log and in the database, read with plain nats-py and plain SQL."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import MySQLdb
import nats
import ormsgpack
import zstandard
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from .evidence import digest

KINDS = {1: "event", 2: "checkpoint"}


@dataclass(slots=True)
class Row:
    """A stored event or checkpoint. ``identity``: event id, or the token inside a checkpoint. ``position``: (time, sequence)."""

    agent: str
    identity: str
    digest: str
    position: tuple[int, int]
    key: bytes


@dataclass(slots=True)
class Letter(Row):
    """A dead letter, from the table or from the dead-letter stream. ``decoded``: whether whoever gave it up could decode it."""

    sink: str
    kind: str
    error: str
    decoded: bool = True


@dataclass(slots=True)
class Tables:
    """All rows of one namespace. ``traces``: the key of each row."""

    events: list[Row] = field(default_factory=list)
    checkpoints: list[Row] = field(default_factory=list)
    traces: list[bytes] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)


@dataclass(slots=True)
class LogState:
    """``subjects``: messages of records and chunks per subject. ``unsettled``: delivered or to be delivered, all consumers.

    ``again``: messages that were delivered to writers more than once, and are not settled yet.
    """

    subjects: dict[str, int] = field(default_factory=dict)
    leases: int = 0
    unsettled: int = 0
    again: int = 0
    letters: list[Letter] = field(default_factory=list)

    @property
    def records(self) -> int:
        return sum(self.subjects.values())

    @property
    def idle(self) -> bool:
        """Whether everything is stored and trimmed."""
        return not self.records and not self.unsettled


# ---- the log


def read_log(url: str, namespace: str) -> LogState:
    """The state of a namespace's streams; an empty one if there are none."""
    return asyncio.run(_read_log(url, namespace))


async def _read_log(url: str, namespace: str) -> LogState:
    client = await nats.connect(url, connect_timeout=5, allow_reconnect=False)
    try:
        stream = client.jetstream(timeout=10)
        state = LogState()
        try:
            info = await stream.stream_info(f"SKIALITH_{namespace}", subjects_filter=">")
        except NotFoundError:
            return state
        for subject, count in (info.state.subjects or {}).items():
            if subject.startswith(f"skialith.{namespace}.lease."):
                state.leases += count
            else:
                state.subjects[subject] = count
        for consumer in await stream.consumers_info(f"SKIALITH_{namespace}"):
            state.unsettled += (consumer.num_pending or 0) + (consumer.num_ack_pending or 0)
            state.again += (consumer.num_redelivered or 0) * (consumer.name == "writer")
        state.letters = await _read_letters(client, namespace)
        return state
    finally:
        await client.close()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the writers are. ``last``: sequence in the log. ``settled``: up to here both consumers are done.

    ``redelivered``: messages that are delivered for the second time or more, and not settled yet.
    """

    last: int
    settled: int
    redelivered: int


async def _read_progress(client: Client, namespace: str) -> Progress:
    stream = client.jetstream(timeout=10)
    last = (await stream.stream_info(f"SKIALITH_{namespace}")).state.last_seq
    settled, redelivered = last, 0
    for consumer in await stream.consumers_info(f"SKIALITH_{namespace}"):
        redelivered += consumer.num_redelivered or 0
        if (consumer.num_pending or 0) + (consumer.num_ack_pending or 0) and consumer.ack_floor is not None:
            settled = min(settled, consumer.ack_floor.stream_seq)
    return Progress(last, settled, redelivered)


def read_progress(url: str, namespace: str) -> Progress:
    """Where the writers are now."""
    return watch(url, namespace, lambda at, progress: True)[1]


def watch(
    url: str, namespace: str, until: Callable[[float, Progress], bool], every: float = 0.05
) -> tuple[float, Progress]:
    """Look again and again, over one connection, until ``until(monotonic time, progress)``; gives what it saw last."""

    async def look() -> tuple[float, Progress]:
        client = await nats.connect(url, connect_timeout=5, allow_reconnect=False)
        try:
            while True:
                at, progress = time.monotonic(), await _read_progress(client, namespace)
                if until(at, progress):
                    return at, progress
                await asyncio.sleep(every)
        finally:
            await client.close()

    return asyncio.run(look())


def hurry(url: str, namespace: str, seconds: float = 1.0) -> None:
    """Have what a dead writer held delivered again after one second instead of the usual wait, to shorten a test's end."""
    asyncio.run(_hurry(url, namespace, seconds))


async def _hurry(url: str, namespace: str, seconds: float) -> None:
    client = await nats.connect(url, connect_timeout=5, allow_reconnect=False)
    try:
        stream = client.jetstream(timeout=10)
        for consumer in await stream.consumers_info(f"SKIALITH_{namespace}"):
            await stream.add_consumer(f"SKIALITH_{namespace}", consumer.config.evolve(ack_wait=seconds))
    finally:
        await client.close()


async def _read_letters(client: Client, namespace: str) -> list[Letter]:
    """The dead letters in the dead-letter stream; those of large records are known by their head alone."""
    stream = client.jetstream(timeout=10)
    name = f"SKIALITH-DEAD_{namespace}"
    state = (await stream.stream_info(name)).state
    letters = []
    for seq in range(state.first_seq, state.last_seq + 1) if state.messages else ():
        with contextlib.suppress(NotFoundError):
            message = await stream.get_msg(name, seq)
            if str(message.subject).startswith(f"skialith.{namespace}.dead."):
                fields = ormsgpack.unpackb(message.data or b"")
                _, key, sink, _, *position, _, error, _, raw = fields
                decoded = ".dead.undecodable." not in str(message.subject)
                letters.append(_letter(raw, (position[0], position[1]), key, sink, error, decoded))
    return letters


def _letter(raw: bytes, position: tuple[int, int], key: bytes, sink: str, error: str, decoded: bool) -> Letter:
    _, kind, agent, record_id, _, _, _, _, codec, body = ormsgpack.unpackb(raw)
    value = _value(codec, body)
    identity = record_id if kind == 1 else value["id"]
    return Letter(agent, identity, digest(value), position, key, sink, KINDS[kind], error, decoded)


def _value(codec: int, body: bytes) -> Any:
    """A payload as it was stored: msgpack, by codec 1 compressed with zstd."""
    return ormsgpack.unpackb(zstandard.ZstdDecompressor().decompress(body) if codec else body)


# ---- the database


@contextlib.contextmanager
def database(url: str) -> Iterator[Any]:
    """``run(sql, arguments)`` on a connection of its own, in autocommit; placeholders are ``?``. Gives all rows."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        file = sqlite3.connect(parts.path[1:], timeout=10, isolation_level=None)
        try:
            yield lambda sql, arguments=(): file.execute(sql, arguments).fetchall()
        finally:
            file.close()
        return
    server = MySQLdb.connect(
        host=parts.hostname or "",
        port=parts.port or 3306,
        user=unquote(parts.username or ""),
        passwd=unquote(parts.password or ""),
        db=parts.path[1:],
        autocommit=True,
        charset="utf8mb4",
        # What any node of a cluster has committed is evidence, and not only what this one has applied.
        init_command="SET SESSION wsrep_sync_wait = 1",
    )

    def run(sql: str, arguments: tuple[Any, ...] = ()) -> Any:
        with server.cursor() as cursor:
            cursor.execute(sql.replace("?", "%s"), arguments or None)
            return cursor.fetchall()

    try:
        yield run
    finally:
        server.close()


class _Parts(dict[bytes, bytes]):
    """Payloads in parts, each read when it is asked for and not kept."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self._run = run

    def __missing__(self, key: bytes) -> bytes:
        parts = self._run("SELECT data FROM payload_parts WHERE parts_key = ? ORDER BY n", (key,))
        return b"".join(bytes(data) for (data,) in parts)


def read_tables(url: str, namespace: str, agents: Sequence[str] = ()) -> Tables:
    """Every row of a namespace, or of these agents of it."""
    tables = Tables()
    where, args = "namespace = ?", (namespace, *agents)
    if agents:
        where += f" AND agent_id IN ({', '.join('?' for _ in agents)})"
    with database(url) as run:
        parts = _Parts(run)
        head = f"agent_id, {{}} codec, body, body_parts, store_time_ns, seq, record_key FROM {{}} WHERE {where}"
        for row in run("SELECT " + head.format("event_id,", "agent_events"), args):
            tables.events.append(_row(parts, *row))
        for agent, *rest in run("SELECT " + head.format("", "agent_checkpoints"), args):
            tables.checkpoints.append(_row(parts, agent, "", *rest))
        tables.traces = [bytes(key) for (key,) in run(f"SELECT record_key FROM agent_traces WHERE {where}", args)]
        more = head.format("record_id,", "dead_letters").replace("FROM", ", sink, kind, error, raw FROM")
        for *columns, sink, kind, error, raw in run("SELECT " + more, args):
            if kind is None:
                place_of, key = (columns[5], columns[6]), bytes(columns[7])
                tables.letters.append(_letter(raw, place_of, key, sink, error, False))
                continue
            row = _row(parts, *columns)
            place = row.agent, row.identity, row.digest, row.position, row.key
            tables.letters.append(Letter(*place, sink, KINDS[kind], error))
    return tables


def _row(
    parts: Mapping[bytes, bytes],
    agent: bytes | str,
    record_id: bytes | str,
    codec: int,
    body: bytes | None,
    body_parts: bytes | None,
    time_ns: int,
    seq: int,
    key: bytes,
) -> Row:
    data = body if body is not None else parts[body_parts or b""]
    value = _value(codec, data)
    return Row(_text(agent), _text(record_id) or value["id"], digest(value), (time_ns, seq), bytes(key))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def refuse(url: str, event_ids: list[str], *, letters_too: bool | list[str]) -> None:
    """From now on the database refuses these events for their data, and their dead letters too if asked (those listed)."""
    letters = letters_too if isinstance(letters_too, list) else event_ids if letters_too else []
    with database(url) as run:
        for table, column, ids in [("agent_events", "event_id", event_ids), ("dead_letters", "record_id", letters)]:
            if not ids:
                continue
            listed = ", ".join(f"X'{event_id.encode().hex()}'" for event_id in ids)
            if url.startswith("sqlite"):
                run(
                    f"CREATE TRIGGER refuse_{table} BEFORE INSERT ON {table} WHEN CAST(NEW.{column} AS BLOB) IN ({listed}) "
                    "BEGIN SELECT RAISE(ABORT, 'refused by the test'); END"
                )
            else:
                run(
                    f"CREATE TRIGGER refuse_{table} BEFORE INSERT ON {table} FOR EACH ROW "
                    f"IF NEW.{column} IN ({listed}) THEN SIGNAL SQLSTATE '22001' "
                    "SET MYSQL_ERRNO = 1406, MESSAGE_TEXT = 'refused by the test'; END IF"
                )


def accept(url: str) -> None:
    """What :func:`refuse` did is mended."""
    with database(url) as run:
        for table in ("agent_events", "dead_letters"):
            run(f"DROP TRIGGER IF EXISTS refuse_{table}")
