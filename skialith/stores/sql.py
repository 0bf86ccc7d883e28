"""The store in plain SQL: every verb of the Protocol once, over the few things in which two databases differ."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..errors import ConfigurationError, InvalidArgument, StoreUnavailable
from ..records import DeadLetter, Kind, Position, Record, Trace
from . import migrate, rows
from .base import AgentSummary, Counts
from .rows import Payload, Row

WRITER = "writer"
_KEYS_PER_QUERY = 500
_PARTS_PER_QUERY = 8
_READ_TRIES = 5
"""How often a page is read again because a dead letter in it was replayed or discarded meanwhile."""
_PROBE_NAMESPACE = "skialith-probe"
_EVENTS = ", ".join(rows.EVENT_COLUMNS)
_CHECKPOINTS = ", ".join(rows.CHECKPOINT_COLUMNS)
_LETTERS = ", ".join(rows.DEAD_LETTER_COLUMNS)


class Session(Protocol):
    """One connection for the length of a transaction or of a read. Placeholders are ``?``."""

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Row]:
        """All rows of a query."""

    def run(self, sql: str, args: Sequence[Any] = ()) -> int:
        """Rows changed by a statement."""

    def insert(self, table: str, columns: Sequence[str], values: Iterable[Row]) -> None:
        """Insert rows; a row whose key is there already is passed over, anything else that is wrong raises."""


class _PartsMissing(Exception):
    """Parts of a payload are not there."""


class SqlStore(ABC):
    """What both stores share; see ``stores.base.Store`` for the promises."""

    name: str
    url: str
    for_update: str
    """Appended to a query whose rows are to stay as they are until the transaction ends."""
    table_exists: str
    """Query with a table's name for an argument; gives a row if it is there."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[Session]:
        """A session in which every query sees the newest commits."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[Session]:
        """A session in one transaction: committed at the end of the block, rolled back after any error."""

    @abstractmethod
    def migrating(self) -> AbstractContextManager[Session]:
        """A session that no other process has at the same time, in which the schema may be changed."""

    @abstractmethod
    def close(self) -> None:
        """Close every connection."""

    # ---- schema

    def migrate(self) -> list[int]:
        """Apply the missing migrations; a schema that is up to date is only looked at."""
        with self.reading() as session:
            if not self._missing(session):
                return []
        applied = []
        with self.migrating() as session:
            for migration in self._missing(session):
                for statement in migration.statements:
                    session.run(statement)
                row = (migration.version, migration.name, time.time_ns() // 1000)
                session.insert("skialith_migrations", ("version", "name", "applied_us"), [row])
                applied.append(migration.version)
        return applied

    def _missing(self, session: Session) -> list[migrate.Migration]:
        applied: set[int] = set()
        if session.rows(self.table_exists, ("skialith_migrations",)):
            applied = {row[0] for row in session.rows("SELECT version FROM skialith_migrations")}
        return migrate.missing(self.name, applied, self.url)

    def bind_wal(self, namespace: str, wal_id: str, *, adopt: bool = False) -> None:
        """Bind ``namespace`` to ``wal_id``, or find it bound; another binding is refused, or replaced if ``adopt``."""
        now = time.time_ns() // 1000
        with self.writing() as session:
            # Inserting first takes the row's lock, so of two logs that bind at once the second one sees the first.
            session.insert("wals", ("namespace", "wal_id", "bound_us"), [(namespace, wal_id, now)])
            bound = rows.text(session.rows("SELECT wal_id FROM wals WHERE namespace = ?", (namespace,))[0][0])
            if bound == wal_id:
                return
            if not adopt:
                raise ConfigurationError(
                    f"namespace {namespace!r} of {self.url} is fed by the log {bound!r}, but this process writes to the log "
                    f"{wal_id!r}: use the same NATS server or directory as before, another namespace or another database; "
                    "or, if the old log is gone for good, run `skialith migrate --adopt-wal`"
                )
            session.run("UPDATE wals SET wal_id = ?, bound_us = ? WHERE namespace = ?", (wal_id, now, namespace))

    # ---- writing

    def write_records(self, records: Sequence[Record]) -> None:
        """Store events and checkpoints in one transaction."""
        for record in records:
            rows.check_kind(record)
        if records:
            with self.writing() as session:
                self._insert_records(session, records)

    def _insert_records(self, session: Session, records: Iterable[Record]) -> None:
        events: list[Row] = []
        checkpoints: list[Row] = []
        large: list[tuple[str, Payload]] = []
        for record in rows.in_order(records):
            row, payload = rows.of_record(record)
            table, target = ("agent_events", events) if record.kind == Kind.EVENT else ("agent_checkpoints", checkpoints)
            target.append(row)
            if payload is not None:
                large.append((table, payload))
        session.insert("agent_events", rows.EVENT_COLUMNS, events)
        session.insert("agent_checkpoints", rows.CHECKPOINT_COLUMNS, checkpoints)
        for table, payload in large:
            self._insert_parts(session, table, payload)

    def _insert_parts(self, session: Session, table: str, payload: Payload, sink: str | None = None) -> None:
        """Write the parts of a large payload if the row just inserted is its own and not an earlier one of the same key.

        The row is locked by now, by the insert that created it or found it there; so whoever won has committed its parts too.
        """
        where = "record_key = ?" if sink is None else "record_key = ? AND sink = ?"
        args = (payload.row_key,) if sink is None else (payload.row_key, sink)
        winner = session.rows(f"SELECT {payload.column} FROM {table} WHERE {where}", args)[0][0]
        if winner != payload.key:
            return
        there = session.rows("SELECT COUNT(*) FROM payload_parts WHERE parts_key = ?", (payload.key,))[0][0]
        if there < rows.part_count(len(payload.data)):
            session.insert("payload_parts", rows.PART_COLUMNS, rows.parts(payload.key, payload.data))

    def write_traces(self, traces: Sequence[Trace]) -> None:
        """Store traces in one transaction."""
        if traces:
            with self.writing() as session:
                self._insert_traces(session, traces)

    def _insert_traces(self, session: Session, traces: Iterable[Trace]) -> None:
        in_order = sorted(traces, key=lambda trace: (trace.key, trace.position))
        session.insert("agent_traces", rows.TRACE_COLUMNS, [rows.of_trace(trace) for trace in in_order])

    def write_dead_letter(self, letter: DeadLetter) -> None:
        """Store one dead letter with its raw message and its record's fields."""
        row, large = rows.of_letter(letter)
        with self.writing() as session:
            session.insert("dead_letters", rows.DEAD_LETTER_COLUMNS, [row])
            for payload in large:
                self._insert_parts(session, "dead_letters", payload, letter.sink)

    def replay_dead_letter(self, letter: DeadLetter, record: Record | None, trace: Trace | None) -> None:
        """Write the record or trace and remove the letter in one transaction."""
        if record is None and trace is None:
            raise InvalidArgument(
                f"dead letter {letter.key.hex()} of {letter.sink} holds nothing that can be replayed: its message does not "
                "decode, or its body is lost; discard it",
                argument="record",
            )
        if record is not None:
            rows.check_kind(record)
        with self.writing() as session:
            if record is not None:
                self._insert_records(session, [record])
            if trace is not None:
                self._insert_traces(session, [trace])
            self._remove_letter(session, letter.sink, letter.key)

    def discard_dead_letter(self, sink: str, key: bytes) -> bool:
        """Remove one dead letter with its parts."""
        with self.writing() as session:
            return self._remove_letter(session, sink, key)

    def _remove_letter(self, session: Session, sink: str, key: bytes) -> bool:
        found = session.rows(
            f"SELECT raw_parts, body_parts FROM dead_letters WHERE sink = ? AND record_key = ?{self.for_update}", (sink, key)
        )
        for parts_key in found[0] if found else ():
            if parts_key is not None:
                session.run("DELETE FROM payload_parts WHERE parts_key = ?", (parts_key,))
        return session.run("DELETE FROM dead_letters WHERE sink = ? AND record_key = ?", (sink, key)) > 0

    # ---- is it there

    def ping(self) -> None:
        """Return if the database answers."""
        with self.reading() as session:
            session.rows("SELECT 1")

    def probe(self, sink: str | None = None) -> None:
        """Insert what ``sink`` would insert, into every table of its own, and roll it back."""
        try:
            with self.writing() as session:
                if sink != "trace_ingest":
                    kinds = (Kind.EVENT, Kind.CHECKPOINT)
                    self._insert_records(session, [_probe_record(kind) for kind in kinds])
                if sink != WRITER:
                    self._insert_traces(session, [_probe_trace()])
                raise _RollBack
        except _RollBack:
            return

    def stored(self, namespace: str, keys: Sequence[bytes]) -> set[bytes]:
        """Those of ``keys`` that have a row, or a dead letter of the writer."""
        found: set[bytes] = set()
        with self.reading() as session:
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                some = keys[start : start + _KEYS_PER_QUERY]
                within = f"record_key IN ({_marks(some)}) AND namespace = ?"
                # Dead letters first: one that is replayed between two queries is seen in its new place.
                for query, args in (
                    (f"SELECT record_key FROM dead_letters WHERE sink = ? AND {within}", (WRITER, *some, namespace)),
                    (f"SELECT record_key FROM agent_events WHERE {within}", (*some, namespace)),
                    (f"SELECT record_key FROM agent_checkpoints WHERE {within}", (*some, namespace)),
                ):
                    found.update(row[0] for row in session.rows(query, args))
        return found

    def counts(self, namespace: str) -> Counts:
        """Rows per table of one namespace."""
        tables = ("agent_events", "agent_checkpoints", "agent_traces", "dead_letters")
        with self.reading() as session:
            query = "SELECT COUNT(*) FROM {} WHERE namespace = ?"
            return Counts(*(session.rows(query.format(table), (namespace,))[0][0] for table in tables))

    # ---- reading

    def latest_checkpoint(self, namespace: str, agent_id: str) -> Record | None:
        """The checkpoint with the greatest position, dead letters included."""
        newest = "ORDER BY store_time_ns DESC, seq DESC LIMIT 1"
        for _ in range(_READ_TRIES):
            with self.reading() as session:
                letters = session.rows(
                    f"SELECT {_LETTERS} FROM dead_letters WHERE namespace = ? AND agent_id = ? AND sink = ? AND kind = ? {newest}",
                    (namespace, agent_id, WRITER, int(Kind.CHECKPOINT)),
                )
                stored = session.rows(
                    f"SELECT {_CHECKPOINTS} FROM agent_checkpoints WHERE namespace = ? AND agent_id = ? {newest}",
                    (namespace, agent_id),
                )
                row = None if not stored else rows.to_checkpoint(stored[0], None)
                if letters:
                    dead = rows.to_letter(letters[0], b"", None).record
                    if dead is not None and (row is None or dead.position > row.position):
                        try:
                            return dead._replace(body=_body(session, letters[0][-6:-3]))
                        except _PartsMissing:
                            continue
                return None if row is None else row._replace(body=self._whole(session, row, stored[0][-3:]))
        raise self._restless(agent_id)

    def events(
        self,
        namespace: str,
        agent_id: str,
        after: Position,
        up_to: Position | None,
        limit: int,
        *,
        max_bytes: int | None = None,
    ) -> list[tuple[Record, bool]]:
        """Events with ``after`` < position <= ``up_to``, merged with the dead ones."""
        for _ in range(_READ_TRIES):
            with self.reading() as session:
                page = self._page(session, namespace, agent_id, after, up_to, limit)
                try:
                    return self._load(session, _cut(page, limit, max_bytes))
                except _PartsMissing:
                    continue
        raise self._restless(agent_id)

    def _page(
        self, session: Session, namespace: str, agent_id: str, after: Position, up_to: Position | None, limit: int
    ) -> list[tuple[Position, bytes, int, bool]]:
        """(position, key, body size, dead) of the page's events in no order, at least the first ``limit`` of them."""
        within, args = _between(after, up_to)
        # Dead letters first: one that is replayed between the two queries is then seen twice, not never.
        dead = session.rows(
            "SELECT store_time_ns, seq, record_key, body_bytes FROM dead_letters WHERE namespace = ? AND agent_id = ? "
            f"AND sink = ? AND kind = ? AND {within} AND NOT EXISTS "
            "(SELECT 1 FROM agent_events WHERE agent_events.record_key = dead_letters.record_key) "
            "ORDER BY store_time_ns, seq LIMIT ?",
            (namespace, agent_id, WRITER, int(Kind.EVENT), *args, limit),
        )
        stored = session.rows(
            "SELECT store_time_ns, seq, record_key, body_bytes FROM agent_events WHERE namespace = ? AND agent_id = ? "
            f"AND {within} ORDER BY store_time_ns, seq LIMIT ?",
            (namespace, agent_id, *args, limit),
        )
        keys = {row[2] for row in stored}
        page = [(Position(row[0], row[1]), row[2], row[3], False) for row in stored]
        return page + [(Position(row[0], row[1]), row[2], row[3], True) for row in dead if row[2] not in keys]

    def _load(self, session: Session, page: list[tuple[Position, bytes, int, bool]]) -> list[tuple[Record, bool]]:
        """The whole records of a page. Raises ``_PartsMissing`` if a dead one is gone."""
        found: dict[bytes, Record] = {}
        for row in self._by_key(session, _LETTERS, "dead_letters", [key for _, key, _, dead in page if dead], WRITER):
            record = rows.to_letter(row, b"", None).record
            if record is not None:
                found[record.key] = record._replace(body=_body(session, row[-6:-3]))
        for row in self._by_key(session, _EVENTS, "agent_events", [key for _, key, _, dead in page if not dead]):
            record = rows.to_event(row, None)
            found[record.key] = record._replace(body=self._whole(session, record, row[-3:]))
        if any(key not in found for _, key, _, _ in page):
            raise _PartsMissing
        return [(found[key], dead) for _, key, _, dead in page]

    def _by_key(
        self, session: Session, columns: str, table: str, keys: Sequence[bytes], sink: str | None = None
    ) -> Iterable[Row]:
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            where, args = ("", ()) if sink is None else ("sink = ? AND ", (sink,))
            yield from session.rows(f"SELECT {columns} FROM {table} WHERE {where}record_key IN ({_marks(some)})", (*args, *some))

    def _whole(self, session: Session, record: Record, columns: Row) -> bytes | None:
        try:
            return _body(session, columns)
        except _PartsMissing:
            raise StoreUnavailable(
                f"{rows.describe(record)}: parts of its payload are missing from payload_parts in {self.url}, though its row "
                "is there; they were deleted by something other than Skialith, restore them from a backup",
                retryable=False,
            ) from None

    def _restless(self, agent_id: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"agent {agent_id!r}: its dead letters changed {_READ_TRIES} times while they were read; read again"
        )

    def agents(self, namespace: str, *, after: str = "", limit: int = 100) -> list[AgentSummary]:
        """Agents with rows, ordered by the bytes of their id."""
        found: dict[bytes, dict[str, tuple[int, int]]] = {}
        with self.reading() as session:
            for table, sink in (("dead_letters", f" AND sink = '{WRITER}'"), ("agent_events", ""), ("agent_checkpoints", "")):
                groups = session.rows(
                    f"SELECT agent_id, COUNT(*), MAX(store_time_ns) FROM {table} WHERE namespace = ? AND agent_id > ?{sink} "
                    "GROUP BY agent_id ORDER BY agent_id LIMIT ?",
                    (namespace, after, limit),
                )
                for agent_id, count, last_ns in groups:
                    found.setdefault(rows.text(agent_id).encode(), {})[table] = (count, last_ns)
            return [
                AgentSummary(
                    agent_id=key.decode(),
                    events=found[key].get("agent_events", (0, 0))[0],
                    checkpoints=found[key].get("agent_checkpoints", (0, 0))[0],
                    step_index=self._step(session, namespace, key.decode(), found[key].keys()),
                    last_us=max(last_ns for _, last_ns in found[key].values()) // 1000,
                )
                for key in sorted(found)[:limit]
            ]

    def _step(self, session: Session, namespace: str, agent_id: str, tables: Iterable[str]) -> int:
        """The step of the last checkpoint, dead letters included; 0 without one."""
        newest: list[Row] = []
        columns = "SELECT store_time_ns, seq, step_index FROM"
        order = "ORDER BY store_time_ns DESC, seq DESC LIMIT 1"
        if "dead_letters" in tables:
            newest += session.rows(
                f"{columns} dead_letters WHERE namespace = ? AND agent_id = ? AND sink = ? AND kind = ? {order}",
                (namespace, agent_id, WRITER, int(Kind.CHECKPOINT)),
            )
        if "agent_checkpoints" in tables:
            newest += session.rows(
                f"{columns} agent_checkpoints WHERE namespace = ? AND agent_id = ? {order}", (namespace, agent_id)
            )
        return int(max(newest, default=(0, 0, 0))[2])

    # ---- dead letters

    def dead_letters(
        self, namespace: str, *, sink: str | None = None, since: Position | None = None, limit: int = 100
    ) -> list[DeadLetter]:
        """Dead letters, oldest first."""
        where, args = "namespace = ?", [namespace]
        if sink is not None:
            where, args = f"{where} AND sink = ?", [*args, sink]
        start: tuple[int, ...] = ()
        if since is not None:
            where += " AND store_time_ns >= ? AND (store_time_ns > ? OR seq >= ?)"
            start = (since.time_ns, since.time_ns, since.seq)
        with self.reading() as session:
            found = session.rows(
                f"SELECT {_LETTERS} FROM dead_letters WHERE {where} ORDER BY store_time_ns, seq LIMIT ?", (*args, *start, limit)
            )
            letters = (_letter(session, row) for row in found)
            return [letter for letter in letters if letter is not None]

    def dead_letter(self, sink: str, key: bytes) -> DeadLetter | None:
        """One dead letter, or None."""
        with self.reading() as session:
            found = session.rows(f"SELECT {_LETTERS} FROM dead_letters WHERE sink = ? AND record_key = ?", (sink, key))
            return _letter(session, found[0]) if found else None


