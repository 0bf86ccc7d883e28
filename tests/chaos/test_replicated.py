"""Three nodes that keep the log, under agents, writers and readers: leaders killed, stopped, stepped down, disks wiped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.cluster import Cluster

from .conftest import Report
from .evidence import APPENDS
from .replicated import SYSTEM, TIMEOUT, Faults, ReplicatedWorld
from .world import Child, rounds

pytestmark = pytest.mark.chaos
OFF = {"writer": "off"}


@pytest.fixture
def replicated_world(tmp_path: Path, seed: int) -> Iterator[ReplicatedWorld]:
    """A world on three nodes of its own."""
    with Cluster(tmp_path / "cluster", SYSTEM) as cluster, ReplicatedWorld(tmp_path, cluster, seed) as each:
        yield each


def population(world: ReplicatedWorld) -> tuple[list[Child], list[Child]]:
    """Who appends, and who does something else; all are ready."""
    load: dict[str, Any] = {"batches": 0.3, "pace": 0.3, "settings": OFF}
    writing = [
        world.spawn(name="owner", agents=["one", "two"], threads=2, large=0.05, nowait=0.2, **load),
        world.spawn(name="free", agents=["three"], threads=2, large=0.05, claim=False, **load),
        *(world.spawn(name="rival", agents=["four"], own_ids=True, fenced="resume", **load) for _ in range(2)),
    ]
    others = [
        world.spawn(name="hasty", agents=["five"], retries=False, pace=0.1, settings={**OFF, "timeout": 2.5}),
        *(world.spawn("write", "writer") for _ in range(2)),
        world.spawn("browse", "reader", agents=["one", "three", "four"], pace=1.0, settings=OFF),
    ]
    for child in (*writing, *others):
        child.wait_ready()
    return writing, others


def test_nodes_are_lost_one_after_the_other(replicated_world: ReplicatedWorld, report: Report) -> None:
    """Callers with the timeout that the documentation asks for meet no error but a takeover's."""
    world = replicated_world
    writing, others = population(world)
    faults = Faults(world, writing)
    world.wait_whole()
    for _ in range(rounds(1)):
        kinds = list(faults.kinds)
        world.dice.shuffle(kinds)
        for kind in kinds:
            faults.happen(kind)
    for child in (*writing, *others):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict()
    report("21 three nodes: killed, stopped, stepped down, wiped", rounds(1) * len(faults.kinds), verdict)
    assert not verdict.problems, str(verdict)
    calls = [call for call in world.evidence().of(*APPENDS, "resume", "peek", "flush") if call.timeout == TIMEOUT]
    failed = [call for call in calls if call.error and "AgentFenced" not in (call.error, call.result["cause"])]
    print(f"longest wait: {max(call.seconds for call in calls):.1f} s; failed: {len(failed)}")
    assert not failed, failed[:3]


def test_a_trim_that_believes_any_word_is_caught(replicated_world: ReplicatedWorld, report: Report) -> None:
    world = replicated_world
    children = [world.spawn(agents=[agent], pace=0.02, settings=OFF) for agent in ("one", "two")]
    for child in children:
        child.wait_ready()
    broken = world.spawn("write", "broken", break_="trim by any word")
    assert broken.wait() == -signal.SIGKILL, broken.tail()
    for child in children:
        child.kill()
    verdict = world.verdict()
    report("canary: trim by any word, replicated (lost is right here)", 1, verdict)
    assert verdict.lost and any(text.startswith("LOST") for text in verdict.problems), verdict
