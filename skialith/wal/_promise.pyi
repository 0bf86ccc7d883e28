"""One result that a thread waits for, in C: whatever a signal's handler raises, no lock stays held."""

from typing import Any, final

@final
class Promise:
    """Settled once, by any thread; one thread may wait for it.

    A ``concurrent.futures.Future`` will not do: its condition is entered in Python code, and an exception raised there by a
    signal's handler leaves its lock held for ever (https://bugs.python.org/issue29988); the loop thread, coming to set the
    result, would hang on it and every call of the process with it.
    """

    done: bool
    """Settled, or given up."""
    given_up: bool

    def set(self, result: object) -> bool:
        """False if it was done before."""

    def fail(self, error: BaseException) -> bool:
        """The waiting thread raises ``error``; False if it was done before."""

    def give_up(self) -> bool:
        """Nobody waits any more; False if it was done before."""

    def wait(self, seconds: float) -> Any:
        """The result. Raises the error it failed with, ``TimeoutError`` if it is not done by then, and what a signal's
        handler raises."""
