"""The servers killed under load while the children live, and everything killed at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from skialith.wal.local import inspect
from tests.fixtures.local_user import kill_all, processes
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer

from . import outside
from .conftest import Report
from .evidence import APPENDS
from .script import Options
from .world import World, rounds

pytestmark = pytest.mark.chaos


def test_nats_server_killed_and_restarted(tmp_path: Path, seed: int, report: Report) -> None:
    """Callers get answers by their deadlines, and what an error says of a record is true."""
    database = f"sqlite:///{tmp_path / 'skialith.db'}"
    with NatsServer(tmp_path / "nats") as server, World(tmp_path, server.url, database, seed) as world:
        patient = world.spawn(agents=["one", "two"], threads=2, large=0.05, pace=0.02, settings={"timeout": 1.5})
        hasty = {"timeout": 1.0, "writer": "off"}
        careless = world.spawn(agents=["three"], retries=False, batches=0.5, pace=0.02, settings=hasty)
        children = [patient, careless]
        for child in children:
            child.wait_ready()
        kills = rounds(4)
        for number in range(kills):
            time.sleep(world.dice.uniform(0.05, 0.5))
            server.kill()
            # Sometimes longer than a call may take.
            time.sleep(2.0 if number % 3 == 1 else world.dice.uniform(0, 0.6))
            server.start()
            for child in children:
                child.wait_writes(5)
        for child in children:
            assert child.stop() == 0, child.tail()
        verdict = world.verdict()
        report("3 nats-server killed and restarted", kills, verdict)
        assert not verdict.problems, str(verdict)
        errors = world.evidence().errors(*APPENDS)
        assert errors and errors <= {"WalUnavailable", "BatchFailed"}, errors


def test_mariadb_killed_and_restarted(tmp_path: Path, nats_url: str, seed: int, report: Report) -> None:
    """Agents do not notice: no call fails or takes long, whoever resumes meanwhile waits at most for the database."""
    with MariaDB(tmp_path / "mariadb") as server, World(tmp_path, nats_url, server.url("chaos"), seed) as world:
        children = [
            world.spawn(agents=["one", "two"], threads=2, large=0.02, pace=0.05),
            world.spawn(agents=["three"], batches=0.5, pace=0.05, settings={"writer": "off"}),
        ]
        for child in children:
            child.wait_ready()
        kills = rounds(3)
        for number in range(kills):
            time.sleep(world.dice.uniform(0.1, 0.8))
            server.kill()
            if number == 0:
                children.append(world.spawn(agents=["late"], pace=0.05))  # starts without a database
            time.sleep(world.dice.uniform(0, 1.5))
            for child in children[:2]:
                child.wait_writes(20)
            server.start()
        children[2].wait_ready()
        children[2].wait_writes(20)
        for child in children:
            assert child.stop() == 0, child.tail()
        verdict = world.verdict(steady=True)
        report("4 MariaDB killed and restarted", kills, verdict)
        assert not verdict.problems, str(verdict)
        evidence = world.evidence()
        assert not evidence.errors(*APPENDS)
        slowest = max(call.seconds for call in evidence.of(*APPENDS))
        print(f"slowest append: {slowest:.3f} s")
        assert slowest < 2.0


class EmbeddedWorld(World):
    """A world whose children share the embedded server and SQLite file of one directory."""

    def __init__(self, place: Path, seed: int) -> None:
        self.directory = place / ".skialith"
        super().__init__(place, "", f"sqlite:///{self.directory / 'skialith.db'}", seed)

    def options(self, name: str = "child", **given: Any) -> Options:
        embedded = {"nats_url": None, "database_url": None, "directory": str(self.directory), "timeout": 15.0}
        return super().options(name, **{**given, "settings": {**embedded, **given.get("settings", {})}})

    def log(self) -> outside.LogState:
        return outside.read_log(self._address(), self.namespace)

    def hurry(self) -> None:
        outside.hurry(self._address(), self.namespace)

    def _address(self) -> str:
        address = inspect(self.directory)
        assert address is not None, "no server runs"
        return address.url


def test_embedded_default_with_everything_killed(tmp_path: Path, seed: int, report: Report) -> None:
    """Two that start at once; then one of them, the server, the watcher or everything is killed, again and again."""
    with EmbeddedWorld(tmp_path, seed) as world:
        try:
            kills = rounds(4)
            for number in range(kills):
                pair = [world.spawn(agents=[agent], threads=2) for agent in ("one", "two")]
                for child in pair:
                    child.wait_ready()
                time.sleep(world.dice.uniform(0, 0.5))
                running = processes(world.directory)
                if number % 2:
                    for pid in running[world.dice.choice(["server", "watcher"])]:
                        os.kill(pid, signal.SIGKILL)
                    pair[0].kill()
                    pair[1].wait_writes(5)
                    assert pair[1].stop() == 0, pair[1].tail()
                else:
                    for child in pair:
                        child.signal(signal.SIGKILL)
                    kill_all(world.directory)
            keeper = world.spawn("write", "keeper", settings={"writer": "off"})
            keeper.wait_ready()
            verdict = world.verdict()
            assert keeper.stop() == 0, keeper.tail()
        finally:
            for child in world.children:
                child.kill()
            kill_all(world.directory)
    report("9 embedded, everything killed", kills, verdict)
    assert not verdict.problems, str(verdict)
