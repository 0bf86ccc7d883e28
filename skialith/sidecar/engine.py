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
from ..wal.lease import LeaseMoved
from . import metrics
from .config import LEASE_SECONDS, SidecarConfig

T = TypeVar("T")
Connected = Callable[[], Awaitable[bool]]
"""Whether whoever sent a request still waits for its answer."""


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
        connected: Connected,
        kind: metrics.Appended,
        message_id: bytes | None = None,
    ) -> Ack:
        """Append one record and return at DURABLE. Raises the record's error."""
        runtime, deadline = self.runtime, self.deadline()
        make = partial(awaiting.append, runtime, record, deadline, name, message_id)
        with metrics.appending(kind):
            return await self._owned(name, make, deadline, connected)

    async def append_all(self, agent_id: str, name: LaneName, records: list[Record], connected: Connected) -> list[Ack]:
        """Append events of one agent in order. Raises ``BatchFailed``."""
        runtime = self.runtime

        async def make() -> list[Ack]:
            ticket = Ticket(name, len(records), promise=Arrival())
            with awaiting.batch(agent_id, ticket, records):
                await awaiting.hand_over_all(runtime, ticket, records, runtime.check_open)
                return await runtime.wal.log.awaited(ticket)

        with metrics.appending("batch", len(records)):
            try:
                return await self._owned(name, make, self.deadline(), connected)
            except BatchFailed:
                raise
            except SkialithError as error:  # before anything was handed over
                raise batch_failed(agent_id, records, [], error) from error

    async def _owned(
        self, name: LaneName, make: Callable[[], Awaitable[T]], deadline: float, connected: Connected
    ) -> T:
        """What ``make`` gives, with the lease of the name's owner held here.

        An owner's requests may come by several processes. Whatever waits here when its next one came elsewhere is refused,
        because the client may have given it up for that one; so it is sent again only if the client still waits for it.
        """
        moved = False
        while True:
            # After a refusal also if another request has adopted the lease meanwhile: it may be the client's next one.
            if isinstance(name, Owner) and (moved or not self.runtime.wal.log.owning.holds(name)):
                await self._adopt(name, deadline, connected)
            try:
                return await make()
            except SkialithError as error:
                moved = isinstance(error, LeaseMoved) or isinstance(error.__cause__, LeaseMoved)
                if not moved or error.outcome != "not_written" or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(0)

    async def _adopt(self, owner: Owner, deadline: float, connected: Connected) -> None:
        wal = self.runtime.wal
        await wal.ask(lambda: wal.log.owning.adopt(owner, deadline), deadline, whole=True)
        # In this order: if its next request comes by another process from here on, this one's record is refused.
        if not await connected():
            text = f"agent {owner.agent_id!r}: the client gave the request up; nothing was sent"
            raise LeaseMoved(text, outcome="not_written")

    # ---- owning and reading

    async def claim(self, agent_id: str, owner: str) -> Owner:
        """Own the agent on behalf of whoever gets the token. Raises ``WalUnavailable``."""
        wal, deadline = self.runtime.wal, self.deadline()
        return await wal.ask(lambda: wal.log.owning.claim_for(agent_id, owner, deadline), deadline, whole=True)

    async def disown(self, owner: Owner) -> None:
        """Give the agent up; does nothing if it has another owner by now. Raises ``WalUnavailable``."""
        wal, deadline = self.runtime.wal, self.deadline()
        await wal.ask(lambda: wal.log.owning.disown(owner, deadline), deadline, whole=True)

    async def newest_checkpoint(self, agent_id: str) -> Found:
        """Raises ``WalUnavailable`` or ``StoreUnavailable``."""
        return await awaiting.newest_checkpoint(self.runtime, agent_id, self.deadline())
