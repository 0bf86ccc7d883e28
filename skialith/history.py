"""Merging the log and the database into one past: events oldest first, the newest checkpoint, the recorded steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple, Protocol

from .config import HISTORY_PAGE_BYTES, HISTORY_PAGE_RECORDS, STEP_MEMORY_BYTES, STEP_PAGE_RECORDS
from .errors import BodyMissing, StoreUnavailable, WalRejected
from .records import NOWHERE, Position, Record, is_step, supersedes
from .stores.base import StepEntry


class PastLog(Protocol):
    """What is read of the log."""

    def end(self, deadline: float) -> Position: ...
    def events(self, agent_id: str, after: Position, deadline: float, seq: int = 0) -> tuple[list[Record], bool]: ...
    def with_body(self, record: Record, deadline: float) -> Record: ...
    def last_checkpoint(self, agent_id: str, deadline: float) -> Record | None: ...
    def dead_records(self, agent_id: str, kind: str, deadline: float) -> list[Record]: ...
    def anything_stored(self, timeout: float) -> bool: ...


class PastStore(Protocol):
    """What is read of the database."""

    def events(
        self,
        namespace: str,
        agent_id: str,
        after: Position,
        up_to: Position | None,
        limit: int,
        *,
        max_bytes: int | None = None,
    ) -> list[tuple[Record, bool]]: ...
    def stored(self, namespace: str, keys: Sequence[bytes]) -> set[bytes]: ...
    def latest_checkpoint(self, namespace: str, agent_id: str) -> Record | None: ...
    def last_event(self, namespace: str, agent_id: str) -> Position: ...
    def steps(
        self, namespace: str, agent_id: str, after: Position, limit: int, *, max_bytes: int | None = None
    ) -> list[StepEntry]: ...
    def event(self, namespace: str, agent_id: str, key: bytes) -> Record | None: ...


class NothingStored:
    """Stands for the database of a log of which nothing was stored yet."""

    def events(self, *_: object, **__: object) -> list[tuple[Record, bool]]:
        return []

    def stored(self, *_: object, **__: object) -> set[bytes]:
        return set()

    def latest_checkpoint(self, *_: object, **__: object) -> Record | None:
        return None

    def last_event(self, *_: object) -> Position:
        return NOWHERE

    def steps(self, *_: object, **__: object) -> list[StepEntry]:
        return []

    def event(self, *_: object) -> Record | None:
        return None


Entry = tuple[Record, bool, bool]
"""A record with its whole body, whether the database has it, and whether it is a dead letter."""


class History:
    """The events of one agent, read page by page: first a bounded page of the log, then the database up to its end.

    In that order a record that moves while it is read is seen at least once, and the key of a record makes it once. ``store``
    is asked for behind each page of the log, because the first writer of a namespace may start while it is read.
    """

    def __init__(
        self,
        wal: PastLog,
        store: Callable[[], PastStore],
        namespace: str,
        agent_id: str,
        timeout: float,
    ) -> None:
        self._wal = wal
        self._store = store
        self._namespace = namespace
        self._agent_id = agent_id
        self._timeout = timeout
        self._unstored: set[bytes] = set()

    def entries(self, after: Position, at_once: int = HISTORY_PAGE_RECORDS) -> Iterator[Entry]:
        """Events behind ``after`` until the end of the log at the time of the call, oldest first, read lazily.

        ``at_once``: how many the database is asked for together.
        """
        end = self._wal.end(self._deadline())
        dead = self._wal.dead_records(self._agent_id, "event", self._deadline())
        cursor = after
        heads, more = self._wal.events(self._agent_id, cursor, self._deadline())
        places = [record.position for record in heads]
        end, ahead = self._end_of_all(max([end, *(record.position for record in dead)]), places)
        while more and ahead:
            # Times do not go on with the sequences, so no page of the log bounds what stands in another one.
            some, more = self._wal.events(self._agent_id, after, self._deadline(), heads[-1].position.seq + 1)
            heads += some
            end = max([end, *(record.position for record in some)])
        while True:
            upper = min(heads[-1].position, end) if more else end
            buried = [record for record in dead if cursor < record.position <= upper]
            yield from self._between(cursor, upper, heads, buried, at_once)
            if upper >= end:
                return
            cursor = upper
            heads, more = self._wal.events(self._agent_id, cursor, self._deadline())

    def _end_of_all(self, end: Position, places: list[Position]) -> tuple[Position, bool]:
        """The end of what there is in the log (``places`` of its first page) and the database, and whether the clock of the log's
        server was set back: then something stands in its future.

        What is merely stored since ``end`` was asked for may have something before it that is not, so it is no end.
        """
        last = self._store().last_event(self._namespace, self._agent_id)
        ahead = last > end and last.time_ns > self._wal.end(self._deadline()).time_ns
        furthest = max([end, *places, *([last] if ahead else [])])
        return furthest, ahead or furthest > end or places != sorted(places)

    def _between(
        self,
        after: Position,
        upper: Position,
        heads: list[Record],
        buried: list[Record],
        at_once: int,
    ) -> Iterator[Entry]:
        """Everything in (after, upper], in pages of the database; large bodies of the log are read one at a time."""
        cursor = after
        while cursor < upper:
            rows = self._store().events(
                self._namespace, self._agent_id, cursor, upper, at_once, max_bytes=HISTORY_PAGE_BYTES
            )
            bound = rows[-1][0].position if rows else upper
            page: list[Entry] = [(record, True, dead) for record, dead in rows if record.key not in self._unstored]
            seen = {record.key for record, _ in rows}
            for record in buried:
                if cursor < record.position <= bound and record.key not in seen:
                    seen.add(record.key)
                    page.append((record, False, True))
            unstored = [r for r in heads if cursor < r.position <= bound and r.key not in seen]
            page.extend((record, False, False) for record in unstored)
            stored = self._store().stored(self._namespace, [r.key for r in unstored]) if unstored else set()
            for record, is_stored, dead in sorted(page, key=lambda entry: entry[0].position):
                if is_stored or dead:
                    yield record, is_stored, dead
                else:
                    yield from self._from_log(record, record.key in stored)
            cursor = bound

    def _from_log(self, record: Record, stored: bool) -> Iterator[Entry]:
        """A record of the log's page that the database's page does not have.

        ``stored``: the database has its key by now. Then it moved since the page was read, or it was saved before, at
        another position, and is passed over.
        """
        if record.key in self._unstored:
            return
        row = self._moved(record) if stored else None
        if not stored:
            try:
                whole = self._wal.with_body(record, self._deadline())
            except WalRejected:
                # Its body left the log, so it was stored since the page was read.
                row = self._moved(record)
                if row is None:
                    raise
            else:
                self._unstored.add(record.key)
                row = whole, False, False
        if row is not None:
            yield row

    def _moved(self, record: Record) -> Entry | None:
        """The row of a record that moved to the database while its page was read; None if it stands elsewhere."""
        before = Position(record.position.time_ns, record.position.seq - 1)
        for row, dead in self._store().events(self._namespace, self._agent_id, before, record.position, 1):
            if row.key == record.key:
                return row, True, dead
        return None

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout


class FoundStep(NamedTuple):
    """A recorded step. ``body``: its payload as encoded; None if it was left where it stands."""

    position: Position
    codec: int
    body: bytes | None


class StepPast:
    """The recorded steps of one agent, by their keys.

    In the order of :class:`History`: the log, then the database, whose row counts. The log is read from its first event of
    the agent on, the database by its index of steps.
    """

    def __init__(
        self,
        wal: PastLog,
        store: Callable[[], PastStore],
        namespace: str,
        agent_id: str,
        timeout: float,
    ) -> None:
        self._wal = wal
        self._store = store
        self._namespace = namespace
        self._agent_id = agent_id
        self._timeout = timeout

    def load(self, memory: int = STEP_MEMORY_BYTES) -> dict[bytes, FoundStep]:
        """All of them; bodies beyond ``memory`` bytes together are left where they stand.

        Raises ``StoreUnavailable`` if the database does not answer, unless the log still holds all there ever was.
        """
        found: dict[bytes, FoundStep] = {}
        for record in self._in_log():
            memory -= len(record.body or b"")
            found.setdefault(record.key, _found(record, memory >= 0))
        for record in filter(is_step, self._wal.dead_records(self._agent_id, "event", self._deadline())):
            found.setdefault(record.key, _found(record, True))
        try:
            for entry in self._in_store(max(0, memory)):
                there = entry.record
                found[entry.key] = FoundStep(entry.position, 0, None) if there is None else _found(there, True)
        except StoreUnavailable as error:
            self._check_all_in_log(error)
        return found

    def _check_all_in_log(self, error: StoreUnavailable) -> None:
        """The database does not answer: that is no matter while the log still holds all there ever was."""
        if self._wal.anything_stored(self._timeout):
            raise StoreUnavailable(
                f"agent {self._agent_id!r}: the database does not answer ({error}), so it cannot be told which steps are "
                "recorded; no function was called and nothing is lost, call again when the database is back"
            ) from error

    def _in_log(self) -> Iterator[Record]:
        cursor, more = NOWHERE, True
        while more:
            records, more = self._wal.events(self._agent_id, cursor, self._deadline())
            yield from filter(is_step, records)
            cursor = records[-1].position if records else cursor

    def _in_store(self, memory: int) -> Iterator[StepEntry]:
        cursor = NOWHERE
        while True:
            page = self._store().steps(self._namespace, self._agent_id, cursor, STEP_PAGE_RECORDS, max_bytes=memory)
            yield from page
            if len(page) < STEP_PAGE_RECORDS:
                return
            cursor = page[-1].position
            sizes = [len(entry.record.body or b"") for entry in page if entry.record is not None]
            memory = max(0, memory - sum(sizes)) if len(sizes) == len(page) else 0

    def read(self, key: bytes, step_id: str, position: Position) -> FoundStep:
        """One step with its body. Raises ``BodyMissing`` if that is lost."""
        before = Position(position.time_ns, position.seq - 1)
        for record in self._wal.events(self._agent_id, before, self._deadline())[0][:1]:
            if record.key == key:
                with suppress(WalRejected):  # It was stored and its body left the log.
                    return _found(self._wal.with_body(record, self._deadline()), True)
        for entry in self._store().steps(self._namespace, self._agent_id, before, 1):
            if entry.key == key and entry.record is not None and entry.record.body is not None:
                return _found(entry.record, True)
        raise self._lost(step_id, position)

    def lookup(self, key: bytes, step_id: str) -> FoundStep | None:
        """One step with its body, wherever it stands; None if it is not recorded. However many steps the agent has, this reads
        one row, and of the log what is not trimmed if there is no row.

        Raises ``StoreUnavailable`` as :meth:`load`, because the row of an earlier record counts; ``BodyMissing``.
        """
        record = self._row(key)
        if record is None:
            record = self._unstored(key)
            # What left the log while it was read is in the database by now.
            record = self._row(key) or record
        if record is None:
            return None
        if record.body is None:
            raise self._lost(step_id, record.position)
        return _found(record, True)

    def _row(self, key: bytes) -> Record | None:
        try:
            return self._store().event(self._namespace, self._agent_id, key)
        except StoreUnavailable as error:
            self._check_all_in_log(error)
        return None

    def _unstored(self, key: bytes) -> Record | None:
        """The step in the log or among its dead letters; without its body if that left the log meanwhile."""
        for record in self._in_log():
            if record.key == key:
                with suppress(WalRejected):
                    return self._wal.with_body(record, self._deadline())
                return record
        dead = self._wal.dead_records(self._agent_id, "event", self._deadline())
        return next((record for record in dead if record.key == key), None)

    def find(self, key: bytes, step_id: str) -> FoundStep:
        """One step with its body, wherever it stands. Raises ``BodyMissing`` if it is nowhere."""
        found = self.lookup(key, step_id)
        if found is None:
            raise self._lost(step_id, NOWHERE)
        return found

    def _lost(self, step_id: str, position: Position) -> BodyMissing:
        return BodyMissing(
            f"agent {self._agent_id!r}: the result of step {step_id!r} (sequence {position.seq}) is lost: it is a dead letter "
            "without a body, or was deleted; see `skialith dead-letters list`"
        )

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout


def _found(record: Record, keep: bool) -> FoundStep:
    return FoundStep(record.position, record.codec, record.body if keep else None)


Source = Literal["wal", "database", "none"]
Found = tuple[Record | None, Source, bool]
"""An agent's newest checkpoint, where it was read, and whether the database answered."""


