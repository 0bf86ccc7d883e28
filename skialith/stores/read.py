"""Reading back: pages of events, the last checkpoint, steps and dead letters, with large payloads put together again.

Readers run without a transaction. What they read never changes, except that a dead letter may be replayed or discarded at
any moment; so dead letters are always read first (one that is replayed meanwhile is then seen twice, not never).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from ..config import CLOCK_STEP_CHECKPOINTS
from ..errors import StoreUnavailable
from ..records import NOWHERE, STEP, DeadLetter, Kind, Position, Record, step_hash, step_key, supersedes
from . import rows
from .base import LetterPlace, StepEntry
from .rows import Row

WRITER = "writer"
TRACE_INGEST = "trace_ingest"

_KEYS_PER_QUERY = 500
_PARTS_PER_QUERY = 8
_TRIES = 5
_EVENTS = ", ".join(rows.EVENT_COLUMNS)
_CHECKPOINTS = ", ".join(rows.CHECKPOINT_COLUMNS)
LETTERS = ", ".join(rows.DEAD_LETTER_COLUMNS)
_LETTER_HEADS = ", ".join("NULL" if name in ("raw", "body") else name for name in rows.DEAD_LETTER_COLUMNS)
NEWEST = "ORDER BY store_time_ns DESC, seq DESC LIMIT 1"
OLDEST = "ORDER BY store_time_ns, seq LIMIT ?"
_RAW = slice(9, 12)
_LETTER_BODY = slice(-6, -3)
_BODY = slice(-3, None)

T = TypeVar("T")


class Queries(Protocol):
    """What reading needs of a connection."""

    by: str
    """Behind a table's name, with that name and an index's in it: read the rows in the order of this index, and no others."""

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Row]:
        """All rows of a query. Placeholders are ``?``."""


class PartsMissing(Exception):
    """Parts of a payload are not there."""


def stored(session: Queries, namespace: str, keys: Sequence[bytes]) -> set[bytes]:
    """Those of ``keys`` that have a row, or a dead letter of the writer."""
    found: set[bytes] = set()
    for some in some_of(keys):
        within = f"record_key IN ({marks(some)}) AND namespace = ?"
        dead = session.rows(
            f"SELECT record_key FROM dead_letters WHERE sink = ? AND {within}", (WRITER, *some, namespace)
        )
        found.update(row[0] for row in dead)
        for table in ("agent_events", "agent_checkpoints"):
            found.update(
                row[0] for row in session.rows(f"SELECT record_key FROM {table} WHERE {within}", (*some, namespace))
            )
    return found


# ---- checkpoints


def latest_checkpoint(session: Queries, namespace: str, agent_id: str) -> Record | None:
    """The checkpoint with the greatest position, dead letters included."""

    def newest() -> Record | None:
        letters = session.rows(
            f"SELECT {LETTERS} FROM dead_letters WHERE namespace = ? AND agent_id = ? AND sink = ? AND kind = ? {NEWEST}",
            (namespace, agent_id, WRITER, int(Kind.CHECKPOINT)),
        )
        found = session.rows(
            f"SELECT {_CHECKPOINTS} FROM agent_checkpoints WHERE namespace = ? AND agent_id = ? {NEWEST}",
            (namespace, agent_id),
        )
        row = rows.to_checkpoint(found[0], None) if found else None
        if row is not None:
            for each in _behind_the_clock(session, namespace, agent_id, row.position):
                other = rows.to_checkpoint(each, None)
                if supersedes(other, row):
                    row, found = other, [each]
        dead = rows.to_letter(letters[0], b"", None).record if letters else None
        if dead is not None and (row is None or supersedes(dead, row)):
            return dead._replace(body=body(session, letters[0][_LETTER_BODY]))
        return None if row is None else row._replace(body=_whole(session, row, found[0][_BODY]))

    return unmoved(newest, agent_id)


def _behind_the_clock(session: Queries, namespace: str, agent_id: str, last: Position) -> list[Row]:
    """The checkpoint of the highest sequence, if it stands before ``last`` by its time and behind it by its sequence."""
    agent = (namespace, agent_id)
    newest = (
        f"SELECT seq FROM agent_checkpoints{session.by.format('agent_checkpoints', 'agent')} "
        "WHERE namespace = ? AND agent_id = ? AND store_time_ns < ? ORDER BY store_time_ns DESC, seq DESC LIMIT ?"
    )
    query = f"SELECT MAX(seq) FROM ({newest}) AS newest"
    (seq,) = session.rows(query, (*agent, last.time_ns, CLOCK_STEP_CHECKPOINTS))[0]
    if seq is None or seq <= last.seq:
        return []
    return session.rows(
        f"SELECT {_CHECKPOINTS} FROM agent_checkpoints WHERE namespace = ? AND agent_id = ? AND seq = ? AND store_time_ns < ? "
        f"{NEWEST}",
        (*agent, seq, last.time_ns),
    )


# ---- events


def last_event(session: Queries, namespace: str, agent_id: str) -> Position:
    """Of the event with the greatest one, dead letters included; ``NOWHERE`` without one."""
    place = "SELECT store_time_ns, seq FROM"
    where = "WHERE namespace = ? AND agent_id = ?"
    found = session.rows(
        f"{place} dead_letters {where} AND sink = ? AND kind = ? {NEWEST}",
        (namespace, agent_id, WRITER, int(Kind.EVENT)),
    )
    found += session.rows(f"{place} agent_events {where} {NEWEST}", (namespace, agent_id))
    return max((Position(*row) for row in found), default=NOWHERE)


class _Place(NamedTuple):
    """One event of a page before it is loaded; ``size`` is that of its body."""

    position: Position
    key: bytes
    size: int
    dead: bool


def events(
    session: Queries,
    agent: tuple[str, str],
    after: Position,
    up_to: Position | None,
    limit: int,
    max_bytes: int | None,
) -> list[tuple[Record, bool]]:
    """A page of the events of ``agent`` (namespace, agent id) with the dead ones among them."""

    def page() -> list[tuple[Record, bool]]:
        places = sorted(_places(session, agent, after, up_to, limit))[:limit]
        return _load(session, _first(places, max_bytes))

    return unmoved(page, agent[1])


def _places(
    session: Queries, agent: tuple[str, str], after: Position, up_to: Position | None, limit: int
) -> Iterator[_Place]:
    """The page's events in no order: the first ``limit`` of each table."""
    within, args = between(after, up_to)
    dead = session.rows(
        "SELECT store_time_ns, seq, record_key, body_bytes FROM dead_letters WHERE namespace = ? AND agent_id = ? "
        f"AND sink = ? AND kind = ? AND {within} AND NOT EXISTS "
        f"(SELECT 1 FROM agent_events WHERE agent_events.record_key = dead_letters.record_key) {OLDEST}",
        (*agent, WRITER, int(Kind.EVENT), *args, limit),
    )
    alive = session.rows(
        f"SELECT store_time_ns, seq, record_key, body_bytes FROM agent_events{session.by.format('agent_events', 'agent')} "
        f"WHERE namespace = ? AND agent_id = ? AND {within} {OLDEST}",
        (*agent, *args, limit),
    )
    keys = {key for _, _, key, _ in alive}
    for time_ns, seq, key, size in alive:
        yield _Place(Position(time_ns, seq), key, size, False)
    for time_ns, seq, key, size in dead:
        if key not in keys:
            yield _Place(Position(time_ns, seq), key, size, True)


