"""``durable_task`` as a decorator: its agent's id, its options, its retries; and the programs that newcomers copy."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject, Retry

from skialith import AgentFenced, InvalidArgument, SkialithAgent, WalUnavailable, runtime
from skialith.config import TASK_RETRIES
from skialith.integrations.celery import Replaced, TaskAgent, durable_task
from tests.fixtures.agents import OpenAgent
from tests.fixtures.celery_plugin import StartWorker
from tests.fixtures.celery_worker import Broker

ROOT = Path(__file__).parents[2]


@pytest.fixture
def app() -> Any:
    """An application without a broker: tasks run in this process."""
    app: Any = Celery("here", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_store_eager_result = True
    return app


@pytest.fixture
def here(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings of tasks in this process, whose runtime would stay open until it ends."""
    yield settings
    runtime.close_all()


def test_the_id_of_the_agent(app: Any, here: dict[str, Any]) -> None:
    def name(agent: TaskAgent, order: int, *, who: str = "nobody") -> str:
        return agent.agent_id

    by_task = durable_task(app, name="a", settings=here)(name)
    sent = by_task.apply((1,))
    assert sent.get() == sent.id
    by_argument = durable_task(app, name="b", agent_id="order", settings=here)(name)
    assert [by_argument.apply((7,)).get(), by_argument.apply((), {"order": "x"}).get()] == ["7", "x"]
    by_default = durable_task(app, name="c", agent_id="who", settings=here)(name)
    assert by_default.apply((7,)).get() == "nobody"
    by_call = durable_task(app, name="d", agent_id=lambda order, **_: f"order {order}", settings=here)(name)
    assert by_call.apply((7,), {"who": "me"}).get() == "order 7"
    assert by_call(8) == "order 8"  # called directly, without Celery


@pytest.mark.parametrize("value", [None, True, 1.5, [], ""])
def test_what_is_no_id(app: Any, here: dict[str, Any], value: object) -> None:
    @durable_task(app, agent_id="x", settings=here)
    def task(agent: TaskAgent, x: object) -> None:
        raise AssertionError("it has no agent")

    with pytest.raises(InvalidArgument, match="id"):
        task.apply((value,)).get()


def test_a_task_that_is_called_directly_has_no_id(app: Any, here: dict[str, Any]) -> None:
    @durable_task(app, settings=here)
    def task(agent: TaskAgent) -> None:
        raise AssertionError("it has no agent")

    with pytest.raises(InvalidArgument, match="called directly, a task has no id"):
        task()


def test_functions_that_cannot_be_durable_tasks_are_refused_at_once(app: Any) -> None:
    with pytest.raises(InvalidArgument, match="must take its agent first"):
        durable_task(app)(lambda: None)
    with pytest.raises(InvalidArgument, match="must take the task and its agent first"):
        durable_task(app, bind=True)(lambda agent: None)
    with pytest.raises(InvalidArgument, match=r"agent_id='other': the task has no such argument, it has \(order\)"):
        durable_task(app, agent_id="other")(lambda agent, order: None)


def test_celery_sees_the_task_as_it_is_called(app: Any, here: dict[str, Any]) -> None:
    @durable_task(app, bind=True, settings=here, acks_late=False, rate_limit="10/s")
    def work(self: Any, agent: TaskAgent, order: int, task: str = "x") -> list[Any]:
        """What it does."""
        return [self.name, self.request.id, agent.state.is_new, order, task]

    sent = work.apply((1,), {"task": "y"})
    assert sent.get() == [work.name, sent.id, True, 1, "y"]
    assert (work.name, work.__doc__) == (f"{__name__}.work", "What it does.")
    assert (work.acks_late, work.reject_on_worker_lost, work.rate_limit, work.max_retries) == (
        False,
        True,
        "10/s",
        TASK_RETRIES,
    )
    for wrong in ((), (1, 2, 3)):
        with pytest.raises(TypeError):
            work.apply_async(wrong)  # refused before it is sent
    assert list(inspect.signature(work.run).parameters)[-2:] == ["order", "task"]