def newest_checkpoint(
    wal: PastLog,
    store: Callable[[], PastStore],
    namespace: str,
    agent_id: str,
    deadline: float,
) -> Found:
    """The checkpoint with the greatest position, where it was read, and whether the database answered.

    The log is read first: what is trimmed from it afterwards is in the database by then. Raises ``StoreUnavailable`` when
    the database does not answer and the log holds no checkpoint, because then nobody can tell whether there is one.
    """
    found = newest_in_log(wal.last_checkpoint(agent_id, deadline), wal.dead_records(agent_id, "checkpoint", deadline))
    try:
        row: Record | StoreUnavailable | None = store().latest_checkpoint(namespace, agent_id)
    except StoreUnavailable as error:
        row = error
    return newest_of(agent_id, found, row)


def newest_in_log(last: Record | None, dead: Sequence[Record]) -> Record | None:
    """The newer of an agent's last checkpoint in the log and its checkpoints in the dead-letter stream."""
    for record in dead:
        last = _newer(last, record)
    return last


def newest_of(agent_id: str, found: Record | None, row: Record | StoreUnavailable | None) -> Found:
    """What :func:`newest_checkpoint` gives and raises, of what the log and then the database said."""
    if isinstance(row, StoreUnavailable):
        if found is None:
            raise StoreUnavailable(
                f"agent {agent_id!r}: the log holds no checkpoint and the database does not answer ({row}), so its state "
                "cannot be told; nothing is lost, call again when the database is back"
            ) from row
        return found, "wal", False
    if row is not None and _newer(found, row) is row:
        return row, "database", True
    return found, "wal" if found is not None else "none", True


def _newer(one: Record | None, other: Record) -> Record:
    if one is None or one.key == other.key or supersedes(other, one):
        return other
    return one


__all__ = [
    "NOWHERE",
    "Entry",
    "Found",
    "FoundStep",
    "History",
    "StepPast",
    "newest_checkpoint",
    "newest_in_log",
    "newest_of",
]
