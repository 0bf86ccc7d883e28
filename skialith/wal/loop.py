"""The loop thread: one asyncio loop for everything that speaks to NATS, on a daemon thread of its own or on that of a server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

from ..errors import BlockingCallInEventLoop, Closed, WalUnavailable
from ._link import tell
from ._promise import Promise
from .arrival import Arrival
from .lane import Outcome

T = TypeVar("T")

_START_SECONDS = 10.0
_STOP_SECONDS = 5.0
_CANCEL_AGAIN_SECONDS = 0.2


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Call:
    """One coroutine that another thread or loop waits for. ``whole``: it runs to its end although nobody waits any more."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, Any],
        promise: Outcome,
        *,
        whole: bool = False,
    ) -> None:
        self._loop = loop
        self._coroutine = coroutine
        self._task: asyncio.Task[Any] | None = None
        self._whole = whole
        self.promise = promise

    def start(self) -> None:
        if self.promise.given_up and not self._whole:
            self._coroutine.close()
        elif self._task is None:  # else a signal came between, and it was told twice
            self._task = self._loop.create_task(self._coroutine)
            self._task.add_done_callback(self._settle)

    def drop(self) -> None:
        """It was not begun."""
        self._coroutine.close()

    def cancel(self) -> None:
        if self._task is not None and not self._whole:
            self._task.cancel()

    def _settle(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            self.promise.fail(Closed("Skialith was closed during the call", outcome="unknown"))
        elif (error := task.exception()) is not None:
            self.promise.fail(error)
        else:
            self.promise.set(task.result())


class LoopThread:
    """Runs coroutines for threads. ``start()`` returns only when the loop answers.

    ``lent``: a running loop to be used in place of one's own, whose thread must never call what blocks; it stays running.
    """

    def __init__(self, lent: asyncio.AbstractEventLoop | None = None) -> None:
        self._lent = lent is not None
        self._loop = lent or _new_loop()
        self._thread = threading.Thread(target=self._main, name="skialith-loop", daemon=True)
        self._started = Promise()
        self._stopped = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def start(self) -> None:
        if not self._lent:
            self._thread.start()
            self._started.wait(_START_SECONDS)

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._started.set, None)
        try:
            self._loop.run_forever()
        finally:
            self._cancel_all()
            self._loop.run_until_complete(asyncio.sleep(0))  # What other threads handed over meanwhile.
            self._loop.close()

    def _cancel_all(self) -> None:
        # In rounds: nats-py, cancelled while it reconnects, may begin the tasks of its new connection all the same; and before
        # Python 3.12 wait_for() loses a cancellation that comes when what it waits for is done.
        end = time.monotonic() + _STOP_SECONDS
        while (tasks := asyncio.all_tasks(self._loop)) and (left := end - time.monotonic()) > 0:
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=min(left, _CANCEL_AGAIN_SECONDS)))

    def call(self, coroutine: Coroutine[Any, Any, T], timeout: float, *, whole: bool = False) -> T:
        """Run a coroutine to its end and return its result. Interruptible; bounded by ``timeout`` seconds.

        The coroutine is expected to keep its own deadline; the timeout here is the net below it, and raises
        ``WalUnavailable`` with outcome ``unknown``. Then, and after Ctrl-C, the coroutine is cancelled, unless it is to go on to
        its end (``whole``). Raises ``Closed`` when the loop has stopped.
        """
        if asyncio._get_running_loop() is self._loop:
            coroutine.close()
            raise BlockingCallInEventLoop("a call that blocks was made on the loop that it needs")
        call = _Call(self._loop, coroutine, promise := Promise(), whole=whole)
        try:
            self._begin(call)
            result: T = promise.wait(timeout)
            return result
        except TimeoutError as error:
            self._overdue(call, timeout, error)
        finally:
            self._end(call)

    async def ask(self, coroutine: Coroutine[Any, Any, T], timeout: float, *, whole: bool = False) -> T:
        """As :meth:`call`, awaited on a loop of the user's, which is not blocked. ``whole``: when the caller is cancelled, the
        coroutine goes on to its end."""
        call = _Call(self._loop, coroutine, arrival := Arrival(), whole=whole)
        try:
            self._begin(call)
            result: T = await arrival.wait(timeout)
            return result
        except TimeoutError as error:
            self._overdue(call, timeout, error)
        finally:
            self._end(call)

    def _begin(self, call: _Call) -> None:
        if self._stopped or not tell(self._loop.call_soon_threadsafe, (call.start,)):
            call.drop()
            raise Closed("Skialith is closed: the call was made after close() or during interpreter exit")

    def _end(self, call: _Call) -> None:
        if call.promise.give_up() or call.promise.given_up:
            tell(self._loop.call_soon_threadsafe, (call.cancel,))

    @staticmethod
    def _overdue(call: _Call, timeout: float, error: TimeoutError) -> NoReturn:
        if not call.promise.give_up() and not call.promise.given_up:
            raise error  # the coroutine's own
        raise WalUnavailable(f"no answer from the loop thread within {timeout:.1f} s", outcome="unknown") from error

    def stop(self) -> None:
        """Stop the loop, unless it is lent, and join its thread. May be called twice, and before ``start``."""
        if self._stopped:
            return
        self._stopped = True
        if self._lent:
            return
        if not self._thread.is_alive():
            self._loop.close()
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2 * _STOP_SECONDS)
