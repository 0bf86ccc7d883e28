"""Fencing as a model: owners of both kinds at random, with lost answers, late copies, kills and restarts, judged from outside."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from skialith.wal import frames
from skialith.wal import lease as wal_lease
from skialith.wal.api import NoResponders
from skialith.wal.delivery import Delivery
from skialith.wal.lane import Entry, Lane
from skialith.wal.lease import Holder, Lease, Leases
from skialith.wal.transport import Connection, Disconnected, NoReply
from tests.fixtures.nats import NatsServer

from .fencing_model import Violation
from .fencing_world import Step, explore, shrunk, steps

ROUNDS = float(os.environ.get("SKIALITH_CHAOS_ROUNDS", "1"))
STEPS = 400
"""Steps of one exploration; ``SKIALITH_CHAOS_ROUNDS=25`` takes 10,000."""

CANARY_EXPLORATIONS = 12
"""How many of them may pass before a broken build is caught."""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180 * max(1.0, ROUNDS))]


@pytest.fixture
def seed() -> int:
    """``SKIALITH_CHAOS_SEED`` sets it."""
    chosen = int(os.environ.get("SKIALITH_CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"SKIALITH_CHAOS_SEED={chosen}")
    return chosen


def test_owners_fence_each_other(nats_server: NatsServer, seed: int) -> None:
    taken = replayed = writes = 0
    for number in range(max(1, round(ROUNDS))):
        program = steps(seed + number, STEPS)
        try:
            done = explore(nats_server, seed + number, program)
        except Violation as error:
            print(f"SKIALITH_CHAOS_SEED={seed + number}: {error}")

            def fails(shorter: list[Step], seed: int = seed + number) -> bool:
                try:
                    explore(nats_server, seed, shorter)
                except Violation:
                    return True
                return False

            left = shrunk(program, fails, 60.0)
            pytest.fail(f"{error}\nshrunk to {len(left)} steps: {left}")
        taken, replayed, writes = taken + done.done, replayed + done.replayed, writes + len(done.history.writes)
    print(f"{taken} steps, {writes} records, {replayed} late copies sent")
    assert taken == STEPS * max(1, round(ROUNDS))


# ---- Skialith broken on purpose: a model that does not catch it could not catch anything


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


CANARIES: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    without_rollup: "interleaved|late copy|was adopted",
    without_fence: "interleaved|late copy|without a claim",
    any_lease_is_mine: "interleaved|late copy|rightful|was adopted",
    without_renewal: "late copy",
    claim_of_nothing: "long over won",
    adoption_that_only_reads: "late copy|not written, but|interleaved",
    another_id_at_every_attempt: "under no id|acknowledged at",
}


# All of them in a long run; one may take half a minute.
@pytest.mark.parametrize("break_it", CANARIES if ROUNDS > 1 else [without_fence], ids=lambda each: each.__name__)
def test_a_broken_build_is_caught(
    nats_server: NatsServer, seed: int, break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    caught = ""
    for number in range(CANARY_EXPLORATIONS):
        try:
            explore(nats_server, seed + number, steps(seed + number, STEPS))
        except Violation as error:
            caught = str(error)
            break
    print(f"{break_it.__name__}: {caught}")
    assert re.search(CANARIES[break_it], caught), caught