class _RollBack(Exception):
    """Ends a transaction whose changes are not wanted."""


def _letter(session: Session, row: Row) -> DeadLetter | None:
    """The letter of a row with its payloads; None if it was replayed or discarded since the row was read."""
    try:
        return rows.to_letter(row, _body(session, row[9:12]) or b"", _body(session, row[-6:-3]))
    except _PartsMissing:
        return None


def _body(session: Session, columns: Row) -> bytes | None:
    """The payload behind its three columns (inline, size, key of the parts); None if there is none.

    Raises ``_PartsMissing``. Read a few parts at a time, because the driver holds a whole answer in memory beside it.
    """
    inline, size, parts_key = columns
    if parts_key is None:
        return None if inline is None else bytes(inline)
    pieces: list[bytes] = []
    for start in range(0, rows.part_count(size), _PARTS_PER_QUERY):
        found = session.rows(
            "SELECT data FROM payload_parts WHERE parts_key = ? AND n >= ? AND n < ? ORDER BY n",
            (parts_key, start, start + _PARTS_PER_QUERY),
        )
        pieces.extend(row[0] for row in found)
    if sum(map(len, pieces)) != size:
        raise _PartsMissing
    return b"".join(pieces)


def _cut(
    page: list[tuple[Position, bytes, int, bool]], limit: int, max_bytes: int | None
) -> list[tuple[Position, bytes, int, bool]]:
    """The first ``limit`` of a page, fewer if their bodies pass ``max_bytes``, but one at least."""
    page = sorted(page)[:limit]
    if max_bytes is not None:
        size = 0
        for n, (_, _, body_bytes, _) in enumerate(page):
            size += body_bytes
            if n and size > max_bytes:
                return page[:n]
    return page


def _between(after: Position, up_to: Position | None) -> tuple[str, tuple[int, ...]]:
    """The condition after < position <= up_to. Not as a comparison of pairs: for that MySQL does not use an index."""
    sql = "store_time_ns >= ? AND (store_time_ns > ? OR seq > ?)"
    args: tuple[int, ...] = (after.time_ns, after.time_ns, after.seq)
    if up_to is not None:
        sql += " AND store_time_ns <= ? AND (store_time_ns < ? OR seq <= ?)"
        args += (up_to.time_ns, up_to.time_ns, up_to.seq)
    return sql, args


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


def _probe_record(kind: Kind) -> Record:
    """A record that every healthy database takes, with a key that no record has."""
    event_id = "probe" if kind == Kind.EVENT else ""
    return Record(kind, _PROBE_NAMESPACE, "probe", event_id, os.urandom(16), 0, "probe", 0, 0, b"\xc0", Position(1, 1))


def _probe_trace() -> Trace:
    return Trace(os.urandom(16), _PROBE_NAMESPACE, "probe", "probe", 0, "probe", "{}", 0, Position(1, 1))
