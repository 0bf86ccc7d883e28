"""Appending: one lane per agent, one thing in flight per lane, the same message id at every attempt."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import InvalidStateError
from contextlib import asynccontextmanager
from typing import Any

from .. import _fastpath
from ..config import (
    APPEND_ATTEMPT_SECONDS,
    APPEND_BATCH_BYTES,
    APPEND_BATCH_RECORDS,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_RECORDS,
)
from ..errors import AgentFenced, Closed, Outcome, SkialithError, WalFull, WalRejected, WalUnavailable
from ..records import Ack, DeadLetter, Record
from . import frames
from .api import ApiError, NoResponders, backoff
from .lane import Admission, Entry, Lane, Ticket
from .lease import WRONG_LAST_SEQUENCE, Lease, Leases
from .read import Reader
from .stream import Stream
from .transport import Connection, Disconnected, NoReply

ATOMIC_FROM_RECORDS = 16
"""From this many records of one agent an atomic batch (about 2.4 ms plus 12 us a record) beats one at a time."""

_BURIAL_LANE = ""
_DUPLICATE_IN_BATCH = 10201
_STORE_FAILED = 10077
_RETRY_CODES = (10158, 10164, 10176, 10008, 10023, 10204)


class AppendFailed(Exception):
    """Why an attempt is not repeated: the caller's error for every entry of the group."""

    def __init__(self, error: SkialithError) -> None:
        super().__init__(str(error))
        self.error = error


