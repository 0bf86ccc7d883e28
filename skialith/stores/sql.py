"""The store in plain SQL: every verb of the Protocol once, over the few things in which two databases differ."""

from __future__ import annotations

import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from ..config import DATABASE_MIGRATION_PAUSE_SECONDS, DATABASE_MIGRATION_TRIES, DATABASE_STATEMENT_ROWS
from ..errors import (
    ConfigurationError,
    InvalidArgument,
    StoreDataError,
    StoreMisconfigured,
    StoreUnavailable,
    making_rows,
)
from ..records import NOWHERE, DeadLetter, Kind, Position, Record, Trace
from . import gaps, graph_read, graphs, lists, probes, read, rows
from .base import AgentSummary, Counts, LetterPlace, StepEntry
from .migrate import Migration, missing
from .read import TRACE_INGEST, WRITER
from .rows import Payload, Row


class Session(read.Queries, Protocol):
    """One connection for the length of a transaction or of a read. Placeholders are ``?``."""

    def run(self, sql: str, args: Sequence[Any] = ()) -> int:
        """Rows changed by a statement."""

    for_update: str
    """Appended to a query whose rows are to stay as they are until the transaction ends."""

    @property
    def alone(self) -> bool:
        """Whether a lock keeps everybody out; in a cluster that takes writes at every node it keeps out those of its own node."""

    def insert(self, table: str, columns: Sequence[str], values: list[Row]) -> None:
        """Insert rows; a row whose key is there already is passed over, anything else that is wrong raises."""

    def hold(self, table: str, key: str, number: str, keys: Sequence[Any]) -> None:
        """Keep transactions of all nodes of a cluster from doing the same to these rows, which this one has locked at its own.

        ``key``, ``number``: columns; the second one is left as it was. Of two such transactions one fails at its commit.
        """


