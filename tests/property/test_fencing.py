"""Fencing as a model: owners of both kinds at random, with lost answers, late copies, kills and restarts, judged from outside."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.fixtures.chaos_summary import Report
from tests.fixtures.nats import NatsServer

from .fencing_canaries import CANARIES, CANARY_OF_REPLICAS, Canary
from .fencing_model import Violation
from .fencing_sites import MAX_PAYLOAD, OneServer, Site, ThreeServers, UnlistedCluster
from .fencing_steps import Step, directed, shrunk, steps
from .fencing_world import Explorer

ROUNDS = float(os.environ.get("SKIALITH_CHAOS_ROUNDS", "1"))
STEPS = 400
"""Steps of one exploration; ``SKIALITH_CHAOS_ROUNDS=25`` takes 10,000."""
CLUSTER_STEPS = 100
DISTURBED = 4.0
"""The weight of a step that disturbs the cluster; an exploration there has fewer steps."""
WAYS = 6
"""How often an exploration goes the way that leads to a canary's fault."""
CANARY_EXPLORATIONS = 40
"""How many of them may pass before a broken build is caught."""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180 * max(1.0, ROUNDS))]


@pytest.fixture
def seed() -> int:
    """``SKIALITH_CHAOS_SEED`` sets it."""
    chosen = int(os.environ.get("SKIALITH_CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"SKIALITH_CHAOS_SEED={chosen}")
    return chosen


@pytest.fixture
def one_server(tmp_path: Path) -> Iterator[Site]:
    with NatsServer(tmp_path / "nats-server", config=MAX_PAYLOAD) as server:
        yield OneServer(server)


@pytest.fixture
def three_servers(tmp_path: Path) -> Iterator[Site]:
    with UnlistedCluster(tmp_path) as cluster:
        yield ThreeServers(cluster)


def explore(site: Site, seed: int, program: list[Step]) -> Explorer:
    """One exploration. Raises ``Violation``."""
    with closing(Explorer(site, seed)) as explorer:
        explorer.run(program)
    return explorer


def explore_and_report(site: Site, seed: int, program: list[Step], scenario: str, report: Report) -> Explorer:
    with closing(Explorer(site, seed)) as explorer:
        try:
            explorer.run(program)
        finally:
            print(f"SKIALITH_CHAOS_SEED={seed}, {explorer.done} steps, faults: {dict(explorer.faults)}")
            report(scenario, explorer.faults.total(), explorer.result)
    return explorer


def test_owners_fence_each_other(one_server: Site, seed: int, report: Report) -> None:
    taken = 0
    for number in range(seed, seed + max(1, round(ROUNDS))):
        program = steps(number, STEPS)
        try:
            taken += explore_and_report(one_server, number, program, "27 fencing model", report).done
        except Violation as error:

            def fails(shorter: list[Step], seed: int = number) -> bool:
                try:
                    explore(one_server, seed, shorter)
                except Violation:
                    return True
                return False

            left = shrunk(program, fails, 60.0)
            pytest.fail(f"{error}\nshrunk to {len(left)} steps: {left}")
    assert taken == STEPS * max(1, round(ROUNDS))


def test_owners_fence_each_other_on_three_servers(three_servers: Site, seed: int, report: Report) -> None:
    """A server is killed and comes back, or a leader steps down, in the middle of it."""
    for number in range(seed, seed + max(1, round(ROUNDS))):
        program = steps(number, CLUSTER_STEPS, restart=DISTURBED)
        explore_and_report(three_servers, number, program, "27 fencing model, three servers", report)


def assert_caught(site: Site, seed: int, canary: Canary, patch: pytest.MonkeyPatch) -> None:
    canary.break_it(patch)
    caught, number = "", 0
    while not caught and number < CANARY_EXPLORATIONS:
        number += 1
        try:
            explore(site, seed + number, directed(seed + number, canary.way, WAYS))
        except Violation as error:
            caught = str(error)
    print(f"{canary.break_it.__name__}: caught by exploration {number}: {caught}")
    assert re.search(canary.caught, caught), caught


@pytest.mark.parametrize("canary", CANARIES, ids=lambda each: each.break_it.__name__)
def test_a_broken_build_is_caught(one_server: Site, seed: int, canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(one_server, seed, canary, monkeypatch)


def test_a_broken_build_is_caught_on_three_servers(
    three_servers: Site, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_caught(three_servers, seed, CANARY_OF_REPLICAS, monkeypatch)
