"""Ownership against a real nats-server: takeover, renewal, release, expiry, and no revival of a zombie."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from skialith.errors import AgentFenced
from skialith.wal.client import Wal
from skialith.wal.lease import Lease
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.outside_nats import OutsideClient, TappedProxy
from tests.fixtures.wal import OpenWal, append, checkpoint, event, new_namespace, soon


def test_the_newest_owner_writes_and_the_older_is_fenced(nats_url: str, open_wal: OpenWal) -> None:
    namespace = new_namespace()
    old, new = open_wal(nats_url, namespace=namespace), open_wal(nats_url, namespace=namespace)
    old.claim("a", soon())
    append(old, checkpoint(old, "a", 1))
    new.claim("a", soon())
    with pytest.raises(AgentFenced) as caught:
        append(old, checkpoint(old, "a", 2))
    assert caught.value.outcome == "not_written"
    assert "pid" in caught.value.owner
    append(new, checkpoint(new, "a", 3))
    with pytest.raises(AgentFenced):
        append(old, event(old, "a", "late"))
    found = new.last_checkpoint("a", soon())
    assert found is not None
    assert found.step_index == 3


@pytest.mark.parametrize("count", [1, 40])
def test_a_zombie_does_not_revive_when_the_newer_owner_releases(nats_url: str, open_wal: OpenWal, count: int) -> None:
    namespace = new_namespace()
    zombie, owner = open_wal(nats_url, namespace=namespace), open_wal(nats_url, namespace=namespace)
    zombie.claim("a", soon())
    owner.claim("a", soon())
    owner.release("a")
    with pytest.raises(AgentFenced):
        append(zombie, *(event(zombie, "a", f"late{n}") for n in range(count)))
    assert zombie.status(5.0).messages == 0


def test_a_zombie_does_not_revive_when_the_newer_lease_expires_first(
    nats_server: NatsServer, open_wal: OpenWal
) -> None:
    zombie = open_wal(nats_server.url, lease_seconds=3600)
    brief = open_wal(nats_server.url, lease_seconds=1)
    zombie.claim("a", soon())
    brief.claim("a", soon())
    brief.close()
    wait_until(lambda: zombie.status(5.0).messages == 0, 10, "the brief lease gone")
    with pytest.raises(AgentFenced, match="expired"):
        append(zombie, event(zombie, "a", "late"))


def test_an_owner_who_lost_the_lease_owns_again_after_claiming_anew(nats_url: str, open_wal: OpenWal) -> None:
    namespace = new_namespace()
    one, two = open_wal(nats_url, namespace=namespace), open_wal(nats_url, namespace=namespace)
    one.claim("a", soon())
    two.claim("a", soon())
    with pytest.raises(AgentFenced):
        append(one, event(one, "a", "e"))
    one.claim("a", soon())
    append(one, event(one, "a", "e"))
    with pytest.raises(AgentFenced):
        append(two, event(two, "a", "f"))


def test_renewals_keep_the_owner_writing(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url, lease_seconds=1)
    wal.claim("a", soon())
    first = wal.log.lanes["a"].lease
    assert first is not None
    before = first.seq
    count = 0

    def renewed() -> bool:
        nonlocal count
        append(wal, event(wal, "a", f"e{count}"))
        count += 1
        lease = wal.log.lanes["a"].lease
        return lease is not None and lease.seq > before and wal.status(5.0).messages > count

    wait_until(renewed, 10, "the lease renewed while records are written")


def test_an_own_lease_survives_a_server_restart(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url)
    wal.claim("a", soon())
    append(wal, event(wal, "a", "e1"))
    nats_server.restart()
    append(wal, event(wal, "a", "e2"), seconds=20)
    other = open_wal(nats_server.url)
    other.claim("a", soon())
    with pytest.raises(AgentFenced):
        append(wal, event(wal, "a", "e3"))


def test_a_wiped_server_ends_ownership(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url)
    wal.claim("a", soon())
    wal.call(lambda: wal.stream.api.call(f"STREAM.PURGE.{wal.stream.name}"), 5.0)
    with pytest.raises(AgentFenced, match="expired"):
        append(wal, event(wal, "a", "e"))


def test_two_resumes_in_one_process_share_the_lease(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    wal.claim("a", soon())
    wal.claim("a", soon())
    append(wal, event(wal, "a", "e1"))
    wal.release("a")
    append(wal, event(wal, "a", "e2"))
    wal.release("a")
    assert wal.status(5.0).messages == 2


def test_after_an_unknown_outcome_the_lease_is_renewed_before_the_next_write(
    nats_server: NatsServer, open_wal: OpenWal
) -> None:
    wal = open_wal(nats_server.url)
    wal.claim("a", soon())
    lease = wal.log.lanes["a"].lease
    assert lease is not None
    before = lease.seq
    nats_server.pause()
    try:
        with pytest.raises(Exception, match="may or may not"):
            append(wal, checkpoint(wal, "a", 1), seconds=1.0)
    finally:
        nats_server.resume()
    append(wal, checkpoint(wal, "a", 2), seconds=20)
    assert lease.seq > before
    found = wal.last_checkpoint("a", soon())
    assert found is not None
    assert found.step_index == 2


@dataclass
class Lost:
    """An owner whose lease was in the part of the log that is gone, and its rival, who got the same sequence afterwards."""

    owner: Wal
    rival: Wal

    @property
    def lease(self) -> Lease:
        lease = self.owner.log.lanes["a"].lease
        assert lease is not None
        return lease


@pytest.fixture
def lost(nats_server: NatsServer, open_wal: OpenWal, tmp_path: Path) -> Lost:
    owner = open_wal(nats_server.url)
    append(owner, event(owner, "x", "before"))
    nats_server.stop()
    copy = nats_server.copy_store(tmp_path / "copy")
    nats_server.start()
    owner.claim("a", soon(20))
    nats_server.kill()
    nats_server.put_back(copy)
    nats_server.start()
    rival = open_wal(nats_server.url)
    rival.claim("a", soon(20))
    wait_until(lambda: owner.connection.is_open, 20, "the old owner connected again")
    both = Lost(owner, rival)
    theirs = rival.log.lanes["a"].lease
    assert theirs is not None and theirs.seq == both.lease.seq and theirs.token != both.lease.token
    return both


@pytest.mark.parametrize("what", ["an event", "many events", "a checkpoint"])
def test_a_lost_lease_does_not_match_the_next_owners_at_the_same_sequence(lost: Lost, what: str) -> None:
    old = lost.owner
    count = 40 if what == "many events" else 1
    records = [checkpoint(old, "a", 1)] if what == "a checkpoint" else [event(old, "a", f"e{n}") for n in range(count)]
    with pytest.raises(AgentFenced) as caught:
        append(old, *records)
    assert caught.value.outcome == "not_written"
    append(lost.rival, event(lost.rival, "a", "mine"))


@pytest.mark.parametrize("verb", ["renew", "verify", "release", "disown"])
def test_whoever_lost_a_lease_neither_renews_nor_ends_the_next_owners(lost: Lost, verb: str) -> None:
    leases = lost.owner.log.owning._leases

    async def act() -> None:
        with contextlib.suppress(AgentFenced):
            if verb == "renew":
                await leases.renew(lost.lease, soon())
            elif verb == "verify":
                await leases.verify(lost.lease, soon())
            elif verb == "release":
                await leases.release(lost.lease)
            else:
                await leases.disown("a", lost.lease.token, soon())

    lost.owner.call(act, 10.0)
    append(lost.rival, event(lost.rival, "a", "mine"))


def test_giving_up_a_lease_that_a_power_loss_took_does_not_end_the_next_owners(lost: Lost) -> None:
    lost.owner.release("a")
    append(lost.rival, event(lost.rival, "a", "mine"))


def test_a_purge_that_was_under_way_is_not_repeated_on_another_server(
    nats_server: NatsServer, open_wal: OpenWal, tmp_path: Path
) -> None:
    """The server goes between the look at the lease and its removal, and comes back older, with another one's lease there."""
    first = open_wal(nats_server.url)
    append(first, event(first, "x", "before"))
    nats_server.stop()
    copy = nats_server.copy_store(tmp_path / "copy")
    nats_server.start()
    first.claim("a", soon(20))
    lease = first.log.lanes["a"].lease
    assert lease is not None
    looked = asyncio.Event()
    leases = first.log.owning._leases
    holder = leases._holder

    async def look_and_wait(subject: str, deadline: float, token: str = "") -> Any:
        found = await holder(subject, deadline, token)
        if not looked.is_set():
            looked.set()
            while first.connection.is_open:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return found

    leases._holder = look_and_wait  # type: ignore[method-assign]
    ending = threading.Thread(target=lambda: first.call(lambda: leases.disown("a", lease.token, soon(20)), 20.0))
    ending.start()
    wait_until(looked.is_set, 10, "it has looked")
    nats_server.kill()
    nats_server.put_back(copy)
    nats_server.start()
    rival = open_wal(nats_server.url)
    rival.claim("a", soon(20))
    ending.join(30)
    append(rival, event(rival, "a", "mine"))


