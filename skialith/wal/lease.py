"""Leases: who owns an agent, claimed by compare-and-set and checked by the server at every write."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import _fastpath
from ..errors import AgentFenced, WalRejected, WalUnavailable
from .api import ApiError, NoResponders, OtherServer, backoff
from .gets import Gets
from .stream import Stream
from .transport import Connection, Disconnected, NoReply

WRONG_LAST_SEQUENCE = 10071
_TRANSIENT = (10164, 10158, 10176, 10008, 10023)
_ATTEMPT_SECONDS = 2.0
_VACANT = b'{"token": "", "host": "", "pid": 0}'


class LeaseMoved(WalUnavailable):
    """Another process holds the lease for the same owner by now, whose later writes may have gone there: nothing that waits
    here may be sent any more, unless its caller still wants it."""


@dataclass(slots=True)
class Lease:
    """One agent's ownership by this process. ``seq`` is what every fenced write expects to be the last on the subject.

    ``by``: of a lease whose token is kept outside, names the process that writes for its owner now; else empty. ``owner``:
    how its owner is named to others, empty for this process.
    """

    agent_id: str
    subject: str
    token: str
    seq: int
    server_id: str
    renewed_at: float
    users: int = 1
    suspect: bool = False
    """An earlier write's fate is unknown: renew before the next one, so that a late copy of it is refused."""
    lost: AgentFenced | None = field(default=None)
    by: str = ""
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Holder:
    """What stands on a lease subject; nobody's, if neither token nor owner."""

    seq: int
    token: str
    owner: str
    by: str = ""


