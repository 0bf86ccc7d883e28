"""What user's loops are told by other threads, and the few threads for what blocks."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from skialith.threads import Threads
from skialith.wal.arrival import Arrival
from tests.fixtures.loops import KINDS, Kind, run, until
from tests.fixtures.nats import wait_until

each_loop = pytest.mark.parametrize("kind", KINDS)


def soon(call: Callable[[], object], seconds: float = 0.01) -> None:
    threading.Timer(seconds, call).start()


@each_loop
def test_an_arrival_gives_its_first_outcome(kind: Kind) -> None:
    async def main() -> None:
        arrival = Arrival()
        soon(lambda: (arrival.set(7), arrival.set(8), arrival.fail(KeyError())))
        assert await arrival.wait(10) == 7
        assert arrival.done and not arrival.given_up and not arrival.give_up()
        failed = Arrival()
        soon(lambda: failed.fail(KeyError("x")))
        with pytest.raises(KeyError):
            await failed.wait(None)

    run(kind, main())


@each_loop
def test_an_arrival_that_nobody_waits_for_any_more_says_so(kind: Kind) -> None:
    async def main() -> None:
        late = Arrival()
        with pytest.raises(TimeoutError, match=r"0\.0 s"):
            await late.wait(0.01)
        assert late.given_up and not late.set(1)
        left = Arrival()
        task = asyncio.ensure_future(left.wait(10))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left.given_up and not left.fail(KeyError("nobody looks at it"))

    run(kind, main())


@each_loop
def test_cancelled_at_the_moment_of_its_outcome(kind: Kind) -> None:
    """An error that arrives then is nobody's, and nothing is logged (``run`` would fail)."""

    async def main() -> None:
        dice = random.Random(1)
        for _ in range(300):
            arrival = Arrival()
            task = asyncio.ensure_future(arrival.wait(10))
            loop = asyncio.get_running_loop()
            acts = [lambda a=arrival: a.fail(KeyError("x")), task.cancel]
            dice.shuffle(acts)
            await asyncio.sleep(0)
            for act in acts:
                loop.call_soon(act)
                if dice.random() < 0.5:
                    await asyncio.sleep(0)
            with pytest.raises((KeyError, asyncio.CancelledError)):
                await task

    run(kind, main())


def test_a_loop_that_has_ended_is_not_told() -> None:
    arrivals: list[Arrival] = []

    async def main() -> None:
        arrivals.append(Arrival())

    run("asyncio", main())
    assert arrivals[0].set(1)


def test_calls_run_on_a_bounded_number_of_threads_that_are_used_again() -> None:
    threads, names, together, most = Threads(3), set(), [0], [0]
    lock = threading.Lock()

    def work() -> int:
        with lock:
            names.add(threading.current_thread().name)
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.002)
        with lock:
            together[0] -= 1
        return 5

    async def main() -> None:
        async def one(seconds: float) -> None:
            await asyncio.sleep(seconds)
            arrival = Arrival()
            threads.start(work, arrival)
            assert await arrival.wait(10) == 5

        for _ in range(3):
            await one(0)
            await until(lambda: threads._idle.qsize() == 1, 10, "it is idle")
        assert len(names) == 1  # one that is idle is used again
        await asyncio.gather(*(one(random.random() / 10) for _ in range(200)))

    run("asyncio", main())
    assert most[0] == 3 and len(names) == 3


def test_what_waits_and_is_given_up_is_not_begun_and_what_nobody_waits_for_is() -> None:
    threads, gate, done = Threads(1), threading.Event(), list[str]()

    def note(text: str) -> Any:
        return lambda: done.append(text)

    async def main() -> None:
        first, second = Arrival(), Arrival()
        threads.start(gate.wait, first)
        threads.start(note("given up"), second)
        threads.start(note("anyway"))
        threads.start(lambda: 1 / 0)  # logged, and the thread goes on
        with pytest.raises(TimeoutError):
            await second.wait(0.05)
        gate.set()
        assert await first.wait(10)
        last = Arrival()
        threads.start(note("last"), last)
        await last.wait(10)

    run("asyncio", main())
    wait_until(lambda: done == ["anyway", "last"], 10, "the rest was made")


def test_what_is_raised_is_raised_to_whoever_waits() -> None:
    def leave() -> None:
        raise SystemExit("not the thread's end")

    threads = Threads(1)

    async def main() -> None:
        for _ in range(3):
            arrival = Arrival()
            threads.start(leave, arrival)
            with pytest.raises(SystemExit):
                await arrival.wait(10)

    run("asyncio", main())
