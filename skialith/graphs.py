"""What a graph's thread does to its checkpoints, as values, and as the bodies of the records that carry them.

Four operations are all there is. Each cell of a thread (a checkpoint, a channel's value at one version) is what the operation
with the greatest position made of it, so any number of writers may apply them in any order and end at the same tables.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from operator import attrgetter
from typing import NamedTuple, TypeAlias

import ormsgpack
import zstandard

from . import payloads
from .config import GRAPH_COMPRESS_ABOVE_BYTES, MAX_ID_CHARACTERS
from .errors import InvalidArgument, RecordTooLarge
from .records import NOWHERE, Codec, Kind, Position, Record, unique_key

KEY_BYTES = 16
_PREFIX_CHARACTERS = 200
_CACHED_KEYS = 1024


class Typed(NamedTuple):
    """A value as a serializer of LangGraph gives it: the name of its form, and bytes, encoded as ``codec`` says."""

    form: str
    codec: int
    data: bytes


class Put(NamedTuple):
    """A checkpoint. ``parent_id``: of the one it continues, None if none. ``run_key``: hash of the run that made it, or None.

    ``refs``: ids (:func:`blob_id`, 16 bytes each, joined) of all channel values that belong to it. ``head``: the checkpoint
    without them. ``blobs``: those values that are new with it, by id.
    """

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str
    parent_id: str | None
    run_key: bytes | None
    refs: bytes
    head: Typed
    metadata: Typed
    blobs: dict[bytes, Typed]


class Write(NamedTuple):
    """One value a task wrote to a channel; ``idx`` is its place among them, negative for LangGraph's special channels."""

    idx: int
    channel: str
    value: Typed


class PutWrites(NamedTuple):
    """What a task wrote, pending at a checkpoint."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str
    task_id: str
    task_path: str
    writes: list[Write]


class Delete(NamedTuple):
    """The end of all that the thread had before."""

    thread_id: str


class Drop(NamedTuple):
    """The end of some checkpoints (namespace, id), with their writes, and of channel values (namespace, blob id)."""

    thread_id: str
    checkpoints: list[tuple[str, str]]
    blobs: list[tuple[str, bytes]]


Operation: TypeAlias = Put | PutWrites | Delete | Drop

_PUT, _PUT_WRITES, _DELETE, _DROP = range(1, 5)

PUT = "put"
"""The ``event_type`` of a record that carries a :class:`Put`."""
DROP = "drop"
"""That of a :class:`Drop`."""
_NAMES = {Put: PUT, PutWrites: "put_writes", Delete: "delete", Drop: DROP}


# ---- identities


def _hash(kind: bytes, *parts: bytes) -> bytes:
    sizes = b"".join([len(part).to_bytes(8, "big") for part in parts])
    return blake2b(sizes + b"".join(parts), digest_size=KEY_BYTES, person=kind).digest()


@lru_cache(maxsize=_CACHED_KEYS)
def thread_key(namespace: str, thread_id: str) -> bytes:
    """Identity of a thread in the tables."""
    return _hash(b"thread", namespace.encode(), thread_id.encode())


@lru_cache(maxsize=_CACHED_KEYS)
def ns_key(thread: bytes, checkpoint_ns: str) -> bytes:
    """Identity of one checkpoint namespace of a thread (its key)."""
    return _hash(b"ns", thread, checkpoint_ns.encode())


def cell_key(ns: bytes, checkpoint_id: str) -> bytes:
    """Identity of a checkpoint in a namespace (its key)."""
    return _hash(b"checkpoint", ns, checkpoint_id.encode())


def blob_key(ns: bytes, blob: bytes) -> bytes:
    """Identity of a channel value in a namespace (its key)."""
    return _hash(b"blob", ns, blob)


def blob_id(channel: str, version: str | float) -> bytes:
    """Identity of a channel's value at a version, the same in every thread."""
    return _hash(b"value", channel.encode(), repr(version).encode())


def run_key(run_id: str) -> bytes:
    """By which the checkpoints of a run are found; the id itself may be secret."""
    return _hash(b"run", run_id.encode())


def thread_name(thread_id: str) -> str:
    """The thread's name in subjects, lanes and dead letters: its id, or if that is too long a prefix and a hash."""
    if 0 < len(thread_id) <= MAX_ID_CHARACTERS:
        return thread_id
    return f"{thread_id[:_PREFIX_CHARACTERS]}~{_hash(b'name', thread_id.encode()).hex()}"


def split_refs(refs: bytes) -> list[bytes]:
    """The ids of :class:`Put`'s ``refs``."""
    return [refs[at : at + KEY_BYTES] for at in range(0, len(refs), KEY_BYTES)]


# ---- as records


