"""Durable tasks in real Celery workers: who dies, who is replaced, and what Redis and the database hold after that."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests.fixtures.celery_plugin import StartWorker
from tests.fixtures.celery_worker import Broker
from tests.fixtures.local_user import wait_gone
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.stores import outside


def stored(settings: dict[str, Any], agent_id: str) -> list[str]:
    """The ids of an agent's events in the database, in order, without those that say that a run began."""
    with outside(settings["database_url"]) as run:
        rows = run(
            "SELECT event_id FROM agent_events WHERE namespace = ? AND agent_id = ? AND event_type <> 'run' "
            "ORDER BY store_time_ns, seq",
            settings.get("namespace", "default"),
            agent_id,
        )
    return [text if isinstance(text, str) else text.decode() for (text,) in rows]


ENDED = "ends without a result"
STEPS = [f"step-{n}" for n in range(1, 6)]


def test_a_killed_child_is_replaced_and_the_task_goes_on_where_it_was(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any], mariadb_url: str
) -> None:
    settings["database_url"] = mariadb_url
    worker = start_worker(concurrency=2)
    worker.folder.hold("within-3")
    sent = broker.send("walk", 5)
    os.kill(worker.folder.wait_held("within-3"), signal.SIGKILL)
    # Step 3 was begun and not checkpointed: its event is there, and saving it again changes nothing.
    assert sent.get(timeout=60)["first"] == 3
    assert worker.stop() == 0
    assert stored(settings, sent.id) == STEPS
    assert broker.unacknowledged() == 0


def test_after_the_whole_worker_was_killed_another_one_goes_on(
    broker: Broker, start_worker: StartWorker, tmp_path: Path
) -> None:
    settings = {"directory": str(tmp_path / ".skialith")}  # the embedded server, which dies with its last user
    first = start_worker(settings=settings, concurrency=1)
    first.folder.hold("within-2")
    sent = broker.send("walk", 5)
    first.folder.wait_held("within-2")
    first.kill()
    second = start_worker(settings=settings, concurrency=1, visibility=1)
    assert sent.get(timeout=60)["first"] == 2
    assert second.stop() == 0
    settings["database_url"] = f"sqlite:///{tmp_path / '.skialith' / 'skialith.db'}"
    assert stored(settings, sent.id) == STEPS
    wait_gone(tmp_path / ".skialith")


def test_the_visibility_timeout_runs_a_task_twice_and_the_older_run_is_fenced(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any]
) -> None:
    older = start_worker(concurrency=1)
    older.folder.hold("within-2")
    sent = broker.send("walk", 5)
    held = older.folder.wait_held("within-2")
    newer = start_worker(concurrency=1, visibility=1.5)
    result = sent.get(timeout=60)
    assert result["pid"] != held
    older.folder.let_go("within-2")
    wait_until(lambda: ENDED in older.text, 30, "the older run was fenced")
    assert "AgentFenced" not in newer.text
    assert (older.stop(), newer.stop()) == (0, 0)
    assert stored(settings, sent.id) == STEPS
    assert sent.get(timeout=5)["pid"] == result["pid"]  # the older run did not store over it
    assert (broker.unacknowledged(), broker.queued()) == (0, 0)


def test_a_fenced_run_leaves_its_message_to_the_newer_one(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any], mariadb_url: str
) -> None:
    settings["database_url"] = mariadb_url
    older, newer = start_worker(concurrency=1, wait=False), start_worker(concurrency=1, wait=False)
    older.wait_ready()
    newer.wait_ready()
    for place in ("within-2", "within-4"):
        older.folder.hold(place)
    sent = broker.send("walk", 5)
    taken = older.folder.wait_held("within-2")
    if taken in newer.children():
        older, newer = newer, older
    broker.expire()
    older.folder.wait_held("within-4")
    assert broker.unacknowledged() == 1
    older.folder.let_go("within-2")
    wait_until(lambda: ENDED in older.text, 30, "the older run was fenced")
    broker.send("threads").get(timeout=30)  # the newer worker is busy, so the older one has room again
    assert older.stop() == 0
    # Had it acknowledged, nobody would run the task if the newer worker died now; had it given back, a third run would begin.
    assert (broker.unacknowledged(), broker.queued()) == (1, 0)
    assert sent.state == "PENDING"
    newer.folder.let_go("within-4")
    assert sent.get(timeout=60)["first"] == 2
    assert newer.stop() == 0
    assert broker.unacknowledged() == 0
    assert stored(settings, sent.id) == STEPS


def test_two_runs_in_one_process_are_told_apart(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any]
) -> None:
    worker = start_worker(pool="threads", concurrency=2)
    worker.folder.hold("within-2")
    sent = broker.send("walk", 5)
    assert worker.folder.wait_held("within-2") == worker.pid
    broker.expire()
    assert sent.get(timeout=60)["first"] == 2
    worker.folder.let_go("within-2")
    wait_until(lambda: ENDED in worker.text, 30, "the older run was fenced")
    assert worker.stop() == 0
    assert stored(settings, sent.id) == STEPS
    assert (broker.unacknowledged(), broker.queued()) == (0, 0)


def test_an_older_run_that_writes_nothing_more_stores_no_result(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any]
) -> None:
    worker = start_worker(concurrency=2)
    worker.folder.hold("end")
    older = broker.send("order", 7)
    worker.folder.wait_held("end")
    newer = broker.send("order", 7)  # another task of the same agent
    assert newer.get(timeout=60)["first"] == 4
    worker.folder.let_go("end")
    wait_until(lambda: ENDED in worker.text, 30, "the older run was fenced")
    assert older.state == "PENDING"
    assert broker.unacknowledged() == 1
    broker.expire()
    # Redelivered, it finds everything done.
    assert older.get(timeout=60)["first"] == 4
    assert worker.stop() == 0
    assert stored(settings, "7") == STEPS[:3]


def test_a_log_that_is_away_retries_the_task(
    broker: Broker, start_worker: StartWorker, settings: dict[str, Any], nats_server: NatsServer
) -> None:
    settings.update(nats_url=nats_server.url, timeout=1)
    worker = start_worker(concurrency=1)
    worker.folder.hold("within-2")
    sent = broker.send("walk", 5)
    worker.folder.wait_held("within-2")
    nats_server.stop()
    worker.folder.let_go("within-2")
    wait_until(lambda: "Retry in" in worker.text, 30, "the task is retried")
    nats_server.start()
    assert sent.get(timeout=60)["first"] == 2
    assert worker.stop() == 0
    assert stored(settings, sent.id) == STEPS
    assert broker.unacknowledged() == 0
