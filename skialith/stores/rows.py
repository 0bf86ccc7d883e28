"""Rows: how records, traces and dead letters become column values and come back, and how a large payload becomes parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

from .. import _rows
from ..config import ERROR_TEXT_CHARACTERS, PAYLOAD_PART_BYTES
from ..errors import RecordIncomplete, StoreDataError
from ..records import STEP, DeadLetter, Kind, Manifest, Position, Record, Trace, step_hash, step_key

Row = tuple[Any, ...]

EVENT_COLUMNS = (
    "record_key",
    "namespace",
    "agent_id",
    "event_id",
    "step_index",
    "event_type",
    "created_us",
    "store_time_ns",
    "seq",
    "codec",
    "body",
    "body_bytes",
    "body_parts",
)
CHECKPOINT_COLUMNS = tuple(name for name in EVENT_COLUMNS if name not in ("event_id", "event_type"))
STEP_COLUMNS = ("record_key", "namespace", "agent_id", "store_time_ns", "seq")
TRACE_COLUMNS = (
    "record_key",
    "namespace",
    "agent_id",
    "event_id",
    "step_index",
    "event_type",
    "payload",
    "created_at",
    "logged_at",
    "store_time_ns",
    "seq",
)
DEAD_LETTER_COLUMNS = (
    "sink",
    "record_key",
    "namespace",
    "subject",
    "store_time_ns",
    "seq",
    "error_code",
    "error",
    "dead_us",
    "raw",
    "raw_bytes",
    "raw_parts",
    "kind",
    "agent_id",
    "record_id",
    "step_index",
    "event_type",
    "created_us",
    "codec",
    "body",
    "body_bytes",
    "body_parts",
    "manifest_size",
    "manifest_chunks",
    "manifest_digest",
)
PART_COLUMNS = ("parts_key", "n", "data")

TABLES = frozenset(
    [
        "agent_events",
        "agent_steps",
        "agent_checkpoints",
        "agent_traces",
        "dead_letters",
        "payload_parts",
        "graph_threads",
        "graph_checkpoints",
        "graph_blobs",
        "graph_writes",
    ]
)
"""The tables into which records go."""

MAX_ID_BYTES = 1020
"""Longest id in UTF-8 that the tables take: 255 characters of four bytes."""

_EVENT_TYPE = EVENT_COLUMNS.index("event_type")
_POSITION = slice(EVENT_COLUMNS.index("store_time_ns"), EVENT_COLUMNS.index("seq") + 1)
_KINDS = frozenset(map(int, Kind))
_GRAPH = int(Kind.GRAPH)
_Keyed = TypeVar("_Keyed", Record, Trace)


class Blob(NamedTuple):
    """The three columns of a payload: ``inline`` bytes or, if they are too many, None and the key of its parts."""

    inline: bytes | None
    size: int
    parts_key: bytes | None


def blob(owner: bytes, data: bytes | None) -> Blob:
    """The columns of ``data`` in the row ``owner``; None stays None, with size 0."""
    if data is None:
        return Blob(None, 0, None)
    if len(data) <= PAYLOAD_PART_BYTES:
        return Blob(data, len(data), None)
    # The hash holds the content, so that the parts of another payload with the same record key can never be taken for
    # these, and the owner, so that a record and its dead letter each have their own.
    digest = blake2b(owner, digest_size=16)
    digest.update(data)
    return Blob(None, len(data), digest.digest())


def parts(key: bytes, data: bytes) -> Iterator[Row]:
    """Rows of ``payload_parts``, made as they are asked for."""
    for n in range(part_count(len(data))):
        yield key, n, data[n * PAYLOAD_PART_BYTES : (n + 1) * PAYLOAD_PART_BYTES]


def part_count(size: int) -> int:
    """How many parts a payload of ``size`` bytes has."""
    return -(-size // PAYLOAD_PART_BYTES)


class Payload(NamedTuple):
    """A large payload that goes with a row: in ``table`` the column ``column`` holds ``key`` if that row won."""

    row_key: bytes
    column: str
    key: bytes
    data: bytes


def in_order(items: Iterable[_Keyed]) -> list[_Keyed]:
    """Records or traces by key, so that two writers lock rows in one order; those of one key by position, so that the first
    one wins."""
    listed = list(items)
    fields = type(listed[0])._fields if listed else ("key", "position")
    return _rows.in_order(listed, fields.index("key"), fields.index("position"))


def by_tables(records: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Events and checkpoints, and apart from them the operations on graphs' threads."""
    plain: list[Record] = []
    operations: list[Record] = []
    for record in records:
        (operations if record.kind == _GRAPH else plain).append(record)
    return plain, operations


def of_records(records: list[Record]) -> tuple[list[Row], list[Row], list[tuple[str, Payload]]]:
    """Rows of the events, rows of the checkpoints, and with its table each large payload that goes with one of them."""
    large: list[tuple[str, Payload]] = []

    def of_large(record: Record) -> Row:
        row, payload = of_record(record)
        if payload is not None:
            large.append(("agent_events" if record.kind == Kind.EVENT else "agent_checkpoints", payload))
        return row

    events, checkpoints = _rows.of_records(records, PAYLOAD_PART_BYTES, of_large)
    return events, checkpoints, large


