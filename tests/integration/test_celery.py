"""Durable tasks in real Celery workers: who dies, who is replaced, who goes on where, and what Redis and the database then hold."""

from __future__ import annotations

import os
import signal
from typing import Any

from tests.fixtures.celery_plugin import StartWorker
from tests.fixtures.celery_worker import Broker
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
