"""The ASGI application: routes, errors and the engine's life put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ..config import Config
from . import letters, metrics, operations, problems, reads, requests, writes
from .config import SidecarConfig
from .document import Documented
from .engine import Engine
from .guard import Guard
from .observe import Observer

_DESCRIPTION = (
    "The write-ahead log for AI agents over HTTP. A write is answered when its record is durable in the log. Errors are problem "
    "JSON (RFC 9457) whose `outcome` says what became of the record and whose `retryable` whether to send it again. Ids in paths "
    "are percent-encoded, `/` included."
)


def create(config: Config, sidecar: SidecarConfig) -> FastAPI:
    """The application over one engine, which is opened when the server starts and closed when it ends."""
    engine = Engine(config, sidecar)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await engine.open()
        async with metrics.DrainCounts(engine.runtime.drain_status).published():
            try:
                yield
            finally:
                await engine.close()

    app = Documented(
        title="Skialith",
        version=import_module("skialith").__version__,
        description=_DESCRIPTION,
        lifespan=life,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.engine = engine
    app.state.probe = operations.Probe(engine)
    app.router.route_class = requests.Route
    problems.install(app)
    for module in (writes, reads, letters, operations):
        app.include_router(module.router)
    _guard(app, sidecar)
    return app


def _guard(app: FastAPI, sidecar: SidecarConfig) -> None:
    """Put the middlewares around the routes; the last one is the outermost."""
    app.add_middleware(Guard, sidecar=sidecar)
    if sidecar.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sidecar.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "Content-Type", "Skialith-Lease", "Idempotency-Key", "X-Request-Id"),
            expose_headers=("Retry-After", "X-Request-Id"),
        )
    app.add_middleware(Observer, access_log=sidecar.access_log)
