"""Ownership against a real nats-server: takeover, renewal, release, expiry, and no revival of a zombie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from skialith.errors import AgentFenced
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


def test_giving_up_a_lease_that_a_power_loss_took_does_not_end_the_next_owners(
    nats_server: NatsServer, open_wal: OpenWal, tmp_path: Path
) -> None:
    old = open_wal(nats_server.url)
    append(old, event(old, "x", "before"))
    nats_server.stop()
    shutil.copytree(nats_server.store, tmp_path / "copy")
    nats_server.start()
    append(old, *(event(old, "x", f"lost{n}") for n in range(10)), seconds=20)
    old.claim("a", soon())
    nats_server.kill()
    nats_server.wipe()
    shutil.copytree(tmp_path / "copy", nats_server.store)
    nats_server.start()
    new = open_wal(nats_server.url)
    new.claim("a", soon())
    wait_until(lambda: old.connection.is_open, 20, "the old owner connected again")
    old.release("a")
    append(new, event(new, "a", "mine"))


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
