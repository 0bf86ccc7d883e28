"""The socket under a nats-py client: connected here, read and written through the wire, which leaves nats-py its own part."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import ParseResult

from nats.aio.transport import Transport

from ..config import CONNECT_TIMEOUT_SECONDS
from ._link import Link
from ._wire import Wire


class PlainServer(OSError):
    """A server offers no TLS although it must; nothing was sent to it."""


class Socket(Transport):
    """nats-py's transport over a :class:`Wire`; one for all connections of a client. Everything runs on the loop thread."""

    def __init__(self, wire: Wire, on_lost: Callable[[Socket], None], tls: bool) -> None:
        self._wire = wire
        self._on_lost = on_lost
        self._tls = tls
        self._link: Link | None = None
        self._secure: asyncio.Transport | None = None
        self._unread = b""
        self._more: asyncio.Future[None] | None = None
        self._ended = True
        self._retired = False

    # ---- connecting

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        if self._retired:
            raise asyncio.CancelledError
        self.close()
        connected = await asyncio.wait_for(_connected(uri.hostname or "", uri.port or 4222), connect_timeout)
        self._use(Link(self._wire.epoch + 1, connected.detach()))

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """Go on with TLS on the connection, over which nothing but the server's INFO came yet."""
        plain = self._link
        if plain is None:
            raise ConnectionResetError("the connection ended before TLS began")
        loop = asyncio.get_running_loop()
        loop.remove_reader(plain.poll_fd)
        transport, _ = await asyncio.wait_for(
            loop.create_connection(
                lambda: _Secure(self._wire, plain.epoch, self.ended),
                sock=socket.socket(fileno=plain.hand_over()),
                ssl=ssl_context,
                server_hostname=uri if isinstance(uri, str) else uri.hostname,
            ),
            connect_timeout,
        )
        self._secure = transport
        self._use(Link(plain.epoch, -1, lambda: loop.call_soon_threadsafe(self._write_out, transport)))

    def _use(self, link: Link) -> None:
        self._link = link
        self._unread = b""
        self._ended = False
        self._wire.attach(link)
        if link.poll_fd >= 0:
            asyncio.get_running_loop().add_reader(link.poll_fd, self._wire.on_ready)

    def _write_out(self, transport: asyncio.Transport) -> None:
        if self._link is not None and transport is self._secure:
            transport.write(self._link.take_out())

    # ---- what nats-py calls

    def write(self, payload: bytes) -> None:
        if self._tls and self._secure is None:
            raise PlainServer("the server offers no TLS although the URL says tls://")
        self._wire.put(payload)

    def writelines(self, payload: list[bytes]) -> None:
        self.write(b"".join(payload))

    async def drain(self) -> None:
        """What the socket does not take at once is sent when it does."""

    async def read(self, buffer_size: int) -> bytes:
        """What the wire left; empty at the end of the connection."""
        while not (data := self._unread + self._wire.take_rest()) and not self._ended:
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        self._unread = b""
        return data

    async def readline(self) -> bytes:
        data = b""
        while b"\n" not in data:
            piece = await self.read(0)
            if not piece:
                return data
            data += piece
        line, newline, self._unread = data.partition(b"\n")
        return line + newline

    def at_eof(self) -> bool:
        return self._ended and not self._unread

    async def wait_closed(self) -> None:
        """Closing waits for nobody: a dead peer would never take what is buffered, nor end TLS."""

    def close(self) -> None:
        link, self._link = self._link, None
        secure, self._secure = self._secure, None
        if link is not None:
            if link.poll_fd >= 0:
                asyncio.get_running_loop().remove_reader(link.poll_fd)
            self._wire.detach(link.epoch)
        if secure is not None:
            secure.abort()
        self._end()

    def retire(self) -> None:
        """Connect no more, whatever becomes of the cancellation of nats-py's reconnecting: the wire is another client's now."""
        self._retired = True

    def __bool__(self) -> bool:
        # nats-py silently puts in its own transport when ours is falsy before the first connect.
        return True

    # ---- what the wire calls

    def on_rest(self) -> None:
        """There is something for nats-py."""
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    def ended(self, epoch: int) -> None:
        """The connection ended by itself."""
        if self._link is not None and self._link.epoch == epoch:
            if self._link.poll_fd >= 0:
                asyncio.get_running_loop().remove_reader(self._link.poll_fd)
            self._wire.detach(epoch)
            self._unread += self._wire.take_rest()  # an error that the server sent before it closed
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._on_lost(self)
        self.on_rest()


class _Secure(asyncio.Protocol):
    """Bytes that come through TLS."""

    def __init__(self, wire: Wire, epoch: int, ended: Callable[[int], None]) -> None:
        self._wire = wire
        self._epoch = epoch
        self._ended = ended

    def data_received(self, data: bytes) -> None:
        if self._wire.epoch == self._epoch:
            self._wire.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(self._epoch)


async def _connected(host: str, port: int) -> socket.socket:
    """A connected, non-blocking socket to the first address of the host that answers."""
    loop = asyncio.get_running_loop()
    failure: OSError = ConnectionRefusedError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connecting = socket.socket(family, kind, protocol)
        try:
            connecting.setblocking(False)
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(connecting, address)
            return connecting
        except OSError as error:
            connecting.close()
            failure = error
        except BaseException:
            connecting.close()
            raise
    raise failure


async def close_client(client: Any, transport: Socket | None) -> None:
    """Close a client, bounded. In a task of its own: a close that is cancelled inside must not cancel the caller."""
    if transport is not None:
        transport.retire()
    reconnecting: asyncio.Task[None] | None = client._reconnection_task
    if reconnecting is not None:  # it fails when it is cancelled late, and nats-py does not look
        reconnecting.add_done_callback(lambda task: task.cancelled() or task.exception())
    closing = asyncio.ensure_future(client.close())
    await asyncio.wait({closing}, timeout=CONNECT_TIMEOUT_SECONDS)
    if not closing.done():
        closing.cancel()
    elif not closing.cancelled():
        closing.exception()