class SqlStore(ABC):
    """What both stores share; see ``stores.base.Store`` for the promises."""

    name: str
    url: str
    table_exists: str
    """Query with a table's name for an argument; gives a row if it is there."""
    unique_indexes: str
    """Query that gives table and name of every unique index but the primary keys, of all tables in the database."""

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
        """Apply the missing migrations; a schema that is up to date is only looked at.

        Where no lock keeps out the processes of other nodes, they may be making the same changes, and a statement fails because
        its like was faster. Migrations may be run again, so this one is.
        """
        for last in (n == DATABASE_MIGRATION_TRIES for n in range(1, DATABASE_MIGRATION_TRIES + 1)):
            alone = True
            try:
                with self.reading() as session:
                    alone = session.alone
                    self._check_indexes(session)
                    if not self._missing(session):
                        return []
                return self._apply_missing()
            except StoreUnavailable:
                if alone or last:
                    raise
            time.sleep(random.uniform(0, DATABASE_MIGRATION_PAUSE_SECONDS))
        raise AssertionError("the last try returns or raises")

    def _apply_missing(self) -> list[int]:
        applied = []
        with self.migrating() as session:
            for migration in self._missing(session):
                for statement in migration.statements:
                    session.run(statement)
                row = (migration.version, migration.name, time.time_ns() // 1000)
                session.insert("skialith_migrations", ("version", "name", "applied_us"), [row])
                applied.append(migration.version)
        return applied

    def _check_indexes(self, session: Session) -> None:
        """Refuse a unique index that somebody added: an insert passes over what it refuses, as over what is there already."""
        for table, index in session.rows(self.unique_indexes):
            if rows.text(table) in rows.TABLES:
                raise StoreMisconfigured(
                    f"the table {rows.text(table)} of {self.url} has the unique index {rows.text(index)!r}, which Skialith did "
                    "not make: a record that it refuses would be taken for one that is stored. Drop it, or make it one that "
                    "is not unique"
                )

    def _missing(self, session: Session) -> list[Migration]:
        applied: set[int] = set()
        if session.rows(self.table_exists, ("skialith_migrations",)):
            applied = {row[0] for row in session.rows("SELECT version FROM skialith_migrations")}
        return missing(self.name, applied, self.url)

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

    def bound_wal(self, namespace: str) -> str | None:
        """The log that feeds ``namespace``, or None."""
        with self.reading() as session:
            if not session.rows(self.table_exists, ("wals",)):
                return None
            bound = session.rows("SELECT wal_id FROM wals WHERE namespace = ?", (namespace,))
            return rows.text(bound[0][0]) if bound else None

    # ---- writing

    def write_records(self, records: Sequence[Record]) -> None:
        """Store events and checkpoints in one transaction."""
        rows.check_kinds(records)
        if records:
            with self.writing() as session:
                self._insert_records(session, records)

    def _insert_records(self, session: Session, records: Iterable[Record]) -> None:
        with making_rows():
            plain, operations = rows.by_tables(records)
            events, checkpoints, large = rows.of_records(rows.in_order(plain))
            steps = rows.of_steps(events)
        session.insert("agent_events", rows.EVENT_COLUMNS, events)
        if steps:
            session.insert("agent_steps", rows.STEP_COLUMNS, steps)
        session.insert("agent_checkpoints", rows.CHECKPOINT_COLUMNS, checkpoints)
        for table, payload in large:
            self._insert_parts(session, table, payload)
        if operations:
            graphs.apply(session, operations)

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
            for part in rows.parts(payload.key, payload.data):
                session.insert("payload_parts", rows.PART_COLUMNS, [part])

    def write_traces(self, traces: Sequence[Trace]) -> None:
        """Store traces in one transaction."""
        if traces:
            with self.writing() as session:
                self._insert_traces(session, traces)

    def _insert_traces(self, session: Session, traces: Iterable[Trace]) -> None:
        with making_rows():
            in_order = rows.in_order(traces)
        for start in range(0, len(in_order), DATABASE_STATEMENT_ROWS):
            with making_rows():
                some = rows.of_traces(in_order[start : start + DATABASE_STATEMENT_ROWS])
            session.insert("agent_traces", rows.TRACE_COLUMNS, some)

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
            rows.check_kinds([record])
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
            f"SELECT raw_parts, body_parts FROM dead_letters WHERE sink = ? AND record_key = ?{session.for_update}",
            (sink, key),
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

    def probe(self, sink: str | None = None, like: Record | Trace | None = None) -> None:
        """Insert what ``sink`` would insert, into every table of its own, and roll it back."""
        try:
            with self.writing() as session:
                self._insert_probes(session, sink, like)
                raise _RollBack
        except _RollBack:
            return
        except StoreDataError as error:
            raise StoreUnavailable(
                f"no record is to blame, well-formed ones are refused too: {error}. The tables are not as Skialith made them; "
                "undo that"
            ) from error

    def _insert_probes(self, session: Session, sink: str | None, like: Record | Trace | None) -> None:
        if isinstance(like, Trace):
            self._insert_traces(session, [probes.like_trace(like)])
            return
        if like is not None:
            self._insert_records(session, [probes.like(like)])
            return
        if sink != TRACE_INGEST:
            self._insert_records(session, [probes.step(), *map(probes.plain, (Kind.EVENT, Kind.CHECKPOINT))])
        if sink != WRITER:
            self._insert_traces(session, [probes.trace()])
        if sink is None:
            self._check_indexes(session)
            self._insert_records(session, [*probes.wide(), probes.graph()])
            session.insert("payload_parts", rows.PART_COLUMNS, [(os.urandom(16), 0, b"probe")])
            session.insert("dead_letters", rows.DEAD_LETTER_COLUMNS, [rows.of_letter(probes.letter())[0]])

    # ---- reading

    def stored(self, namespace: str, keys: Sequence[bytes]) -> set[bytes]:
        """Those of ``keys`` that have a row, or a dead letter of the writer."""
        with self.reading() as session:
            return read.stored(session, namespace, keys)

    def latest_checkpoint(self, namespace: str, agent_id: str) -> Record | None:
        """The checkpoint with the greatest position, dead letters included."""
        with self.reading() as session:
            return read.latest_checkpoint(session, namespace, agent_id)

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
        with self.reading() as session:
            return read.events(session, (namespace, agent_id), after, up_to, limit, max_bytes)

    def steps(
        self, namespace: str, agent_id: str, after: Position, limit: int, *, max_bytes: int | None = None
    ) -> list[StepEntry]:
        """Recorded steps behind ``after``, dead letters included."""
        with self.reading() as session:
            return read.steps(session, (namespace, agent_id), after, limit, max_bytes)

    def last_event(self, namespace: str, agent_id: str) -> Position:
        """Position of the agent's last event, dead letters included."""
        with self.reading() as session:
            return read.last_event(session, namespace, agent_id)

    def event(self, namespace: str, agent_id: str, key: bytes) -> Record | None:
        """The event with this key, dead letters included."""
        with self.reading() as session:
            return read.event(session, (namespace, agent_id), key)

    def agents(self, namespace: str, *, after: str = "", prefix: str = "", limit: int = 100) -> list[AgentSummary]:
        """Agents with rows, ordered by the bytes of their id."""
        with self.reading() as session:
            return lists.agents(session, namespace, after, prefix, limit)

    def traces(
        self,
        namespace: str,
        *,
        agent_id: str | None = None,
        event_type: str | None = None,
        after: Position = NOWHERE,
        until_ns: int | None = None,
        limit: int = 100,
        max_bytes: int | None = None,
        max_scanned: int | None = None,
    ) -> tuple[list[Trace], Position | None]:
        """A page of traces, oldest first, and where to go on."""
        wanted = lists.Wanted(namespace, agent_id, event_type, after, until_ns)
        with self.reading() as session:
            return lists.traces(session, wanted, limit, max_bytes, max_scanned)

    def counts(self, namespace: str) -> Counts:
        """Rows per table of one namespace."""
        tables = ("agent_events", "agent_checkpoints", "agent_traces", "dead_letters")
        with self.reading() as session:
            query = "SELECT COUNT(*) FROM {} WHERE namespace = ?"
            return Counts(*(session.rows(query.format(table), (namespace,))[0][0] for table in tables))

    def newest(self, namespace: str) -> Position | None:
        """The position of the row that the log stored last."""
        with self.reading() as session:
            return gaps.newest(session, namespace)

    def turns(self, namespace: str, since_ns: int, limit: int) -> list[tuple[Position, Position]]:
        """Neighbours in time whose sequences do not rise."""
        with self.reading() as session:
            return gaps.turns(session, namespace, since_ns, limit)

    def sequences(self, namespace: str, first: int, last: int, between_ns: tuple[int, int], limit: int) -> list[int]:
        """Sequences of rows in a range, by when they were stored."""
        with self.reading() as session:
            return gaps.sequences(session, namespace, first, last, between_ns, limit)

    def count_dead_letters(self, namespace: str) -> int:
        """Rows of ``dead_letters`` of one namespace."""
        with self.reading() as session:
            return int(session.rows("SELECT COUNT(*) FROM dead_letters WHERE namespace = ?", (namespace,))[0][0])

    def dead_letters(
        self,
        namespace: str,
        *,
        sink: str | None = None,
        after: LetterPlace | None = None,
        limit: int = 100,
        whole: bool = True,
    ) -> list[DeadLetter]:
        """Dead letters, oldest first."""
        with self.reading() as session:
            return read.letters(session, namespace, sink, after, limit, whole)

    def dead_keys(self, namespace: str, sink: str, since: Position) -> list[tuple[str, bytes]]:
        """Subject and key of every dead letter of ``sink`` at or behind ``since``, by time or by sequence."""
        query = (
            "SELECT subject, record_key FROM dead_letters WHERE namespace = ? AND sink = ? "
            "AND (store_time_ns >= ? OR seq >= ?)"
        )
        with self.reading() as session:
            found = session.rows(query, (namespace, sink, since.time_ns, since.seq))
            return [(rows.text(subject), bytes(key)) for subject, key in found]

    def dead_letter(self, sink: str, key: bytes) -> DeadLetter | None:
        """One dead letter, or None."""
        with self.reading() as session:
            return read.letter(session, sink, key)

    # ---- threads of graphs

    def graph_settled(self, record: Record) -> bool:
        """Whether an operation is in the tables, or what it made was deleted."""
        with self.reading() as session:
            return graph_read.settled(session, record)

    @contextmanager
    def graphs(self, namespace: str) -> Iterator[graph_read.GraphTables]:
        """The threads of graphs, read over one connection."""
        with self.reading() as session:
            yield graph_read.GraphTables(session, namespace)


class _RollBack(Exception):
    """Ends a transaction whose changes are not wanted."""
