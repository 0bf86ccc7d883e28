"""Structured logs on stderr: JSON lines for machines, plain lines on a terminal; every line of a request carries its id."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import NamedTuple

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

from .config import SidecarConfig


class Current(NamedTuple):
    """The request that is being answered."""

    request_id: str
    method: str
    path: str


current: ContextVar[Current | None] = ContextVar("skialith_request", default=None)

_FIELDS = ("status", "ms", "bytes", "client", "worker")
"""What a line may carry besides its text, given as ``extra``."""


def install(sidecar: SidecarConfig) -> None:
    """Have all loggers of this process write to stderr, once, in the form that the settings name."""
    as_json = sidecar.log_format == "json" or (sidecar.log_format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(as_json))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("skialith", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").propagate = False  # the access log is ours


def _formatter(as_json: bool) -> logging.Formatter:
    last: list[Processor]
    if as_json:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # Not rich's tracebacks, which show local variables: payloads are among them.
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain, pad_event_to=0)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.stdlib.ExtraAdder(_FIELDS),
            _of_request,
        ],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )


def _of_request(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    request = current.get()
    if request is not None:
        line.update(request._asdict())
    return line
