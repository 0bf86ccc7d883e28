"""What the doctor finds, as lines for people and for scripts."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["ok", "warn", "fail"]

CLOCK_WARN_SECONDS = 2.0
"""Clocks that differ by more are worth a line."""


class Finding(NamedTuple):
    """One line of the doctor. ``fix``: what to do, empty when nothing is wrong."""

    check: str
    level: Level
    detail: str
    fix: str = ""
