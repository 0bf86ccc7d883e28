"""Sidecars that are stopped, killed, frozen and taken turns with, under clients that write down what they are told."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skialith.wal.local import LocalServer
from tests.fixtures.nats import NatsServer, free_port
from tests.fixtures.sidecar import Sidecar

from . import faults
from .conftest import Report
from .over_http import Answer, Client, at_work, mixed, serve, wait_answers
from .world import World, rounds

pytestmark = pytest.mark.chaos

GOES_AWAY = {"refused", "RemoteDisconnected", "ConnectionResetError", "BrokenPipeError", "IncompleteRead"}
"""What clients see of a sidecar that is not there any more."""
PATIENCE = 0.3
"""Seconds after which an impatient client gives a request up."""


def kinds(clients: list[Client]) -> set[str]:
    return {answer.kind for client in clients for answer in client.answers if not answer.ok}


# ---- ended


@pytest.mark.parametrize("workers", [1, 2])
def test_told_to_stop_under_load(sqlite_world: World, report: Report, workers: int) -> None:
    """What was answered is in the database when the process has ended, before any other writer comes."""
    world, runs = sqlite_world, rounds(1)
    for run in range(runs):
        clients = [Client(world, f"a{n}", [port := free_port()], f"r{run}") for n in range(1)]
        clients += [Client(world, f"a{n}", [port], f"r{run}", keeps=n % 2 == 0) for n in range(1, 8)]
        with serve(world, "--workers", str(workers), port=port) as made, at_work(clients, mixed) as stopping:
            wait_answers(clients, 20)
            time.sleep(world.dice.uniform(0, 0.3))
            assert made.stop() == 0, made.log
            stopping.set()
        assert kinds(clients) <= GOES_AWAY | {"stopping"}, kinds(clients)
    verdict = world.verdict(settle=False, steady=True)
    report(f"20 sidecar told to stop, {workers} worker(s)", runs, verdict)
    assert not verdict.problems, str(verdict)


def test_killed_under_load(mariadb_world: World, report: Report) -> None:
    """Clients make their calls again with the same ids and the same lease, until they are answered."""
    kill_again_and_again(mariadb_world, rounds(2))
    verdict = mariadb_world.verdict(steady=True)
    report("20 sidecar killed, MariaDB", rounds(2), verdict)
    assert not verdict.problems, str(verdict)


def test_killed_under_load_with_its_own_server(embedded_world: World, report: Report) -> None:
    """The embedded server ends with its last user, so each new sidecar has a new one, on the same store."""
    world = embedded_world
    kill_again_and_again(world, rounds(1))
    with embedded(world):
        verdict = world.verdict()
    report("20 sidecar killed, embedded server", rounds(1), verdict)
    assert not verdict.problems, str(verdict)


def kill_again_and_again(world: World, kills: int) -> None:
    port = free_port()
    clients = [Client(world, f"a{n}", [port], keeps=n % 2 == 0) for n in range(6)]
    with at_work(clients, mixed):
        for _ in range(kills):
            with serve(world, port=port) as made:
                wait_answers(clients, 10)
                time.sleep(world.dice.uniform(0, 0.4))
                made.stop(signal.SIGKILL)
        with serve(world, port=port):
            wait_answers(clients, 5)
    assert kinds(clients) <= GOES_AWAY | {"log-unavailable", "stopping"}, kinds(clients)


def test_killed_at_every_named_point(sqlite_world: World, report: Report) -> None:
    """Each sidecar kills itself at the nth passage of a point on a record's path; clients go on at the next one. The short run
    takes some of the points, by its dice."""
    world, port = sqlite_world, free_port()
    points = list(faults.POINTS) * rounds(1)
    world.dice.shuffle(points)
    points = points[: rounds(4)]
    clients = [Client(world, f"a{n}", [port]) for n in range(3)]
    with at_work(clients, mixed):
        for point in points:
            passage = world.dice.randrange(1, 8 if point in faults.WRITER_POINTS else 40)
            print(point, passage)
            with serve(world, port=port, die={point: passage}) as made:
                assert made.process.wait(60) == -signal.SIGKILL, made.log
        with serve(world, port=port):
            wait_answers(clients, 5)
    verdict = world.verdict(steady=True)
    report("20 sidecar killed at every named point", len(points), verdict)
    assert not verdict.problems, str(verdict)


@pytest.fixture
def embedded_world(tmp_path: Path, seed: int) -> Iterator[World]:
    """A world on what a sidecar starts by itself."""
    with World(tmp_path, "", f"sqlite:///{tmp_path / '.skialith' / 'skialith.db'}", seed) as each:
        yield each


@contextlib.contextmanager
def embedded(world: World) -> Iterator[None]:
    """The world's embedded server, for others than its sidecars."""
    server = LocalServer(world.place / ".skialith", durability="process", binary=None)
    world.nats_url = server.acquire(20.0).url
    try:
        yield
    finally:
        server.release()


