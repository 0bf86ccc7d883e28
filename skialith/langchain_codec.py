"""LangGraph's checkpoints and writes as operations on a thread, through a serializer, and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Any, NamedTuple, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    PendingWrite,
    get_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from . import graphs
from .config import GRAPH_KNOWN_VALUES, check_id
from .errors import ChannelValueMissing, InvalidArgument, SkialithError
from .graph_past import Filled
from .graphs import Put, PutWrites, Typed, Write, blob_id, split_refs


class Place(NamedTuple):
    """Where a config points: a thread, one of its checkpoint namespaces (None: not said), a checkpoint (None: the latest)."""

    thread_id: str
    checkpoint_ns: str | None
    checkpoint_id: str | None


def place_of(config: RunnableConfig) -> Place:
    """Where ``config`` points. A thread id that is no text becomes its ``str``. Raises ``InvalidArgument``."""
    configurable = config.get("configurable", {})
    if configurable.get("thread_id") is None:
        raise InvalidArgument(
            'config["configurable"]["thread_id"] is missing: a checkpointer needs the thread, for example '
            'config={"configurable": {"thread_id": "1"}}; nothing was sent',
            argument="thread_id",
        )
    ns = configurable.get("checkpoint_ns")
    return Place(
        thread_id_of(configurable["thread_id"]),
        None if ns is None else graphs.checked_text("checkpoint_ns", ns),
        checkpoint_id_of(config),
    )


def checkpoint_id_of(config: RunnableConfig) -> str | None:
    """The checkpoint that ``config`` names, if it names one. Raises ``InvalidArgument``."""
    checkpoint_id = config.get("configurable", {}).get("checkpoint_id")
    return check_id("checkpoint_id", checkpoint_id) if checkpoint_id else None


def thread_id_of(value: object) -> str:
    """A thread's id as text."""
    return graphs.checked_text("thread_id", value if isinstance(value, str) else str(value))


def config_of(thread_id: str, checkpoint_ns: str, checkpoint_id: str) -> RunnableConfig:
    """The config that points at a checkpoint."""
    where = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns, "checkpoint_id": checkpoint_id}
    return {"configurable": where}


_NOTHING: dict[tuple[str, bytes], int] = {}


class KnownValues:
    """Which channel values of which threads are known to be durable; those of the threads used last, within a limit.

    Any thread may use it, without a lock, which a fork could leave locked for ever: what others remove meanwhile is passed over.
    """

    def __init__(self, limit: int = GRAPH_KNOWN_VALUES) -> None:
        self._limit = limit
        self._threads: OrderedDict[str, dict[tuple[str, bytes], int]] = OrderedDict()
        self._at_most = 0

    def has(self, thread_id: str, value: tuple[str, bytes], since: int) -> bool:
        """``value``: checkpoint namespace and blob id. ``since``: it must stand in the log at this sequence or behind."""
        return self._threads.get(thread_id, _NOTHING).get(value, -1) >= since

    def add(self, put: Put, seq: int) -> None:
        """All values of a checkpoint are durable: those that came with it at ``seq``, the others earlier."""
        known = self._threads.setdefault(put.thread_id, {})
        for blob in split_refs(put.refs):
            value = put.checkpoint_ns, blob
            if blob in put.blobs:
                known[value] = seq
            else:
                known.setdefault(value, 0)
            self._at_most += 1
        with suppress(KeyError):
            self._threads.move_to_end(put.thread_id)
        if self._at_most > self._limit:
            self._shrink()

    def _shrink(self) -> None:
        count = sum(map(len, [*self._threads.values()]))
        # Some more than need be, so that it is not counted at every call.
        while count > self._limit * 3 // 4:
            try:
                count -= len(self._threads.popitem(last=False)[1])
            except KeyError:
                break
        self._at_most = count

    def forget(self, thread_id: str) -> None:
        self._threads.pop(thread_id, None)


class Known:
    """What is known to be durable on one server: once it is started again it may have lost what it had acknowledged."""

    def __init__(self) -> None:
        self._last = "", KnownValues()

    def on(self, server_id: str) -> KnownValues:
        """For a call that began while the log was on this server; what it adds is not known on the next one."""
        last, known = self._last
        if server_id != last:
            known = KnownValues()
            self._last = server_id, known
        return known


def missing(put: Put, channels: Sequence[str]) -> ChannelValueMissing:
    """The error of a checkpoint that lacks values it refers to."""
    return ChannelValueMissing(
        f"thread {put.thread_id!r}: checkpoint {put.checkpoint_id!r} refers to values of {', '.join(map(repr, channels))} "
        "that were deleted, because the thread was pruned or deleted while a run that had begun before went on: "
        "continue from another checkpoint, or delete the thread",
        thread_id=put.thread_id,
        checkpoint_id=put.checkpoint_id,
        channels=tuple(channels),
    )


