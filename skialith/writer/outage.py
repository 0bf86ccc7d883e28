"""A failure that goes on: since when, how often, how long to pause, and how seldom to speak of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from random import Random

from ..config import WRITER_WARN_SECONDS
from ..errors import SkialithError
from .backoff import Backoff

log = logging.getLogger("skialith.writer")


class Throttle:
    """Lets the first of many equal log lines through, and then one every ``seconds``."""

    def __init__(self, seconds: float = WRITER_WARN_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._next: float | None = None
        self._count = 0

    def due(self) -> int:
        """How many lines this one stands for, itself included; 0 when it is not to be logged now."""
        self._count += 1
        now = self._clock()
        if self._next is not None and now < self._next:
            return 0
        self._next = now + self._seconds
        count, self._count = self._count, 0
        return count


class Outage:
    """One thing that a drain needs and that may be away; closed until the first failure, open until :meth:`over`.

    ``what`` completes "cannot ...": ``"writer: cannot reach the log"``.
    """

    def __init__(self, what: str, *, random: Random | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._backoff = Backoff(random=random)
        self._throttle = Throttle(WRITER_WARN_SECONDS, clock)
        self._since: float | None = None
        self._announced = False
        self.failures = 0

    @property
    def seconds(self) -> float:
        """How long it has lasted; 0 when there is none."""
        return 0.0 if self._since is None else self._clock() - self._since

    def failed(self, error: Exception, began: float) -> None:
        """Count a failure of a try that began at ``began`` (the clock's time) and say so if it is time to.

        An error that is not one of Skialith's own is a bug or a driver's surprise, so its traceback is logged.
        """
        if self._since is None:
            self._since = began
        self.failures += 1
        if self._throttle.due():
            self._announced = True
            log.warning(
                "%s: %s (%d failures in %.1f s); trying again, nothing is lost: the records stay in the log",
                self._what,
                error,
                self.failures,
                self.seconds,
                exc_info=None if isinstance(error, SkialithError) else error,
            )

    def pause(self) -> float:
        """Seconds to pause before the next try."""
        return self._backoff.pause()

    def over(self) -> None:
        """It worked: close the outage; one line says so if its beginning was logged."""
        if self._since is None:
            return
        if self._announced:
            log.info("%s: over after %.1f s and %d failures", self._what, self.seconds, self.failures)
        self._since = None
        self._announced = False
        self.failures = 0
        self._backoff.reset()