# ---- one owner at several sidecars


def test_an_owner_alternates_between_workers(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    with serve(world, "--workers", "2") as made:
        clients = [Client(world, f"a{n}", [made.port], keeps=False) for n in range(2)]
        with at_work(clients, alternate):
            wait_answers(clients, rounds(80))
    finish(world, report, "20 sidecar: owners at two workers", 2)


def test_an_owner_alternates_between_sidecars_that_freeze(tmp_path: Path, seed: int, report: Report) -> None:
    """And the server of the log is killed now and then."""
    with (
        NatsServer(tmp_path / "nats-server") as nats,
        World(tmp_path, nats.url, f"sqlite:///{tmp_path / 'skialith.db'}", seed) as world,
    ):
        freezes = rounds(6)
        with serve(world) as one, serve(world) as other:
            clients = [Client(world, f"a{n}", [one.port, other.port]) for n in range(3)]
            with at_work(clients, alternate):
                for n in range(freezes):
                    wait_answers(clients, 5)
                    freeze(world, world.dice.choice([one, other]))
                    if n % 4 == 2:
                        nats.restart()
        finish(world, report, "20 sidecar: owners at two that freeze", freezes)


def freeze(world: World, made: Sidecar) -> None:
    made.process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(world.dice.uniform(0.05, 2.5 * PATIENCE))
    finally:
        made.process.send_signal(signal.SIGCONT)


def alternate(client: Client, stopping: threading.Event) -> None:
    """Checkpoint after checkpoint, each at any of the ports. Some are given up, and then the next one is written elsewhere or
    at the same; after an answer the state is looked at."""
    assert client.until_answered(client.resume, stopping).ok
    dice, step = client.dice, 0
    while not stopping.is_set():
        step += 1
        token, large = client.identity(), dice.random() < 0.2
        if dice.random() < 0.3:
            delay = dice.choice([0.0, 0.0, 0.001, 0.003, 0.01])
            client.checkpoint(step, token, large=large, given_up=lambda: time.sleep(delay))  # noqa: B023 - called at once
            continue
        while (
            not (answer := client.checkpoint(step, token, large=large, patience=PATIENCE)).ok and not stopping.is_set()
        ):
            assert answer.document["retryable"], answer
            if dice.random() < 0.5:
                break
        if answer.ok:
            client.until_answered(client.state, stopping)


def finish(world: World, report: Report, scenario: str, runs: int) -> None:
    verdict = world.verdict()
    report(scenario, runs, verdict)
    assert not verdict.problems, str(verdict)


# ---- several owners


def test_owners_take_an_agent_from_each_other(sqlite_world: World, report: Report) -> None:
    world = sqlite_world
    with serve(world) as one, serve(world) as other:
        clients = [Client(world, "agent", [one.port, other.port], f"owner{n}") for n in range(3)]
        with at_work(clients, own_in_turns):
            wait_answers(clients, rounds(60))
    takeovers = sum(1 for call in world.evidence().of("resume") if not call.error)
    fenced = [answer for client in clients for answer in client.answers if answer.status == 409]
    owners = {client.notebook.name for client in clients}
    assert fenced and all(answer.kind == "fenced" and answer.document["owner"] in owners for answer in fenced), fenced
    finish(world, report, "20 sidecar: owners in turns", takeovers)
    assert takeovers > 10


def own_in_turns(client: Client, stopping: threading.Event) -> None:
    """Write until another one owns the agent; then own it again."""
    step = 0
    while not stopping.is_set():
        assert client.until_answered(client.resume, stopping).ok or stopping.is_set()
        answer = Answer(200)
        while answer.ok and not stopping.is_set():
            step += 1
            if client.dice.random() < 0.5:
                answer = client.event()
            elif client.dice.random() < 0.3:
                answer = client.events([client.identity() for _ in range(client.dice.randrange(2, 30))])
            else:
                answer = client.checkpoint(step)
        assert answer.ok or answer.status == 409, answer
        stopping.wait(client.dice.uniform(0, 0.05))
