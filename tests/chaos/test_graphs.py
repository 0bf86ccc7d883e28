"""Threads of graphs, driven by several users, stored by writers that are killed and frozen: nothing comes back."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Iterator

import pytest

from skialith.graphs import Put
from skialith.langchain import SkialithCheckpointer

from ..fixtures.graph_model import tables
from ..fixtures.graphs import at, put
from ..fixtures.stores import outside
from .graph_world import THREADS, Contradictions, Driver, mirror, mirrored, moments
from .world import World, rounds

pytestmark = pytest.mark.chaos


@contextlib.contextmanager
def savers(world: World, count: int) -> Iterator[list[SkialithCheckpointer]]:
    """Checkpointers with a runtime and a memory of their own each, whose records others store."""
    with contextlib.ExitStack() as stack:
        settings = {**world.options().settings, "writer": "off"}
        made = [SkialithCheckpointer(**{**settings, "timeout": 20.0 + n / 10}) for n in range(count)]
        yield [stack.enter_context(each) for each in made]


def check(world: World, drivers: list[Driver]) -> list[str]:
    """Everything is stored: what contradicts the log's order, in the tables and in what readers were told."""
    with savers(world, 1) as (saver,):
        end = saver._door.open().wal.end(time.monotonic() + 10).seq
        operations = mirrored(world.nats_url, world.namespace, end)
        model, history = moments(operations)
        with outside(world.database_url) as run:
            problems = [tables(run, world.namespace).difference(model.keyed(world.namespace))]
        last = Driver(saver, random.Random(0), "last", 0)
        for thread in THREADS:
            last.look(thread, "", latest=False)
            for ns in ("", "sub"):
                last.look(thread, ns, latest=True)
    checker = Contradictions(history)
    looks = [seen for driver in [*drivers, last] for seen in driver.seen]
    problems += [text for seen in looks for text in checker.of(seen)]
    logged = {change.checkpoint_id for _, change in operations if isinstance(change, Put)}
    acknowledged = [each for driver in drivers for each in driver.put_ids]
    problems += [f"LOST: checkpoint {each}" for each in acknowledged if each not in logged]
    print(
        f"{len(operations)} operations, {len(acknowledged)} puts, {len(looks)} looks, {len(model.cells)} checkpoints left"
    )
    return [text for text in problems if text]


def test_writers_are_killed_and_frozen(world: World) -> None:
    """Two writers of which one is killed at a random moment, and a third that is frozen with a batch until all is stored."""
    with savers(world, 3) as users:
        mirror(world.nats_url, world.namespace)
        writers = [world.spawn("write", "writer") for _ in range(2)]
        point, passage = world.dice.choice(["after pull", "after pull", "before ack"]), world.dice.randrange(1, 4)
        # It dies when it has stored what it held: what was delivered to it meanwhile would put everything right again.
        die = {"after commit": passage} if point == "after pull" else {}
        frozen = world.spawn("write", "frozen", freeze={point: passage}, die=die)
        for child in writers:
            child.wait_ready()
        world.hurry()
        drivers = [
            Driver(saver, random.Random(world.dice.randrange(1 << 32)), f"d{n}", 120 * rounds(1))
            for n, saver in enumerate(users)
        ]
        kills = 0
        while any(driver.thread.is_alive() for driver in drivers):
            time.sleep(world.dice.uniform(0.05, 0.6))
            writers.pop(world.dice.randrange(2)).kill()
            writers.append(world.spawn("write", "writer"))
            writers[-1].wait_ready()
            kills += 1
        for driver in drivers:
            driver.join()
        if frozen.running:
            put(users[0], at("t0"), {"a": 1})  # whatever it waits for comes now
            frozen.wait_frozen()
        for child in writers:
            assert child.stop() == 0, child.tail()
        world.settle()
        frozen.signal(signal.SIGCONT)
        assert frozen.stop() in (0, -signal.SIGKILL), frozen.tail()
        world.settle()
        world.check_exits()
        print(f"{kills} kills, frozen {point}")
    problems = check(world, drivers)
    assert not problems, "\n".join(problems[:20])


@pytest.mark.parametrize("broken", ["", "apply without position"])
def test_a_late_writer(sqlite_world: World, broken: str) -> None:
    """A writer that was frozen with puts in its hands stores them when they have been deleted; one that does not compare
    positions is caught."""
    world = sqlite_world
    with savers(world, 1) as (saver,):
        mirror(world.nats_url, world.namespace)
        world.hurry()
        first = put(saver, at("t0"), {"a": 1}, run_id="run")
        saver.put_writes(first, [("a", 1)], "task")
        second = put(saver, at("t1"), {"a": 2})
        late = world.spawn("write", "late", freeze={"after pull": 1}, die={"after commit": 1}, break_=broken)
        late.wait_frozen()
        saver.delete_for_runs(["run"]) if world.dice.random() < 0.5 else saver.delete_thread("t0")
        saver.put_writes(second, [("a", 2)], "task")
        saver.prune(["t1"], strategy="delete")
        put(saver, at("t1"), {"a": 3})
        world.settle()
        late.signal(signal.SIGCONT)
        assert late.wait() == -signal.SIGKILL, late.tail()
    problems = check(world, [])
    if broken:
        assert any("should not have" in text for text in problems), problems
    else:
        assert not problems, "\n".join(problems)
