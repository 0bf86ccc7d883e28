"""Skialith broken on purpose, in a child, for the checker to find what must never be."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from skialith import letters
from skialith.errors import StoreConnectionLost, StoreDataError
from skialith.history import FoundStep, StepPast
from skialith.records import Ack, Message, Record
from skialith.runtime import Runtime
from skialith.stores import graphs as stores_graphs
from skialith.stores import mysql_errors
from skialith.stores.mysql import MySqlStore
from skialith.stores.sql import SqlStore
from skialith.wal import frames
from skialith.wal.api import Api
from skialith.wal.continuity import Continuity
from skialith.wal.lane import Ticket
from skialith.wal.log import Log
from skialith.wal.stream import Stream
from skialith.wal.trim import Trim
from skialith.writer.apart import Apart
from skialith.writer.batch import Batch, Undecodable
from skialith.writer.drain import Drain
from skialith.writer.held import Held
from skialith.writer.sinks import EventSink

from .fuses import Fuse, replace


def _ack_before_commit() -> None:
    """The writer acknowledges what it has not committed, and dies in between."""
    fuse = Fuse(1)

    def settle(self: Drain, batch: Batch) -> None:
        self.ack(batch.messages)
        if self._sink.name == "writer":
            time.sleep(0.1)  # the acknowledgements leave
            fuse.burn()
        self.write(batch.rows())

    replace(Drain, "settle", settle)


def _acknowledge_before_durable() -> None:
    """The caller gets an Ack at once, and the record goes out some calls later."""
    original = Log.append
    held: deque[tuple[Log, Sequence[Record]]] = deque()

    def hold(log: Log, records: Sequence[Record], deadline: float) -> None:
        held.append((log, records))
        if len(held) > 20:
            earlier, those = held.popleft()
            original(earlier, Ticket(those[0].agent_id, len(those)), those, deadline)

    def append(self: Log, ticket: Ticket, records: Sequence[Record], deadline: float) -> None:
        hold(self, records, deadline)
        ticket.acks.extend(Ack(1, False) for _ in records)
        if len(ticket.acks) == ticket.count:
            ticket.promise.set(ticket.acks)

    def append_one(self: Log, record: Record, deadline: float) -> Ack:
        hold(self, [record], deadline)
        return Ack(1, False)

    replace(Log, "append", append)
    replace(Log, "append_one", append_one)


def _acknowledge_a_failed_commit() -> None:
    """The writer takes a COMMIT that ended with its connection for one that was done."""
    original = SqlStore.write_records

    def write_records(self: SqlStore, records: Sequence[Record]) -> None:
        with contextlib.suppress(StoreConnectionLost):
            original(self, records)

    replace(SqlStore, "write_records", write_records)


def _hoard_records() -> None:
    """A writer that keeps in memory what it has stored."""
    original = EventSink.write
    kept: list[Record] = []

    def write(self: EventSink, records: Sequence[Record]) -> None:
        kept.extend(records)
        original(self, records)

    replace(EventSink, "write", write)


def _blame_the_record() -> None:
    """A writer that takes a database which is read-only or full for one that refuses a row, and does not ask it again."""
    for code in (1114, 1290):
        mysql_errors.DATA_ERRORS[code] = "ER_OF_THE_CANARY"

    def healthy(self: SqlStore, sink: str | None = None, like: object = None) -> None:
        return None

    replace(SqlStore, "probe", healthy)


def _store_without_key() -> None:
    """Every try stores a row of its own, because a record's identity is made up anew; and the writer dies before it acks."""
    original, fuse = EventSink.write, Fuse(1)

    def write(self: EventSink, records: Sequence[Record]) -> None:
        original(self, [record._replace(key=secrets.token_bytes(16)) for record in records])
        fuse.burn()

    replace(EventSink, "write", write)


def _write_unfenced() -> None:
    """An owner that does not ask the server to check its lease."""
    replace(frames, "fence", lambda lease: b"")


def _read_what_a_node_has() -> None:
    """A reader that does not wait until its node of a cluster has applied what the others committed."""
    original = MySqlStore._prepare

    def prepare(self: MySqlStore, connection: Any, table_lock_seconds: int) -> None:
        original(self, connection, table_lock_seconds)
        connection.query("SET SESSION wsrep_sync_wait = 0")

    replace(MySqlStore, "_prepare", prepare)


def _trim_by_any_word() -> None:
    """Trims believe whoever knows of nothing behind the floor, as a leader may that was replaced; the writer is slow, and
    dies after some."""

    async def behind_floor(self: Stream, consumer: str, deadline: float | None = None) -> tuple[int, None]:
        return int((await self.info(deadline))["state"]["last_seq"]), None

    replace(Stream, "behind_floor", behind_floor)
    original = EventSink.write

    def write(self: EventSink, records: Sequence[Record]) -> None:
        time.sleep(0.2)
        original(self, records)

    replace(EventSink, "write", write)
    once, fuse = Trim.once, Fuse(3)

    async def trim(self: Trim) -> bool:
        whole = await once(self)
        fuse.burn()
        return whole

    replace(Trim, "once", trim)


