"""A state machine: an agent in a real process saves, checkpoints, is killed and resumes; a plain model says what must be."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.fixtures.wal import new_namespace

_CHILD = """
import json, sys
from skialith import SkialithAgent
agent = SkialithAgent("machine", **json.loads(sys.argv[1]))
for line in sys.stdin:
    verb, args = json.loads(line)
    if verb == "resume":
        state = agent.resume()
        answer = [state.step_index, state.data, state.is_new]
    elif verb == "history":
        answer = [[event.event_id, event.data] for event in agent.history()]
    elif verb == "save_events":
        answer = len(agent.save_events([tuple(pair) for pair in args[0]]))
    elif verb == "flush":
        answer = agent.flush(timeout=20)
    else:
        answer = getattr(agent, verb)(*args).seq
    print(json.dumps(answer), flush=True)
"""


class Child:
    """The agent's process, told what to do line by line."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, verb: str, *args: Any) -> None:
        """Ask, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, args]) + "\n")
        self._process.stdin.flush()

    def ask(self, verb: str, *args: Any) -> Any:
        self.tell(verb, *args)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the agent's process ended during {verb}"
        return json.loads(line)

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was told last never reached it
                    pipe.close()


PAYLOADS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


class AgentMachine(RuleBasedStateMachine):
    """``events`` and ``state`` are what was acknowledged; ``maybe`` is what a killed call may have left behind."""

    def __init__(self, base: dict[str, Any]) -> None:
        super().__init__()
        self.settings = {**base, "namespace": new_namespace()}

    @initialize()
    def begin(self) -> None:
        self.child = Child(self.settings)
        self.events: dict[str, Any] = {}
        self.states: list[tuple[int, Any]] = [(0, {})]
        self.maybe_events: dict[str, Any] = {}
        self.number = 0
        assert self.child.ask("resume") == [0, {}, True]

    def _new_id(self) -> str:
        self.number += 1
        return f"e{self.number}"

    @rule(data=PAYLOADS)
    def save(self, data: Any) -> None:
        event_id = self._new_id()
        self.child.ask("save_event", event_id, data)
        self.events[event_id] = data

    @rule(data=st.lists(PAYLOADS, min_size=1, max_size=20))
    def save_many(self, data: list[Any]) -> None:
        pairs = [(self._new_id(), each) for each in data]
        assert self.child.ask("save_events", pairs) == len(pairs)
        self.events.update(pairs)

    @precondition(lambda self: bool(self.events))
    @rule(pick=st.integers(0, 10**6), data=PAYLOADS)
    def save_again(self, pick: int, data: Any) -> None:
        self.child.ask("save_event", list(self.events)[pick % len(self.events)], data)

    @rule(step=st.integers(0, 2**63 - 1), data=PAYLOADS)
    def checkpoint(self, step: int, data: Any) -> None:
        self.child.ask("checkpoint", step, data)
        self.states = [(step, data)]

    @rule()
    def flush(self) -> None:
        assert self.child.ask("flush") == 0

    @rule(data=PAYLOADS, step=st.integers(0, 100))
    def crash_in_a_call(self, data: Any, step: int) -> None:
        event_id = self._new_id()
        self.child.tell("save_event", event_id, data)
        self.child.tell("checkpoint", step, data)
        self.maybe_events[event_id] = data
        self.states.append((step, data))
        self._restart()

    @rule()
    def crash(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.child.kill()
        self.child = Child(self.settings)
        step, data, _ = self.child.ask("resume")
        assert (step, data) in self.states
        self.states = [(step, data)]
        found = dict(self.child.ask("history"))
        for event_id in [event_id for event_id in self.maybe_events if event_id in found]:
            self.events[event_id] = self.maybe_events[event_id]
        self.maybe_events = {}

    @invariant()
    def history_is_what_was_acknowledged(self) -> None:
        if hasattr(self, "child"):
            assert self.child.ask("history") == [[event_id, data] for event_id, data in self.events.items()]

    def teardown(self) -> None:
        if hasattr(self, "child"):
            self.child.kill()


def test_no_crash_loses_doubles_or_reorders(nats_url: str, tmp_path: Path) -> None:
    base = {"nats_url": nats_url, "database_url": f"sqlite:///{tmp_path / 'machine.db'}", "wal_bytes": 32 * 1024 * 1024}

    class Machine(AgentMachine):
        def __init__(self) -> None:
            super().__init__(base)

    run_state_machine_as_test(
        Machine,
        settings=hypothesis_settings(
            max_examples=6,
            stateful_step_count=15,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
