"""The two ends of a drain as Protocols, and the two sinks: rows of events and checkpoints, and rows of traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from .. import _rows, trace_json
from ..config import MAX_EVENT_TYPE_CHARACTERS, WRITER_BATCH_BYTES
from ..errors import BodyMissing, making_rows
from ..records import Codec, DeadLetter, Kind, Message, Record, Trace

_TRACES_AT_ONCE = 128
"""Records whose JSON is made in one go, unless one is compressed: then each may be 1 MiB as JSON, and they go one by one."""


class Bodies(Protocol):
    """Where the bodies of large records are."""

    def read_body(self, record: Record) -> bytes:
        """The body of a large record. Raises ``BodyMissing``, or ``WalError`` when the log cannot be reached."""


class Source(Bodies, Protocol):
    """A consumer of the log. Blocking; one drain's two threads call it."""

    def pull(self, rows: int, size: int, linger: float, wait: float) -> list[Message]:
        """Up to ``rows`` messages or ``size`` bytes, ``linger`` s after the first one; [] after ``wait`` s without one.

        Raises ``WalError`` when the log cannot be reached. Fetches ahead: the next batch arrives while one is stored.
        """

    def ack(self, messages: Sequence[Message]) -> None:
        """Acknowledge, fire and forget; passes over messages pulled on an older connection."""

    def nak(self, messages: Sequence[Message], delay: float = 0.0) -> None:
        """Give back, to be delivered again ``delay`` seconds from now; fire and forget as ``ack``."""

    def in_progress(self, messages: Sequence[Message]) -> None:
        """Start the messages' ack wait anew; fire and forget as ``ack``. Called from the drain's second thread."""

    def bury(self, letter: DeadLetter) -> None:
        """Append to the dead-letter stream; returns when it is durable there. Raises ``WalError``."""


class BoundSource:
    """A consumer of a log that is pulled from only while ``bind`` finds that this log feeds the database."""

    def __init__(self, source: Source, bind: Callable[[], None]) -> None:
        self._source = source
        self._bind = bind
        self.ack, self.nak, self.in_progress = source.ack, source.nak, source.in_progress
        self.read_body, self.bury = source.read_body, source.bury

    def pull(self, rows: int, size: int, linger: float, wait: float) -> list[Message]:
        """As :meth:`Source.pull`; raises what ``bind`` does."""
        self._bind()
        return self._source.pull(rows, size, linger, wait)


class Sink(Protocol):
    """Where a drain puts records. The errors are those of ``stores.base.Store``; every method may be called again."""

    name: str
    """``"writer"`` or ``"trace_ingest"``: the consumer, and ``DeadLetter.sink``."""
    kinds: frozenset[int]
    """Kinds of records that it stores."""

    def load(self, record: Record, source: Bodies) -> Record | None:
        """``record`` with all that ``write`` needs of it; None when there is nothing left to do but to acknowledge it.

        Raises ``BodyMissing`` when its body is neither in the log nor in the database.
        """

    def write(self, records: Sequence[Record]) -> None:
        """Store ``records``, idempotently; they are committed when it returns."""

    def ping(self) -> None:
        """Return if the database answers."""

    def probe(self, like: Record | None = None) -> None:
        """Return if the database takes a well-formed record now; with ``like`` a harmless one of that shape."""

    def bury(self, letter: DeadLetter) -> None:
        """Store one dead letter, idempotently; it is committed when it returns."""


class Database(Protocol):
    """What both sinks need of a store; see ``stores.base.Store``."""

    def write_dead_letter(self, letter: DeadLetter) -> None: ...

    def ping(self) -> None: ...

    def probe(self, sink: str | None = None, like: Record | Trace | None = None) -> None: ...


class EventDatabase(Database, Protocol):
    """What the event sink needs of a store."""

    def write_records(self, records: Sequence[Record]) -> None: ...

    def stored(self, namespace: str, keys: Sequence[bytes]) -> set[bytes]: ...

    def graph_settled(self, record: Record) -> bool: ...


class TraceDatabase(Database, Protocol):
    """What the trace sink needs of a store."""

    def write_traces(self, traces: Sequence[Trace]) -> None: ...


class _DatabaseSink:
    name: str
    kinds: frozenset[int]

    def __init__(self, database: Database) -> None:
        self._database = database

    def ping(self) -> None:
        self._database.ping()

    def probe(self, like: Record | None = None) -> None:
        self._database.probe(self.name, like)

    def bury(self, letter: DeadLetter) -> None:
        self._database.write_dead_letter(letter)


class EventSink(_DatabaseSink):
    """Events and checkpoints, exactly as they were saved, and operations on graphs' threads, into their tables."""

    name = "writer"
    kinds = frozenset(map(int, Kind))

    def __init__(self, store: EventDatabase) -> None:
        super().__init__(store)
        self._store = store

    def load(self, record: Record, source: Bodies) -> Record | None:
        """The record with its body, from the log if it is large; None if it is stored and its body trimmed already."""
        if record.manifest is None:
            return record
        try:
            return record._replace(body=source.read_body(record))
        except BodyMissing:
            # Asked after the body was missed: whoever trimmed it had committed the record before.
            if record.kind == Kind.GRAPH:
                stored = self._store.graph_settled(record)
            else:
                stored = bool(self._store.stored(record.namespace, [record.key]))
            if stored:
                return None
            raise

    def write(self, records: Sequence[Record]) -> None:
        """Store ``records`` in one transaction."""
        self._store.write_records(records)


class TraceSink(_DatabaseSink):
    """Events as JSON into ``agent_traces``; a marker with its size stands for the body of a large record."""

    name = "trace_ingest"
    kinds = frozenset([int(Kind.EVENT)])

    def __init__(self, store: TraceDatabase) -> None:
        super().__init__(store)
        self._store = store

    def probe(self, like: Record | None = None) -> None:
        """Return if the database takes a well-formed trace now."""
        with making_rows():
            shape = None if like is None else trace_of(like)
        self._database.probe(self.name, shape)

    def load(self, record: Record, source: Bodies) -> Record | None:  # noqa: ARG002 - no body is fetched for a trace
        """The record as it is; None for anything but an event."""
        return record if record.kind in self.kinds else None

    def write(self, records: Sequence[Record]) -> None:
        """Store the records' traces: one transaction, or several where compressed payloads are large as JSON."""
        traces: list[Trace] = []
        size = 0
        step = 1 if any(record.codec != Codec.MSGPACK for record in records) else _TRACES_AT_ONCE
        for start in range(0, len(records), step):
            with making_rows():
                some = traces_of(records[start : start + step])
            for trace in some:
                traces.append(trace)
                size += len(trace.payload_json)
                if size >= WRITER_BATCH_BYTES:
                    self._store.write_traces(traces)
                    traces, size = [], 0
        if traces:
            self._store.write_traces(traces)


def traces_of(records: Sequence[Record]) -> list[Trace]:
    """The rows of ``agent_traces`` for events; an event type is cut at ``MAX_EVENT_TYPE_CHARACTERS``."""
    return _rows.traces(Trace, list(records), trace_json.of_records(records), MAX_EVENT_TYPE_CHARACTERS)


def trace_of(record: Record) -> Trace:
    """The row of ``agent_traces`` for one event."""
    return traces_of([record])[0]
