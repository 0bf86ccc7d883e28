"""Celery: tasks that own an agent and resume it, and clean ends of worker processes.

Importing this module is all the set-up there is: from then on every worker process that ends in an orderly way stores
what it appended, gives its agents up and disconnects.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from celery import shared_task, signals
from celery.exceptions import Ignore, Reject
from celery.utils.time import get_exponential_backoff_interval

from .. import runtime
from ..agent import SkialithAgent
from ..config import TASK_RETRIES, TASK_RETRY_FIRST_SECONDS, TASK_RETRY_LONGEST_SECONDS, Config
from ..errors import AgentFenced, InvalidArgument, SkialithError
from ..records import Ack, AgentState

log = logging.getLogger("skialith.celery")

AgentIdOf = Callable[..., "str | int"]
"""Makes the agent's id from the arguments of one call of the task."""


class Replaced(Ignore):
    """A newer run of the agent took over; this one ended without a result, and its message was left alone."""


class TaskAgent(SkialithAgent):
    """The agent of one run of a ``durable_task``, owned while the task runs.

    ``state``: what the last ``resume()`` found, at first the one before the task began. The newest run owns the agent: the
    verbs of an older one raise ``AgentFenced``, whether the newer one is in this process or in another.
    """

    state: AgentState

    def __init__(self, agent_id: str, **settings: Any) -> None:
        super().__init__(agent_id, **settings)
        self._writing = threading.RLock()
        self._replaced = False

    def resume(self, *, exclusive: bool = True) -> AgentState:
        self.state = super().resume(exclusive=exclusive)
        return self.state

    def save_event(self, event_id: str, data: Any, *, step: int | None = None) -> Ack:
        with self._writing:
            return super().save_event(event_id, data, step=step)

    def save_event_nowait(self, event_id: str, data: Any, *, step: int | None = None) -> Future[Ack]:
        with self._writing:
            return super().save_event_nowait(event_id, data, step=step)

    def save_events(self, events: Iterable[tuple[str, Any]], *, step: int | None = None) -> list[Ack]:
        with self._writing:
            return super().save_events(events, step=step)

    def checkpoint(self, step: int, data: Any) -> Ack:
        with self._writing:
            return super().checkpoint(step, data)

    def confirm(self) -> None:
        """Raises ``AgentFenced`` if this run does not own its agent any more, ``WalUnavailable`` if that cannot be found out."""
        if not self._closed:
            self._engine("confirm").wal.confirm(self._agent_id, self._deadline())

    def close(self) -> None:
        _process.leave(self)
        super().close()

    def replace(self) -> None:
        """A newer run in this process begins: refuse what this one writes from now on, and wait for what it is writing.

        The log cannot tell them apart, because a process has one lease for an agent.
        """
        self._replaced = True
        with self._writing:
            pass

    def _engine(self, verb: str) -> runtime.Runtime:
        if self._replaced:
            raise AgentFenced(
                f"{verb}: agent {self._agent_id!r} was taken over by a newer run of its task in this process; nothing was sent",
                agent_id=self._agent_id,
                owner=f"this process, pid {os.getpid()}",
            )
        return super()._engine(verb)


