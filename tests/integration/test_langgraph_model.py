"""Thousands of random calls: the checkpointer answers what LangGraph's own saver in memory answers, blocking and awaited."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Coroutine
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver

from skialith.config import GRAPH_KEEP_SECONDS, PAYLOAD_PART_BYTES
from skialith.langchain import SkialithCheckpointer
from tests.fixtures.graphs import OpenSaver, at, checkpoint, metadata, settle
from tests.fixtures.stores import noise, outside

CALLS = 700
THREADS = ["t", "T", "t ", "\0", "é", "e\u0301", "\U0001f600", "-"]
NAMESPACES = ["", "sub", "SUB", "sub|\U0001f600:\0"]
CHANNELS = ["a", "b", "A", "__pregel_tasks", "c" * 300]
TASKS = ["task", "TASK", ""]
SPECIAL = ["__error__", "__interrupt__", "__resume__", "__scheduled__"]
VALUES: list[Any] = [None, 0, -1.5, "", "x", b"\0", [1, {"k": (2,)}], {"set": {1}}, "\U0001f600\0"]
LARGE = [noise(PAYLOAD_PART_BYTES + 1, 1), noise(2 * PAYLOAD_PART_BYTES + 1, 2)]
ORPHANS = (
    "SELECT COUNT(*) FROM payload_parts WHERE parts_key NOT IN ("
    "SELECT body_parts FROM graph_checkpoints WHERE body_parts IS NOT NULL UNION "
    "SELECT body_parts FROM graph_blobs WHERE body_parts IS NOT NULL UNION "
    "SELECT body_parts FROM graph_writes WHERE body_parts IS NOT NULL)"
)


@pytest.fixture(params=["sqlite", "mysql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'skialith.db'}"
    return str(request.getfixturevalue("mariadb_url"))


def _id(found: CheckpointTuple) -> str:
    return str(found.config["configurable"]["checkpoint_id"])


class World:
    """A saver beside LangGraph's own, and what was put into both."""

    def __init__(
        self, saver: SkialithCheckpointer, dice: random.Random, loop: asyncio.AbstractEventLoop | None
    ) -> None:
        self.saver, self.plain, self.dice, self._loop = saver, InMemorySaver(), dice, loop
        self.configs: list[RunnableConfig] = []
        self.made: list[tuple[RunnableConfig, Checkpoint]] = []

    def on(self, name: str, *args: Any, **options: Any) -> Any:
        """Call a method of the saver, blocking or awaited."""
        if self._loop is None or self.dice.random() < 0.5:
            found = getattr(self.saver, name)(*args, **options)
            return [*found] if name == "list" else found
        found = getattr(self.saver, f"a{name}")(*args, **options)

        async def collected() -> list[CheckpointTuple]:
            return [each async for each in found]

        run: Callable[[Coroutine[Any, Any, Any]], Any] = self._loop.run_until_complete
        return run(collected() if name == "list" else found)

    def both(self, name: str, *args: Any, **options: Any) -> None:
        found, wanted = self.on(name, *args, **options), getattr(self.plain, name)(*args, **options)
        assert found == wanted

    # ---- calls

    def some_config(self) -> RunnableConfig:
        """Of a thread, of a namespace, or of a checkpoint, with keys that nobody knows."""
        where: dict[str, Any] = {"thread_id": self.dice.choice(THREADS)}
        if self.dice.random() < 0.8:
            where["checkpoint_ns"] = self.dice.choice(NAMESPACES)
        if self.configs and self.dice.random() < 0.6:
            where.update(self.dice.choice(self.configs)["configurable"])
        elif self.dice.random() < 0.1:
            where["checkpoint_id"] = self.dice.choice(["", "nowhere"])
        if self.dice.random() < 0.3:
            where["user"] = self.dice.choice(["u\0", 7, ["not said"]])
        return {"configurable": where, "metadata": {"tag": self.dice.choice("xy")}, "tags": ["t"]}

    def some_value(self) -> Any:
        return self.dice.choice(LARGE if self.dice.random() < 0.02 else VALUES)

    def put(self) -> None:
        config: RunnableConfig
        if self.made and self.dice.random() < 0.1:  # once more what was put, perhaps deleted meanwhile
            config, made = self.dice.choice(self.made)
            new = made["channel_versions"]
        else:
            config = {**self.some_config()}
            where = config["configurable"] = {"checkpoint_ns": "", **config["configurable"]}
            parent = self.plain.get_tuple(at(where["thread_id"], where["checkpoint_ns"], where.get("checkpoint_id")))
            values = {} if parent is None else dict(parent.checkpoint["channel_values"])
            versions: dict[str, Any] = {} if parent is None else dict(parent.checkpoint["channel_versions"])
            new = {}
            for channel in self.dice.sample(CHANNELS, self.dice.randrange(4)):
                new[channel] = self.plain.get_next_version(versions.get(channel), None)
                values[channel] = self.some_value()
                if self.dice.random() < 0.2:
                    del values[channel]
            made = checkpoint(values, {**versions, **new})
            self.made.append((config, made))
        more = {"run_id": f"run{self.dice.randrange(3)}"} if self.dice.random() < 0.5 else {}
        said = metadata(self.dice.randrange(3), **more)
        found = self.on("put", config, made, said, new)
        assert found == self.plain.put(config, {**made}, said, new)
        self.configs.append(found)

    def put_writes(self) -> None:
        if self.configs:
            config = self.dice.choice(self.configs)
            channels = [self.dice.choice(CHANNELS + SPECIAL) for _ in range(self.dice.randrange(4))]
            writes = [(channel, self.some_value()) for channel in channels]
            path = self.dice.choice(["", "~__pregel_pull, a", "~__pregel_push, 1"])
            self.both("put_writes", config, writes, self.dice.choice(TASKS), path)

    def get_tuple(self) -> None:
        config = self.some_config()
        found, wanted = self.on("get_tuple", config), self.plain.get_tuple(config)
        # It gives the config as it got it, we as all others do.
        assert found == (None if wanted is None else wanted._replace(config=found.config if found else config))
        if found is not None:
            assert (
                found.config["configurable"].items()
                <= {"checkpoint_ns": "", **config["configurable"], **found.config["configurable"]}.items()
            )

    def list(self) -> None:
        nothing: list[RunnableConfig | None] = [None, {}]
        config = self.dice.choice(nothing) if self.dice.random() < 0.2 else self.some_config()
        options: dict[str, Any] = {}
        if self.dice.random() < 0.4:
            options["filter"] = self.dice.choice(
                [
                    {},
                    {"step": 1},
                    {"step": True},
                    {"source": "loop", "step": 2.0},
                    {"run_id": "run1"},
                    {"tag": "x"},
                    {"no": None},
                ]
            )
        if self.configs and self.dice.random() < 0.4:
            options["before"] = self.dice.choice([*self.configs, at("elsewhere"), {}])
        wanted = [*self.plain.list(config, **options)]
        limit = self.dice.choice([None, None, -1, 0, 1, 3, 1000])
        found = self.on("list", config, **options, limit=limit)
        # It goes thread by thread, and those of one id may come in any order.
        ids = sorted(map(_id, wanted), reverse=True)
        assert [*map(_id, found)] == ids[: len(ids) if limit is None else max(0, limit)]
        assert all(each in wanted for each in found) and len({str(each.config) for each in found}) == len(found)

    def get_delta_channel_history(self) -> None:
        channels = self.dice.sample(CHANNELS, self.dice.randrange(4))
        self.both("get_delta_channel_history", config=self.some_config(), channels=channels)

    def delete_thread(self) -> None:
        thread = self.dice.choice(THREADS)
        self.both("delete_thread", thread)

    def settle(self) -> None:
        """All is in the database, and nothing in the log any more; from now on it is kept there for a while again."""
        settle(self.saver)
        self.saver._door.open().wal.stream.keep_graphs_seconds = GRAPH_KEEP_SECONDS

    # ---- what LangGraph's saver in memory has not

    def remove(self, thread: str, ns: str, checkpoint_id: str) -> None:
        del self.plain.storage[thread][ns][checkpoint_id]
        self.plain.writes.pop((thread, ns, checkpoint_id), None)

    def delete_for_runs(self) -> None:
        runs = self.dice.sample(["run0", "run1", "run2"], self.dice.randrange(1, 3))
        for each in [*self.plain.list(None)]:
            if each.metadata.get("run_id") in runs:
                self.remove(*itemgetter("thread_id", "checkpoint_ns", "checkpoint_id")(each.config["configurable"]))
        self.on("delete_for_runs", runs)

    def prune(self) -> None:
        thread = self.dice.choice(THREADS)
        for ns, there in [*self.plain.storage[thread].items()]:
            for checkpoint_id in sorted(there)[:-1]:
                self.remove(thread, ns, checkpoint_id)
        self.on("prune", [thread])

    def copy_thread(self) -> None:
        source, target = self.dice.choice(THREADS), self.dice.choice(THREADS)
        self.on("copy_thread", source, target)
        if source == target:
            return
        for ns, there in [*self.plain.storage[source].items()]:
            self.plain.storage[target][ns].update(there)
            for checkpoint_id in there:
                writes = self.plain.writes.get((source, ns, checkpoint_id))
                for key, write in (writes or {}).items():
                    held = self.plain.writes[target, ns, checkpoint_id]
                    if key[1] < 0 or key not in held:
                        held[key] = write
        for (thread, *rest), value in [*self.plain.blobs.items()]:
            if thread == source:
                self.plain.blobs[(target, *rest)] = value  # type: ignore[index]
        for each in self.plain.list(
            at(target) if self.dice.random() < 0.5 else {"configurable": {"thread_id": target}}
        ):
            self.configs.append(each.config)


@pytest.mark.parametrize("awaited", [False, True])
def test_it_answers_as_langgraphs_own(open_saver: OpenSaver, database_url: str, awaited: bool) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    with closing(asyncio.new_event_loop()) as loop:
        world = World(open_saver(), dice, loop if awaited else None)
        calls: dict[Callable[[], object], int] = {
            world.put: 20,
            world.put_writes: 16,
            world.get_tuple: 20,
            world.list: 10,
            world.get_delta_channel_history: 8,
            world.delete_thread: 1,
            world.delete_for_runs: 1,
            world.prune: 1,
            world.copy_thread: 1,
            world.settle: 1,
        }
        for call in dice.choices([*calls], [*calls.values()], k=CALLS):
            call()
    world.settle()
    with outside(database_url) as sql:
        assert sql(ORPHANS) == [(0,)]
