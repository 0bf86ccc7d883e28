"""Steps: calls of functions whose results are recorded, so that a later run gets the result instead of calling again.

What a step is called, where its result is found and how it is retried and recorded is decided here, without waiting for
anything. Whoever waits (for the function, the PubAck, the next attempt) is a thin driver: :func:`blocking` for threads.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import CoroutineType, TracebackType
from typing import Any, TypeVar

from . import payloads
from .config import ERROR_TEXT_CHARACTERS, check_id
from .errors import InvalidArgument, InvalidPayload, Outcome, RunEnded, SkialithError, StepFailed, StepMismatch
from .history import FoundStep
from .records import NOWHERE, STEP, Codec, Kind, Record, step_hash, step_key
from .runtime import Runtime
from .step_names import escaped, function_name, step_id
from .step_policy import Policy

_PLAIN = (type(None), bool, int, float, str)
"""Types of results that come back from their record as they are."""

E = TypeVar("E", bound=SkialithError)
Pack = Callable[[Any, str], tuple[Codec, bytes]]

_current: ContextVar[StepContext | None] = ContextVar("skialith_step", default=None)


def current_step() -> StepContext | None:
    """The step whose function is running here; None outside of steps.

    It follows the context: into what the function awaits, into tasks and ``asyncio.to_thread``; not into a
    ``threading.Thread`` or an executor, unless given ``contextvars.copy_context().run``.
    """
    return _current.get()


class StepContext:
    """One attempt of one step, as its function may look at it with :func:`current_step`.

    ``agent_id``. ``name``: as the caller gave it. ``id``: the name with its place, as it stands in the history. ``attempt``:
    from 1 on.
    """

    __slots__ = ("_done", "_inner", "_key", "agent_id", "attempt", "id", "name")

    def __init__(
        self, agent_id: str, name: str, step_id: str, key: bytes, attempt: int, done: dict[bytes, FoundStep] | None
    ) -> None:
        self.agent_id = agent_id
        self.name = name
        self.id = step_id
        self.attempt = attempt
        self._key = key
        self._done = done  # inner steps that were recorded, for a next attempt; None if there will be none
        self._inner: dict[object, int] = {}  # how often each inner step was called in this attempt

    @property
    def idempotency_key(self) -> str:
        """32 hex digits that belong to this step for ever: the same in every attempt, run and process.

        Pass it on to whoever does the work, so that an attempt that is made again does it once.
        """
        return self._key.hex()

    def __repr__(self) -> str:
        return f"<step {self.id!r} of agent {self.agent_id!r}, attempt {self.attempt}>"


# ---- a run and its calls


class Run:
    """One run of an agent's program: what was recorded before it, and how often each step was called in it.

    ``kept``: records of steps whose function has run and whose append failed, in earlier runs of this process too.
    """

    def __init__(
        self,
        namespace: str,
        agent_id: str,
        pack: Pack,
        recorded: dict[bytes, FoundStep],
        kept: dict[bytes, Record],
    ) -> None:
        self.namespace = namespace
        self.agent_id = agent_id
        self.pack = pack
        self.recorded = recorded
        self.kept = kept
        self.over: BaseException | None = None
        self._hash = step_hash(namespace, agent_id)
        self._counts: dict[object, int] = {}
        self._lock = threading.Lock()

    def enter(self, name: str, function: object, policy: Policy, step_index: int) -> Call:
        """The next call of the step ``name``. From here on it has its place, whenever its function gets to run."""
        known = escaped(name) if isinstance(name, str) else check_id("name", name)
        if not callable(function):
            raise InvalidArgument(
                f"step {name!r}: the function must be callable, not {type(function).__name__}: pass the function and its "
                "arguments, not its result",
                argument="function",
            )
        if self.over is not None:
            raise RunEnded(
                f"agent {self.agent_id!r}: step {name!r} was not called, because the run ended when an earlier step failed to "
                f"be recorded or read ({self.over}): call resume() and begin the program again; what is recorded is not "
                "called again"
            ) from self.over
        outer = _current.get()
        scope, counts = "", self._counts
        counted: object = known
        if outer is not None:
            # A step of another agent counts within the step that calls it too: when that is replayed, it is not called.
            foreign = outer.agent_id != self.agent_id
            scope = f"{escaped(outer.agent_id)}//{outer.id}" if foreign else outer.id
            counts, counted = outer._inner, (self.namespace, self.agent_id, known)
        with self._lock:
            n = counts[counted] = counts.get(counted, 0) + 1
        place = step_id(scope, known, n)
        return Call(self, outer, function, policy, name, n, place, step_key(self._hash, place), step_index)


class Call:
    """One call of a step, from its place in the run to its value. A context manager around each attempt.

    ``found``: the record of an earlier run. ``kept``: the record that an earlier run of this process could not append.
    """

    def __init__(
        self,
        run: Run,
        outer: StepContext | None,
        function: object,
        policy: Policy,
        name: str,
        n: int,
        place: str,
        key: bytes,
        step_index: int,
    ) -> None:
        self.agent_id = run.agent_id
        self.id = place
        self.key = key
        self._run = run
        self._outer = outer
        self._function = function
        self._policy = policy
        self._name = name
        self._n = n
        self._step_index = step_index
        self._failures = 0
        self._error: Exception | None = None
        self._result: Any = self  # stands for: the record has to tell
        self._token: Token[StepContext | None] | None = None
        done = None if outer is None else outer._done
        self._done: dict[bytes, FoundStep] | None = {} if done is None and policy.retries else done
        self.found = run.recorded.get(key) or (None if done is None else done.get(key))
        self.kept = run.kept.get(key)

    def __enter__(self) -> None:
        attempt = self._failures + 1
        context = StepContext(self._run.agent_id, self._name, self.id, self.key, attempt, self._done)
        self._token = _current.set(context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._token is not None:
            _current.reset(self._token)

    # ---- what an attempt came to

    def succeeded(self, result: object) -> Record:
        """The record of a result. Raises ``InvalidPayload`` or ``RecordTooLarge``; nothing was sent."""
        if type(result) in _PLAIN:
            self._result = result
        return self._record("result", result)

    def failed(self, error: Exception) -> Record | float | None:
        """What follows an attempt that raised: its record, or a pause in seconds and the next attempt, or neither."""
        self._failures += 1
        policy = self._policy
        if self._run.over is None and policy.tries_again(error, self._failures):
            return policy.pause(self._failures, random.random())
        if not policy.records(error):
            return None
        self._error = error
        kind = type(error)
        return self._record("error", {"type": f"{kind.__module__}.{kind.__qualname__}", "message": _text(error)})

    def _record(self, field: str, value: object) -> Record:
        run = self._run
        data = payload(self._name, self._n, function_name(self._function), field, value)
        try:
            packed = run.pack(data, "")
        except InvalidArgument as error:
            detail = str(error).lstrip(".") if isinstance(error, InvalidPayload) else f"{field}{error}"
            fate = "the function has run; its result was not sent and is not recorded, so a later run calls it again"
            refused = _said(error, f"step {self.id!r} of agent {run.agent_id!r}: {detail}; {fate}", "not_written")
            refused.argument = field
            if isinstance(refused, InvalidPayload):
                refused.path = refused.path.lstrip(".")
            raise refused from error
        return step_record(run.namespace, run.agent_id, self.id, self.key, self._step_index, packed)

    # ---- the end

    def recorded(self, record: Record, there: FoundStep | None) -> Any:
        """The step's value once ``record`` has its PubAck. ``there``: the record that was there before it, if one was."""
        mine = FoundStep(NOWHERE, record.codec, record.body)
        if there is None or there[1:] == mine[1:]:
            if self._error is not None:
                self._settle(mine)
                kind = type(self._error)
                raise self._step_failed(f"{kind.__module__}.{kind.__qualname__}", _text(self._error)) from self._error
            if self._result is not self:
                self._settle(mine)
                return self._result
        return self.replay(there or mine)

    def replay(self, found: FoundStep) -> Any:
        """The value of a recorded step. Raises ``StepMismatch`` or ``StepFailed``."""
        assert found.body is not None
        recorded = payloads.decode(found.codec, found.body)
        given = function_name(self._function)
        if recorded["function"] != given:
            raise StepMismatch(
                f"step {self.id!r} of agent {self._run.agent_id!r} is recorded for {recorded['function']}, and this run calls "
                f"it with {given}; that was not called. Did the order of the steps change, or is it one name for two steps? "
                "Then give them names of their own. If the function was renamed or moved, go on under its old name",
                argument="function",
                step=self.id,
                recorded=recorded["function"],
                given=given,
            )
        self._settle(found)
        if "error" in recorded:
            raise self._step_failed(recorded["error"]["type"], recorded["error"]["message"])
        return recorded["result"]

    def _settle(self, found: FoundStep) -> None:
        """It is recorded and this run has its value: forget it, unless an outer step may be tried again."""
        self._run.recorded.pop(self.key, None)
        self._run.kept.pop(self.key, None)
        if self._outer is not None and self._outer._done is not None:
            self._outer._done[self.key] = found

    def _step_failed(self, error_type: str, message: str) -> StepFailed:
        text = f"step {self.id!r} of agent {self._run.agent_id!r} failed, and that is recorded: {error_type}: {message}"
        return StepFailed(text, step=self.id, error_type=error_type, error_message=message)

    def not_recorded(self, record: Record, error: BaseException) -> BaseException:
        """The error to raise after a function that has run and an append that failed. The run ends with it."""
        if isinstance(error, InvalidArgument):
            fate = "the function has run; its result is not recorded, so a later run calls it again"
            return _said(error, f"step {self.id!r} of agent {self._run.agent_id!r}: {error}; {fate}", error.outcome)
        self._run.over = error
        self._run.kept[self.key] = record
        if not isinstance(error, SkialithError):
            return error
        doubt = "is not recorded" if error.outcome == "not_written" else "may or may not be recorded"
        return _said(
            error,
            f"step {self.id!r} of agent {self._run.agent_id!r}: the function has run, but its result {doubt}: {error}. The run "
            "ends here: call resume() and begin the program again; this process then records the result it has, another "
            "one calls the function again if it is not recorded",
            error.outcome,
        )

    def unread(self, error: BaseException) -> BaseException:
        """The error to raise when the step's record is there and cannot be read. The run ends with it."""
        self._run.over = error
        if not isinstance(error, SkialithError):
            return error
        text = f"step {self.id!r} of agent {self._run.agent_id!r} is recorded, but its result cannot be read: {error}"
        return _said(error, text, "durable")


def payload(name: str, n: int, function: str, outcome: str, value: object) -> dict[str, object]:
    """What is recorded of the ``n``-th call of a step. ``outcome``: ``"result"`` or ``"error"``, which says what ``value`` is."""
    return {"kind": STEP, "name": name, "n": n, "function": function, outcome: value}


def step_record(
    namespace: str, agent_id: str, step_id: str, key: bytes, step_index: int, packed: tuple[Codec, bytes]
) -> Record:
    """A step that is checked and packed."""
    now = time.time_ns() // 1000
    return Record(Kind.EVENT, namespace, agent_id, step_id, key, step_index, STEP, now, *packed)


def _said(error: E, text: str, outcome: Outcome) -> E:
    """``error`` with another text; an error may be shared, so it is a copy."""
    again = copy.copy(error)
    again.args = (text,)
    again.outcome = outcome
    return again


def _text(error: Exception) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - a foreign __str__ must not replace the error that is being recorded
        text = f"<{type(error).__name__}>"
    return text[:ERROR_TEXT_CHARACTERS].encode("utf-8", "backslashreplace").decode()


# ---- the steps of one agent, and who waits for them


class Steps:
    """The steps of one agent in this process: its run, which begins with the first step behind each ``resume()``.

    ``pack`` makes the codec and the body of a record from a payload and the name that errors give it.
    """

    def __init__(self, namespace: str, agent_id: str, pack: Pack) -> None:
        self._namespace = namespace
        self._agent_id = agent_id
        self._pack = pack
        self._locks: dict[int, threading.Lock] = {}
        self._pid = 0
        self._run: Run | None = None
        self._kept: dict[bytes, Record] = {}

    def begin_anew(self) -> None:
        """The next step begins a run."""
        self._run = None

    def begun(self, engine: Runtime) -> Run | None:
        """The run, if there is one."""
        return self._run if self._pid == engine.pid else None

    def run(self, engine: Runtime, own: Callable[[], None]) -> Run:
        """The run; a new one reads what is recorded, behind ``own``, which makes this process the agent's owner.

        Raises what ``own`` raises, ``WalUnavailable`` or ``StoreUnavailable``; then there is no run yet.
        """
        run = self.begun(engine)
        if run is not None:
            return run
        # A lock for each process: in a forked child that of the parent may be held for ever.
        with self._locks.setdefault(engine.pid, threading.Lock()):
            if self._pid != engine.pid:
                self._pid, self._run, self._kept = engine.pid, None, {}
            run = self._run
            if run is None:
                own()
                recorded = engine.steps(self._agent_id).load()
                run = self._run = Run(self._namespace, self._agent_id, self._pack, recorded, self._kept)
            return run


def blocking(
    check: Callable[[], Runtime], call: Call, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """Do what is left to do of a call, on this thread, and return the step's value.

    ``check`` gives the engine, or raises if the agent is not to be used any more.
    """
    if call.found is not None:
        return call.replay(whole(check(), call, call.found))
    record = call.kept or _attempts(check, call, function, args, named)
    try:
        engine = check()
        ack = engine.wal.log.append_one(record, time.monotonic() + engine.config.timeout)
    except BaseException as error:
        said = call.not_recorded(record, error)
        if said is error:
            raise
        raise said from error
    return call.recorded(record, whole(engine, call, None) if ack.duplicate else None)


def _attempts(
    check: Callable[[], object], call: Call, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> Record:
    while True:
        check()
        try:
            with call:
                result = function(*args, **named)
        except Exception as error:
            outcome = call.failed(error)
            if outcome is None:
                raise
        else:
            if type(result) is CoroutineType:
                result.close()
                raise InvalidArgument(
                    f"step {call.id!r}: {function_name(function)} is a coroutine function, which only the awaited agent can "
                    "await: `async with SkialithAgent(...)` and `await agent.step(...)`; nothing of it has run",
                    argument="function",
                )
            return call.succeeded(result)
        if isinstance(outcome, Record):
            return outcome
        time.sleep(outcome)


def whole(engine: Runtime, call: Call, found: FoundStep | None) -> FoundStep:
    """The recorded step with its body; ``found`` None: wherever it stands, because the append met one that was there.

    That need not be an earlier try of the same append: two objects of one agent may be at the same step.
    """
    if found is not None and found.body is not None:
        return found
    past = engine.steps(call.agent_id)
    try:
        return past.find(call.key, call.id) if found is None else past.read(call.key, call.id, found.position)
    except BaseException as error:
        said = call.unread(error)
        if said is error:
            raise
        raise said from error