def _first(places: list[_Place], max_bytes: int | None) -> list[_Place]:
    """Those whose bodies stay within ``max_bytes``, but one at least."""
    size = 0
    for n, place in enumerate(places):
        size += place.size
        if n and max_bytes is not None and size > max_bytes:
            return places[:n]
    return places


def _load(session: Queries, places: list[_Place]) -> list[tuple[Record, bool]]:
    """The whole records. Raises ``PartsMissing`` if a dead one is gone."""
    found: dict[bytes, Record] = {}
    for row in _by_key(session, f"{LETTERS} FROM dead_letters", [place.key for place in places if place.dead], WRITER):
        dead = rows.to_letter(row, b"", None).record
        if dead is not None:
            found[dead.key] = dead._replace(body=body(session, row[_LETTER_BODY]))
    for row in _by_key(session, f"{_EVENTS} FROM agent_events", [place.key for place in places if not place.dead]):
        event = rows.to_event(row, None)
        found[event.key] = event._replace(body=_whole(session, event, row[_BODY]))
    if any(place.key not in found for place in places):
        raise PartsMissing
    return [(found[place.key], place.dead) for place in places]


def _by_key(session: Queries, what: str, keys: Sequence[bytes], sink: str | None = None) -> Iterator[Row]:
    where, args = ("", ()) if sink is None else ("sink = ? AND ", (sink,))
    for some in some_of(keys):
        yield from session.rows(f"SELECT {what} WHERE {where}record_key IN ({marks(some)})", (*args, *some))


def between(after: Position, up_to: Position | None) -> tuple[str, tuple[int, ...]]:
    """The condition after < position <= up_to. Not as a comparison of pairs: for that MySQL does not use an index."""
    sql = "store_time_ns >= ? AND (store_time_ns > ? OR seq > ?)"
    args: tuple[int, ...] = (after.time_ns, after.time_ns, after.seq)
    if up_to is not None:
        sql += " AND store_time_ns <= ? AND (store_time_ns < ? OR seq <= ?)"
        args += (up_to.time_ns, up_to.time_ns, up_to.seq)
    return sql, args


def event(session: Queries, agent: tuple[str, str], key: bytes) -> Record | None:
    """The event of ``agent`` (namespace, agent id) with this key; a dead one if it is no more than that."""
    where = "record_key = ? AND namespace = ? AND agent_id = ?"

    def read() -> Record | None:
        dead = session.rows(
            f"SELECT record_key FROM dead_letters WHERE sink = ? AND kind = ? AND {where}",
            (WRITER, int(Kind.EVENT), key, *agent),
        )
        alive = session.rows(f"SELECT record_key FROM agent_events WHERE {where}", (key, *agent))
        if not alive and not dead:
            return None
        return _load(session, [_Place(NOWHERE, key, 0, not alive)])[0][0]

    return unmoved(read, agent[1])


# ---- steps


def steps(
    session: Queries, agent: tuple[str, str], after: Position, limit: int, max_bytes: int | None
) -> list[StepEntry]:
    """A page of the recorded steps of ``agent`` (namespace, agent id) with the dead ones among them."""

    def page() -> list[StepEntry]:
        places = sorted(_step_places(session, agent, after, limit))[:limit]
        wanted = places if max_bytes is None else list(_within(places, max_bytes))
        whole = {record.key: record for record, _ in _load(session, wanted)}
        return [StepEntry(place.key, place.position, whole.get(place.key)) for place in places]

    return unmoved(page, agent[1])


def _step_places(session: Queries, agent: tuple[str, str], after: Position, limit: int) -> Iterator[_Place]:
    within, args = between(after, None)
    dead = session.rows(
        "SELECT store_time_ns, seq, record_key, body_bytes, record_id FROM dead_letters WHERE namespace = ? AND agent_id = ? "
        f"AND sink = ? AND kind = ? AND event_type = ? AND {within} AND NOT EXISTS "
        "(SELECT 1 FROM agent_events WHERE agent_events.record_key = dead_letters.record_key)",
        (*agent, WRITER, int(Kind.EVENT), STEP, *args),
    )
    alive = session.rows(
        "SELECT place.store_time_ns, place.seq, place.record_key, event.body_bytes "
        f"FROM agent_steps AS place{session.by.format('agent_steps', 'agent')} "
        "JOIN agent_events AS event ON event.record_key = place.record_key "
        f"WHERE place.namespace = ? AND place.agent_id = ? AND {_of_place(within)} {_of_place(OLDEST)}",
        (*agent, *args, limit),
    )
    keys = {key for _, _, key, _ in alive}
    for time_ns, seq, key, size in alive:
        yield _Place(Position(time_ns, seq), key, size, False)
    begun = step_hash(*agent)
    for time_ns, seq, key, size, step_id in dead:
        if key not in keys and step_key(begun, rows.text(step_id)) == key:
            yield _Place(Position(time_ns, seq), key, size, True)


