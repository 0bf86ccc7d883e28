"""One HTTP connection: uvicorn's protocol over httptools, with limits for what comes before a request, and problem JSON."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from . import problems
from .config import CONCURRENT_REQUESTS, HEAD_BYTES, HEAD_SECONDS, RETRY_AFTER_SECONDS, TLS_CLOSE_SECONDS
from .problems import HttpProblem

GONE = "skialith.gone"
"""Whether the client has closed its connection, as a question; in the scope."""

_OFFER = (b"connection", b"upgrade", b"http2-settings")


class Protocol(HttpToolsProtocol):
    """A connection whose first request must come within ``HEAD_SECONDS``, with at most ``HEAD_BYTES`` of headers."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_bytes = 0
        self._in_head = False
        self._received = b""
        self._anew: bytes | None = None
        self._first: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._first = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        rest: bytes | None = data
        while rest is not None:
            self._received, self._anew = rest, None
            super().data_received(rest)
            rest = self._anew
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
                self._refuse(
                    HttpProblem(431, f"request line and headers are over {HEAD_BYTES} bytes", limit=HEAD_BYTES)
                )

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes behind a body is nothing that anybody asks for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        if self._offers():
            return
        crowded = len(self.connections) > CONCURRENT_REQUESTS
        self.app = _overloaded if crowded else self.config.loaded_app
        self.scope[GONE] = self.transport.is_closing  # type: ignore[literal-required]
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self._offers():
            return
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()  # paused by a long body, it would not see that the client goes away

    def _offers(self) -> bool:
        """Whether the request offers to speak another protocol, as Java's client does with HTTP/2 at every first request."""
        parser = self.parser
        return bool(parser.should_upgrade() and parser.should_keep_alive()) and parser.get_method() != b"CONNECT"

    def _unsupported_upgrade_warning(self) -> None:
        """Called when that request's head is over, for the parser's exception: it takes such a request for one without a body.

        So the head is parsed anew, without the offer.
        """
        upgrade = sys.exc_info()[1]
        if upgrade is None or not self._offers():
            return
        head = b"%b %b HTTP/1.1\r\n" % (self.parser.get_method(), self.url)
        lines = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] not in _OFFER)
        self._anew = b"%b%b\r\n%b" % (head, lines, self._received[upgrade.args[0] :])

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._end_soon()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._end_soon()

    def _end_soon(self) -> None:
        """A client that does not confirm the end of TLS would hold the sidecar's own end up."""
        if self.scheme == "https":
            self.loop.call_later(TLS_CLOSE_SECONDS, self._end)

    def _end(self) -> None:
        if self.transport.get_write_buffer_size():
            self._end_soon()
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is not HTTP."""
        self._refuse(HttpProblem(400, msg))

    def _stop_waiting(self) -> None:
        if self._first is not None:
            self._first.cancel()
            self._first = None

    def _refuse(self, problem: HttpProblem) -> None:
        answer = problems.of_refusal(problem)
        lines = [STATUS_LINE[answer.status_code], b"connection: close\r\n"]
        lines += [b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *answer.raw_headers)]
        self.transport.write(b"".join([*lines, b"\r\n", bytes(answer.body)]))
        self.transport.close()


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS), "Connection": "close"}
    text = f"over {CONCURRENT_REQUESTS} connections are open, come back later"
    await problems.of_refusal(HttpProblem(503, text, headers=headers, retryable=True))(scope, receive, send)
