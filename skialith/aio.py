"""AsyncSkialithAgent: the verbs of one agent, awaited on any asyncio loop, over the same runtime as the blocking ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

from . import awaiting, payloads, runtime, threads
from .awaiting import Hold, hand_over, in_thread, made_anyway
from .base_agent import BaseAgent, as_event, checked_limit, position_after
from .config import APPEND_BATCH_RECORDS, HISTORY_PAGE_BYTES, HISTORY_PAGE_RECORDS, load
from .errors import Closed, SkialithError, WalUnavailable
from .history import Entry
from .records import Ack, AgentState, Event, Position, Record
from .step_policy import Policy
from .steps import Run
from .wal.arrival import Arrival
from .wal.lane import Ticket


class AsyncSkialithAgent(BaseAgent):
    """One agent's write-ahead log for one asyncio loop: any kind of loop, any number of its tasks, any number of such loops.

    Arguments as :class:`~skialith.SkialithAgent`, which gives one by ``async with``. ``async with``, ``open()`` or the first
    verb opens it. An agent belongs to the loop that it is first used on; on another one open another agent, they share the
    runtime of the process. Nothing blocks the loop.

    Calls of one agent reach the log in the order in which they began, so ``asyncio.gather`` keeps the order of its
    arguments. Any call may be cancelled (``asyncio.timeout``): what was not sent is not sent any more, what was sent may or
    may not be written, so the outcome of a record whose call was cancelled is ``unknown`` and saving it again with the same
    id settles it.
    """

    _packing = staticmethod(payloads.plain)

    def __init__(self, agent_id: str, **settings: Any) -> None:
        super().__init__(agent_id, load(**settings))
        self._forget()

    @classmethod
    def of(cls, other: BaseAgent) -> AsyncSkialithAgent:
        """The same agent, with the same settings, at the same step; not open."""
        agent = cls.__new__(cls)
        BaseAgent.__init__(agent, other.agent_id, other.config)
        agent._step = other._step
        agent._forget()
        return agent

    def _forget(self) -> None:
        self._pid = runtime.process_id()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._order = asyncio.Lock()
        self._stepping = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._hold: Hold | None = None

    # ---- writing

    async def save_event(self, event_id: str, data: Any, *, step: int | None = None) -> Ack:
        """Append one event and return at DURABLE. Arguments and errors as :meth:`skialith.SkialithAgent.save_event`."""
        self._enter("save_event")
        return await self._append("save_event", self._event(event_id, data, step))

    async def checkpoint(self, step: int, data: Any) -> Ack:
        """Append the agent's state and return at DURABLE. Arguments and errors as :meth:`skialith.SkialithAgent.checkpoint`."""
        self._enter("checkpoint")
        ack = await self._append("checkpoint", self._checkpoint(step, data))
        self._step = step
        return ack

    async def _append(self, verb: str, record: Record) -> Ack:
        ticket, deadline = Ticket(self._agent_id, 1, promise=Arrival()), self._deadline()
        async with self._order:
            engine = await self._engine(verb)
            direct = awaiting.send(engine, ticket, record, deadline)
            if direct is None:
                await hand_over(engine, ticket, [record], deadline, partial(self._check_open, verb))
        return (await engine.wal.log.awaited(ticket, direct))[0]

    async def save_events(self, events: Iterable[tuple[str, Any]], *, step: int | None = None) -> list[Ack]:
        """Append ``(event_id, data)`` pairs in order, pipelined, and return one ``Ack`` each.

        Arguments and errors as :meth:`skialith.SkialithAgent.save_events`. Many are checked and packed in slices, between which
        other tasks run.
        """
        self._enter("save_events")
        step = self._step if step is None else step
        async with self._order:
            engine = await self._engine("save_events")
            records = await self._events_packed(events, step)
            if not records:
                return []
            ticket = Ticket(self._agent_id, len(records), promise=Arrival())
            check = partial(self._check_open, "save_events")
            with awaiting.batch(self._agent_id, ticket, records):
                await awaiting.hand_over_all(engine, ticket, records, check)
        with awaiting.batch(self._agent_id, ticket, records):
            return await engine.wal.log.awaited(ticket)

    async def _events_packed(self, events: Iterable[tuple[str, Any]], step: int) -> list[Record]:
        records: list[Record] = []
        for n, (event_id, data) in enumerate(events):
            records.append(self._event(event_id, data, step, f"events[{n}]."))
            if n % APPEND_BATCH_RECORDS == APPEND_BATCH_RECORDS - 1:
                await asyncio.sleep(0)
        return records

    # ---- steps

    async def _do_step(
        self, verb: str, name: str, function: Callable[..., Any], args: Any, named: Any, policy: Policy
    ) -> Any:
        self._enter(verb)
        async with self._stepping:  # so that calls get their places in the order in which they began
            engine = await self._engine(verb)
            run = self._steps.begun(engine) or await self._begin_run(engine)
            call = run.enter(name, function, policy, self._step)
        return await awaiting.step(engine, call, function, args, named, partial(self._append, verb))

    async def _begin_run(self, engine: runtime.Runtime) -> Run:
        hold = self._hold
        if hold is not None and not hold.ownership.owner:
            await self._own(engine, hold)
        return await in_thread(partial(self._steps.run, engine, lambda: None))

    async def _own(self, engine: runtime.Runtime, hold: Hold) -> None:
        hold.ownership.wanted = True
        deadline = self._deadline()
        await engine.wal.ask(partial(hold.ownership.claim, deadline), deadline, whole=True)

    # ---- reading

    async def resume(self, *, exclusive: bool = True) -> AgentState:
        """Own the agent and return its last checkpoint. Arguments and errors as :meth:`skialith.SkialithAgent.resume`.

        A call that was cancelled may own the agent all the same, until it is closed.
        """
        self._enter("resume")
        deadline = self._deadline()
        engine, hold = await self._engine("resume"), self._hold
        if exclusive and hold is not None:
            await self._own(engine, hold)
            self._steps.begin_anew()
        state = await self._read_state(engine, deadline)
        self._step = state.step_index
        return state

    async def peek(self) -> AgentState:
        """The last checkpoint, read only: nothing is claimed. Raises as :meth:`resume`."""
        self._enter("peek")
        return await self._read_state(await self._engine("peek"), self._deadline())

    async def _read_state(self, engine: runtime.Runtime, deadline: float) -> AgentState:
        found = await awaiting.newest_checkpoint(engine, self._agent_id, deadline)
        return await awaiting.inline(found[0], partial(self._state, found))

    def history(self, after: Event | str | None = None, limit: int | None = None) -> AsyncGenerator[Event, None]:
        """``async for event in agent.history(...)``: the agent's events, oldest first, read page by page.

        Arguments and errors as :meth:`skialith.SkialithAgent.history`. A page is read ahead of its first event.
        """
        self._enter("history")
        return self._events(position_after(after), checked_limit(limit))

    async def _events(self, after: Position, limit: int | None) -> AsyncGenerator[Event, None]:
        engine = await self._engine("history")
        entries = engine.history(self._agent_id).entries(after)
        left = limit
        more = True
        while more and left != 0:
            # On a thread: the merge of log and database is written once, and blocks.
            page, more, error = await in_thread(partial(_page, entries, left))
            for event in page:
                yield event
            if error is not None:
                raise error
            left = None if left is None else left - len(page)

    # ---- life

    async def flush(self, timeout: float | None = None) -> int:
        """Wait until all that this process appended is STORED; returns how many of it became dead letters.

        Arguments and errors as :meth:`skialith.SkialithAgent.flush`.
        """
        self._enter("flush")
        engine = await self._engine("flush")
        seconds = self._config.timeout if timeout is None else timeout
        await engine.wal.ask(lambda: engine.wal.flushed(seconds), time.monotonic() + seconds)
        return await in_thread(engine.flushed)

    async def open(self) -> AsyncSkialithAgent:
        """Connect; verbs do so themselves. Raises as the constructor of :class:`skialith.SkialithAgent`. May be called twice."""
        self._enter("open")
        await self._engine("open")
        return self

    async def close(self) -> None:
        """Give the agent up; the last agent of a process flushes (bounded) and stops the runtime. May be called twice.

        When it is cancelled it goes on all the same.
        """
        if self._closed:
            return
        self._closed = True
        hold = self._hold
        if hold is None or self._pid != runtime.process_id():
            return
        engine = hold.engine
        try:
            if engine is not None and not engine.closed and hold.ownership.wanted:
                # What goes wrong leaves the lease to age out.
                with suppress(Closed, WalUnavailable):
                    await engine.wal.ask(hold.ownership.give_up, time.monotonic(), whole=True)
        finally:
            await made_anyway(hold.give_back)

    async def __aenter__(self) -> AsyncSkialithAgent:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # ---- inside

    def _enter(self, verb: str) -> None:
        """Raises if the call cannot be made on this loop."""
        loop = asyncio.get_running_loop()
        if self._pid != runtime.process_id():
            self._forget()  # A forked child: the parent's connections are not ours to touch.
        self._check_open(verb)
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed():
                raise SkialithError(
                    f"{verb}: the agent {self._agent_id!r} is used on another event loop; nothing was sent. Open another "
                    "AsyncSkialithAgent here, they share what is below"
                )
            self._loop, self._order, self._opening = loop, asyncio.Lock(), asyncio.Lock()
            self._stepping = asyncio.Lock()

    def _check_open(self, verb: str) -> None:
        if self._closed:
            raise Closed(
                f"{verb}: the agent {self._agent_id!r} is closed; nothing was sent. Open a new AsyncSkialithAgent"
            )

    async def _engine(self, verb: str) -> runtime.Runtime:
        engine = None if self._hold is None else self._hold.engine
        if engine is None:
            async with self._opening:
                self._check_open(verb)
                engine = await self._opened()
        engine.check_open()
        return engine

    async def _opened(self) -> runtime.Runtime:
        if self._hold is not None and self._hold.engine is not None:
            return self._hold.engine
        hold = self._hold = Hold(self._config, self._agent_id)
        try:
            return await in_thread(hold.take)
        except BaseException:
            self._hold = None
            threads.start(hold.give_back)
            raise


async def close(agent: AsyncSkialithAgent | None, more: Callable[[], None]) -> None:
    """Close an agent, and then what blocks while it closes."""
    try:
        if agent is not None:
            await agent.close()
    finally:
        await made_anyway(more)


def _page(entries: Iterator[Entry], most: int | None) -> tuple[list[Event], bool, BaseException | None]:
    """The next events, whether there may be more, and what ended the page early."""
    limit = HISTORY_PAGE_RECORDS if most is None else min(most, HISTORY_PAGE_RECORDS)
    page: list[Event] = []
    size = 0
    try:
        for entry in entries:
            page.append(as_event(entry))
            size += len(entry[0].body or b"")
            if len(page) >= limit or size >= HISTORY_PAGE_BYTES:
                return page, True, None
    except Exception as error:  # noqa: BLE001 - raised behind the events that were read before it
        return page, False, error
    return page, False, None
