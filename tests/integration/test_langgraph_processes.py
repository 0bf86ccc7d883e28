"""Graphs in processes: killed inside a node, gone on with by another one, two on one thread, the seed's lines, the example."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.graphs import OpenSaver, at
from tests.fixtures.nats import wait_until

from .test_processes import finish, run

ROOT = Path(__file__).parents[2]

_GRAPH = """
import asyncio, operator, time
from typing import Annotated, TypedDict
from langgraph.graph import END, START, StateGraph
from skialith.langchain import SkialithCheckpointer

class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]

effects, stop_in = sys.argv[1], sys.argv[2]
graph = StateGraph(State)

def node(name):
    def work(state):
        with open(effects, 'a') as file:
            file.write(name + '\\n')
        if name == stop_in:
            time.sleep(60)
        return {'log': [name]}
    return work

names = ['one', 'two', 'three', 'four']
for name in names:
    graph.add_node(name, node(name))
for a, b in zip([START, *names], [*names, END]):
    graph.add_edge(a, b)
config = {'configurable': {'thread_id': 'killed'}}
"""

_RUN = """
with SkialithCheckpointer(**settings) as saver:
    app = graph.compile(checkpointer=saver)
    state = app.get_state(config)
    given = None if state.next else {'log': ['in']}
    if sys.argv[3] == 'awaited':
        done = asyncio.run(app.ainvoke(given, config, durability=sys.argv[4]))
    else:
        done = app.invoke(given, config, durability=sys.argv[4])
    print(done['log'])
"""


def start(code: str, settings: dict[str, Any], *arguments: str) -> subprocess.Popen[str]:
    """A child that runs a graph; ``arguments``: file of effects, node to stop in, blocking or awaited, durability."""
    return run(f"sys.argv[1:] = {list(arguments)!r}\n" + code, settings)


@pytest.mark.parametrize(("how", "durability"), [("blocking", "sync"), ("awaited", "sync"), ("blocking", "async")])
def test_a_graph_killed_inside_a_node_goes_on_in_another_process(
    settings: dict[str, Any], tmp_path: Path, open_saver: OpenSaver, how: str, durability: str
) -> None:
    """Killed once the checkpoint before its node is durable: with durability="async" the node begins without waiting for it."""
    effects, saver = tmp_path / "effects", open_saver(writer="off")
    if how == "awaited":
        settings["writer"] = "off"  # nobody stores anything

    def done() -> list[str]:
        return effects.read_text().split() if effects.exists() else []

    def durable() -> object:
        latest = saver.get_tuple(at("killed"))
        return None if latest is None else latest.checkpoint["channel_values"].get("log")

    child = start(_GRAPH + _RUN, settings, str(effects), "three", how, durability)
    try:
        wait_until(lambda: done()[-1:] == ["three"], 30, "it is in the third node")
        wait_until(lambda: durable() == ["in", "one", "two"], 30, "the checkpoint before it is durable")
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=20)
    again = finish(start(_GRAPH + _RUN, settings, str(effects), "", how, durability))
    assert again.strip() == "['in', 'one', 'two', 'three', 'four']"
    assert done() == ["one", "two", "three", "three", "four"]


_TOGETHER = """
config = {'configurable': {'thread_id': 'both'}}
with SkialithCheckpointer(**settings) as saver:
    app = graph.compile(checkpointer=saver)
    app.get_state(config)
    print('ready', flush=True)
    sys.stdin.readline()
    for n in range(8):
        mine = f'{stop_in} {n}'
        log = app.invoke({'log': [mine]}, config)['log']
        assert mine in log and log[-4:] == names, log
    print('done')
"""


def test_two_processes_on_one_thread_at_once(settings: dict[str, Any], tmp_path: Path, open_saver: OpenSaver) -> None:
    children = [
        run(
            f"sys.argv[1:] = {[str(tmp_path / 'effects'), name]!r}\n" + _GRAPH + _TOGETHER,
            {**settings, "writer": writer},
            stdin=subprocess.PIPE,
        )
        for name, writer in (("left", "on"), ("right", "off"))
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        assert finish(child) == "done\n"
    saver = open_saver()
    found = list(saver.list(at("both")))
    # An input, and a checkpoint before and behind each of four nodes, of which the last is the first of nothing.
    assert len(found) == 2 * 8 * 6
    ids = [each.config["configurable"]["checkpoint_id"] for each in found]
    assert ids == sorted(ids, reverse=True) and len(set(ids)) == len(ids)
    parents = {each.parent_config["configurable"]["checkpoint_id"] for each in found if each.parent_config}
    assert parents <= set(ids)
    latest = saver.get_tuple(at("both"))
    assert latest is not None and latest.config == found[0].config


SEED = """\
from skialith.langchain import SkialithCheckpointer
checkpointer = SkialithCheckpointer()
app = graph.compile(checkpointer=checkpointer)
# No other changes needed
result = await app.ainvoke(
{"messages": [...]},
config={"configurable": {"thread_id": "agent-1"}}
)
"""
"""The lines of the document the project grew from, as they stand there.

``...`` in them stands for messages: LangGraph's serializer has no form for Python's ``Ellipsis``, whatever the checkpointer.
"""

_AROUND = """
import asyncio, operator
from typing import Annotated, Any, TypedDict
from langgraph.graph import END, START, StateGraph

class State(TypedDict):
    messages: Annotated[list[Any], operator.add]

graph = StateGraph(State)
graph.add_node("answer", lambda state: {"messages": ["an answer"]})
graph.add_edge(START, "answer")
graph.add_edge("answer", END)

async def main():
%s
    return result, (await app.aget_state({"configurable": {"thread_id": "agent-1"}})).values

result, kept = asyncio.run(main())
assert result == kept, (result, kept)
print(result["messages"])
"""


def plain(arguments: list[str], directory: Path) -> str:
    """Run Python without any settings; what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SKIALITH_")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=directory, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_seeds_lines_work_as_they_stand(tmp_path: Path) -> None:
    assert SEED.count("...") == 1
    code = _AROUND % textwrap.indent(SEED.replace("...", "'hello'"), "    ")
    assert plain(["-c", code], tmp_path) == "['hello', 'an answer']\n"
    assert plain(["-c", code], tmp_path) == "['hello', 'an answer', 'hello', 'an answer']\n"
    refused = "try:\n    asyncio.run(main())\nexcept Exception as error:\n    print(error)\n"
    literally = (_AROUND % textwrap.indent(SEED, "    ")).partition("result, kept =")[0] + refused
    assert "channel_values.__start__ cannot be serialized" in plain(["-c", literally], tmp_path)


def test_the_example_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    example = str(ROOT / "examples" / "langgraph_agent.py")
    env = {name: value for name, value in os.environ.items() if not name.startswith("SKIALITH_")}
    child = subprocess.Popen([sys.executable, example], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline(), child.stdout.readline()]
    child.kill()
    child.wait(20)
    child.stdout.close()
    assert lines == ["plan ...\n", "research ...\n"]
    answer = "2 notes on 'write-ahead logs'\n"
    assert plain([example], tmp_path) == "going on with research\nresearch ...\nwrite ...\n" + answer
    assert plain([example], tmp_path) == "done before: " + answer
