"""Merging the log and the database into the checkpoints of graphs' threads, as they are now."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Protocol, TypeVar

from . import graphs
from .config import GRAPH_PAGE_CHECKPOINTS
from .errors import StoreUnavailable
from .graphs import (
    Changes,
    Operations,
    Put,
    PutWrites,
    Typed,
    blob_key,
    cell_key,
    ns_key,
    operation,
    split_refs,
    thread_key,
    thread_name,
)
from .records import NOWHERE, Position, Record
from .stores.base import Cell, Scope

T = TypeVar("T")


class ThreadLog(Protocol):
    """What is read of the log."""

    def operations(self, thread_name: str | None, deadline: float) -> Operations: ...


class ThreadStore(Protocol):
    """What is read of the database; see ``stores.base.Store``."""

    def graph_cells(
        self, scope: Scope, before: tuple[str, bytes] | None, limit: int, run_keys: Sequence[bytes] = ()
    ) -> list[Cell]: ...
    def graph_cell(self, key: bytes) -> Cell | None: ...
    def graph_blobs(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Position, Typed]]: ...
    def graph_writes(self, namespace: str, cell_keys: Sequence[bytes]) -> list[Record]: ...
    def graph_ends(
        self, thread_keys: Sequence[bytes], cell_keys: Sequence[bytes]
    ) -> tuple[dict[bytes, Position], dict[bytes, Position]]: ...
    def graph_dead(self, namespace: str, thread_name: str | None) -> list[Record]: ...


class NoThreads:
    """Stands for the database of a log of which nothing was stored yet."""

    def graph_cells(self, *_: object, **__: object) -> list[Cell]:
        return []

    def graph_cell(self, *_: object) -> Cell | None:
        return None

    def graph_blobs(self, *_: object) -> dict[bytes, tuple[Position, Typed]]:
        return {}

    def graph_writes(self, *_: object) -> list[Record]:
        return []

    def graph_ends(self, *_: object) -> tuple[dict[bytes, Position], dict[bytes, Position]]:
        return {}, {}

    def graph_dead(self, *_: object) -> list[Record]:
        return []


@dataclass(slots=True)
class Filled:
    """A checkpoint with what belongs to it.

    ``values``: by id (``graphs.blob_id``); one of ``put.refs`` that is not among them was deleted. ``writes``: oldest first.
    """

    put: Put
    values: dict[bytes, Typed] = field(default_factory=dict)
    writes: list[PutWrites] = field(default_factory=list)


class Past:
    """One look at a thread, or at all: the log's part is read first, so what moves meanwhile is in the database by then.

    Whatever stands in the log is there with all that followed it; so a checkpoint read from the log needs nothing of the
    database but the values that it shares with earlier ones.
    """

    def __init__(
        self, wal: ThreadLog, store: Callable[[], ThreadStore], namespace: str, thread_id: str | None, timeout: float
    ) -> None:
        """``thread_id``: None for all threads. Raises ``WalUnavailable``."""
        self._namespace = namespace
        self._thread_id = thread_id
        name = None if thread_id is None else thread_name(thread_id)
        logged = wal.operations(name, time.monotonic() + timeout)
        self._whole = logged.whole
        self._down: StoreUnavailable | None = None
        self._store: ThreadStore = NoThreads()
        dead = logged.dead
        try:
            self._store = store()
            dead = [*dead, *self._store.graph_dead(namespace, name)]
        except StoreUnavailable as error:
            self._down = error
        self._view = Changes(namespace)
        self._note(logged.live)
        if dead:
            self._note_dead(dead)
        self._view.forget_before(self._view.deleted)
        self._forget_writes()

    def _note(self, records: Iterable[Record]) -> None:
        for record in records:
            try:
                if self._thread_id in (None, operation(record).thread_id):
                    self._view.note(record)
            except ValueError:
                continue  # the writer makes a dead letter of it

    def _note_dead(self, dead: Iterable[Record]) -> None:
        """A dead letter may be older than what the database did since, which no longer stands in the log."""
        if self._down is not None:
            self._whole = False
            return
        self._note(dead)
        view = self._view
        cells = {*view.cells, *(pending.cell for pending in view.writes.values())}
        deleted, changed = self._store.graph_ends(list(view.threads), list(cells))
        for thread, position in deleted.items():
            view.deleted[thread] = max(position, view.deleted.get(thread, NOWHERE))
        view.cells = {key: c for key, c in view.cells.items() if key not in changed or c.position >= changed[key]}

    def _forget_writes(self) -> None:
        """Leave out what was pending at a checkpoint before it was deleted."""
        ends = {key: cell.position for key, cell in self._view.cells.items() if cell.put is None}
        self._view.writes = {
            key: pending
            for key, pending in self._view.writes.items()
            if pending.cell not in ends or ends[pending.cell] < pending.record.position
        }

    def _ask(self, question: Callable[[], T]) -> T:
        """An answer of the database. Raises ``StoreUnavailable`` if it does not answer."""
        if self._down is not None:
            raise StoreUnavailable(
                f"{self._what()}: the log alone cannot tell, and the database does not answer ({self._down}); nothing is lost, "
                "call again when the database is back"
            ) from self._down
        return question()

    def _what(self) -> str:
        return "threads" if self._thread_id is None else f"thread {self._thread_id!r}"

    # ---- checkpoints

    def one(self, checkpoint_ns: str, checkpoint_id: str) -> Put | None:
        """A checkpoint of the thread, or None."""
        ns = self._ns(checkpoint_ns)
        key = cell_key(ns, checkpoint_id)
        seen = self._view.cells.get(key)
        try:
            row = self._ask(lambda: self._store.graph_cell(key))
        except StoreUnavailable:
            if seen is None or not self._whole:
                raise
            return seen.put
        if row is not None and self._stands(row):
            return row.put
        return None if seen is None else seen.put

    def latest(self, checkpoint_ns: str) -> Put | None:
        """The checkpoint with the greatest id, or None."""
        ns = self._ns(checkpoint_ns)
        seen = max((cell for cell in self._view.cells.values() if cell.put and cell.ns == ns), key=_id_of, default=None)
        try:
            rows = self._rows(("ns_key", ns), None, 1)
            row = next(rows, None)
        except StoreUnavailable:
            if seen is None or not self._whole:
                raise
            return seen.put
        if seen is None or (row is not None and row.put.checkpoint_id >= seen.checkpoint_id):
            return None if row is None else row.put
        return seen.put

    def all(
        self, checkpoint_ns: str | None = None, before: str | None = None, run_keys: Sequence[bytes] = ()
    ) -> Iterator[Put]:
        """Checkpoints, the greatest ids first, read lazily. ``before``: only smaller ids. ``run_keys``: only of these runs.

        Raises ``StoreUnavailable`` while iterating: the log alone never holds all.
        """
        scope: Scope = ("namespace", self._namespace)
        if self._thread_id is not None:
            thread = thread_key(self._namespace, self._thread_id)
            scope = ("thread_key", thread) if checkpoint_ns is None else ("ns_key", ns_key(thread, checkpoint_ns))
        rows = self._rows(scope, None if before is None else (before, b""), GRAPH_PAGE_CHECKPOINTS, run_keys)
        from_rows = ((row.put.checkpoint_id, row.key, row.put) for row in rows)
        from_log = sorted(
            (
                (cell.checkpoint_id, key, cell.put)
                for key, cell in self._view.cells.items()
                if cell.put is not None
                and (before is None or cell.checkpoint_id < before)
                and (not run_keys or cell.put.run_key in run_keys)
            ),
            key=itemgetter(0, 1),
            reverse=True,
        )
        last = b""
        for _, key, put in heapq.merge(from_rows, from_log, key=itemgetter(0, 1), reverse=True):
            # A row that is newer than the log's is passed first, and no older one is passed at all.
            if key != last and (checkpoint_ns is None or put.checkpoint_ns == checkpoint_ns):
                yield put
            last = key

    def _rows(
        self, scope: Scope, before: tuple[str, bytes] | None, page: int, run_keys: Sequence[bytes] = ()
    ) -> Iterator[Cell]:
        """Rows that still stand beside what the log says, the greatest ids first."""
        while True:
            rows = self._ask(partial(self._store.graph_cells, scope, before, page, run_keys))
            for row in rows:
                if self._stands(row):
                    yield row
            if len(rows) < page:
                return
            before = rows[-1].put.checkpoint_id, rows[-1].key
            page = GRAPH_PAGE_CHECKPOINTS

    def _stands(self, row: Cell) -> bool:
        seen = self._view.cells.get(row.key)
        deleted = self._view.deleted.get(thread_key(self._namespace, row.put.thread_id), NOWHERE)
        return row.position > deleted and (seen is None or row.position > seen.position)

    def _ns(self, checkpoint_ns: str) -> bytes:
        assert self._thread_id is not None
        return ns_key(thread_key(self._namespace, self._thread_id), checkpoint_ns)

    # ---- what belongs to them

    def fill(self, puts: Sequence[Put], only: Collection[bytes] | None = None) -> list[Filled]:
        """Checkpoints with their values (``only``: those ids) and their pending writes."""
        wanted: list[tuple[bytes, dict[bytes, bytes]]] = []
        for put in puts:
            ns = ns_key(thread_key(self._namespace, put.thread_id), put.checkpoint_ns)
            ids = [blob for blob in split_refs(put.refs) if only is None or blob in only]
            wanted.append((cell_key(ns, put.checkpoint_id), {blob: blob_key(ns, blob) for blob in ids}))
        values = self._values({key for _, blobs in wanted for key in blobs.values()})
        writes = self._writes([cell for cell, _ in wanted])
        return [
            Filled(put, {blob: values[key] for blob, key in blobs.items() if key in values}, writes.get(cell, []))
            for put, (cell, blobs) in zip(puts, wanted, strict=True)
        ]

    def _values(self, keys: set[bytes]) -> dict[bytes, Typed]:
        seen = self._view.blobs
        found = {key: blob.value for key in keys if (blob := seen.get(key)) is not None and blob.value is not None}
        if missing := sorted(keys - found.keys()):
            for key, (position, value) in self._ask(lambda: self._store.graph_blobs(missing)).items():
                if key not in seen or seen[key].position < position:
                    found[key] = value
        return found

    def _writes(self, cells: Sequence[bytes]) -> dict[bytes, list[PutWrites]]:
        view = self._view
        # What stands in the log of a checkpoint that stands there is all there is.
        asked = [cell for cell in cells if self._down is None or cell not in view.cells]
        found: list[tuple[Position, bytes, PutWrites]] = []
        if asked:
            for record in self._ask(lambda: self._store.graph_writes(self._namespace, asked)):
                writes = operation(record)
                if isinstance(writes, PutWrites) and record.key not in view.writes:
                    thread = thread_key(self._namespace, writes.thread_id)
                    if record.position > view.deleted.get(thread, NOWHERE):
                        ns = ns_key(thread, writes.checkpoint_ns)
                        found.append((record.position, cell_key(ns, writes.checkpoint_id), writes))
        wanted = set(cells)
        found.extend(
            (pending.record.position, pending.cell, pending.writes)
            for pending in view.writes.values()
            if pending.cell in wanted
        )
        by_cell: dict[bytes, list[PutWrites]] = {}
        for _, cell, writes in sorted(found, key=itemgetter(0)):
            by_cell.setdefault(cell, []).append(writes)
        return by_cell


def _id_of(cell: graphs.Cell) -> str:
    return cell.checkpoint_id
