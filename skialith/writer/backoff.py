"""How long a drain pauses between two tries: exponential backoff with full jitter."""

from __future__ import annotations

from random import Random

from ..config import BACKOFF_FIRST_SECONDS, BACKOFF_LONGEST_SECONDS


class Backoff:
    """Pauses drawn uniformly from 0 to a cap that starts at ``first`` seconds and doubles up to ``longest``.

    ``random``: the source of the jitter; a seeded one makes the pauses repeatable.
    """

    def __init__(
        self,
        first: float = BACKOFF_FIRST_SECONDS,
        longest: float = BACKOFF_LONGEST_SECONDS,
        random: Random | None = None,
    ) -> None:
        self._first = first
        self._longest = longest
        self._random = random or Random()
        self._cap = first

    def pause(self) -> float:
        """Seconds to pause before the next try."""
        pause = self._random.uniform(0.0, self._cap)
        self._cap = min(2 * self._cap, self._longest)
        return pause

    def reset(self) -> None:
        """Start again at ``first``, after a success."""
        self._cap = self._first
