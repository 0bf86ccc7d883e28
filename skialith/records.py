"""Values: what users get back (Ack, AgentState, Event), and the record as it travels from call to log to database."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import IntEnum
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

from . import _fastpath

STEP = "step"
"""Event type of a recorded step."""


class _Keys:
    """Random keys of this process at the price of a counter; the kernel's random bytes cost as much as a system call."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self._prefix = os.urandom(10)
        self._count = itertools.count()

    def next(self) -> bytes:
        return self._prefix + next(self._count).to_bytes(6, "big")


_keys = _Keys()
os.register_at_fork(after_in_child=_keys.renew)


def unique_key() -> bytes:
    """16 bytes that no other call has given, in any process."""
    return _keys.next()


def iso(us: int) -> str:
    """Unix microseconds as RFC 3339 in UTC."""
    return datetime.fromtimestamp(us / 1e6, timezone.utc).isoformat(timespec="microseconds")


class Kind(IntEnum):
    """What a record is; the number is its form on the wire and in the tables."""

    EVENT = 1
    CHECKPOINT = 2
    GRAPH = 3


class Codec(IntEnum):
    """How a record's body is encoded."""

    MSGPACK = 0
    ZSTD_MSGPACK = 1


class Position(NamedTuple):
    """Where a record stands in the log. The order is (server store time, sequence): after a power loss
    sequences are handed out again, so a sequence alone orders nothing."""

    time_ns: int
    seq: int

    def cursor(self) -> str:
        """Text form for paging, ``"<time_ns>-<seq>"``."""
        return f"{self.time_ns}-{self.seq}"


NOWHERE = Position(0, 0)
"""The position of a record that has no PubAck yet."""


class Record(NamedTuple):
    """One event, checkpoint or operation on a graph's thread. ``key`` (16 bytes) is its identity: message id, key of its row.

    ``record_id`` is the event id, empty for a checkpoint. ``event_type`` is empty for a checkpoint. Of an operation
    (``graphs.record``) ``agent_id`` is the thread's name, ``event_type`` that of the operation. ``created_us`` is the
    caller's clock, Unix microseconds. ``body`` is the payload, encoded as ``codec`` says. ``position`` is set by the log.
    ``body`` is None when the record was read without its large body (see ``Manifest``).
    """

    kind: int
    namespace: str
    agent_id: str
    record_id: str
    key: bytes
    step_index: int
    event_type: str
    created_us: int
    codec: int
    body: bytes | None
    position: Position = NOWHERE
    manifest: Manifest | None = None


class Manifest(NamedTuple):
    """What the head of a large record says of its body, which follows in ``chunks`` messages on ``chunk.<agent>``."""

    size: int
    chunks: int
    digest: bytes


def supersedes(one: Record, other: Record) -> bool:
    """Whether the checkpoint ``one`` came behind ``other``, of the same agent: by position, as long as that says one thing.

    If the later one has the lower sequence, either the server's clock was set back or a power loss took the end of the log. Then
    the caller's clock decides, which an owner never lets go back (``BaseAgent._checkpoint``).
    """
    here, there = one.position, other.position
    if here.seq != there.seq and (here.time_ns < there.time_ns) == (here.seq > there.seq):
        return (one.created_us, here) > (other.created_us, there)
    return here > there


def decode_record(namespace: str, data: bytes, position: Position) -> Record:
    """A message's data as a record at its position, without the body of a large one.

    Raises ``ValueError`` saying what is wrong when it is not a record that this Skialith can read.
    """
    fields = _fastpath.decode_record(data)
    manifest = None if fields[9] is None else Manifest(*fields[9])
    return Record(fields[0], namespace, *fields[1:9], position, manifest)


def step_hash(namespace: str, agent_id: str) -> blake2b:
    """The hash of a step's identity before its id is added, see :func:`step_key`."""
    begun = blake2b(digest_size=16, person=b"skialith-step")
    for text in (namespace.encode(), agent_id.encode()):
        begun.update(len(text).to_bytes(4, "big") + text)
    return begun


def step_key(begun: blake2b, step_id: str) -> bytes:
    """The 16-byte identity of a recorded step: BLAKE2b-128 of namespace, agent id and step id, each behind its length.

    Personalized, so that no event saved under whatever id has the key of a step. ``begun``: :func:`step_hash`.
    """
    text = step_id.encode()
    digest = begun.copy()
    digest.update(len(text).to_bytes(4, "big") + text)
    return digest.digest()


def retry_id(record: Record, call: str) -> bytes:
    """The 16-byte message id of a checkpoint that is a retry of the call that ``call`` names, if its content is the same too.

    No more than a message id: were it the record's key, a name that is used for two calls would lose the second one.
    """
    digest = blake2b(digest_size=16, person=b"skialith-retry")
    for part in (record.namespace.encode(), record.agent_id.encode(), call.encode(), str(record.step_index).encode()):
        digest.update(len(part).to_bytes(4, "big") + part)
    digest.update(record.body or b"")
    return digest.digest()


def is_step(record: Record) -> bool:
    """Whether an event is a recorded step, and not merely one whose payload says so."""
    if record.event_type != STEP:
        return False
    return record.key == step_key(step_hash(record.namespace, record.agent_id), record.record_id)


class Trace(NamedTuple):
    """One row of ``agent_traces``: an event as JSON for people's SQL. ``key`` is the event's key."""

    key: bytes
    namespace: str
    agent_id: str
    event_id: str
    step_index: int
    event_type: str
    payload_json: str
    created_us: int
    position: Position


class DeadLetter(NamedTuple):
    """A record the database refuses for its data, or a message that does not decode, kept with the reason.

    ``sink`` is ``"writer"`` or ``"trace_ingest"``. ``key`` is the record's key, or a hash of subject and position when the
    message does not decode; then ``record`` is None. ``raw`` is the message as it stood in the log. ``error_code`` is the
    driver's, 0 if none. ``dead_us`` is when it was given up, Unix microseconds.
    """

    key: bytes
    sink: str
    namespace: str
    subject: str
    position: Position
    error_code: int
    error: str
    dead_us: int
    raw: bytes
    record: Record | None


@dataclass(frozen=True, slots=True)
class Ack:
    """The PubAck of one record: it is DURABLE.

    ``seq``: its sequence in the log. ``duplicate``: the log already held this id within the duplicate window (best
    effort; the database's unique key is the guard).
    """

    seq: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class AgentState:
    """The last checkpoint of an agent; a new agent has step 0, ``{}`` and ``is_new`` True.

    ``source``: where it was read, ``"wal"``, ``"database"`` or ``"none"`` (new agent). ``database_ok`` is False when the
    database did not answer and the log alone was read.
    """

    agent_id: str
    step_index: int
    data: Any
    is_new: bool
    source: Literal["wal", "database", "none"] = "none"
    database_ok: bool = True


@dataclass(frozen=True, slots=True)
class Event:
    """One saved event as ``history()`` yields it.

    ``step_index``: the agent's step when it was saved. ``event_type``: the payload's ``kind`` (``"event"`` without one).
    ``data``: the payload. ``created_at``: the caller's clock, UTC. ``stored``: whether the database has it already;
    ``dead``: whether it is a dead letter. ``position`` orders events; ``after=event`` continues behind it.
    """

    agent_id: str
    event_id: str
    step_index: int
    event_type: str
    data: Any
    created_at: datetime
    position: Position
    stored: bool
    dead: bool = False


class Message(NamedTuple):
    """One message as a consumer delivered it. ``reply`` takes its ack; acks die with the connection ``epoch``."""

    subject: str
    data: bytes
    position: Position
    reply: str
    epoch: int
    deliveries: int
