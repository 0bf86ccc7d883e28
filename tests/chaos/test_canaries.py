"""Skialith broken on purpose, in a child: a checker that does not catch it could not catch anything."""

from __future__ import annotations

import signal
import time

import pytest

from .conftest import Report
from .over_http import Client, at_work, mixed, serve, wait_answers
from .world import World

pytestmark = pytest.mark.chaos
OFF = {"writer": "off"}


def test_ack_before_commit_is_caught(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    child = world.spawn(agents=["one"], steps=10, pace=0.1, settings=OFF)
    child.wait_for(bool, "has begun")
    broken = world.spawn("write", "broken", break_="ack before commit")
    assert broken.wait() == -signal.SIGKILL, broken.tail()
    assert child.wait() == 0, child.tail()
    verdict = world.verdict()
    report("canary: ack before commit (lost is right here)", 1, verdict)
    assert verdict.lost and any(text.startswith("LOST") for text in verdict.problems), verdict


def test_acknowledge_before_durable_is_caught(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    world.spawn("write", "writer").wait_ready()
    broken = world.spawn(agents=["one"], threads=2, break_="acknowledge before durable", settings=OFF)
    broken.wait_ready()
    broken.wait_writes(200)
    broken.kill()
    verdict = world.verdict()
    report("canary: acknowledge before durable (lost is right here)", 1, verdict)
    assert verdict.lost and any(text.startswith("LOST") for text in verdict.problems), verdict


def test_store_without_key_is_caught(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    child = world.spawn(agents=["one"], steps=10, settings=OFF)
    assert child.wait() == 0, child.tail()
    broken = world.spawn("write", "broken", break_="store without key")
    assert broken.wait() == -signal.SIGKILL, broken.tail()
    verdict = world.verdict()
    report("canary: store without key (doubled is right here)", 1, verdict)
    assert verdict.duplicates and any(text.startswith("DOUBLED") for text in verdict.problems), verdict


def test_write_unfenced_is_caught(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    world.spawn("write", "writer").wait_ready()
    broken = world.spawn(agents=["one"], own_ids=True, break_="write unfenced", settings=OFF)
    broken.wait_ready()
    other = world.spawn(agents=["one"], own_ids=True, settings=OFF)
    other.wait_ready()
    other.wait_writes(10)
    time.sleep(0.2)
    for child in (broken, other):
        child.kill()
    verdict = world.verdict()
    report("canary: write unfenced", 1, verdict)
    assert any(text.startswith("FENCE") for text in verdict.problems), verdict


def test_a_sidecar_that_answers_before_the_record_is_durable_is_caught(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    with serve(world, break_="answer before durable") as made:
        clients = [Client(world, "one", [made.port])]
        with at_work(clients, mixed) as stopping:
            wait_answers(clients, 20)
            made.stop(signal.SIGKILL)
            stopping.set()
    verdict = world.verdict()
    report("canary: sidecar answers too early (lost is right here)", 1, verdict)
    assert verdict.lost and any(text.startswith("LOST") for text in verdict.problems), verdict


def test_a_sidecar_that_writes_for_any_owner_is_caught(sqlite_world: World, report: Report) -> None:
    """Two owners, and one that gives requests up: both promises are broken."""
    world = sqlite_world
    with serve(world, break_="write for any owner") as made:
        rivals = [Client(world, "two", [made.port], f"owner{n}") for n in range(2)]
        hasty = Client(world, "one", [made.port])
        assert all(client.resume().ok for client in (*rivals, hasty))
        for step in range(1, 30, 2):
            for client in rivals:
                assert client.event().ok
            hasty.checkpoint(step, large=True, given_up=lambda: None)
            assert hasty.checkpoint(step + 1).ok
            assert hasty.state().ok
        for client in (*rivals, hasty):
            client.close()
    verdict = world.verdict()
    report("canary: sidecar writes for any owner", 1, verdict)
    assert any(text.startswith("FENCE") for text in verdict.problems), verdict
    assert any(text.startswith(("RESUME went back", "ORDER")) for text in verdict.problems), verdict
