"""Trimming: what every consumer has acknowledged is purged from the log, class by class."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..config import API_TIMEOUT_SECONDS
from .api import rfc3339, time_ns
from .stream import TRACE_INGEST, WRITER, Stream, Subjects
from .transport import Connection, NoReply


@dataclass(frozen=True, slots=True)
class TrimClass:
    """Records with one subject filter that go when every one of ``consumers`` has acknowledged past them."""

    filter: str
    consumers: tuple[str, ...]


def trim_classes(subjects: Subjects, traces: bool) -> tuple[TrimClass, ...]:
    """The one list of what is trimmed, and by whose acks. Leases age out by their own TTL."""
    both = (WRITER, TRACE_INGEST) if traces else (WRITER,)
    return (
        TrimClass(subjects.events, both),
        TrimClass(subjects.checkpoints, (WRITER,)),
        TrimClass(subjects.graphs, (WRITER,)),
        TrimClass(subjects.chunks, (WRITER,)),
    )


class Trim:
    """Trims one namespace's stream."""

    def __init__(self, connection: Connection, stream: Stream) -> None:
        self._connection = connection
        self._stream = stream
        self._trimmed: dict[str, int] = {}
        self._epoch = -1

    async def once(self) -> bool:
        """Purge, class by class, what the class's consumers have acknowledged; False if some of it must be kept for a while.

        Raises ``ApiError``, ``WalUnavailable``, ``Disconnected`` or ``NoReply``. A purge goes out once, on the connection
        that the floors were read on: a late copy must never reach a stream that was made anew.
        """
        epoch = self._connection.epoch
        if epoch != self._epoch:
            self._trimmed, self._epoch = {}, epoch
        info = await self._stream.info()
        end = int(info["state"]["last_seq"]) + 1
        bounds: dict[str, int] = {}
        for consumer in (WRITER, TRACE_INGEST) if self._stream.traces else (WRITER,):
            floor, message = await self._stream.behind_floor(consumer)
            if message is not None:
                bounds[consumer] = min(end, int(message["seq"]))
            else:
                # With replicas it may be a replaced leader that knows of nothing behind the floor.
                bounds[consumer] = end if self._stream.replicas == 1 else min(end, floor + 1)
        first = await self._first_to_keep(time_ns(info["ts"]))
        for kind in trim_classes(self._stream.subjects, self._stream.traces):
            bound = min(bounds[consumer] for consumer in kind.consumers)
            if kind.filter == self._stream.subjects.graphs and first is not None:
                bound = min(bound, first)
            if kind.filter == self._stream.subjects.chunks and self._stream.replicas > 1:
                bound = await self._chunks_to_go(bound, end)
            if self._connection.epoch != epoch:
                return False
            if bound > self._trimmed.get(kind.filter, 0):
                body = {"filter": kind.filter, "seq": bound}
                await self._stream.api.once(f"STREAM.PURGE.{self._stream.name}", body, timeout=5.0)
                self._trimmed[kind.filter] = bound
        return first is None or first >= bounds[WRITER]

    async def _chunks_to_go(self, bound: int, end: int) -> int:
        """The bound for chunks, which stand behind their record: ``end`` if one answer says that it knows of all that stands
        before ``end`` and that no record is left."""
        if await self._stream.next_message(bound, self._stream.subjects.chunks) is None:
            return bound
        info = await self._stream.api.call(
            f"STREAM.INFO.{self._stream.name}", {"subjects_filter": self._stream.subjects.logs}
        )
        state = info["state"]
        return bound if state.get("subjects") or int(state["last_seq"]) + 1 < end else end

    async def _first_to_keep(self, now_ns: int) -> int | None:
        """Sequence of the first operation on a graph's thread that was appended in the last ``keep_graphs_seconds``.

        By the store time, which every process can tell, however short it lives; None if there is none.
        """
        since = rfc3339(now_ns - int(self._stream.keep_graphs_seconds * 1e9))
        query = json.dumps({"next_by_subj": self._stream.subjects.graphs, "start_time": since, "batch": 1}).encode()
        replies = await self._connection.collect(f"$JS.API.DIRECT.GET.{self._stream.name}", query, API_TIMEOUT_SECONDS)
        first = replies[0].headers or {}
        if "Nats-Sequence" in first:
            return int(first["Nats-Sequence"])
        if first.get("Status") == "404":
            return None
        raise NoReply
