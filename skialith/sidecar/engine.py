"""The engine behind the HTTP API: the process's runtime, awaited, with owners that keep their leases' tokens themselves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from .. import awaiting
from ..base_agent import batch_failed
from ..config import Config
from ..errors import BatchFailed, Closed, SkialithError
from ..history import Found
from ..records import Ack, Record
from ..runtime import Runtime, acquire
from ..wal.arrival import Arrival
from ..wal.lane import LaneName, Owner, Ticket
from ..wal.lease import Lease, LeaseMoved
from . import metrics
from .config import LEASE_SECONDS, SidecarConfig
from .problems import Gone

T = TypeVar("T")
HasGone = Callable[[], bool]
"""Whether whoever sent a request has closed its connection, as far as this process has read it."""


class Engine:
    """One runtime for all requests of a process."""

    def __init__(self, config: Config, sidecar: SidecarConfig) -> None:
        self.config = replace(config, writer="on", lease_seconds=max(config.lease_seconds, LEASE_SECONDS))
        self.sidecar = sidecar
        self._runtime: Runtime | None = None

    async def open(self) -> None:
        """Connect and start the writer. Raises ``ConfigurationError`` or ``WalUnavailable``.

        The log's connection is read on this loop, so that a PubAck changes no threads on its way to the handler.
        """
        loop = asyncio.get_running_loop()
        self._runtime = await awaiting.in_thread(lambda: acquire(self.config, loop=loop))

    async def close(self) -> None:
        """Flush (bounded), stop the writer, disconnect; leases stay with their owners."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            await awaiting.in_thread(runtime.release)

    @property
    def runtime(self) -> Runtime:
        """Raises ``Closed`` before the server has started and when it ends."""
        if self._runtime is None:
            raise Closed("the sidecar is not open; nothing was sent", retryable=True)
        return self._runtime

    def deadline(self) -> float:
        """When a call that begins now gives up, ``time.monotonic()``."""
        return time.monotonic() + self.config.timeout

    # ---- writing

    async def append(
        self,
        name: LaneName,
        record: Record,
        has_gone: HasGone,
        kind: metrics.Appended,
        message_id: bytes | None = None,
    ) -> Ack:
        """Append one record and return at DURABLE. Raises the record's error, or ``Gone``."""
        runtime, deadline = self.runtime, self.deadline()
        make = partial(awaiting.append, runtime, record, deadline, name, message_id)
        with metrics.appending(kind):
            return await self._owned(name, make, deadline, has_gone)

    async def append_all(self, agent_id: str, name: LaneName, records: list[Record], has_gone: HasGone) -> list[Ack]:
        """Append events of one agent in order. Raises ``BatchFailed``."""
        runtime = self.runtime

        async def make(check: Callable[[], None]) -> list[Ack]:
            ticket = Ticket(name, len(records), promise=Arrival())
            with awaiting.batch(agent_id, ticket, records):
                await awaiting.hand_over_all(runtime, ticket, records, check)
                return await runtime.wal.log.awaited(ticket)

        with metrics.appending("batch", len(records)):
            try:
                return await self._owned(name, make, self.deadline(), has_gone)
            except BatchFailed:
                raise
            except SkialithError as error:  # before anything was handed over
                raise batch_failed(agent_id, records, [], error) from error

    async def _owned(
        self, name: LaneName, make: Callable[[Callable[[], None]], Awaitable[T]], deadline: float, has_gone: HasGone
    ) -> T:
        """What ``make`` gives, with the lease of the name's owner held here. It gets what it calls right before it hands over.

        An owner may give a request up and go on with the next one, here or at another process; once that one is answered, the
        one that was given up must not be written any more. Elsewhere: whatever waits here is refused then, because the other
        process adopted the lease, and is sent again only if its client still waits for it. Here: a record that took longer on
        its way to the log (its body was long, all threads were busy) is handed over only if its client still waits for it.
        """
        while True:
            try:
                lease = await self._held(name, deadline) if isinstance(name, Owner) else None
                check = partial(self._check_wanted, name, lease, has_gone)
                check()
                return await make(check)
            except SkialithError as error:
                moved = isinstance(error, LeaseMoved) or isinstance(error.__cause__, LeaseMoved)
                if not moved or error.outcome != "not_written" or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(0)

    async def _held(self, owner: Owner, deadline: float) -> Lease | None:
        """The lease as this process holds it; None if that is over already."""
        wal = self.runtime.wal
        if wal.log.owning.held(owner) is None:
            await wal.ask(lambda: wal.log.owning.adopt(owner, deadline), deadline, whole=True)
        lease = wal.log.owning.held(owner)
        # The sockets are read in between: that a client went away before it sent what is answered by now is known then, also
        # if this request was read in one go with later ones.
        await asyncio.sleep(0)
        return lease

    def _check_wanted(self, name: LaneName, lease: Lease | None, has_gone: HasGone) -> None:
        """Raises ``Gone``, or ``LeaseMoved`` if the owner wrote elsewhere since the lease was looked at, or ``Closed``."""
        self.runtime.check_open()
        if isinstance(name, Owner):
            if has_gone():
                raise _gone(name.agent_id)
            if lease is None or self.runtime.wal.log.owning.held(name) is not lease:
                raise LeaseMoved(f"agent {name.agent_id!r}: its lease was adopted anew meanwhile; nothing was sent")

    # ---- owning and reading

    async def claim(self, agent_id: str, owner: str, has_gone: HasGone) -> Owner:
        """Own the agent on behalf of whoever gets the token. Raises ``WalUnavailable``, or ``Gone``.

        A client that gave its request up may have made it again, and must not lose to itself.
        """
        wal, deadline = self.runtime.wal, self.deadline()

        def check() -> None:
            if has_gone():
                raise _gone(agent_id)

        await asyncio.sleep(0)  # as in _held
        check()
        return await wal.ask(lambda: wal.log.owning.claim_for(agent_id, owner, deadline, check), deadline, whole=True)

    async def disown(self, owner: Owner) -> None:
        """Give the agent up; does nothing if it has another owner by now. Raises ``WalUnavailable``."""
        wal, deadline = self.runtime.wal, self.deadline()
        await wal.ask(lambda: wal.log.owning.disown(owner, deadline), deadline, whole=True)

    async def newest_checkpoint(self, agent_id: str) -> Found:
        """Raises ``WalUnavailable`` or ``StoreUnavailable``."""
        return await awaiting.newest_checkpoint(self.runtime, agent_id, self.deadline())


def _gone(agent_id: str) -> Gone:
    return Gone(
        f"agent {agent_id!r}: the client gave the request up; nothing was sent", outcome="not_written", retryable=True
    )
