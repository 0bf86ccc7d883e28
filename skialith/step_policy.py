"""How often a step's function is tried, after what pauses, and which of its errors are recorded."""

from __future__ import annotations

from .config import (
    STEP_BACKOFF_FACTOR,
    STEP_BACKOFF_LIMIT_SECONDS,
    STEP_BACKOFF_LONGEST_SECONDS,
    STEP_BACKOFF_SECONDS,
    STEP_RETRIES,
)
from .errors import InvalidArgument, SkialithError, StepFailed


class Policy:
    """How often and after what pauses a step's function is called again, and which errors are recorded. Checked once."""

    FIRST = STEP_BACKOFF_SECONDS
    FACTOR = STEP_BACKOFF_FACTOR
    LONGEST = STEP_BACKOFF_LONGEST_SECONDS

    __slots__ = ("_factor", "_first", "_longest", "record_errors", "retries", "retry_on")

    def __init__(
        self,
        retries: int = 0,
        backoff: float = FIRST,
        backoff_factor: float = FACTOR,
        backoff_max: float = LONGEST,
        retry_on: tuple[type[Exception], ...] = (Exception,),
        record_errors: tuple[type[Exception], ...] = (),
    ) -> None:
        if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= STEP_RETRIES:
            raise InvalidArgument(
                f"retries must be a whole number from 0 to {STEP_RETRIES}, not {retries!r}", argument="retries"
            )
        self.retries = retries
        self._first = _number("backoff", backoff, 0, STEP_BACKOFF_LIMIT_SECONDS)
        self._factor = _number("backoff_factor", backoff_factor, 1, STEP_RETRIES)
        self._longest = _number("backoff_max", backoff_max, 0, STEP_BACKOFF_LIMIT_SECONDS)
        self.retry_on = _exceptions("retry_on", retry_on)
        self.record_errors = _exceptions("record_errors", record_errors)

    def pause(self, failures: int, share: float) -> float:
        """Seconds before the next attempt after so many failed ones; ``share``: a random number from 0 to 1.

        Between half of the pause and all of it. Not full jitter: retries of a step are few, and a service that asked for
        time would get them all at once when the dice fall badly.
        """
        whole = min(self._longest, self._first * self._factor ** (failures - 1))
        return whole * (0.5 + share / 2)

    def tries_again(self, error: Exception, failures: int) -> bool:
        """Whether the function is called again after ``error``. Errors of Skialith's own only if that may help."""
        if failures > self.retries or not isinstance(error, self.retry_on):
            return False
        return error.retryable if isinstance(error, SkialithError) else True

    def records(self, error: Exception) -> bool:
        """Whether ``error`` is recorded. Errors of Skialith's own say nothing of the step, except that an inner one failed."""
        own = isinstance(error, SkialithError) and not isinstance(error, StepFailed)
        return not own and isinstance(error, self.record_errors)


def _number(argument: str, value: float, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InvalidArgument(
            f"{argument} must be a number from {least:g} to {most:g}, not {value!r}", argument=argument
        )
    return float(value)


def _exceptions(argument: str, kinds: object) -> tuple[type[Exception], ...]:
    found = kinds if isinstance(kinds, tuple) else (kinds,)
    for kind in found:
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            raise InvalidArgument(
                f"{argument} must hold classes of Exception, not {kind!r}: what ends a program (KeyboardInterrupt, "
                "SystemExit) is never retried and never recorded",
                argument=argument,
            )
    return found


ONCE = Policy()
"""One attempt, and no error is recorded."""
