"""The log put back to an older copy, wiped or deleted while agents, writers and the database live on."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nats
import pytest

from skialith.stores import open_store
from skialith.wal.local_files import STORE_FOLDER, STORE_LOCK
from tests.fixtures.command import skialith
from tests.fixtures.local_user import has_ended, kill_all, processes
from tests.fixtures.nats import NatsServer, wait_until

from . import outside
from .checker import Gone, Verdict
from .conftest import Report
from .test_servers import EmbeddedWorld
from .world import Child, World, rounds

pytestmark = pytest.mark.chaos
OFF = {"writer": "off", "timeout": 20.0}
ON = {"timeout": 20.0}
Down = Callable[[], AbstractContextManager[Path]]
"""Kills the server and keeps it away for a block; gives its store."""


def server_down(server: NatsServer) -> Down:
    @contextlib.contextmanager
    def down() -> Iterator[Path]:
        server.kill()
        yield server.store
        server.start()

    return down


def embedded_down(directory: Path) -> Down:
    """Whoever has the lock of the store is taken for the server, so nobody starts one meanwhile."""

    @contextlib.contextmanager
    def down() -> Iterator[Path]:
        lock = os.open(directory / STORE_LOCK, os.O_RDWR)
        try:
            while True:
                killed = processes(directory)["server"]
                for pid in killed:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                wait_until(lambda killed=killed: all(map(has_ended, killed)), 20, "it has ended")  # type: ignore[misc]
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
            yield directory / STORE_FOLDER
        finally:
            os.close(lock)

    return down


class Older:
    """Takes copies of the store, and puts the last one back later."""

    def __init__(self, world: World, down: Down) -> None:
        self._world, self._down = world, down
        self._copy = world.place / "older"
        self.gone: list[Gone] = []

    def copy(self) -> None:
        shutil.rmtree(self._copy, ignore_errors=True)
        with self._down() as store:
            shutil.copytree(store, self._copy)
            self._since = time.monotonic_ns()

    def put_back(self) -> None:
        with self._down() as store:
            shutil.rmtree(store)
            shutil.copytree(self._copy, store)
            self.gone.append(Gone(self._since, time.monotonic_ns()))


def at_rest(world: World, lost: int) -> Callable[[], bool]:
    """Whether what was stored until ``lost`` (CLOCK_MONOTONIC) has not become more for a while."""
    until_ns = time.time_ns() - time.monotonic_ns() + lost
    seen: list[tuple[int, float]] = []

    def look() -> bool:
        count = stored(world, 0) - stored(world, until_ns)
        if not seen or seen[-1][0] != count:
            seen.append((count, time.monotonic()))
        time.sleep(0.05)
        return time.monotonic() - seen[-1][1] > 1.0

    return look


def stored(world: World, since_ns: int) -> int:
    """Events that are in the database and were not in the log before."""
    query = "SELECT COUNT(*) FROM agent_events WHERE namespace = ? AND store_time_ns > ?"
    with outside.database(world.database_url) as run:
        return int(run(query, (world.namespace, since_ns))[0][0])


def go_back(world: World, older: Older, children: list[Child], times: int) -> None:
    """Again and again: a copy, work of which the last is not stored, the copy put back, work."""
    writer = next(child for child in world.children if "lives on" in child.name)
    for _ in range(times):
        older.copy()
        since = time.time_ns()
        for child in children:
            child.wait_writes(world.dice.randrange(3, 10))
        wait_until(lambda since=since: stored(world, since) >= 10, 30, "some are stored")  # type: ignore[misc]
        writer.signal(signal.SIGSTOP)
        for child in children:
            child.wait_writes(world.dice.randrange(3, 10))
        older.put_back()
        for child in children:
            child.wait_writes(5)
        writer.signal(signal.SIGCONT)
        for child in children:
            child.wait_writes(10)


def at_work(world: World, break_: str = "", writer: str = "") -> list[Child]:
    """Owners of agents, and a writer; either may be broken."""
    how: dict[str, Any] = {"own_ids": True, "fenced": "resume", "pace": 0.1, "most": 6, "flush": True, "break_": break_}
    children = [
        world.spawn(agents=["one", "two"], threads=2, nowait=0.2, large=0.05, settings=OFF, **how),
        world.spawn(agents=["three"], settings=OFF, **how),
    ]
    for child in children:
        child.wait_ready()
    world.spawn("write", "lives on", break_=writer, settings=ON).wait_ready()
    return children


def ended(world: World, children: list[Child], gone: list[Gone]) -> Verdict:
    for child in children:
        assert child.stop() in (0, -signal.SIGTERM), child.tail()  # whoever was fenced is ending by itself
    return world.verdict(gone=gone)


@pytest.fixture
def server_world(tmp_path: Path, seed: int) -> Iterator[tuple[World, NatsServer]]:
    database = f"sqlite:///{tmp_path / 'skialith.db'}"
    with NatsServer(tmp_path / "nats") as server, World(tmp_path, server.url, database, seed) as world:
        yield world, server


def test_an_older_copy_of_one_server_put_back(server_world: tuple[World, NatsServer], report: Report) -> None:
    world, server = server_world
    children, older, times = at_work(world), Older(world, server_down(server)), rounds(2)
    go_back(world, older, children, times)
    options = ["--nats-url", server.url, "--database-url", world.database_url, "--namespace", world.namespace]
    verdict = ended(world, children, older.gone)
    report("23 older copy of the log put back", times, verdict)
    assert not verdict.problems, str(verdict)
    said = skialith(*options, "doctor", "--json", cwd=world.place)
    assert [each["level"] for each in said.document if each["check"] == "losses"] == ["warn"] * times, said.out
    assert skialith(*options, "status", cwd=world.place).code == 0


def test_an_older_copy_of_the_embedded_server_put_back(tmp_path: Path, seed: int, report: Report) -> None:
    with EmbeddedWorld(tmp_path, seed) as world:
        try:
            children, times = at_work(world), rounds(1)
            older = Older(world, embedded_down(world.directory))
            go_back(world, older, children, times)
            verdict = ended(world, children, older.gone)
        finally:
            for child in world.children:
                child.kill()
            kill_all(world.directory)
    report("23 older copy of the log put back, embedded", times, verdict)
    assert not verdict.problems, str(verdict)


def test_whoever_goes_by_sequences_or_does_not_look_is_caught(
    server_world: tuple[World, NatsServer], report: Report
) -> None:
    """A writer that takes what has a sequence that it knows for what it knows; agents that do not look what is lost."""
    world, server = server_world
    children = at_work(world, break_="trust any server", writer="take sequences for records")
    older = Older(world, server_down(server))
    go_back(world, older, children, 1)
    verdict = ended(world, children, older.gone)
    report("canary: sequences taken for records (lost is right here)", 1, verdict)
    assert verdict.lost and any(text.startswith("LOST") for text in verdict.problems), verdict
    assert any(text.startswith("UNNAMED") for text in verdict.problems), verdict


# ---- made anew


def adopt(world: World, seconds: float = 20.0) -> None:
    """What an operator does: the log that is there now feeds the database."""
    deadline = time.monotonic() + seconds
    while not (created := asyncio.run(_created(world))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    store = open_store(world.database_url)
    try:
        store.bind_wal(world.namespace, f"SKIALITH_{world.namespace}@{created}", adopt=True)
    finally:
        store.close()


async def _created(world: World) -> str:
    client = await nats.connect(world.nats_url, connect_timeout=5, allow_reconnect=False)
    try:
        answer = await client.request(f"$JS.API.STREAM.INFO.SKIALITH_{world.namespace}", b"", timeout=5)
        return str(json.loads(answer.data).get("created", ""))
    finally:
        await client.close()


async def _delete(world: World) -> None:
    client = await nats.connect(world.nats_url, connect_timeout=5, allow_reconnect=False)
    try:
        await client.request(f"$JS.API.STREAM.DELETE.SKIALITH_{world.namespace}", b"", timeout=5)
    finally:
        await client.close()


def made_anew(world: World, lose: Callable[[], Any], break_: str = "") -> tuple[list[Child], list[Gone]]:
    """The log is lost under everybody; a newcomer makes another, takes one of the agents over, and the old ones go on."""
    how: dict[str, Any] = {
        "own_ids": True,
        "pace": 0.05,
        "batches": 0.0,
        "flush": True,
        "settings": OFF,
        "break_": break_,
    }
    zombie = world.spawn(agents=["duel"], **how)
    zombie.wait_ready()
    others = at_work(world, break_)
    for child in (zombie, *others):
        child.wait_writes(5)
    zombie.signal(signal.SIGSTOP)
    lose()
    gone = [Gone(0, time.monotonic_ns())]
    newcomer = world.spawn(agents=["duel"], **how)
    adopt(world)
    newcomer.wait_ready()
    newcomer.wait_writes(5)
    wait_until(at_rest(world, gone[0].until), 30, "the writer has stored what it had in its hands")
    zombie.signal(signal.SIGCONT)
    for child in (newcomer, *others):
        child.wait_writes(10)
    return [zombie, newcomer, *others], gone


def test_a_log_wiped_and_made_anew(server_world: tuple[World, NatsServer], report: Report) -> None:
    world, server = server_world

    def lose() -> None:
        server.kill()
        server.wipe()
        server.start()

    children, gone = made_anew(world, lose)
    verdict = ended(world, children, gone)
    report("23 log wiped and made anew", 1, verdict)
    assert not verdict.problems, str(verdict)


def test_a_stream_deleted_under_connected_clients(server_world: tuple[World, NatsServer], report: Report) -> None:
    world, _ = server_world
    children, gone = made_anew(world, lambda: asyncio.run(_delete(world)))
    verdict = ended(world, children, gone)
    report("23 stream deleted and made anew", 1, verdict)
    assert not verdict.problems, str(verdict)


def test_streams_that_begin_at_one_are_caught(server_world: tuple[World, NatsServer], report: Report) -> None:
    """The lease of the old stream matches the one at the same sequence of the new stream."""
    world, _ = server_world
    children, gone = made_anew(world, lambda: asyncio.run(_delete(world)), "leave first_seq out")
    verdict = ended(world, children, gone)
    report("canary: first_seq left out", 1, verdict)
    assert any(text.startswith("FENCE") for text in verdict.problems), verdict
