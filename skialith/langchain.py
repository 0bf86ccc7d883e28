"""SkialithCheckpointer: LangGraph's checkpoints in the log and the database, for graphs that run blocking or awaited."""

from __future__ import annotations

import time
from asyncio import _get_running_loop  # without an exception where there is none
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from . import graphs
from .awaiting import append, in_thread
from .config import (
    GRAPH_DROPS_PER_RECORD,
    GRAPH_FIRST_PAGE_CHECKPOINTS,
    GRAPH_PAGE_BYTES,
    GRAPH_PAGE_CHECKPOINTS,
    load,
)
from .door import Door
from .errors import InvalidArgument
from .graph_past import Filled, Past
from .graphs import Delete, Drop, Operation, Put, blob_id, split_refs
from .langchain_codec import Codec, Known, KnownValues, checkpoint_id_of, config_of, missing, place_of, thread_id_of
from .records import Ack, Record, unique_key
from .runtime import Runtime
from .wal.lane import lane_name

_LOOKS = 2
"""How often a checkpoint is looked at whose values went under the look."""


class SkialithCheckpointer(BaseCheckpointSaver[str]):
    """A checkpointer for LangGraph: ``graph.compile(checkpointer=SkialithCheckpointer())``.

    ``serde``: LangGraph's serializer, default its own; an ``EncryptedSerializer`` covers every value, the metadata and the
    checkpoint itself. Settings as :class:`~skialith.SkialithAgent`: arguments, or ``SKIALITH_*`` variables; without any an
    embedded server and SQLite below ``./.skialith``. One object serves blocking and awaited graphs, any number of threads, loops
    and processes at once, and may be made before a fork.

    ``put`` and ``put_writes`` return at DURABLE; reads merge log and database, and what the log holds can be read while the
    database is away. Raises ``InvalidArgument`` naming the channel whose value cannot be serialized (nothing was sent),
    ``WalUnavailable``, ``WalFull``, ``RecordTooLarge``; reads also ``StoreUnavailable``, ``ChannelValueMissing``. Made on a
    thread that runs a loop it opens at its first use; otherwise at once, so wrong settings show where they stand.
    """

    def __init__(self, *, serde: SerializerProtocol | None = None, **settings: Any) -> None:
        super().__init__(serde=serde)
        # Shared by the clones that with_allowlist makes.
        self._door = Door(load(**settings))
        self._known = Known()
        if _get_running_loop() is None:
            self._door.open()

    # ---- writing

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Append a checkpoint and return its config at DURABLE.

        Channel values that did not change are not written again, but once for a database that is away: then the log alone
        must tell the checkpoint.
        """
        engine = self._door.open()
        known, since = self._known.on(engine.wal.server_id), engine.wal.stands_alone_from
        put = self._codec.put(config, checkpoint, metadata, new_versions, known, since)
        return _after(known, put, self._append(engine, put))

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Append what a task wrote and return at DURABLE."""
        self._append(self._door.open(), self._codec.put_writes(config, writes, task_id, task_path))

    def _append(self, engine: Runtime, operation: Operation) -> Ack:
        return engine.wal.log.append_one(self._record(engine, operation), time.monotonic() + engine.config.timeout)

    def _record(self, engine: Runtime, operation: Operation) -> Record:
        record = graphs.record(engine.config.namespace, operation, engine.config.max_record_bytes)
        engine.note_thread(record.agent_id)
        return record

    @property
    def _codec(self) -> Codec:
        return Codec(self.serde)

    # ---- reading

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that ``config`` names, or the thread's latest in its namespace; None if it is not there."""
        place = place_of(config)
        engine = self._door.open()
        known, ns = self._known.on(engine.wal.server_id), place.checkpoint_ns or ""
        if place.checkpoint_id is None:
            found = engine.latest_checkpoint(place.thread_id, ns)
        else:
            found = _one(engine, place.thread_id, ns, place.checkpoint_id)
        if found is None:
            return None
        if found.whole:
            known.add(found.put, 0)
        return self._codec.checkpoint_tuple(found)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints, the latest first, read lazily page by page.

        ``config``: of a thread (None: all), of a namespace if it names one, a single checkpoint if it names one. ``filter``:
        what their metadata must equal. ``before``: only checkpoints with smaller ids than this config's. ``limit``: at most so
        many.
        """
        for page in self._pages(config, filter or {}, before, limit):
            yield from page

    def _pages(
        self, config: RunnableConfig | None, wanted: dict[str, Any], before: RunnableConfig | None, limit: int | None
    ) -> Iterator[Sequence[CheckpointTuple]]:
        place = place_of(config) if config else None
        engine, codec = self._door.open(), self._codec
        past = engine.thread(None if place is None else place.thread_id)
        puts = past.all(
            None if place is None else place.checkpoint_ns,
            checkpoint_id_of(before) if before else None,
        )
        if place is not None and place.checkpoint_id is not None:
            puts = (put for put in puts if put.checkpoint_id == place.checkpoint_id)
        if wanted:
            puts = (put for put in puts if _matches(codec.metadata(put), wanted))
        puts = islice(puts, None if limit is None else max(0, limit))
        count = GRAPH_FIRST_PAGE_CHECKPOINTS
        while True:
            with past.look():
                page = past.fill([*islice(puts, count)])
            if not page:
                return
            # Each checkpoint is made whole, also of values that it shares with others.
            one = sum(found.size for found in page) // len(page)
            count = max(1, min(GRAPH_PAGE_CHECKPOINTS, 4 * count, GRAPH_PAGE_BYTES // (one + 1)))
            # What lost its values since the look began is looked at again.
            still = (found if found.whole else _one(engine, *found.put[:3]) for found in page)
            if tuples := [codec.checkpoint_tuple(found) for found in still if found is not None]:
                yield tuples

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """What each channel got along the checkpoint's ancestors since the last one that holds its value, which is ``seed``."""
        history: dict[str, DeltaChannelHistory] = {channel: {"writes": []} for channel in channels}
        if not channels:
            return history
        place = place_of(config)
        past, ns, codec = self._door.open().thread(place.thread_id), place.checkpoint_ns or "", self._codec
        left = set(channels)
        with past.look():
            target = past.latest(ns) if place.checkpoint_id is None else past.one(ns, place.checkpoint_id)
            ancestors = iter(()) if target is None else past.ancestors(target)
            while left and (page := [*islice(ancestors, GRAPH_PAGE_CHECKPOINTS)]):
                for found, ids in _with_values(past, codec, page, left):
                    for write in reversed(codec.pending(found.put, found.writes, left)):
                        history[write[1]]["writes"].append(write)
                    for channel, blob in ids.items():
                        if channel in left and blob not in found.values and blob in split_refs(found.put.refs):
                            raise missing(found.put, [channel])
                        if channel in left and blob in found.values:
                            history[channel]["seed"] = codec.value(found.put, channel, found.values[blob])
                            left.discard(channel)
        for each in history.values():
            each["writes"].reverse()
        return history

    # ---- deleting and copying

    def delete_thread(self, thread_id: str) -> None:
        """End all that the thread had, what is still on its way to the database too; returns at DURABLE."""
        engine, thread_id = self._door.open(), thread_id_of(thread_id)
        self._append(engine, Delete(thread_id))
        self._known.on(engine.wal.server_id).forget(thread_id)

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """End the checkpoints that these runs made (``run_id`` of their metadata), with their writes; returns at DURABLE.

        Delta channels of later checkpoints that are rebuilt from these lose what they hold of them.
        """
        if not run_ids:
            return
        engine = self._door.open()
        doomed: dict[str, list[Put]] = {}
        for put in _all(engine.thread(None), [graphs.run_key(str(run_id)) for run_id in run_ids]):
            doomed.setdefault(put.thread_id, []).append(put)
        for thread_id, puts in doomed.items():
            gone = {(put.checkpoint_ns, put.checkpoint_id) for put in puts}
            self._drop(engine, thread_id, _all(engine.thread(thread_id)), gone)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """End old checkpoints; returns at DURABLE.

        ``"keep_latest"`` keeps the latest one of each namespace, and those ancestors from which its delta channels are
        rebuilt. ``"delete"`` keeps nothing. What is put meanwhile stays; but do not prune a thread while a run that was forked
        from an old checkpoint goes on in it: its values may go.
        """
        if strategy not in ("keep_latest", "delete"):
            raise InvalidArgument(f"strategy must be 'keep_latest' or 'delete', not {strategy!r}", argument="strategy")
        for thread_id in map(thread_id_of, thread_ids):
            if strategy == "delete":
                self.delete_thread(thread_id)
                continue
            engine = self._door.open()
            everything = _all(engine.thread(thread_id))
            kept = self._kept(everything)
            gone = {(put.checkpoint_ns, put.checkpoint_id) for put in everything} - kept
            self._drop(engine, thread_id, everything, gone)

    def _kept(self, puts: Sequence[Put]) -> set[tuple[str, str]]:
        """Namespace and id of the latest checkpoints, and of the ancestors that their delta channels need."""
        codec = self._codec
        kept: set[tuple[str, str]] = set()
        by_id = {(put.checkpoint_ns, put.checkpoint_id): put for put in puts}
        latest: dict[str, Put] = {}
        for put in puts:
            latest.setdefault(put.checkpoint_ns, put)
        for head in latest.values():
            at: Put | None = head
            # Their values are rebuilt from writes, back to the last checkpoint that holds one.
            left = set(codec.metadata(head).get("counters_since_delta_snapshot") or {})
            while at is not None:
                kept.add((at.checkpoint_ns, at.checkpoint_id))
                versions, refs = codec.checkpoint(at)["channel_versions"], set(split_refs(at.refs))
                left = {c for c in left if c not in versions or blob_id(c, versions[c]) not in refs}
                at = by_id.get((at.checkpoint_ns, at.parent_id or "")) if left else None
        return kept

    def _drop(self, engine: Runtime, thread_id: str, everything: Iterable[Put], gone: set[tuple[str, str]]) -> None:
        """End those of a thread's checkpoints that are ``gone``, and the values that none of the others has."""
        needless: set[tuple[str, bytes]] = set()
        needed: set[tuple[str, bytes]] = set()
        for put in everything:
            refs = {(put.checkpoint_ns, blob) for blob in split_refs(put.refs)}
            (needless if (put.checkpoint_ns, put.checkpoint_id) in gone else needed).update(refs)
        # The checkpoints first: after a crash in between there are values too many, never too few.
        for checkpoints in _some(sorted(gone)):
            self._append(engine, Drop(thread_id, checkpoints, []))
        for blobs in _some(sorted(needless - needed)):
            self._append(engine, Drop(thread_id, [], blobs))
        self._known.on(engine.wal.server_id).forget(thread_id)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all checkpoints, values and writes of a thread to another one, beside what that one has; returns at DURABLE.

        After an error part of it may be there; calling again completes it.
        """
        source, target = thread_id_of(source_thread_id), thread_id_of(target_thread_id)
        if source == target:
            return
        engine = self._door.open()
        past = engine.thread(source)
        oldest_first = _all(past)[::-1]
        sent: set[tuple[str, bytes]] = set()
        for start in range(0, len(oldest_first), GRAPH_PAGE_CHECKPOINTS):
            records: list[Record] = []
            with past.look():
                page = past.fill(oldest_first[start : start + GRAPH_PAGE_CHECKPOINTS])
            for found in page:
                self._codec.checkpoint_tuple(found)  # refused here if a value is missing
                new = {b: value for b, value in found.values.items() if (found.put.checkpoint_ns, b) not in sent}
                sent.update((found.put.checkpoint_ns, blob) for blob in new)
                records.append(self._record(engine, found.put._replace(thread_id=target, blobs=new)))
                records.extend(self._record(engine, each._replace(thread_id=target)) for each in found.writes)
            deadline = time.monotonic() + engine.config.timeout
            engine.wal.wait(engine.wal.append(lane_name(records[0]), records, deadline))

    # ---- awaited

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """:meth:`put`, awaited."""

        def prepared() -> tuple[Runtime, KnownValues, Put, Record]:
            engine = self._door.open()
            known, since = self._known.on(engine.wal.server_id), engine.wal.stands_alone_from
            put = self._codec.put(config, checkpoint, metadata, new_versions, known, since)
            return engine, known, put, self._record(engine, put)

        engine, known, put, record = await in_thread(prepared)
        return _after(known, put, await append(engine, record, time.monotonic() + engine.config.timeout))

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """:meth:`put_writes`, awaited."""

        def prepared() -> tuple[Runtime, Record]:
            engine = self._door.open()
            return engine, self._record(engine, self._codec.put_writes(config, writes, task_id, task_path))

        engine, record = await in_thread(prepared)
        await append(engine, record, time.monotonic() + engine.config.timeout)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """:meth:`get_tuple`, awaited."""
        return await in_thread(partial(self.get_tuple, config))

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """:meth:`list`, awaited page by page."""
        pages = self._pages(config, filter or {}, before, limit)
        while page := await in_thread(partial(next, pages, None)):
            for each in page:
                yield each

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """:meth:`get_delta_channel_history`, awaited."""
        return await in_thread(partial(self.get_delta_channel_history, config=config, channels=channels))

    async def adelete_thread(self, thread_id: str) -> None:
        """:meth:`delete_thread`, awaited."""
        await in_thread(partial(self.delete_thread, thread_id))

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """:meth:`delete_for_runs`, awaited."""
        await in_thread(partial(self.delete_for_runs, run_ids))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """:meth:`copy_thread`, awaited."""
        await in_thread(partial(self.copy_thread, source_thread_id, target_thread_id))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """:meth:`prune`, awaited."""
        await in_thread(partial(self.prune, thread_ids, strategy=strategy))

    # ---- versions and life

    def get_next_version(self, current: str | None, channel: None) -> str:  # noqa: ARG002 - LangGraph's signature
        """A version greater than ``current`` that no other branch of the thread makes: a number and something random."""
        number = 0 if current is None else int(str(current).split(".")[0])
        return f"{number + 1:032d}.{unique_key().hex()}"

    def flush(self, timeout: float | None = None) -> int:
        """Wait until all that this process appended is STORED, as :meth:`skialith.SkialithAgent.flush`."""
        engine = self._door.open()
        return engine.flush(engine.config.timeout if timeout is None else timeout)

    def close(self) -> None:
        """Give the runtime back; the last user flushes (bounded) and stops it. May be called twice. Clones close with it."""
        self._door.close()

    def __enter__(self) -> SkialithCheckpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> SkialithCheckpointer:
        await in_thread(self._door.open)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await in_thread(self.close)


def _after(known: KnownValues, put: Put, ack: Ack) -> RunnableConfig:
    known.add(put, ack.seq)
    return config_of(put.thread_id, put.checkpoint_ns, put.checkpoint_id)


def _one(engine: Runtime, thread_id: str, checkpoint_ns: str, checkpoint_id: str) -> Filled | None:
    """A checkpoint, or None. One whose values went is looked at again: it is gone too, or lacks them for good."""
    found: Filled | None = None
    for _ in range(_LOOKS):
        past = engine.thread(thread_id)
        with past.look():
            put = past.one(checkpoint_ns, checkpoint_id)
            if put is None:
                return None
            (found,) = past.fill([put])
        if found.whole:
            break
    return found


def _matches(metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(metadata.get(key) == value for key, value in wanted.items())


def _all(past: Past, run_keys: Sequence[bytes] = ()) -> list[Put]:
    with past.look():
        return [*past.all(run_keys=run_keys)]


def _with_values(
    past: Past, codec: Codec, puts: Sequence[Put], channels: Iterable[str]
) -> Iterator[tuple[Filled, dict[str, bytes]]]:
    """Checkpoints with the values of some channels, and these channels' blob ids."""
    ids: list[dict[str, bytes]] = []
    for put in puts:
        versions = codec.checkpoint(put)["channel_versions"]
        ids.append({channel: blob_id(channel, versions[channel]) for channel in channels if channel in versions})
    yield from zip(past.fill(puts, {blob for each in ids for blob in each.values()}), ids, strict=True)


def _some(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), GRAPH_DROPS_PER_RECORD):
        yield items[start : start + GRAPH_DROPS_PER_RECORD]
