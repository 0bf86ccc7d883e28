"""What a child is told to do, the verbs of an agent written down before and after, and an agent at work."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

from skialith import AgentFenced, AgentState, SkialithAgent, SkialithError
from skialith.records import Ack

from .evidence import ROUNDS, Notebook, digest, payload

LIFE_SECONDS = 180.0 * max(1.0, ROUNDS)
"""No child outlives this, whatever becomes of the test."""
WAIT_SECONDS = 10.0
"""A future that takes this much longer than its call may take is never done: the waiter is lost."""
BUG = 70
"""Exit code of a child that met an error that is not Skialith's own."""


@dataclass(frozen=True)
class Options:
    """What a child does. ``settings`` go to SkialithAgent as they stand.

    ``agents``: ids, each written by ``threads`` threads; ``steps``: 0 is until SIGTERM. ``batches`` and ``large``: chance of
    a step with a save_events of less than ``most``, and of an event of over 1 MiB; ``nowait``: of one with as many
    save_event_nowait, of which all are under way before the first is waited for. ``pace``: seconds between steps, at most.
    ``own_ids``: event ids are this child's alone; otherwise whoever resumes at a step saves that step's ids again.
    ``claim``: whether agents are owned before they write.
    ``retries``: whether events that failed and may be retried are, until they are durable. ``fenced``: what to do then,
    ``"stop"`` or ``"resume"``. ``ending``: ``"close"``,
    ``"sys.exit"``, ``"raise"`` or ``"os._exit"``. ``die``, ``freeze``: points of :mod:`faults` and at which passage to die or
    to stop there. ``break_``: one of :mod:`canaries`; ``limits``: see ``faults.limit``. ``meek``: permissions of files
    count, though it is root. ``flush``: also where another process writes. ``poison``: a place and a doing of :mod:`poisoned`.
    ``forks``, ``first``: see ``fork``. ``role``: see :mod:`enduring`.
    ``cancels``: chance that an awaited call is cancelled; ``loop``: what it is awaited on.
    """

    name: str
    folder: str
    settings: dict[str, Any]
    seed: int = 0
    agents: list[str] = field(default_factory=list)
    threads: int = 1
    steps: int = 0
    batches: float = 0.2
    most: int = 60
    nowait: float = 0.0
    large: float = 0.0
    pace: float = 0.0
    own_ids: bool = False
    claim: bool = True
    retries: bool = True
    fenced: str = "stop"
    ending: str = "close"
    die: dict[str, int] = field(default_factory=dict)
    freeze: dict[str, int] = field(default_factory=dict)
    break_: str = ""
    limits: dict[str, float] = field(default_factory=dict)
    meek: bool = False
    poison: list[str] = field(default_factory=list)
    forks: int = 0
    first: str = "child"
    role: str = "work"
    cancels: float = 0.0
    flush: bool = False
    loop: Literal["asyncio", "uvloop"] = "asyncio"

    def text(self) -> str:
        return json.dumps(asdict(self))


class Script:
    """The verbs of one agent, each written down before and after."""

    def __init__(self, agent: SkialithAgent, notebook: Notebook) -> None:
        self.agent = agent
        self.notebook = notebook

    def resume(self, *, exclusive: bool = True) -> AgentState:
        number = self._intend("resume" if exclusive else "peek")
        try:
            state = self.agent.resume(exclusive=exclusive)
        except SkialithError as error:
            self.notebook.failed(number, error)
            raise
        self.notebook.done(
            number,
            step=state.step_index,
            token=None if state.is_new else state.data.get("id"),
            digest=digest(state.data),
            source=state.source,
            database_ok=state.database_ok,
        )
        return state

    def glance(self, times: int) -> None:
        """Look at the state; errors are written down."""
        for _ in range(times):
            with contextlib.suppress(SkialithError):
                self.resume(exclusive=False)

    def save(self, identity: str, size: int = 0) -> SkialithError | None:
        value = payload(identity, size)
        return self._append("event", [(identity, value)], lambda: [self.agent.save_event(identity, value)])

    def save_all(self, identities: Sequence[str]) -> SkialithError | None:
        items = [(identity, payload(identity)) for identity in identities]
        return self._append("events", items, lambda: self.agent.save_events(items))

    def save_nowait(self, identities: Sequence[str]) -> SkialithError | None:
        """Hand all of them over, then wait for all; the first error. Each is written down for itself, when it is known."""
        agent: Any = self.agent
        under_way: list[Future[Ack]] = []
        for identity in identities:
            value = payload(identity)
            lane = threading.current_thread().name
            number = self.notebook.intend("event", agent.agent_id, agent.config.timeout, [(identity, value)], lane)
            try:
                future: Future[Ack] = agent.save_event_nowait(identity, value)
            except SkialithError as error:
                self.notebook.failed(number, error)
                future = Future()
                future.set_exception(error)
            else:
                future.add_done_callback(partial(self._note, number))
            under_way.append(future)
        errors = [future.exception(agent.config.timeout + WAIT_SECONDS) for future in under_way]
        first = next((error for error in errors if error is not None), None)
        assert first is None or isinstance(first, SkialithError), first
        return first

    def _note(self, number: int, future: Future[Ack]) -> None:
        error = future.exception()
        if isinstance(error, SkialithError):
            self.notebook.failed(number, error)
        elif error is None:
            self.notebook.done(number, [future.result()])

    def checkpoint(self, step: int, size: int = 0) -> SkialithError | None:
        token = f"{self.notebook.name}:{time.monotonic_ns()}"
        value = payload(token, size)
        return self._append("checkpoint", [(token, value)], lambda: [self.agent.checkpoint(step, value)])

    def flush(self) -> None:
        number = self._intend("flush")
        try:
            dead = self.agent.flush()
        except SkialithError as error:
            self.notebook.failed(number, error)
            return
        self.notebook.done(number, dead=dead)

    def history(self) -> None:
        number = self._intend("history")
        try:
            events = [[e.event_id, digest(e.data), e.dead] for e in self.agent.history()]
        except SkialithError as error:
            self.notebook.failed(number, error)
            return
        self.notebook.done(number, events=events)

    def _intend(self, verb: str, items: Sequence[tuple[str, Any]] = ()) -> int:
        return self.notebook.intend(verb, self.agent.agent_id, self.agent.config.timeout, items)

    def _append(
        self, verb: str, items: Sequence[tuple[str, Any]], call: Callable[[], Sequence[Ack]]
    ) -> SkialithError | None:
        number = self._intend(verb, items)
        try:
            acks = call()
        except SkialithError as error:
            self.notebook.failed(number, error)
            return error
        self.notebook.done(number, acks)
        return None


