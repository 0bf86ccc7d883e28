"""Merging the log and the database into the checkpoints of graphs' threads, as they are now."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from .stores.base import Cell, Graphs, Scope

T = TypeVar("T")


_OBJECTS_BYTES = 350
"""Memory of the objects around one value."""


class ThreadLog(Protocol):
    """What is read of the log."""

    def operations(self, thread_name: str | None, deadline: float) -> Operations: ...


class ThreadStore(Protocol):
    """What is read of the database."""

    def graphs(self, namespace: str) -> AbstractContextManager[Graphs]: ...


class _Nothing:
    """The tables of a database in which nothing was stored yet."""

    def cells(self, *_: object, **__: object) -> list[Cell]:
        return []

    def cell(self, *_: object) -> Cell | None:
        return None

    def contents(self, *_: object) -> tuple[dict[bytes, tuple[Position, Typed]], list[Record]]:
        return {}, []

    def ends(self, *_: object) -> tuple[dict[bytes, Position], dict[bytes, Position], dict[bytes, Position]]:
        return {}, {}, {}

    def dead(self, *_: object) -> list[Record]:
        return []


class NoThreads:
    """Stands for the database of a log of which nothing was stored yet."""

    def graphs(self, namespace: str) -> AbstractContextManager[Graphs]:  # noqa: ARG002 - as a store has it
        return nullcontext(_Nothing())


@dataclass(slots=True)
class Filled:
    """A checkpoint with what belongs to it.

    ``values``: by id (``graphs.blob_id``); one of ``put.refs`` that is not among them was deleted. ``writes``: oldest first.
    """

    put: Put
    values: dict[bytes, Typed] = field(default_factory=dict)
    writes: list[PutWrites] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether all of its values are there."""
        return len(self.values) == len(self.put.refs) // graphs.KEY_BYTES

    @property
    def size(self) -> int:
        """Bytes of memory, about: of small values the objects around them take the most."""
        texts = [self.put.head.data, self.put.metadata.data, self.put.refs]
        texts += [value.data for value in self.values.values()]
        texts += [write.value.data for call in self.writes for write in call.writes]
        return _OBJECTS_BYTES * len(texts) + sum(map(len, texts))


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
        self._store = store
        self._name = None if thread_id is None else thread_name(thread_id)
        logged = wal.operations(self._name, time.monotonic() + timeout)
        self.epoch = logged.epoch
        """The connection over which the log was read."""
        self.last_seq = logged.live[-1].position.seq if logged.live else 0
        """The last operation that the log held."""
        self._whole = logged.whole
        self._dead = logged.dead
        self._view = Changes(namespace)
        self._note(logged.live)
        self._settle()
        self._tables: Graphs | None = None
        self._connection = ExitStack()
        self._down: StoreUnavailable | None = None

    @contextmanager
    def look(self) -> Iterator[None]:
        """Ask the database over one connection in this block. One that does not answer is met by the first question."""
        with ExitStack() as stack:
            self._connection = stack
            try:
                self._tables = stack.enter_context(self._store().graphs(self._namespace))
                self._ask(self._note_dead)
            except StoreUnavailable as error:
                self._down = error
            try:
                yield
            finally:
                self._tables = None

    def _note(self, records: Iterable[Record]) -> None:
        for record in records:
            try:
                if self._thread_id in (None, operation(record).thread_id):
                    self._view.note(record)
            except ValueError:
                continue  # the writer makes a dead letter of it

    def _note_dead(self, tables: Graphs) -> None:
        """A dead letter may be older than what the database did since, which no longer stands in the log; and what stands
        there may be older than a deletion whose body went with the chunks of large records."""
        dead = [*self._dead, *tables.dead(self._name)]
        if not dead and self._whole:
            return
        self._dead = dead
        self._note(dead)
        view = self._view
        cells = {*view.cells, *(pending.cell for pending in view.writes.values())}
        deleted, changed, ended = tables.ends(list(view.threads), list(cells))
        for thread, position in deleted.items():
            view.deleted[thread] = max(position, view.deleted.get(thread, NOWHERE))
        view.cells = {key: cell for key, cell in view.cells.items() if cell.position >= changed.get(key, NOWHERE)}
        view.forget_pending_before(ended)
        self._settle()

    def _settle(self) -> None:
        """Leave out what came before its thread or its checkpoint was deleted."""
        view = self._view
        view.forget_before(view.deleted)
        view.forget_pending_before({key: cell.ended for key, cell in view.cells.items()})

    @property
    def sure(self) -> bool:
        """Whether what the log says needs no database to be believed."""
        return self._whole and not self._dead

    def _ask(self, question: Callable[[Graphs], T]) -> T:
        """An answer of the database. Raises ``StoreUnavailable`` if it does not answer; only within :meth:`look`."""
        if self._tables is None:
            raise StoreUnavailable(
                f"{self._what()}: the log alone cannot tell, and the database does not answer ({self._down}); nothing is lost, "
                "call again when the database is back"
            ) from self._down
        try:
            return question(self._tables)
        except Exception as error:
            # The connection goes with its error, which the store makes its own on the way, or the next look would get it.
            self._tables = None
            try:
                self._connection.__exit__(type(error), error, error.__traceback__)
            except StoreUnavailable as gone:
                self._down = gone
                raise
            raise

    def _what(self) -> str:
        return "threads" if self._thread_id is None else f"thread {self._thread_id!r}"

    # ---- checkpoints

    def one(self, checkpoint_ns: str, checkpoint_id: str) -> Put | None:
        """A checkpoint of the thread, or None."""
        ns = self._ns(checkpoint_ns)
        key = cell_key(ns, checkpoint_id)
        seen = self._view.cells.get(key)
        try:
            row = self._ask(lambda tables: tables.cell(key))
        except StoreUnavailable:
            if seen is None or not self.sure:
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
            if seen is None or not self.sure:
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

    def ancestors(self, put: Put) -> Iterator[Put]:
        """The checkpoints from which ``put`` came, the nearest first."""
        smaller, seen = self.all(put.checkpoint_ns, put.checkpoint_id), {put.checkpoint_id}
        while (wanted := put.parent_id) is not None and wanted not in seen:
            seen.add(wanted)
            found = None
            if wanted < put.checkpoint_id:
                found = next((each for each in smaller if each.checkpoint_id <= wanted), None)
            elif found := self.one(put.checkpoint_ns, wanted):
                # Ids are times, and the clock of another machine may have been ahead.
                smaller = self.all(put.checkpoint_ns, wanted)
            if found is None or found.checkpoint_id != wanted:
                return
            yield found
            put = found

    def _rows(
        self, scope: Scope, before: tuple[str, bytes] | None, page: int, run_keys: Sequence[bytes] = ()
    ) -> Iterator[Cell]:
        """Rows that still stand beside what the log says, the greatest ids first."""
        while True:
            rows = self._ask(partial(_cells, scope, before, page, run_keys))
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
        begins: dict[bytes, Position] = {}
        for put in puts:
            thread = thread_key(self._namespace, put.thread_id)
            ns = ns_key(thread, put.checkpoint_ns)
            ids = {blob: blob_key(ns, blob) for blob in split_refs(put.refs) if only is None or blob in only}
            wanted.append((cell_key(ns, put.checkpoint_id), ids))
            begins.update(dict.fromkeys(ids.values(), self._view.deleted.get(thread, NOWHERE)))
        values, writes = self._contents([cell for cell, _ in wanted], begins)
        return [
            Filled(put, {blob: values[key] for blob, key in blobs.items() if key in values}, writes.get(cell, []))
            for put, (cell, blobs) in zip(puts, wanted, strict=True)
        ]

    def _contents(
        self, cells: Sequence[bytes], blobs: Mapping[bytes, Position]
    ) -> tuple[dict[bytes, Typed], dict[bytes, list[PutWrites]]]:
        """``blobs``: with the last deletion of their thread, before which nothing stands."""
        view = self._view
        values = {key: view.blobs[key].value for key in blobs if key in view.blobs}
        found = {key: value for key, value in values.items() if value is not None}
        wanted = set(cells)
        pending = [(p.record.position, p.cell, p.writes) for p in view.writes.values() if p.cell in wanted]
        # What stands in the log of a checkpoint that stands there is all there is.
        unseen = [cell for cell in cells if self._tables is not None or cell not in view.cells]
        if unseen or len(found) < len(blobs):
            missing = sorted(blobs.keys() - found.keys())
            rows, records = self._ask(lambda tables: tables.contents(unseen, missing))
            for key, (position, value) in rows.items():
                seen = view.blobs[key].position if key in view.blobs else NOWHERE
                if position > max(seen, blobs[key]):
                    found[key] = value
            pending += [each for each in map(self._pending, records) if each is not None]
        writes: dict[bytes, list[PutWrites]] = {}
        for _, cell, each in sorted(pending, key=itemgetter(0)):
            writes.setdefault(cell, []).append(each)
        return found, writes

    def _pending(self, record: Record) -> tuple[Position, bytes, PutWrites] | None:
        """A row of writes that still stands beside what the log says."""
        writes = operation(record)
        if not isinstance(writes, PutWrites) or record.key in self._view.writes:
            return None
        thread = thread_key(self._namespace, writes.thread_id)
        cell = cell_key(ns_key(thread, writes.checkpoint_ns), writes.checkpoint_id)
        ended = self._view.cells[cell].ended if cell in self._view.cells else NOWHERE
        if record.position <= max(ended, self._view.deleted.get(thread, NOWHERE)):
            return None
        return record.position, cell, writes


def _cells(
    scope: Scope, before: tuple[str, bytes] | None, page: int, run_keys: Sequence[bytes], tables: Graphs
) -> list[Cell]:
    return tables.cells(scope, before, page, run_keys)


def _id_of(cell: graphs.Cell) -> str:
    return cell.checkpoint_id
