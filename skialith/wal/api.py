"""JetStream API requests as JSON, with the server's error as an exception."""

from __future__ import annotations

import asyncio
import json
import random
import time
from datetime import datetime, timezone
from typing import Any

from ..config import API_TIMEOUT_SECONDS, RETRY_FIRST_SECONDS, RETRY_LONGEST_SECONDS
from ..errors import WalUnavailable
from .transport import Connection, Disconnected, NoReply

_PASSING = (10005, 10008)
"""Peers offline, as a cluster says for seconds after a node came back; JetStream not available just now."""

_FIRST_ATTEMPT_SECONDS = 0.5
"""A leader that is not chosen yet does not answer what was asked before, and soon does what is asked then."""
_LONGEST_ATTEMPT_SECONDS = 2.0


class ApiError(Exception):
    """The server's answer to an API request was an error. ``code``: the JetStream ``err_code``."""

    def __init__(self, status: int, code: int, description: str) -> None:
        super().__init__(f"{description} ({status}/{code})")
        self.status = status
        self.code = code
        self.description = description


class Api:
    """Calls ``$JS.API.<name>``."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def call(
        self,
        name: str,
        body: dict[str, Any] | None = None,
        *,
        deadline: float | None = None,
        server_id: str | None = None,
    ) -> dict[str, Any]:
        """Call until the server answers; for requests that may be repeated. Raises ``ApiError`` or ``WalUnavailable``.

        ``server_id``: of the one server that it may go to, because it names a sequence that was read there. Connected to
        another one it raises ``OtherServer``: an older copy of the log may have been put back, or a new one made.
        """
        end = deadline if deadline is not None else time.monotonic() + API_TIMEOUT_SECONDS
        pauses, seconds = backoff(), _FIRST_ATTEMPT_SECONDS
        cause: Exception | str = "no answer"
        while True:
            try:
                await self._connection.ready(end)
                if server_id not in (None, self._connection.server_id):
                    raise OtherServer(sent=False)
                timeout = max(0.01, min(seconds, end - time.monotonic()))
                seconds = min(2 * seconds, _LONGEST_ATTEMPT_SECONDS)
                return await self.once(name, body, timeout=timeout)
            except ApiError as error:
                if error.code not in _PASSING:
                    raise
                cause = error
            except NoResponders:
                cause = "JetStream does not answer: it is disabled for this account, or the cluster has no leader now"
            except OtherServer:
                raise
            except (Disconnected, NoReply) as error:
                cause = self._connection.last_error or error
            pause = next(pauses)
            if time.monotonic() + pause >= end:
                raise WalUnavailable(
                    f"the NATS server did not answer {name}: {cause}{self._leaderless()}",
                    outcome="not_written",
                )
            await asyncio.sleep(pause)

    def _leaderless(self) -> str:
        """What a node that answers the connection and no request tells, if it is one of a cluster."""
        server = self._connection.info
        if not server.get("cluster") or not self._connection.wire.is_open:
            return ""
        return (
            f"; {server.get('server_name')} of the cluster {server['cluster']} is connected, so probably there is no leader: "
            "for seconds after a node was lost, or as long as a majority of the nodes is down"
        )

    async def once(self, name: str, body: dict[str, Any] | None = None, *, timeout: float) -> dict[str, Any]:
        """Call one time, on the current connection only; raises what ``Connection.request`` raises, or ``ApiError``.

        The answer gets an ``asked_at``, the ``time.monotonic()`` when it was asked for.
        """
        asked = time.monotonic()
        payload = json.dumps(body).encode() if body is not None else b""
        reply = await self._connection.request(f"$JS.API.{name}", payload, timeout=timeout)
        if not reply.data:
            raise NoResponders
        answer: dict[str, Any] = json.loads(reply.data)
        error = answer.get("error")
        if error:
            raise ApiError(
                error.get("code", 0),
                error.get("err_code", 0),
                error.get("description", "unknown error"),
            )
        answer["asked_at"] = asked
        return answer


class OtherServer(Disconnected):
    """The server that a sequence was read from is not the one that is connected now; nothing was sent there."""


class NoResponders(Exception):
    """Nothing in the server listens on the subject."""


def backoff() -> Any:
    """Pauses with full jitter, without end: uniform in (0, cap], the cap doubling up to its limit."""
    cap = RETRY_FIRST_SECONDS
    while True:
        yield random.uniform(cap / 10, cap)
        cap = min(2 * cap, RETRY_LONGEST_SECONDS)


def rfc3339(time_ns_: int) -> str:
    """Unix nanoseconds as the server writes a time."""
    seconds, rest = divmod(time_ns_, 1_000_000_000)
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S") + f".{rest:09d}Z"


def time_ns(stamp: str) -> int:
    """Nanoseconds since 1970 of an RFC 3339 time as the server writes it (UTC, up to nine decimals)."""
    whole, _, rest = stamp.rstrip("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole + "+00:00").timestamp())
    return seconds * 1_000_000_000 + int(rest.ljust(9, "0") or 0)