class Log:
    """The append side of one namespace's stream. ``append`` may be called from any thread; the rest is the loop's."""

    def __init__(self, connection: Connection, stream: Stream, leases: Leases, reader: Reader) -> None:
        self._connection = connection
        self._stream = stream
        self._leases = leases
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._admission = Admission()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.lanes: dict[str, Lane] = {}
        self.last_seq = 0
        """Highest sequence this process appended; what ``flush()`` waits for."""

    # ---- from any thread

    def append(self, agent_id: str, records: Sequence[Record], deadline: float) -> Ticket:
        """Hand over records of one agent, in order; the ticket's future gives one ``Ack`` each.

        Blocks while the process has too much waiting. Raises ``RecordTooLarge`` or ``WalUnavailable``; nothing was sent.
        """
        ticket = Ticket(agent_id, deadline)
        subjects, max_payload = self._stream.subjects, self._connection.max_payload
        entries = [frames.record_entry(record, ticket, subjects, max_payload) for record in records]
        ticket.count, ticket.size = len(entries), sum(entry.size for entry in entries)
        if not self._admission.enter(ticket.count, ticket.size, deadline):
            raise WalUnavailable(
                f"agent {agent_id!r}: {MAX_QUEUED_RECORDS} records or {MAX_QUEUED_BYTES} bytes of this process wait for "
                "PubAcks and none came before the deadline; call again later",
                outcome="not_written",
            )
        ticket.future.add_done_callback(lambda _: self._admission.leave(ticket.count, ticket.size))
        self._hand_over(ticket, entries)
        return ticket

    def drained(self, deadline: float) -> bool:
        """Wait until every call has its PubAck or its error; False at the deadline."""
        return self._admission.drained(deadline)

    def bury(self, letter: DeadLetter, deadline: float) -> Ticket:
        """Append a dead letter, with the whole body of a large record, to the dead-letter stream."""
        ticket = Ticket(_BURIAL_LANE, deadline, count=1)
        entry = frames.letter_entry(letter, ticket, self._stream.subjects, self._connection.max_payload)
        self._hand_over(ticket, [entry])
        return ticket

    def _hand_over(self, ticket: Ticket, entries: list[Entry]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._enqueue, ticket, entries)
        except RuntimeError:  # The loop is closed.
            _fail_future(ticket, _closed(ticket.agent_id))

    # ---- on the loop

    def lane(self, agent_id: str) -> Lane:
        lane = self.lanes.get(agent_id)
        if lane is None:
            lane = self.lanes[agent_id] = Lane(agent_id)
        return lane

    def _enqueue(self, ticket: Ticket, entries: list[Entry]) -> None:
        if self._closed:
            _fail_future(ticket, _closed(ticket.agent_id))
            return
        lane = self.lane(ticket.agent_id)
        lane.queue.extend(entries)
        if not lane.running:
            lane.running = True
            task = asyncio.create_task(self._drain(lane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drain(self, lane: Lane) -> None:
        try:
            while lane.queue:
                async with lane.lock:
                    await self._deliver(lane, self._group(lane))
        except BaseException as error:
            for entry in list(lane.queue):
                entry.unknown = True
                self._fail(
                    lane,
                    entry,
                    WalUnavailable(f"the append was interrupted: {error!r}", outcome="unknown"),
                )
            raise
        finally:
            lane.running = False
            self._forget_idle(lane)

    def _forget_idle(self, lane: Lane) -> None:
        if lane.lease is None and not lane.holders and not lane.running:
            self.lanes.pop(lane.agent_id, None)

    @staticmethod
    def _group(lane: Lane) -> list[Entry]:
        """What goes next: a large record alone, or small ones up to the limits of one batch."""
        group: list[Entry] = []
        size = 0
        for entry in lane.queue:
            if entry.chunks:
                return group or [entry]
            if group and (len(group) >= APPEND_BATCH_RECORDS or size + entry.size > APPEND_BATCH_BYTES):
                break
            group.append(entry)
            size += entry.size
        return group if len(group) >= ATOMIC_FROM_RECORDS else group[:1]

    async def _deliver(self, lane: Lane, group: list[Entry]) -> None:
        """Send a group until it is durable or fails; every entry leaves the queue with an ack or an error."""
        pauses = backoff()
        cause: object = "no answer"
        while True:
            group = self._expire(lane, group, cause)
            if not group:
                return
            try:
                if not await self._attempt(lane, group):
                    # One of the ids is there already; only one by one do they tell which.
                    for entry in group:
                        if not entry.done:
                            await self._deliver(lane, [entry])
                return
            except AppendFailed as failed:
                self._fail_group(lane, group, failed.error)
                return
            except (Disconnected, NoReply) as error:
                cause = self._connection.last_error or error
                if not isinstance(error, Disconnected) or error.sent:
                    for entry in group:
                        entry.unknown = True
            except NoResponders:
                cause = f"no stream takes {group[0].subject}, or it has no leader now"
            except _Retry as error:
                cause = error
            except SkialithError as error:
                self._fail_group(lane, group, error)
                return
            await asyncio.sleep(min(next(pauses), max(0.0, group[0].ticket.deadline - time.monotonic())))

    def _expire(self, lane: Lane, group: list[Entry], cause: object) -> list[Entry]:
        now = time.monotonic()
        live = []
        for entry in group:
            if entry.done:
                continue
            if entry.ticket.deadline > now and not entry.ticket.future.done():
                live.append(entry)
                continue
            outcome: Outcome = "unknown" if entry.unknown else "not_written"
            self._fail(
                lane,
                entry,
                WalUnavailable(
                    f"agent {lane.agent_id!r}: no PubAck before the deadline ({cause}); "
                    + ("it may or may not be written, " if entry.unknown else "it was not written, ")
                    + "call again with the same id",
                    outcome=outcome,
                ),
            )
        return live

    async def _attempt(self, lane: Lane, group: list[Entry]) -> bool:
        """One attempt; False asks to go one by one. Raises what ends or repeats the attempt."""
        deadline = min(entry.ticket.deadline for entry in group)
        await self._connection.ready(deadline)
        self._check_payload(lane, group)
        if lane.agent_id != _BURIAL_LANE:
            await self._check_room(sum(entry.size for entry in group), deadline)
        lease = lane.lease
        if lease is not None:
            await self._leases.ensure(lease, deadline)
        atomic = len(group) > 1 or bool(group[0].chunks)
        timeout = max(
            0.01,
            min(
                APPEND_ATTEMPT_SECONDS + len(group[0].chunks) * 0.05,
                deadline - time.monotonic(),
            ),
        )

        def build(reply: str) -> bytes:
            return frames.batch(group, lease, reply) if atomic else frames.single(group[0], lease, reply)

        reply = await self._connection.exchange(build, timeout)
        if not reply.data:
            raise NoResponders
        seq, duplicate, _, code, status, description, _ = _fastpath.parse_puback(reply.data)
        if code == 0 and status == 0:
            self._acknowledge(lane, group, seq, duplicate)
            return True
        if code == _DUPLICATE_IN_BATCH:
            if group[0].chunks:
                await self._acknowledge_present(lane, group[0], deadline)
                return True
            return False
        await self._refused(lane, code, description, deadline)
        raise _Retry(f"the server answered {description} ({code})")

    def _check_payload(self, lane: Lane, group: list[Entry]) -> None:
        """The next server may take less than the one that the record was cut for; it would end the connection."""
        limit = self._connection.max_payload - frames.HEADER_ROOM_BYTES
        largest = max(
            max(len(entry.data), *map(len, entry.chunks)) if entry.chunks else len(entry.data) for entry in group
        )
        if largest > limit:
            raise AppendFailed(
                WalUnavailable(
                    f"agent {lane.agent_id!r}: the server's max_payload is now {self._connection.max_payload:,} bytes, less "
                    "than when the record was made; call again with the same id",
                    outcome="not_written",
                )
            )

    async def _check_room(self, size: int, deadline: float) -> None:
        if self._stream.has_room(size):
            return
        try:
            await self._stream.info(deadline)
        except ApiError as error:
            raise _Retry(str(error)) from error
        if not self._stream.has_room(size):
            raise AppendFailed(_full(self._stream.name, self._stream.max_bytes))

    async def _refused(
        self,
        lane: Lane,
        code: int,
        description: str,
        deadline: float,
    ) -> None:
        """Return if the attempt should be repeated, else raise ``AppendFailed`` or ``AgentFenced``."""
        if code == WRONG_LAST_SEQUENCE and lane.lease is not None:
            # Alone it proves nothing: the lease may be mine at a newer sequence.
            await self._leases.verify(lane.lease, deadline)
        elif code == _STORE_FAILED or "maximum bytes" in description:
            name = self._stream.dead_name if lane.agent_id == _BURIAL_LANE else self._stream.name
            raise AppendFailed(_full(name, self._stream.max_bytes, description))
        elif code not in _RETRY_CODES:
            raise AppendFailed(
                WalRejected(
                    f"agent {lane.agent_id!r}: the server refused the record: {description} ({code})",
                    code=code,
                )
            )

    # ---- ends

    def _acknowledge(self, lane: Lane, group: list[Entry], last: int, duplicate: bool) -> None:
        first = last - (len(group) - 1) - len(group[0].chunks)
        for number, entry in enumerate(group):
            self._settle(lane, entry, Ack(first + number, duplicate))
        if lane.agent_id != _BURIAL_LANE:
            self._stream.note_append(sum(entry.size for entry in group))

    async def _acknowledge_present(self, lane: Lane, entry: Entry, deadline: float) -> None:
        """A large record whose id is there already: from an earlier attempt, or an earlier call."""
        entry.unknown = True
        seq = 0 if lane.agent_id == _BURIAL_LANE else await self._reader.find(entry.subject, entry.key, deadline)
        self._settle(lane, entry, Ack(seq, True))

    def _settle(self, lane: Lane, entry: Entry, ack: Ack) -> None:
        lane.queue.remove(entry)
        entry.done = True
        ticket = entry.ticket
        if lane.agent_id != _BURIAL_LANE:
            self.last_seq = max(self.last_seq, ack.seq)
        ticket.acks.append(ack)
        if len(ticket.acks) == ticket.count:
            with contextlib.suppress(InvalidStateError):  # Its caller gave up.
                ticket.future.set_result(ticket.acks)

    def _fail_group(self, lane: Lane, group: list[Entry], error: SkialithError) -> None:
        for entry in group:
            if not entry.done:
                copy = _copied(error)
                if entry.unknown:
                    copy.outcome = "unknown"
                self._fail(lane, entry, copy)

    def _fail(self, lane: Lane, entry: Entry, error: SkialithError) -> None:
        """Fail an entry and the rest of its call: what stands behind a failed record of a call is not sent."""
        if entry.unknown and lane.lease is not None:
            lane.lease.suspect = True
        for other in [other for other in lane.queue if other.ticket is entry.ticket]:
            lane.queue.remove(other)
            other.done = True
        _fail_future(entry.ticket, error)

    # ---- ownership

    async def claim(self, agent_id: str, deadline: float) -> Lease:
        """Own the agent. Within one process the lease is shared; one that was lost is claimed anew."""
        async with self._held(agent_id) as lane:
            held = lane.lease
            if held is not None and held.lost is None:
                # Another process may have taken it over since the last write; whoever resumes takes it back.
                with contextlib.suppress(AgentFenced):
                    await self._leases.verify(held, deadline)
                    await self._leases.ensure(held, deadline)
                    held.users += 1
                    return held
            lease = await self._leases.claim(agent_id, deadline)
            lease.users = held.users + 1 if held is not None else 1
            lane.lease = lease
            return lease

    async def release(self, agent_id: str) -> None:
        """One user of the lease less; the last one gives the agent up."""
        async with self._held(agent_id) as lane:
            lease = lane.lease
            if lease is None:
                return
            lease.users -= 1
            if lease.users <= 0:
                lane.lease = None
                await self._leases.release(lease)

    async def renew_due(self, deadline: float) -> None:
        """Renew every lease of which a third has passed."""
        for agent_id, lane in list(self.lanes.items()):
            if lane.lease is not None and self._leases.due(lane.lease):
                async with self._held(agent_id) as held:
                    if held.lease is not None and held.lease.lost is None:
                        await self._leases.renew(held.lease, deadline)

    @asynccontextmanager
    async def _held(self, agent_id: str) -> AsyncIterator[Lane]:
        lane = self.lane(agent_id)
        lane.holders += 1
        try:
            async with lane.lock:
                yield lane
        finally:
            lane.holders -= 1
            self._forget_idle(lane)

    async def release_all(self) -> None:
        """Give up every agent that is still owned; what goes wrong leaves a lease to age out."""
        for lane in list(self.lanes.values()):
            if lane.lease is not None:
                lane.lease.users = 1
                await self.release(lane.agent_id)

    async def close(self) -> None:
        """Stop what is in flight; callers get ``WalUnavailable`` with their record's outcome, later ones ``Closed``."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)


class _Retry(Exception):
    """The server refused for now."""


def _full(name: str, max_bytes: int, detail: str = "") -> WalFull:
    return WalFull(
        f"the log {name} is full ({max_bytes:,} bytes{'; ' + detail if detail else ''}): check that a writer runs and "
        "reaches its database (`skialith status`), or raise the stream's max_bytes",
        outcome="not_written",
    )


def _closed(agent_id: str) -> Closed:
    return Closed(f"agent {agent_id!r}: the log was closed before the record was sent; nothing was sent")


def _fail_future(ticket: Ticket, error: SkialithError) -> None:
    with contextlib.suppress(InvalidStateError):  # Its caller gave up.
        ticket.future.set_exception(error)


def _copied(error: SkialithError) -> Any:
    copy = type(error)(*error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy
