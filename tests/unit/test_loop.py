"""The loop thread and what threads wait on: results, errors, giving up, and handlers that raise at any moment."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from types import FrameType

import pytest

from skialith.errors import Closed, WalUnavailable
from skialith.records import Ack
from skialith.wal._promise import Promise
from skialith.wal.futures import Futures
from skialith.wal.loop import LoopThread
from tests.fixtures.nats import wait_until

SIGNALS = 300


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
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


def test_what_a_cancelled_task_begins_at_the_end_is_cancelled_too() -> None:
    """As nats-py does when it is stopped while it reconnects."""
    thread = LoopThread()
    thread.start()
    waiting, ended = threading.Event(), threading.Event()
    kept: list[asyncio.Task[None]] = []

    async def second() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def first() -> None:
        try:
            waiting.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            kept.append(asyncio.create_task(second()))
            await asyncio.sleep(0)

    async def begin() -> None:
        kept.append(asyncio.create_task(first()))

    thread.call(begin(), 5.0)
    assert waiting.wait(5)
    thread.stop()
    assert ended.is_set() and all(task.done() for task in kept)


def test_a_task_that_loses_its_cancellation_does_not_hold_up_the_end() -> None:
    thread = LoopThread()
    thread.start()
    lost = threading.Event()

    async def deaf() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            lost.set()
        await asyncio.sleep(60)

    async def begin() -> None:
        thread.loop.create_task(deaf())

    thread.call(begin(), 5.0)
    began = time.monotonic()
    thread.stop()
    assert lost.is_set()
    assert time.monotonic() - began < 4.0


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


def test_a_timeout_of_the_coroutine_is_its_own(loop: LoopThread) -> None:
    async def wait() -> None:
        await asyncio.wait_for(asyncio.sleep(60), 0.01)

    with pytest.raises(asyncio.TimeoutError):
        loop.call(wait(), 5.0)


def test_a_call_ends_when_the_loop_stops(loop: LoopThread) -> None:
    threading.Timer(0.05, loop.stop).start()
    with pytest.raises(Closed) as caught:
        loop.call(asyncio.sleep(60), 20.0)
    assert caught.value.outcome == "unknown"
    with pytest.raises(Closed) as refused:
        loop.call(give(1), 1.0)
    assert refused.value.outcome == "not_written"


def test_a_promise_is_settled_once() -> None:
    kept, failed, left = Promise(), Promise(), Promise()
    threading.Timer(0.05, kept.set, ["first"]).start()
    assert kept.wait(5.0) == "first"
    assert not kept.set("second")
    assert not kept.give_up()
    assert failed.fail(KeyError("x"))
    with pytest.raises(KeyError):
        failed.wait(0)
    with pytest.raises(TimeoutError):
        left.wait(0.02)
    assert left.give_up()
    assert not left.set("late")
    assert (left.done, left.given_up, kept.given_up) == (True, True, False)


class Interrupted(BaseException):
    pass


# A handler may raise inside a finalizer too, which Python reports and passes over.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_handler_that_raises_out_of_a_call_at_any_moment_leaves_the_loop_working(loop: LoopThread) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    armed = False
    interrupted = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    try:
        for _ in range(SIGNALS):
            seconds = dice.random() * 3e-4 + 1e-6
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, seconds)
                while armed:
                    assert loop.call(give(3), 5.0) == 3
            except Interrupted:
                interrupted += 1
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > SIGNALS / 2
    assert loop.call(give(4), 5.0) == 4
    wait_until(lambda: len(asyncio.all_tasks(loop.loop)) == 0, 5, "no task is left")


def test_a_future_that_hangs_holds_up_nobody_but_the_thread_that_settles_futures() -> None:
    futures = Futures()
    first, locked = futures.make(), futures.make()
    futures.settle(first, Ack(1, False))
    assert first.result(5) == Ack(1, False)
    with locked._condition:
        futures.settle(locked, Ack(2, False))  # returns at once, as it must on the loop thread
        assert locked._state != "FINISHED"
    assert locked.result(5) == Ack(2, False)
    failed: Future[Ack] = futures.make()
    futures.settle(failed, WalUnavailable("x"))
    with pytest.raises(WalUnavailable):
        failed.result(5)
    futures.close()
    futures.close()