def _of_place(sql: str) -> str:
    return sql.replace("store_time_ns", "place.store_time_ns").replace("seq", "place.seq")


def _within(places: list[_Place], max_bytes: int) -> Iterator[_Place]:
    """Those whose bodies stay within ``max_bytes`` together."""
    for place in places:
        max_bytes -= place.size
        if max_bytes < 0:
            return
        yield place


# ---- dead letters


def letters(
    session: Queries, namespace: str, sink: str | None, after: LetterPlace | None, limit: int, whole: bool
) -> list[DeadLetter]:
    """Dead letters in their order."""
    where, args = "namespace = ?", [namespace]
    if sink is not None:
        where, args = f"{where} AND sink = ?", [*args, sink]
    start: tuple[Any, ...] = ()
    if after is not None:
        (time_ns, seq), *last = after
        where += (
            " AND store_time_ns >= ? AND (store_time_ns > ? OR seq > ? "
            "OR (seq = ? AND (sink > ? OR (sink = ? AND record_key > ?))))"
        )
        start = (time_ns, time_ns, seq, seq, last[0], *last)
    found = session.rows(
        f"SELECT {LETTERS if whole else _LETTER_HEADS} FROM dead_letters{session.by.format('dead_letters', 'position')} "
        f"WHERE {where} ORDER BY store_time_ns, seq, sink, record_key LIMIT ?",
        (*args, *start, limit),
    )
    if not whole:
        return [rows.to_letter(row, b"", None) for row in found]
    return [letter for letter in (whole_letter(session, row) for row in found) if letter is not None]


def letter(session: Queries, sink: str, key: bytes) -> DeadLetter | None:
    """One dead letter, or None."""
    found = session.rows(f"SELECT {LETTERS} FROM dead_letters WHERE sink = ? AND record_key = ?", (sink, key))
    return whole_letter(session, found[0]) if found else None


def whole_letter(session: Queries, row: Row) -> DeadLetter | None:
    """The letter of a row with its payloads; None if it was replayed or discarded since the row was read."""
    try:
        return rows.to_letter(row, body(session, row[_RAW]) or b"", body(session, row[_LETTER_BODY]))
    except PartsMissing:
        return None


# ---- payloads


def body(session: Queries, columns: Row) -> bytes | None:
    """The payload behind its three columns (inline, size, key of the parts); None if there is none.

    Raises ``PartsMissing``. Read a few parts at a time, because the driver holds a whole answer in memory beside it.
    """
    inline, size, parts_key = columns
    if parts_key is None:
        return None if inline is None else bytes(inline)
    pieces: list[bytes] = []
    for start in range(0, rows.part_count(size), _PARTS_PER_QUERY):
        found = session.rows(
            "SELECT data FROM payload_parts WHERE parts_key = ? AND n >= ? AND n < ? ORDER BY n",
            (parts_key, start, start + _PARTS_PER_QUERY),
        )
        pieces.extend(row[0] for row in found)
    if sum(map(len, pieces)) != size:
        raise PartsMissing
    return b"".join(pieces)


def _whole(session: Queries, record: Record, columns: Row) -> bytes | None:
    """The payload of a stored row, whose parts are never removed."""
    try:
        return body(session, columns)
    except PartsMissing:
        raise StoreUnavailable(
            f"{rows.describe(record)}: its row is there, but parts of its payload are missing from payload_parts; something "
            "other than Skialith deleted them, restore them from a backup",
            retryable=False,
        ) from None


def unmoved(read: Callable[[], T], agent_id: str) -> T:
    """What ``read`` returns, tried again when a dead letter was replayed or discarded under it."""
    for _ in range(_TRIES):
        try:
            return read()
        except PartsMissing:
            continue
    raise StoreUnavailable(
        f"agent {agent_id!r}: its dead letters changed {_TRIES} times while they were read; read again"
    )


def some_of(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        yield keys[start : start + _KEYS_PER_QUERY]


def marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))
