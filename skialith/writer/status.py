"""What a drain says of itself, for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class DrainStatus:
    """What a drain did since it started, and how it is.

    ``name``: its sink. ``stored``: records committed (those that were there already included); ``batches``:
    transactions. ``released``: messages acknowledged; one pulled on a connection that was lost comes, and counts, again.
    ``retries``: failed tries that are made again. ``dead_letters``: records given up. ``aside``: records that alone could
    not be stored and wait for their next try. ``last_error`` (empty: none yet) and ``last_error_at`` (UTC) stay after a
    recovery. ``database_ok``: False from a failure of the database until it answers again.
    """

    name: str
    running: bool = False
    database_ok: bool = True
    stored: int = 0
    released: int = 0
    batches: int = 0
    retries: int = 0
    dead_letters: int = 0
    aside: int = 0
    last_error: str = ""
    last_error_at: datetime | None = None
