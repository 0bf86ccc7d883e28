"""Reading the threads of graphs back: checkpoints, channel values, pending writes, and the dead letters among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..graphs import DROP, PUT, Put, Typed, decode, named_keys
from ..records import Kind, Position, Record
from . import read, rows
from .base import Cell, Scope
from .read import Queries

_CELL = "cell_key, store_time_ns, seq, body, body_bytes, body_parts"
_INDEXES = {"ns_key": "ns", "thread_key": "thread", "namespace": "namespace"}
_LATEST = "ORDER BY checkpoint_id DESC, cell_key DESC LIMIT ?"


class GraphTables:
    """The threads of graphs in one namespace, read over one connection; see ``stores.base.Graphs``."""

    def __init__(self, session: Queries, namespace: str) -> None:
        self._session = session
        self._namespace = namespace

    def cells(
        self, scope: Scope, before: tuple[str, bytes] | None, limit: int, run_keys: Sequence[bytes] = ()
    ) -> list[Cell]:
        """Checkpoints, the greatest ids first."""
        column, value = scope
        where = f"{column} = ? AND live = 1"
        args: list[Any] = [value]
        if before is not None:
            where += " AND checkpoint_id <= ? AND (checkpoint_id < ? OR cell_key < ?)"
            args += [before[0], before[0], before[1]]
        if run_keys:
            where += f" AND run_key IN ({read.marks(run_keys)})"
            args += run_keys
        index = self._session.by.format("graph_checkpoints", "run" if run_keys else _INDEXES[column])
        return self._cells(f"SELECT {_CELL} FROM graph_checkpoints{index} WHERE {where} {_LATEST}", [*args, limit])

    def cell(self, key: bytes) -> Cell | None:
        """One checkpoint, or None."""
        found = self._cells(f"SELECT {_CELL} FROM graph_checkpoints WHERE cell_key = ? AND live = 1", [key])
        return found[0] if found else None

    def _cells(self, query: str, args: Sequence[object]) -> list[Cell]:
        def now() -> list[Cell]:
            found = []
            for key, time_ns, seq, *body in self._session.rows(query, args):
                put = decode(read.body(self._session, tuple(body)) or b"")
                assert isinstance(put, Put)
                found.append(Cell(bytes(key), Position(time_ns, seq), put))
            return found

        return read.unmoved(now, "checkpoints")

    def contents(
        self, cell_keys: Sequence[bytes], blob_keys: Sequence[bytes]
    ) -> tuple[dict[bytes, tuple[Position, Typed]], list[Record]]:
        """Pending writes of checkpoints, and channel values, with one query as long as they are few."""

        def now() -> tuple[dict[bytes, tuple[Position, Typed]], list[Record]]:
            blobs: dict[bytes, tuple[Position, Typed]] = {}
            writes: list[Record] = []
            for query, args in _contents(cell_keys, blob_keys):
                for form, key, time_ns, seq, codec, *columns in self._session.rows(query, args):
                    data, position = read.body(self._session, tuple(columns)), Position(time_ns, seq)
                    if data is None:
                        continue  # a value that was deleted
                    if form is not None:
                        blobs[bytes(key)] = position, Typed(rows.text(form), codec, data)
                    else:
                        writes.append(
                            Record(Kind.GRAPH, self._namespace, "", "", bytes(key), 0, "", 0, codec, data, position)
                        )
            return blobs, sorted(writes, key=lambda record: record.position)

        return read.unmoved(now, "channel values and writes")

    def ends(
        self, thread_keys: Sequence[bytes], cell_keys: Sequence[bytes]
    ) -> tuple[dict[bytes, Position], dict[bytes, Position], dict[bytes, Position]]:
        """Last deletions of threads, last changes and last deletions of checkpoints."""
        return (
            self._positions("thread_key, store_time_ns, seq", "graph_threads", thread_keys),
            self._positions("cell_key, store_time_ns, seq", "graph_checkpoints", cell_keys),
            self._positions("cell_key, ended_time_ns, ended_seq", "graph_checkpoints", cell_keys),
        )

    def _positions(self, columns: str, table: str, keys: Sequence[bytes]) -> dict[bytes, Position]:
        found: dict[bytes, Position] = {}
        column = columns.partition(",")[0]
        for some in read.some_of(keys):
            query = f"SELECT {columns} FROM {table} WHERE {column} IN ({read.marks(some)})"
            found.update((bytes(key), Position(time_ns, seq)) for key, time_ns, seq in self._session.rows(query, some))
        return found

    def dead(self, thread_name: str | None) -> list[Record]:
        """Operations that became dead letters."""
        where = "namespace = ? AND sink = ? AND kind = ?"
        args: list[Any] = [self._namespace, read.WRITER, int(Kind.GRAPH)]
        if thread_name is not None:
            where += " AND agent_id = ?"
            args.append(thread_name)
        if not self._session.rows(f"SELECT 1 FROM dead_letters WHERE {where} LIMIT 1", args):
            return []  # as nearly always; the many columns of a letter cost as much as a query, even without a row
        letters = self._session.rows(f"SELECT {read.LETTERS} FROM dead_letters WHERE {where}", args)
        whole = [read.whole_letter(self._session, row) for row in letters]
        records = [letter.record for letter in whole if letter is not None and letter.record is not None]
        return [record for record in records if record.body is not None]


def _contents(cell_keys: Sequence[bytes], blob_keys: Sequence[bytes]) -> Iterator[tuple[str, Sequence[bytes]]]:
    """Queries with the same columns: the form of a value (NULL of writes), key, position, codec and body."""
    columns = "store_time_ns, seq, codec, body, body_bytes, body_parts"
    queries = [
        (f"SELECT NULL, record_key, {columns} FROM graph_writes WHERE cell_key IN ({read.marks(some)})", some)
        for some in read.some_of(cell_keys)
    ]
    queries += [
        (f"SELECT form, blob_key, {columns} FROM graph_blobs WHERE blob_key IN ({read.marks(some)})", some)
        for some in read.some_of(blob_keys)
    ]
    if len(queries) == 2:
        queries = [(f"{queries[0][0]} UNION ALL {queries[1][0]}", [*queries[0][1], *queries[1][1]])]
    yield from queries


def settled(session: Queries, record: Record) -> bool:
    """Whether an operation is in the tables, or what it made was deleted; ``record`` may have lost its body.

    Its ``record_id`` names the thread and the checkpoint or the value, whose rows stay when they are deleted.
    """
    thread, key = named_keys(record)
    if session.rows("SELECT 1 FROM graph_writes WHERE record_key = ?", (record.key,)):
        return True
    time_ns, seq = record.position
    later, args = "(store_time_ns > ? OR (store_time_ns = ? AND seq >= ?))", (time_ns, time_ns, seq)
    if session.rows(f"SELECT 1 FROM graph_threads WHERE thread_key = ? AND {later}", (thread, *args)):
        return True
    if record.event_type == DROP and session.rows(
        f"SELECT 1 FROM graph_blobs WHERE blob_key = ? AND {later}", (key, *args)
    ):
        return True
    if record.event_type != PUT:
        later = later.replace("store_time_ns", "ended_time_ns").replace("seq", "ended_seq")
    return bool(session.rows(f"SELECT 1 FROM graph_checkpoints WHERE cell_key = ? AND {later}", (key, *args)))
