"""Awaited steps on both kinds of loop: replay, places of concurrent calls, cancellation, and what never blocks the loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from skialith import (
    AgentFenced,
    AsyncSkialithAgent,
    InvalidPayload,
    RunEnded,
    SkialithAgent,
    StepFailed,
    StepMismatch,
    WalUnavailable,
    current_step,
)
from tests.fixtures.loops import KINDS, Kind, run
from tests.fixtures.nats import NatsServer

each_loop = pytest.mark.parametrize("kind", KINDS)


class Calls:
    """A function that returns its argument, later, and remembers its calls."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.made: list[Any] = []
        self.seconds = seconds

    async def ask(self, value: Any) -> Any:
        self.made.append(value)
        await asyncio.sleep(self.seconds)
        return value


class Never(Calls):
    async def ask(self, value: Any = None) -> Any:
        pytest.fail("a recorded step was called")

    ask.__qualname__ = Calls.ask.__qualname__


@each_loop
@pytest.mark.parametrize("stored", [False, True])
def test_a_later_run_gets_the_results_and_calls_nothing(kind: Kind, settings: dict[str, Any], stored: bool) -> None:
    calls = Calls()
    results: list[Any] = [{"n": (1, 2)}, 5, os.urandom(300_000), "x" * 200_000, None]

    async def main(function: Callable[..., Awaitable[Any]]) -> list[Any]:
        async with SkialithAgent("agent", **settings) as agent:
            await agent.resume()
            values = [await agent.step("ask", function, result) for result in results]
            if stored:
                await agent.flush(20)
            return values

    expected = [{"n": [1, 2]}, *results[1:]]
    assert run(kind, main(calls.ask)) == expected
    assert run(kind, main(Never().ask)) == expected
    assert len(calls.made) == len(results)
    with SkialithAgent("agent", **settings) as agent:  # the blocking agent finds them too
        agent.resume()
        with pytest.raises(StepMismatch):
            agent.step("ask", int)
        assert [event.event_id for event in agent.history()] == ["ask", *(f"ask#{n}" for n in range(2, 6))]


@each_loop
def test_concurrent_calls_of_one_name_have_places_in_their_order(kind: Kind, settings: dict[str, Any]) -> None:
    """Whenever each function ends; the first of them waits for what is recorded, and no later one gets ahead of it."""

    async def main(make: Callable[[int], Calls]) -> list[Any]:
        async with SkialithAgent("agent", **settings) as agent:
            return await asyncio.gather(*(agent.step("ask", make(n).ask, n) for n in range(50)))

    assert run(kind, main(lambda n: Calls((n * 7 % 50) / 2000))) == list(range(50))
    assert run(kind, main(lambda n: Never())) == list(range(50))


@each_loop
def test_inner_steps_in_tasks_and_threads(kind: Kind, settings: dict[str, Any]) -> None:
    calls = Calls(0.01)

    async def main(function: Callable[..., Awaitable[Any]]) -> tuple[Any, list[str]]:
        async with SkialithAgent("agent", **settings) as agent:

            async def outer(n: int) -> list[Any]:
                here = current_step()
                assert here is not None
                inner = await asyncio.gather(*(agent.step("inner", function, 10 * n + k) for k in range(3)))
                assert current_step() is here
                return [here.id, *inner, await agent.step("thread", asyncio.to_thread, time.sleep, 0)]

            values = await asyncio.gather(*(agent.step("outer", outer, n) for n in range(3)))
            assert current_step() is None
            return values, [event.event_id async for event in agent.history()]

    values, ids = run(kind, main(calls.ask))
    outers = ["outer", "outer#2", "outer#3"]
    assert values == [[outer, 10 * n, 10 * n + 1, 10 * n + 2, None] for n, outer in enumerate(outers)]
    inner = ["inner", "inner#2", "inner#3", "thread"]
    assert sorted(ids) == sorted([*outers, *(f"{outer}/{name}" for outer in outers for name in inner)])
    assert run(kind, main(Never().ask))[0] == values


