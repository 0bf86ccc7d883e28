"""Fencing as a model: owners of both kinds at random, with lost answers, late copies, kills and restarts, judged from outside."""

from __future__ import annotations

import os
import random

import pytest

from tests.fixtures.nats import NatsServer

from .fencing_model import Violation
from .fencing_world import Step, explore, shrunk, steps

ROUNDS = float(os.environ.get("SKIALITH_CHAOS_ROUNDS", "1"))
STEPS = 400
"""Steps of one exploration; ``SKIALITH_CHAOS_ROUNDS=25`` takes 10,000."""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180 * max(1.0, ROUNDS))]


@pytest.fixture
def seed() -> int:
    """``SKIALITH_CHAOS_SEED`` sets it."""
    chosen = int(os.environ.get("SKIALITH_CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"SKIALITH_CHAOS_SEED={chosen}")
    return chosen


def test_owners_fence_each_other(nats_server: NatsServer, seed: int) -> None:
    taken = replayed = writes = 0
    for number in range(max(1, round(ROUNDS))):
        program = steps(seed + number, STEPS)
        try:
            done = explore(nats_server, seed + number, program)
        except Violation as error:
            print(f"SKIALITH_CHAOS_SEED={seed + number}: {error}")

            def fails(shorter: list[Step], seed: int = seed + number) -> bool:
                try:
                    explore(nats_server, seed, shorter)
                except Violation:
                    return True
                return False

            left = shrunk(program, fails, 60.0)
            pytest.fail(f"{error}\nshrunk to {len(left)} steps: {left}")
        taken, replayed, writes = taken + done.done, replayed + done.replayed, writes + len(done.history.writes)
    print(f"{taken} steps, {writes} records, {replayed} late copies sent")
    assert taken == STEPS * max(1, round(ROUNDS))
