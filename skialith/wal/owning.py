"""Owning: the agents whose leases this process has, for itself or for owners outside of it; everything runs on the loop."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ..config import LEASES_AT_ONCE
from ..errors import AgentFenced, SkialithError, WalUnavailable
from .api import ApiError, NoResponders
from .lane import LOOK_AGAIN_SECONDS, Lane, LaneName, Owner
from .lease import Lease, Leases
from .transport import Disconnected, NoReply

if TYPE_CHECKING:
    from .log import Log

log = logging.getLogger("skialith.wal")

SPARE_PLANS = 16
"""Leases that are not held any more, beyond as many as are, which may be kept in mind until they would have been due."""


class Owning:
    """Puts leases into the lanes of a log and takes them out, each with the lane's turn held.

    ``count``: agents that this process owns for itself.
    """

    def __init__(self, log: Log, leases: Leases) -> None:
        self.count = 0
        self._log = log
        self._leases = leases
        self._calendar: list[tuple[float, int, Lease]] = []
        self._numbers = itertools.count()
        self._due: deque[Lease] = deque()
        self._unused: set[LaneName] = set()
        self._tasks: set[asyncio.Task[object]] = set()

    async def claim(self, agent_id: str, deadline: float) -> Lease:
        """Own the agent. Within one process the lease is shared; one that was lost is claimed anew."""
        async with self._owning(agent_id) as lane:
            held = lane.lease
            if held is not None and held.lost is None:
                # Another process may have taken it over since the last write; whoever resumes takes it back.
                with contextlib.suppress(AgentFenced):
                    await self._leases.confirm(held, deadline)
                    await self._leases.ensure(held, deadline)
                    held.users += 1
                    return held
            lease = await self._leases.claim(agent_id, deadline)
            lease.users = held.users + 1 if held is not None else 1
            self.count += held is None
            lane.lease = lease
            self._plan(lease)
            return lease

    async def claim_for(
        self, agent_id: str, owner: str, deadline: float, check: Callable[[], None] = lambda: None
    ) -> Owner:
        """Own the agent for somebody outside of this process, named ``owner`` to others, who keeps the lease's token.

        ``check``: asked before it is tried again; raises if that is not wanted any more.
        """
        lease = await self._leases.claim(agent_id, deadline, owner, check)
        name = Owner(agent_id, lease.token)
        async with self._owning(name) as lane:
            lane.lease = lease
        return name

    async def adopt(self, owner: Owner, deadline: float) -> None:
        """From here on this process writes for that owner. Raises ``AgentFenced`` or ``WalUnavailable``."""
        async with self._owning(owner) as lane:
            if lane.lease is None:
                lane.lease = await self._leases.adopt(owner.agent_id, owner.token, deadline)

    def held(self, owner: Owner) -> Lease | None:
        """The lease by which this process writes for that owner, another object after each adoption; any thread may ask."""
        lane = self._log.lanes.get(owner)
        return None if lane is None else lane.lease

    async def disown(self, owner: Owner, deadline: float) -> None:
        """Give an owner's agent up, behind all that was handed over for it here."""
        async with self._owning(owner, after_all=True) as lane:
            await self._leases.disown(owner.agent_id, owner.token, deadline)
            lane.lease = None
        self._log.forget(lane)

    async def confirm(self, agent_id: str, deadline: float) -> None:
        """Read the lease, if this process took one. Raises ``AgentFenced`` if it is not this process's any more."""
        async with self._owning(agent_id) as lane:
            if lane.lease is not None:
                await self._leases.confirm(lane.lease, deadline)

    async def release(self, agent_id: LaneName) -> None:
        """One user of the lease less; the last one gives the agent up, after all that was handed over until then."""
        lease = self._log.lane(agent_id).lease
        if lease is not None:
            lease.users -= 1
            if lease.users <= 0:
                self._unused.add(agent_id)
                await self._give_up(agent_id)

    async def _give_up(self, agent_id: LaneName) -> None:
        """Without its lease, what still waits would be written behind a next owner's back."""
        async with self._owning(agent_id, after_all=True) as lane:
            lease = lane.lease
            self._unused.discard(agent_id)
            if lease is not None and lease.users <= 0:
                lane.lease = None
                self.count -= not isinstance(agent_id, Owner)
                self._tidy()
                await self._leases.release(lease)

    # ---- keeping

    def _plan(self, lease: Lease) -> None:
        """Look at the lease again when it is due: what is not due costs nothing, however many there are."""
        heapq.heappush(self._calendar, (self._leases.due_at(lease), next(self._numbers), lease))
        self._tidy()

    def _tidy(self) -> None:
        """Let go of leases that were lost or given up, if most are, and not only when they would have been due."""
        if len(self._calendar) > 2 * self.count + SPARE_PLANS:
            self._calendar = [each for each in self._calendar if self._is_held(each[2])]
            heapq.heapify(self._calendar)

    def _is_held(self, lease: Lease) -> bool:
        lane = self._log.lanes.get(lease.agent_id)
        return lane is not None and lane.lease is lease and lease.lost is None

    def keep(self, timeout: float) -> None:
        """Begin to renew every lease of which a third has passed, and to give up what nobody uses any more and could not be
        given up. ``timeout``: seconds for each.

        Does not wait, so that an agent that is busy, or was taken over, holds up no other.
        """
        now = time.monotonic()
        while self._calendar and self._calendar[0][0] <= now:
            lease = heapq.heappop(self._calendar)[2]
            if not self._is_held(lease):
                continue
            if self._leases.due(lease):
                self._due.append(lease)
            else:
                self._plan(lease)
        for _ in range(min(LEASES_AT_ONCE - len(self._tasks), len(self._due))):
            self._begin(self._renew(timeout))
        for name in list(self._unused):
            lane = self._log.lanes.get(name)
            if lane is None or lane.lease is None or lane.lease.users > 0:
                self._unused.discard(name)
            elif not lane.holders and not lane.turn.waiting and len(self._tasks) < LEASES_AT_ONCE:
                self._begin(self._explained(f"giving {name!r} up", self._give_up(name)))

    def _begin(self, work: Coroutine[None, None, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _renew(self, timeout: float) -> None:
        """One after the other of those that are due, for as long as the log can be reached."""
        reached = True
        while self._due and reached:
            lease = self._due.popleft()
            try:
                reached = await self._explained(
                    f"renewing the lease of {lease.agent_id!r}", self._renew_one(lease, timeout)
                )
            finally:
                if lease.lost is None:
                    self._plan(lease)

    async def _renew_one(self, lease: Lease, timeout: float) -> None:
        async with self._owning(lease.agent_id) as lane:
            if lane.lease is lease and lease.lost is None:
                await self._leases.renew(lease, time.monotonic() + timeout)

    @staticmethod
    async def _explained(what: str, work: Coroutine[None, None, None]) -> bool:
        """False if the log cannot be reached; the next append meets the cause again and reports it."""
        try:
            await work
        except AgentFenced as error:
            log.warning("%s", error)
        except (WalUnavailable, Disconnected, NoReply, NoResponders) as error:
            log.info("%s put off: %s", what, error)
            return False
        except (SkialithError, ApiError) as error:
            log.info("%s put off: %s", what, error)
        except Exception:  # a bug must not end the renewal of leases
            log.exception("%s failed", what)
        return True

    def stop(self) -> None:
        """Renew nothing any more."""
        for task in self._tasks:
            task.cancel()

    @asynccontextmanager
    async def _owning(self, name: LaneName, *, after_all: bool = False) -> AsyncIterator[Lane]:
        lane = self._log.lane(name)
        lane.holders += 1
        try:
            while after_all and lane.turn.waiting:  # noqa: ASYNC110 - it is counted in C, by whatever thread
                await asyncio.sleep(LOOK_AGAIN_SECONDS)
            async with self._log.held(lane):
                yield lane
        finally:
            lane.holders -= 1

    async def release_all(self) -> None:
        """Give up every agent that this process owns; what goes wrong leaves a lease to age out."""
        owned = deque(
            lane for lane in self._log.lanes.values() if lane.lease is not None and not isinstance(lane.name, Owner)
        )

        async def release_next() -> None:
            while owned:
                lane = owned.popleft()
                if lane.lease is not None:
                    lane.lease.users = 1
                    await self.release(lane.name)

        await asyncio.gather(*(release_next() for _ in range(min(LEASES_AT_ONCE, len(owned)))))
