"""A LangGraph agent that goes on where it was killed: python langgraph_agent.py [thread id]

Needs `pip install 'skialith[local,langgraph]' langgraph` and nothing else: without settings the log is an embedded server and the
database SQLite, both below ./.skialith. Press Ctrl-C or `kill -9` it during a step and start it again.
"""

import operator
import sys
import time
from typing import Annotated, TypedDict

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph

from skialith.langchain import SkialithCheckpointer


class State(TypedDict, total=False):
    """What the agent knows."""

    question: str
    notes: Annotated[list[str], operator.add]
    answer: str


def work(step: str) -> None:
    """Stands for a call of a model that takes its time and costs money."""
    print(f"{step} ...", flush=True)
    time.sleep(1)


def plan(state: State) -> State:
    work("plan")
    return {"notes": [f"what to find out about {state['question']!r}"]}


def research(state: State) -> State:
    work("research")
    return {"notes": [f"note {len(state['notes'])}: a checkpoint is durable before the next step begins"]}


def write(state: State) -> State:
    work("write")
    return {"answer": f"{len(state['notes'])} notes on {state['question']!r}"}


graph = StateGraph(State)
for node in (plan, research, write):
    graph.add_node(node.__name__, node)
for one, other in [(START, "plan"), ("plan", "research"), ("research", "write"), ("write", END)]:
    graph.add_edge(one, other)


def main() -> None:
    with SkialithCheckpointer() as checkpointer:
        app = graph.compile(checkpointer=checkpointer)
        thread = sys.argv[1] if len(sys.argv) > 1 else "agent-1"
        config: RunnableConfig = {"configurable": {"thread_id": thread}}
        state = app.get_state(config)
        if state.values and not state.next:
            print("done before:", state.values["answer"])
            return
        if state.next:
            print("going on with", ", ".join(state.next), flush=True)
        # None goes on with what the thread was doing; an input begins.
        given = None if state.next else State(question="write-ahead logs")
        print(app.invoke(given, config, durability="sync")["answer"])


if __name__ == "__main__":
    main()
