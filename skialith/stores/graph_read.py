"""Reading the threads of graphs back: checkpoints, channel values, pending writes, and the dead letters among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..graphs import PUT, Put, Typed, decode, named_keys
from ..records import Kind, Position, Record
from . import read, rows
from .base import Cell, Scope
from .read import Queries

_CELL = "cell_key, checkpoint_id, store_time_ns, seq, body, body_bytes, body_parts"
_LATEST = "ORDER BY checkpoint_id DESC, cell_key DESC LIMIT ?"


def cells(
    session: Queries, scope: Scope, before: tuple[str, bytes] | None, limit: int, run_keys: Sequence[bytes] = ()
) -> list[Cell]:
    """At most ``limit`` checkpoints, those with the greatest ids first.

    ``before``: only those before this id and, if the id is the same, before this key. ``run_keys``: only those of these runs.
    """
    column, value = scope
    where = f"{column} = ? AND live = 1"
    args: list[Any] = [value]
    if before is not None:
        where += " AND checkpoint_id <= ? AND (checkpoint_id < ? OR cell_key < ?)"
        args += [before[0], before[0], before[1]]
    if run_keys:
        where += f" AND run_key IN ({read.marks(run_keys)})"
        args += run_keys
    return _whole(session, f"SELECT {_CELL} FROM graph_checkpoints WHERE {where} {_LATEST}", [*args, limit])


def cell(session: Queries, key: bytes) -> Cell | None:
    """One checkpoint, or None."""
    found = _whole(session, f"SELECT {_CELL} FROM graph_checkpoints WHERE cell_key = ? AND live = 1", [key])
    return found[0] if found else None


def _whole(session: Queries, query: str, args: Sequence[object]) -> list[Cell]:
    def now() -> list[Cell]:
        found = []
        for key, _, time_ns, seq, *body in session.rows(query, args):
            put = decode(read.body(session, tuple(body)) or b"")
            assert isinstance(put, Put)
            found.append(Cell(bytes(key), Position(time_ns, seq), put))
        return found

    return read.unmoved(now, "checkpoints")


def blobs(session: Queries, keys: Sequence[bytes]) -> dict[bytes, tuple[Position, Typed]]:
    """Those of the channel values that are there, by key."""

    def now() -> dict[bytes, tuple[Position, Typed]]:
        found = {}
        columns = "blob_key, store_time_ns, seq, form, codec, body, body_bytes, body_parts"
        for some in read.some_of(keys):
            query = f"SELECT {columns} FROM graph_blobs WHERE blob_key IN ({read.marks(some)})"
            for key, time_ns, seq, form, codec, *body in session.rows(query, some):
                data = read.body(session, tuple(body)) or b""
                found[bytes(key)] = Position(time_ns, seq), Typed(rows.text(form), codec, data)
        return found

    return read.unmoved(now, "channel values")


def writes(session: Queries, namespace: str, cell_keys: Sequence[bytes]) -> list[Record]:
    """The records of what is pending at checkpoints, oldest first."""

    def now() -> list[Record]:
        return sorted(_writes(session, namespace, cell_keys), key=lambda record: record.position)

    return read.unmoved(now, "pending writes")


def _writes(session: Queries, namespace: str, cell_keys: Sequence[bytes]) -> Iterator[Record]:
    columns = "record_key, store_time_ns, seq, codec, body, body_bytes, body_parts"
    for some in read.some_of(cell_keys):
        query = f"SELECT {columns} FROM graph_writes WHERE cell_key IN ({read.marks(some)})"
        for key, time_ns, seq, codec, *body in session.rows(query, some):
            data = read.body(session, tuple(body))
            yield Record(Kind.GRAPH, namespace, "", "", bytes(key), 0, "", 0, codec, data, Position(time_ns, seq))


def dead(session: Queries, namespace: str, thread_name: str | None) -> list[Record]:
    """Operations that became dead letters, on one thread (its name) or on all."""
    where = "namespace = ? AND sink = ? AND kind = ?"
    args: list[Any] = [namespace, read.WRITER, int(Kind.GRAPH)]
    if thread_name is not None:
        where += " AND agent_id = ?"
        args.append(thread_name)
    letters = [
        read.whole_letter(session, row)
        for row in session.rows(f"SELECT {read.LETTERS} FROM dead_letters WHERE {where}", args)
    ]
    records = [letter.record for letter in letters if letter is not None and letter.record is not None]
    return [record for record in records if record.body is not None]


def settled(session: Queries, record: Record) -> bool:
    """Whether a put or writes are in the tables, or were deleted; ``record`` may have lost its body.

    Its ``record_id`` names the thread and the checkpoint, whose rows stay when they are deleted.
    """
    thread, cell = named_keys(record)
    if session.rows("SELECT 1 FROM graph_writes WHERE record_key = ?", (record.key,)):
        return True
    time_ns, seq = record.position
    later, args = "(store_time_ns > ? OR (store_time_ns = ? AND seq >= ?))", (time_ns, time_ns, seq)
    if session.rows(f"SELECT 1 FROM graph_threads WHERE thread_key = ? AND {later}", (thread, *args)):
        return True
    found = session.rows(f"SELECT live FROM graph_checkpoints WHERE cell_key = ? AND {later}", (cell, *args))
    return bool(found) and (record.event_type == PUT or not found[0][0])


def ends(
    session: Queries, thread_keys: Sequence[bytes], cell_keys: Sequence[bytes]
) -> tuple[dict[bytes, Position], dict[bytes, Position]]:
    """When threads were deleted last, and when checkpoints were put or deleted last; those of which nothing is known left out."""
    return (
        _positions(session, "thread_key", "graph_threads", thread_keys),
        _positions(session, "cell_key", "graph_checkpoints", cell_keys),
    )


def _positions(session: Queries, column: str, table: str, keys: Sequence[bytes]) -> dict[bytes, Position]:
    found: dict[bytes, Position] = {}
    for some in read.some_of(keys):
        query = f"SELECT {column}, store_time_ns, seq FROM {table} WHERE {column} IN ({read.marks(some)})"
        found.update((bytes(key), Position(time_ns, seq)) for key, time_ns, seq in session.rows(query, some))
    return found
