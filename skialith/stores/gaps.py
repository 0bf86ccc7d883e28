"""Where a namespace's rows stand in the log by sequence, for finding what a log that went back has lost."""

from __future__ import annotations

from ..records import Position
from .read import WRITER, Queries

_RECORDS = " UNION ALL ".join(
    f"SELECT store_time_ns, seq FROM {table} WHERE namespace = ?{more}"
    for table, more in (("agent_events", ""), ("agent_checkpoints", ""), ("dead_letters", f" AND sink = '{WRITER}'"))
)
_ALL = " UNION ALL ".join(
    [
        _RECORDS,
        *(
            f"SELECT store_time_ns, seq FROM {table} WHERE namespace = ?"
            for table in ("graph_threads", "graph_checkpoints", "graph_blobs", "graph_writes")
        ),
    ]
)


def newest(session: Queries, namespace: str) -> Position | None:
    """The position of the row that the log stored last."""
    query = f"SELECT store_time_ns, seq FROM ({_RECORDS}) AS r ORDER BY store_time_ns DESC, seq DESC LIMIT 1"
    found = session.rows(query, [namespace] * 3)
    return Position(*found[0]) if found else None


def turns(session: Queries, namespace: str, since_ns: int, limit: int) -> list[tuple[Position, Position]]:
    """The neighbours in time of which the later one has the lower sequence, or the same."""
    found = session.rows(
        "SELECT before_ns, before_seq, store_time_ns, seq FROM (SELECT store_time_ns, seq, "
        "LAG(store_time_ns) OVER (ORDER BY store_time_ns, seq) AS before_ns, "
        "LAG(seq) OVER (ORDER BY store_time_ns, seq) AS before_seq "
        f"FROM ({_RECORDS}) AS r WHERE store_time_ns >= ?) AS t "
        "WHERE before_seq >= seq AND before_ns < store_time_ns ORDER BY store_time_ns LIMIT ?",
        [*[namespace] * 3, since_ns, limit],
    )
    return [(Position(before_ns, before), Position(time_ns, seq)) for before_ns, before, time_ns, seq in found]


def sequences(
    session: Queries, namespace: str, first: int, last: int, between_ns: tuple[int, int], limit: int
) -> list[int]:
    """The sequences of rows from ``first`` to ``last`` that the log stored between these times, in order."""
    within = "seq BETWEEN ? AND ? AND store_time_ns BETWEEN ? AND ?"
    found = session.rows(
        f"SELECT DISTINCT seq FROM ({_ALL}) AS r WHERE {within} ORDER BY seq LIMIT ?",
        [*[namespace] * 7, first, last, *between_ns, limit],
    )
    return [row[0] for row in found]
