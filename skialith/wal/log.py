"""Appending: one lane per agent, one thing in flight per lane, the same message id at every attempt."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial

from ..config import APPEND_ATTEMPT_SECONDS, IDLE_LANES, MAX_QUEUED_BYTES, MAX_QUEUED_RECORDS
from ..errors import AgentFenced, Closed, WalUnavailable
from ..records import Ack, DeadLetter, Kind, Record
from . import frames
from ._wire import LoopClosed, Unsettled
from .delivery import BURIAL_LANE, Delivery
from .futures import Futures
from .lane import Entry, Lane, Ticket, holding
from .lease import Lease, Leases
from .read import Reader
from .stream import Stream
from .transport import Connection

_GRACE_SECONDS = 5.0
"""How long after its deadline a call waits for the loop to say what became of it."""
_LOOK_AGAIN_SECONDS = 0.002
_ROOM_SECONDS = 0.05
"""How long a call waits at once for room, before it looks whether there is enough for it."""


class Log:
    """The append side of one namespace's stream. The first part is for any thread, the rest is the loop's."""

    def __init__(self, connection: Connection, stream: Stream, leases: Leases, reader: Reader) -> None:
        self._connection = connection
        self._stream = stream
        self._leases = leases
        self._delivery = Delivery(connection, stream, leases, reader)
        self._futures = Futures()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.lanes: dict[str, Lane] = {}

    # ---- from any thread

    def append_one(self, record: Record, deadline: float) -> Ack:
        """Append one record and wait for its PubAck. Raises the record's error; interruptible.

        If nothing of its agent is in flight and nothing is amiss, the calling thread does all of it itself.
        """
        lane = self.lanes.get(record.agent_id) or self._lane(record.agent_id)
        unknown = False
        if self._stream.has_room(len(record.body or b"")):
            try:
                answer = self._connection.wire.append(
                    lane.turn,
                    self._stream.tally,
                    lane.subjects[record.kind == Kind.CHECKPOINT],
                    record,
                    min(deadline, time.monotonic() + APPEND_ATTEMPT_SECONDS),
                )
                if answer is not None:
                    return Ack(*answer)
            except Unsettled:
                unknown = True
        ticket = Ticket(record.agent_id, 1)
        self.append(ticket, [record], deadline, unknown=unknown)
        return self.wait(ticket)[0]

    def append_nowait(self, record: Record, deadline: float) -> Future[Ack]:
        """Hand over one record, behind what its agent has waiting; the future gives its ``Ack`` or its error."""
        future = self._futures.make()
        self.append(Ticket(record.agent_id, 1, settle=partial(self._futures.settle, future)), [record], deadline)
        return future

    def append(self, ticket: Ticket, records: Sequence[Record], deadline: float, *, unknown: bool = False) -> None:
        """Hand over the next records of a call, in order.

        Blocks while the process has too much waiting. Raises ``RecordTooLarge`` or ``WalUnavailable``; these records were
        not sent. ``unknown``: they were sent before, without an answer.
        """
        pair = self._lane(ticket.agent_id).subjects
        subjects, max_payload = self._stream.subjects, self._connection.max_payload
        entries = []
        size = 0
        for record in records:
            subject = pair[record.kind == Kind.CHECKPOINT]
            entry = frames.record_entry(record, subject, ticket, deadline, subjects, max_payload)
            entry.unknown = unknown
            size += entry.size
            entries.append(entry)
        ticket.deadline = deadline
        while not self._hand_over(entries, size):
            left = deadline - time.monotonic()
            if left <= 0:
                raise WalUnavailable(
                    f"agent {ticket.agent_id!r}: {MAX_QUEUED_RECORDS} records or {MAX_QUEUED_BYTES} bytes of this process wait "
                    "for PubAcks and none came before the deadline; call again later",
                    outcome="unknown" if unknown else "not_written",
                )
            self._connection.wire.wait_for_room(min(left, _ROOM_SECONDS))

    def wait(self, ticket: Ticket) -> list[Ack]:
        """One ``Ack`` per record, in order. Raises the call's error; interruptible, and Ctrl-C gives the call up."""
        seconds = max(0.0, ticket.deadline - time.monotonic()) + _GRACE_SECONDS
        try:
            acks: list[Ack] = ticket.promise.wait(seconds)
            return acks
        except TimeoutError as error:
            raise WalUnavailable(
                f"agent {ticket.agent_id!r}: no PubAck {_GRACE_SECONDS:.0f} s after the deadline; it may or may not be "
                "written, call again with the same id",
                outcome="unknown",
            ) from error
        finally:
            ticket.promise.give_up()  # After Ctrl-C: what was not sent yet is not sent any more.

    def drained(self, deadline: float) -> bool:
        """Wait until every call has its PubAck or its error; False at the deadline."""
        wire = self._connection.wire
        while wire.appending or wire.queued:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_AGAIN_SECONDS)
        return True

    def end(self) -> None:
        """The loop has ended: what was handed over so late that the loop did not see it is refused."""
        self._closed = True
        for callback, handed in self._connection.wire.end():
            if callback == self._take:
                self._take(handed)

    def bury(self, letter: DeadLetter, deadline: float) -> Ticket:
        """Append a dead letter, with the whole body of a large record, to the dead-letter stream."""
        ticket = Ticket(BURIAL_LANE, 1, deadline)
        subjects, max_payload = self._stream.subjects, self._connection.max_payload
        self._hand_over([frames.letter_entry(letter, ticket, deadline, subjects, max_payload)], 0)
        return ticket

    def _hand_over(self, entries: list[Entry], size: int) -> bool:
        """False if too much is waiting. A signal's exception gives the call up, not the records' place in the order."""
        lane = self._lane(entries[0].ticket.agent_id)
        records = 0 if lane.agent_id == BURIAL_LANE else len(entries)
        try:
            return self._connection.wire.hand_over(lane.turn, records, size, self._take, (lane, entries))
        except LoopClosed:
            self._refuse(lane, entries)
            return True
        except BaseException:
            entries[0].ticket.promise.give_up()
            raise

    def _lane(self, agent_id: str) -> Lane:
        lane = self.lanes.get(agent_id)
        if lane is None:
            subjects = self._stream.subjects
            pair = (subjects.event(agent_id), subjects.checkpoint(agent_id)) if agent_id else ("", "")
            new = Lane(agent_id, pair)
            if agent_id != BURIAL_LANE:
                new.turn.permit(b"", 0)
            lane = self.lanes.setdefault(agent_id, new)
        return lane

    # ---- on the loop

    def _take(self, handed: tuple[Lane, list[Entry]]) -> None:
        lane, entries = handed
        if self._closed:
            self._refuse(lane, entries)
            return
        lane.queue.extend(entries)
        if not lane.running:
            lane.running = True
            task = asyncio.create_task(self._drain(lane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _refuse(self, lane: Lane, entries: list[Entry]) -> None:
        for entry in entries:
            if lane.agent_id != BURIAL_LANE:
                self._connection.wire.leave(lane.turn, 1, entry.size)
            if not entry.ticket.failed:
                entry.ticket.fail(_closed(entry))

    async def _drain(self, lane: Lane) -> None:
        try:
            while lane.queue:
                async with self._held(lane):
                    await self._delivery.deliver(lane, self._delivery.next_group(lane))
        except BaseException as error:
            for entry in list(lane.queue):
                entry.unknown = True
                text = f"the append was interrupted: {error!r}"
                self._delivery.fail(lane, entry, WalUnavailable(text, outcome="unknown"))
            raise
        finally:
            lane.running = False

    @asynccontextmanager
    async def _held(self, lane: Lane) -> AsyncIterator[Lane]:
        """The lane's turn; afterwards its threads may append directly if nothing is amiss."""
        async with holding(lane.turn):
            lease = lane.lease
            if lane.turn.suspect and lease is not None:
                lease.suspect = True
            lane.turn.suspect = False
            lane.turn.permit(None, 0)
            try:
                yield lane
            finally:
                self._permit(lane)

    def _permit(self, lane: Lane) -> None:
        lease, connection = lane.lease, self._connection
        if lease is None:
            lane.turn.permit(None if lane.agent_id == BURIAL_LANE else b"", 0)
        elif (
            connection.wire.is_open
            and lease.lost is None
            and not lease.suspect
            and lease.server_id == connection.server_id
        ):
            lane.turn.permit(frames.fence(lease), connection.epoch)

    def forget_idle(self) -> None:
        """Let go of the oldest lanes beyond ``IDLE_LANES`` that nobody owns or uses; a thread that still has one looks for
        its agent's new lane."""
        for lane in list(self.lanes.values()):
            if len(self.lanes) <= IDLE_LANES:
                return
            if lane.lease is None and not lane.holders and not lane.running and lane.turn.retire():
                self.lanes.pop(lane.agent_id)

    # ---- ownership

    async def claim(self, agent_id: str, deadline: float) -> Lease:
        """Own the agent. Within one process the lease is shared; one that was lost is claimed anew."""
        async with self._owning(agent_id) as lane:
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

    async def confirm(self, agent_id: str, deadline: float) -> None:
        """Read the lease, if this process took one. Raises ``AgentFenced`` if it is not this process's any more."""
        async with self._owning(agent_id) as lane:
            if lane.lease is not None:
                await self._leases.verify(lane.lease, deadline)

    async def release(self, agent_id: str) -> None:
        """One user of the lease less; the last one gives the agent up, after all that was handed over until then."""
        lease = self._lane(agent_id).lease
        if lease is not None:
            lease.users -= 1
            if lease.users <= 0:
                await self._give_up(agent_id)

    async def _give_up(self, agent_id: str) -> None:
        """Without its lease, what still waits would be written behind a next owner's back."""
        async with self._owning(agent_id, after_all=True) as lane:
            lease = lane.lease
            if lease is not None and lease.users <= 0:
                lane.lease = None
                await self._leases.release(lease)

    async def renew_due(self, deadline: float) -> None:
        """Renew every lease of which a third has passed; give up what nobody uses any more and could not be given up."""
        for agent_id, lane in list(self.lanes.items()):
            if lane.lease is not None and lane.lease.users <= 0 and not lane.holders:
                if not lane.turn.waiting:
                    await self._give_up(agent_id)
            elif lane.lease is not None and self._leases.due(lane.lease):
                async with self._owning(agent_id) as held:
                    if held.lease is not None and held.lease.lost is None:
                        await self._leases.renew(held.lease, deadline)

    @asynccontextmanager
    async def _owning(self, agent_id: str, *, after_all: bool = False) -> AsyncIterator[Lane]:
        lane = self._lane(agent_id)
        lane.holders += 1
        try:
            while after_all and lane.turn.waiting:  # noqa: ASYNC110 - it is counted in C, by whatever thread
                await asyncio.sleep(_LOOK_AGAIN_SECONDS)
            async with self._held(lane):
                yield lane
        finally:
            lane.holders -= 1

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
        busy = bool(self._tasks) and bool((await asyncio.wait(self._tasks, timeout=1.0))[1])
        for lane in list(self.lanes.values()) if not busy else ():
            # A task that is cancelled before its first step leaves them as they are.
            left = list(lane.queue)
            lane.queue.clear()
            self._refuse(lane, left)
        self._futures.close()


def _closed(entry: Entry) -> Closed:
    fate = "it may or may not be written" if entry.unknown else "nothing was sent"
    return Closed(
        f"agent {entry.ticket.agent_id!r}: the log was closed before the record was durable; {fate}",
        outcome="unknown" if entry.unknown else "not_written",
    )
