"""What the blocking and the awaited agent have in common: records from arguments, and states, events and errors from records."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any, ParamSpec

from . import _fastpath, payloads
from .config import APPEND_BATCH_BYTES, APPEND_BATCH_RECORDS, MAX_EVENT_TYPE_CHARACTERS, Config, check_id
from .errors import BatchFailed, BodyMissing, InvalidArgument, SkialithError
from .history import Entry, Found
from .records import NOWHERE, Ack, AgentState, Codec, Event, Kind, Position, Record, unique_key
from .step_policy import ONCE, Policy
from .steps import Steps

P = ParamSpec("P")

_MAX_STEP = 2**63 - 1


class BaseAgent:
    """Who an agent is, and the step it is at."""

    _packing = staticmethod(payloads.pack)

    def __init__(self, agent_id: str, config: Config) -> None:
        self._agent_id = check_id("agent_id", agent_id)
        self._config = config
        self._step = 0
        self._made_us = 0
        self._closed = False
        self._steps = Steps(config.namespace, agent_id, functools.partial(self._packing, limit=config.max_record_bytes))

    @property
    def agent_id(self) -> str:
        return self._agent_id

    @property
    def config(self) -> Config:
        """The settings in force."""
        return self._config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._agent_id!r}, namespace={self._config.namespace!r})"

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

        The awaited agent's ``step`` is awaited, and so is what the function returns if that can be awaited; a plain function
        runs on the loop. If a call is cancelled after its function has ended, the result is recorded all the same.

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
        """One call of a step, waited for in the agent's own way."""
        raise NotImplementedError

    def _pack(self, data: Any, argument: str) -> tuple[Codec, bytes]:
        return self._packing(data, argument, self._config.max_record_bytes)

    def _event(self, event_id: str, data: Any, step: int | None, where: str = "") -> Record:
        event_id = check_id(f"{where}event_id" if where else "event_id", event_id)
        packed = self._pack(data, f"{where}data" if where else "data")
        step = self._step if step is None else checked_step("step", step)
        return event_record(self._config.namespace, self._agent_id, event_id, step, data, packed)

    def _checkpoint(self, step: int, data: Any) -> Record:
        step = checked_step("step", step)
        record = checkpoint_record(self._config.namespace, self._agent_id, step, self._pack(data, "data"))
        # Behind the one that this owner knows, whatever became of the clock: see records.supersedes.
        record = record._replace(created_us=max(record.created_us, self._made_us + 1))
        self._made_us = record.created_us
        return record

    def _state(self, found: Found) -> AgentState:
        record, source, database_ok = found
        if record is None:
            return AgentState(self._agent_id, 0, {}, True, "none", database_ok)
        self._made_us = max(self._made_us, record.created_us)
        return AgentState(self._agent_id, record.step_index, _payload(record), False, source, database_ok)

    def _deadline(self) -> float:
        return time.monotonic() + self._config.timeout


def event_record(
    namespace: str, agent_id: str, event_id: str, step: int, data: Any, packed: tuple[Codec, bytes]
) -> Record:
    """An event that is checked and packed."""
    key = _fastpath.event_key(namespace, agent_id, event_id)
    kind, now = _event_type(data), _now_us()
    codec, body = packed
    return Record(Kind.EVENT, namespace, agent_id, event_id, key, step, kind, now, codec, body, NOWHERE, None)


def checkpoint_record(namespace: str, agent_id: str, step: int, packed: tuple[Codec, bytes]) -> Record:
    """A checkpoint that is checked and packed; a new one at every call."""
    return Record(Kind.CHECKPOINT, namespace, agent_id, "", unique_key(), step, "", _now_us(), *packed)


def batches(records: list[Record]) -> Iterator[list[Record]]:
    """The records of one call, as they are handed over together."""
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


def batch_failed(agent_id: str, records: list[Record], acks: list[Ack], error: SkialithError) -> BatchFailed:
    """The error of a call with several records, of which the first ``acks`` are durable."""
    failed = min(len(acks), len(records) - 1)
    return BatchFailed(
        f"agent {agent_id!r}: {len(acks)} of {len(records)} events are durable; event {records[failed].record_id!r} "
        f"(events[{failed}]) failed: {error}",
        outcome=error.outcome,
        retryable=error.retryable,
        failed=failed,
        acks=list(acks),
    )


def as_event(entry: Entry) -> Event:
    """An event of the history. Raises ``BodyMissing``."""
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


def checked_step(argument: str, step: object) -> int:
    """``step`` if it is one."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= _MAX_STEP:
        raise InvalidArgument(
            f"{argument} must be a whole number from 0 to 2**63-1, not {step!r}",
            argument=argument,
        )
    return step


def checked_limit(limit: int | None) -> int | None:
    """``limit`` if it is one."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise InvalidArgument(
            f"limit must be a whole number of 0 or more, not {limit!r}",
            argument="limit",
        )
    return limit


def position_after(after: Event | str | None) -> Position:
    """Where the history is to go on behind."""
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


def _event_type(data: Any) -> str:
    kind = data.get("kind") if isinstance(data, dict) else None
    return kind[:MAX_EVENT_TYPE_CHARACTERS] if isinstance(kind, str) and kind else "event"


def _payload(record: Record) -> Any:
    if record.body is None:
        raise BodyMissing(
            f"agent {record.agent_id!r}: the payload of {record.record_id or 'the checkpoint'!r} (sequence "
            f"{record.position.seq}) is lost: its head is a dead letter without a body, see `skialith dead-letters list`"
        )
    return payloads.decode(record.codec, record.body)


def _now_us() -> int:
    return time.time_ns() // 1000
