"""A backlog that is drained: in order, once, and with memory that does not grow with it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from . import outside
from .company import OFF
from .conftest import Report
from .world import ROUNDS, Child, World, rounds

pytestmark = pytest.mark.chaos
RECORDS = 1_000_000 if ROUNDS >= 20 else rounds(25_000)
"""``make chaos`` drains a million."""
AGENTS = [f"agent{n}" for n in range(4)]
GROWTH_BYTES = 14 * 1024 * 1024
"""What a writer may take beyond its size when it is ready: batches, what it fetched ahead, statements of two sinks."""


class Memory:
    """The resident memory of a process, looked at all the time."""

    def __init__(self, child: Child) -> None:
        self.seen: list[tuple[float, int]] = []
        self._file = Path(f"/proc/{child.process.pid}/statm")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def _watch(self) -> None:
        while not self._stopping.is_set():
            self.seen.append((time.monotonic(), int(self._file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")))
            self._stopping.wait(0.05)

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            self._thread.join()

    def growth(self) -> int:
        """The most that it took beyond its size at first."""
        return max(size for _, size in self.seen) - self.seen[0][1]

    def curve(self, points: int = 10) -> str:
        """MiB at equal distances of time."""
        step = max(1, len(self.seen) // points)
        return " ".join(f"{size >> 20}" for _, size in self.seen[::step])


def test_a_backlog_is_drained_with_flat_memory(mariadb_world: World, report: Report) -> None:
    world = mariadb_world
    backlog, memory = drained(world)
    verdict = world.verdict(steady=True)
    report("24 a backlog drained with flat memory", 1, verdict)
    assert not verdict.problems, str(verdict)
    assert verdict.stored == backlog >= 0.8 * RECORDS
    assert memory.growth() < GROWTH_BYTES, memory.curve(40)


def test_a_writer_that_hoards_records_is_caught(sqlite_world: World) -> None:
    _, memory = drained(sqlite_world, break_="hoard records")
    assert memory.growth() > GROWTH_BYTES, memory.curve(40)


def drained(world: World, **given: Any) -> tuple[int, Memory]:
    """How many records there were when a writer began with them, and what it took in memory until they were stored."""
    room = {"wal_bytes": max(256 * 1024 * 1024, 1500 * RECORDS)}
    # About 256 records a step: one batch, some events, a checkpoint.
    steps = RECORDS // 256 // len(AGENTS) + 1
    appenders = [
        world.spawn(agents=[agent], batches=1.0, most=510, steps=steps, settings={**OFF, **room, "timeout": 20.0})
        for agent in AGENTS
    ]
    for child in appenders:
        assert child.wait(RECORDS / 500) == 0, child.tail()
    backlog = sum(count for subject, count in world.log().subjects.items() if ".log." in subject)
    writer = world.spawn("write", "writer", settings={**room, "writer": "on"}, **given)
    writer.wait_ready()
    memory, began = Memory(writer), time.monotonic()
    with memory.watched():
        last = outside.read_progress(world.nats_url, world.namespace).last
        outside.watch(
            world.nats_url,
            world.namespace,
            lambda at, seen: seen.settled >= last or at > began + RECORDS / 500,
            every=0.2,
        )
    seconds = time.monotonic() - began
    print(f"{backlog} records in {seconds:.1f} s, {backlog / seconds:.0f}/s; resident MiB over time: {memory.curve()}")
    assert writer.stop() == 0, writer.tail()
    return backlog, memory
