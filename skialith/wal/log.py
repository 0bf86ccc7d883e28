"""Appending: one lane per agent or thread, one thing in flight per lane, the same message id at every attempt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, nullcontext
from functools import partial

from ..config import APPEND_ATTEMPT_SECONDS, IDLE_LANES, MAX_QUEUED_BYTES, MAX_QUEUED_RECORDS
from ..errors import Closed, WalUnavailable
from ..records import Ack, DeadLetter, Kind, Record
from . import frames
from ._wire import LoopClosed, Unsettled
from .arrival import Arrival
from .delivery import BURIAL_LANE, Delivery
from .direct import Direct
from .futures import Futures
from .lane import LOOK_AGAIN_SECONDS, Entry, Lane, LaneName, Owner, Thread, Ticket, holding, lane_name, who
from .lease import Leases
from .owning import Owning
from .read import Reader
from .stream import Stream
from .transport import Connection

_GRACE_SECONDS = 5.0
"""How long after its deadline a call waits for the loop to say what became of it."""
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
        self._direct: set[Direct] = set()
        self._closed = False
        self.lanes: dict[LaneName, Lane] = {}
        self.owning = Owning(self, leases)

    # ---- from any thread

    def append_one(self, record: Record, deadline: float) -> Ack:
        """Append one record and wait for its PubAck. Raises the record's error; interruptible.

        If nothing of its agent is in flight and nothing is amiss, the calling thread does all of it itself.
        """
        name = lane_name(record)
        lane = self.lanes.get(name) or self.lane(name)
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
        ticket = Ticket(name, 1)
        self.append(ticket, [record], deadline, unknown=unknown)
        return self.wait(ticket)[0]

    def append_nowait(self, record: Record, deadline: float) -> Future[Ack]:
        """Hand over one record, behind what its agent has waiting; the future gives its ``Ack`` or its error."""
        future = self._futures.make()
        self.append(Ticket(lane_name(record), 1, settle=partial(self._futures.settle, future)), [record], deadline)
        return future

    def append(self, ticket: Ticket, records: Sequence[Record], deadline: float, *, unknown: bool = False) -> None:
        """Hand over the next records of a call, in order.

        Blocks while the process has too much waiting. Raises ``RecordTooLarge`` or ``WalUnavailable``; these records were
        not sent. ``unknown``: they were sent before, without an answer.
        """
        entries = self.entries(ticket, records, deadline, unknown=unknown)
        while not self.offer(entries):
            left = deadline - time.monotonic()
            if left <= 0:
                raise _no_room(ticket, unknown=unknown)
            self._connection.wire.wait_for_room(min(left, _ROOM_SECONDS))

    def entries(
        self, ticket: Ticket, records: Sequence[Record], deadline: float, *, unknown: bool = False
    ) -> list[Entry]:
        """Records of a call, ready to be handed over. Raises ``RecordTooLarge``."""
        pair = self.lane(ticket.name).subjects
        subjects, max_payload = self._stream.subjects, self._connection.max_payload
        entries = []
        for record in records:
            subject = pair[record.kind == Kind.CHECKPOINT]
            entries.append(
                frames.record_entry(record, subject, ticket, deadline, subjects, max_payload, unknown=unknown)
            )
        ticket.deadline = deadline
        return entries

    def offer(self, entries: list[Entry]) -> bool:
        """Hand them over, unless too much is waiting."""
        return self._hand_over(entries, sum(entry.size for entry in entries))

    def wait(self, ticket: Ticket) -> list[Ack]:
        """One ``Ack`` per record, in order. Raises the call's error; interruptible, and Ctrl-C gives the call up."""
        try:
            acks: list[Ack] = ticket.promise.wait(_patience(ticket))
            return acks
        except TimeoutError as error:
            raise _no_answer(ticket) from error
        finally:
            ticket.promise.give_up()  # After Ctrl-C: what was not sent yet is not sent any more.

    # ---- from a loop of the user's, which is never blocked

    def send(self, ticket: Ticket, record: Record, deadline: float) -> Direct | None:
        """Write the one record of a call to the socket, if nothing of its lane is in flight and nothing is amiss.

        None: nothing was written, it is to be handed over. The ticket's promise must not wait in a thread.
        """
        lane = self.lanes.get(ticket.name) or self.lane(ticket.name)
        lease = lane.lease
        if isinstance(ticket.name, Owner) and (lease is None or self._leases.due(lease)):
            return None
        if not self._stream.has_room(len(record.body or b"")):
            return None
        ticket.deadline = deadline
        direct = Direct(self._connection.wire, self._stream.tally, lane, ticket, record, self._again, self._direct)
        return direct if direct.send(lane.subjects[record.kind == Kind.CHECKPOINT]) else None

    async def room(self, ticket: Ticket) -> None:
        """Return when it is worth while to offer again. Raises ``WalUnavailable`` at the ticket's deadline."""
        left = ticket.deadline - time.monotonic()
        if left <= 0:
            raise _no_room(ticket)
        wire, room = self._connection.wire, Arrival()
        if wire.when_room(room.set):
            try:
                await room.wait(left)
            except TimeoutError:
                raise _no_room(ticket) from None
            finally:
                wire.forget_room(room.set)

    async def awaited(self, ticket: Ticket, direct: Direct | None = None) -> list[Ack]:
        """As :meth:`wait`; a cancelled call gives its records up. ``direct``: what :meth:`send` gave."""
        try:
            with nullcontext() if direct is None else direct.awaited():
                acks: list[Ack] = await ticket.promise.wait(_patience(ticket))
                return acks
        except TimeoutError as error:
            raise _no_answer(ticket) from error

    def drained(self, deadline: float) -> bool:
        """Wait until every call has its PubAck or its error; False at the deadline."""
        wire = self._connection.wire
        while wire.appending or wire.queued:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_AGAIN_SECONDS)
        return True

    def end(self) -> None:
        """The loop has ended, or does not answer: what was handed over so late that the loop did not see it is refused."""
        self._closed = True
        for callback, handed in self._connection.wire.end():
            if callback == self._take:
                self._take(handed)
        for direct in list(self._direct):
            direct.ended()

    def bury(self, letter: DeadLetter, deadline: float) -> Ticket:
        """Append a dead letter, with the whole body of a large record, to the dead-letter stream."""
        ticket = Ticket(BURIAL_LANE, 1, deadline)
        subjects, max_payload = self._stream.subjects, self._connection.max_payload
        self._hand_over([frames.letter_entry(letter, ticket, deadline, subjects, max_payload)], 0)
        return ticket

    def _hand_over(self, entries: list[Entry], size: int) -> bool:
        """False if too much is waiting. A signal's exception gives the call up, not the records' place in the order."""
        lane = self.lane(entries[0].ticket.name)
        records = 0 if lane.name == BURIAL_LANE else len(entries)
        try:
            while not (taken := self._connection.wire.hand_over(lane.turn, records, size, self._take, (lane, entries))):
                if not lane.turn.retired:
                    break
                lane = self.lane(lane.name)  # it was forgotten just now
            return taken
        except LoopClosed:
            self._refuse(lane, entries)
            return True
        except BaseException:
            entries[0].ticket.promise.give_up()
            raise

    def lane(self, name: LaneName) -> Lane:
        """What the lane of this name is now, made if there is none; any thread may ask."""
        lane = self.lanes.get(name)
        if lane is None:
            new = Lane(name, self._subjects(name))
            if name != BURIAL_LANE and not isinstance(name, Owner):
                new.turn.permit(b"", 0)
            lane = self.lanes.setdefault(name, new)
        return lane

    def _subjects(self, name: LaneName) -> tuple[str, str]:
        subjects = self._stream.subjects
        if isinstance(name, Thread):
            return (subjects.graph(name.name),) * 2
        if isinstance(name, Owner):
            return subjects.event(name.agent_id), subjects.checkpoint(name.agent_id)
        return (subjects.event(name), subjects.checkpoint(name)) if name != BURIAL_LANE else ("", "")

    # ---- on the loop

    def _take(self, handed: tuple[Lane, list[Entry]]) -> None:
        lane, entries = handed
        if self._closed:
            self._refuse(lane, entries)
            return
        lane.queue.extend(entries)
        self._start(lane)

    def _again(self, direct: Direct, unknown: bool) -> None:
        """A record that its caller wrote goes to the front of its lane, whose turn is still its own."""
        lane, record, ticket = direct.lane, direct.record, direct.ticket
        subject, max_payload = lane.subjects[record.kind == Kind.CHECKPOINT], self._connection.max_payload
        subjects, deadline = self._stream.subjects, ticket.deadline
        entry = frames.record_entry(record, subject, ticket, deadline, subjects, max_payload, unknown=unknown)
        entry.size = direct.size
        if self._closed:
            self._refuse(lane, [entry])
            return
        lane.queue.appendleft(entry)
        self._start(lane)

    async def end_attempts(self) -> None:
        """For ever take over what callers on loops of their own wrote and should have given up by now.

        Not a part of other housekeeping, which may itself wait for the turn that such a record has.
        """
        while True:
            await asyncio.sleep(APPEND_ATTEMPT_SECONDS / 4)
            now = time.monotonic()
            for direct in list(self._direct):
                direct.end_attempt(now)

    def _start(self, lane: Lane) -> None:
        if not lane.running:
            lane.running = True
            task = asyncio.create_task(self._drain(lane))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _refuse(self, lane: Lane, entries: list[Entry]) -> None:
        for entry in entries:
            if lane.name != BURIAL_LANE:
                self._connection.wire.leave(lane.turn, 1, entry.size)
            if not entry.ticket.failed:
                entry.ticket.fail(_closed(entry))

    async def _drain(self, lane: Lane) -> None:
        try:
            while lane.queue:
                async with self.held(lane):
                    await self._delivery.deliver(lane, self._delivery.next_group(lane))
        except BaseException as error:
            for entry in list(lane.queue):
                entry.unknown = True
                text = f"the append was interrupted: {error!r}"
                self._delivery.fail(lane, entry, WalUnavailable(text, outcome="unknown"))
            raise
        finally:
            lane.running = False
            if not lane.queue:
                lane.take_all()

    @asynccontextmanager
    async def held(self, lane: Lane) -> AsyncIterator[Lane]:
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
            lane.turn.permit(None if lane.name == BURIAL_LANE or isinstance(lane.name, Owner) else b"", 0)
        elif (
            connection.wire.is_open
            and lease.lost is None
            and not lease.suspect
            and lease.server_id == connection.server_id
        ):
            lane.turn.permit(frames.fence(lease), connection.epoch)

    def forget_idle(self) -> None:
        """Let go of the oldest lanes beyond ``IDLE_LANES`` that nobody uses and this process does not own; a thread that still
        has one looks for its agent's new lane, and an owner outside shows its token again."""
        surplus = len(self.lanes) - self.owning.count - IDLE_LANES
        if surplus <= 0:
            return
        surplus += IDLE_LANES // 10  # so that all lanes are not looked through each second
        for lane in list(self.lanes.values()):
            if lane.lease is None or isinstance(lane.name, Owner):
                surplus -= self.forget(lane)
                if not surplus:
                    return

    def forget(self, lane: Lane) -> bool:
        """Let go of a lane, unless it is in use; whether that was done."""
        if lane.holders or lane.running or not lane.turn.retire():
            return False
        return self.lanes.pop(lane.name, None) is not None

    async def close(self) -> None:
        """Stop what is in flight; callers get ``WalUnavailable`` with their record's outcome, later ones ``Closed``."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        busy = bool(self._tasks) and bool((await asyncio.wait(self._tasks, timeout=1.0))[1])
        for lane in list(self.lanes.values()) if not busy else ():
            # A task that is cancelled before its first step leaves them as they are.
            self._refuse(lane, lane.take_all())
        self._futures.close()


def _patience(ticket: Ticket) -> float:
    return max(0.0, ticket.deadline - time.monotonic()) + _GRACE_SECONDS


def _no_room(ticket: Ticket, *, unknown: bool = False) -> WalUnavailable:
    return WalUnavailable(
        f"{who(ticket.name)}: {MAX_QUEUED_RECORDS} records or {MAX_QUEUED_BYTES} bytes of this process wait for PubAcks "
        "and none came before the deadline; call again later",
        outcome="unknown" if unknown else "not_written",
    )


def _no_answer(ticket: Ticket) -> WalUnavailable:
    return WalUnavailable(
        f"{who(ticket.name)}: no PubAck {_GRACE_SECONDS:.0f} s after the deadline; it may or may not be written, call "
        "again with the same id",
        outcome="unknown",
    )


def _closed(entry: Entry) -> Closed:
    fate = "it may or may not be written" if entry.unknown else "nothing was sent"
    return Closed(
        f"{who(entry.ticket.name)}: the log was closed before the record was durable; {fate}",
        outcome="unknown" if entry.unknown else "not_written",
    )