class Codec:
    """One serializer's way from LangGraph's values to the log's and back."""

    def __init__(self, serde: SerializerProtocol) -> None:
        self._serde = serde

    # ---- to the log

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
        known: KnownValues,
        since: int = 0,
    ) -> Put:
        """The operation that puts a checkpoint, with those channel values that are new or not known to be durable.

        ``since``: nor known to stand in the log at this sequence or behind.
        """
        place = place_of(config)
        thread_id, ns, checkpoint_id = (
            place.thread_id,
            place.checkpoint_ns or "",
            check_id("checkpoint.id", checkpoint["id"]),
        )
        versions = {**new_versions, **checkpoint["channel_versions"]}
        refs: list[bytes] = []
        blobs: dict[bytes, Typed] = {}
        unversioned: dict[str, Any] = {}
        for channel, value in checkpoint["channel_values"].items():
            if channel not in versions:
                unversioned[channel] = value
                continue
            blob = blob_id(graphs.checked_text("channel", channel), versions[channel])
            refs.append(blob)
            if channel in new_versions or not known.has(thread_id, (ns, blob), since):
                blobs[blob] = self._dumps(thread_id, f"channel_values.{channel}", value)
        head = self._dumps(thread_id, "checkpoint", {**checkpoint, "channel_values": unversioned})
        said = get_checkpoint_metadata(config, metadata)
        run_id = said.get("run_id")
        return Put(
            thread_id,
            ns,
            checkpoint_id,
            place.checkpoint_id,
            None if run_id is None else graphs.run_key(str(run_id)),
            b"".join(refs),
            head,
            self._dumps(thread_id, "metadata", said),
            blobs,
        )

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> PutWrites:
        """The operation that puts what a task wrote."""
        place = place_of(config)
        if place.checkpoint_id is None:
            raise InvalidArgument(
                'config["configurable"]["checkpoint_id"] is missing: writes are pending at a checkpoint; nothing was sent',
                argument="checkpoint_id",
            )
        graphs.checked_text("task_id", task_id)
        graphs.checked_text("task_path", task_path)
        values = [
            Write(
                WRITES_IDX_MAP.get(channel, idx),
                graphs.checked_text("channel", channel),
                self._dumps(place.thread_id, f"writes[{idx}].{channel}", value),
            )
            for idx, (channel, value) in enumerate(writes)
        ]
        return PutWrites(place.thread_id, place.checkpoint_ns or "", place.checkpoint_id, task_id, task_path, values)

    def _dumps(self, thread_id: str, where: str, value: Any) -> Typed:
        try:
            form, data = self._serde.dumps_typed(value)
        except SkialithError:
            raise
        except Exception as error:
            raise InvalidArgument(
                f"thread {thread_id!r}: {where} cannot be serialized by {type(self._serde).__name__}: {error}; nothing was sent",
                argument=where,
            ) from error
        return graphs.typed(form, data)

    # ---- from the log

    def checkpoint_tuple(self, found: Filled) -> CheckpointTuple:
        """What LangGraph gets. Raises ``ChannelValueMissing``, or ``ValueError`` naming what cannot be deserialized."""
        put = found.put
        head = self.checkpoint(put)
        values: dict[str, Any] = dict(head["channel_values"])
        refs, lost = set(split_refs(put.refs)), []
        for channel, version in head["channel_versions"].items():
            blob = blob_id(channel, version)
            if blob in found.values:
                values[channel] = self._loads(put, f"channel_values.{channel}", found.values[blob])
            elif blob in refs:
                lost.append(channel)
        if lost:
            raise missing(put, lost)
        head["channel_values"] = values
        parent = put.parent_id
        return CheckpointTuple(
            config=config_of(put.thread_id, put.checkpoint_ns, put.checkpoint_id),
            checkpoint=head,
            metadata=self.metadata(put),
            parent_config=config_of(put.thread_id, put.checkpoint_ns, parent) if parent else None,
            pending_writes=self.pending(put, found.writes),
        )

    def checkpoint(self, put: Put) -> Checkpoint:
        """The checkpoint without the values of its channels."""
        return cast(Checkpoint, self._loads(put, "checkpoint", put.head))

    def metadata(self, put: Put) -> CheckpointMetadata:
        return cast(CheckpointMetadata, self._loads(put, "metadata", put.metadata))

    def value(self, put: Put, channel: str, value: Typed) -> Any:
        """A channel's value."""
        return self._loads(put, f"channel_values.{channel}", value)

    def pending(self, put: Put, writes: Iterable[PutWrites], only: Collection[str] | None = None) -> list[PendingWrite]:
        """The pending writes in the order in which a run applies them; ``only``: to these channels.

        Of a task's writes under one index the first one stands, as it may have been acted upon; of those to LangGraph's special
        channels (their index is negative) the last one.
        """
        standing: dict[tuple[str, int], tuple[str, Write]] = {}
        for call in writes:
            for write in call.writes:
                key = call.task_id, write.idx
                if write.idx < 0 or key not in standing:
                    standing[key] = call.task_path, write
        in_order = sorted(
            ((writes_sort_key(path, *key), write) for key, (path, write) in standing.items()), key=itemgetter(0)
        )
        return [
            (task_id, write.channel, self._loads(put, f"writes.{write.channel}", write.value))
            for (_, task_id, _), write in in_order
            if only is None or write.channel in only
        ]

    def _loads(self, put: Put, where: str, value: Typed) -> Any:
        try:
            return self._serde.loads_typed(graphs.plain(value))
        except Exception as error:
            raise ValueError(
                f"thread {put.thread_id!r}, checkpoint {put.checkpoint_id!r}: {where} ({value.form}) cannot be deserialized by "
                f"{type(self._serde).__name__}: {error}; what is stored stays as it is"
            ) from error
