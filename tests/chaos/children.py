"""The programs that chaos tests run and kill: ``python -m tests.chaos.children <program> <options as JSON>``."""

from __future__ import annotations

import _thread
import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from skialith import SkialithAgent, SkialithError

from . import awaited, enduring, faults, poisoned, signalled, stepping
from .evidence import Notebook
from .script import BUG, LIFE_SECONDS, Options, Script, Worker, stop_on_bug

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
            if options.claim:
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
        if options.flush or (options.ending == "close" and options.settings.get("writer") != "off"):
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
    if options.poison:
        poisoned.install(*options.poison)
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
    faults.install(options.die, options.freeze, options.break_)
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
    faults.install(options.die, options.freeze, options.break_)
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


def glance(options: Options) -> None:
    """At SIGUSR1 look at the state of all agents at once, ``steps`` times each or once; idle before."""
    notebook, stopping, now = Notebook(Path(options.folder), options.name), on_term(), threading.Event()
    faults.install(options.die, options.freeze, options.break_)
    signal.signal(signal.SIGUSR1, lambda number, frame: now.set())
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(open_agent(each, options, stopping, notebook)) for each in options.agents]
        scripts = [Script(agent, notebook) for agent in agents]
        times = (max(1, options.steps),)
        threads = [threading.Thread(target=script.glance, args=times, daemon=True) for script in scripts]
        notebook.line("note", what="ready")
        while not now.wait(0.01):
            if stopping.is_set():
                return
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIFE_SECONDS)
    notebook.line("note", what="closed")


def interrupt(options: Options) -> None:
    """Calls that are interrupted by signals, see :mod:`signalled`."""
    signalled.interrupt(options, Notebook(Path(options.folder), options.name), on_term())


def steps(options: Options) -> None:
    """A program of steps, see :mod:`stepping`."""
    notebook, stopping = Notebook(Path(options.folder), options.name), on_term()
    faults.install(options.die, options.freeze, options.break_)
    with open_agent(options.agents[0], options, stopping, notebook) as agent:
        stepping.run(options, notebook, agent)


def await_(options: Options) -> None:
    """Agents whose verbs are awaited, see :mod:`awaited`."""
    faults.install(options.die, options.freeze, options.break_)
    awaited.work(options, Notebook(Path(options.folder), options.name), on_term())


def endure(options: Options) -> None:
    """One that lives through many epochs, see :mod:`enduring`."""
    faults.install(options.die, options.freeze, options.break_)
    enduring.endure(options, Notebook(Path(options.folder), options.name), on_term(), open_agent)


def fork(options: Options) -> None:
    """An agent that is open before the fork; then parent and children write, and ``first`` of them exits first."""
    notebook, stopping = Notebook(Path(options.folder), options.name), on_term()
    agent = SkialithAgent("family", **options.settings)
    script = Script(agent, notebook)
    script.resume()
    script.save("parent.before")
    script.flush()
    parent, children = os.getpid(), []
    for number in range(options.forks):
        child = os.fork()
        if child == 0:
            _forked(options, agent, number, parent)
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


def _forked(options: Options, inherited: SkialithAgent, number: int, parent: int) -> None:
    notebook = Notebook(Path(options.folder), f"{options.name}-forked-{number}")
    with stop_on_bug(notebook):
        script = Script(inherited, notebook)
        for n in range(20):
            script.save(f"forked.{number}.{n}")
        own = Worker(SkialithAgent(f"child-{number}", **options.settings), notebook, options, 0, on_term())
        own.resume_until_answered()
        own.work()
        if options.first == "parent":
            deadline = time.monotonic() + LIFE_SECONDS
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
        # The main thread may be interrupted while it holds the event's own lock, which it cannot take twice.
        _thread.start_new_thread(stopping.set, ())

    signal.signal(signal.SIGTERM, stop)
    return stopping


PROGRAMS: dict[str, Callable[[Options], None]] = {
    "work": work,
    "write": write,
    "read": read,
    "browse": browse,
    "glance": glance,
    "take_turns": take_turns,
    "fork": fork,
    "steps": steps,
    "interrupt": interrupt,
    "await": await_,
    "endure": endure,
}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(name)s %(levelname)s %(message)s")
    told = Options(**json.loads(sys.argv[2]))
    faults.limit(told.limits)
    if told.meek:
        faults.drop_capabilities()
    PROGRAMS[sys.argv[1]](told)