class Leases:
    """Claims, renews, verifies and releases. The caller keeps one thing in flight per agent."""

    def __init__(self, connection: Connection, stream: Stream, gets: Gets, seconds: float) -> None:
        self._connection = connection
        self._stream = stream
        self._gets = gets
        self._seconds = seconds

    async def claim(
        self, agent_id: str, deadline: float, owner: str | None = None, check: Callable[[], None] = lambda: None
    ) -> Lease:
        """Become the owner, whoever was before; ``owner`` names one who keeps the token outside of this process.

        ``check``: asked before it is tried again. Raises ``WalUnavailable``, or what ``check`` does; then nothing is owned.
        """
        lease = self._lease(agent_id, secrets.token_hex(16), owner)
        seen, server_id = await self._read(lease.subject, deadline)
        await self._write(lease, seen.seq if seen else 0, server_id, deadline, lambda _: check())
        return lease

    async def adopt(self, agent_id: str, token: str, deadline: float) -> Lease:
        """The lease with this token, written anew, so that copies of what other processes wrote for its owner are refused.

        Raises ``AgentFenced`` if it is not the agent's lease any more, or ``WalUnavailable``.
        """
        lease = self._lease(agent_id, token, "")

        def still_there(holder: Holder | None) -> None:
            if holder is None or holder.token != token:
                raise self._fenced(lease, holder)
            lease.owner = holder.owner

        seen, server_id = await self._read(lease.subject, deadline, lease.token)
        still_there(seen)
        await self._write(lease, seen.seq if seen else 0, server_id, deadline, still_there)
        return lease

    def _lease(self, agent_id: str, token: str, owner: str | None) -> Lease:
        lease = Lease(agent_id, self._stream.subjects.lease(agent_id), token, 0, "", 0.0)
        if owner is not None:
            lease.by, lease.owner = secrets.token_hex(8), owner
        return lease

    async def renew(self, lease: Lease, deadline: float) -> None:
        """Write the lease anew at a new sequence; older copies of this owner's writes are refused from then on.

        Raises ``AgentFenced`` (also set as ``lease.lost``) or ``WalUnavailable``.
        """
        await self._write(lease, lease.seq, lease.server_id, deadline, lambda holder: self._check(lease, holder))

    async def _write(
        self, lease: Lease, expected: int, server_id: str, deadline: float, check: Callable[[Holder | None], None]
    ) -> None:
        """Compare-and-set until it is settled. A lost PubAck is settled by reading: my token there means success.

        ``server_id``: of the server on which ``expected`` was the last sequence. On another one it may be somebody else's, who
        got it a second time after an older copy of the log was put back; so there it is read anew first.

        Where nothing stands, nobody's lease goes first: a claim that expects nothing would match again whenever the subject is
        empty, so a late copy of it would bring back an owner that others have followed. A sequence does not come again.

        ``check`` raises if the lease must not be taken from who holds it.
        """
        pauses = backoff()
        while True:
            record = _record(lease) if expected else _VACANT
            try:
                answer = await self._publish(lease.subject, expected, server_id, record, deadline)
            except (Disconnected, NoReply, NoResponders):
                answer = None
            if answer is not None and answer[3] == 0 and answer[4] == 0:
                if not expected:
                    expected = answer[0]
                    continue
                self._hold(lease, answer[0], server_id)
                return
            if answer is not None and answer[3] not in (
                WRONG_LAST_SEQUENCE,
                *_TRANSIENT,
            ):
                raise WalRejected(
                    f"the lease of agent {lease.agent_id!r} was refused: {answer[5]}",
                    code=answer[3],
                )
            await self._pause(next(pauses), deadline, lease.agent_id)
            holder, server_id = await self._read(lease.subject, deadline, lease.token)
            if holder is not None and _is_mine(lease, holder) and holder.seq != expected:
                self._hold(lease, holder.seq, server_id)
                return
            check(holder)
            expected = holder.seq if holder else 0

    async def _publish(
        self, subject: str, expected: int, server_id: str, record: bytes, deadline: float
    ) -> tuple[Any, ...]:
        await self._connection.ready(deadline)
        if self._connection.server_id != server_id:
            raise OtherServer(sent=False)
        # The rollup removes every earlier lease in the same step: without it, deleting or expiring the last one would
        # make the one before it the last again, and a zombie's writes would match.
        headers = (
            f"Nats-Msg-Id: {secrets.token_hex(16)}\r\nNats-Expected-Last-Subject-Sequence: {expected}\r\n"
            f"Nats-Rollup: sub\r\nNats-TTL: {max(1, round(self._seconds))}s\r\n"
        ).encode()
        timeout = max(0.01, min(_ATTEMPT_SECONDS, deadline - time.monotonic()))
        reply = await self._connection.request(subject, record, headers=headers, timeout=timeout)
        if not reply.data:
            raise NoResponders
        return _fastpath.parse_puback(reply.data)

    async def _pause(self, seconds: float, deadline: float, agent_id: str) -> None:
        if time.monotonic() + seconds >= deadline:
            raise WalUnavailable(
                f"the lease of agent {agent_id!r} could not be settled before the deadline; call again",
                outcome="not_written",
            )
        await asyncio.sleep(seconds)

    @staticmethod
    def _hold(lease: Lease, seq: int, server_id: str) -> None:
        lease.seq, lease.server_id, lease.renewed_at, lease.suspect = (
            seq,
            server_id,
            time.monotonic(),
            False,
        )

    async def _read(self, subject: str, deadline: float, token: str = "") -> tuple[Holder | None, str]:
        """Who stands on the subject, and the id of the server that says so."""
        while True:
            server_id = self._connection.server_id
            holder = await self._holder(subject, deadline, token)
            if server_id == self._connection.server_id:
                return holder, server_id

    async def _holder(self, subject: str, deadline: float, token: str = "") -> Holder | None:
        """Who stands on the subject, read from the leader (a direct get may be stale on a replica).

        Where ``token`` is looked for and not found, it may be who stood there before: a leader that was replaced answers until
        it hears of that. So then it is read in the way that leaves nothing out.
        """
        try:
            message = await self._stream.last_message(subject, deadline)
        except ApiError as error:
            if error.status == 404:
                return None
            raise WalRejected(f"the lease on {subject} cannot be read: {error}", code=error.code) from error
        holder = None if message is None else _parsed(message["seq"], base64.b64decode(message.get("data", "")))
        if self._stream.replicas > 1 and token and (holder is None or holder.token != token):
            found = await self._gets.last(subject, deadline)
            holder = None if found is None else _parsed(found.position.seq, found.data)
        return holder

    def _check(self, lease: Lease, holder: Holder | None) -> None:
        """Adopt the sequence if the lease is still mine, else mark it lost and raise ``AgentFenced``, or ``LeaseMoved``."""
        if holder is not None and _is_mine(lease, holder):
            lease.seq = holder.seq
            return
        if holder is not None and holder.token == lease.token:
            raise LeaseMoved(
                f"agent {lease.agent_id!r}: another process writes for its owner by now; send it again",
                outcome="not_written",
            )
        lease.lost = self._fenced(lease, holder)
        raise lease.lost

    @staticmethod
    def _fenced(lease: Lease, holder: Holder | None) -> AgentFenced:
        if holder is None or not holder.owner:
            text, owner = (
                f"the lease of agent {lease.agent_id!r} expired: call resume() again",
                "",
            )
        else:
            text = f"agent {lease.agent_id!r} was taken over by {holder.owner}: call resume() to own it again"
            owner = holder.owner
        return AgentFenced(text, agent_id=lease.agent_id, owner=owner)

    async def verify(self, lease: Lease, deadline: float) -> None:
        """Read the lease: mine, adopt its sequence; otherwise raise ``AgentFenced``."""
        holder, server_id = await self._read(lease.subject, deadline, lease.token)
        self._check(lease, holder)
        lease.server_id = server_id

    async def ensure(self, lease: Lease, deadline: float) -> None:
        """What must hold before a write: not lost, verified on this server, no earlier write of unknown fate."""
        if lease.lost is not None:
            raise AgentFenced(str(lease.lost), agent_id=lease.agent_id, owner=lease.lost.owner)
        if lease.suspect:
            await self.renew(lease, deadline)
        elif lease.server_id != self._connection.server_id:
            await self.verify(lease, deadline)

    def due(self, lease: Lease) -> bool:
        """Whether a third of the lease's life has passed."""
        return lease.lost is None and time.monotonic() >= self.due_at(lease)

    def due_at(self, lease: Lease) -> float:
        """When that is, on the clock of ``time.monotonic()``."""
        return lease.renewed_at + self._seconds / 3

    async def release(self, lease: Lease) -> None:
        """Give the agent up, once, on this connection. Bounded by the lease's sequence, so a next owner's is never touched."""
        if lease.lost is None and lease.server_id != self._connection.server_id:
            # After a power loss the next owner's lease may stand at a lower sequence than this one.
            with contextlib.suppress(AgentFenced):
                await self.verify(lease, time.monotonic() + _ATTEMPT_SECONDS)
        if lease.lost is None and lease.server_id == self._connection.server_id:
            body = {"filter": lease.subject, "seq": lease.seq + 1}
            await self._stream.api.once(f"STREAM.PURGE.{self._stream.name}", body, timeout=_ATTEMPT_SECONDS)

    async def disown(self, agent_id: str, token: str, deadline: float) -> None:
        """Give the agent up for an owner outside of this process; does nothing if it is not the owner any more."""
        subject = self._stream.subjects.lease(agent_id)
        while True:
            holder, server_id = await self._read(subject, deadline, token)
            if holder is None or holder.token != token:
                return
            body = {"filter": subject, "seq": holder.seq + 1}
            with contextlib.suppress(OtherServer):
                purge = f"STREAM.PURGE.{self._stream.name}"
                await self._stream.api.call(purge, body, deadline=deadline, server_id=server_id)
                return


def _record(lease: Lease) -> bytes:
    return json.dumps(
        {
            "token": lease.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "agent": lease.agent_id,
            "by": lease.by,
            "owner": lease.owner,
        }
    ).encode()


def _parsed(seq: int, data: bytes) -> Holder:
    try:
        body = json.loads(data)
        token, process = str(body["token"]), f"{body['host']} pid {body['pid']}"
        owner = str(body.get("owner") or process) if token else ""
        return Holder(seq, token, owner, str(body.get("by", "")))
    except (ValueError, KeyError, TypeError):
        return Holder(seq, "", "an unreadable lease record")


def _is_mine(lease: Lease, holder: Holder) -> bool:
    return holder.token == lease.token and holder.by == lease.by