class _Blind:
    """A session that finds every row of graphs' threads at the beginning of time."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def rows(self, sql: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = self._session.rows(sql, arguments)
        return [(row[0], *(0 for _ in row[1:])) for row in found] if " seq" in sql else found


def _apply_without_position() -> None:
    """Operations on graphs' threads are applied as they come, whatever was applied before."""
    original = stores_graphs.apply

    def apply(session: Any, records: Sequence[Record]) -> None:
        original(_Blind(session), records)

    replace(stores_graphs, "apply", apply)


def _forget_steps() -> None:
    """A run that does not look for what is recorded."""
    original = StepPast.load

    def load(self: StepPast, memory: int | None = None) -> dict[bytes, FoundStep]:
        return {} if memory is None else original(self, memory)

    replace(StepPast, "load", load)


def _return_unrecorded_steps() -> None:
    """A step whose value is returned and whose record is not sent."""

    def append_one(self: Log, record: Record, deadline: float) -> Ack:
        return Ack(1, False)

    replace(Log, "append_one", append_one)


def _answer_before_durable() -> None:
    """A sidecar that answers at once, and appends some moments later."""
    from skialith.sidecar.engine import Engine

    original, late = Engine.append, set()

    async def append(self: Engine, *arguments: Any) -> Ack:
        async def later() -> None:
            await asyncio.sleep(0.2)
            await original(self, *arguments)

        late.add(asyncio.ensure_future(later()))
        return Ack(1, False)

    replace(Engine, "append", append)


def _write_for_any_owner() -> None:
    """A sidecar that neither holds its clients' leases nor asks whether they still wait."""
    from skialith.sidecar import writes

    replace(writes, "_lane", lambda agent_id, lease: agent_id)


def _take_sequences_for_records() -> None:
    """A writer that takes what comes at a sequence that it has stored for the record that it stored."""
    original, stored = EventSink.write, set[int]()

    def write(self: EventSink, records: Sequence[Record]) -> None:
        original(self, [record for record in records if record.position.seq not in stored])
        stored.update(record.position.seq for record in records)

    replace(EventSink, "write", write)


def _trust_any_server() -> None:
    """Whoever lives on does not look what the server that came back has."""
    replace(Continuity, "another_server", lambda self: None)


def _leave_first_seq_out() -> None:
    """Streams begin at sequence 1, as they do by default."""
    original = Api.call

    async def call(self: Api, name: str, body: dict[str, Any] | None = None, **how: Any) -> dict[str, Any]:
        if name.startswith("STREAM.CREATE.") and body is not None:
            body = {key: value for key, value in body.items() if key != "first_seq"}
        return await original(self, name, body, **how)

    replace(Api, "call", call)


def _remove_before_replay() -> None:
    """A replay that takes the letter away first, and dies in between."""
    fuse = Fuse(2)

    def replay(engine: Runtime, found: letters.Found) -> None:
        letters.discard(engine, found)
        fuse.burn()
        engine.store.write_records([found.letter.record] if found.letter.record is not None else [])

    replace(letters, "replay", replay)


def _bury_the_batch() -> None:
    """A record that is refused takes its batch with it."""

    def halve(self: Held, batch: Batch) -> None:
        refused = StoreDataError("one of the batch was refused")
        for message, record in zip(batch.messages, batch.records or (), strict=True):
            self.again(Batch([message], [record], refused=refused))

    replace(Held, "halve", halve)


def _bury_by_count() -> None:
    """What was delivered often is given up."""

    def store(self: Apart, message: Message, source: object) -> bool:
        raise Undecodable("delivered too often")

    replace(Apart, "store", store)


def _keep_every_ticket() -> None:
    """A process that never lets go of a call that it handed over."""
    original, kept = Log.append, []

    def append(self: Log, ticket: Ticket, records: Sequence[Record], *arguments: Any, **named: Any) -> None:
        kept.append((ticket, records))
        original(self, ticket, records, *arguments, **named)

    replace(Log, "append", append)


CANARIES: dict[str, Callable[[], None]] = {
    "ack before commit": _ack_before_commit,
    "acknowledge a failed commit": _acknowledge_a_failed_commit,
    "blame the record": _blame_the_record,
    "hoard records": _hoard_records,
    "answer before durable": _answer_before_durable,
    "write for any owner": _write_for_any_owner,
    "acknowledge before durable": _acknowledge_before_durable,
    "bury by count": _bury_by_count,
    "bury the batch": _bury_the_batch,
    "remove before replay": _remove_before_replay,
    "trim by any word": _trim_by_any_word,
    "apply without position": _apply_without_position,
    "store without key": _store_without_key,
    "take sequences for records": _take_sequences_for_records,
    "trust any server": _trust_any_server,
    "leave first_seq out": _leave_first_seq_out,
    "write unfenced": _write_unfenced,
    "forget steps": _forget_steps,
    "read what a node has": _read_what_a_node_has,
    "keep every ticket": _keep_every_ticket,
    "return unrecorded steps": _return_unrecorded_steps,
}
