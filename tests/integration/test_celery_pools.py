"""Plain agents in Celery's pools, and how worker processes end: all stored, no lease, thread or process left."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from skialith import UnsupportedEnvironment
from tests.fixtures.agents import OpenAgent
from tests.fixtures.celery_plugin import StartWorker
from tests.fixtures.celery_worker import Broker, CeleryWorker
from tests.fixtures.nats import wait_until
from tests.fixtures.stores import outside


def counts(settings: dict[str, Any]) -> dict[str, int]:
    """Events of every agent in the database."""
    with outside(settings["database_url"]) as run:
        query = "SELECT agent_id, COUNT(*), COUNT(DISTINCT event_id) FROM agent_events WHERE namespace = ? GROUP BY agent_id"
        rows = run(query, settings["namespace"])
    assert all(found == distinct for _, found, distinct in rows)
    return {agent if isinstance(agent, str) else agent.decode(): found for agent, found, _ in rows}


def owned(open_agent: OpenAgent, agents: Iterable[str]) -> list[str]:
    """Those of the agents that have a lease in the log."""
    wal = open_agent("observer", writer="off")._runtime.wal
    subjects = {agent: wal.stream.subjects.lease(agent) for agent in agents}
    return [agent for agent, subject in subjects.items() if wal.call(partial(wal.stream.last_message, subject), 5)]


def assert_ended_cleanly(worker: CeleryWorker) -> None:
    assert worker.stop() == 0, worker.text
    with pytest.raises(ProcessLookupError):
        os.killpg(worker.pid, 0)
    for trouble in ("Traceback", "signal ", "closing", "stays until it ages out"):
        assert trouble not in worker.text


def test_eight_children_store_ten_thousand_events_once(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any], mariadb_url: str
) -> None:
    settings["database_url"] = mariadb_url
    # The parent opens an agent and uses it before it forks; the children use it too, and agents of their own.
    worker = start_worker(concurrency=8, TEST_PARENT="yes")
    expected = {f"agent-{n}": 100 for n in range(100)}
    children = {pid for pid, _ in broker.results([broker.send("plain", agent, 100) for agent in expected])}
    assert len(children) > 1
    assert worker.pid not in children
    assert_ended_cleanly(worker)
    assert counts(settings) == {**expected, "parent": 101}


@pytest.mark.parametrize(("tasks", "sent"), [(1, 6), (4, 12)])
def test_children_that_are_replaced_after_some_tasks_leave_nothing(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any], open_agent: OpenAgent, tasks: int, sent: int
) -> None:
    worker = start_worker(f"--max-tasks-per-child={tasks}", concurrency=2)
    agents = [f"agent-{n}" for n in range(sent)]
    children = broker.results([broker.send("keep", agent, 200) for agent in agents])
    finished = {pid for pid, count in Counter(children).items() if count == tasks}
    assert len(finished) >= sent / tasks - 1
    theirs = {agent: 200 for agent, pid in zip(agents, children, strict=True) if pid in finished}
    wait_until(lambda: not finished & worker.children(), 30, "the children ended")
    assert theirs.items() <= counts(settings).items()
    assert owned(open_agent, theirs) == []
    assert_ended_cleanly(worker)
    assert counts(settings) == dict.fromkeys(agents, 200)
    assert owned(open_agent, agents) == []


def test_a_warm_shutdown_finishes_what_runs(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any], open_agent: OpenAgent
) -> None:
    worker = start_worker(concurrency=2)
    for place in ("within-1", "within-2"):
        worker.folder.hold(place)
    sent = [broker.send("order", n) for n in range(2)]
    for place in ("within-1", "within-2"):
        worker.folder.wait_held(place)
    later = broker.send("order", 2)
    worker.terminate()
    wait_until(lambda: "Warm shutdown" in worker.text, 30, "the worker got the signal")
    for place in ("within-1", "within-2"):
        worker.folder.let_go(place)
    assert [result["first"] for result in broker.results(sent)] == [1, 1]
    assert_ended_cleanly(worker)
    assert counts(settings) == {"0": 4, "1": 4}
    assert owned(open_agent, ["0", "1"]) == []
    assert (later.state, broker.queued(), broker.unacknowledged()) == ("PENDING", 1, 0)


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_pools_without_children(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any], open_agent: OpenAgent, pool: str
) -> None:
    worker = start_worker(pool=pool, concurrency=4)
    expected = {f"agent-{n}": 50 for n in range(8)}
    done = broker.results([broker.send("plain", agent, 50) for agent in expected])
    assert {pid for pid, _ in done} == {worker.pid}
    assert (len({thread for _, thread in done}) > 1) == (pool == "threads")
    # The last agent that was closed stopped the runtime. One that is kept runs it on, until the worker ends.
    assert broker.send("threads").get(timeout=30) == []
    assert broker.send("keep", "kept", 50).get(timeout=30) == worker.pid
    assert "skialith-writer" in broker.send("threads").get(timeout=30)
    assert_ended_cleanly(worker)
    assert counts(settings) == {**expected, "kept": 50}
    assert owned(open_agent, ["kept", *expected]) == []


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_green_threads_are_refused(broker: Broker, start_worker: StartWorker, tmp_path: Path, pool: str) -> None:
    worker = start_worker(pool=pool)
    for task in (broker.send("plain", "a", 1), broker.send("walk", 1)):
        with pytest.raises(
            UnsupportedEnvironment, match=r"gevent/eventlet.*for Celery: --pool=prefork, threads or solo"
        ):
            task.get(timeout=30)
    assert "Retry in" not in worker.text
