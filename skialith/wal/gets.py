"""Messages read from whichever replica answers, and the last one on a subject as of now."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from .. import _fastpath
from ..config import API_TIMEOUT_SECONDS, RETRY_FIRST_SECONDS
from ..errors import WalRejected, WalUnavailable
from ..records import Position
from ._waiting import Reply
from .api import NoResponders, backoff, time_ns
from .stream import Stream
from .transport import Connection, Disconnected, NoReply

T = TypeVar("T")

_MARK_ATTEMPT_SECONDS = 2.0
_MARK_TTL_SECONDS = 60
_REPLICA_SECONDS = 1.0
"""How long a replica that lags, or stands still, is asked again before the leader is; then twice as long, and so on."""


class Found(NamedTuple):
    """A message."""

    position: Position
    data: bytes


class Gets:
    """Reads one namespace. Every method takes a deadline (``time.monotonic()``) and may raise ``WalUnavailable``."""

    def __init__(self, connection: Connection, stream: Stream) -> None:
        self._connection = connection
        self._stream = stream
        self._marks = stream.subjects.mark(secrets.token_hex(8))

    async def last(self, subject: str, deadline: float) -> Found | None:
        """The last message on ``subject``, none of those that were acknowledged before the call left out.

        With replicas no answer shows by itself what it leaves out: a replica may lag, and a leader that stood still goes on
        answering until it hears of the next one (as it did in half of the trials). So a message of no meaning is stored first,
        for which a majority is needed, and an answer counts if it holds that one too.
        """
        if self._stream.replicas == 1:
            return (await self._lasts([subject], deadline)).get(subject)
        mark = await self.mark(deadline)
        patience, pause = time.monotonic() + _REPLICA_SECONDS, RETRY_FIRST_SECONDS / 10
        while mark and time.monotonic() < min(patience, deadline):
            try:
                found = await self._lasts([self._marks, subject], min(patience, deadline))
            except WalUnavailable:
                break
            if self._marks in found and found[self._marks].position.seq >= mark:
                return found.get(subject)
            await asyncio.sleep(pause)
            pause *= 2
        # The replica at hand is far behind or stands still. The leader has stored the mark a moment ago.
        message = await self._stream.last_message(subject, deadline)
        if message is None:
            return None
        position = Position(time_ns(message["time"]), int(message["seq"]))
        return Found(position, base64.b64decode(message.get("data", "")))

    async def _lasts(self, subjects: list[str], deadline: float) -> dict[str, Found]:
        replies = await self.direct(self._stream.name, {"multi_last": subjects}, deadline)
        return {(reply.headers or {})["Nats-Subject"]: Found(position_of(reply), reply.data) for reply in replies}

    async def mark(self, deadline: float) -> int:
        """Store a message of no meaning; its sequence, or 0 where the log is too full for it."""

        async def once(timeout: float) -> int:
            headers = f"Nats-Rollup: sub\r\nNats-TTL: {_MARK_TTL_SECONDS}s\r\n".encode()
            timeout = min(timeout, _MARK_ATTEMPT_SECONDS)
            reply = await self._connection.request(self._marks, b"", headers=headers, timeout=timeout)
            if not reply.data:
                raise NoResponders
            seq, _, _, code, status, _, _ = _fastpath.parse_puback(reply.data)
            if status == 503 and code != 10077:
                raise NoResponders
            return 0 if code or status else int(seq)

        return await self._until(once, deadline, self._stream.name)

    async def direct(self, stream: str, query: dict[str, Any], deadline: float) -> list[Reply]:
        """The messages of one direct get, in order; empty when nothing matches.

        With replicas any of them may be who is asked, one that stands still too; so the next one is asked soon.
        """
        seconds = API_TIMEOUT_SECONDS if self._stream.replicas == 1 else _REPLICA_SECONDS

        async def once(timeout: float) -> list[Reply]:
            nonlocal seconds
            timeout, seconds = min(timeout, seconds), 2 * seconds
            payload = json.dumps(query).encode()
            replies = await self._connection.collect(f"$JS.API.DIRECT.GET.{stream}", payload, timeout)
            status = (replies[-1].headers or {})["Status"]
            if status == "503":
                raise NoResponders
            if status not in ("204", "404"):
                raise WalRejected(f"reading {stream} failed: {(replies[-1].headers or {}).get('Description', status)}")
            return replies[:-1]

        return await self._until(once, deadline, stream)

    async def _until(self, once: Callable[[float], Awaitable[T]], deadline: float, what: str) -> T:
        pauses = backoff()
        cause: object = "no answer"
        while True:
            try:
                await self._connection.ready(deadline)
                return await once(max(0.01, min(API_TIMEOUT_SECONDS, deadline - time.monotonic())))
            except (Disconnected, NoReply) as error:
                cause = self._connection.last_error or error
            except NoResponders:
                cause = "the stream has no leader, or does not exist"
            pause = next(pauses)
            if time.monotonic() + pause >= deadline:
                raise WalUnavailable(f"{what} could not be read before the deadline ({cause})")
            await asyncio.sleep(pause)


def position_of(message: Reply) -> Position:
    """Where a message stands that a direct get gave."""
    headers = message.headers or {}
    return Position(time_ns(headers["Nats-Time-Stamp"]), int(headers["Nats-Sequence"]))
