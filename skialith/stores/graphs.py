"""Bringing the operations on graphs' threads into the tables: in any order, any number of times, with the same end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import StoreDataError
from ..graphs import Cell, Changes, encode
from ..records import NOWHERE, Position, Record
from . import rows
from .rows import Row

if TYPE_CHECKING:
    from .sql import Session

THREAD_COLUMNS = ("thread_key", "namespace", "thread_id", "store_time_ns", "seq")
CHECKPOINT_COLUMNS = (
    "cell_key",
    "namespace",
    "thread_key",
    "ns_key",
    "checkpoint_id",
    "live",
    "ended_time_ns",
    "ended_seq",
    "run_key",
    "store_time_ns",
    "seq",
    "body",
    "body_bytes",
    "body_parts",
)
BLOB_COLUMNS = (
    "blob_key",
    "namespace",
    "thread_key",
    "store_time_ns",
    "seq",
    "form",
    "codec",
    "body",
    "body_bytes",
    "body_parts",
)
WRITES_COLUMNS = (
    "record_key",
    "namespace",
    "thread_key",
    "cell_key",
    "store_time_ns",
    "seq",
    "codec",
    "body",
    "body_bytes",
    "body_parts",
)

_KEYS = {"graph_checkpoints": "cell_key", "graph_blobs": "blob_key", "graph_writes": "record_key"}
_KEYS_PER_QUERY = 500
_EARLIER = "(store_time_ns < ? OR (store_time_ns = ? AND seq < ?))"


def apply(session: Session, records: Sequence[Record]) -> None:
    """Apply operations of one namespace within the transaction of ``session``.

    The rows of their threads are locked first, in the order of their keys, so that of two transactions on a thread the second
    one sees what the first one did.
    """
    changes = Changes(records[0].namespace)
    for record in records:
        try:
            changes.note(record)
        except Exception as error:
            text = f"{rows.describe(record)} cannot be read: {type(error).__name__}: {error}"
            raise StoreDataError(text) from error
    changes.forget_before(_delete_threads(session, changes))
    _put_checkpoints(session, changes)
    _put_blobs(session, changes)
    _put_writes(session, changes)


def _delete_threads(session: Session, changes: Changes) -> dict[bytes, Position]:
    """Lock the threads, delete those of the batch, and return each one's last deletion."""
    keys = sorted(changes.threads)
    new = [(key, changes.namespace, changes.threads[key].encode(), *NOWHERE) for key in keys]
    session.insert("graph_threads", THREAD_COLUMNS, new)
    deleted = dict.fromkeys(keys, NOWHERE)
    for some, marks in _some(keys):
        session.hold("graph_threads", "thread_key", "seq", some)
        query = f"SELECT thread_key, store_time_ns, seq FROM graph_threads WHERE thread_key IN ({marks})"
        # The insert has locked the rows, those that were there too; a query that locks may read others, and wait for them.
        for key, time_ns, seq in session.rows(query, some):
            deleted[bytes(key)] = Position(time_ns, seq)
    for key, position in changes.deleted.items():
        if position <= deleted[key]:
            continue
        deleted[key] = position
        update = "UPDATE graph_threads SET store_time_ns = ?, seq = ? WHERE thread_key = ?"
        session.run(update, (*position, key))
        for table, column in _KEYS.items():
            _remove_thread(session, table, column, key, position)
    return deleted


def _put_checkpoints(session: Session, changes: Changes) -> None:
    """Cells that are newer than their rows take their place; what was pending at a deleted one goes with it."""
    touched = {*changes.cells, *(pending.cell for pending in changes.writes.values())}
    there: dict[bytes, Position] = {}
    ended: dict[bytes, Position] = {}
    columns = "cell_key, store_time_ns, seq, ended_time_ns, ended_seq"
    for some, marks in _some(sorted(touched)):
        query = f"SELECT {columns} FROM graph_checkpoints WHERE cell_key IN ({marks})"
        for key, time_ns, seq, ended_ns, ended_seq in session.rows(query, some):
            there[bytes(key)], ended[bytes(key)] = Position(time_ns, seq), Position(ended_ns, ended_seq)
    newer = {key: cell for key, cell in changes.cells.items() if there.get(key, NOWHERE) < cell.position}
    for key, cell in sorted(changes.cells.items(), key=_first):
        if cell.ended <= ended.get(key, NOWHERE):
            continue
        ended[key] = cell.ended
        _remove(session, "graph_writes", f"cell_key = ? AND {_EARLIER}", (key, *_before(cell.ended)))
        if key not in newer:
            update = "UPDATE graph_checkpoints SET ended_time_ns = ?, ended_seq = ? WHERE cell_key = ?"
            session.run(update, (*cell.ended, key))
    _remove_by_key(session, "graph_checkpoints", "cell_key", [key for key in newer if key in there])
    made = (
        _checkpoint_row(changes.namespace, key, cell._replace(ended=ended.get(key, NOWHERE)))
        for key, cell in sorted(newer.items(), key=_first)
    )
    _insert(session, "graph_checkpoints", CHECKPOINT_COLUMNS, made)
    changes.forget_pending_before(ended)


