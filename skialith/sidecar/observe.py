"""The outermost middleware: a request's id, its metrics, its line in the access log, and an answer to what nobody expected."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import logs, metrics, problems
from .config import REQUEST_ID_CHARACTERS

log = logging.getLogger("skialith.access")

_SANE = re.compile(rb"[A-Za-z0-9._~+/=:-]{1,%d}" % REQUEST_ID_CHARACTERS)


class Observer:
    """Every request passes here first, and every answer last."""

    def __init__(self, app: ASGIApp, access_log: bool) -> None:
        self._app = app
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, size = time.perf_counter(), 0, 0
        request_id = _request_id(scope)
        header = (b"x-request-id", request_id)
        # Routes answer GET; of a HEAD request's answer the server leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def told(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), header]}
            else:
                size += len(message.get("body", b""))
            await send(message)

        before = logs.current.set(logs.Current(request_id.decode("ascii"), scope["method"], problems.raw_path(scope)))
        try:
            try:
                await self._app(inner, receive, told)
            except (Exception, asyncio.CancelledError) as error:
                if status:
                    raise
                await _unexpected(error)(inner, receive, told)
        finally:
            seconds = time.perf_counter() - began
            metrics.answered(scope["method"], _template(inner), status or problems.CLIENT_GONE, seconds)
            if self._access_log:
                _say(scope, status or problems.CLIENT_GONE, seconds, size)
            logs.current.reset(before)


def _request_id(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE.fullmatch(value):
            return bytes(value)
    return secrets.token_hex(8).encode()


def _template(scope: Scope) -> str:
    """The route, never the path: ids must not become names of metrics."""
    return getattr(scope.get("route"), "path", None) or "none"


def _unexpected(error: BaseException) -> ASGIApp:
    if isinstance(error, Exception):
        return problems.of_bug(error)
    # The server cancels only what is not done when its time to stop is over.
    return problems.of_stopping()


def _say(scope: Scope, status: int, seconds: float, size: int) -> None:
    client = scope.get("client")
    extra = {
        "status": status,
        "ms": round(seconds * 1000, 3),
        "bytes": size,
        "client": f"{client[0]}:{client[1]}" if client else "",
    }
    log.info("request", extra=extra)
