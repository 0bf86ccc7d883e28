"""What awaited verbs are made of: calls in threads, appends, and the use of a runtime; none of it blocks the user's loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from . import payloads, runtime, threads
from .config import AWAITED_INLINE_BYTES, Config
from .errors import Closed, WalUnavailable
from .records import Ack, Codec, Record
from .wal.arrival import Arrival
from .wal.client import Wal
from .wal.lane import Ticket

T = TypeVar("T")


async def in_thread(call: Callable[[], T], seconds: float | None = None) -> T:
    """The result of ``call()``, made on one of the few threads for what blocks.

    When it is cancelled, or after ``seconds`` (then ``TimeoutError``), a call that has not begun is not made; one that has
    goes on, and nobody hears of its result.
    """
    arrival = Arrival()
    threads.start(call, arrival)
    result: T = await arrival.wait(seconds)
    return result


async def hand_over(
    engine: runtime.Runtime, ticket: Ticket, records: list[Record], deadline: float, check: Callable[[], object]
) -> None:
    """Hand over the next records of a call, in order, as soon as there is room. Their bodies are not compressed yet.

    ``ticket``: with an ``Arrival`` for its promise. ``check``: asked right before, raises if they are not wanted any more.
    Raises ``RecordTooLarge`` or ``WalUnavailable``; these records were not sent.
    """
    log = engine.wal.log

    def ready() -> Any:
        return log.entries(ticket, [_compressed(record) for record in records], deadline)

    if sum(len(record.body or b"") for record in records) <= AWAITED_INLINE_BYTES:
        entries = ready()
    else:
        try:
            entries = await in_thread(ready, deadline - time.monotonic())
        except TimeoutError:
            raise WalUnavailable(
                f"agent {ticket.agent_id!r}: the record could not be packed before the deadline, all threads are busy; call again"
            ) from None
    check()
    while not log.offer(entries):
        await log.room(ticket)
        check()


async def append(engine: runtime.Runtime, record: Record, deadline: float) -> Ack:
    """Append one record, whose body is not compressed yet, and return at DURABLE. Raises the record's error.

    A record of a call that was cancelled is not sent if it was not yet.
    """
    ticket = Ticket(record.agent_id, 1, promise=Arrival())
    await hand_over(engine, ticket, [record], deadline, engine.check_open)
    return (await engine.wal.log.awaited(ticket))[0]


def _compressed(record: Record) -> Record:
    if record.codec != Codec.MSGPACK or record.body is None:
        return record
    codec, body = payloads.compressed(record.body)
    return record if body is record.body else record._replace(codec=codec, body=body)


async def made_anyway(call: Callable[[], object]) -> None:
    """Wait for a call that is made whatever becomes of the caller."""
    arrival = Arrival()

    def make() -> None:
        try:
            call()
        except BaseException as error:
            if not arrival.fail(error):
                raise
        else:
            arrival.set(None)

    threads.start(make)
    await arrival.wait(None)


class Hold:
    """One agent's use of a runtime, taken once and given back once, whatever is cancelled meanwhile. Both block."""

    def __init__(self, config: Config, agent_id: str) -> None:
        self.engine: runtime.Runtime | None = None
        self.ownership: Ownership
        self._config = config
        self._agent_id = agent_id
        self._lock = threading.Lock()
        self._over = False

    def take(self) -> runtime.Runtime:
        engine = runtime.acquire(self._config)
        engine.note_agent(self._agent_id)
        with self._lock:
            if not self._over:
                self.ownership = Ownership(engine.wal, self._agent_id)
                self.engine = engine
                return engine
        engine.release()
        raise Closed(f"the agent {self._agent_id!r} was closed while it was opened; nothing was sent")

    def give_back(self) -> None:
        with self._lock:
            self._over = True
            engine, self.engine = self.engine, None
        if engine is not None and not engine.closed:
            engine.release()


class Ownership:
    """Whether one agent object counts as a user of its agent's lease: once, however often it resumes and whatever is
    cancelled. Claims run to their end, so that none leaves a lease that nobody knows of. Lives on the runtime's loop.
    """

    def __init__(self, wal: Wal, agent_id: str) -> None:
        self._wal = wal
        self._agent_id = agent_id
        self._turn = asyncio.Lock()
        self._owner = False
        self._over = False
        self.wanted = False
        """Whether a claim was ever asked for; belongs to the user's loop."""

    async def claim(self, deadline: float) -> None:
        async with self._turn:
            if not self._over:
                await self._wal.log.claim(self._agent_id, deadline)
                if self._owner:
                    await self._wal.released(self._agent_id)
                self._owner = True

    async def give_up(self) -> None:
        self._over = True
        async with self._turn:
            if self._owner:
                self._owner = False
                await self._wal.released(self._agent_id)
