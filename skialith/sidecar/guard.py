"""Who may come in, and with how much: token, Host and Origin, and the limits of bodies; in one ASGI middleware."""

from __future__ import annotations

import asyncio
import hmac
import sys
from functools import lru_cache
from ipaddress import ip_address

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import problems
from .config import BODIES_BYTES, BODY_SECONDS, RETRY_AFTER_SECONDS, SidecarConfig
from .problems import HttpProblem

TRUSTED = "skialith.trusted"
"""Whether the request showed the token, or none is asked for; in the scope."""

_OPEN = ("/health", "/ready", "/openapi.json")
"""Paths that need no token."""
_CLOSE = {"Connection": "close"}
_COME_BACK = {"Retry-After": str(RETRY_AFTER_SECONDS)}


class Guard:
    """Refuses with a problem, or hands the request on with its whole body and its path as it was sent.

    The path stays percent-encoded, so that ids may hold any character, ``/`` too; handlers decode what they take from it.
    """

    def __init__(self, app: ASGIApp, sidecar: SidecarConfig) -> None:
        self._app = app
        self._token = None if sidecar.token is None else sidecar.token.encode("ascii")
        self._only_loopback_hosts = sidecar.token is None and sidecar.loopback
        self._limit = sidecar.body_bytes
        self._origins = frozenset(origin.encode() for origin in sidecar.cors_origins)
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = problems.raw_path(scope)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        body = _Body(self)
        try:
            self._admit(scope, headers)
            if b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0":
                self._check_body(scope["method"], headers)
                if not await body.read(receive, int(headers.get(b"content-length", b"0"))):
                    return
                receive = body.replayed(receive)
            await self._app(scope, receive, send)
        except HttpProblem as problem:
            if b"expect" in headers:  # its client may or may not send the body now, and then the next request
                problem.headers = {**(problem.headers or {}), **_CLOSE}
            await problems.of_refusal(problem)(scope, receive, send)
        finally:
            body.let_go()

    # ---- who

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").lower()
        if self._only_loopback_hosts and not _is_loopback(host):
            raise HttpProblem(
                403,
                "without a token the sidecar answers only requests to localhost, 127.0.0.1 or [::1], because a web page may give "
                "any name of its own this machine's address: use one of these, or set SKIALITH_TOKEN",
            )
        origin = headers.get(b"origin")
        if origin is not None and not self._known(origin.lower(), scope["scheme"].encode(), host):
            raise HttpProblem(403, "the Origin of the request is not allowed here: see --cors-origin")
        scope[TRUSTED] = trusted = self._token is None or _shows(headers, self._token)
        if not trusted and scope["path"] not in _OPEN:
            raise HttpProblem(
                401,
                "this needs the header `Authorization: Bearer <token>` with the token of the sidecar (SKIALITH_TOKEN)",
                headers={"WWW-Authenticate": 'Bearer realm="skialith"'},
            )

    def _known(self, origin: bytes, scheme: bytes, host: bytes) -> bool:
        return origin in self._origins or b"*" in self._origins or origin == scheme + b"://" + host

    # ---- with how much

    def _check_body(self, method: str, headers: dict[bytes, bytes]) -> None:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            raise HttpProblem(415, "the body must be JSON: send the header `Content-Type: application/json`")
        size = int(headers.get(b"content-length", b"0"))
        if size > self._limit:
            raise self._too_large(size)

    def _too_large(self, size: int | None, headers: dict[str, str] | None = None) -> HttpProblem:
        text = f"the body is over {self._limit} bytes (--body-bytes, SKIALITH_HTTP_BODY_BYTES)"
        return HttpProblem(413, text, headers=headers, limit=self._limit, size=size)

    def hold(self, size: int) -> None:
        """Count bytes of bodies that are held. Raises ``HttpProblem`` when that is too much; they are counted all the same."""
        self._held += size
        if self._held > BODIES_BYTES:
            text = f"requests of over {BODIES_BYTES} bytes are under way, come back later"
            raise HttpProblem(503, text, headers=_COME_BACK, retryable=True)

    def let_go(self, size: int) -> None:
        """They are not held any more."""
        self._held -= size

    def check_size(self, size: int, *, over: bool) -> None:
        """Raises ``HttpProblem`` for a body that is too long; not before it is ``over``, so that its sender reads the answer."""
        if size > self._limit and (over or size > 2 * self._limit):
            raise self._too_large(None, None if over else _CLOSE)

    def keeps(self, size: int) -> bool:
        """Whether a body of this size is kept, or only read to its end to be refused then."""
        return size <= self._limit


class _Body:
    """The body of one request, read whole before the handler runs."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._counted = 0
        self._whole = b""

    async def read(self, receive: Receive, declared: int) -> bool:
        """Read it, ``declared`` bytes long (0: not known); False if the client went away. Raises ``HttpProblem``."""
        self._count(declared)
        task, expired = asyncio.current_task(), False
        assert task is not None

        def expire() -> None:
            nonlocal expired
            expired = True
            task.cancel()

        timer = asyncio.get_running_loop().call_later(BODY_SECONDS, expire)
        try:
            return await self._receive(receive)
        except asyncio.CancelledError:
            if not expired:
                raise
            if sys.version_info >= (3, 11):
                task.uncancel()
            text = f"the body did not arrive within {BODY_SECONDS:g} s"
            raise HttpProblem(408, text, headers=_CLOSE, retryable=True) from None
        finally:
            timer.cancel()

    async def _receive(self, receive: Receive) -> bool:
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            more = message.get("more_body", False)
            size += len(message["body"])
            self._guard.check_size(size, over=not more)
            if self._guard.keeps(size):
                self._count(size)
                parts.append(message["body"])
            else:
                parts.clear()
        self._whole = parts[0] if len(parts) == 1 else b"".join(parts)
        return True

    def _count(self, size: int) -> None:
        more = max(0, size - self._counted)
        self._counted += more
        self._guard.hold(more)

    def replayed(self, receive: Receive) -> Receive:
        """What the handler receives: the body in one piece, then what comes."""
        body: Message | None = {"type": "http.request", "body": self._whole, "more_body": False}

        async def again() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = body, None
            return message

        return again

    def let_go(self) -> None:
        self._guard.let_go(self._counted)


def _shows(headers: dict[bytes, bytes], token: bytes) -> bool:
    scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), token)


@lru_cache(maxsize=256)
def _is_loopback(host: bytes) -> bool:
    """Whether a Host header names this machine: ``localhost:7420``, ``127.0.0.1``, ``[::1]:7420``."""
    text = host.decode("latin-1")
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