def typed(form: str, data: bytes) -> Typed:
    """A serialized value, compressed if it is large and that makes it smaller."""
    if len(data) > GRAPH_COMPRESS_ABOVE_BYTES:
        smaller = zstandard.ZstdCompressor(level=payloads.COMPRESSION_LEVEL).compress(data)
        if len(smaller) < len(data):
            return Typed(form, int(Codec.ZSTD_MSGPACK), smaller)
    return Typed(form, int(Codec.MSGPACK), data)


def plain(value: Typed) -> tuple[str, bytes]:
    """What :func:`typed` was given. Raises ``ValueError`` for a corrupt frame."""
    return value.form, payloads.uncompressed(value.codec, value.data)


def record(namespace: str, operation: Operation, limit: int) -> Record:
    """The record that carries an operation; each call makes one of its own.

    ``record_id`` names a thread and a row, so that a record without its body is known to be stored or not. Raises
    ``RecordTooLarge`` if it is over ``limit`` bytes; nothing was sent.
    """
    body = encode(operation)
    if len(body) > limit:
        raise RecordTooLarge(
            f"thread {operation.thread_id!r}: {type(operation).__name__} has {len(body)} bytes encoded; at most {limit} are "
            "allowed (max_record_bytes)",
            argument="checkpoint",
            size=len(body),
            limit=limit,
        )
    return Record(
        Kind.GRAPH,
        namespace,
        thread_name(operation.thread_id),
        b"".join(_touched(namespace, operation)).hex(),
        unique_key(),
        0,
        _NAMES[type(operation)],
        time.time_ns() // 1000,
        Codec.MSGPACK,
        body,
    )


def _touched(namespace: str, operation: Operation) -> tuple[bytes, bytes]:
    """The keys of the thread, and of the checkpoint; of a :class:`Drop` the first one of those, or of the values."""
    thread = thread_key(namespace, operation.thread_id)
    if isinstance(operation, (Put, PutWrites)):
        return thread, cell_key(ns_key(thread, operation.checkpoint_ns), operation.checkpoint_id)
    if isinstance(operation, Drop):
        for checkpoint_ns, checkpoint_id in operation.checkpoints:
            return thread, cell_key(ns_key(thread, checkpoint_ns), checkpoint_id)
        for checkpoint_ns, blob in operation.blobs:
            return thread, blob_key(ns_key(thread, checkpoint_ns), blob)
    return thread, b""


def named_keys(record: Record) -> tuple[bytes, bytes]:
    """The keys of the thread, and of the checkpoint or the value, that a record names (none for the end of the thread)."""
    both = bytes.fromhex(record.record_id)
    return both[:KEY_BYTES], both[KEY_BYTES:]


def encode(operation: Operation) -> bytes:
    """An operation as the body of a record, and of a row."""
    if isinstance(operation, Put):
        blobs = [[blob, *value] for blob, value in operation.blobs.items()]
        return ormsgpack.packb([_PUT, *operation[:6], list(operation.head), list(operation.metadata), blobs])
    if isinstance(operation, PutWrites):
        writes = [[write.idx, write.channel, *write.value] for write in operation.writes]
        return ormsgpack.packb([_PUT_WRITES, *operation[:5], writes])
    if isinstance(operation, Drop):
        return ormsgpack.packb(
            [_DROP, operation.thread_id, list(map(list, operation.checkpoints)), list(map(list, operation.blobs))]
        )
    return ormsgpack.packb([_DELETE, operation.thread_id])


def operation(record: Record) -> Operation:
    """The operation in a record with its body. Raises ``ValueError`` when it is none that this Skialith can read."""
    return decode(payloads.uncompressed(record.codec, record.body or b""))


def decode(body: bytes) -> Operation:
    """The reverse of :func:`encode`. Raises ``ValueError``."""
    try:
        fields = ormsgpack.unpackb(body)
        kind = fields[0]
        if kind == _PUT:
            _, thread_id, ns, checkpoint_id, parent_id, run, refs, head, metadata, blobs = fields
            values = {_bytes(blob): _typed(*value) for blob, *value in blobs}
            return Put(
                _text(thread_id),
                _text(ns),
                _text(checkpoint_id),
                None if parent_id is None else _text(parent_id),
                None if run is None else _bytes(run),
                _bytes(refs),
                _typed(*head),
                _typed(*metadata),
                values,
            )
        if kind == _PUT_WRITES:
            thread_id, ns, checkpoint_id, task_id, task_path = map(_text, fields[1:6])
            writes = [Write(_int(idx), _text(channel), _typed(*value)) for idx, channel, *value in fields[6]]
            return PutWrites(thread_id, ns, checkpoint_id, task_id, task_path, writes)
        if kind == _DELETE:
            return Delete(_text(fields[1]))
        if kind == _DROP:
            checkpoints = [(_text(ns), _text(each)) for ns, each in fields[2]]
            return Drop(_text(fields[1]), checkpoints, [(_text(ns), _bytes(each)) for ns, each in fields[3]])
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"not an operation on a graph's thread: {error}") from error
    raise ValueError(f"operation {kind} on a graph's thread is unknown; it was written by a newer Skialith")


