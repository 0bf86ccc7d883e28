"""The agent of ``skialith demo``: eight steps, each with a slow LLM call; run as a process of its own that gets killed.

It reads its orders as JSON from stdin and tells what it does as JSON lines on stdout. ``work`` is the pattern to copy.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .agent import SkialithAgent
from .errors import SkialithError

PLAN = (
    "read the question",
    "list what is known",
    "search the papers",
    "read the best three",
    "compare their numbers",
    "find the contradiction",
    "draft the answer",
    "check it once more",
)
"""What the agent does, one item per step; steps count from 1."""

MID_CALL = "in the middle of its LLM call"
UNCHECKPOINTED = "after save_event, before checkpoint"

_CALL_SECONDS = 0.15
_HOLD_SECONDS = 30.0
_FLUSH_SECONDS = 20.0


class Orders(NamedTuple):
    """What the parent wants: ``hold`` is the step and the place to stand still at, waiting to be killed.

    ``samples`` events are saved at the end by the agent ``sampler_id``, to measure what one costs.
    """

    settings: dict[str, Any]
    agent_id: str
    sampler_id: str
    calls_file: str
    hold: tuple[int, str] | None
    samples: int


def answer_of(step: int) -> str:
    """What the LLM says at a step."""
    return f"{PLAN[step - 1]}: done"


def work(agent: SkialithAgent, llm: Callable[[int], str], tell: Callable[..., None]) -> None:
    """Do what is left to do. A step whose answer was saved is never paid for again, checkpoint or not."""
    state = agent.resume()
    saved = {event.event_id: event.data for event in agent.history()}
    tell("resumed", step=state.step_index, is_new=state.is_new, saved=sorted(saved))
    notes = list(state.data.get("notes", []))
    for step in range(state.step_index + 1, len(PLAN) + 1):
        event_id = f"step-{step}"
        if event_id in saved:
            answer = saved[event_id]["text"]
            tell("found", step=step)
        else:
            answer = llm(step)
            agent.save_event(event_id, {"kind": "thought", "text": answer}, step=step)
            tell("saved", step=step, event_id=event_id)
        notes.append(answer)
        agent.checkpoint(step=step, data={"notes": notes})
        tell("checkpoint", step=step)


class _Stage:
    """The slow LLM, the messages to the parent, and the place to stand still at."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    def llm(self, step: int) -> str:
        """One paid call: a line in the calls file, on disk before the answer comes."""
        with open(self._orders.calls_file, "a", encoding="ascii") as file:
            file.write(f"{step}\n")
            file.flush()
            os.fsync(file.fileno())
        self.tell("call", step=step)
        time.sleep(_CALL_SECONDS / 2)
        self._hold(step, MID_CALL)
        time.sleep(_CALL_SECONDS / 2)
        return answer_of(step)

    def tell(self, what: str, **facts: Any) -> None:
        """One line to the parent; standing still if this is the place."""
        sys.stdout.write(json.dumps({"what": what, **facts}) + "\n")
        sys.stdout.flush()
        if what == "saved":
            self._hold(facts["step"], UNCHECKPOINTED)

    def _hold(self, step: int, where: str) -> None:
        if self._orders.hold is not None and tuple(self._orders.hold) == (step, where):
            self.tell("holding", step=step, where=where)
            time.sleep(_HOLD_SECONDS)
            raise SystemExit("nobody killed this process")


def _measure(agent: SkialithAgent, samples: int) -> list[int]:
    """Nanoseconds of each of ``samples`` save_event calls."""
    taken = []
    for number in range(samples):
        began = time.perf_counter_ns()
        agent.save_event(f"sample-{number}", {"kind": "observation", "number": number})
        taken.append(time.perf_counter_ns() - began)
    return taken


def main() -> None:
    """Run one life of the agent."""
    orders = Orders(**json.loads(sys.stdin.readline()))
    stage = _Stage(orders)
    try:
        with SkialithAgent(orders.agent_id, **orders.settings) as agent:
            work(agent, stage.llm, stage.tell)
            if orders.samples:
                with SkialithAgent(orders.sampler_id, **orders.settings) as sampler:
                    stage.tell("measured", nanoseconds=_measure(sampler, orders.samples))
            stage.tell("flush")
            agent.flush(_FLUSH_SECONDS)
            stage.tell("done")
    except SkialithError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
