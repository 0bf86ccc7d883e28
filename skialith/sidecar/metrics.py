"""What is counted and measured, for Prometheus; the workers of one sidecar count together, in files that any of them adds up.

The choice between memory and files is made when prometheus_client is imported: see ``config.share_metrics``.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from importlib import import_module
from types import TracebackType
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from ..errors import BatchFailed
from ..wal.status import WalStatus
from ..wal.stream import WRITER
from ..writer.status import DrainStatus
from .config import STATUS_FRESH_SECONDS, metrics_folder

Appended = Literal["event", "checkpoint", "batch", "step"]

_APPEND_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_BUCKETS = (5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)

disable_created_metrics()
registry = CollectorRegistry()
ProcessCollector(registry=registry)

_append = Histogram(
    "skialith_append_seconds",
    "From the handler to the PubAck of a request that was answered as durable.",
    ["kind"],
    buckets=_APPEND_BUCKETS,
    registry=registry,
)
_records = Counter(
    "skialith_records_total",
    "Records by the states they passed in this sidecar: accepted, durable, stored, released.",
    ["state"],
    registry=registry,
)
_retries = Counter(
    "skialith_retries_total", "Failed tries of a consumer that are made again.", ["consumer"], registry=registry
)
_requests = Counter(
    "skialith_http_requests_total", "Requests that were answered.", ["method", "route", "status"], registry=registry
)
_request_seconds = Histogram(
    "skialith_http_request_seconds",
    "From the request's headers to the end of its answer.",
    ["method", "route"],
    buckets=_REQUEST_BUCKETS,
    registry=registry,
)
_append_of = {kind: _append.labels(kind) for kind in ("event", "checkpoint", "batch", "step")}
_accepted, _durable, _stored, _released = map(_records.labels, ("accepted", "durable", "stored", "released"))
_routes: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}


class appending:  # noqa: N801 - used as a statement
    """``with appending("event", 1):`` around what hands records over and returns when they are durable."""

    __slots__ = ("_began", "_count", "_kind")

    def __init__(self, kind: Appended, count: int = 1) -> None:
        self._kind = kind
        self._count = count

    def __enter__(self) -> None:
        _accepted.inc(self._count)
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            _append_of[self._kind].observe(time.perf_counter() - self._began)
            _durable.inc(self._count)
        elif isinstance(error, BatchFailed):
            _durable.inc(len(error.acks))


def answered(method: str, route: str, status: int, seconds: float) -> None:
    """Count one request by its route's template."""
    key = (method, route, status)
    both = _routes.get(key)
    if both is None:
        both = _routes[key] = (_requests.labels(*map(str, key)), _request_seconds.labels(method, route))
    both[0].inc()
    both[1].observe(seconds)


class DrainCounts:
    """What the drains of this process did, published as it grows."""

    def __init__(self, status: Callable[[], list[DrainStatus]]) -> None:
        self._status = status
        self._before = {drain.name: DrainStatus(drain.name) for drain in status()}
        for name in self._before:
            _retries.labels(name)

    def publish(self) -> None:
        for now in self._status():
            before, self._before[now.name] = self._before[now.name], now
            _retries.labels(now.name).inc(now.retries - before.retries)
            if now.name == WRITER:
                _stored.inc(now.stored - before.stored)
                _released.inc(now.released - before.released)

    @asynccontextmanager
    async def published(self) -> AsyncIterator[None]:
        """Publish every ``STATUS_FRESH_SECONDS`` and at the end."""
        task = asyncio.create_task(self._publish_for_ever())
        try:
            yield
        finally:
            task.cancel()
            self.publish()

    async def _publish_for_ever(self) -> None:
        while True:
            await asyncio.sleep(STATUS_FRESH_SECONDS)
            self.publish()


class Look(NamedTuple):
    """How the log and the database are now. ``log``: None if it does not answer; ``dead_in_table``: None if that is not known."""

    log: WalStatus | None
    database_ok: bool
    dead_in_table: int | None


def exposition(accept: str, look: Look) -> tuple[bytes, str]:
    """All metrics in the form that the Accept header asks for, and its media type."""
    encode, media_type = choose_encoder(accept)
    return encode(_All(look)), media_type


class _All(Collector):
    def __init__(self, look: Look) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        folder = metrics_folder()
        if folder is None:
            yield from registry.collect()
        else:
            yield from MultiProcessCollector(CollectorRegistry(), folder).collect()
        yield from _gauges(self._look)


def _gauges(look: Look) -> Iterator[Metric]:
    build = GaugeMetricFamily("skialith_build_info", "Always 1.", labels=("version", "python"))
    build.add_metric((import_module("skialith").__version__, platform.python_version()), 1)
    yield build
    yield GaugeMetricFamily("skialith_log_up", "Whether the log answers.", look.log is not None)
    yield GaugeMetricFamily("skialith_database_up", "Whether the writers' database answered last.", look.database_ok)
    dead = GaugeMetricFamily("skialith_dead_letters", "Dead letters by where they are kept.", labels=("kept_in",))
    if look.dead_in_table is not None:
        dead.add_metric(("table",), look.dead_in_table)
    if look.log is not None:
        dead.add_metric(("stream",), look.log.dead_letters)
        yield from _of_log(look.log)
    yield dead


def _of_log(log: WalStatus) -> Iterator[Metric]:
    yield GaugeMetricFamily("skialith_wal_bytes", "Size of the log.", log.bytes)
    yield GaugeMetricFamily("skialith_wal_max_bytes", "Largest size of the log.", log.max_bytes)
    away = sum(peer.away for peer in log.group.peers) if log.group is not None else 0
    yield GaugeMetricFamily("skialith_wal_peers_offline", "Replicas of the log that its leader does not hear.", away)
    records = GaugeMetricFamily("skialith_lag_records", "Records that wait for a consumer.", labels=("consumer",))
    seconds = GaugeMetricFamily("skialith_lag_seconds", "Age of the oldest of them, else 0.", labels=("consumer",))
    for lag in log.consumers:
        records.add_metric((lag.name,), lag.records)
        seconds.add_metric((lag.name,), lag.oldest_seconds)
    yield records
    yield seconds
