"""Real graphs, blocking and awaited: interrupts, time travel, subgraphs, failing branches, streams, deltas."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, interrupt

from skialith.langchain import SkialithCheckpointer
from tests.fixtures.graphs import FromDatabase, OpenSaver, at
from tests.fixtures.nats import wait_until

Invoke = Callable[..., Any]


class State(TypedDict, total=False):
    """What the graphs of these tests keep."""

    log: Annotated[list[str], operator.add]
    answer: str


def awaited(method: str) -> Invoke:
    """A graph's method, awaited on a loop of its own."""

    def call(graph: Any, *arguments: Any, **options: Any) -> Any:
        async def run() -> Any:
            found = getattr(graph, "a" + method)(*arguments, **options)
            if hasattr(found, "__aiter__"):
                return [each async for each in found]
            return await found

        return asyncio.run(run())

    return call


def blocking(method: str) -> Invoke:
    """A graph's method, called."""

    def call(graph: Any, *arguments: Any, **options: Any) -> Any:
        found = getattr(graph, method)(*arguments, **options)
        return list(found) if hasattr(found, "__next__") else found

    return call


@pytest.fixture
def do(place: str) -> Callable[[str], Invoke]:
    """``do("invoke")(graph, ...)``, awaited where it is read from the log alone."""
    return awaited if place == "log" else blocking


@pytest.fixture(params=["log", "database", "both"])
def place(request: pytest.FixtureRequest) -> str:
    """Where everything is read from."""
    return str(request.param)


@pytest.fixture
def checkpointer(place: str, open_saver: OpenSaver) -> SkialithCheckpointer:
    """Its records stay in the log, are read when they have left it, or are on their way."""
    if place == "database":
        return open_saver(FromDatabase)
    return open_saver(writer="off" if place == "log" else "on")


def steps(*names: str, ask: str = "") -> StateGraph[State]:
    """A chain of nodes that write their names; the node ``ask`` asks a person."""
    graph = StateGraph(State)

    def node(name: str) -> Any:
        def work(state: State) -> State:
            if name == ask:
                return {"log": [name], "answer": interrupt({"question": name})}
            return {"log": [name]}

        return work

    for name in names:
        graph.add_node(name, node(name))
    for one, other in zip((START, *names), (*names, END), strict=True):
        graph.add_edge(one, other)
    return graph


def test_a_person_answers(checkpointer: SkialithCheckpointer, do: Callable[[str], Invoke]) -> None:
    app = steps("draft", "approve", "send", ask="approve").compile(checkpointer=checkpointer)
    config = at("order 7")
    stopped = do("invoke")(app, {"log": []}, config)
    assert stopped["__interrupt__"][0].value == {"question": "approve"}
    state = do("get_state")(app, config)
    assert state.next == ("approve",) and state.values["log"] == ["draft"]
    assert state.interrupts[0].value == {"question": "approve"}
    # Another process would build the graph anew.
    again = steps("draft", "approve", "send", ask="approve").compile(checkpointer=checkpointer)
    done = do("invoke")(again, Command(resume="yes"), config)
    assert (done["log"], done["answer"]) == (["draft", "approve", "send"], "yes")
    assert do("get_state")(app, config).next == ()


