"""Cancelled calls: what is left of them, at whatever moment it was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from skialith import AsyncSkialithAgent, Closed, SkialithAgent, runtime
from skialith.config import load
from tests.fixtures.loops import KINDS, Kind, run, until
from tests.fixtures.nats import NatsServer

each_loop = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def dice() -> random.Random:
    """``SKIALITH_CHAOS_SEED`` sets its seed, which is printed."""
    seed = int(os.environ.get("SKIALITH_CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"SKIALITH_CHAOS_SEED={seed}")
    return random.Random(seed)


async def cancelled(call: Callable[[], Awaitable[Any]], seconds: float) -> bool:
    """Whether the call was cancelled after so many seconds; False if it was faster."""
    task = asyncio.ensure_future(call())
    await asyncio.sleep(0)  # a task that is cancelled before its first step has called nothing
    asyncio.get_running_loop().call_later(seconds, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return task.cancelled()


def engine_of(agent: AsyncSkialithAgent) -> runtime.Runtime:
    assert agent._hold is not None and agent._hold.engine is not None
    return agent._hold.engine


def users(settings: dict[str, Any]) -> int:
    """Uses of the runtime with these settings that are not given back."""
    found = runtime._registry.runtimes.get(load(**settings))
    return 0 if found is None else found.users


@each_loop
def test_opening_leaves_no_use_of_a_runtime(settings: dict[str, Any], kind: Kind, dice: random.Random) -> None:
    settings = {**settings, "writer": "off"}

    async def main() -> None:
        hits = 0
        for _ in range(60):  # alone, so that each one starts the runtime
            agent = AsyncSkialithAgent("a", **settings)
            hits += await cancelled(agent.open, dice.uniform(0, 0.015))
            await agent.close()
            async with AsyncSkialithAgent("later", **settings):  # behind it, as one runtime is started after the other
                pass
            await until(lambda: users(settings) == 0, 10, "the runtime is given back")
        assert hits > 5
        async with AsyncSkialithAgent("keeper", **settings):  # and beside another agent
            for _ in range(200):
                agent = AsyncSkialithAgent("a", **settings)
                if await cancelled(agent.open, dice.uniform(0, 0.0003)):
                    hits += 1
                    await agent.save_event("e", 1)  # it can be opened again
                await agent.close()
                await until(lambda: users(settings) == 1, 10, "the runtime is given back")
        assert hits > 20

    run(kind, main())


@each_loop
def test_async_with_that_is_cancelled_while_it_opens_leaves_nothing(
    settings: dict[str, Any], kind: Kind, dice: random.Random
) -> None:
    async def use() -> None:
        async with SkialithAgent("a", writer="off", **settings) as agent:
            await agent.resume()
            await agent.save_event("e", 1)

    async def main() -> None:
        for _ in range(25):
            await cancelled(use, dice.uniform(0, 0.03))
            await until(lambda: users({**settings, "writer": "off"}) == 0, 10, "the runtime is given back")
        async with AsyncSkialithAgent("b", writer="off", **settings) as other:
            reader = engine_of(other).wal.stream
            left = await engine_of(other).wal.ask(lambda: reader.next_message(1, reader.subjects.lease("a"), 5e9), 5e9)
            assert left is None  # no lease

    run(kind, main())


@each_loop
def test_resuming_counts_an_owner_once(settings: dict[str, Any], kind: Kind, dice: random.Random) -> None:
    async def main() -> None:
        hits = 0
        async with AsyncSkialithAgent("keeper", writer="off", **settings) as keeper:
            lanes = engine_of(keeper).wal.log.lanes
            for _ in range(30):
                agent = AsyncSkialithAgent("a", writer="off", **settings)
                await agent.open()
                for _ in range(dice.randrange(1, 5)):
                    hits += await cancelled(agent.resume, dice.uniform(0, 0.003))
                if dice.random() < 0.5:
                    await agent.resume()
                    lease = lanes["a"].lease
                    assert lease is not None and lease.users == 1
                await agent.close()
                lane = lanes.get("a")
                assert lane is None or (lane.lease is None and lane.holders == 0)
        assert hits > 20

    run(kind, main())


@each_loop
def test_closing_goes_on(settings: dict[str, Any], kind: Kind, dice: random.Random) -> None:
    async def main() -> None:
        async with AsyncSkialithAgent("keeper", writer="off", **settings) as keeper:
            lanes = engine_of(keeper).wal.log.lanes
            for _ in range(30):
                agent = AsyncSkialithAgent("a", writer="off", **settings)
                await agent.resume()
                await cancelled(agent.close, dice.uniform(0, 0.002))
                with pytest.raises(Closed):
                    await agent.save_event("e", 1)
                await until(
                    lambda: users({**settings, "writer": "off"}) == 1 and lanes["a"].lease is None,
                    10,
                    "the agent and the runtime are given up",
                )

    run(kind, main())


@each_loop
def test_what_was_not_sent_is_not_sent_any_more(nats_server: NatsServer, settings: dict[str, Any], kind: Kind) -> None:
    """``asyncio.wait_for`` over calls that cannot be answered: what stood in the queue behind them is never written."""
    settings = {**settings, "nats_url": nats_server.url, "writer": "off", "timeout": 20.0}

    async def main() -> None:
        async with AsyncSkialithAgent("a", **settings) as agent:
            await agent.save_event("first", 0)
            nats_server.pause()
            try:
                under_way = asyncio.create_task(agent.save_event("under way", 0))
                await until(lambda: "a" in lanes(agent) and lanes(agent)["a"].running, 10, "the first is under way")
                await asyncio.sleep(0.1)
                for call in (
                    lambda: agent.save_event("given up", 0),
                    lambda: agent.checkpoint(9, {}),
                    lambda: agent.save_events([("b0", 0), ("b1", 1)]),
                ):
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(call(), 0.1)
            finally:
                nats_server.resume()
            await under_way
            await agent.save_event("last", 0)
            assert [event.event_id async for event in agent.history()] == ["first", "under way", "last"]
            assert (await agent.peek()).is_new
            assert engine_of(agent).wal.connection.wire.queued == 0

    def lanes(agent: AsyncSkialithAgent) -> dict[Any, Any]:
        return engine_of(agent).wal.log.lanes

    run(kind, main())


@each_loop
def test_reading_that_is_cancelled_occupies_no_thread_for_long(
    settings: dict[str, Any], kind: Kind, dice: random.Random
) -> None:
    async def main() -> None:
        async with AsyncSkialithAgent("a", **settings) as agent:
            await agent.save_events([(f"e{n}", n) for n in range(600)])
            await agent.checkpoint(1, {})

            async def read() -> int:
                return len([event async for event in agent.history()])

            for _ in range(60):
                await asyncio.gather(
                    *(cancelled(call, dice.uniform(0, 0.02)) for call in (read, agent.peek, agent.flush))
                )
            assert await read() == 600
            assert (await agent.peek()).step_index == 1
            assert await agent.flush(20) == 0

    run(kind, main())
