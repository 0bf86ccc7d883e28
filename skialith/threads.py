"""A few threads for what blocks, so that no loop of the user's does."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from .config import AWAITED_THREADS
from .errors import Closed
from .wal.arrival import Arrival

log = logging.getLogger("skialith")


class _Job(NamedTuple):
    call: Callable[[], Any]
    arrival: Arrival | None


class Threads:
    """Runs calls in the order in which they come, on at most ``limit`` daemon threads that are started when none is idle.

    Everything that one thread tells another is told in C: a signal's handler that raises leaves no lock held on which a
    user's loop would hang.
    """

    def __init__(self, limit: int = AWAITED_THREADS) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._idle: SimpleQueue[None] = SimpleQueue()
        self._places: SimpleQueue[int] = SimpleQueue()
        for number in range(limit):
            self._places.put(number)

    def start(self, call: Callable[[], Any], arrival: Arrival | None = None) -> None:
        """Have ``call`` made soon and its outcome given to ``arrival``; without one it is made whatever becomes of the caller.

        A call whose arrival was given up before its turn came is not made. Raises ``Closed`` during interpreter exit.
        """
        self._jobs.put(_Job(call, arrival))
        try:
            self._idle.get_nowait()
        except Empty:
            with contextlib.suppress(Empty):
                self._start_thread(self._places.get_nowait())

    def _start_thread(self, number: int) -> None:
        try:
            # Not Thread.start(): it waits for the new thread in Python code, and on a user's loop.
            _thread.start_new_thread(self._main, (number,))
        except RuntimeError as error:
            self._places.put(number)
            raise Closed(f"no thread can be started, the interpreter is about to exit: {error}") from error

    def _main(self, number: int) -> None:
        threading.current_thread().name = f"skialith-awaited-{number}"
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                self._idle.put(None)
                job = self._jobs.get()
            _run(job)
            del job  # or it would be held until the next one


def _run(job: _Job) -> None:
    call, arrival = job
    if arrival is not None and arrival.given_up:
        return
    try:
        result = call()
    except BaseException as error:  # whoever waits for it raises it; the thread goes on
        if arrival is None:
            log.exception("a call that nobody waits for failed")
        else:
            arrival.fail(error)
    else:
        if arrival is not None:
            arrival.set(result)


class _Process:
    """The threads of this process; a forked child has none of its parent's."""

    def __init__(self) -> None:
        self.threads = Threads()

    def forget_parent(self) -> None:
        self.threads = Threads()


_process = _Process()
os.register_at_fork(after_in_child=_process.forget_parent)


def start(call: Callable[[], Any], arrival: Arrival | None = None) -> None:
    """:meth:`Threads.start` on the threads of this process."""
    _process.threads.start(call, arrival)