class _Process:
    """What this process has of durable tasks: the newest run of every agent, and the runtimes they use."""

    def __init__(self) -> None:
        self.forget_parent()

    def forget_parent(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[tuple[Config, str], TaskAgent] = {}
        self._runtimes: dict[Config, runtime.Runtime] = {}

    def enter(self, agent: TaskAgent) -> None:
        """Make this run the newest of its agent. Its runtime stays open until the process ends."""
        config = agent.config
        with self._lock:
            kept = self._runtimes.get(config)
            if kept is None or kept.closed:
                self._runtimes[config] = runtime.acquire(config)
            older = self._newest.get((config, agent.agent_id))
            self._newest[config, agent.agent_id] = agent
        if older is not None:
            older.replace()

    def leave(self, agent: TaskAgent) -> None:
        key = (agent.config, agent.agent_id)
        with self._lock:
            if self._newest.get(key) is agent:
                del self._newest[key]


_process = _Process()


def durable_task(
    app: Any = None,
    /,
    *,
    agent_id: str | AgentIdOf | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that makes a Celery task of a function whose first argument is the task's agent, owned and resumed.

    ``app``: the Celery application; None is ``shared_task``. ``agent_id``: the name of an argument (text or whole number), or a
    function of the call's arguments that gives one; None is the task's id, which stays the same through retries and redeliveries.
    ``settings``: those of ``SkialithAgent``. ``options``: Celery's own. Defaults that differ from Celery's: ``acks_late`` and
    ``reject_on_worker_lost`` are True, ``max_retries`` is ``TASK_RETRIES``, ``retry_backoff`` 1 s, doubled up to
    ``retry_backoff_max`` of 60 s, with ``retry_jitter``. With ``bind=True`` the function takes the task, then the agent.

    Every run finds the agent's last checkpoint in ``agent.state`` and goes on from there. A ``SkialithError`` that is
    ``retryable`` retries the task. A run that a newer one replaced ends as ``IGNORED``: it stores no result and neither
    acknowledges nor rejects its message. Raises ``InvalidArgument`` when the function has no such argument.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        bound = bool(options.get("bind", False))
        call = _signature_without_agent(function, bound)
        _check_argument(agent_id, call)

        @functools.wraps(function)
        def run(task: Any, /, *args: Any, **kwargs: Any) -> Any:
            body = functools.partial(function, task) if bound else function
            own_id = _id_of_call(agent_id, call, task, args, kwargs)
            try:
                return _run_owned(body, own_id, settings or {}, args, kwargs)
            except AgentFenced as error:
                if error.agent_id != own_id:
                    raise
                log.warning("task %s[%s] ends without a result: %s", task.name, task.request.id, error)
                raise Replaced(str(error)) from error
            except SkialithError as error:
                if not error.retryable:
                    raise
                _retry(task, error)

        # Celery checks the arguments of a call against this before it sends the task.
        first = inspect.Parameter("the_task", inspect.Parameter.POSITIONAL_ONLY)
        run.__signature__ = call.replace(parameters=[first, *call.parameters.values()])  # type: ignore[attr-defined]
        register = shared_task if app is None else app.task
        return register(**{**_DEFAULTS, **options, "bind": True})(run)

    return decorate


_DEFAULTS: dict[str, Any] = {
    "acks_late": True,
    "reject_on_worker_lost": True,
    "max_retries": TASK_RETRIES,
    "retry_backoff": TASK_RETRY_FIRST_SECONDS,
    "retry_backoff_max": TASK_RETRY_LONGEST_SECONDS,
    "retry_jitter": True,
    # By name: it imports Celery's worker, which those who only send tasks do not need.
    "Request": "skialith.integrations.celery_request:DurableRequest",
}


def _run_owned(
    body: Callable[..., Any], agent_id: str, settings: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    agent = TaskAgent(agent_id, **settings)
    with agent:
        _process.enter(agent)
        agent.resume()
        try:
            result = body(agent, *args, **kwargs)
        except Exception:
            # Celery would store this failure (or retry) over what the newer run does.
            _confirm_after_failure(agent)
            raise
        agent.confirm()
        return result


def _confirm_after_failure(agent: TaskAgent) -> None:
    try:
        agent.confirm()
    except AgentFenced:
        raise
    except SkialithError as error:
        log.warning("agent %r: whether a newer run owns it is not known: %s", agent.agent_id, error)


def _retry(task: Any, error: SkialithError) -> None:
    countdown = get_exponential_backoff_interval(
        int(task.retry_backoff), task.request.retries, int(task.retry_backoff_max), bool(task.retry_jitter)
    )
    try:
        raise task.retry(exc=error, countdown=countdown)
    except Reject as refused:
        # The broker did not take the retry. Celery would drop the task, whose message is still there.
        raise Reject(str(refused), requeue=bool(task.acks_late)) from error


def _signature_without_agent(function: Callable[..., Any], bound: bool) -> inspect.Signature:
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    leading = 2 if bound else 1
    if len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) < leading:
        wanted = "the task and its agent" if bound else "its agent"
        raise InvalidArgument(f"{function.__qualname__} must take {wanted} first", argument="function")
    return signature.replace(parameters=parameters[leading:])


def _check_argument(agent_id: str | AgentIdOf | None, call: inspect.Signature) -> None:
    if isinstance(agent_id, str) and agent_id not in call.parameters:
        raise InvalidArgument(
            f"agent_id={agent_id!r}: the task has no such argument, it has ({', '.join(call.parameters)})",
            argument="agent_id",
        )


def _id_of_call(
    agent_id: str | AgentIdOf | None,
    call: inspect.Signature,
    task: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str:
    value: object
    if agent_id is None:
        value = task.request.id
    elif isinstance(agent_id, str):
        values = call.bind(*args, **kwargs)
        values.apply_defaults()
        value = values.arguments[agent_id]
    else:
        value = agent_id(*args, **kwargs)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        hint = " (called directly, a task has no id)" if agent_id is None else ""
        raise InvalidArgument(
            f"task {task.name}: the agent's id must be text or a whole number, not {value!r}{hint}", argument="agent_id"
        )
    return str(value)


def _close(**_: Any) -> None:
    runtime.close_all()


os.register_at_fork(after_in_child=_process.forget_parent)
# A child of the prefork pool ends by os._exit, without atexit. worker_shutdown is for the pools that run in the worker itself.
signals.worker_process_shutdown.connect(_close, weak=False, dispatch_uid="skialith")
signals.worker_shutdown.connect(_close, weak=False, dispatch_uid="skialith")
