"""The programs that chaos tests run and kill: ``python -m tests.chaos.children <program> <options as JSON>``."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from skialith import AgentFenced, AgentState, SkialithAgent, SkialithError
from skialith.records import Ack

from . import faults
from .evidence import ROUNDS, Notebook, digest, payload

LIFE_SECONDS = 180.0 * max(1.0, ROUNDS)
"""No child outlives this, whatever becomes of the test."""
BUG = 70
"""Exit code of a child that met an error that is not Skialith's own."""


@dataclass(frozen=True)
class Options:
    """What a child does. ``settings`` go to SkialithAgent as they stand.

    ``agents``: ids, each written by ``threads`` threads; ``steps``: 0 is until SIGTERM. ``batches`` and ``large``: chance of
    a step with a save_events of up to 60, and of an event of over 1 MiB. ``pace``: seconds between steps, at most.
    ``own_ids``: event ids are this child's alone; otherwise whoever resumes at a step saves that step's ids again.
    ``retries``: whether events that failed and may be retried are, until they are durable. ``fenced``: what to do then,
    ``"stop"`` or ``"resume"``. ``ending``: ``"close"``, ``"sys.exit"``, ``"raise"`` or ``"os._exit"``. ``die``, ``freeze``:
    points of :mod:`faults` and at which passage to die or to stop there. ``break_``: a canary of :mod:`faults`.
    ``forks``, ``first``: see ``fork``.
    """

    name: str
    folder: str
    settings: dict[str, Any]
    seed: int = 0
    agents: list[str] = field(default_factory=list)
    threads: int = 1
    steps: int = 0
    batches: float = 0.2
    large: float = 0.0
    pace: float = 0.0
    own_ids: bool = False
    retries: bool = True
    fenced: str = "stop"
    ending: str = "close"
    die: dict[str, int] = field(default_factory=dict)
    freeze: dict[str, int] = field(default_factory=dict)
    break_: str = ""
    forks: int = 0
    first: str = "child"

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

    def save(self, identity: str, size: int = 0) -> SkialithError | None:
        value = payload(identity, size)
        return self._append("event", [(identity, value)], lambda: [self.agent.save_event(identity, value)])

    def save_all(self, identities: Sequence[str]) -> SkialithError | None:
        items = [(identity, payload(identity)) for identity in identities]
        return self._append("events", items, lambda: self.agent.save_events(items))

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
            identities = [f"{name}.b{n}" for n in range(self.dice.randrange(2, 60))]
            if not self.until_durable(lambda: self.save_all(identities)):
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
                if not error.retryable:
                    raise
                self.stopping.wait(0.1)


# ---- the programs


def work(options: Options) -> None:
    """Agents at work, until they have done their steps or the test says stop."""
    notebook, stopping = Notebook(Path(options.folder), options.name), on_term()
    faults.install(options.die, options.freeze, options.break_)
    notebook.line("note", what="begun")
    with contextlib.ExitStack() as stack:
        workers = []
        for agent_id in options.agents:
            agent = open_agent(agent_id, options, stopping, notebook)
            if options.ending in ("close", "raise"):
                stack.enter_context(agent)
            first = Worker(agent, notebook, options, 0, stopping)
            first.resume_until_answered()
            more = [Worker(agent, notebook, options, n, stopping) for n in range(1, options.threads)]
            for worker in more:
                worker.step = first.step
            workers += [first, *more]
        notebook.line("note", what="ready")
        for worker in workers:
            worker.thread.start()
        join_all(workers, stopping)
        notebook.line("note", what="ending")
        if options.ending == "close" and options.settings.get("writer") != "off":
            workers[0].flush()
        end(options.ending)
    notebook.line("note", what="closed")


def join_all(workers: Sequence[Worker], stopping: threading.Event) -> None:
    """Until all have ended; with one eye on SIGTERM, whose handler must get the main thread."""
    deadline = time.monotonic() + LIFE_SECONDS
    while any(worker.thread.is_alive() for worker in workers):
        workers[0].thread.join(0.02) if workers[0].thread.is_alive() else time.sleep(0.02)
        if time.monotonic() > deadline:
            stopping.set()


def end(how: str) -> None:
    """Leave in the given way; return for the orderly one."""
    if how == "sys.exit":
        sys.exit(0)
    if how == "os._exit":
        os._exit(0)
    if how == "raise":
        raise RuntimeError("an error of the agent's own, inside its with block")


def write(options: Options) -> None:
    """A writer, until SIGTERM."""
    notebook, stopping = Notebook(Path(options.folder), options.name), on_term()
    faults.install(options.die, options.freeze, options.break_)
    with open_agent("~writer", options, stopping, notebook):
        notebook.line("note", what="ready")
        deadline = time.monotonic() + LIFE_SECONDS
        # In short waits: a signal that another thread was given is handled when this one wakes up.
        while not stopping.wait(0.1) and time.monotonic() < deadline:
            pass
    notebook.line("note", what="closed")


