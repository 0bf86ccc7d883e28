"""How everything here is measured: sides take turns in short blocks, and a figure is the median over several rounds."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Call = Callable[[], object]

ROUNDS = 5
"""Rounds of every measurement; each holds all its sides, so that a noisy minute hits all of them."""
FEW_ROUNDS = 3
"""Rounds of measurements that take seconds each."""
SCALE = float(os.environ.get("SKIALITH_BENCH_SCALE", "1"))
"""Share of the calls and records; the rounds stay."""
BLOCK = 100
"""Calls of one side before it is another one's turn."""
BLOCK_WARM_UP = 5
"""Calls at the start of a block that are not counted: they find the caches full of the side before."""


def scaled(count: int, least: int = 100) -> int:
    """``count`` at the wanted scale."""
    return max(least, round(count * SCALE))


def timed(call: Call, calls: int) -> list[float]:
    """Seconds of each of ``calls`` calls."""
    clock = time.perf_counter
    taken = []
    for _ in range(calls):
        began = clock()
        call()
        taken.append(clock() - began)
    return taken


def take_turns(sides: Mapping[str, Call], calls: int) -> dict[str, list[float]]:
    """Seconds of ``calls`` calls of each side, block by block in changing order."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    shuffle = random.Random(calls).shuffle
    while (left := calls - len(taken[order[0]])) > 0:
        shuffle(order)
        for name in order:
            for _ in range(BLOCK_WARM_UP):
                sides[name]()
            taken[name] += timed(sides[name], min(BLOCK, left))
        order.sort()
    return taken


def percentile(seconds: Sequence[float], percent: int) -> float:
    """The value under which ``percent`` per cent lie."""
    return statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]


class Samples:
    """What one side took, round by round, in seconds."""

    def __init__(self) -> None:
        self.rounds: list[list[float]] = []

    def add(self, seconds: list[float]) -> None:
        self.rounds.append(seconds)

    def at(self, percent: int) -> float:
        """Median over the rounds of their percentile."""
        return statistics.median(percentile(each, percent) for each in self.rounds)

    def over(self, other: Samples, percent: int) -> float:
        """Median over the rounds of this side's percentile divided by the other's in the same round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(percentile(a, percent) / percentile(b, percent) for a, b in pairs)


def collect(into: dict[str, Samples], taken: Mapping[str, list[float]]) -> None:
    """Add one round of several sides."""
    for name, seconds in taken.items():
        into.setdefault(name, Samples()).add(seconds)


def median_ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """Median over the rounds of one figure divided by the other of the same round."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))
