"""What a log that went back has lost, as far as the log and the database together tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from .records import Position
from .stores.base import Store
from .wal.continuity import Run, without

LOOK_BACK_SECONDS = 30 * 24 * 3600
_MOST_TURNS = 20
_MOST_ROWS = 100_000


class Loss(NamedTuple):
    """One time that the log went back.

    ``before``: the last row of before. ``after``: the first row afterwards, or where the log goes on. ``missing``: sequences
    between that have no row of before: records that are lost, leases, parts of large records. ``whole``: False if there were
    too many rows to look at all of them; then ``missing`` ends early.
    """

    before: Position
    after: Position
    missing: list[Run]
    whole: bool


def losses(store: Store, namespace: str, log_goes_on: Callable[[int], Position]) -> Iterator[Loss]:
    """Every time the log went back that shows in the rows of the last ``LOOK_BACK_SECONDS``, oldest first.

    In one log a row that was stored later has the greater sequence; where it does not, sequences were handed out again.
    ``log_goes_on``: gives where the log has its first message that is newer than a time, or will have its next one. Raises what
    that and the store raise.
    """
    newest = store.newest(namespace)
    if newest is None:
        return
    after = log_goes_on(newest.time_ns)  # asked later: what is stored meanwhile is no sign of anything
    turns = store.turns(namespace, newest.time_ns - LOOK_BACK_SECONDS * 1_000_000_000, _MOST_TURNS)
    if newest.seq >= after.seq:
        turns.append((newest, after))
    since_ns = 0
    for before, after in turns:
        rows = store.sequences(namespace, after.seq, before.seq, (since_ns, before.time_ns), _MOST_ROWS)
        whole = len(rows) < _MOST_ROWS
        last = before.seq if whole else rows[-1]
        yield Loss(before, after, without((after.seq, last, last - after.seq + 1), rows), whole)
        since_ns = after.time_ns
