"""Reading the log: last checkpoints, pages of events, large bodies, dead letters."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from typing import Any

from ..config import HISTORY_PAGE_RECORDS, RETRY_LONGEST_SECONDS, WRITER_BATCH_BYTES
from ..errors import BodyMissing, WalRejected, WalUnavailable
from ..records import NOWHERE, Kind, Position, Record, decode_record
from ._waiting import Reply
from .api import rfc3339, time_ns
from .gets import Gets, position_of
from .stream import Stream
from .transport import Connection


class Reader:
    """Reads one namespace. Every method takes a deadline (``time.monotonic()``) and may raise ``WalUnavailable``."""

    def __init__(self, connection: Connection, stream: Stream, gets: Gets) -> None:
        self._connection = connection
        self._stream = stream
        self.direct = gets.direct
        self._gets = gets

    async def last_checkpoint(self, agent_id: str, deadline: float) -> Record | None:
        """The newest checkpoint in the log, with its body; None if the log holds none."""
        missing: BodyMissing | None = None
        patience = min(deadline, time.monotonic() + RETRY_LONGEST_SECONDS)
        while True:
            found = await self._gets.last(self._stream.subjects.checkpoint(agent_id), deadline)
            if found is None:
                return None
            record = self._decoded(found.data, found.position)
            if record.kind != Kind.CHECKPOINT:
                raise WalRejected(
                    f"agent {agent_id!r}: the checkpoint at sequence {record.position.seq} does not decode; it was written by a "
                    "newer Skialith or damaged. Upgrade, or see `skialith dead-letters`"
                )
            if record.agent_id != agent_id:
                return None
            if missing is not None and time.monotonic() >= patience:
                raise missing
            try:
                return await self.with_body(record, deadline)
            except BodyMissing as error:
                # Stored and trimmed since its head was read, or a replica lags: the head tells, when it is read again.
                missing = error
                await asyncio.sleep(RETRY_LONGEST_SECONDS / 10)

    async def end(self, deadline: float) -> Position:
        """The position that everything stored by now stands at or before: the server's clock, the last sequence.

        Not the last message's own: an older copy of the log may have been put back, or a new one be empty, while the
        database holds more.
        """
        info = await self._stream.info(deadline)
        return Position(time_ns(info["ts"]), int(info["state"]["last_seq"]))

    async def goes_on(self, time_ns_: int, deadline: float, acknowledged: int = 0) -> Position:
        """Where the first message stands that was stored after a time (Unix nanoseconds), leases included; if there is none,
        where the next one will.

        ``acknowledged``: a sequence that was acknowledged after that time. What came after may be trimmed by now, and then it
        tells; not if its message is there and older, for which the acknowledgement was a duplicate's.
        """
        query = {"next_by_subj": self._stream.subjects.all, "start_time": rfc3339(time_ns_ + 1), "batch": 1}
        end = await self.end(deadline)  # asked first: what comes in between is found
        messages = await self.direct(self._stream.name, query, deadline)
        if messages:
            return position_of(messages[0])
        if acknowledged:
            there = await self._stream.next_message(acknowledged, self._stream.subjects.all, deadline)
            if there is None or int(there["seq"]) > acknowledged or time_ns(there["time"]) > time_ns_:
                return Position(end.time_ns, acknowledged)
        return Position(end.time_ns, end.seq + 1)

    async def events(self, agent_id: str, after: Position, deadline: float, seq: int = 0) -> tuple[list[Record], bool]:
        """Up to one page of events behind ``after``, oldest first, large bodies left out; and whether more follow.

        ``seq``: where to begin to look for them, if that is known; else it is found by time.
        """
        subject = self._stream.subjects.event(agent_id)
        query: dict[str, Any] = {
            "next_by_subj": subject,
            "batch": HISTORY_PAGE_RECORDS,
            "max_bytes": self.page_bytes(),
        }
        if seq or after == NOWHERE:
            query["seq"] = seq or 1
        else:
            # By time: after a power loss sequences are handed out again, times are not.
            query["start_time"] = rfc3339(after.time_ns)
        while True:
            messages = await self.direct(self._stream.name, query, deadline)
            more = bool(messages) and int((messages[-1].headers or {}).get("Nats-Num-Pending", "0")) > 0
            records = [self._record(message) for message in messages]
            wanted = [r for r in records if r.agent_id == agent_id and r.position > after]
            last = records[-1].position.seq if records else after.seq
            if not more and await self._lags(subject, last, after, deadline):
                if wanted:
                    return wanted, True
                await asyncio.sleep(RETRY_LONGEST_SECONDS / 10)
            elif wanted or not more:
                return wanted, more
            else:
                # A page of which nothing is wanted (foreign, undecodable, not behind ``after``): on behind it.
                query.pop("start_time", None)
                query["seq"] = last + 1

    async def operations(self, thread_name: str | None, deadline: float, after: int = 0) -> tuple[list[Record], bool]:
        """The operations on a graph's thread, or on all, that are in the log behind ``after``, oldest first, with their bodies.

        The flag is False if the body of one was missed: then that one was stored and trimmed since its head was read, or is
        torn, and only the database tells.
        """
        subjects = self._stream.subjects
        subject = subjects.graphs if thread_name is None else subjects.graph(thread_name)
        while True:
            found, whole, first = await self._operations(subject, thread_name, after + 1, deadline)
            if first is None:
                return found, whole
            # A trim between two pages may have taken the deletion of what was read before it.
            message = await self._stream.next_message(after + 1, subject, deadline)
            if message is not None and int(message["seq"]) == first:
                return found, whole

    async def _operations(
        self, subject: str, thread_name: str | None, seq: int, deadline: float
    ) -> tuple[list[Record], bool, int | None]:
        """See :meth:`operations`; and the sequence of the first message if it took more than one request."""
        query: dict[str, Any] = {"next_by_subj": subject, "batch": HISTORY_PAGE_RECORDS, "max_bytes": self.page_bytes()}
        found: list[Record] = []
        whole, requests, first = True, 0, 0
        while True:
            messages = await self.direct(self._stream.name, {**query, "seq": seq}, deadline)
            requests += 1
            for message in messages:
                record = self._record(message)
                first = first or record.position.seq
                seq = record.position.seq + 1
                if record.kind != Kind.GRAPH or thread_name not in (None, record.agent_id):
                    continue
                try:
                    found.append(await self.with_body(record, deadline))
                except BodyMissing:
                    whole = False
            more = bool(messages) and int((messages[-1].headers or {}).get("Nats-Num-Pending", "0")) > 0
            if not more and not await self._lags(subject, seq - 1, NOWHERE, deadline):
                return found, whole, first if requests > 1 else None

    async def _lags(self, subject: str, last: int, after: Position, deadline: float) -> bool:
        """Whether there is a message behind ``last`` that the replica which answered did not have yet."""
        if self._stream.replicas == 1:
            return False
        if time.monotonic() >= deadline:
            raise WalUnavailable(
                f"{self._stream.name} could not be read before the deadline: a replica lags behind its leader"
            )
        if subject != self._stream.subjects.graphs:
            found = await self._gets.last(subject, deadline)
            return found is not None and found.position.seq > last and found.position > after
        message = await self._stream.next_message(last + 1, subject, deadline)
        return message is not None and Position(time_ns(message["time"]), int(message["seq"])) > after

    async def find(self, subject: str, message_id: bytes, deadline: float) -> int:
        """Sequence of the record with this message id; 0 when it has left the log already."""
        seq, wanted = 1, message_id.hex()
        while True:
            query = {
                "seq": seq,
                "next_by_subj": subject,
                "batch": HISTORY_PAGE_RECORDS,
                "max_bytes": self.page_bytes(),
            }
            messages = await self.direct(self._stream.name, query, deadline)
            if not messages:
                return 0
            for message in messages:
                if (message.headers or {}).get("Nats-Msg-Id") == wanted:
                    return self._record(message).position.seq
            seq = self._record(messages[-1]).position.seq + 1

    async def with_body(self, record: Record, deadline: float) -> Record:
        """The record with its body, read from its chunks if it is large. Raises ``BodyMissing``."""
        if record.body is not None or record.manifest is None:
            return record
        return record._replace(body=await self.body(record, deadline))

    async def body(self, record: Record, deadline: float) -> bytes:
        """A large record's body: the chunks stand at the sequences right behind its manifest. Raises ``BodyMissing``."""
        subject = self._stream.subjects.chunk(record.agent_id)
        return await self.chunks(self._stream.name, subject, record, record.position.seq + 1, deadline)

    async def chunks(self, stream: str, subject: str, record: Record, first: int, deadline: float) -> bytes:
        """The body that ``record.manifest`` describes, from the messages on ``subject`` at ``first`` and behind."""
        manifest = record.manifest
        if manifest is None:
            raise BodyMissing(
                f"agent {record.agent_id!r}: the record has no manifest",
                outcome="durable",
            )
        parts: list[bytes] = []
        while len(parts) < manifest.chunks:
            query = {
                "seq": first + len(parts),
                "next_by_subj": subject,
                "batch": manifest.chunks - len(parts),
                "max_bytes": self.page_bytes(),
            }
            messages = await self.direct(stream, query, deadline)
            before = len(parts)
            for message in messages:
                if int((message.headers or {})["Nats-Sequence"]) == first + len(parts) and len(parts) < manifest.chunks:
                    parts.append(message.data)
            if len(parts) == before and self._stream.replicas > 1:
                # The replica that answered lags behind the one that had the head.
                chunk = await self._stream.next_message(first + before, subject, deadline, stream)
                if chunk is not None and int(chunk["seq"]) == first + before:
                    parts.append(base64.b64decode(chunk.get("data", "")))
            if len(parts) == before:
                break
        body = b"".join(parts)
        if len(body) != manifest.size or hashlib.blake2b(body, digest_size=16).digest() != manifest.digest:
            raise BodyMissing(
                f"agent {record.agent_id!r}: {len(parts)} of {manifest.chunks} chunks behind sequence "
                f"{first - 1} are in {stream}",
                outcome="durable",
            )
        return body

    def page_bytes(self) -> int:
        return max(WRITER_BATCH_BYTES, self._connection.max_payload + 64 * 1024)

    def _record(self, message: Reply) -> Record:
        return self._decoded(message.data, position_of(message))

    def _decoded(self, data: bytes, position: Position) -> Record:
        try:
            return decode_record(self._stream.namespace, data, position)
        except ValueError:
            # Readers pass over what does not decode; the writer makes a dead letter of it.
            return Record(0, self._stream.namespace, "", "", b"", 0, "", 0, 0, b"", position)
