"""Delivering: what waits of one agent is sent, again with the same ids, until each record is durable or has failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from .. import _fastpath
from ..config import (
    APPEND_ATTEMPT_SECONDS,
    APPEND_BATCH_BYTES,
    APPEND_BATCH_RECORDS,
    APPEND_WINDOW_RECORDS,
)
from ..errors import Outcome, SkialithError, WalFull, WalRejected, WalUnavailable
from ..records import Ack
from . import frames
from .api import ApiError, NoResponders, backoff
from .lane import Entry, Lane, Owner, who
from .lease import WRONG_LAST_SEQUENCE, LeaseMoved, Leases
from .read import Reader
from .stream import Stream
from .transport import Connection, Disconnected, NoReply

ATOMIC_FROM_RECORDS = 16
"""With replicas, from this many records of one agent an atomic batch (2.4 ms and 12 us a record) beats one at a time."""

BURIAL_LANE = ""
_DUPLICATE_IN_BATCH = 10201
_STORE_FAILED = 10077
_RETRY_CODES = (10158, 10164, 10176, 10008, 10023, 10204)


class Refused(Exception):
    """Why an attempt is not repeated: the caller's error for every entry of the group."""

    def __init__(self, error: SkialithError) -> None:
        super().__init__(str(error))
        self.error = error


class Again(Exception):
    """The server refused for now."""