class Worker(Script):
    """One thread of an agent that works in steps: events, then (the agent's first thread) a checkpoint."""

    def __init__(
        self, agent: SkialithAgent, notebook: Notebook, options: Options, number: int, stopping: threading.Event
    ) -> None:
        super().__init__(agent, notebook)
        self.options = options
        self.number = number
        self.stopping = stopping
        self.step = 0
        self.dice = random.Random(f"{options.seed}/{agent.agent_id}/{number}")
        self.thread = threading.Thread(target=self._main, name=f"worker-{agent.agent_id}-{number}", daemon=True)

    def _main(self) -> None:
        with stop_on_bug(self.notebook):
            self.work()

    def work(self) -> None:
        """Step after step until there are enough, the test says stop, or the agent is taken over."""
        for _ in range(self.options.steps) if self.options.steps else itertools.count():
            self.step += 1
            if self.stopping.is_set() or not self.one_step(self.step):
                return
            if self.options.pace:
                self.stopping.wait(self.dice.uniform(0, self.options.pace))

    def one_step(self, step: int) -> bool:
        """One step; False when the agent is lost and not to be resumed."""
        name = f"{step}.{self.number}"
        if self.options.own_ids:
            name = f"{self.notebook.name}/{name}"
        for n in range(self.dice.randrange(1, 4)):
            if not self.until_durable(partial(self.save, f"{name}.{n}")):
                return False
        if self.dice.random() < self.options.batches:
            identities = [f"{name}.b{n}" for n in range(self.dice.randrange(2, self.options.most))]
            if not self.until_durable(lambda: self.save_all(identities)):
                return False
        if self.dice.random() < self.options.nowait:
            handed = [f"{name}.n{n}" for n in range(self.dice.randrange(2, self.options.most))]
            if not self.until_durable(lambda: self.save_nowait(handed)):
                return False
        size = 0
        if self.dice.random() < self.options.large:
            size = 1_100_000
            if not self.until_durable(lambda: self.save(f"{name}.large", 1_300_000)):
                return False
        return self.number > 0 or self.until_durable(lambda: self.checkpoint(step, size))

    def until_durable(self, call: Callable[[], SkialithError | None]) -> bool:
        """Call again after errors that allow it; False when the agent is lost and not to be resumed."""
        while True:
            error = call()
            if error is None:
                return True
            if isinstance(error, AgentFenced) or isinstance(error.__cause__, AgentFenced):
                if self.options.fenced == "stop":
                    return False
                self.stopping.wait(self.dice.uniform(0, 0.05))
                self.resume_until_answered()
            elif not error.retryable:
                raise error
            if self.stopping.is_set():
                return False
            if not self.options.retries:
                return True
            self.stopping.wait(self.dice.uniform(0, 0.1))

    def resume_until_answered(self) -> None:
        while not self.stopping.is_set():
            try:
                self.step = self.resume().step_index
                return
            except SkialithError as error:
                if not error.retryable and "--adopt-wal" not in str(error):  # which an operator is about to do
                    raise
                self.stopping.wait(0.1)


@contextlib.contextmanager
def stop_on_bug(notebook: Notebook) -> Iterator[None]:
    """Whatever a thread meets that it cannot go on with ends the process, loudly."""
    try:
        yield
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 - it ends the process, loudly
        notebook.line("note", what="bug", text=traceback.format_exc()[-2000:])
        traceback.print_exc()
        os._exit(BUG)
