"""Skialith broken on purpose: a model of fencing that does not catch it could not catch anything."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from skialith.wal import frames
from skialith.wal import lease as wal_lease
from skialith.wal.api import NoResponders
from skialith.wal.delivery import Delivery
from skialith.wal.lane import Entry, Lane
from skialith.wal.lease import Holder, Lease, Leases
from skialith.wal.transport import Connection, Disconnected, NoReply


def without_rollup(patch: pytest.MonkeyPatch) -> None:
    """The leases before the last one stay, and one of them is the last again when it goes."""
    request = Connection.request

    async def broken(self: Connection, subject: str, payload: bytes, *, headers: bytes = b"", timeout: float) -> Any:
        headers = headers.replace(b"Nats-Rollup: sub\r\n", b"")
        return await request(self, subject, payload, headers=headers, timeout=timeout)

    patch.setattr(Connection, "request", broken)


def without_fence(patch: pytest.MonkeyPatch) -> None:
    """Records do not name the lease that they are written under."""
    patch.setattr(frames, "fence", lambda lease: b"")


def any_lease_is_mine(patch: pytest.MonkeyPatch) -> None:
    """Whoever is refused takes the sequence of the lease that stands there."""
    check = Leases._check

    def broken(self: Leases, lease: Lease, holder: Holder | None) -> None:
        if holder is None:
            check(self, lease, holder)
        else:
            lease.seq = holder.seq

    patch.setattr(Leases, "_check", broken)


def without_renewal(patch: pytest.MonkeyPatch) -> None:
    """After a record of unknown fate the next one is written under the same lease."""
    ensure = Leases.ensure

    async def broken(self: Leases, lease: Lease, deadline: float) -> None:
        lease.suspect = False
        await ensure(self, lease, deadline)

    patch.setattr(Leases, "ensure", broken)


def claim_of_nothing(patch: pytest.MonkeyPatch) -> None:
    """A claim on an empty subject expects nothing, as it will again when the subject is empty again."""

    async def broken(
        self: Leases,
        lease: Lease,
        expected: int,
        server_id: str,
        deadline: float,
        check: Callable[[Holder | None], None],
    ) -> None:
        while True:
            try:
                answer = await self._publish(lease.subject, expected, server_id, wal_lease._record(lease), deadline)
            except (Disconnected, NoReply, NoResponders):
                answer = (0, False, "", 503, 503, "")
            if answer[3] == 0 and answer[4] == 0:
                self._hold(lease, answer[0], self._connection.server_id)
                return
            await self._pause(0.01, deadline, lease.agent_id)
            holder, server_id = await self._read(lease.subject, deadline)
            if holder is not None and holder.token == lease.token and holder.by == lease.by and holder.seq != expected:
                self._hold(lease, holder.seq, self._connection.server_id)
                return
            check(holder)
            expected = holder.seq if holder else 0

    patch.setattr(Leases, "_write", broken)


class _Quicker(Exception):
    """Somebody else was."""


def who_comes_second_joins_in(patch: pytest.MonkeyPatch) -> None:
    """A claim that finds another one to have been quicker takes the sequence of that one."""

    async def broken(
        self: Leases, agent_id: str, deadline: float, owner: str | None = None, check: Callable[[], None] = lambda: None
    ) -> Lease:
        lease = self._lease(agent_id, secrets.token_hex(16), owner)
        seen, server_id = await self._read(lease.subject, deadline)

        def look(holder: Holder | None) -> None:
            if holder is not None and holder.token and (seen is None or holder.seq != seen.seq):
                raise _Quicker(holder.seq)

        try:
            await self._write(lease, seen.seq if seen else 0, server_id, deadline, look)
        except _Quicker as quicker:
            self._hold(lease, quicker.args[0], self._connection.server_id)
        return lease

    patch.setattr(Leases, "claim", broken)


def adoption_that_only_reads(patch: pytest.MonkeyPatch) -> None:
    """The next process writes for the owner under the lease of the one before."""

    async def broken(self: Leases, agent_id: str, token: str, deadline: float) -> Lease:
        lease = self._lease(agent_id, token, "")
        holder = await self._holder(lease.subject, deadline)
        if holder is None or holder.token != token:
            raise self._fenced(lease, holder)
        lease.by = holder.by
        self._hold(lease, holder.seq, self._connection.server_id)
        return lease

    patch.setattr(Leases, "adopt", broken)


def another_id_at_every_attempt(patch: pytest.MonkeyPatch) -> None:
    """A record of unknown fate is sent again as another one."""
    attempt = Delivery._attempt

    async def broken(self: Delivery, lane: Lane, group: list[Entry]) -> None:
        for entry in group:
            entry.key = os.urandom(16) if entry.unknown else entry.key
        await attempt(self, lane, group)

    patch.setattr(Delivery, "_attempt", broken)


def large_ones_without_fence(patch: pytest.MonkeyPatch) -> None:
    """The atomic batch of a large record does not name the lease that it is written under."""
    batch = frames.batch
    patch.setattr(frames, "batch", lambda group, lease, to: batch(group, None if group[0].chunks else lease, to))


def batches_without_fence(patch: pytest.MonkeyPatch) -> None:
    """With replicas: the atomic batch of many records does not name it."""
    batch = frames.batch
    patch.setattr(frames, "batch", lambda group, lease, to: batch(group, lease if group[0].chunks else None, to))


@dataclass(frozen=True, slots=True)
class Canary:
    """``way``: the steps that lead to its fault, if the dice are with them. ``caught``: what the model then says, a pattern."""

    break_it: Callable[[pytest.MonkeyPatch], None]
    way: tuple[str, ...]
    caught: str


BEHIND = "interleaved|late copy|without a claim"
CANARIES = (
    Canary(without_rollup, ("claim", "claim_for", "expire"), "interleaved|late copy|was adopted"),
    Canary(without_fence, ("claim", "claim_for", "write", "write"), BEHIND),
    Canary(any_lease_is_mine, ("claim", "claim", "write", "write"), "interleaved|late copy|rightful|was adopted"),
    Canary(without_renewal, ("claim", "give_up", "replay"), "late copy"),
    Canary(claim_of_nothing, ("claim", "expire", "replay_lease", "replay_lease"), "long over won"),
    Canary(who_comes_second_joins_in, ("race", "write", "race", "write"), "interleaved"),
    Canary(
        adoption_that_only_reads,
        ("claim_for", "give_up", "adopt"),
        "late copy|not written, but|interleaved|out of order",
    ),
    Canary(another_id_at_every_attempt, ("claim", "cut_answer", "write", "write"), "under no id|acknowledged at"),
    Canary(large_ones_without_fence, ("claim", "claim", "write_large", "write_large"), BEHIND),
)
CANARY_OF_REPLICAS = Canary(batches_without_fence, ("claim", "claim_for", "write", "write"), BEHIND)
