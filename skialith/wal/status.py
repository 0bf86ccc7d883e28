"""How the log is: its size, its replicas, and how far its consumers are behind."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .dead import DeadLetters
from .group import Group, group
from .stream import TRACE_INGEST, WRITER, Stream


@dataclass(frozen=True, slots=True)
class ConsumerLag:
    """How far a consumer is behind. ``oldest_seconds``: age of the oldest record it has not acknowledged, 0 if none.

    ``pulls``: open pull requests; 0 means that no writer is asking for records now. ``group``: as in :class:`WalStatus`.
    """

    name: str
    records: int
    in_flight: int
    oldest_seconds: float
    pulls: int
    group: Group | None = None


@dataclass(frozen=True, slots=True)
class WalStatus:
    """The log as ``skialith status`` shows it. ``group``: who keeps the stream's replicas; None if there is only one."""

    stream: str
    wal_id: str
    server: str
    server_version: str
    replicas: int
    messages: int
    bytes: int
    max_bytes: int
    last_seq: int
    traces: bool
    dead_letters: int
    consumers: tuple[ConsumerLag, ...]
    group: Group | None = None


async def current_status(stream: Stream, dead: DeadLetters, server: dict[str, Any], deadline: float) -> WalStatus:
    """How the log is now. ``server``: what the server said of itself when it was connected."""
    info = await stream.info(deadline)
    state, config = info["state"], info["config"]
    names = (WRITER, TRACE_INGEST) if stream.traces else (WRITER,)
    lags = [await _lag(stream, name, deadline) for name in names]
    return WalStatus(
        stream=stream.name,
        wal_id=stream.wal_id,
        server=str(server.get("server_name", "")),
        server_version=str(server.get("version", "")),
        replicas=config["num_replicas"],
        messages=state["messages"],
        bytes=state["bytes"],
        max_bytes=config["max_bytes"],
        last_seq=state["last_seq"],
        traces=stream.traces,
        dead_letters=await dead.count(deadline),
        consumers=tuple(lags),
        group=stream.group,
    )


async def _lag(stream: Stream, name: str, deadline: float) -> ConsumerLag:
    info = await stream.consumer_info(name, deadline)
    oldest = await stream.oldest_pending(name, deadline)
    pulls = info.get("num_waiting", 0)
    replicas = group(info, info["config"].get("num_replicas") or stream.replicas)
    if oldest is None:
        # The counts of a consumer can stand still after a server was killed; what the stream holds cannot.
        return ConsumerLag(name, 0, 0, 0.0, pulls, replicas)
    records = max(1, info["num_pending"] + info["num_ack_pending"])
    age = max(0.0, time.time() - oldest / 1e9)
    return ConsumerLag(name, records, info["num_ack_pending"], age, pulls, replicas)