def test_a_late_copy_of_a_claim_does_not_bring_a_fenced_owner_back(nats_server: NatsServer, open_wal: OpenWal) -> None:
    """An attempt that stayed on the way while the next one claimed comes when other owners have come and gone."""
    with (
        TappedProxy("127.0.0.1", nats_server.port, 1, "skialith.default.lease.") as proxy,
        OutsideClient(nats_server.url, "SKIALITH_default") as outside,
    ):
        zombie, owner = open_wal(f"nats://127.0.0.1:{proxy.port}"), open_wal(nats_server.url)
        zombie.claim("a", soon())
        append(zombie, checkpoint(zombie, "a", 1))
        owner.claim("a", soon())
        append(owner, checkpoint(owner, "a", 2))
        owner.release("a")
        for sent in proxy.sent:
            outside.replay(sent.of_another_attempt())
        with pytest.raises(AgentFenced, match="expired"):
            append(zombie, checkpoint(zombie, "a", 3))
        found = owner.last_checkpoint("a", soon())
        assert found is not None
        assert found.step_index == 2
        owner.claim("a", soon())
        append(owner, checkpoint(owner, "a", 4))


def test_a_late_copy_of_an_attempt_whose_answer_was_lost_does_not_become_current(
    nats_server: NatsServer, open_wal: OpenWal
) -> None:
    """The next attempt was acknowledged; the copy comes when its id is forgotten."""
    with (
        TappedProxy("127.0.0.1", nats_server.port, 1, "skialith.default.log.") as proxy,
        OutsideClient(nats_server.url, "SKIALITH_default") as outside,
    ):
        wal = open_wal(f"nats://127.0.0.1:{proxy.port}")
        wal.claim("a", soon())
        append(wal, checkpoint(wal, "a", 1))
        proxy.lose(1)
        append(wal, checkpoint(wal, "a", 2), seconds=20)
        append(wal, checkpoint(wal, "a", 3))
        assert len(proxy.sent) >= 4
        for sent in list(proxy.sent)[:-1]:
            outside.replay(sent.of_another_attempt())
        found = wal.last_checkpoint("a", soon())
        assert found is not None
        assert found.step_index == 3
