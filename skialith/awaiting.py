"""What awaited verbs are made of: calls in threads, appends, and the use of a runtime; none of it blocks the user's loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import isawaitable
from typing import Any, TypeVar

from . import payloads, runtime, threads
from .base_agent import batch_failed, batches
from .config import AWAITED_INLINE_BYTES, Config
from .errors import Closed, SkialithError, StoreUnavailable, WalUnavailable
from .history import Found, newest_in_log, newest_of
from .records import Ack, Codec, Kind, Record
from .steps import Call, whole
from .wal.arrival import Arrival
from .wal.client import Wal
from .wal.direct import Direct
from .wal.lane import LaneName, Ticket, lane_name, who

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
                f"{who(ticket.name)}: the record could not be packed before the deadline, all threads are busy; call again"
            ) from None
    check()
    while not log.offer(entries):
        await log.room(ticket)
        check()


@contextmanager
def batch(agent_id: str, ticket: Ticket, records: list[Record]) -> Iterator[None]:
    """Where a call with several events is handed over and awaited: its errors become ``BatchFailed``."""
    try:
        yield
    except BaseException as error:
        ticket.promise.give_up()  # What was not sent yet is not sent any more.
        if isinstance(error, SkialithError):
            raise batch_failed(agent_id, records, ticket.acks, error) from error
        raise


async def hand_over_all(
    engine: runtime.Runtime, ticket: Ticket, records: list[Record], check: Callable[[], object]
) -> None:
    """As :func:`hand_over`, in slices between which other tasks run; each has the whole timeout."""
    handed_over = 0
    for part in batches(records):
        try:
            await hand_over(engine, ticket, part, time.monotonic() + engine.config.timeout, check)
        except SkialithError as error:
            # This part was not sent, but those before it were.
            if handed_over > len(ticket.acks):
                error.outcome = "unknown"
            raise
        handed_over += len(part)
        if ticket.promise.done:
            return
        await asyncio.sleep(0)


async def append(
    engine: runtime.Runtime,
    record: Record,
    deadline: float,
    name: LaneName | None = None,
    message_id: bytes | None = None,
    check: Callable[[], object] | None = None,
) -> Ack:
    """Append one record, whose body is not compressed yet, and return at DURABLE. Raises the record's error.

    ``name``: the lane, if it is not the agent's or thread's own. ``message_id``: if it is not to be the record's key. A record
    of a call that was cancelled is not sent if it was not yet. ``check``: asked again when it could not be sent at once; raises
    if it is not wanted any more.
    """
    ticket = Ticket(name or lane_name(record), 1, message_id=message_id, promise=Arrival())
    direct = send(engine, ticket, record, deadline)
    if direct is None:
        await hand_over(engine, ticket, [record], deadline, check or engine.check_open)
    return (await engine.wal.log.awaited(ticket, direct))[0]


def send(engine: runtime.Runtime, ticket: Ticket, record: Record, deadline: float) -> Direct | None:
    """Write a record, whose body is not compressed yet, to the socket at once; None if it must be handed over."""
    if len(record.body or b"") > AWAITED_INLINE_BYTES:
        return None
    return engine.wal.log.send(ticket, _compressed(record), deadline)


def _compressed(record: Record) -> Record:
    if record.codec != Codec.MSGPACK or record.body is None or record.kind == Kind.GRAPH:
        return record  # the values of a graph's operation are compressed one by one
    codec, body = payloads.compressed(record.body)
    return record if body is record.body else record._replace(codec=codec, body=body)


async def newest_checkpoint(engine: runtime.Runtime, agent_id: str, deadline: float) -> Found:
    """As ``Runtime.newest_checkpoint``, awaited."""
    wal = engine.wal
    last = await wal.ask(lambda: wal.reader.last_checkpoint(agent_id, deadline), deadline)
    dead = await wal.ask(lambda: wal.dead.for_agent(agent_id, "checkpoint", deadline), deadline)
    row: Record | StoreUnavailable | None
    try:
        seconds = max(0.1, deadline - time.monotonic())
        row = await in_thread(partial(engine.stored_checkpoint, agent_id), seconds)
    except StoreUnavailable as error:
        row = error
    except TimeoutError:
        row = StoreUnavailable(f"agent {agent_id!r}: no answer from the database before the deadline")
    return newest_of(agent_id, newest_in_log(last, dead), row)


async def step(
    engine: runtime.Runtime,
    call: Call,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    named: dict[str, Any],
    append: Callable[[Record], Coroutine[Any, Any, Ack]],
) -> Any:
    """Do what is left to do of a call of a step, and return its value: :func:`steps.blocking`, awaited."""
    found = call.found
    if found is not None:
        if found.body is None:
            found = await in_thread(partial(whole, engine, call, found))
        return await _with_body(found.body, partial(call.replay, found))
    record = call.kept or await _attempts(engine, call, function, args, named)
    ack = await _recorded(call, record, append)
    there = await in_thread(partial(whole, engine, call, None)) if ack.duplicate else None
    return await _with_body(record.body, partial(call.recorded, record, there))


async def inline(record: Record | None, make: Callable[[], T]) -> T:
    """``make()``, in a thread if the record's body is large."""
    return await _with_body(None if record is None else record.body, make)


async def _with_body(body: bytes | None, make: Callable[[], T]) -> T:
    return make() if len(body or b"") <= AWAITED_INLINE_BYTES else await in_thread(make)


async def _attempts(
    engine: runtime.Runtime,
    call: Call,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> Record:
    while True:
        engine.check_open()
        try:
            with call:
                result = function(*args, **named)
                if isawaitable(result):
                    result = await result
        except Exception as error:
            outcome = call.failed(error)
            if outcome is None:
                raise
        else:
            return call.succeeded(result)
        if isinstance(outcome, Record):
            return outcome
        await asyncio.sleep(outcome)


async def _recorded(call: Call, record: Record, append: Callable[[Record], Coroutine[Any, Any, Ack]]) -> Ack:
    """Append a step's record. A caller that is cancelled does not stop it: the function has run."""
    task = asyncio.ensure_future(append(record))
    _appending.add(task)
    task.add_done_callback(_appending.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(partial(_nobody_hears, call, record))
        raise
    except Exception as error:
        raise call.not_recorded(record, error) from error


_appending: set[asyncio.Task[Ack]] = set()
"""A loop holds its tasks by weak references only."""


def _nobody_hears(call: Call, record: Record, task: asyncio.Task[Ack]) -> None:
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    if error is not None:
        call.not_recorded(record, error)


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

    @property
    def owner(self) -> bool:
        return self._owner

    async def claim(self, deadline: float) -> None:
        async with self._turn:
            if not self._over:
                await self._wal.log.owning.claim(self._agent_id, deadline)
                if self._owner:
                    await self._wal.released(self._agent_id)
                self._owner = True

    async def give_up(self) -> None:
        self._over = True
        async with self._turn:
            if self._owner:
                self._owner = False
                await self._wal.released(self._agent_id)