def _typed(form: object, codec: object, data: object) -> Typed:
    return Typed(_text(form), _int(codec), _bytes(data))


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{type(value).__name__} is no number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is no bytes")
    return value


def checked_text(argument: str, value: object) -> str:
    """``value`` as text that UTF-8 can carry. Raises ``InvalidArgument``; nothing was sent."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{argument} must be a str, not {type(value).__name__}", argument=argument)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{argument} holds a lone surrogate at index {error.start}, which is not Unicode text", argument=argument
        ) from None
    return value


class Operations(NamedTuple):
    """What the log holds of some threads, oldest first. ``dead``: in its dead-letter stream.

    ``whole`` is False if the body of one is not in the log any more: only the database can tell what that one was. ``epoch``:
    the connection that they were read over.
    """

    live: list[Record]
    dead: list[Record]
    whole: bool
    epoch: int


# ---- what operations come to


class Cell(NamedTuple):
    """What became of a checkpoint: its newest put (``blobs`` left out), or None if it is deleted. All keys are those of rows.

    ``ended``: its last deletion, after which it may have been put again; what was pending at it before went with that.
    """

    position: Position
    thread: bytes
    ns: bytes
    checkpoint_id: str
    put: Put | None
    ended: Position = NOWHERE


class Blob(NamedTuple):
    """What became of a channel's value at a version; None if it is deleted."""

    position: Position
    thread: bytes
    value: Typed | None


class Pending(NamedTuple):
    """What a task wrote, with its record and the checkpoint's key."""

    record: Record
    thread: bytes
    cell: bytes
    writes: PutWrites


@dataclass(slots=True)
class Changes:
    """What some operations of one namespace come to, in whatever order they are noted: of each key what is newest."""

    namespace: str
    threads: dict[bytes, str] = field(default_factory=dict)
    deleted: dict[bytes, Position] = field(default_factory=dict)
    cells: dict[bytes, Cell] = field(default_factory=dict)
    blobs: dict[bytes, Blob] = field(default_factory=dict)
    writes: dict[bytes, Pending] = field(default_factory=dict)

    def note(self, record: Record) -> None:
        """Add one operation. Raises ``ValueError`` if it cannot be read."""
        change = operation(record)
        thread, position = thread_key(self.namespace, change.thread_id), record.position
        self.threads[thread] = change.thread_id
        if isinstance(change, Delete):
            self.deleted[thread] = max(position, self.deleted.get(thread, NOWHERE))
        elif isinstance(change, Drop):
            for checkpoint_ns, checkpoint_id in change.checkpoints:
                self._cell(Cell(position, thread, ns_key(thread, checkpoint_ns), checkpoint_id, None, position))
            for checkpoint_ns, blob in change.blobs:
                self._blob(blob_key(ns_key(thread, checkpoint_ns), blob), Blob(position, thread, None))
        else:
            ns = ns_key(thread, change.checkpoint_ns)
            if isinstance(change, PutWrites):
                self.writes[record.key] = Pending(record, thread, cell_key(ns, change.checkpoint_id), change)
                return
            self._cell(Cell(position, thread, ns, change.checkpoint_id, change._replace(blobs={})))
            for blob, value in change.blobs.items():
                self._blob(blob_key(ns, blob), Blob(position, thread, value))

    def _cell(self, cell: Cell) -> None:
        key = cell_key(cell.ns, cell.checkpoint_id)
        before = self.cells.get(key, cell)
        newest = max(before, cell, key=attrgetter("position"))
        self.cells[key] = newest._replace(ended=max(before.ended, cell.ended))

    def _blob(self, key: bytes, blob: Blob) -> None:
        before = self.blobs.get(key)
        if before is None or before.position < blob.position:
            self.blobs[key] = blob

    def forget_before(self, deleted: Mapping[bytes, Position]) -> None:
        """Leave out what came before its thread's deletion."""

        def stands(thread: bytes, position: Position) -> bool:
            return position > deleted.get(thread, NOWHERE)

        self.cells = {key: cell for key, cell in self.cells.items() if stands(cell.thread, cell.position)}
        self.blobs = {key: blob for key, blob in self.blobs.items() if stands(blob.thread, blob.position)}
        self.writes = {key: each for key, each in self.writes.items() if stands(each.thread, each.record.position)}

    def forget_pending_before(self, ended: Mapping[bytes, Position]) -> None:
        """Leave out what was pending at checkpoints before they were deleted."""
        self.writes = {
            key: each for key, each in self.writes.items() if each.record.position > ended.get(each.cell, NOWHERE)
        }
