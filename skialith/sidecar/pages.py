"""Where a page begins, how long it is, and the times between which it looks: the parameters that lists have in common."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any

from fastapi import Depends, Query
from pydantic import AwareDatetime, BeforeValidator

from ..records import NOWHERE, Position
from .config import PAGE_DEFAULT, PAGE_LARGEST

_MOST = 2**63 - 1
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

Limit = Annotated[int, Query(ge=1, le=PAGE_LARGEST, description="Most entries of the page.", examples=[PAGE_DEFAULT])]


CURSOR = "([0-9]{1,18}|[1-8][0-9]{18})-([0-9]{1,18}|[1-8][0-9]{18})"
"""What a position looks like, as a pattern; its numbers are below 9e18, which fits into 64 bits."""


def position(cursor: str) -> Position:
    """The position that a cursor begins with."""
    time_ns, seq = cursor.split("-")[:2]
    return Position(int(time_ns), int(seq))


async def _after(
    after: Annotated[
        str | None,
        Query(
            pattern=f"^{CURSOR}$",
            description="A cursor: only what stands behind it. That is `next` of the page before, or the `cursor` of an entry.",
            examples=["1795573498000123000-1795573498000123"],
        ),
    ] = None,
) -> Position:
    return NOWHERE if after is None else position(after)


After = Annotated[Position, Depends(_after)]


def _checked(value: Any) -> Any:
    if not isinstance(value, str) or not _RFC3339.fullmatch(value):
        raise ValueError("use RFC 3339 with an offset, 2026-01-01T12:00:00Z; in a URL the + of an offset is %2B")
    return value


Time = Annotated[AwareDatetime, BeforeValidator(_checked)]
"""A time, RFC 3339 with its offset."""


def unix_ns(moment: datetime) -> int:
    """Nanoseconds since 1970; a time that no log has stored anything at becomes the nearest one that it could."""
    return min(max(0, (moment - _EPOCH) // timedelta(microseconds=1) * 1000), _MOST)
