"""Every way into a server (token, password, nkey, JWT, TLS, mutual TLS), each through a crash of the server; and refusals."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from skialith import ConfigurationError, SkialithAgent, SkialithError, WalUnavailable
from tests.fixtures.access import ACCESS, token
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.wal import new_namespace

KILLS = 2
CONNECT_SECONDS = 1.5
GRACE_SECONDS = 3.0
"""What a busy machine may add."""

each_access = pytest.mark.parametrize("name", list(ACCESS))


def agent_settings(place: Path, **more: Any) -> dict[str, Any]:
    database = f"sqlite:///{place / 'skialith.db'}"
    return {"database_url": database, "namespace": new_namespace(), "wal_bytes": 256 * 1024 * 1024, **more}


def stored_ids(place: Path) -> list[str]:
    """The event ids in the database, one per row, in the order of the log."""
    with sqlite3.connect(place / "skialith.db") as database:
        rows = database.execute("SELECT CAST(event_id AS TEXT) FROM agent_events ORDER BY store_time_ns, seq")
        return [event_id for (event_id,) in rows]


class Writing:
    """A thread that saves one event after the other until it is told to stop, and keeps the ids that were acknowledged."""

    def __init__(self, agent: SkialithAgent) -> None:
        self.saved: list[str] = []
        self.error: SkialithError | None = None
        self._agent = agent
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        while not self._stopping.is_set():
            event_id = f"w{len(self.saved)}"
            try:
                self._agent.save_event(event_id, {"n": len(self.saved)})
            except SkialithError as error:
                self.error = error
                return
            self.saved.append(event_id)

    def wait_more(self, count: int) -> None:
        """Until so many more are acknowledged."""
        wanted = len(self.saved) + count
        wait_until(lambda: len(self.saved) >= wanted or self.error is not None, 20, f"{count} events more")
        assert self.error is None

    def stop(self) -> list[str]:
        self._stopping.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "save_event hangs"
        assert self.error is None
        return self.saved


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """Every access through the same life, all at once: each of them waits most of the time."""
    folder = tmp_path_factory.mktemp("access")

    def live(name: str) -> None:
        place = folder / name
        place.mkdir()
        access = ACCESS[name](place / "server")
        with access.server, SkialithAgent("agent", **access.settings, **agent_settings(place)) as agent:
            every_verb_and_a_crash(agent, access.server, place)

    with ThreadPoolExecutor(len(ACCESS)) as pool:
        yield {name: pool.submit(live, name) for name in ACCESS}


def every_verb_and_a_crash(agent: SkialithAgent, server: NatsServer, place: Path) -> None:
    many = [(f"e{n}", {"kind": "thought", "n": n}) for n in range(600)]
    assert agent.resume().is_new
    agent.save_event("first", {"n": -1})
    acks = agent.save_events(many)
    assert [ack.seq for ack in acks] == sorted({ack.seq for ack in acks})
    agent.checkpoint(3, {"x": 1})
    assert agent.flush(timeout=20) == 0
    ids = ["first", *(event_id for event_id, _ in many)]
    assert [event.event_id for event in agent.history()] == ids
    writing = Writing(agent)
    for _ in range(KILLS):
        writing.wait_more(20)
        server.restart()
    writing.wait_more(20)
    ids += writing.stop()
    agent.checkpoint(4, {"x": 2})
    assert agent.flush(timeout=25) == 0
    assert [event.event_id for event in agent.history()] == ids
    assert stored_ids(place) == ids
    state = agent.resume()
    assert (state.step_index, state.data) == (4, {"x": 2})


@each_access
def test_every_verb_and_a_crash_of_the_server(lives: dict[str, Future[None]], name: str) -> None:
    """Then the server is killed and restarted while a thread writes: what was acknowledged is there, once, in order."""
    lives[name].result(100)


@each_access
def test_the_wrong_credentials_are_refused_in_one_clear_error(name: str, tmp_path: Path) -> None:
    """It comes in time, says what was refused and shows no secret; nothing of it runs on, and the right ones work."""
    access, settings = ACCESS[name](tmp_path / "server"), agent_settings(tmp_path)
    with access.server:
        before, began = set(threading.enumerate()), time.monotonic()
        with pytest.raises((ConfigurationError, WalUnavailable), match=access.says) as caught:
            SkialithAgent("agent", **access.refused, **settings, timeout=CONNECT_SECONDS)
        assert time.monotonic() - began < CONNECT_SECONDS + GRACE_SECONDS
        assert caught.value.outcome == "not_written"
        assert isinstance(caught.value, ConfigurationError) or name == "mutual_tls"  # there the server merely hangs up
        assert not any(secret in str(caught.value) for secret in access.hidden)
        wait_until(lambda: not set(threading.enumerate()) - before, 5, "the threads of the refused agent end")
        with SkialithAgent("agent", **access.settings, **settings) as agent:
            assert agent.save_event("e", 1).seq > 0


def test_credentials_that_are_taken_back_and_given_again(tmp_path: Path) -> None:
    """While the server refuses, each call fails by its deadline and says why; afterwards the same agent goes on."""
    access = token(tmp_path / "server")
    right = access.server.token
    settings = agent_settings(tmp_path, timeout=1.5)
    with access.server, SkialithAgent("agent", **access.settings, **settings) as agent:
        agent.resume()
        agent.save_event("before", 1)
        access.server.token = "another"
        access.server.restart()
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(WalUnavailable, match=r"(?i)authorization|credentials"):
                agent.save_event("meanwhile", 2)
            assert time.monotonic() - began < 1.5 + GRACE_SECONDS
        access.server.token = right
        access.server.restart()
        wait_until(lambda: saved(agent, "meanwhile"), 20, "the agent is let in again")
        agent.save_event("after", 3)
        agent.flush(timeout=20)
        assert stored_ids(tmp_path) == ["before", "meanwhile", "after"]


def saved(agent: SkialithAgent, event_id: str) -> bool:
    try:
        agent.save_event(event_id, 2)
    except WalUnavailable:
        return False
    return True