def test_time_travel_and_a_fork(checkpointer: SkialithCheckpointer, do: Callable[[str], Invoke]) -> None:
    app = steps("a", "b", "c").compile(checkpointer=checkpointer)
    config = at("t")
    do("invoke")(app, {"log": ["in"]}, config)
    history = do("get_state_history")(app, config)
    assert [state.next for state in history] == [(), ("c",), ("b",), ("a",), ("__start__",)]
    assert [len(state.values.get("log", [])) for state in history] == [4, 3, 2, 1, 0]
    before_b = history[2].config
    # Again from an old checkpoint: nothing before it runs.
    assert do("invoke")(app, None, before_b)["log"] == ["in", "a", "b", "c"]
    # A fork: what is different from there on is a branch of its own, and the latest state of the thread.
    forked = do("update_state")(app, before_b, {"log": ["changed"]}, as_node="a")
    assert do("invoke")(app, None, forked)["log"] == ["in", "a", "changed", "b", "c"]
    assert do("get_state")(app, config).values["log"] == ["in", "a", "changed", "b", "c"]
    assert do("get_state")(app, history[0].config).values["log"] == ["in", "a", "b", "c"]
    some = do("get_state_history")(app, config, limit=2, before=history[0].config)
    assert [state.values["log"] for state in some] == [["in", "a", "b"], ["in", "a"]]
    steps_found = do("get_state_history")(app, config, filter={"source": "update"})
    assert [state.values["log"] for state in steps_found] == [["in", "a", "changed"]]


def test_subgraphs_have_namespaces_of_their_own(
    checkpointer: SkialithCheckpointer, do: Callable[[str], Invoke]
) -> None:
    inner = steps("deep", "asked", "deeper", ask="asked").compile(checkpointer=True)
    middle = StateGraph(State).add_node("inner", inner).add_edge(START, "inner").add_edge("inner", END)
    outer = StateGraph(State).add_node("middle", middle.compile(checkpointer=True))
    app = outer.add_edge(START, "middle").add_edge("middle", END).compile(checkpointer=checkpointer)
    config = at("nested")
    do("invoke")(app, {"log": []}, config)
    namespaces = {each.config["configurable"]["checkpoint_ns"] for each in checkpointer.list(None)}
    assert namespaces == {"", "middle", "middle|inner"}
    state = do("get_state")(app, config, subgraphs=True)
    deepest = state.tasks[0].state.tasks[0].state
    assert deepest.next == ("asked",) and deepest.values["log"] == ["deep"]
    done = do("invoke")(app, Command(resume="ok"), config)
    assert done["log"] == ["deep", "asked", "deeper"] and done["answer"] == "ok"


class Branches(TypedDict, total=False):
    """What parallel branches add up to."""

    total: Annotated[int, operator.add]


def test_the_siblings_of_a_failed_branch_do_not_run_again(
    checkpointer: SkialithCheckpointer, do: Callable[[str], Invoke]
) -> None:
    runs: list[str] = []
    broken = [True]
    config = at("branches")
    graph = StateGraph(Branches)

    def branch(name: str) -> Any:
        def work(state: Branches) -> Branches:
            runs.append(name)
            if name == "fails" and broken[0]:
                wait_until(lambda: written() == 2, 20, "what its siblings wrote is there")
                raise RuntimeError("this branch fails")
            return {"total": 1}

        return work

    def written() -> int:
        found = checkpointer.get_tuple(config)
        return 0 if found is None else sum(channel == "total" for _, channel, _ in found.pending_writes or [])

    for name in ("one", "fails", "other"):
        graph.add_node(name, branch(name))
        graph.add_edge(START, name)
        graph.add_edge(name, END)
    app = graph.compile(checkpointer=checkpointer)
    with pytest.raises(RuntimeError, match="this branch fails"):
        do("invoke")(app, {"total": 0}, config)
    pending = checkpointer.get_tuple(config)
    assert pending is not None
    assert "__error__" in {channel for _, channel, _ in pending.pending_writes or []}
    broken[0] = False
    assert do("invoke")(app, None, config) == {"total": 3}
    assert sorted(runs) == ["fails", "fails", "one", "other"]


