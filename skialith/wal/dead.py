"""The dead-letter stream: what the database refused and its ``dead_letters`` table did not take either."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import ormsgpack

from ..config import HISTORY_PAGE_RECORDS
from ..errors import BodyMissing
from ..records import DeadLetter, Kind, Position, Record, decode_record
from .api import OtherServer
from .read import Reader
from .stream import Stream
from .transport import Connection

_ERROR_CHARACTERS = 500
"""A letter must fit one message beside the record's own, so the reason is kept short here."""

_KINDS = {int(Kind.EVENT): "event", int(Kind.CHECKPOINT): "checkpoint", int(Kind.GRAPH): "graph"}


def letter_id(sink: str, key: bytes) -> bytes:
    """The message id of a dead letter."""
    return hashlib.blake2b(sink.encode() + b"\0" + key, digest_size=16).digest()


def letter_kind(record: Record | None) -> str:
    """The token of the dead-letter subject that tells what the record was."""
    return "undecodable" if record is None else _KINDS[record.kind]


def letter_data(letter: DeadLetter) -> bytes:
    """A dead letter as one message: a msgpack array."""
    return ormsgpack.packb(
        [
            1,
            letter.key,
            letter.sink,
            letter.subject,
            letter.position.time_ns,
            letter.position.seq,
            letter.error_code,
            letter.error[:_ERROR_CHARACTERS],
            letter.dead_us,
            letter.raw,
        ]
    )


def letter_from(data: bytes, namespace: str, *, decodes: bool = True) -> DeadLetter:
    """The reverse of :func:`letter_data`; the record is decoded again from the raw message, if it was when it was given up."""
    _, key, sink, subject, time_ns, seq, code, error, dead_us, raw = ormsgpack.unpackb(data)
    position = Position(time_ns, seq)
    record: Record | None = None
    if decodes:
        with contextlib.suppress(ValueError):
            record = decode_record(namespace, raw, position)
    return DeadLetter(key, sink, namespace, subject, position, code, error, dead_us, raw, record)


class DeadLetters:
    """Reads and removes the dead letters that stand in the log."""

    def __init__(self, connection: Connection, stream: Stream, reader: Reader) -> None:
        self._connection = connection
        self._stream = stream
        self._reader = reader

    async def read(self, subject: str, deadline: float, *, bodies: bool = True) -> list[DeadLetter]:
        """Dead letters on a subject (all: ``Subjects.dead``), oldest first, one each, large bodies included if ``bodies``."""
        return [letter for _, letter in await self._numbered(subject, deadline, bodies=bodies)]

    async def find(self, sink: str, key: bytes, deadline: float) -> DeadLetter | None:
        """One dead letter with its body; None if it is not there."""
        for seq, letter in await self._numbered(self._stream.subjects.dead, deadline, bodies=False):
            if (letter.sink, letter.key) == (sink, key):
                return await self._whole(letter, seq, deadline)
        return None

    async def for_agent(self, agent_id: str, kind: str, deadline: float) -> list[Record]:
        """The records among one agent's dead letters of sink ``writer``; ``kind`` as :func:`letter_kind` gives it."""
        return await self._records(self._stream.subjects.dead_letter(kind, agent_id), deadline)

    async def graphs(self, thread_name: str | None, deadline: float) -> list[Record]:
        """The operations on a graph's thread, or on all, among the dead letters of sink ``writer``."""
        subjects = self._stream.subjects
        subject = subjects.dead_graphs if thread_name is None else subjects.dead_letter("graph", thread_name)
        return await self._records(subject, deadline)

    async def _records(self, subject: str, deadline: float) -> list[Record]:
        letters = await self.read(subject, deadline)
        return [letter.record for letter in letters if letter.record is not None and letter.sink == "writer"]

    async def count(self, deadline: float) -> int:
        """Messages on the dead-letter subjects; 0 costs one request, so readers ask this first."""
        info = await self._stream.dead_info(deadline)
        return int(info["state"]["messages"])

    async def discard(self, sink: str, key: bytes, deadline: float) -> bool:
        """Remove one dead letter; False if it is not there."""
        found = False
        while True:
            server_id = self._connection.server_id
            try:
                for seq, letter in await self._numbered(
                    self._stream.subjects.dead, deadline, bodies=False, copies=True
                ):
                    if (letter.sink, letter.key) == (sink, key):
                        await self._remove(seq, letter, deadline, server_id)
                        found = True
                return found
            except OtherServer:
                continue  # there other letters may stand at these sequences

    async def _remove(self, seq: int, letter: DeadLetter, deadline: float, server_id: str) -> None:
        """A letter with its chunks, on the server that it was read from."""
        chunks = letter.record.manifest.chunks if letter.record is not None and letter.record.manifest else 0
        for each in range(seq, seq + chunks + 1):
            name, body = f"STREAM.MSG.DELETE.{self._stream.dead_name}", {"seq": each}
            await self._stream.api.call(name, body, deadline=deadline, server_id=server_id)

    async def _numbered(
        self,
        subject: str,
        deadline: float,
        *,
        bodies: bool = True,
        copies: bool = False,
    ) -> list[tuple[int, DeadLetter]]:
        letters: list[tuple[int, DeadLetter]] = []
        seen: set[tuple[str, bytes]] = set()
        seq = 1
        undecodable = self._stream.subjects.dead_letter(letter_kind(None), "")
        while True:
            query: dict[str, Any] = {
                "seq": seq,
                "next_by_subj": subject,
                "batch": HISTORY_PAGE_RECORDS,
                "max_bytes": self._reader.page_bytes(),
            }
            messages = await self._reader.direct(self._stream.dead_name, query, deadline)
            if not messages:
                return letters
            for message in messages:
                headers = message.headers or {}
                seq, decodes = int(headers["Nats-Sequence"]), headers["Nats-Subject"] != undecodable
                letter = letter_from(message.data, self._stream.namespace, decodes=decodes)
                if copies or (letter.sink, letter.key) not in seen:
                    seen.add((letter.sink, letter.key))
                    letters.append(
                        (
                            seq,
                            await self._whole(letter, seq, deadline) if bodies else letter,
                        )
                    )
            seq += 1

    async def _whole(self, letter: DeadLetter, seq: int, deadline: float) -> DeadLetter:
        record = letter.record
        if record is None or record.manifest is None:
            return letter
        subject = self._stream.subjects.dead_chunk(record.agent_id)
        try:
            body = await self._reader.chunks(self._stream.dead_name, subject, record, seq + 1, deadline)
        except BodyMissing as error:
            return letter._replace(record=None, error=f"{letter.error}; {error}")
        return letter._replace(record=record._replace(body=body))
