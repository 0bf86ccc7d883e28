"""The TCP side of a nats-py client: its transport, and closing it within bounds."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import ParseResult

from nats.aio.transport import TcpTransport

from ..config import CONNECT_TIMEOUT_SECONDS


class PlainServer(OSError):
    """A server offers no TLS although it must; nothing was sent to it."""


class Socket(TcpTransport):
    """nats-py's TCP transport, counting its connections and bytes, and telling when a connection ends."""

    def __init__(self, on_lost: Callable[[Socket], None], tls: bool) -> None:
        super().__init__()
        self.epoch = 0
        self._tls = tls
        self._secure = False
        self.last_received = 0.0
        self._on_lost = on_lost

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        self.epoch += 1
        self._secure = False
        await super().connect(uri, buffer_size, connect_timeout)

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        await super().connect_tls(uri, ssl_context, buffer_size, connect_timeout)
        self._secure = True

    def write(self, payload: bytes) -> None:
        if self._tls and not self._secure:
            raise PlainServer("the server offers no TLS although the URL says tls://")
        super().write(payload)

    async def read(self, buffer_size: int) -> bytes:
        data: bytes = await super().read(buffer_size)
        self.last_received = time.monotonic()
        return data

    def close(self) -> None:
        self._on_lost(self)
        if self._io_writer is not None:
            # Not gracefully: a dead peer would never take what is buffered (nor end TLS), and nats-py waits for that.
            self._io_writer.transport.abort()
        super().close()

    def __bool__(self) -> bool:
        # nats-py silently puts in its own transport when ours is falsy before the first connect.
        return True


async def close_client(client: Any) -> None:
    """Close a client, bounded. In a task of its own: a close that is cancelled inside must not cancel the caller."""
    closing = asyncio.ensure_future(client.close())
    await asyncio.wait({closing}, timeout=CONNECT_TIMEOUT_SECONDS)
    if not closing.done():
        closing.cancel()
    elif not closing.cancelled():
        closing.exception()
