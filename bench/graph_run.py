"""A graph's run as its checkpointer sees it: the checkpoints and writes that LangGraph hands over, without the graph.

The graph has two nodes, ``agent`` and ``tools``, which call each other. Each appends a message to the channel ``messages``, of
which a window is kept, so that the state keeps its size over any number of checkpoints. The channel ``documents`` is set by
the input and stays as it is, or every node replaces it. tests/unit/test_bench.py holds this beside a real graph.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, ChannelVersions, Checkpoint, CheckpointMetadata
from langgraph.checkpoint.base.id import uuid6

CHECKPOINT_FORMAT = 4
"""LangGraph's number of it."""
WINDOW = 5
"""Messages that are kept."""
MESSAGE_WORDS = 35
DOCUMENT_WORDS = 560
DOCUMENTS = 50
_NEXT = {"__start__": "agent", "agent": "tools", "tools": "agent"}
# Text that compresses about as text does: a word in ten letters, drawn from a few thousand.
_WORDS = ["".join(random.Random(n).choices("etaoinshrdlucmfw", k=2 + n % 9)) for n in range(4000)]

Put = tuple[RunnableConfig, Checkpoint, CheckpointMetadata, ChannelVersions]
"""Arguments of ``put``."""
PutWrites = tuple[RunnableConfig, list[tuple[str, Any]], str, str]
"""Arguments of ``put_writes``."""


@dataclass(frozen=True)
class Shape:
    """What the state consists of."""

    documents: bool
    """Whether there are any."""
    replaced: bool = False
    """Whether every node replaces them."""


class GraphRun:
    """One thread. ``put()`` gives the first checkpoint; then ``put_writes()`` and ``put()`` in turn.

    ``checkpoint_id`` and ``values`` are those of the last checkpoint.
    """

    def __init__(self, saver: BaseCheckpointSaver[Any], thread_id: str, shape: Shape) -> None:
        self._saver = saver
        self._thread_id = thread_id
        self._shape = shape
        self._random = random.Random(thread_id)
        self._step = -2
        self.checkpoint_id: str | None = None
        self.values: dict[str, Any] = {}
        self._node = "__start__"
        self._writes: list[tuple[str, Any]] = []
        self._versions: ChannelVersions = {}
        self._seen: dict[str, ChannelVersions] = {"__input__": {}}

    def config(self) -> RunnableConfig:
        """Of the thread, as a caller gives it: its latest checkpoint is meant."""
        return {"configurable": {"thread_id": self._thread_id, "checkpoint_ns": ""}}

    def put_writes(self) -> PutWrites:
        """What the next node writes, against the checkpoint of the last ``put()``."""
        node = self._node
        update = self.values["__start__"] if node == "__start__" else self._update()
        self._writes = [*update.items(), (f"branch:to:{_NEXT[node]}", None)]
        return self._parent(), self._writes, self._uuid(), f"~__pregel_pull, {node}"

    def put(self) -> Put:
        """The next checkpoint: the input, then what stands after each node's writes."""
        self._step += 1
        metadata: CheckpointMetadata = {"source": "loop", "step": self._step, "parents": {}}
        if self._step < 0:
            metadata["source"] = "input"
            changed = self._start()
        else:
            changed = self._apply()
        config = self._parent()
        checkpoint = Checkpoint(
            v=CHECKPOINT_FORMAT,
            id=str(uuid6(clock_seq=self._step)),
            ts=datetime.now(timezone.utc).isoformat(),
            channel_values=self.values.copy(),
            channel_versions=self._versions.copy(),
            versions_seen={node: seen.copy() for node, seen in self._seen.items()},
            updated_channels=changed,
        )
        self.checkpoint_id = checkpoint["id"]
        new_versions = {name: version for name, version in self._versions.items() if version == self._newest()}
        return config, checkpoint, metadata, new_versions

    # ---- how LangGraph gets there

    def _start(self) -> list[str]:
        self.values["__start__"] = self._update()
        self._versions["__start__"] = self._saver.get_next_version(None, None)
        return ["__start__"]

    def _update(self) -> dict[str, Any]:
        text = self._text(MESSAGE_WORDS)
        messages: dict[str, AnyMessage] = {
            "__start__": HumanMessage(text, id=self._uuid()),
            "agent": AIMessage(text, id=self._uuid()),
            "tools": ToolMessage(text, id=self._uuid(), tool_call_id=self._uuid()),
        }
        update: dict[str, Any] = {"messages": [messages[self._node]]}
        if self._shape.documents and (self._shape.replaced or self._node == "__start__"):
            update["documents"] = self._documents()
        return update

    def _apply(self) -> list[str]:
        node = self._node
        trigger = "__start__" if node == "__start__" else f"branch:to:{node}"
        version = self._saver.get_next_version(self._newest(), None)
        self._seen[node] = {trigger: self._versions[trigger]}
        self._versions[trigger] = version
        del self.values[trigger]
        for channel, value in self._writes:
            kept = [*self.values.get("messages", []), *value][-WINDOW:] if channel == "messages" else value
            self.values[channel] = kept
            self._versions[channel] = version
        self._node = _NEXT[node]
        return sorted(channel for channel, _ in self._writes)

    def _newest(self) -> Any:
        return max(self._versions.values())

    def _parent(self) -> RunnableConfig:
        configurable = {"thread_id": self._thread_id, "checkpoint_ns": ""}
        if self.checkpoint_id is not None:
            configurable["checkpoint_id"] = self.checkpoint_id
        return {"configurable": configurable, "metadata": {"thread_id": self._thread_id}}

    def _documents(self) -> list[dict[str, str]]:
        return [
            {"source": f"https://example.org/{number}", "text": self._text(DOCUMENT_WORDS)}
            for number in range(DOCUMENTS)
        ]

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(_WORDS, k=words))

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))