def test_streams(checkpointer: SkialithCheckpointer, do: Callable[[str], Invoke]) -> None:
    app = steps("a", "b").compile(checkpointer=checkpointer)
    found = do("stream")(app, {"log": []}, at("s"), stream_mode=["updates", "checkpoints"])
    updates = [value for mode, value in found if mode == "updates"]
    assert updates == [{"a": {"log": ["a"]}}, {"b": {"log": ["b"]}}]
    told = [value["values"].get("log", []) for mode, value in found if mode == "checkpoints"]
    assert told == [[], [], ["a"], ["a", "b"]]
    assert len(list(checkpointer.list(at("s")))) == 4


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_durability(checkpointer: SkialithCheckpointer, do: Callable[[str], Invoke], durability: Any) -> None:
    app = steps("a", "b", "c", ask="c").compile(checkpointer=checkpointer)
    config = at("d")
    do("invoke")(app, {"log": []}, config, durability=durability)
    kept = len(list(checkpointer.list(config)))
    assert kept == (1 if durability == "exit" else 4)
    assert do("invoke")(app, Command(resume="x"), config, durability=durability)["log"] == ["a", "b", "c"]


# ---- deltas


def _extend(state: list[str], writes: list[list[str]]) -> list[str]:
    return [*state, *(each for write in writes for each in write)]


class Delta(TypedDict, total=False):
    """A channel of which only what was written is kept, with a snapshot now and then, and one that counts."""

    messages: Annotated[list[str], DeltaChannel(_extend, snapshot_frequency=4)]
    count: int


def delta_graph(checkpointer: SkialithCheckpointer) -> Any:
    def work(state: Delta) -> Delta:
        count = state.get("count", 0) + 1
        return {"messages": [f"step {count}"], "count": count}

    graph = StateGraph(Delta).add_node("work", work).add_edge(START, "work").add_edge("work", END)
    return graph.compile(checkpointer=checkpointer)


def test_deltas_are_rebuilt_copied_and_pruned(checkpointer: SkialithCheckpointer, do: Callable[[str], Invoke]) -> None:
    app = delta_graph(checkpointer)
    wanted: list[str] = []
    for n in range(1, 8):
        wanted += [f"in {n}", f"step {n}"]
        assert do("invoke")(app, {"messages": [f"in {n}"]}, at("d"))["messages"] == wanted
    assert do("get_state")(app, at("d")).values["messages"] == wanted
    before = len(list(checkpointer.list(at("d"))))
    copy, prune = (checkpointer.copy_thread, checkpointer.prune)
    if do is awaited:
        asyncio.run(checkpointer.acopy_thread("d", "copy"))
        asyncio.run(checkpointer.aprune(["d"]))
    else:
        copy("d", "copy")
        prune(["d"])
    left = len(list(checkpointer.list(at("d"))))
    assert 1 <= left < before
    assert len(list(checkpointer.list(at("copy")))) == before
    for thread in ("d", "copy"):
        assert do("get_state")(app, at(thread)).values["messages"] == wanted
        more = do("invoke")(app, {"messages": ["in 8"]}, at(thread))
        assert more["messages"] == [*wanted, "in 8", "step 8"]
    old = [state.values.get("messages", []) for state in do("get_state_history")(app, at("copy"))]
    assert all(each == [*wanted, "in 8", "step 8"][: len(each)] for each in old)
    assert sorted({len(each) for each in old}) == list(range(17))
    checkpointer.prune(["copy"], strategy="delete")
    assert list(checkpointer.list(at("copy"))) == []


def test_delta_history_is_what_the_base_class_finds(checkpointer: SkialithCheckpointer) -> None:
    from langgraph.checkpoint.base import BaseCheckpointSaver

    app = delta_graph(checkpointer)
    for n in range(1, 7):
        app.invoke({"messages": [f"in {n}"]}, at("d"))
    configs: list[RunnableConfig] = [each.config for each in checkpointer.list(at("d"))]
    for config in (at("d"), *configs):
        mine = checkpointer.get_delta_channel_history(config=config, channels=["messages", "count", "none"])
        theirs = BaseCheckpointSaver.get_delta_channel_history(
            checkpointer, config=config, channels=["messages", "count", "none"]
        )
        assert mine == theirs
    assert checkpointer.get_delta_channel_history(config=at("d"), channels=[]) == {}