def of_record(record: Record) -> tuple[Row, Payload | None]:
    """The row of an event or checkpoint, and its payload if that is large."""
    if record.body is None:
        raise RecordIncomplete(f"{describe(record)} came without its body, so it cannot be stored")
    body = blob(b"record:" + record.key, record.body)
    head = (record.key, record.namespace, record.agent_id)
    tail = (record.created_us, *record.position, record.codec, *body)
    if record.kind == Kind.EVENT:
        row: Row = (*head, record.record_id, record.step_index, record.event_type, *tail)
    else:
        row = (*head, record.step_index, *tail)
    large = None if body.parts_key is None else Payload(record.key, "body_parts", body.parts_key, record.body)
    return row, large


def of_steps(events: list[Row]) -> list[Row]:
    """Rows of ``STEP_COLUMNS`` for those rows of events that record a step."""
    found = []
    hashes: dict[Row, blake2b] = {}
    for row in _rows.having(events, _EVENT_TYPE, STEP):
        agent = row[1:3]
        begun = hashes.get(agent)
        if begun is None:
            begun = hashes[agent] = step_hash(*agent)
        if step_key(begun, row[3]) == row[0]:
            found.append((row[0], *agent, *row[_POSITION]))
    return found


def check_kinds(records: Iterable[Record]) -> None:
    """Raise ``StoreDataError`` if one of them belongs in no table."""
    for record in records:
        if record.kind not in _KINDS:
            raise StoreDataError(f"{describe(record)}: no table takes records of kind {record.kind}")


def describe(record: Record) -> str:
    """A record as an error names it."""
    if record.kind == Kind.GRAPH:
        return f"{record.event_type} on thread {record.agent_id!r} at {record.position.cursor()}"
    what = "checkpoint" if record.kind == Kind.CHECKPOINT else f"event {record.record_id!r}"
    return f"{what} of agent {record.agent_id!r} at {record.position.cursor()}"


def to_event(row: Row, body: bytes | None) -> Record:
    """The record of a row of ``EVENT_COLUMNS``."""
    key, namespace, agent_id, event_id, step, event_type, created_us, time_ns, seq, codec = row[:10]
    return Record(
        int(Kind.EVENT), namespace, text(agent_id), text(event_id), key, step, text(event_type), created_us, codec, body,
        Position(time_ns, seq),
    )  # fmt: skip


def to_checkpoint(row: Row, body: bytes | None) -> Record:
    """The record of a row of ``CHECKPOINT_COLUMNS``."""
    key, namespace, agent_id, step, created_us, time_ns, seq, codec = row[:8]
    return Record(
        int(Kind.CHECKPOINT),
        namespace,
        text(agent_id),
        "",
        key,
        step,
        "",
        created_us,
        codec,
        body,
        Position(time_ns, seq),
    )


def of_traces(traces: list[Trace]) -> list[Row]:
    """The rows of traces, as ``TRACE_COLUMNS``; a time that the databases cannot hold becomes the nearest one they can."""
    return _rows.of_traces(traces)


def of_letter(letter: DeadLetter) -> tuple[Row, list[Payload]]:
    """The row of a dead letter, as ``DEAD_LETTER_COLUMNS``, and its large payloads.

    A record whose agent id no table can hold is kept as ``raw`` alone, because a dead letter must always find its place.
    """
    owner = letter.sink.encode() + b":" + letter.key
    record = letter.record
    if record is not None and len(record.agent_id.encode()) > MAX_ID_BYTES:
        record = None
    raw = blob(b"raw:" + owner, letter.raw)
    body = blob(b"body:" + owner, None if record is None else record.body)
    error = letter.error[:ERROR_TEXT_CHARACTERS].encode("utf-8", "backslashreplace").decode()
    head = (letter.sink, letter.key, letter.namespace, letter.subject, *letter.position)
    if record is None:
        fields: Row = (None,) * 7
    else:
        fields = (
            record.kind, record.agent_id, record.record_id, record.step_index, record.event_type, record.created_us, record.codec,
        )  # fmt: skip
    manifest = (None, None, None) if record is None or record.manifest is None else tuple(record.manifest)
    row = (*head, letter.error_code, error, letter.dead_us, *raw, *fields, *body, *manifest)
    large = []
    if raw.parts_key is not None:
        large.append(Payload(letter.key, "raw_parts", raw.parts_key, letter.raw))
    if body.parts_key is not None and record is not None and record.body is not None:
        large.append(Payload(letter.key, "body_parts", body.parts_key, record.body))
    return row, large


def to_letter(row: Row, raw: bytes, body: bytes | None) -> DeadLetter:
    """The dead letter of a row of ``DEAD_LETTER_COLUMNS``."""
    value = dict(zip(DEAD_LETTER_COLUMNS, row, strict=True))
    position = Position(value["store_time_ns"], value["seq"])
    record = None
    if value["kind"] is not None:
        manifest = None
        if value["manifest_size"] is not None:
            manifest = Manifest(value["manifest_size"], value["manifest_chunks"], value["manifest_digest"])
        record = Record(
            value["kind"],
            value["namespace"],
            text(value["agent_id"]),
            text(value["record_id"]),
            value["record_key"],
            value["step_index"],
            text(value["event_type"]),
            value["created_us"],
            value["codec"],
            body,
            position,
            manifest,
        )
    return DeadLetter(
        key=value["record_key"],
        sink=value["sink"],
        namespace=value["namespace"],
        subject=text(value["subject"]),
        position=position,
        error_code=value["error_code"],
        error=value["error"],
        dead_us=value["dead_us"],
        raw=raw,
        record=record,
    )


def text(value: bytes | str) -> str:
    """Text that one database gives as bytes and the other as ``str``."""
    return value.decode() if isinstance(value, bytes) else value
