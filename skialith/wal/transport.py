"""The one NATS connection: nats-py owns connect, auth, TLS and reconnect; frames and replies pass through the wire.

Frames are written straight to the socket of the current connection and never through nats-py's reconnect buffer, so
an append that was given up, an ack or a purge dies with its connection instead of reaching a later server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError

from .. import _fastpath
from ..config import (
    CONNECT_TIMEOUT_SECONDS,
    LONGEST_CONTROL_LINE_BYTES,
    LONGEST_MESSAGE_BYTES,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_RECORDS,
    PING_SECONDS,
    Config,
)
from ..errors import Closed, ConfigurationError, SkialithError, WalUnavailable
from ..urls import redact
from ._waiting import Reply
from ._wire import Wire
from .access import access_options, bare, wants_tls
from .tcp import PlainServer, Socket, close_client

log = logging.getLogger("skialith.wal")

_RECONNECT_WAIT_SECONDS = 0.1
_REBUILD_AFTER_SECONDS = 20.0
_SILENT_SECONDS = 1.0
"""A reply must be missing at least this long before the connection is suspected; a short deadline proves nothing."""


class Disconnected(Exception):
    """The connection was lost; ``sent`` says whether the frame had been handed to the socket."""

    def __init__(self, sent: bool) -> None:
        super().__init__("connection lost")
        self.sent = sent


class NoReply(Exception):
    """The frame was sent and no reply came in time."""

    def __init__(self) -> None:
        super().__init__("no reply from the server in time")


class Connection:
    """A NATS connection that outlives servers. Everything here runs on the loop thread; ``wire`` is for any thread."""

    def __init__(
        self,
        config: Config,
        find_url: Callable[[], Awaitable[str]],
        *,
        guarded: bool = False,
    ) -> None:
        """``find_url`` gives the server URL(s) (and restarts the embedded server). ``guarded``: on each server records are held
        back until :meth:`admit` is called there."""
        self._config = config
        self._find_url = find_url
        self._guarded = guarded
        self._client: Any = None
        self._socket: Socket | None = None
        self._open = asyncio.Event()
        self.opened = asyncio.Event()
        """Set at every connection that is made; whoever waits for it clears it."""
        self._judged = asyncio.Event()
        self._admitted_id = ""
        self._refusal: SkialithError | None = None
        self._distrusted = 0
        self._closing = False
        self._url = ""
        self._inbox = f"_INBOX.{secrets.token_hex(11)}"
        self.wire = Wire(
            self._inbox,
            asyncio.get_running_loop().call_soon_threadsafe,
            lambda: self._socket.on_rest() if self._socket is not None else None,
            lambda epoch: self._socket.ended(epoch) if self._socket is not None else None,
            (LONGEST_CONTROL_LINE_BYTES, LONGEST_MESSAGE_BYTES, MAX_QUEUED_RECORDS, MAX_QUEUED_BYTES),
        )
        self.server_id = ""
        """Of the server of the current connection, or of the last one while there is none."""
        self._last_error: Exception | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._subscription: Any = None
        self._lost_at = 0.0
        self.on_other_server: Callable[[], object] = lambda: None
        """Called before anything is sent to a server that is not the one of before."""

    # ---- what the server says of itself

    @property
    def info(self) -> dict[str, Any]:
        return dict(self._client._server_info) if self._client is not None else {}

    @property
    def max_payload(self) -> int:
        """What the server of the current connection takes in one message, or of the last one while there is none."""
        return self.wire.max_payload

    @property
    def epoch(self) -> int:
        """Number of the current connection; acks, pulls and purges belong to one."""
        return self.wire.epoch

    @property
    def is_open(self) -> bool:
        return self._open.is_set()

    @property
    def refusal(self) -> SkialithError | None:
        """Why no records are taken on this server, if its guard has said so."""
        return self._refusal

    @property
    def last_error(self) -> Exception | None:
        return self._last_error

    # ---- life

    async def connect(self, timeout: float) -> None:
        """Connect within ``timeout`` seconds; afterwards reconnect for ever.

        Raises ``ConfigurationError`` (refused credentials, TLS missing) or ``WalUnavailable``; nothing was written.
        """
        self._url = await self._find_url()
        await self._build(min(timeout, CONNECT_TIMEOUT_SECONDS))
        self._supervisor = asyncio.create_task(self._supervise())

    async def _build(self, timeout: float) -> None:
        refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def on_error(error: Exception) -> None:
            self._last_error = error if str(error) else NoReply()
            if refused.done():
                return
            if isinstance(error, PlainServer):
                refused.set_result(
                    "offers no TLS although the URL says tls://: enable TLS on the server or use nats://; no password was sent"
                )
            elif isinstance(error, ssl.SSLCertVerificationError):
                refused.set_result(
                    f"has a certificate that is not accepted ({error.verify_message}): set SKIALITH_NATS_TLS_CA to its "
                    "authority, or use the host name that the certificate names; no password was sent"
                )
            elif "authorization violation" in str(error).lower():
                refused.set_result(
                    "refused the credentials: check SKIALITH_NATS_URL (user:password or token), SKIALITH_NATS_CREDS or "
                    "SKIALITH_NATS_NKEY_SEED"
                )
            log.debug("nats: %s", error)

        client: Any = Client()
        self._socket = client._transport = Socket(self.wire, self._lost, wants_tls(self._url))
        self._client = client
        connecting = asyncio.create_task(client.connect(**self._options(on_error)))
        try:
            await asyncio.wait(
                {connecting, refused},
                timeout=timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if refused.done():
                raise ConfigurationError(f"NATS at {self._redacted()} {refused.result()}")
            if not connecting.done():
                raise WalUnavailable(
                    f"no NATS server at {self._redacted()} within {timeout:.1f} s ({self._last_error or 'no answer'}): "
                    "start it, or correct SKIALITH_NATS_URL",
                    outcome="not_written",
                )
            await connecting
            epoch = self.wire.epoch
            await self._subscribe()
            if not client.is_connected or self.wire.epoch != epoch:
                raise OSError("the connection was lost while it was set up")
        except (NatsError, OSError, ssl.SSLError) as error:
            await self._discard(client, connecting)
            raise WalUnavailable(
                f"cannot connect to NATS at {self._redacted()}: {error}",
                outcome="not_written",
            ) from error
        except BaseException:
            await self._discard(client, connecting)
            raise
        self._opened()

    def _opened(self) -> None:
        """Subscriptions are in force: from here on anybody may write, records only once their guard says so."""
        server_id = self._told_id()
        if self.server_id not in ("", server_id):
            self.on_other_server()
        self.server_id = server_id
        known = not self._guarded or self.server_id == self._admitted_id
        if not known:
            self._judged.clear()
            self._refusal = None
        self.wire.open(int(self._client.max_payload), records=known)
        self._last_error = None
        self._open.set()
        self.opened.set()

    def _told_id(self) -> str:
        told = str(self.info.get("server_id", ""))
        return f"{told}~{self._distrusted}" if self._distrusted else told

    async def _discard(self, client: Any, connecting: asyncio.Task[Any]) -> None:
        connecting.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await connecting
        await close_client(client, self._socket)

    def _options(self, on_error: Callable[[Exception], Awaitable[None]]) -> dict[str, Any]:
        servers = [bare(url) for url in self._url.split(",")]
        options: dict[str, Any] = {
            "servers": servers,
            "name": "skialith",
            "error_cb": on_error,
            "reconnected_cb": self._on_reconnected,
            "max_reconnect_attempts": -1,
            "reconnect_time_wait": _RECONNECT_WAIT_SECONDS,
            # A server that says nothing must leave time to try the others.
            "connect_timeout": CONNECT_TIMEOUT_SECONDS / (2 * len(servers)),
            "ping_interval": PING_SECONDS,
            "max_outstanding_pings": 2,
            "pending_size": 0,
        }
        options.update(access_options(self._config, self._url))
        return options

    def _redacted(self) -> str:
        return ",".join(redact(url.strip()) for url in self._url.split(","))

    async def _subscribe(self) -> None:
        """One subscription for all replies and deliveries. The wire takes its messages out before nats-py sees them."""

        async def nobody(_: object) -> None:
            return None

        self._subscription = await self._client.subscribe(f"{self._inbox}.*", cb=nobody)
        await self._client.flush(timeout=CONNECT_TIMEOUT_SECONDS)

    async def _on_reconnected(self) -> None:
        self._opened()
        log.info("connected to NATS again (%s)", self._redacted())

    def _lost(self, socket: Socket | None) -> None:
        if socket is not self._socket:
            return  # An earlier client's, closed late.
        if self._open.is_set():
            self._lost_at = time.monotonic()
            self._open.clear()
            if not self._closing:
                log.warning("connection to NATS lost (%s); reconnecting", self._redacted())

    async def _supervise(self) -> None:
        """Restart the embedded server while disconnected, and rebuild a client that nats-py closed for good."""
        while not self._closing:
            await asyncio.sleep(0.2)
            if self._open.is_set():
                continue
            try:
                url = await self._find_url()
                stuck = time.monotonic() - self._lost_at > _REBUILD_AFTER_SECONDS
                if self._client.is_closed or stuck or url != self._url:
                    self._url = url
                    await self._rebuild()
            except Exception as error:  # noqa: BLE001 - nobody else brings the connection back, so nothing may end this
                self._last_error = error
                log.warning("still no connection to NATS: %s", error)
                await asyncio.sleep(1.0)

    async def _rebuild(self) -> None:
        await close_client(self._client, self._socket)
        await self._build(CONNECT_TIMEOUT_SECONDS)

    async def end_deliveries(self, give_back: Callable[[], int], timeout: float) -> None:
        """Let the server send nothing more, replies included; ``give_back`` what it had sent, and wait until it knows.

        Without this, what reaches a connection that closes waits for ``ACK_WAIT_SECONDS``. What the server had meant to send here
        and did not it gives to others at once. Each of the two round trips is bounded by ``timeout`` seconds.
        """
        if not self._open.is_set():
            return
        try:
            await self._subscription.unsubscribe()
            await self._client.flush(timeout)
            await self._client.flush(timeout)
            while give_back():
                await self._client.flush(timeout)
        except (NatsError, OSError, asyncio.TimeoutError) as error:
            log.info("closing: what was fetched ahead is delivered to others after its ack wait: %s", error)

    async def close(self) -> None:
        """Close for good; may be called twice."""
        self._closing = True
        if self._supervisor is not None:
            self._supervisor.cancel()
        self._lost(self._socket)
        if self._client is not None:
            await close_client(self._client, self._socket)

    # ---- frames and replies

    async def ready(self, deadline: float) -> None:
        """Wait until frames can be sent; raises ``Disconnected`` at the deadline (``time.monotonic()``)."""
        if self._open.is_set():
            return
        if self._closing:
            raise Closed("Skialith is closed")
        try:
            await asyncio.wait_for(self._open.wait(), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise Disconnected(sent=False) from None

    async def admitted(self, deadline: float) -> None:
        """Wait until records may be sent; raises what :meth:`refuse` was given, or ``Disconnected`` at the deadline."""
        await self.ready(deadline)
        while self._guarded and not self.wire.takes_records:
            if self._refusal is not None:
                raise self._refusal.with_traceback(None)  # it is raised many times
            try:
                await asyncio.wait_for(self._judged.wait(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise Disconnected(sent=False) from None
            await self.ready(deadline)
            if self._refusal is None and not self.wire.takes_records:
                raise Disconnected(sent=False)  # it broke just now

    def admit(self, epoch: int) -> None:
        """Records may be sent on the connection ``epoch``, and on later ones to the same server."""
        if epoch == self.epoch and self.wire.is_open:
            self._refusal, self._admitted_id = None, self.server_id
            self.wire.admit(True)
            self._judged.set()

    def refuse(self, epoch: int, error: SkialithError) -> None:
        """Records are not to be sent on the connection ``epoch``: whoever wants to gets ``error``."""
        if epoch == self.epoch:
            self._refusal, self._admitted_id = error, ""
            self.wire.admit(False)
            self._judged.set()

    async def distrust(self) -> None:
        """The log behind this server is not what it was: connect anew, and take the server for another one from then on."""
        self._distrusted += 1
        await self._client.force_reconnect()

    def send(self, frame: bytes) -> None:
        """Hand whole frames to the socket, or raise ``Disconnected(sent=False)``."""
        if not self.wire.is_open or not self.wire.put(frame):
            raise Disconnected(sent=False)

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        *,
        headers: bytes | None = None,
        timeout: float,
    ) -> Reply:
        """Send one message and return its first non-empty reply (or a status message).

        Raises ``Disconnected`` or ``NoReply``. A timeout with not one byte received forces a reconnect.
        """

        def build(reply: str) -> bytes:
            if headers is None:
                return _fastpath.pub(subject, reply, payload)
            return _fastpath.hpub(subject, reply, headers, payload)

        return await self.exchange(build, timeout)

    async def exchange(self, build: Callable[[str], bytes], timeout: float) -> Reply:
        """Send the frame(s) that ``build`` makes for a reply subject, and wait for the first non-empty reply."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def on_reply(message: Reply | None) -> None:
            if future.done():
                return
            if message is None:
                future.set_exception(Disconnected(sent=True))
            elif message.data or message.headers:
                future.set_result(message)

        token = self.wire.expect(on_reply)
        sent_at = time.monotonic()
        try:
            self.send(build(self.wire.reply_subject(token)))
            return await asyncio.wait_for(future, timeout)
        except asyncio.TimeoutError:
            await self.check_silence(sent_at)
            raise NoReply from None
        finally:
            self.wire.forget(token)

    async def collect(self, subject: str, payload: bytes, timeout: float) -> list[Reply]:
        """Send one message and return its replies up to and including the first status message.

        Raises ``Disconnected`` or ``NoReply`` (no status message within ``timeout`` seconds).
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        replies: list[Reply] = []

        def on_reply(message: Reply | None) -> None:
            if future.done():
                return
            if message is None:
                future.set_exception(Disconnected(sent=True))
                return
            replies.append(message)
            if message.headers and "Status" in message.headers:
                future.set_result(None)

        token = self.wire.expect(on_reply)
        sent_at = time.monotonic()
        try:
            self.send(_fastpath.pub(subject, self.wire.reply_subject(token), payload))
            await asyncio.wait_for(future, timeout)
            return replies
        except asyncio.TimeoutError:
            await self.check_silence(sent_at)
            raise NoReply from None
        finally:
            self.wire.forget(token)

    async def check_silence(self, since: float) -> None:
        """Reconnect if not one byte came since a frame was sent, and long enough ago to prove something."""
        if time.monotonic() - since >= _SILENT_SECONDS and self.wire.is_open and self.wire.last_received < since:
            await self._client.force_reconnect()
