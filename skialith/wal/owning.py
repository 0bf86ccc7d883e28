"""Owning: the agents whose leases this process has, for itself or for owners outside of it; everything runs on the loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ..errors import AgentFenced
from .lane import LOOK_AGAIN_SECONDS, Lane, LaneName, Owner
from .lease import Lease, Leases

if TYPE_CHECKING:
    from .log import Log


class Owning:
    """Puts leases into the lanes of a log and takes them out, each with the lane's turn held."""

    def __init__(self, log: Log, leases: Leases) -> None:
        self._log = log
        self._leases = leases

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
            lane.lease = lease
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
                await self._give_up(agent_id)

    async def _give_up(self, agent_id: LaneName) -> None:
        """Without its lease, what still waits would be written behind a next owner's back."""
        async with self._owning(agent_id, after_all=True) as lane:
            lease = lane.lease
            if lease is not None and lease.users <= 0:
                lane.lease = None
                await self._leases.release(lease)

    async def renew_due(self, deadline: float) -> None:
        """Renew every lease of which a third has passed; give up what nobody uses any more and could not be given up."""
        for agent_id, lane in list(self._log.lanes.items()):
            if isinstance(agent_id, Owner):
                continue
            if lane.lease is not None and lane.lease.users <= 0 and not lane.holders:
                if not lane.turn.waiting:
                    await self._give_up(agent_id)
            elif lane.lease is not None and self._leases.due(lane.lease):
                async with self._owning(agent_id) as held:
                    if held.lease is not None and held.lease.lost is None:
                        await self._leases.renew(held.lease, deadline)

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
        for lane in list(self._log.lanes.values()):
            if lane.lease is not None and not isinstance(lane.name, Owner):
                lane.lease.users = 1
                await self.release(lane.name)
