"""Errors as problem JSON (RFC 9457): which status, what became of the record, and whether to try again."""

from __future__ import annotations

import json
import logging
from typing import Any, NamedTuple
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from ..errors import (
    AgentFenced,
    BatchFailed,
    Closed,
    ConfigurationError,
    InvalidArgument,
    RecordTooLarge,
    SkialithError,
    StoreDataError,
    StoreUnavailable,
    WalFull,
    WalUnavailable,
)
from .config import RETRY_AFTER_SECONDS
from .wire import Problem

log = logging.getLogger("skialith.sidecar")

MEDIA_TYPE = "application/problem+json"
CLIENT_GONE = 499
"""The status of a request whose client went away before it had an answer; the number is nginx's."""


class Gone(SkialithError):
    """The client gave its request up before anything was sent; nobody reads this."""


class _Kind(NamedTuple):
    status: int
    name: str
    title: str


_KINDS: tuple[tuple[type[SkialithError], _Kind], ...] = (
    (RecordTooLarge, _Kind(413, "too-large", "Record too large")),
    (InvalidArgument, _Kind(400, "invalid", "Invalid request")),
    (AgentFenced, _Kind(409, "fenced", "Agent fenced")),
    (WalFull, _Kind(507, "log-full", "The log is full")),
    (WalUnavailable, _Kind(503, "log-unavailable", "The log is away")),
    (StoreDataError, _Kind(422, "refused", "The database refuses the record")),
    (StoreUnavailable, _Kind(503, "database-unavailable", "The database is away")),
    (Closed, _Kind(503, "stopping", "The sidecar is stopping")),
    (Gone, _Kind(CLIENT_GONE, "gone", "The client went away")),
    (ConfigurationError, _Kind(500, "misconfigured", "The sidecar is misconfigured")),
)
_INTERNAL = _Kind(500, "internal", "Internal error")
_BY_STATUS = {
    400: _Kind(400, "invalid", "Invalid request"),
    401: _Kind(401, "unauthorized", "Token missing or wrong"),
    403: _Kind(403, "forbidden", "Forbidden"),
    404: _Kind(404, "not-found", "Not found"),
    405: _Kind(405, "method-not-allowed", "Method not allowed"),
    408: _Kind(408, "body-timeout", "The body did not arrive"),
    413: _Kind(413, "too-large", "Request too large"),
    415: _Kind(415, "not-json", "Not JSON"),
    431: _Kind(431, "head-too-large", "Headers too large"),
    503: _Kind(503, "overloaded", "Too much at once"),
}


class HttpProblem(HTTPException):
    """A refusal that is HTTP's own; nothing was written."""

    def __init__(
        self, status: int, detail: str, *, headers: dict[str, str] | None = None, retryable: bool = False, **facts: Any
    ) -> None:
        super().__init__(status, detail, headers)
        self.retryable = retryable
        self.facts = facts


def problem(
    kind: _Kind, detail: str, outcome: str, retryable: bool, headers: dict[str, str] | None = None, **facts: Any
) -> Response:
    """The answer that tells of an error."""
    document = {
        "type": f"urn:skialith:problem:{kind.name}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "outcome": outcome,
        "retryable": retryable,
        **{name: value for name, value in facts.items() if value is not None},
    }
    return Response(json.dumps(document), kind.status, headers, MEDIA_TYPE)


def of_error(error: SkialithError) -> Response:
    """An error of the engine as an answer."""
    cause = error.__cause__ if isinstance(error, BatchFailed) else error
    kind = next((kind for known, kind in _KINDS if isinstance(cause, known)), _INTERNAL)
    facts: dict[str, Any] = {}
    if isinstance(cause, InvalidArgument):
        facts["path"] = getattr(cause, "path", "") or cause.argument or None
    if isinstance(cause, RecordTooLarge):
        facts |= {"limit": cause.limit, "size": cause.size}
    if isinstance(cause, AgentFenced):
        facts["owner"] = cause.owner
    if isinstance(error, BatchFailed):
        facts |= {
            "failed": error.failed,
            "acks": [{"seq": ack.seq, "duplicate": ack.duplicate} for ack in error.acks],
        }
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if kind.status in (503, 507) else None
    if kind.status >= 500:
        log.warning("%d %s: %s", kind.status, kind.name, error)
    return problem(kind, str(error), error.outcome, error.retryable, headers, **facts)


def of_refusal(error: HTTPException) -> Response:
    """HTTP's own errors as an answer: no such path, no token, a body that is too long."""
    kind = _BY_STATUS.get(error.status_code) or _Kind(error.status_code, "http", str(error.detail))
    facts = error.facts if isinstance(error, HttpProblem) else {}
    retryable = isinstance(error, HttpProblem) and error.retryable
    headers = None if error.headers is None else dict(error.headers)
    if kind.status >= 500:
        log.warning("%d %s: %s", kind.status, kind.name, error.detail)
    return problem(kind, str(error.detail), "not_written", retryable, headers, **facts)


def of_bug(error: Exception) -> Response:
    """What nobody expected as an answer; the log gets its traceback."""
    log.error("a request failed", exc_info=error)
    text = "something went wrong in the sidecar, its log says what; the record may or may not be written"
    return problem(_INTERNAL, text, "unknown", True)


def of_stopping() -> Response:
    """The answer to what is not done when the sidecar's time to stop is over."""
    log.warning("503 stopping: a request was not done in time")
    text = "the sidecar is stopping and waits no longer; the record may or may not be written"
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return problem(_Kind(503, "stopping", "The sidecar is stopping"), text, "unknown", True, headers)


def raw_path(scope: Scope) -> str:
    """The path of a request as it was sent, percent-encoded."""
    raw: bytes | None = scope.get("raw_path")
    return quote(scope["path"]) if raw is None else raw.partition(b"?")[0].decode("latin-1")


def path_of(location: tuple[int | str, ...]) -> str:
    """Where a bad value stands, as errors say it: ``events[2].event_id``; of a parameter its name."""
    path = ""
    for part in location[1:] if len(location) > 1 else location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "body"


async def _engine_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, SkialithError)
    return of_error(error)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = of_refusal(error)
    if error.status_code == 405:
        # The router names the methods of one route, and a path may have several.
        known = request.app.openapi()["paths"].get(getattr(request.scope.get("route"), "path", ""), {})
        if known:
            answer.headers["Allow"] = ", ".join(sorted(method.upper() for method in known))
    return answer


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = path_of(tuple(first["loc"]))
    return problem(_BY_STATUS[400], f"{path}: {first['msg']}", "not_written", False, path=path)


def install(app: FastAPI) -> None:
    """Have the app answer every error that is expected as a problem; ``observe`` answers the others."""
    app.add_exception_handler(SkialithError, _engine_error)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of these statuses."""
    return {
        status: {
            "model": Problem,
            "description": _BY_STATUS[status].title if status in _BY_STATUS else dict(_TITLES)[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


_TITLES = {
    409: "Another owner, or none any more",
    422: "The database refuses the record",
    500: "Internal error",
    507: "The log is full",
}
