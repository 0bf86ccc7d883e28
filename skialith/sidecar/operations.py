"""The routes for operators: health, readiness, metrics."""

from __future__ import annotations

import asyncio
import time
from importlib import import_module
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from .. import awaiting
from ..cli_show import size, span
from ..errors import SkialithError
from ..wal.status import WalStatus
from ..writer.status import DrainStatus
from . import metrics
from .config import STATUS_FRESH_SECONDS, STATUS_SECONDS
from .engine import Engine
from .guard import TRUSTED
from .problems import documented
from .wire import Check, HealthAnswer, ReadyAnswer

router = APIRouter(tags=["operations"])


class Probe:
    """Asks how the log is; what it answered counts for ``STATUS_FRESH_SECONDS``, whoever asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._asking = asyncio.Lock()
        self._until = 0.0
        self._found: WalStatus | SkialithError

    async def log(self) -> WalStatus | SkialithError:
        """How the log is, or why that is not known; within about ``STATUS_SECONDS``."""
        async with self._asking:
            if time.monotonic() >= self._until:
                try:
                    self._found = await self._ask()
                except SkialithError as error:
                    self._found = error
                self._until = time.monotonic() + STATUS_FRESH_SECONDS
            return self._found

    async def _ask(self) -> WalStatus:
        wal, deadline = self.engine.runtime.wal, time.monotonic() + STATUS_SECONDS
        return await wal.ask(lambda: wal.current_status(deadline), deadline)

    def drains(self) -> list[DrainStatus]:
        """How this process's writers are; none before the start and after the end."""
        try:
            return self.engine.runtime.drain_status()
        except SkialithError:
            return []

    async def dead_in_table(self) -> int | None:
        """How many dead letters the database has, if it answers."""
        if not all(drain.database_ok for drain in self.drains()):
            return None
        store, namespace = self.engine.runtime.store, self.engine.config.namespace
        try:
            return await awaiting.in_thread(lambda: store.count_dead_letters(namespace), STATUS_SECONDS)
        except (SkialithError, TimeoutError):
            return None


async def _probe(request: Request) -> Probe:
    probe: Probe = request.app.state.probe
    return probe


ProbeOf = Annotated[Probe, Depends(_probe)]


@router.get("/health")
async def health() -> HealthAnswer:
    """Whether the process answers; it says nothing of the log or the database. Needs no token."""
    return HealthAnswer(version=import_module("skialith").__version__)


@router.get("/ready", responses={503: {"model": ReadyAnswer, "description": "Not ready; the checks say why"}})
async def ready(request: Request, response: Response, probe: ProbeOf) -> ReadyAnswer:
    """Whether the log answers, the writer stores, and not too much waits. Needs no token; without it the reasons are left out."""
    log = await probe.log()
    checks = [_log(log), _writer(probe.drains()), _lag(log, probe.engine)]
    if not request.scope[TRUSTED]:
        checks = [check.model_copy(update={"detail": "ask with the token for more"}) for check in checks]
    answer = ReadyAnswer(ready=all(check.ok for check in checks), checks=checks)
    response.status_code = 200 if answer.ready else 503
    return answer


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **documented(401)}, response_class=Response)
async def scrape(request: Request, probe: ProbeOf) -> Response:
    """Prometheus metrics; with several workers of all of them together."""
    log = await probe.log()
    look = metrics.Look(
        log=log if isinstance(log, WalStatus) else None,
        database_ok=all(drain.database_ok for drain in probe.drains()),
        dead_in_table=await probe.dead_in_table(),
    )
    text, media_type = await asyncio.to_thread(metrics.exposition, request.headers.get("accept", ""), look)
    return Response(text, headers={"Content-Type": media_type})


def _log(log: WalStatus | SkialithError) -> Check:
    if isinstance(log, SkialithError):
        return Check(name="log", ok=False, detail=f"it does not answer: {log}")
    return Check(name="log", ok=True, detail=f"{size(log.bytes)} of {size(log.max_bytes)} used")


def _writer(drains: list[DrainStatus]) -> Check:
    ended = [drain.name for drain in drains if not drain.running]
    away = next((drain for drain in drains if not drain.database_ok), None)
    if ended or not drains:
        return Check(name="writer", ok=False, detail=f"not running: {', '.join(ended) or 'all'}; restart the sidecar")
    if away is not None:
        return Check(
            name="writer",
            ok=False,
            detail=f"the database is away, records wait in the log until it is back: {away.last_error}",
        )
    return Check(name="writer", ok=True, detail=f"{sum(drain.stored for drain in drains)} rows stored by this process")


def _lag(log: WalStatus | SkialithError, engine: Engine) -> Check:
    if isinstance(log, SkialithError):
        return Check(name="lag", ok=False, detail="not known while the log does not answer")
    most_records, most_seconds = engine.sidecar.lag_records, engine.sidecar.lag_seconds
    over = [lag for lag in log.consumers if lag.records > most_records or lag.oldest_seconds > most_seconds]
    detail = "; ".join(
        f"{lag.name}: {lag.records} records wait, the oldest for {span(lag.oldest_seconds)}"
        for lag in over or log.consumers
    )
    if over:
        detail += f" (limits: {most_records} records, {span(most_seconds)}); more writers or a faster database help"
    return Check(name="lag", ok=not over, detail=detail)
