"""Well-formed records that every healthy database takes: one that refuses them is ill, and no record is to blame."""

from __future__ import annotations

import os

from ..config import MAX_EVENT_TYPE_CHARACTERS, MAX_ID_CHARACTERS, TRACE_JSON_BYTES
from ..graphs import Delete, Drop, Operation, Put, Typed, operation
from ..graphs import record as graph_record
from ..records import STEP, Codec, DeadLetter, Kind, Position, Record, Trace, step_hash, step_key

_NAMESPACE = "skialith-probe"
_BODY = b"\xc0"
_PLACE = Position(1, 1)
_LARGEST = 2**63 - 1
_ANY_SIZE = 1 << 40
_PAGE_BYTES = 2000
_OF_BYTES = {1: "p", 2: "\u0436", 3: "\u6f22", 4: "\U0001f99c"}
"""A harmless character for each length in UTF-8."""


def plain(kind: Kind) -> Record:
    """A small event or checkpoint with a key that no record has."""
    event_id = "probe" if kind == Kind.EVENT else ""
    return Record(kind, _NAMESPACE, "probe", event_id, os.urandom(16), 0, "probe", 0, 0, _BODY, _PLACE)


def wide() -> list[Record]:
    """An event and a checkpoint with the longest names and numbers; their bodies stay inside a page, as a look costs little."""
    name, body = _OF_BYTES[4] * MAX_ID_CHARACTERS, bytes(_PAGE_BYTES)
    record = plain(Kind.EVENT)._replace(agent_id=name, body=body, step_index=_LARGEST, created_us=_LARGEST)
    event = record._replace(record_id=name, event_type=_OF_BYTES[4] * MAX_EVENT_TYPE_CHARACTERS)
    return [event, record._replace(kind=Kind.CHECKPOINT, key=os.urandom(16), event_type="")]


def step() -> Record:
    """A recorded step, which takes a row in the index of steps too."""
    return _as_step(plain(Kind.EVENT)._replace(record_id=os.urandom(16).hex()))


def trace() -> Trace:
    """A small trace with a key that no record has."""
    return Trace(os.urandom(16), _NAMESPACE, "probe", "probe", 0, "probe", "{}", 0, _PLACE)


def letter() -> DeadLetter:
    """A small dead letter with a key that no record has."""
    record = plain(Kind.EVENT)
    return DeadLetter(record.key, "writer", _NAMESPACE, "probe", _PLACE, 0, "probe", 0, _BODY, record)


def graph() -> Record:
    """A checkpoint of a graph with one channel value, on a thread that no graph has."""
    value = Typed("probe", 0, _BODY)
    put = Put(os.urandom(16).hex(), "", "probe", None, None, b"", value, value, {os.urandom(16): value})
    return graph_record(_NAMESPACE, put, _ANY_SIZE)._replace(position=_PLACE)


def like(record: Record) -> Record:
    """A record in the shape of ``record`` as far as Skialith allows it: lengths and numbers are its own, content is harmless.

    A database that takes a small record and refuses this one has narrower tables than Skialith made.
    """
    namespace = _NAMESPACE.ljust(len(record.namespace), "-")
    position = Position(_number(record.position.time_ns), _number(record.position.seq))
    if record.kind == Kind.GRAPH:
        try:
            change = _like_operation(operation(record))
        except Exception:  # noqa: BLE001 - what cannot be read has no shape
            return graph()
        return graph_record(namespace, change, _ANY_SIZE)._replace(position=position)
    made = Record(
        record.kind if record.kind == Kind.CHECKPOINT else Kind.EVENT,
        namespace,
        _text(record.agent_id),
        _text(record.record_id),
        os.urandom(16),
        _number(record.step_index),
        _text(record.event_type, MAX_EVENT_TYPE_CHARACTERS),
        _number(record.created_us),
        record.codec if record.codec in list(Codec) else Codec.MSGPACK,
        bytes(len(record.body or b"")),
        position,
    )
    return _as_step(made) if record.event_type == STEP else made


def like_trace(trace: Trace) -> Trace:
    """The same of a trace; its JSON is one string as long as the payload."""
    length = min(len(trace.payload_json.encode("utf-8", "surrogatepass")), TRACE_JSON_BYTES) - 2
    return Trace(
        os.urandom(16),
        _NAMESPACE.ljust(len(trace.namespace), "-"),
        _text(trace.agent_id),
        _text(trace.event_id),
        _number(trace.step_index),
        _text(trace.event_type, MAX_EVENT_TYPE_CHARACTERS),
        f'"{"p" * length}"',
        _number(trace.created_us),
        Position(_number(trace.position.time_ns), _number(trace.position.seq)),
    )


def _like_operation(change: Operation) -> Operation:
    thread_id = _text(change.thread_id)
    if isinstance(change, Delete):
        return Delete(thread_id)
    if isinstance(change, Drop):
        return Drop(thread_id, [(_text(ns), _text(each)) for ns, each in change.checkpoints], [])
    change = change._replace(
        thread_id=thread_id, checkpoint_ns=_text(change.checkpoint_ns), checkpoint_id=_text(change.checkpoint_id)
    )
    if isinstance(change, Put):
        change = change._replace(blobs={os.urandom(16): _typed(value) for value in change.blobs.values()})
    return change


def _typed(value: Typed) -> Typed:
    return Typed(_text(value.form), value.codec, bytes(len(value.data)))


def _as_step(record: Record) -> Record:
    key = step_key(step_hash(record.namespace, record.agent_id), record.record_id)
    return record._replace(key=key, event_type=STEP)


def _text(text: str, longest: int = MAX_ID_CHARACTERS) -> str:
    return "".join(_OF_BYTES[len(each.encode("utf-8", "surrogatepass"))] for each in text[:longest])


def _number(number: int) -> int:
    return min(max(number, 0), _LARGEST)
