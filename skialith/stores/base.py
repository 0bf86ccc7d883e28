"""What a database must do for Skialith; every store passes the one suite in tests/conformance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from ..graphs import Put, Typed
from ..records import NOWHERE, DeadLetter, Position, Record, Trace, iso


class AgentSummary(NamedTuple):
    """One agent as the database knows it.

    ``events`` and ``checkpoints``: rows, without dead letters. ``step_index``: of the last checkpoint, 0 without one.
    ``last_us``: when the log stored the agent's last record, Unix microseconds.
    """

    agent_id: str
    events: int
    checkpoints: int
    step_index: int
    last_us: int

    def document(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "agent_id": self.agent_id,
            "events": self.events,
            "checkpoints": self.checkpoints,
            "step_index": self.step_index,
            "last_at": iso(self.last_us),
        }


class Counts(NamedTuple):
    """Rows of one namespace."""

    events: int
    checkpoints: int
    traces: int
    dead_letters: int


class StepEntry(NamedTuple):
    """One recorded step. ``record``: None if it was left out of the page for its size; its body is None if that is lost."""

    key: bytes
    position: Position
    record: Record | None


class LetterPlace(NamedTuple):
    """Where a dead letter stands among the others: two sinks may have given up one message."""

    position: Position
    sink: str
    key: bytes


Scope: TypeAlias = tuple[Literal["ns_key", "thread_key", "namespace"], bytes | str]
"""Which checkpoints of graphs: of one checkpoint namespace, of a thread, of a whole namespace."""


class Cell(NamedTuple):
    """A checkpoint of a graph, without the values of its channels: ``put.blobs`` is empty."""

    key: bytes
    position: Position
    put: Put


class Graphs(Protocol):
    """What is read of the threads of graphs in one namespace. Raises as :class:`Store`."""

    def cells(
        self, scope: Scope, before: tuple[str, bytes] | None, limit: int, run_keys: Sequence[bytes] = ()
    ) -> list[Cell]:
        """At most ``limit`` checkpoints in ``scope``, the greatest ids first, those of one id by descending key.

        ``before``: only those behind this id and key in that order. ``run_keys``: only those of these runs.
        """

    def cell(self, key: bytes) -> Cell | None:
        """The checkpoint with this key, None if it is not there or was deleted."""

    def contents(
        self, cell_keys: Sequence[bytes], blob_keys: Sequence[bytes]
    ) -> tuple[dict[bytes, tuple[Position, Typed]], list[Record]]:
        """Those of the channel values that are there, by key, and the records of what is pending at the checkpoints, oldest
        first (agent id and times left out)."""

    def ends(
        self, thread_keys: Sequence[bytes], cell_keys: Sequence[bytes]
    ) -> tuple[dict[bytes, Position], dict[bytes, Position], dict[bytes, Position]]:
        """When threads were deleted last, checkpoints put or deleted last, and deleted last, by key; those without a row
        left out."""

    def dead(self, thread_name: str | None) -> list[Record]:
        """Dead letters of the writer that are operations on one thread, or on any, and have their body."""


class Store(Protocol):
    """A database holding the records of any number of namespaces. Safe for any number of threads.

    Every method may raise: ``StoreUnavailable`` (anything transient: down, locked, full, wrong password, missing table,
    read-only), ``StoreConnectionLost`` (the connection went away during a statement), ``StoreDataError`` (the database
    refused a row because of its data; only codes from the short list). After any error nothing of the call is left
    half-done: the transaction was rolled back or its fate is unknown because COMMIT itself failed; calling again is safe.
    """

    name: str
    """``"mysql"`` or ``"sqlite"``."""
    url: str
    """The database URL without its password."""

    def migrate(self) -> list[int]:
        """Apply the missing numbered migrations under a lock; safe when raced by other processes. Returns those applied."""

    def bind_wal(self, namespace: str, wal_id: str, *, adopt: bool = False) -> None:
        """Remember that the log ``wal_id`` feeds ``namespace``.

        Another log than the one that is remembered is refused with ``ConfigurationError``, or replaces it if ``adopt``.
        """

    def bound_wal(self, namespace: str) -> str | None:
        """The log that feeds ``namespace``; None if none ever did, or the schema is not there yet."""

    def write_records(self, records: Sequence[Record]) -> None:
        """Store events and checkpoints in one transaction, idempotently: a key that is there already stays as it was."""

    def write_traces(self, traces: Sequence[Trace]) -> None:
        """Store traces in one transaction, idempotently."""

    def write_dead_letter(self, letter: DeadLetter) -> None:
        """Store one dead letter, idempotently by (sink, key)."""

    def stored(self, namespace: str, keys: Sequence[bytes]) -> set[bytes]:
        """Those of ``keys`` that are done with: a row in events or checkpoints, or a dead letter of the sink ``writer``."""

    def ping(self) -> None:
        """Return if the database answers ``SELECT 1``."""

    def probe(self, sink: str | None = None, like: Record | Trace | None = None) -> None:
        """Return if a well-formed record can be inserted now; inserts one and rolls it back.

        ``sink``: ``"writer"`` tries an event and a checkpoint, ``"trace_ingest"`` a trace, None a row in every table. With
        ``like`` only a harmless one of its lengths and numbers is tried, as far as Skialith allows them: a row that is refused
        while that one is taken is bad itself. Never raises ``StoreDataError``: whoever refuses these is unavailable.
        """

    def latest_checkpoint(self, namespace: str, agent_id: str) -> Record | None:
        """The last checkpoint (``records.supersedes``), dead letters included, with its whole body; None if there is none.

        The body is None only for a dead letter whose large body was lost.
        """

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
        """Events with ``after`` < position <= ``up_to`` (None: no end), oldest first, at most ``limit``, with whole bodies.

        The flag is True for an event that is a dead letter of the sink ``writer``; its body is None if it was lost. An event
        that is both stored and a dead letter is the stored one. ``max_bytes``: the page ends before the body that passes
        it (but holds one event at least), so then a short page is not the last one; without it, fewer than ``limit`` is.
        """

    def last_event(self, namespace: str, agent_id: str) -> Position:
        """The greatest position of an event, dead letters of the sink ``writer`` included; ``NOWHERE`` without one."""

    def steps(
        self, namespace: str, agent_id: str, after: Position, limit: int, *, max_bytes: int | None = None
    ) -> list[StepEntry]:
        """The agent's recorded steps behind ``after``, oldest first, at most ``limit`` (fewer: these are the last).

        Dead letters of the sink ``writer`` included. ``max_bytes``: records are left out of their entries from the body on
        that passes it. Costs the number of steps, however many other events the agent has.
        """

    def event(self, namespace: str, agent_id: str, key: bytes) -> Record | None:
        """The agent's event with this key and its whole body, dead letters of the sink ``writer`` included; None without one.

        The body is None only for a dead letter whose large body was lost.
        """

    def agents(self, namespace: str, *, after: str = "", prefix: str = "", limit: int = 100) -> list[AgentSummary]:
        """Agents with rows, dead letters of the writer included, ordered by the bytes of their id, those behind ``after``.

        ``prefix``: only those whose id begins with it.
        """

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
        """Traces behind ``after``, oldest first by position, at most ``limit`` (1 or more); and where to go on.

        That is None if these are the last. ``agent_id``, ``event_type``: only these, compared exactly. ``until_ns``: only those
        that the log stored before this time. ``max_bytes``: the page ends behind the payload that passes it.
        ``max_scanned``: with both filters the page ends, maybe empty, behind so many traces of the agent. A time of creation
        that the database could not hold is the nearest one it could.
        """

    def counts(self, namespace: str) -> Counts:
        """Rows per table of one namespace."""

    def newest(self, namespace: str) -> Position | None:
        """The position of the event, checkpoint or dead letter of the writer that the log stored last; None without one."""

    def turns(self, namespace: str, since_ns: int, limit: int) -> list[tuple[Position, Position]]:
        """Where the log went back: the last row before and the first one after, oldest first, at most ``limit``.

        Of those that the log stored since ``since_ns``, neighbours in time of which the later one has the lower sequence, or
        the same. Looks at all rows of the namespace.
        """

    def sequences(self, namespace: str, first: int, last: int, between_ns: tuple[int, int], limit: int) -> list[int]:
        """Sequences from ``first`` to ``last`` that have a row, stored by the log between these times (both included); in
        order, each once, at most ``limit``.

        Of operations on graphs' threads only those whose traces were not replaced by later ones.
        """

    def count_dead_letters(self, namespace: str) -> int:
        """Rows of ``dead_letters`` of one namespace."""

    def dead_letters(
        self,
        namespace: str,
        *,
        sink: str | None = None,
        after: LetterPlace | None = None,
        limit: int = 100,
        whole: bool = True,
    ) -> list[DeadLetter]:
        """Dead letters in the order of ``LetterPlace``; ``after``: only those behind it.

        Without ``whole`` they come without their payloads: ``raw`` is empty and the record's body None. With it a letter that
        is replayed or discarded while it is read is left out.
        """

    def dead_keys(self, namespace: str, sink: str, since: Position) -> list[tuple[str, bytes]]:
        """Subject and key of every dead letter of ``sink`` at or behind ``since``, by its time or by its sequence."""

    def dead_letter(self, sink: str, key: bytes) -> DeadLetter | None:
        """One dead letter, or None."""

    def replay_dead_letter(self, letter: DeadLetter, record: Record | None, trace: Trace | None) -> None:
        """Write what the letter held (record for ``writer``, trace for ``trace_ingest``) and remove it, in one transaction.

        Raises ``InvalidArgument`` if both are None. A letter that is gone already is no error: what it held is written.
        """

    def discard_dead_letter(self, sink: str, key: bytes) -> bool:
        """Remove one dead letter; False if it was not there."""

    def graph_settled(self, record: Record) -> bool:
        """Whether the operation of ``record`` (its body may be lost) is stored, or what it made deleted by a later one."""

    def graphs(self, namespace: str) -> AbstractContextManager[Graphs]:
        """The threads of graphs, read over one connection for the length of the block; every question sees the newest commits."""

    def close(self) -> None:
        """Close every connection. May be called twice; a closed store raises ``StoreUnavailable``."""
