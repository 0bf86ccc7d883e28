"""SkialithAgent: the blocking verbs of one agent."""

from __future__ import annotations

import os
from asyncio import _get_running_loop  # without an exception where there is none, which is the ordinary case
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

from . import aio, runtime
from .base_agent import BaseAgent, as_event, batch_failed, batches, checked_limit, position_after
from .config import load
from .errors import BlockingCallInEventLoop, Closed, SkialithError
from .records import Ack, AgentState, Event, Position
from .step_policy import Policy
from .steps import blocking
from .wal.lane import Ticket


class SkialithAgent(BaseAgent):
    """One agent's write-ahead log. Any number of threads may share it.

    ``agent_id``: 1 to 255 characters of any Unicode text. Settings (``nats_url``, ``database_url``, ``namespace``, ``writer``,
    ``durability``, ``timeout`` and the rest of :class:`~skialith.config.Config`) are arguments or ``SKIALITH_*``
    variables. Opening connects: raises ``InvalidArgument``, ``ConfigurationError`` or ``WalUnavailable`` within the timeout.
    Closing (``with`` or ``close()``) gives the agent up and, with the last agent, flushes and stops the runtime.

    On a thread that runs an asyncio loop nothing is opened and these verbs are refused (``BlockingCallInEventLoop``), because
    they block: there ``async with SkialithAgent(...) as agent`` gives an :class:`~skialith.aio.AsyncSkialithAgent`, whose
    verbs are awaited.
    """

    def __init__(self, agent_id: str, **settings: Any) -> None:
        super().__init__(agent_id, load(**settings))
        self._owner_pid = 0
        self._awaited: aio.AsyncSkialithAgent | None = None
        self._runtime: runtime.Runtime
        self._opened = False
        if _get_running_loop() is None:
            self._open()

    def _open(self) -> None:
        self._runtime = runtime.acquire(self._config)
        self._config = self._runtime.config  # equal; a process with many agents keeps one
        self._runtime.note_agent(self._agent_id)
        self._opened = True

    # ---- writing

    def save_event(self, event_id: str, data: Any, *, step: int | None = None) -> Ack:
        """Append one event and return at DURABLE.

        ``event_id``: 1 to 255 characters; the first record saved under it wins for ever, so a retry with the same id is
        always safe. ``data``: anything ormsgpack carries (docs/PAYLOADS.md); a dict's text under ``"kind"`` is the event's
        type. ``step``: the step it belongs to, default the last one resumed or checkpointed.

        Raises ``InvalidArgument`` (nothing was sent), ``WalUnavailable`` (``outcome`` says whether it may be written),
        ``WalFull``, ``AgentFenced``, ``Closed``.
        """
        engine = self._engine("save_event")
        record = self._event(event_id, data, step)
        return engine.wal.log.append_one(record, self._deadline())

    def save_event_nowait(self, event_id: str, data: Any, *, step: int | None = None) -> Future[Ack]:
        """Hand over one event (ACCEPTED) and return the future of its ``Ack``, which is there at DURABLE.

        Events of one agent keep the order of the calls. At most ``MAX_QUEUED_RECORDS`` records and ``MAX_QUEUED_BYTES`` of a
        process wait for their PubAcks; when they are reached the call blocks. Arguments and errors as :meth:`save_event`.
        Raised here: ``InvalidArgument``, ``Closed``, and ``WalUnavailable`` after it blocked for the whole timeout; nothing was
        sent. The rest, and a ``Closed`` that comes later, by the future, where ``outcome`` tells what became of the record.
        The future cannot be cancelled. Its callbacks run one after the other on a thread of Skialith's: one that blocks
        delays the others.
        """
        engine = self._engine("save_event_nowait")
        return engine.wal.log.append_nowait(self._event(event_id, data, step), self._deadline())

    def save_events(self, events: Iterable[tuple[str, Any]], *, step: int | None = None) -> list[Ack]:
        """Append ``(event_id, data)`` pairs in order, pipelined, and return one ``Ack`` each.

        Everything is checked before anything is sent. Raises as :meth:`save_event`, except that a failure after sending
        began is a ``BatchFailed``: its ``acks`` are those that are durable, ``failed`` the index of the first that is not,
        and ``outcome`` says whether that one and those behind it may be written. Saving all again is safe.
        """
        engine = self._engine("save_events")
        records = [self._event(event_id, data, step, f"events[{n}].") for n, (event_id, data) in enumerate(events)]
        if not records:
            return []
        ticket = Ticket(self._agent_id, len(records))
        handed_over = 0
        try:
            for batch in batches(records):
                try:
                    engine.wal.log.append(ticket, batch, self._deadline())
                except SkialithError as error:
                    # This part was not sent, but those before it were.
                    if handed_over > len(ticket.acks):
                        error.outcome = "unknown"
                    raise
                handed_over += len(batch)
                if ticket.promise.done:
                    break
            return engine.wal.log.wait(ticket)
        except SkialithError as error:
            raise batch_failed(self._agent_id, records, ticket.acks, error) from error
        finally:
            ticket.promise.give_up()  # After an error or Ctrl-C: what was not sent yet is not sent any more.

    def checkpoint(self, step: int, data: Any) -> Ack:
        """Append the agent's state and return at DURABLE; ``resume()`` gives back the last one.

        ``step``: 0 to 2**63-1. ``data``: as for :meth:`save_event`. Every call is a record of its own: writing an earlier
        state again makes that state current. Raises as :meth:`save_event`; after ``outcome="unknown"`` the checkpoint may
        or may not be current, and calling again settles it.
        """
        engine = self._engine("checkpoint")
        ack = engine.wal.log.append_one(self._checkpoint(step, data), self._deadline())
        self._step = step
        return ack

    def _do_step(
        self, verb: str, name: str, function: Callable[..., Any], args: Any, named: Any, policy: Policy
    ) -> Any:
        run = self._steps.run(self._engine(verb), self._own_for_steps)
        call = run.enter(name, function, policy, self._step)
        return blocking(partial(self._engine, verb), call, function, args, named)

    def _own_for_steps(self) -> None:
        if self._owner_pid != os.getpid():
            self._own(self._runtime, self._deadline())

    # ---- reading

    def resume(self, *, exclusive: bool = True) -> AgentState:
        """Own the agent and return its last checkpoint; a new agent has step 0, ``{}`` and ``is_new``.

        From here on this process is the owner: whoever owned it before gets ``AgentFenced`` at its next write.
        ``exclusive=False`` reads without owning and begins no run of steps. Raises ``WalUnavailable``, or ``StoreUnavailable``
        when the database is away and the log alone cannot tell.
        """
        engine = self._engine("resume")
        deadline = self._deadline()
        if exclusive:
            self._own(engine, deadline)
            self._steps.begin_anew()
        state = self._read_state(engine, deadline)
        self._step = state.step_index
        return state

    def _own(self, engine: runtime.Runtime, deadline: float) -> None:
        engine.wal.claim(self._agent_id, deadline)
        if self._owner_pid == os.getpid():
            engine.wal.release(self._agent_id)
        self._owner_pid = os.getpid()

    def peek(self) -> AgentState:
        """The last checkpoint, read only: nothing is claimed. Raises as :meth:`resume`."""
        return self._read_state(self._engine("peek"), self._deadline())

    def _read_state(self, engine: runtime.Runtime, deadline: float) -> AgentState:
        return self._state(engine.newest_checkpoint(self._agent_id, deadline))

    def history(self, after: Event | str | None = None, limit: int | None = None) -> Iterator[Event]:
        """The agent's events, oldest first, from database and log together, read lazily page by page.

        ``after``: continue behind this event (or its ``position.cursor()``). ``limit``: at most so many. Ends at what was
        durable when reading began. Raises ``StoreUnavailable`` or ``WalUnavailable`` while iterating.
        """
        engine = self._engine("history")
        return self._events(engine, position_after(after), checked_limit(limit))

    def _events(self, engine: runtime.Runtime, position: Position, limit: int | None) -> Iterator[Event]:
        if limit == 0:
            return
        for number, entry in enumerate(engine.history(self._agent_id).entries(position), start=1):
            yield as_event(entry)
            if number == limit:
                return

    # ---- life

    def flush(self, timeout: float | None = None) -> int:
        """Wait until all that this process appended is STORED; returns how many of it became dead letters.

        ``timeout``: seconds, default the agent's. Raises ``FlushTimeout``; what is not stored stays durable in the log. Raises
        ``RecordsLost``, once, if the log's server came back without records that this process had been acknowledged.
        """
        engine = self._engine("flush")
        return engine.flush(self._config.timeout if timeout is None else timeout)

    def close(self) -> None:
        """Give the agent up; the last agent of a process flushes (bounded) and stops the runtime. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if not self._opened or self._runtime.pid != os.getpid() or self._runtime.closed:
            return
        if self._owner_pid == os.getpid():
            self._runtime.wal.release(self._agent_id)
        self._runtime.release()

    def __enter__(self) -> SkialithAgent:
        if not self._opened:
            self._refuse_event_loop("with")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- awaited

    def __aenter__(self) -> Coroutine[Any, Any, aio.AsyncSkialithAgent]:
        """The same agent with awaited verbs, open. Raises what opening raises."""
        if self._closed:
            raise Closed(f"the agent {self._agent_id!r} is closed. Open a new SkialithAgent")
        if self._awaited is None:
            self._awaited = aio.AsyncSkialithAgent.of(self)
        return self._awaited.open()

    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Coroutine[Any, Any, None]:
        return aio.close(self._awaited, self.close)

    # ---- inside

    def _engine(self, verb: str) -> runtime.Runtime:
        if not self._opened or _get_running_loop() is not None:
            self._refuse_event_loop(verb)
        if self._closed:
            raise Closed(f"{verb}: the agent {self._agent_id!r} is closed; nothing was sent. Open a new SkialithAgent")
        if self._runtime.pid != runtime.process_id():
            # A forked child: the parent's connections are not ours to touch.
            self._open()
        self._runtime.check_open()
        return self._runtime

    @staticmethod
    def _refuse_event_loop(verb: str) -> NoReturn:
        spelling = {
            "with": "",
            "history": " and `async for event in agent.history(...)`",
            "save_event_nowait": " and `asyncio.create_task(agent.save_event(...))`",
        }.get(verb, f" and `await agent.{verb}(...)`")
        raise BlockingCallInEventLoop(
            f"{verb} blocks, and the agent is used, or was made, on a thread that runs an asyncio loop: write "
            f"`async with SkialithAgent(...) as agent:`{spelling}; nothing was sent"
        )
