"""SkialithAgent: the blocking verbs of one agent."""

from __future__ import annotations

import functools
import os
import secrets
import time
from asyncio import _get_running_loop  # without an exception where there is none, which is the ordinary case
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, ParamSpec

from . import _fastpath, payloads, runtime
from .config import APPEND_BATCH_BYTES, APPEND_BATCH_RECORDS, MAX_EVENT_TYPE_CHARACTERS, Config, check_id, load
from .errors import (
    BatchFailed,
    BlockingCallInEventLoop,
    BodyMissing,
    Closed,
    InvalidArgument,
    SkialithError,
)
from .history import Entry
from .records import NOWHERE, Ack, AgentState, Event, Kind, Position, Record
from .step_policy import ONCE, Policy
from .steps import Steps, blocking
from .wal.lane import Ticket

P = ParamSpec("P")

_MAX_STEP = 2**63 - 1


class SkialithAgent:
    """One agent's write-ahead log. Any number of threads may share it.

    ``agent_id``: 1 to 255 characters of any Unicode text. Settings (``nats_url``, ``database_url``, ``namespace``, ``writer``,
    ``durability``, ``timeout`` and the rest of :class:`~skialith.config.Config`) are arguments or ``SKIALITH_*``
    variables. Opening connects: raises ``InvalidArgument``, ``ConfigurationError`` or ``WalUnavailable`` within the timeout.
    Closing (``with`` or ``close()``) gives the agent up and, with the last agent, flushes and stops the runtime.
    """

    def __init__(self, agent_id: str, **settings: Any) -> None:
        self._agent_id = check_id("agent_id", agent_id)
        self._config: Config = load(**settings)
        if _get_running_loop() is not None:
            self._refuse_event_loop("SkialithAgent")
        self._runtime = runtime.acquire(self._config)
        self._runtime.note_agent(self._agent_id)
        self._step = 0
        self._owner_pid = 0
        self._steps = Steps(self._config, self._agent_id)
        self._closed = False

    @property
    def agent_id(self) -> str:
        return self._agent_id

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self._config

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
            for batch in _batches(records):
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
            raise _batch_failed(self._agent_id, records, ticket, error) from error
        finally:
            ticket.promise.give_up()  # After an error or Ctrl-C: what was not sent yet is not sent any more.

    def checkpoint(self, step: int, data: Any) -> Ack:
        """Append the agent's state and return at DURABLE; ``resume()`` gives back the last one.

        ``step``: 0 to 2**63-1. ``data``: as for :meth:`save_event`. Every call is a record of its own: writing an earlier
        state again makes that state current. Raises as :meth:`save_event`; after ``outcome="unknown"`` the checkpoint may
        or may not be current, and calling again settles it.
        """
        engine = self._engine("checkpoint")
        step = _checked_step("step", step)
        codec, body = payloads.pack(data, "data", self._config.max_record_bytes)
        record = Record(
            Kind.CHECKPOINT,
            self._config.namespace,
            self._agent_id,
            "",
            secrets.token_bytes(16),
            step,
            "",
            _now_us(),
            codec,
            body,
        )
        ack = engine.wal.log.append_one(record, self._deadline())
        self._step = step
        return ack

    def _event(self, event_id: str, data: Any, step: int | None, where: str = "") -> Record:
        config = self._config
        event_id = check_id(f"{where}event_id" if where else "event_id", event_id)
        codec, body = payloads.pack(data, f"{where}data" if where else "data", config.max_record_bytes)
        key = _fastpath.event_key(config.namespace, self._agent_id, event_id)
        step = self._step if step is None else _checked_step("step", step)
        kind, now = _event_type(data), _now_us()
        return Record(
            Kind.EVENT, config.namespace, self._agent_id, event_id, key, step, kind, now, codec, body, NOWHERE, None
        )

    # ---- steps

    def step(
        self,
        name: str,
        function: Callable[..., Any],
        /,
        *args: Any,
        retries: int = 0,
        backoff: float = Policy.FIRST,
        backoff_factor: float = Policy.FACTOR,
        backoff_max: float = Policy.LONGEST,
        retry_on: tuple[type[Exception], ...] = (Exception,),
        record_errors: tuple[type[Exception], ...] = (),
        **named: Any,
    ) -> Any:
        """Call ``function(*args, **named)`` and record its result (DURABLE), or return what an earlier run recorded.

        At least once for the effect, once for the record: a crash between the function's end and the record calls the
        function again in the next run. ``skialith.current_step().idempotency_key`` is the same then; pass it on.

        A run begins at ``resume()``; without one the first step makes this process the agent's owner. ``name``: any text of
        1 to 255 characters; the second call of it in a run is recorded as ``name#2``, and so on in the order of the calls,
        and a step called inside ``outer`` as ``outer/name``. Threads that share a name get it in the order they come,
        which another run may not repeat: give them names of their own. Calls that raised count too.

        Returned is what the record gives back, in every run: tuples are lists, objects with fields are dicts
        (docs/PAYLOADS.md). Up to ``retries`` times, after ``backoff`` seconds, ``backoff_factor`` times as long each time
        and ``backoff_max`` at most (half to all of that, by chance), errors of ``retry_on`` call the function again. What it
        raises in the end is raised here and not recorded; errors of ``record_errors`` are, and are raised as
        ``StepFailed`` in this run and later ones. A keyword of the function that is also one of these: use
        ``functools.partial`` or :meth:`step_fn`.

        Raises ``StepMismatch`` if the step is recorded for another function, ``InvalidPayload`` with the path if its result
        cannot be, ``StoreUnavailable`` as :meth:`resume`. If the record fails (errors as :meth:`save_event`), or one cannot
        be read, the run is over: further steps raise ``RunEnded`` until ``resume()``.
        """
        policy = ONCE
        if retries != 0 or record_errors != ():
            policy = Policy(retries, backoff, backoff_factor, backoff_max, retry_on, record_errors)
        return self._do_step("step", name, function, args, named, policy)

    def step_fn(
        self,
        name: str,
        *,
        retries: int = 0,
        backoff: float = Policy.FIRST,
        backoff_factor: float = Policy.FACTOR,
        backoff_max: float = Policy.LONGEST,
        retry_on: tuple[type[Exception], ...] = (Exception,),
        record_errors: tuple[type[Exception], ...] = (),
    ) -> Callable[[Callable[P, Any]], Callable[P, Any]]:
        """Decorator: every call of the function is a :meth:`step` of this name."""
        policy = Policy(retries, backoff, backoff_factor, backoff_max, retry_on, record_errors)

        def decorate(function: Callable[P, Any]) -> Callable[P, Any]:
            @functools.wraps(function)
            def call(*args: P.args, **named: P.kwargs) -> Any:
                return self._do_step(call.__name__, name, function, args, named, policy)

            return call

        return decorate

    def _do_step(
        self, verb: str, name: str, function: Callable[..., Any], args: Any, named: Any, policy: Policy
    ) -> Any:
        engine = self._engine(verb)
        call = self._steps.run(engine, self._own_for_steps).enter(name, function, policy, self._step)
        return blocking(engine, call, function, args, named)

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
        record, source, database_ok = engine.newest_checkpoint(self._agent_id, deadline)
        if record is None:
            return AgentState(self._agent_id, 0, {}, True, "none", database_ok)
        data = _payload(record)
        return AgentState(
            self._agent_id,
            record.step_index,
            data,
            False,
            "wal" if source == "wal" else "database",
            database_ok,
        )

    def history(self, after: Event | str | None = None, limit: int | None = None) -> Iterator[Event]:
        """The agent's events, oldest first, from database and log together, read lazily page by page.

        ``after``: continue behind this event (or its ``position.cursor()``). ``limit``: at most so many. Ends at what was
        durable when reading began. Raises ``StoreUnavailable`` or ``WalUnavailable`` while iterating.
        """
        engine = self._engine("history")
        position = _position(after)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            raise InvalidArgument(
                f"limit must be a whole number of 0 or more, not {limit!r}",
                argument="limit",
            )
        return self._events(engine, position, limit)

    def _events(self, engine: runtime.Runtime, position: Position, limit: int | None) -> Iterator[Event]:
        if limit == 0:
            return
        for number, entry in enumerate(engine.history(self._agent_id).entries(position), start=1):
            yield _as_event(entry)
            if number == limit:
                return

    # ---- life

    def flush(self, timeout: float | None = None) -> int:
        """Wait until all that this process appended is STORED; returns how many of it became dead letters.

        ``timeout``: seconds, default the agent's. Raises ``FlushTimeout``; what is not stored stays durable in the log.
        """
        engine = self._engine("flush")
        return engine.flush(self._config.timeout if timeout is None else timeout)

    def close(self) -> None:
        """Give the agent up; the last agent of a process flushes (bounded) and stops the runtime. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._runtime.pid != os.getpid() or self._runtime.closed:
            return
        if self._owner_pid == os.getpid():
            self._runtime.wal.release(self._agent_id)
        self._runtime.release()

    def __enter__(self) -> SkialithAgent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SkialithAgent({self._agent_id!r}, namespace={self._config.namespace!r})"

    # ---- inside

    def _engine(self, verb: str) -> runtime.Runtime:
        if _get_running_loop() is not None:
            self._refuse_event_loop(verb)
        if self._closed:
            raise Closed(f"{verb}: the agent {self._agent_id!r} is closed; nothing was sent. Open a new SkialithAgent")
        if self._runtime.pid != runtime.process_id():
            # A forked child: the parent's connections are not ours to touch.
            self._runtime = runtime.acquire(self._config)
            self._runtime.note_agent(self._agent_id)
        self._runtime.check_open()
        return self._runtime

    @staticmethod
    def _refuse_event_loop(verb: str) -> None:
        spelling = (
            "asyncio.to_thread(SkialithAgent, ...)"
            if verb == "SkialithAgent"
            else f"asyncio.to_thread(agent.{verb}, ...)"
        )
        raise BlockingCallInEventLoop(
            f"{verb} blocks, and this thread runs an asyncio loop: write `await {spelling}`; nothing was sent"
        )

    def _deadline(self) -> float:
        return time.monotonic() + self._config.timeout


def _batches(records: list[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        length = len(record.body or b"")
        if batch and (len(batch) >= APPEND_BATCH_RECORDS or size + length > APPEND_BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += length
    if batch:
        yield batch


def _batch_failed(agent_id: str, records: list[Record], ticket: Ticket, error: SkialithError) -> BatchFailed:
    acks = list(ticket.acks)
    failed = min(len(acks), len(records) - 1)
    return BatchFailed(
        f"agent {agent_id!r}: {len(acks)} of {len(records)} events are durable; event {records[failed].record_id!r} "
        f"(events[{failed}]) failed: {error}",
        outcome=error.outcome,
        retryable=error.retryable,
        failed=failed,
        acks=acks,
    )


def _event_type(data: Any) -> str:
    kind = data.get("kind") if isinstance(data, dict) else None
    return kind[:MAX_EVENT_TYPE_CHARACTERS] if isinstance(kind, str) and kind else "event"


def _as_event(entry: Entry) -> Event:
    record, stored, dead = entry
    return Event(
        agent_id=record.agent_id,
        event_id=record.record_id,
        step_index=record.step_index,
        event_type=record.event_type,
        data=_payload(record),
        created_at=datetime.fromtimestamp(record.created_us / 1_000_000, timezone.utc),
        position=record.position,
        stored=stored,
        dead=dead,
    )


def _payload(record: Record) -> Any:
    if record.body is None:
        raise BodyMissing(
            f"agent {record.agent_id!r}: the payload of {record.record_id or 'the checkpoint'!r} (sequence "
            f"{record.position.seq}) is lost: its head is a dead letter without a body, see `skialith dead-letters list`"
        )
    return payloads.decode(record.codec, record.body)


def _checked_step(argument: str, step: object) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= _MAX_STEP:
        raise InvalidArgument(
            f"{argument} must be a whole number from 0 to 2**63-1, not {step!r}",
            argument=argument,
        )
    return step


def _position(after: Event | str | None) -> Position:
    if after is None:
        return NOWHERE
    if isinstance(after, Event):
        return after.position
    try:
        time_ns, seq = str(after).split("-")
        return Position(int(time_ns), int(seq))
    except ValueError:
        raise InvalidArgument(
            f"after must be an Event or its position.cursor(), not {after!r}",
            argument="after",
        ) from None


def _now_us() -> int:
    return time.time_ns() // 1000
