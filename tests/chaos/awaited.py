"""The child whose agents are awaited on one loop, hundreds of calls at a time, some of them cancelled at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from skialith import AgentFenced, AsyncSkialithAgent, FlushTimeout, SkialithAgent, SkialithError
from skialith.records import Ack
from tests.fixtures.loops import run, until

from .evidence import Notebook, digest, payload
from .script import LIFE_SECONDS, Options, stop_on_bug

CANCEL_SECONDS = [0.0, 1e-4, 1e-3, 1e-2, 0.1]
"""Up to one of these after it began a call is cancelled: every moment of it is met."""

Acks = Callable[[], Awaitable[Sequence[Ack]]]


class Awaited:
    """The verbs of one agent, each written down before and after."""

    def __init__(self, agent: AsyncSkialithAgent, notebook: Notebook, options: Options) -> None:
        self.agent = agent
        self.notebook = notebook
        self.options = options
        self.dice = random.Random(f"{options.seed}/{agent.agent_id}")
        self.step = 0
        self.cancelled = 0

    async def resume(self) -> None:
        """Until it is answered; it may be cancelled as well."""
        while True:
            number = self._intend("resume")
            try:
                state = await self._perhaps_cancelled(self.agent.resume)
            except asyncio.CancelledError:
                self.notebook.interrupted(number)
            except SkialithError as error:
                self.notebook.failed(number, error)
                if not error.retryable:
                    raise
                await asyncio.sleep(0.1)
            else:
                token = None if state.is_new else state.data.get("id")
                shown = {"step": state.step_index, "token": token, "digest": digest(state.data), "source": state.source}
                self.notebook.done(number, **shown, database_ok=state.database_ok)
                self.step = state.step_index
                return

    async def save(self, identity: str, size: int = 0, lane: str = "") -> SkialithError | None:
        value = payload(identity, size)

        async def call() -> Sequence[Ack]:
            return [await self.agent.save_event(identity, value)]

        return await self._append("event", [(identity, value)], call, lane)

    async def save_together(self, identities: Sequence[str]) -> SkialithError | None:
        """All at once: they are in the log in this order, whatever becomes of single ones."""
        errors = await asyncio.gather(*(self.save(identity, lane="together") for identity in identities))
        return next((error for error in errors if error is not None), None)

    async def save_all(self, identities: Sequence[str]) -> SkialithError | None:
        items = [(identity, payload(identity)) for identity in identities]
        return await self._append("events", items, partial(self.agent.save_events, items))

    async def checkpoint(self, step: int) -> SkialithError | None:
        token = f"{self.notebook.name}:{time.monotonic_ns()}"
        value = payload(token)

        async def call() -> Sequence[Ack]:
            return [await self.agent.checkpoint(step, value)]

        return await self._append("checkpoint", [(token, value)], call)

    async def _append(
        self, verb: str, items: Sequence[tuple[str, Any]], call: Acks, lane: str = ""
    ) -> SkialithError | None:
        number = self._intend(verb, items, lane)
        try:
            acks = await self._perhaps_cancelled(call)
        except asyncio.CancelledError:
            self.notebook.interrupted(number)
            return None
        except SkialithError as error:
            self.notebook.failed(number, error)
            return error
        self.notebook.done(number, acks)
        return None

    def _intend(self, verb: str, items: Sequence[tuple[str, Any]] = (), lane: str = "") -> int:
        return self.notebook.intend(verb, self.agent.agent_id, self.agent.config.timeout, items, lane)

    async def _perhaps_cancelled(self, call: Callable[[], Awaitable[Any]]) -> Any:
        # Always as a task of its own, or those that are not to be cancelled would begin before the others.
        task = asyncio.ensure_future(call())
        if self.dice.random() < self.options.cancels:
            after = self.dice.choice(CANCEL_SECONDS) * self.dice.random()
            asyncio.get_running_loop().call_later(after, task.cancel)
        try:
            return await task
        finally:
            self.cancelled += task.cancelled()

    async def one_step(self) -> SkialithError | None:
        """Events in each of the ways, then a checkpoint; the first error."""
        self.step += 1
        name = f"{self.notebook.name}/{self.step}"
        if error := await self.save(f"{name}.one"):
            return error
        many = [f"{name}.t{n}" for n in range(self.dice.randrange(2, self.options.most))]
        batch = [f"{name}.b{n}" for n in range(self.dice.randrange(2, self.options.most))]
        calls: list[Awaitable[SkialithError | None]] = [self.save_together(many), self.save_all(batch)]
        if self.dice.random() < self.options.large:
            calls.append(self.save(f"{name}.large", 1_300_000))
        error = next((error for error in await asyncio.gather(*calls) if error is not None), None)
        return error or await self.checkpoint(self.step)

    async def work(self, stopping: threading.Event) -> None:
        deadline = time.monotonic() + LIFE_SECONDS
        while not stopping.is_set() and time.monotonic() < deadline:
            error = await self.one_step()
            if isinstance(error, AgentFenced) or (error is not None and isinstance(error.__cause__, AgentFenced)):
                return
            if error is not None and not error.retryable:
                raise error
            if self.options.pace:
                await asyncio.sleep(self.dice.uniform(0, self.options.pace))


def work(options: Options, notebook: Notebook, stopping: threading.Event) -> None:
    """All agents on one loop, until the test says stop; then nothing may be left of what was cancelled."""
    with stop_on_bug(notebook):
        run(options.loop, _work(options, notebook, stopping))
    notebook.line("note", what="closed")


async def _work(options: Options, notebook: Notebook, stopping: threading.Event) -> None:
    async with contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(SkialithAgent(each, **options.settings)) for each in options.agents]
        awaited = [Awaited(agent, notebook, options) for agent in agents]
        for each in awaited:
            await each.resume()
        notebook.line("note", what="ready")
        await asyncio.gather(*(each.work(stopping) for each in awaited))
        await _nothing_left(agents)
        for each in awaited:
            each.options = Options(options.name, options.folder, options.settings)  # no more cancelling
            error = await each.save(f"{notebook.name}/last")
            if error is not None and not isinstance(error, AgentFenced):
                raise error
        if options.settings.get("writer") != "off":
            with contextlib.suppress(
                FlushTimeout
            ):  # behind a process that was taken over with records of its own under way
                await agents[0].flush()
        notebook.line("note", what="cancelled", count=sum(each.cancelled for each in awaited))


async def _nothing_left(agents: Sequence[AsyncSkialithAgent]) -> None:
    """No record that is counted, no turn that is taken, no lease that is counted twice."""
    hold = agents[0]._hold
    assert hold is not None and hold.engine is not None
    log, wire = hold.engine.wal.log, hold.engine.wal.connection.wire
    lanes = [log.lanes[agent.agent_id] for agent in agents]

    def idle() -> bool:
        return (
            not wire.queued and not wire.appending and not any(lane.turn.taken or lane.turn.waiting for lane in lanes)
        )

    await until(idle, 2 * agents[0].config.timeout, "nothing is under way any more")
    assert not any(lane.queue or lane.holders or lane.running for lane in lanes)
    assert all(lane.lease is None or lane.lease.users == 1 for lane in lanes)
