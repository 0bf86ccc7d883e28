"""Many agents in one process: leases renewed in time whatever becomes of single ones, and nothing remembered for ever."""

from __future__ import annotations

import time

import pytest

from skialith import runtime
from skialith.wal import log
from skialith.wal.client import Wal
from skialith.wal.lease import Lease, Leases
from tests.fixtures.agents import OpenAgent
from tests.fixtures.nats import wait_until
from tests.fixtures.wal import OpenWal, append, event, new_namespace, soon

LIFE_SECONDS = 3.0
"""A lease is due after a third of it, and gone after all of it."""


def claim_many(wal: Wal, names: list[str]) -> None:
    for name in names:
        wal.claim(name, soon())


def renewed_at(wal: Wal, name: str) -> float:
    lease = wal.log.lanes[name].lease
    assert lease is not None
    return lease.renewed_at


def test_leases_taken_over_do_not_keep_the_others_from_being_renewed(open_wal: OpenWal, nats_url: str) -> None:
    """All that others took over are met first, at the same moment; what this process still owns must not expire over that."""
    namespace = new_namespace()
    wal = open_wal(nats_url, namespace=namespace, lease_seconds=LIFE_SECONDS)
    other = open_wal(nats_url, namespace=namespace, lease_seconds=60.0)
    lost, kept = [f"lost-{n}" for n in range(60)], [f"kept-{n}" for n in range(5)]
    claim_many(wal, [*lost, *kept])
    claim_many(other, lost)
    last = max(renewed_at(wal, name) for name in kept)
    wait_until(lambda: all(renewed_at(wal, name) > last for name in kept), LIFE_SECONDS, "the others are renewed")
    for name in kept:
        append(wal, event(wal, name, "e"))
    claim_many(wal, lost[:10])
    assert wal.log.owning.count == len(lost) + len(kept)


def test_an_agent_that_is_busy_does_not_keep_the_others_from_being_renewed(open_wal: OpenWal, nats_url: str) -> None:
    wal = open_wal(nats_url, namespace=new_namespace(), lease_seconds=LIFE_SECONDS)
    claim_many(wal, ["busy", "other"])
    turn, claimed = wal.log.lanes["busy"].turn, time.monotonic()
    assert turn.try_take()
    try:
        wait_until(lambda: renewed_at(wal, "other") > claimed, LIFE_SECONDS, "the other one is renewed")
        assert renewed_at(wal, "busy") < claimed
    finally:
        turn.give()
    wait_until(lambda: renewed_at(wal, "busy") > claimed, 10.0, "it is renewed as soon as it has time")


def test_a_lease_is_renewed_again_and_again(open_wal: OpenWal, nats_url: str) -> None:
    """Also one that was claimed anew, or renewed for another reason in between; one that was given up is not."""
    wal = open_wal(nats_url, namespace=new_namespace(), lease_seconds=LIFE_SECONDS)
    claim_many(wal, ["kept", "kept", "again", "given-up"])
    for name in ("again", "given-up"):
        wal.release(name)
    wal.claim("again", soon())
    suspect = wal.log.lanes["kept"].lease
    assert suspect is not None
    suspect.suspect = True
    append(wal, event(wal, "kept", "e"))  # renews first
    for _ in range(2):
        last = time.monotonic()
        wait_until(
            lambda: min(renewed_at(wal, name) for name in ("kept", "again")) > last,  # noqa: B023 - called at once
            10.0,
            "both are renewed",
        )
    assert wal.log.lanes["given-up"].lease is None
    assert wal.log.owning.count == 2
    for name in ("kept", "kept", "again"):
        wal.release(name)
    assert wal.log.owning.count == 0


def test_a_lease_that_is_not_due_is_not_looked_at(
    open_wal: OpenWal, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a process would stop once a second for as long as it has agents."""
    looked_at: list[str] = []
    due = Leases.due

    def note(leases: Leases, lease: Lease) -> bool:
        looked_at.append(lease.agent_id)
        return due(leases, lease)

    monkeypatch.setattr(Leases, "due", note)
    wal = open_wal(nats_url, namespace=new_namespace())
    claim_many(wal, ["a", "b"])

    async def keep() -> None:
        wal.log.owning.keep(10.0)

    wal.call(keep, 10.0)
    assert looked_at == []


def test_agents_that_are_owned_do_not_count_as_idle(
    open_wal: OpenWal, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many a process owns, as many others as ever are remembered."""
    monkeypatch.setattr(log, "IDLE_LANES", 10)
    wal = open_wal(nats_url, namespace=new_namespace())
    claim_many(wal, [f"owned-{n}" for n in range(20)])
    for n in range(8):
        append(wal, event(wal, f"idle-{n}", "e"))
    wal.log.forget_idle()
    assert len(wal.log.lanes) == 28
    for n in range(8, 30):
        append(wal, event(wal, f"idle-{n}", "e"))
    wait_until(lambda: len(wal.log.lanes) <= 30, 10.0, "the oldest are forgotten")
    assert sum(name in wal.log.lanes for name in (f"owned-{n}" for n in range(20))) == 20


def test_a_process_that_sees_ever_new_agents_remembers_the_last(
    open_agent: OpenAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "FLUSH_AGENTS", 3)
    engine = open_agent("first", writer="off")._runtime
    for n in range(10):
        engine.note_agent(f"a{n}")
        engine.note_thread("thread")
    assert engine._used.tokens() == {"a8", "a9", "thread"}