def _checkpoint_row(namespace: str, key: bytes, cell: Cell) -> tuple[Row, bytes | None]:
    body = None if cell.put is None else encode(cell.put)
    run = None if cell.put is None else cell.put.run_key
    live = int(cell.put is not None)
    head = (key, namespace, cell.thread, cell.ns, cell.checkpoint_id, live, *cell.ended, run, *cell.position)
    return _with_body(head, b"checkpoint:" + key, body)


def _put_blobs(session: Session, changes: Changes) -> None:
    there: dict[bytes, Position] = {}
    for some, marks in _some(sorted(changes.blobs)):
        query = f"SELECT blob_key, store_time_ns, seq FROM graph_blobs WHERE blob_key IN ({marks})"
        there.update((bytes(key), Position(time_ns, seq)) for key, time_ns, seq in session.rows(query, some))
    newer = {key: blob for key, blob in changes.blobs.items() if key not in there or there[key] < blob.position}
    _remove_by_key(session, "graph_blobs", "blob_key", [key for key in newer if key in there])

    def made() -> Iterator[tuple[Row, bytes | None]]:
        for key, blob in sorted(newer.items(), key=_first):
            # The row of a deleted one stays, without a body, so that an earlier put does not bring it back.
            form, codec, data = blob.value or ("", 0, None)
            head = (key, changes.namespace, blob.thread, *blob.position, form, codec)
            yield _with_body(head, b"blob:" + key, data)

    _insert(session, "graph_blobs", BLOB_COLUMNS, made())


def _put_writes(session: Session, changes: Changes) -> None:
    def made() -> Iterator[tuple[Row, bytes | None]]:
        for key, pending in sorted(changes.writes.items(), key=_first):
            record = pending.record
            head = (key, record.namespace, pending.thread, pending.cell, *record.position, record.codec)
            yield _with_body(head, b"writes:" + key, record.body)

    _insert(session, "graph_writes", WRITES_COLUMNS, made())


def _first(item: tuple[bytes, object]) -> bytes:
    return item[0]


# ---- rows and their parts


def _with_body(head: Row, owner: bytes, body: bytes | None) -> tuple[Row, bytes | None]:
    """A row, and its body if that goes into parts."""
    columns = rows.blob(owner, body)
    return (*head, *columns), body if columns.parts_key is not None else None


def _insert(session: Session, table: str, columns: Sequence[str], made: Iterable[tuple[Row, bytes | None]]) -> None:
    listed = list(made)
    session.insert(table, columns, [row for row, _ in listed])
    for row, body in listed:
        if body is not None:
            for part in rows.parts(row[-1], body):
                session.insert("payload_parts", rows.PART_COLUMNS, [part])


def _remove_thread(session: Session, table: str, column: str, thread: bytes, before: Position) -> None:
    """In short statements: one for all of a long thread might outlast the driver's patience at every try."""
    # The index alone answers this, and rows that leave in the order of their keys leave together.
    index = session.by.format(table, "thread")
    found = session.rows(f"SELECT {column} FROM {table}{index} WHERE thread_key = ?", (thread,))
    for some, marks in _some(sorted(bytes(row[0]) for row in found)):
        _remove(session, table, f"{column} IN ({marks}) AND {_EARLIER}", (*some, *_before(before)))


def _remove_by_key(session: Session, table: str, column: str, keys: Sequence[bytes]) -> None:
    for some, marks in _some(sorted(keys)):
        _remove(session, table, f"{column} IN ({marks})", some)


def _remove(session: Session, table: str, where: str, args: Sequence[Any]) -> None:
    found = session.rows(f"SELECT body_parts FROM {table} WHERE {where} AND body_parts IS NOT NULL", args)
    for (parts_key,) in found:
        session.run("DELETE FROM payload_parts WHERE parts_key = ?", (parts_key,))
    session.run(f"DELETE FROM {table} WHERE {where}", args)


def _before(position: Position) -> tuple[int, int, int]:
    return position.time_ns, position.time_ns, position.seq


def _some(keys: Sequence[bytes]) -> Iterator[tuple[Sequence[bytes], str]]:
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        some = keys[start : start + _KEYS_PER_QUERY]
        yield some, ", ".join("?" * len(some))