def read(options: Options) -> None:
    """What a newcomer sees: every agent's state, and its whole history."""
    notebook, stopping = Notebook(Path(options.folder), options.name), on_term()
    for agent_id in options.agents:
        with open_agent(agent_id, options, stopping, notebook) as agent:
            script = Script(agent, notebook)
            script.resume(exclusive=False)
            script.history()
            script.resume()
    notebook.line("note", what="closed")


def browse(options: Options) -> None:
    """Whoever looks while things happen: state and history of every agent, again and again, until SIGTERM."""
    notebook, stopping = Notebook(Path(options.folder), options.name), on_term()
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(open_agent(each, options, stopping, notebook)) for each in options.agents]
        notebook.line("note", what="ready")
        while not stopping.wait(options.pace):
            for agent in agents:
                script = Script(agent, notebook)
                with contextlib.suppress(SkialithError):  # written down
                    script.resume(exclusive=False)
                script.history()


def take_turns(options: Options) -> None:
    """At each SIGUSR1 own the agent, whoever has it now, and write."""
    notebook, stopping, turn = Notebook(Path(options.folder), options.name), on_term(), threading.Event()
    signal.signal(signal.SIGUSR1, lambda number, frame: turn.set())
    with open_agent(options.agents[0], options, stopping, notebook) as agent:
        script = Script(agent, notebook)
        notebook.line("note", what="ready")
        for number in itertools.count():
            while not turn.wait(0.01):
                if stopping.is_set():
                    return
            turn.clear()
            step = script.resume().step_index + 1
            for error in (script.save(f"{notebook.name}/{number}"), script.checkpoint(step)):
                if error is not None:
                    raise error
            notebook.line("note", what="turn")


def fork(options: Options) -> None:
    """An agent that is open before the fork; then parent and children write, and ``first`` of them exits first."""
    notebook, stopping = Notebook(Path(options.folder), options.name), on_term()
    agent = SkialithAgent("family", **options.settings)
    script = Script(agent, notebook)
    script.resume()
    script.save("parent.before")
    script.flush()
    children = []
    for number in range(options.forks):
        child = os.fork()
        if child == 0:
            _forked(options, agent, number)
            sys.exit(0)
        children.append(child)
    worker = Worker(agent, notebook, options, 0, stopping)
    if options.first == "parent":
        worker.work()
        agent.close()
        sys.exit(0)
    worker.work()
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    worker.work()
    script.flush()
    agent.close()
    notebook.line("note", what="closed", failed=len(failed))
    sys.exit(BUG if failed else 0)


def _forked(options: Options, inherited: SkialithAgent, number: int) -> None:
    notebook = Notebook(Path(options.folder), f"{options.name}-forked-{number}")
    with stop_on_bug(notebook):
        script = Script(inherited, notebook)
        for n in range(20):
            script.save(f"forked.{number}.{n}")
        own = Worker(SkialithAgent(f"child-{number}", **options.settings), notebook, options, 0, on_term())
        own.resume_until_answered()
        own.work()
        if options.first == "parent":
            parent, deadline = os.getppid(), time.monotonic() + LIFE_SECONDS
            while os.getppid() == parent and time.monotonic() < deadline:
                time.sleep(0.01)
            own.work()
        script.save(f"forked.{number}.last")
        own.flush()
        own.agent.close()
        inherited.close()
        notebook.line("note", what="closed")


# ---- what they share


def open_agent(agent_id: str, options: Options, stopping: threading.Event, notebook: Notebook) -> SkialithAgent:
    """The agent, as soon as the log can be reached."""
    while True:
        try:
            return SkialithAgent(agent_id, **options.settings)
        except SkialithError as error:
            notebook.line("note", what="not opened", error=type(error).__name__, text=str(error)[:300])
            if not error.retryable:
                raise
        if stopping.wait(0.1):
            sys.exit(0)


def on_term() -> threading.Event:
    """An event that SIGTERM sets."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    return stopping


@contextlib.contextmanager
def stop_on_bug(notebook: Notebook) -> Any:
    """Whatever a thread meets that it cannot go on with ends the process, loudly."""
    try:
        yield
    except Exception:  # noqa: BLE001 - it ends the process, loudly
        notebook.line("note", what="bug", text=traceback.format_exc()[-2000:])
        traceback.print_exc()
        os._exit(BUG)


PROGRAMS: dict[str, Callable[[Options], None]] = {
    "work": work,
    "write": write,
    "read": read,
    "browse": browse,
    "take_turns": take_turns,
    "fork": fork,
}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(name)s %(levelname)s %(message)s")
    PROGRAMS[sys.argv[1]](Options(**json.loads(sys.argv[2])))
