"""The loop thread: one asyncio loop on one daemon thread, for everything that speaks to NATS."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from ..errors import Closed, WalUnavailable
from .future import CallFuture

T = TypeVar("T")

_STOP_SECONDS = 5.0


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class LoopThread:
    """Runs coroutines for threads. ``start()`` returns only when the loop answers."""

    def __init__(self, name: str = "skialith-loop") -> None:
        self._loop = _new_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._started = threading.Event()
        self._stopped = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def start(self) -> None:
        self._thread.start()
        self._started.wait()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._started.set)
        try:
            self._loop.run_forever()
        finally:
            self._cancel_all()
            self._loop.run_until_complete(asyncio.sleep(0))  # What other threads handed over meanwhile.
            self._loop.close()

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=_STOP_SECONDS))

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the loop; raises ``Closed`` when the loop has stopped."""
        if self._stopped:
            coroutine.close()
            raise Closed("Skialith is closed: the call was made after close() or during interpreter exit")
        future: CallFuture[T] = CallFuture()
        try:
            self._loop.call_soon_threadsafe(self._begin, coroutine, future)
        except RuntimeError:
            coroutine.close()
            raise Closed("Skialith is closed: the call was made after close() or during interpreter exit") from None
        return future

    def _begin(self, coroutine: Coroutine[Any, Any, T], future: CallFuture[T]) -> None:
        """What ``asyncio.run_coroutine_threadsafe`` does, for a future of our own."""
        if future.cancelled():
            coroutine.close()
            return
        task = self._loop.create_task(coroutine)
        task.add_done_callback(lambda _: _copy_outcome(task, future))

        def cancel(_: Future[T]) -> None:
            if not task.done():
                with contextlib.suppress(RuntimeError):  # the loop is closed, and the task with it
                    self._loop.call_soon_threadsafe(task.cancel)

        future.add_done_callback(cancel)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run a callback on the loop soon; nothing happens when the loop has stopped."""
        if not self._stopped:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(callback)

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float) -> T:
        """Run a coroutine to its end and return its result. Interruptible; bounded by ``timeout`` seconds.

        The coroutine is expected to keep its own deadline; the timeout here is the net below it, and raises
        ``WalUnavailable`` with outcome ``unknown``. After Ctrl-C the coroutine is cancelled.
        """
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except FutureTimeout as error:
            if future.done():
                raise
            future.cancel()
            raise WalUnavailable(
                f"no answer from the loop thread within {timeout:.1f} s",
                outcome="unknown",
            ) from error
        except CancelledError as error:
            raise Closed("Skialith was closed during the call", outcome="unknown") from error
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Stop the loop and join its thread. May be called twice, and before ``start``."""
        if self._stopped:
            return
        self._stopped = True
        if not self._thread.is_alive():
            self._loop.close()
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2 * _STOP_SECONDS)


def _copy_outcome(task: asyncio.Task[T], future: CallFuture[T]) -> None:
    with contextlib.suppress(InvalidStateError):  # Its caller gave up.
        if task.cancelled():
            future.cancel()
        elif (error := task.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())
