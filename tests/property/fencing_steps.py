"""The steps of an exploration of fencing: drawn at random, begun in a certain way, and made fewer when they fail."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

WEIGHTS = {
    "write": 40,
    "write_large": 4,
    "hand": 10,
    "settle": 4,
    "claim": 8,
    "claim_for": 7,
    "race": 4,
    "adopt": 8,
    "adopt_at_once": 2,
    "release": 3,
    "disown": 3,
    "expire": 3,
    "age": 0.2,
    "give_up": 8,
    "cut_off": 5,
    "lose_answers": 5,
    "cut_answer": 6,
    "heal": 12,
    "cut": 3,
    "replay": 14,
    "replay_lease": 8,
    "kill": 2,
    "restart": 1,
}


class Step(NamedTuple):
    """One step, and what it draws its choices from."""

    name: str
    seed: int


def steps(seed: int, count: int, **weights: float) -> list[Step]:
    """So many steps at random."""
    dice, weight = random.Random(seed), {**WEIGHTS, **weights}
    names = dice.choices(list(weight), list(weight.values()), k=count)
    return [Step(name, dice.randrange(1 << 32)) for name in names]


def directed(seed: int, names: Sequence[str], count: int) -> list[Step]:
    """These steps so many times, and a third as many at random between them."""
    dice, program = random.Random(seed), []
    between = iter(steps(seed, count * len(names), age=0, restart=0))
    for name in [*names] * count:
        program.append(Step(name, dice.randrange(1 << 32)))
        if dice.random() < 1 / 3:
            program.append(next(between))
    return program


def shrunk(program: list[Step], fails: Callable[[list[Step]], bool], seconds: float) -> list[Step]:
    """The steps without those that are not needed to fail, as far as time allows."""
    until, size = time.monotonic() + seconds, len(program) // 2
    while size and time.monotonic() < until:
        for shorter in _without(program, size):
            if time.monotonic() > until:
                break
            if fails(shorter):
                program = shorter
                break
        else:
            size //= 2
    return program


def _without(program: list[Step], size: int) -> Iterator[list[Step]]:
    for start in range(0, len(program), size):
        yield program[:start] + program[start + size :]
