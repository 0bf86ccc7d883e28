"""One result that a coroutine on a loop of the user's awaits; what a ``Promise`` is for a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class Arrival:
    """Settled once, by any thread; the coroutine that made it awaits it on its own loop.

    No ``concurrent.futures.Future`` in between, for the reason that ``Promise`` gives: a signal's handler that raises in it
    leaves a lock held on which the thread that settles it would hang. What reaches the user's loop goes by
    ``call_soon_threadsafe``, which waits for nobody; if that loop has ended, nobody waits there either.
    """

    __slots__ = ("_future", "_loop", "done", "given_up")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[Any] = self._loop.create_future()
        self.done = False
        self.given_up = False

    def set(self, result: object) -> bool:
        """False if it was done before."""
        return self._settle(self._future.set_result, result)

    def fail(self, error: BaseException) -> bool:
        """The coroutine raises ``error``; False if it was done before."""
        return self._settle(self._future.set_exception, error)

    def give_up(self) -> bool:
        """Nobody waits any more; False if it was done before."""
        if self.done:
            return False
        self.done = self.given_up = True
        return True

    def _settle(self, settle: Callable[[Any], object], outcome: object) -> bool:
        if self.done:
            return False
        self.done = True
        if asyncio._get_running_loop() is self._loop:
            self._arrive(settle, outcome)
            return True
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._arrive, settle, outcome)
        return True

    def _arrive(self, settle: Callable[[Any], object], outcome: object) -> None:
        if not self._future.done():  # cancelled, or too late
            settle(outcome)
            self._future.exception()  # looked at: whoever is cancelled at this moment will not, and that is no news

    def _time_out(self, seconds: float) -> None:
        if not self._future.done():
            self.done = self.given_up = True
            self._future.set_exception(TimeoutError(f"not done within {seconds:.1f} s"))

    async def wait(self, seconds: float | None) -> Any:
        """The result. Raises the error it failed with, and ``TimeoutError`` if it is not done by then (None: for ever).

        However it ends, nobody waits any more afterwards, and whoever works on it can see that.
        """
        timer = None if seconds is None else self._loop.call_later(max(0.0, seconds), self._time_out, seconds)
        try:
            return await self._future
        finally:
            if timer is not None:
                timer.cancel()
            self.give_up()
