"""An order that survives its worker: a Celery task that goes on at the step it had reached.

    pip install 'skialith[local,celery]' 'celery[redis]'
    redis-server --port 6379 --save '' &                                  # the broker
    celery -A celery_tasks worker --pool=prefork --concurrency=2 &        # the worker, in this folder
    python celery_tasks.py                                                # sends an order and waits for it

Kill a pool process (``kill -9``) while it waits: the task is delivered again and goes on with the next step. Kill all of the
worker and start it again: the same, after ``visibility_timeout``.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery

from skialith.integrations.celery import TaskAgent, durable_task

REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0")
STEPS = ["reserve", "charge", "ship"]

app: Any = Celery("celery_tasks", broker=REDIS, backend=REDIS)
# Longer than the longest step: after this Redis takes a worker for dead and delivers its task again.
app.conf.broker_transport_options = {"visibility_timeout": 600}
app.conf.broker_connection_retry_on_startup = True


@durable_task(app, agent_id=lambda order, **_: f"order-{order}")
def fulfil(agent: TaskAgent, order: int, seconds: float = 2.0) -> list[str]:
    """One event and one checkpoint a step; a second run begins behind the last checkpoint."""
    done: list[str] = agent.state.data.get("done", [])
    for step, name in enumerate(STEPS[len(done) :], start=len(done) + 1):
        time.sleep(seconds)  # the work: calls to a model, to a payment service, ...
        agent.save_event(name, {"kind": "step", "order": order, "pid": os.getpid()})
        done = [*done, name]
        agent.checkpoint(step, {"done": done})
    return done


if __name__ == "__main__":
    sent = fulfil.delay(7)
    print("sent", sent.id)
    print("done", sent.get(timeout=120))
