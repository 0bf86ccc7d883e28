"""Futures of calls that do not wait, settled on a thread of their own.

Not on the loop thread: a signal may have interrupted whoever waits for a future at the one moment that leaves its lock held
(see ``_promise``), and whoever comes to settle it hangs then.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import Future, InvalidStateError
from queue import Empty, SimpleQueue

from ..errors import SkialithError
from ..records import Ack

log = logging.getLogger("skialith.wal")

_CLOSE_SECONDS = 1.0


class Futures:
    """Settles futures in the order in which they were handed in."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[Ack], Ack | SkialithError] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = False

    def make(self) -> Future[Ack]:
        """A future that cannot be cancelled."""
        future: Future[Ack] = Future()
        future.set_running_or_notify_cancel()
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    thread = threading.Thread(target=self._main, name="skialith-futures", daemon=True)
                    thread.start()
                    self._thread = thread
        return future

    def settle(self, future: Future[Ack], result: Ack | SkialithError) -> None:
        """Give it its result or its error, soon."""
        self._queue.put((future, result))
        if self._ended:
            self._settle_rest()

    def _main(self) -> None:
        while (item := self._queue.get()) is not None:
            _settle(*item)
        # In this order: what is handed in too late for the thread is settled by who hands it in.
        self._ended = True
        self._settle_rest()

    def _settle_rest(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                if (item := self._queue.get_nowait()) is not None:
                    _settle(*item)

    def close(self) -> None:
        """Settle what was handed in so far, and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_SECONDS)


def _settle(future: Future[Ack], result: Ack | SkialithError) -> None:
    try:
        if isinstance(result, Ack):
            future.set_result(result)
        else:
            future.set_exception(result)
    except InvalidStateError:  # somebody else settled it
        return
    except BaseException:  # what is no Exception (sys.exit) ends neither this thread nor the loop
        log.exception("a callback of a save_event_nowait future raised; its record's future is settled all the same")