def test_an_agent_goes_on_and_is_given_up(app: Any, here: dict[str, Any], open_agent: OpenAgent) -> None:
    @durable_task(app, agent_id="order", settings=here)
    def step(agent: TaskAgent, order: int) -> int:
        agent.checkpoint(agent.state.step_index + 1, {})
        assert agent.resume().step_index == agent.state.step_index
        return agent.state.step_index

    assert [step.apply((1,)).get() for _ in range(3)] == [1, 2, 3]
    wal = open_agent("1")._runtime.wal
    assert wal.call(lambda: wal.stream.last_message(wal.stream.subjects.leases), 5) is None


def test_errors(app: Any, here: dict[str, Any]) -> None:
    tries: list[int] = []

    @durable_task(app, bind=True, settings=here, max_retries=2, retry_backoff=0)
    def work(self: Any, agent: TaskAgent, error: Exception) -> None:
        tries.append(self.request.retries)
        raise error

    def run(error: Exception) -> list[int]:
        tries.clear()
        with pytest.raises(type(error)):
            work.apply((error,)).get()
        return list(tries)

    assert run(WalUnavailable("away")) == [0, 1, 2]
    assert run(InvalidArgument("no")) == [0]
    assert run(ValueError("no")) == [0]
    assert run(AgentFenced("another agent", agent_id="another")) == [0]  # the task's own is still its own


def test_a_newer_run_in_the_same_process_takes_over(app: Any, here: dict[str, Any], open_agent: OpenAgent) -> None:
    seen: list[Exception] = []

    @durable_task(app, agent_id="order", settings=here)
    def work(agent: TaskAgent, order: int, again: bool) -> str:
        agent.checkpoint(1, "older")
        if again:
            assert work.apply((order, False)).get() == "finished"
            for write in (
                lambda: agent.save_event("e", 1),
                lambda: agent.save_event_nowait("e", 1),
                lambda: agent.save_events([("e", 1)]),
                lambda: agent.checkpoint(2, "older"),
                agent.resume,
            ):
                with pytest.raises(AgentFenced, match="newer run of its task in this process") as caught:
                    write()
                seen.append(caught.value)
            raise ValueError("whatever it ends with")
        agent.checkpoint(3, "newer")
        return "finished"

    older = work.apply((1, True))
    assert (older.state, type(older.result)) == ("IGNORED", Replaced)
    assert isinstance(pickle.loads(pickle.dumps(older.result)), Replaced)
    assert {(error.agent_id, error.outcome) for error in seen if isinstance(error, AgentFenced)} == {
        ("1", "not_written")
    }
    assert len(seen) == 5
    agent = open_agent("1")
    assert (agent.peek().data, list(agent.history())) == ("newer", [])


def test_a_retry_that_the_broker_does_not_take_leaves_the_message(app: Any, here: dict[str, Any]) -> None:
    @durable_task(app, bind=True, settings=here)
    def work(self: Any, agent: TaskAgent) -> None:
        raise WalUnavailable("away")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Reject("no broker", requeue=False)

    work.retry = refuse
    work.push_request(id="1", called_directly=False)
    try:
        with pytest.raises(Reject) as caught:
            work.run()
        assert vars(caught.value)["requeue"] is True
        del work.retry
        with pytest.raises(Retry):
            work.run()
    finally:
        work.pop_request()


def test_the_readme_s_task(broker: Broker, start_worker: StartWorker, settings: dict[str, Any], tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- celery: .*?-->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    (tmp_path / "orders.py").write_text(found[1].replace("redis://127.0.0.1:6379/0", broker.url), encoding="utf-8")
    worker = start_worker(module="orders", concurrency=1)
    sent = broker.send("orders.fulfil", 7)
    assert sent.get(timeout=60) == "order 7 is done"
    assert worker.stop() == 0
    with SkialithAgent("7", **settings) as agent:
        assert [event.data["step"] for event in agent.history()] == [1, 2, 3]


def test_the_example(broker: Broker, start_worker: StartWorker, tmp_path: Path) -> None:
    code = (ROOT / "examples" / "celery_tasks.py").read_text(encoding="utf-8")
    (tmp_path / "celery_tasks.py").write_text(
        code.replace("seconds: float = 2.0", "seconds: float = 0.1"), encoding="utf-8"
    )
    env = {"REDIS_URL": broker.url}
    worker = start_worker(settings={}, module="celery_tasks", concurrency=2, **env)
    done = subprocess.run(
        [sys.executable, "celery_tasks.py"],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done ['reserve', 'charge', 'ship']"
    assert worker.stop() == 0
