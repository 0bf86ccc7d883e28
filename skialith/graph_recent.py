"""The latest checkpoints that were looked at, for as long as the log still holds all that came since.

Operations stay in the log for ``GRAPH_KEEP_SECONDS`` at least, stored or not (``wal.stream.Stream.trim``). So whatever was
appended since a look that began less than ``GRAPH_TRUST_SECONDS`` ago still stands there, and the look is brought up to date
without the database.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from .config import GRAPH_CACHE_BYTES, GRAPH_LOOK_SECONDS, GRAPH_TRUST_SECONDS
from .graph_past import Filled, Past
from .graphs import Put, PutWrites, operation, thread_name
from .records import Record

_LOOKS = 3
"""How often a checkpoint is looked at again whose values were deleted under the look."""


def _now() -> float:
    """Seconds that go on while the machine is suspended, because the log is trimmed meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class RecentLog(Protocol):
    """What is read of the log."""

    def last_operation(self, thread_name: str, deadline: float) -> tuple[int, int] | None: ...
    def operations_after(self, thread_name: str, seq: int, deadline: float) -> list[Record] | None: ...


class _Look(NamedTuple):
    """What was seen: when the database was asked, when it was brought up to date last, on which connection, up to which
    operation (0: the log held none), how large."""

    asked: float
    began: float
    epoch: int
    seq: int
    found: Filled
    size: int


class Recent:
    """The latest checkpoints of threads. Any thread may ask."""

    def __init__(self, wal: RecentLog, look: Callable[[str], Past], timeout: float) -> None:
        """``look``: at a thread, anew. ``timeout``: seconds that the log has to answer."""
        self._wal = wal
        self._look = look
        self._timeout = timeout
        self._looks: OrderedDict[tuple[str, str], _Look] = OrderedDict()
        self._size = 0
        self._changing = threading.Lock()

    def latest(self, thread_id: str, checkpoint_ns: str) -> Filled | None:
        """The latest checkpoint with what belongs to it, or None. Raises ``WalUnavailable``, ``StoreUnavailable``."""
        place = (thread_id, checkpoint_ns)
        known = self._looks.get(place)
        if known is not None and _now() - known.asked < GRAPH_LOOK_SECONDS:
            again = self._brought_up_to_date(thread_id, known)
            if again is not None and _now() - known.began < GRAPH_TRUST_SECONDS:
                self._keep(place, again)
                return again.found
        self.forget(place)
        return self._anew(place)

    def _brought_up_to_date(self, thread_id: str, known: _Look) -> _Look | None:
        began, name, deadline = _now(), thread_name(thread_id), time.monotonic() + self._timeout
        last = self._wal.last_operation(name, deadline)
        if last is None or last[1] != known.epoch:
            return None
        seq = last[0]
        if seq in (0, known.seq):
            return known._replace(began=began)
        if seq < known.seq:
            return None
        records = self._wal.operations_after(name, known.seq, deadline)
        found = None if records is None else advanced(known.found, records)
        if not records or found is None:
            return None
        return _Look(known.asked, began, known.epoch, records[-1].position.seq, found, found.size)

    def _anew(self, place: tuple[str, str]) -> Filled | None:
        found: Filled | None = None
        for _ in range(_LOOKS):
            began = _now()
            past = self._look(place[0])
            with past.look():
                put = past.latest(place[1])
                if put is None:
                    return None
                (found,) = past.fill([put])
            if found.whole:
                if past.sure:
                    self._keep(place, _Look(began, began, past.epoch, past.last_seq, found, found.size))
                break
        return found

    # ---- what is kept

    def _keep(self, place: tuple[str, str], look: _Look) -> None:
        with self._changing:
            self._forget(place)
            if look.size > GRAPH_CACHE_BYTES // 4:
                return
            self._looks[place] = look
            self._size += look.size
            while self._size > GRAPH_CACHE_BYTES:
                _, oldest = self._looks.popitem(last=False)
                self._size -= oldest.size

    def forget(self, place: tuple[str, str]) -> None:
        """Look anew at the next time."""
        with self._changing:
            self._forget(place)

    def _forget(self, place: tuple[str, str]) -> None:
        gone = self._looks.pop(place, None)
        if gone is not None:
            self._size -= gone.size


def advanced(found: Filled, records: Iterable[Record]) -> Filled | None:
    """The latest checkpoint of its namespace after some more operations on the thread; None if they alone do not tell.

    Of a later checkpoint they do not: what is pending at it may have been written before it was put.
    """
    put = found.put
    for record in records:
        try:
            change = operation(record)
        except ValueError:
            return None
        if change.thread_id != put.thread_id:
            continue
        if not isinstance(change, (Put, PutWrites)):
            return None
        if change.checkpoint_ns != put.checkpoint_ns:
            continue
        if isinstance(change, PutWrites):
            if change.checkpoint_id == put.checkpoint_id:
                found = Filled(put, found.values, [*found.writes, change])
        elif change.checkpoint_id >= put.checkpoint_id or not change.blobs.keys().isdisjoint(found.values):
            return None
    return found
