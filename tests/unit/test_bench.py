"""The benches' own parts: a run without a graph hands over what LangGraph does with one; a bar keeps the worst figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphRecursionError
from langgraph.graph import START, StateGraph
from typing_extensions import TypedDict

from bench.graph_run import WINDOW, GraphRun, Shape
from bench.report import BARS, Report

STEPS = 8
SHAPES = [Shape(documents=False), Shape(documents=True), Shape(documents=True, replaced=True)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["messages", "documents", "documents replaced"])


class Recorder(InMemorySaver):
    """Keeps the form of what is handed over: all of it but the values, ids and times."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []
        self.written: dict[str, Any] = {}

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        steps = {version: number for number, version in enumerate(sorted(set(checkpoint["channel_versions"].values())))}
        form = {
            "keys": sorted(checkpoint),
            "v": checkpoint["v"],
            "values": {name: _form(value) for name, value in checkpoint["channel_values"].items()},
            "versions": {name: steps[version] for name, version in checkpoint["channel_versions"].items()},
            "seen": {node: sorted(seen) for node, seen in checkpoint["versions_seen"].items()},
            "updated": checkpoint["updated_channels"],
            "new": {name: steps[version] for name, version in new_versions.items()},
            "metadata": metadata,
            "parent": config["configurable"].get("checkpoint_id") == (self.given[-1][0] if self.given else None),
            "namespace": config["configurable"]["checkpoint_ns"],
        }
        self.given.append((checkpoint["id"], form))
        return super().put(config, checkpoint, metadata, new_versions)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        channels = {channel: _form(value) for channel, value in writes}
        self.written[config["configurable"]["checkpoint_id"]] = (channels, len(task_id), task_path)
        super().put_writes(config, writes, task_id, task_path)

    def forms(self) -> list[Any]:
        """What was put, and what was written against it; the last, which a real run may not reach, is left out."""
        return [(form, self.written[checkpoint_id]) for checkpoint_id, form in self.given[:STEPS]]


def _form(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _form(each) for name, each in value.items()}
    return [type(each) for each in value] if isinstance(value, list) else value


def _window(old: list[AnyMessage], new: list[AnyMessage]) -> list[AnyMessage]:
    return [*old, *new][-WINDOW:]


class Messages(TypedDict):
    messages: Annotated[list[AnyMessage], _window]


class Documents(Messages):
    documents: list[dict[str, str]]


def _real_run(saver: Recorder, shape: Shape) -> None:
    documents = [{"source": "s", "text": "t"}] * 50

    def agent(state: Messages) -> dict[str, Any]:
        update: dict[str, Any] = {"messages": [AIMessage("a")]}
        return {**update, "documents": documents} if shape.replaced else update

    def tools(state: Messages) -> dict[str, Any]:
        update: dict[str, Any] = {"messages": [ToolMessage("a", tool_call_id="c")]}
        return {**update, "documents": documents} if shape.replaced else update

    graph: StateGraph[Any] = StateGraph(Documents if shape.documents else Messages)
    graph.add_node("agent", agent)
    graph.add_node("tools", tools)
    graph.add_edge(START, "agent")
    graph.add_edge("agent", "tools")
    graph.add_edge("tools", "agent")
    given: dict[str, Any] = {"messages": [HumanMessage("q")]}
    if shape.documents:
        given["documents"] = documents
    config: RunnableConfig = {"configurable": {"thread_id": "t"}, "recursion_limit": STEPS}
    with pytest.raises(GraphRecursionError):
        graph.compile(checkpointer=saver).invoke(given, config, durability="sync")


def _bench_run(saver: Recorder, shape: Shape) -> GraphRun:
    run = GraphRun(saver, "t", shape)
    for _ in range(STEPS + 1):
        saver.put(*run.put())
        saver.put_writes(*run.put_writes())
    return run


@each_shape
def test_a_run_hands_over_what_langgraph_does(shape: Shape) -> None:
    real, ours = Recorder(), Recorder()
    _real_run(real, shape)
    _bench_run(ours, shape)
    assert len(real.forms()) == STEPS
    assert ours.forms() == real.forms()


@each_shape
def test_a_run_keeps_its_size_and_can_be_read_back(shape: Shape) -> None:
    saver = Recorder()
    run = _bench_run(saver, shape)
    found = saver.get_tuple(run.config())
    assert found is not None and found.checkpoint["id"] == run.checkpoint_id
    assert found.checkpoint["channel_values"] == run.values
    size = len(saver.serde.dumps_typed(run.values)[1])
    assert size == pytest.approx(200_000 if shape.documents else 2_000, rel=0.25)
    assert len(list(saver.list(run.config()))) == STEPS + 1


def test_a_bar_keeps_the_worst_figure() -> None:
    report = Report()
    for name, figures, worst in (("step sqlite", (20, 16, 18), 16), ("get_tuple 2 KB", (0.5, 0.9, 0.7), 0.9)):
        for figure in figures:
            report.bar(name, figure)
        assert report.bars[name] == worst
        assert BARS[name].met(worst)