class Delivery:
    """The attempts of one process. Everything runs on the loop, with the lane's turn held."""

    def __init__(self, connection: Connection, stream: Stream, leases: Leases, reader: Reader) -> None:
        self._connection = connection
        self._stream = stream
        self._leases = leases
        self._reader = reader

    def next_group(self, lane: Lane) -> list[Entry]:
        """What goes next: a large record alone, or small ones up to the limits of a window or batch.

        On one server small ones are pipelined. With replicas a message that overtakes another one breaks the order, and a
        fenced one is refused while another is in flight, so there they go one at a time or as one atomic batch.
        """
        pipelined = self._stream.replicas == 1
        most = APPEND_WINDOW_RECORDS if pipelined else APPEND_BATCH_RECORDS
        group: list[Entry] = []
        size = 0
        for entry in lane.queue:
            if entry.chunks:
                return group or [entry]
            if group and (len(group) >= most or size + entry.size > APPEND_BATCH_BYTES):
                break
            group.append(entry)
            size += entry.size
        return group if pipelined or len(group) >= ATOMIC_FROM_RECORDS else group[:1]

    async def deliver(self, lane: Lane, group: list[Entry]) -> None:
        """Send a group until it is durable or fails; every entry leaves the queue with an ack or an error."""
        pauses = backoff()
        cause: object = "no answer"
        while group := self._expire(lane, group, cause):
            try:
                await self._attempt(lane, group)
                continue
            except Refused as refused:
                self._fail_group(lane, group, refused.error)
                return
            except LeaseMoved as error:
                lane.lease = None
                self._fail_group(lane, list(lane.queue), error)
                return
            except SkialithError as error:
                self._fail_group(lane, group, error)
                return
            except (Disconnected, NoReply) as error:
                cause = self._connection.last_error or error
            except NoResponders:
                cause = f"no stream takes {group[0].subject}, or it has no leader now"
            except Again as error:
                cause = error
            await asyncio.sleep(min(next(pauses), max(0.0, group[0].deadline - time.monotonic())))

    def _expire(self, lane: Lane, group: list[Entry], cause: object) -> list[Entry]:
        """Those of the group that are still to be sent; what nobody waits for any more has failed."""
        now = time.monotonic()
        live = []
        for entry in group:
            if entry.done:
                continue
            if entry.deadline > now and not entry.ticket.over:
                live.append(entry)
                continue
            outcome: Outcome = "unknown" if entry.unknown else "not_written"
            fate = "it may or may not be written, " if entry.unknown else "it was not written, "
            text = f"{who(lane.name)}: no PubAck before the deadline ({cause}); {fate}call again with the same id"
            self.fail(lane, entry, WalUnavailable(text, outcome=outcome))
        return live

    async def _attempt(self, lane: Lane, group: list[Entry]) -> None:
        """One attempt for all of a group. Raises what ends or repeats it."""
        deadline = min(entry.deadline for entry in group)
        await self._connection.admitted(deadline)
        self._check_payload(lane, group)
        if lane.name != BURIAL_LANE:
            await self._check_room(lane, sum(entry.size for entry in group), deadline)
        await self._check_owner(lane, deadline)
        atomic = bool(group[0].chunks) or (len(group) > 1 and self._stream.replicas > 1)
        seconds = APPEND_ATTEMPT_SECONDS + len(group[0].chunks) * 0.05
        timeout = max(0.01, min(seconds, deadline - time.monotonic()))
        if not atomic:
            await self._pipeline(lane, group, timeout)
        elif not await self._batch(lane, group, timeout, deadline):
            # One of the ids is there already; only one by one do they tell which.
            for entry in group:
                if not entry.done:
                    await self.deliver(lane, [entry])

    # ---- pipelined

    async def _pipeline(self, lane: Lane, group: list[Entry], timeout: float) -> None:
        wire, sent_at = self._connection.wire, time.monotonic()
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_answers(_: None) -> None:
            if not answered.done():
                answered.set_result(None)

        messages = [(entry.subject, entry.key, entry.data) for entry in group]
        window = wire.pipeline(messages, frames.fence(lane.lease), on_answers)
        if window is None:
            raise Disconnected(sent=False)
        try:
            await asyncio.wait_for(answered, timeout)
        except asyncio.TimeoutError:
            await self._connection.check_silence(sent_at)
        except BaseException:
            for entry in group:
                entry.unknown = True
            raise
        finally:
            wire.give_up(window)
        if rest := self._settle(lane, group, [readable(answer) for answer in window.answers()]):
            refused = rest[0]
            if refused is None:
                raise Disconnected(sent=True) if window.lost else NoReply
            await self._judge(lane, refused, min(entry.deadline for entry in group))

    def _settle(self, lane: Lane, group: list[Entry], answers: list[Any]) -> list[bytes | None]:
        """Acknowledge what is durable. Returns the other answers if their records may be sent again, in this order: none
        of this agent's later ones is stored."""
        stored = [isinstance(answer, tuple) for answer in answers]
        first = stored.index(False) if not all(stored) else len(group)
        passed = any(stored[first:])
        self._note(lane, group, [answer[0] for answer in answers if isinstance(answer, tuple)])
        for entry, answer in zip(group, answers, strict=True):
            if answer is None:
                entry.unknown = True
        for entry, answer in zip(group, answers, strict=True):
            if entry.done:
                continue
            if isinstance(answer, tuple):
                self._acknowledge(lane, entry, Ack(*answer))
            elif passed:
                self.fail(lane, entry, self._overtaken(lane, entry, answer))
        return [] if passed else answers[first:]

    def _overtaken(self, lane: Lane, entry: Entry, answer: bytes | None) -> SkialithError:
        if answer is None:
            return WalUnavailable(
                f"{who(lane.name)}: no PubAck, while a later record of this agent is stored; it may or may not be "
                "written, call again with the same id",
                outcome="unknown",
            )
        code, description = _refusal(answer)
        error: SkialithError = WalUnavailable(
            f"{who(lane.name)}: the server refused the record ({description}, {code}), while a later one of this agent is "
            "stored; call again with the same id to save it behind that one",
            outcome="not_written",
        )
        if _is_full(code, description):
            error = self._full(lane, description)
        if entry.ticket.count > 1:
            error.outcome = "unknown"  # some of those behind it are written
        return error

    async def _judge(self, lane: Lane, answer: bytes, deadline: float) -> None:
        """What a refusal means for the attempt; always raises."""
        if not answer:
            raise NoResponders
        code, description = _refusal(answer)
        if code == WRONG_LAST_SEQUENCE and lane.lease is not None:
            # Alone it proves nothing: the lease may be mine at a newer sequence.
            await self._leases.verify(lane.lease, deadline)
        elif _is_full(code, description):
            raise Refused(self._full(lane, description))
        elif code not in _RETRY_CODES:
            text = f"{who(lane.name)}: the server refused the record: {description} ({code})"
            raise Refused(WalRejected(text, code=code))
        raise Again(f"the server answered {description} ({code})")

    # ---- as one atomic batch

    async def _batch(self, lane: Lane, group: list[Entry], timeout: float, deadline: float) -> bool:
        """All or nothing; False if one of the ids is there already."""
        if not self._connection.wire.takes_records:
            raise Disconnected(sent=False)
        try:
            reply = await self._connection.exchange(lambda to: frames.batch(group, lane.lease, to), timeout)
        except (Disconnected, NoReply) as error:
            if not isinstance(error, Disconnected) or error.sent:
                for entry in group:
                    entry.unknown = True
            raise
        if not reply.data:
            raise NoResponders
        try:
            last, duplicate, _, code, status, _, _ = _fastpath.parse_puback(reply.data)
        except ValueError as error:
            for entry in group:
                entry.unknown = True
            raise Again(str(error)) from error
        if code == 0 and status == 0:
            first = last - (len(group) - 1) - len(group[0].chunks)
            self._note(lane, group, range(first, first + len(group)))
            for number, entry in enumerate(group):
                self._acknowledge(lane, entry, Ack(first + number, duplicate))
            return True
        if code != _DUPLICATE_IN_BATCH:
            await self._judge(lane, reply.data, deadline)
        if not group[0].chunks:
            return False
        # A large record whose id is there already: from an earlier attempt, or an earlier call.
        entry = group[0]
        entry.unknown = True
        burial = lane.name == BURIAL_LANE
        seq = 0 if burial else await self._reader.find(entry.subject, entry.key, deadline)
        self._note(lane, group, [seq])
        self._acknowledge(lane, entry, Ack(seq, True))
        return True

    # ---- before it is sent

    def _check_payload(self, lane: Lane, group: list[Entry]) -> None:
        """The next server may take less than the one that the record was cut for; it would end the connection."""
        limit = self._connection.max_payload - frames.HEADER_ROOM_BYTES
        if max(len(part) for entry in group for part in (entry.data, *entry.chunks)) > limit:
            raise Refused(
                WalUnavailable(
                    f"{who(lane.name)}: the server's max_payload is now {self._connection.max_payload:,} bytes, less "
                    "than when the record was made; call again with the same id",
                    outcome="not_written",
                )
            )

    async def _check_owner(self, lane: Lane, deadline: float) -> None:
        lease = lane.lease
        if isinstance(lane.name, Owner):
            if lease is None:
                raise LeaseMoved(f"{who(lane.name)}: its lease is not held here any more; send it again")
            if self._leases.due(lease):  # it is renewed by use alone
                await self._leases.renew(lease, deadline)
        if lease is not None:
            await self._leases.ensure(lease, deadline)

    async def _check_room(self, lane: Lane, size: int, deadline: float) -> None:
        if self._stream.has_room(size):
            return
        try:
            await self._stream.info(deadline)
        except ApiError as error:
            raise Again(str(error)) from error
        if not self._stream.has_room(size):
            raise Refused(self._full(lane))

    def _full(self, lane: Lane, detail: str = "") -> WalFull:
        name = self._stream.dead_name if lane.name == BURIAL_LANE else self._stream.name
        return WalFull(
            f"the log {name} is full ({self._stream.max_bytes:,} bytes{'; ' + detail if detail else ''}): check that a writer "
            "runs and reaches its database (`skialith status`), or raise the stream's max_bytes",
            outcome="not_written",
        )

    # ---- ends

    def _note(self, lane: Lane, group: list[Entry], seqs: Sequence[int]) -> None:
        if seqs and lane.name != BURIAL_LANE:
            size = sum(entry.size for entry in group)
            for seq in seqs:
                self._stream.tally.note(seq, size)
                size = 0

    def _acknowledge(self, lane: Lane, entry: Entry, ack: Ack) -> None:
        if entry.unknown and lane.lease is not None:
            lane.lease.suspect = True  # an earlier copy of it may still arrive, when its id is forgotten
        self._leave(lane, entry)
        if not entry.ticket.failed:
            entry.ticket.acknowledge(ack)

    def _leave(self, lane: Lane, entry: Entry) -> None:
        if lane.queue[0] is entry:
            lane.queue.popleft()
        else:
            lane.queue.remove(entry)
        entry.done = True
        if lane.name != BURIAL_LANE:
            self._connection.wire.leave(lane.turn, 1, entry.size)

    def _fail_group(self, lane: Lane, group: Sequence[Entry], error: SkialithError) -> None:
        for entry in group:
            if not entry.done:
                self.fail(lane, entry, _copied(error))

    def fail(self, lane: Lane, entry: Entry, error: SkialithError) -> None:
        """Fail an entry and the rest of its call: what stands behind a failed record of a call is not sent again."""
        alone = entry.ticket.count == 1  # and thousands of them may fail together
        for other in [entry] if alone else [other for other in lane.queue if other.ticket is entry.ticket]:
            if other.unknown:
                error.outcome = "unknown"
                if lane.lease is not None:
                    lane.lease.suspect = True
            self._leave(lane, other)
        if not entry.ticket.failed:
            entry.ticket.fail(error)


def _refusal(answer: bytes) -> tuple[int, str]:
    """The server's error code and what it says."""
    if not answer:
        return 503, "no responders"
    _, _, _, code, status, description, _ = _fastpath.parse_puback(answer)
    return code or status, description


def readable(answer: tuple[int, bool] | bytes | None) -> tuple[int, bool] | bytes | None:
    """An answer that is no PubAck says as little as none; one in an unusual form is read here."""
    if not answer or isinstance(answer, tuple):
        return answer
    try:
        seq, duplicate, _, code, status, _, _ = _fastpath.parse_puback(answer)
    except ValueError:
        return None
    return answer if code or status else (seq, duplicate)


def _is_full(code: int, description: str) -> bool:
    return code == _STORE_FAILED or "maximum bytes" in description


def _copied(error: SkialithError) -> Any:
    copy = type(error)(*error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy
