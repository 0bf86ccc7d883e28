"""What stands in the log and in the database, read with plain nats-py and plain SQL."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
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
    """A dead letter, from the table or from the dead-letter stream."""

    sink: str
    kind: str
    error: str


@dataclass(slots=True)
class Tables:
    """All rows of one namespace. ``traces``: the key of each row."""

    events: list[Row] = field(default_factory=list)
    checkpoints: list[Row] = field(default_factory=list)
    traces: list[bytes] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)


@dataclass(slots=True)
class LogState:
    """``subjects``: messages of records and chunks per subject. ``unsettled``: delivered or to be delivered, all consumers."""

    subjects: dict[str, int] = field(default_factory=dict)
    unsettled: int = 0
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
            if not subject.startswith(f"skialith.{namespace}.lease."):
                state.subjects[subject] = count
        for consumer in await stream.consumers_info(f"SKIALITH_{namespace}"):
            state.unsettled += (consumer.num_pending or 0) + (consumer.num_ack_pending or 0)
        state.letters = await _read_letters(client, namespace)
        return state
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
                letters.append(_letter(ormsgpack.unpackb(message.data or b"")))
    return letters


def _letter(fields: list[Any]) -> Letter:
    _, key, sink, _, time_ns, seq, _, error, _, raw = fields
    _, kind, agent, record_id, _, _, _, _, codec, body = ormsgpack.unpackb(raw)
    value = _value(codec, body)
    identity = record_id if kind == 1 else value["id"]
    return Letter(agent, identity, digest(value), (time_ns, seq), key, sink, KINDS[kind], error)


def _value(codec: int, body: bytes) -> Any:
    """A payload as it was stored: msgpack, by codec 1 compressed with zstd."""
    return ormsgpack.unpackb(zstandard.ZstdDecompressor().decompress(body) if codec else body)


# ---- the database


def read_tables(url: str, namespace: str) -> Tables:
    connection = sqlite3.connect(urlsplit(url).path[1:])
    tables = Tables()
    for table, rows in (("agent_events", tables.events), ("agent_checkpoints", tables.checkpoints)):
        for key, agent, identity, codec, body, t, seq in connection.execute(
            f"select k, agent, id, codec, body, t, seq from {table} where ns=?", (namespace,)
        ):
            value = _value(codec, body)
            rows.append(Row(agent, identity or value["id"], digest(value), (t, seq), key))
    tables.traces = [k for k, in connection.execute("select k from agent_traces where ns=?", (namespace,))]
    return tables
