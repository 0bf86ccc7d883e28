"""The loop thread and the futures of its calls: results, errors, giving up, and handlers that raise at any moment."""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from skialith.errors import Closed, WalUnavailable
from skialith.wal.future import CallFuture
from skialith.wal.loop import LoopThread

SIGNALS = 300


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("test-loop")
    thread.start()
    yield thread
    thread.stop()


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail() -> int:
    raise KeyError("x")


def test_a_call_returns_what_the_coroutine_does(loop: LoopThread) -> None:
    assert loop.call(give(7), 5.0) == 7
    with pytest.raises(KeyError):
        loop.call(fail(), 5.0)


def test_a_call_that_takes_too_long_is_cancelled(loop: LoopThread) -> None:
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with pytest.raises(WalUnavailable) as caught:
        loop.call(wait(), 0.05)
    assert caught.value.outcome == "unknown"
    assert cancelled.wait(5)


def test_a_call_ends_when_the_loop_stops(loop: LoopThread) -> None:
    future = loop.submit(asyncio.sleep(60))
    threading.Timer(0.05, loop.stop).start()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(20)
    with pytest.raises(Closed):
        loop.call(give(1), 1.0)


def test_the_future_is_one_that_others_can_wait_for(loop: LoopThread) -> None:
    futures = [loop.submit(give(n)) for n in range(5)]
    done, waiting = concurrent.futures.wait(futures, 10)
    assert not waiting and sorted(future.result() for future in done) == [0, 1, 2, 3, 4]
    never: CallFuture[int] = CallFuture()
    with pytest.raises(concurrent.futures.TimeoutError):
        never.result(0.02)
    assert never.cancel() and never.cancelled()


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("name", ["result", "done", "cancel", "wait"])
def test_no_handler_leaves_a_future_locked(name: str) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    future: CallFuture[int] = CallFuture()

    def wait() -> None:
        with pytest.raises(concurrent.futures.TimeoutError):
            CallFuture.result(future, 0.00001)

    if name != "wait":
        future.set_result(1)
    calls: dict[str, Callable[[], object]] = {
        "result": future.result,
        "done": future.done,
        "cancel": future.cancel,
        "wait": wait,
    }
    armed = [False]

    def handle(number: int, frame: FrameType | None) -> None:
        if armed[0]:
            armed[0] = False
            raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    try:
        for _ in range(SIGNALS):
            try:
                armed[0] = True
                signal.setitimer(signal.ITIMER_REAL, rng.random() * 5e-5 + 1e-6)
                while armed[0]:
                    calls[name]()
            except Interrupted:
                pass
            assert not held(future), "the loop would wait for this lock for ever"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def held(future: CallFuture[int]) -> bool:
    """Whether a thread that is not this one finds the future locked."""
    free: list[bool] = []

    def look() -> None:
        taken = future._condition.acquire(timeout=0.5)
        if taken:
            future._condition.release()
        free.append(taken)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return not free[0]
