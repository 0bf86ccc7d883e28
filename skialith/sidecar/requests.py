"""What handlers are given of a request: strict JSON, ids from the path, the lease, the engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable
from math import isinf
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

from fastapi import Depends, Header, Path
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from ..config import MAX_ID_CHARACTERS, check_id
from .engine import Engine
from .problems import HttpProblem
from .protocol import GONE


class _Request(Request):
    async def json(self) -> Any:
        """Strict JSON: no NaN, integers of any length kept exact, no number that a double would make infinite."""
        text = await self.body()
        try:
            value = from_json(text, allow_inf_nan=False)
        except ValueError as error:
            raise HttpProblem(400, f"the body is not JSON: {error}", path="body") from None
        if _MAY_BE_INFINITE.search(text) and (path := _infinite(value, "")) is not None:
            raise HttpProblem(400, f"{path or 'body'}: the number is larger than a double can be", path=path or "body")
        return value


_MAY_BE_INFINITE = re.compile(rb"[eE]\+?\d{3}|\d{300}")


def _infinite(value: Any, path: str) -> str | None:
    """Where an infinite number stands; None if there is none."""
    if isinstance(value, float):
        return path if isinf(value) else None
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        inner = ((f"{path}.{name}" if path else name, item) for name, item in value.items())
    elif isinstance(value, list):
        inner = ((f"{path}[{n}]", item) for n, item in enumerate(value))
    return next((found for at, item in inner if (found := _infinite(item, at)) is not None), None)


class Route(APIRoute):
    """A route whose handler gets strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_Request(request.scope, request.receive))

        return handle


def decoded(argument: str, segment: str) -> str:
    """An id out of a path's segment, which is still percent-encoded: only so may it hold a ``/``."""
    try:
        return check_id(argument, unquote_to_bytes(segment).decode())
    except UnicodeDecodeError:
        raise HttpProblem(400, f"{argument} in the path is not percent-encoded UTF-8", path=argument) from None


def id_in_path(example: str, description: str | None = None) -> Any:
    """A segment that :func:`decoded` takes: as sent, one character may be four bytes of three characters each."""
    return Path(
        min_length=1,
        max_length=12 * MAX_ID_CHARACTERS,
        description=description,
        examples=[example],
        json_schema_extra={"maxLength": MAX_ID_CHARACTERS},
    )


async def _agent_id(agent_id: Annotated[str, id_in_path("my-agent")]) -> str:
    return decoded("agent_id", agent_id)


async def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


AgentId = Annotated[str, Depends(_agent_id)]
EngineOf = Annotated[Engine, Depends(_engine)]


def has_gone(request: Request) -> Callable[[], bool]:
    """Whether the client has closed its connection, as a question; a server that cannot tell says no."""
    closing: Callable[[], bool] = request.scope.get(GONE, _no)
    return closing


def _no() -> bool:
    return False


def client_name(request: Request) -> str:
    """How an owner that gave no name is named to others."""
    return f"{request.client.host} port {request.client.port}" if request.client is not None else "a client"


def _lease(description: str) -> Any:
    pattern = "^[0-9a-f]{32}$"
    return Header(
        alias="Skialith-Lease", pattern=pattern, description=description, examples=["6f0c1e0d5a3b4c2d9e8f7a6b5c4d3e2f"]
    )


LeaseToken = Annotated[str | None, _lease("The token that `resume` gave. Without it the write is not fenced.")]
RequiredLease = Annotated[str, _lease("The token that `resume` gave.")]