@each_loop
def test_retries_errors_and_plain_functions(kind: Kind, settings: dict[str, Any]) -> None:
    async def main() -> None:
        async with SkialithAgent("agent", **settings) as agent:
            attempts: list[str] = []

            @agent.step_fn("flaky", retries=2, backoff=0.01)
            async def flaky() -> int:
                here = current_step()
                assert here is not None
                attempts.append(here.idempotency_key)
                await asyncio.sleep(0)
                if here.attempt < 3:
                    raise OSError
                return here.attempt

            async def fail() -> None:
                raise ValueError("no")

            assert await flaky() == 3
            assert len(attempts) == 3
            assert len(set(attempts)) == 1
            assert await agent.step("plain", int, "7") == 7
            for _ in range(2):
                with pytest.raises(StepFailed, match="no"):
                    await agent.step("fail", fail, record_errors=(ValueError,))
                await agent.resume()
            assert await flaky() == 3
            assert len(attempts) == 3
            with pytest.raises(InvalidPayload, match=r"result\[0\]: set is not serializable; the function has run"):
                await agent.step("bad", lambda: [{1}])

    run(kind, main())


@each_loop
def test_a_step_that_is_cancelled_in_its_function_is_not_recorded(kind: Kind, settings: dict[str, Any]) -> None:
    async def main() -> None:
        async with SkialithAgent("agent", **settings) as agent:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(agent.step("slow", Calls(30).ask, 1, retries=3), 0.3)
            assert current_step() is None
            assert await agent.step("next", Calls().ask, 2) == 2
            assert [event.event_id async for event in agent.history()] == ["next"]

    run(kind, main())


@each_loop
def test_cancelled_at_any_moment_a_step_is_recorded_or_not_and_the_run_goes_on(
    kind: Kind, settings: dict[str, Any]
) -> None:
    """Whose function has ended is recorded, whoever heard of it; the next run gets just that."""
    ended: dict[str, int] = {}

    def function(name: str) -> int:
        ended[name] = len(ended)
        return ended[name]

    async def main() -> None:
        async with SkialithAgent("agent", **settings) as agent:
            await agent.resume()
            await agent.step("first", function, "first")
            for n in range(150):
                name = f"s{n}"
                task = asyncio.ensure_future(agent.step(name, function, name))
                for _ in range(n % 12):
                    await asyncio.sleep(0)
                if n % 3 == 0:
                    await asyncio.sleep(n / 1e6)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    assert await task == ended[name]
            await agent.step("last", function, "last")
            await agent.flush(20)
            recorded = {event.event_id: event.data["result"] async for event in agent.history()}
            assert recorded == ended
            await agent.resume()
            for name, value in ended.copy().items():
                assert await agent.step(name, function, name) == value

    run(kind, main())
    assert len(ended) > 10


@each_loop
def test_whoever_steps_owns_the_agent(kind: Kind, settings: dict[str, Any]) -> None:
    async def main() -> None:
        async with (
            AsyncSkialithAgent("agent", **settings) as first,
            AsyncSkialithAgent("agent", **{**settings, "writer": "off"}) as second,
        ):
            assert await first.step("s", Calls().ask, 1) == 1
            assert await second.step("s", Never().ask) == 1
            calls = Calls()
            with pytest.raises(AgentFenced, match="the function has run"):
                await first.step("t", calls.ask, 1)
            with pytest.raises(RunEnded):
                await first.step("t", calls.ask, 1)
            assert calls.made == [1]
            assert await second.step("t", Calls().ask, 2) == 2
            await first.resume()
            assert [await first.step(name, Never().ask) for name in ("s", "t")] == [1, 2]

    run(kind, main())


@each_loop
def test_a_result_that_the_log_did_not_take_is_recorded_in_the_next_run(kind: Kind, tmp_path: Any) -> None:
    with NatsServer(tmp_path / "own") as server:

        async def main() -> None:
            async with AsyncSkialithAgent(
                "agent",
                nats_url=server.url,
                timeout=1.5,
                writer="off",
                database_url=f"sqlite:///{tmp_path / 'own.db'}",
                directory=str(tmp_path),
            ) as agent:
                await agent.resume()
                calls = Calls()
                assert await agent.step("s", calls.ask, 1) == 1
                server.kill()
                cancelled = asyncio.ensure_future(agent.step("s", calls.ask, 2))
                await asyncio.sleep(0.2)
                cancelled.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await cancelled
                under_way = agent._steps._run
                assert under_way is not None
                while under_way.over is None:  # noqa: ASYNC110 - until its append gives up, of which nobody hears
                    await asyncio.sleep(0.01)
                with pytest.raises(RunEnded) as ended:
                    await agent.step("s", calls.ask, 3)
                assert isinstance(ended.value.__cause__, WalUnavailable)
                server.start()
                for _ in range(100):
                    with contextlib.suppress(WalUnavailable):
                        await agent.resume()
                        break
                assert [await agent.step("s", calls.ask, n) for n in (4, 5, 6)] == [1, 2, 6]
                assert calls.made == [1, 2, 6]

        run(kind, main())
