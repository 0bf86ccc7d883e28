"""The child whose main thread is interrupted inside its calls, by Ctrl-C and by a soft time limit, and goes on each time."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from skialith import SkialithAgent, SkialithError
from skialith.records import Ack

from .evidence import Notebook, payload
from .script import LIFE_SECONDS, Options, Script, Worker, stop_on_bug

LARGE_BYTES = 1_300_000
PLAIN_EVERY = 25
"""One call in so many is not interrupted: it must succeed."""


class SoftTimeLimit(Exception):
    """What a handler of SIGALRM raises, as Celery's does: an ``Exception``, so that an ``except`` too wide would catch it."""


class Alarms:
    """Raises in the main thread, at most as often as it is armed for: a signal between two calls does nothing."""

    def __init__(self, dice: random.Random) -> None:
        self.raised = 0
        self._left = 0
        self._dice = dice
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGALRM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._left:
            self._left -= 1
            self.raised += 1
            raise KeyboardInterrupt if number == signal.SIGINT else SoftTimeLimit

    def during(self, call: Callable[[], Sequence[Ack]]) -> Sequence[Ack] | SkialithError | None:
        """The call's result or its error, or None if it was interrupted, once or twice."""
        result: Sequence[Ack] | SkialithError | None = None
        outcome: Sequence[Ack] | SkialithError | None = None
        try:
            try:
                # About as long as a call takes, so that every moment of it is met.
                most = self._dice.choice([1e-5, 1e-4, 5e-4, 5e-3])
                signal.setitimer(signal.ITIMER_REAL, most * self._dice.random() + 1e-6)
                self._left = self._dice.choice([1, 1, 2])
                try:
                    result = call()
                except SkialithError as error:
                    result = error
                self._left = 0
                outcome = result
            except (KeyboardInterrupt, SoftTimeLimit):
                self._left = 0
            except BaseException:  # a bug, which shall be told undisturbed
                self._left = 0
                raise
        except (KeyboardInterrupt, SoftTimeLimit):
            self._left = 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        return outcome


class InterruptedScript(Script):
    """An agent's verbs, interrupted. What became of the record of a call that was is unknown."""

    def __init__(self, agent: SkialithAgent, notebook: Notebook, alarms: Alarms) -> None:
        super().__init__(agent, notebook)
        self._alarms = alarms

    def _append(
        self, verb: str, items: Sequence[tuple[str, Any]], call: Callable[[], Sequence[Ack]]
    ) -> SkialithError | None:
        number = self._intend(verb, items)
        outcome = self._alarms.during(call)
        if isinstance(outcome, SkialithError):
            self.notebook.failed(number, outcome)
            return outcome
        if outcome is None:
            self.notebook.interrupted(number)
        else:
            self.notebook.done(number, outcome)
        return None


def interrupt(options: Options, notebook: Notebook, stopping: threading.Event) -> None:
    """The main thread works for the first two agents (the first one owned), other threads for the rest, until SIGTERM."""
    dice = random.Random(options.seed)
    alarms = Alarms(dice)
    deadline = time.monotonic() + LIFE_SECONDS
    with contextlib.ExitStack() as stack, stop_on_bug(notebook):
        agents = [stack.enter_context(SkialithAgent(each, **options.settings)) for each in options.agents]
        plain = [Script(agent, notebook) for agent in agents[:2]]
        hasty = [InterruptedScript(agent, notebook, alarms) for agent in agents[:2]]
        plain[0].resume()
        others = [Worker(agent, notebook, options, 0, stopping) for agent in agents[2:]]
        for other in others:
            other.thread.start()
        notebook.line("note", what="ready")
        for number in itertools.count():
            if stopping.is_set() or time.monotonic() > deadline:
                break
            which = dice.randrange(2)
            error = (
                plain[which].save(f"plain-{number}")
                if number % PLAIN_EVERY == 0
                else one_call(hasty[which], number, dice)
            )
            if error is not None:
                raise error
        for other in others:
            other.thread.join(LIFE_SECONDS)
        if options.settings.get("writer") != "off":
            plain[0].flush()
        notebook.line("note", what="interrupted", count=alarms.raised)
    notebook.line("note", what="closed")


def one_call(script: InterruptedScript, number: int, dice: random.Random) -> SkialithError | None:
    """One record, many, a checkpoint, or a large record."""
    kind = dice.random()
    if kind < 0.85:
        return script.save(f"s{number}")
    if kind < 0.93:
        return script.save_all([f"m{number}.{n}" for n in range(dice.randrange(2, 300))])
    if kind < 0.98:
        return script.checkpoint(number)
    identity = f"l{number}"
    value = payload(identity, LARGE_BYTES)
    return script._append("event", [(identity, value)], lambda: [script.agent.save_event(identity, value)])
