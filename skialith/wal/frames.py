"""Records and dead letters as they are sent: entries, the fence of their owner, and atomic batches as frames."""

from __future__ import annotations

import hashlib
import secrets

from .. import _fastpath
from ..config import ENVELOPE_RESERVE_BYTES, MAX_BATCH_MESSAGES
from ..errors import Outcome, RecordTooLarge
from ..records import DeadLetter, Record
from .dead import letter_data, letter_id, letter_kind
from .lane import Entry, Ticket
from .lease import Lease
from .stream import Subjects

_HEADER_BYTES = 256
"""What a message costs in the store beside its data, about."""

HEADER_ROOM_BYTES = 1024
"""The longest headers of a record: message id, fence with a lease subject, batch."""


def record_entry(
    record: Record,
    subject: str,
    ticket: Ticket,
    deadline: float,
    subjects: Subjects,
    max_payload: int,
    *,
    unknown: bool = False,
) -> Entry:
    """A record ready to send; a body over ``max_payload`` is cut into chunks. Raises ``RecordTooLarge``.

    ``unknown``: it was sent before, without an answer.
    """
    body = record.body or b""
    chunks = _chunks(body, max_payload)
    manifest = None
    if chunks:
        _check_chunks(record, body, chunks, max_payload, "unknown" if unknown else "not_written")
        manifest = (len(body), len(chunks), hashlib.blake2b(body, digest_size=16).digest())
    data = _fastpath.encode_record(
        record.kind,
        record.agent_id,
        record.record_id,
        record.key,
        record.step_index,
        record.event_type,
        record.created_us,
        record.codec,
        None if chunks else body,
        manifest,
    )
    size = len(data) + _HEADER_BYTES + sum(len(chunk) + _HEADER_BYTES for chunk in chunks)
    chunk_subject = subjects.chunk(record.agent_id) if chunks else ""
    entry = Entry(subject, ticket.message_id or record.key, data, chunk_subject, chunks, size, ticket, deadline)
    entry.unknown = unknown
    return entry


def letter_entry(letter: DeadLetter, ticket: Ticket, deadline: float, subjects: Subjects, max_payload: int) -> Entry:
    """A dead letter ready to send, with the whole body of a large record behind it."""
    record = letter.record
    agent_id = record.agent_id if record is not None else ""
    chunks = _chunks(record.body or b"", max_payload) if record is not None and record.manifest is not None else []
    subject = subjects.dead_letter(letter_kind(record), agent_id)
    chunk_subject = subjects.dead_chunk(agent_id) if chunks else ""
    return Entry(
        subject, letter_id(letter.sink, letter.key), letter_data(letter), chunk_subject, chunks, 0, ticket, deadline
    )


def _chunks(body: bytes, max_payload: int) -> list[bytes]:
    """The pieces of a body that does not fit one message; none if it fits, or if this server takes too little for any."""
    room = max_payload - ENVELOPE_RESERVE_BYTES
    return [] if len(body) <= room or room <= 0 else [body[at : at + room] for at in range(0, len(body), room)]


def _check_chunks(record: Record, body: bytes, chunks: list[bytes], max_payload: int, outcome: Outcome) -> None:
    most = MAX_BATCH_MESSAGES - 1
    if len(chunks) > most:
        limit = len(chunks[0]) * most
        raise RecordTooLarge(
            f"agent {record.agent_id!r}: the record has {len(body):,} bytes after compression; this server takes at most "
            f"{limit:,} (max_payload {max_payload:,}, {most} messages)",
            outcome=outcome,
            argument="data",
            size=len(body),
            limit=limit,
        )


def batch(group: list[Entry], lease: Lease | None, reply: str) -> bytes:
    """One atomic batch: records, or the manifest of a large one and then its chunks. Every call makes a new batch id.

    The fence stands on the first message: the batch is stored whole or not at all.
    """
    identity = secrets.token_hex(12)
    messages: list[tuple[str, bytes, bytes]] = []
    for entry in group:
        headers = _fastpath.record_headers(entry.key) + (b"" if messages else fence(lease))
        messages.append((entry.subject, headers, entry.data))
        messages.extend((entry.chunk_subject, b"", chunk) for chunk in entry.chunks)
    frames = []
    for number, (subject, headers, data) in enumerate(messages, start=1):
        last = number == len(messages)
        place = f"Nats-Batch-Id: {identity}\r\nNats-Batch-Sequence: {number}\r\n"
        if last:
            place += "Nats-Batch-Commit: 1\r\n"
        frames.append(_fastpath.hpub(subject, reply if last or number == 1 else "", headers + place.encode(), data))
    return b"".join(frames)


def fence(lease: Lease | None) -> bytes:
    """The header lines by which the server checks that the lease is the last; none for an agent that nobody owns."""
    return b"" if lease is None else _fastpath.fence(lease.seq, lease.subject)
