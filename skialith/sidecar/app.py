"""The ASGI application: routes, errors and the engine's life put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module

from fastapi import FastAPI

from ..config import Config
from . import letters, problems, reads, requests, writes
from .config import SidecarConfig
from .engine import Engine

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
        try:
            yield
        finally:
            await engine.close()

    app = FastAPI(
        title="Skialith",
        version=import_module("skialith").__version__,
        description=_DESCRIPTION,
        lifespan=life,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.engine = engine
    app.router.route_class = requests.Route
    problems.install(app)
    for module in (writes, reads, letters):
        app.include_router(module.router)
    return app
