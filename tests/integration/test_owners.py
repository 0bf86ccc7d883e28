"""Owners outside of the process against a real nats-server: their token goes with them from process to process."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from skialith.errors import AgentFenced, WalUnavailable
from skialith.records import NOWHERE, Ack, Record, retry_id
from skialith.wal import log as wal_log
from skialith.wal.client import Wal
from skialith.wal.lane import Owner, Ticket
from skialith.wal.lease import LeaseMoved
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.wal import OpenWal, append, checkpoint, event, new_namespace, soon


def claim(wal: Wal, agent_id: str = "a", name: str = "first") -> Owner:
    return wal.call(lambda: wal.log.owning.claim_for(agent_id, name, soon()), 10.0)


def adopt(wal: Wal, owner: Owner) -> None:
    wal.call(lambda: wal.log.owning.adopt(owner, soon()), 10.0)


def disown(wal: Wal, owner: Owner) -> None:
    wal.call(lambda: wal.log.owning.disown(owner, soon()), 10.0)


def handed(
    wal: Wal, owner: Owner, records: Sequence[Record], seconds: float = 10.0, call: bytes | None = None
) -> Ticket:
    ticket = Ticket(owner, len(records), message_id=call)
    wal.log.append(ticket, records, soon(seconds))
    return ticket


def write(wal: Wal, owner: Owner, *records: Record, call: bytes | None = None) -> list[Ack]:
    return wal.wait(handed(wal, owner, records, call=call))


def last_step(wal: Wal) -> int:
    found = wal.last_checkpoint("a", soon())
    assert found is not None
    return found.step_index


@pytest.fixture
def two(nats_url: str, open_wal: OpenWal) -> tuple[Wal, Wal]:
    """The logs of two processes, one namespace."""
    namespace = new_namespace()
    return open_wal(nats_url, namespace=namespace), open_wal(nats_url, namespace=namespace)


def test_an_owner_goes_on_in_another_process_and_back(two: tuple[Wal, Wal]) -> None:
    one, other = two
    owner = claim(one)
    write(one, owner, checkpoint(one, "a", 1))
    assert other.log.owning.held(owner) is None
    adopt(other, owner)
    write(other, owner, checkpoint(other, "a", 2))
    with pytest.raises(LeaseMoved) as caught:
        write(one, owner, checkpoint(one, "a", 3))
    assert (caught.value.outcome, caught.value.retryable) == ("not_written", True)
    assert one.log.owning.held(owner) is None
    assert last_step(one) == 2
    adopt(one, owner)
    write(one, owner, checkpoint(one, "a", 4))
    assert last_step(one) == 4


def test_without_its_lease_an_owner_writes_nothing(two: tuple[Wal, Wal]) -> None:
    one, other = two
    owner = claim(one)
    with pytest.raises(LeaseMoved):
        write(other, owner, checkpoint(other, "a", 1))
    with pytest.raises(LeaseMoved):
        write(other, owner, *(event(other, "a", f"e{n}") for n in range(40)))
    assert other.last_checkpoint("a", soon()) is None
    assert other.events("a", NOWHERE, soon())[0] == []


def test_what_waits_when_the_owner_went_elsewhere_is_never_sent(two: tuple[Wal, Wal]) -> None:
    one, other = two
    owner = claim(one)
    write(one, owner, checkpoint(one, "a", 1))
    turn = one.log.lanes[owner].turn
    assert turn.try_take()  # as while an earlier record waits for its PubAck
    waiting = [handed(one, owner, [checkpoint(one, "a", 90 + n)]) for n in range(3)]
    adopt(other, owner)
    write(other, owner, checkpoint(other, "a", 2))

    async def give() -> None:
        turn.give()

    one.call(give, 5.0)
    for ticket in waiting:
        with pytest.raises(LeaseMoved) as caught:
            one.wait(ticket)
        assert caught.value.outcome == "not_written"
    assert last_step(other) == 2


def test_the_newest_owner_fences_the_one_before_wherever_it_writes(two: tuple[Wal, Wal]) -> None:
    one, other = two
    first = claim(one, name="worker-1")
    adopt(other, first)
    second = claim(other, name="worker-2")
    for wal in two:
        with pytest.raises((AgentFenced, LeaseMoved)):
            write(wal, first, checkpoint(wal, "a", 1))
        with pytest.raises(AgentFenced) as caught:
            adopt(wal, first)
            write(wal, first, checkpoint(wal, "a", 1))
        assert caught.value.owner == "worker-2"
        assert caught.value.outcome == "not_written"
    write(other, second, checkpoint(other, "a", 2))
    assert last_step(one) == 2


def test_owners_inside_and_outside_fence_each_other(two: tuple[Wal, Wal]) -> None:
    one, other = two
    outside = claim(one, name="over http")
    other.claim("a", soon())
    append(other, checkpoint(other, "a", 1))
    with pytest.raises(AgentFenced, match="pid"):
        write(one, outside, checkpoint(one, "a", 2))
    again = claim(one, name="over http")
    with pytest.raises(AgentFenced) as caught:
        append(other, checkpoint(other, "a", 3))
    assert caught.value.owner == "over http"
    write(one, again, checkpoint(one, "a", 4))


def test_given_up_by_a_process_that_never_wrote_for_it(two: tuple[Wal, Wal]) -> None:
    one, other = two
    owner = claim(one)
    write(one, owner, event(one, "a", "e1"))
    disown(other, owner)
    disown(other, owner)
    with pytest.raises(AgentFenced, match="expired"):
        write(one, owner, event(one, "a", "e2"))
    second = claim(one)
    disown(one, owner)  # not its agent any more
    write(one, second, event(one, "a", "e3"))
    disown(one, second)
    assert second not in one.log.lanes


def test_a_lease_outlives_the_process_that_claimed_it(nats_server: NatsServer, open_wal: OpenWal) -> None:
    before = open_wal(nats_server.url)
    owner = claim(before)
    write(before, owner, checkpoint(before, "a", 1))
    before.close()
    nats_server.restart()
    after = open_wal(nats_server.url)
    adopt(after, owner)
    write(after, owner, checkpoint(after, "a", 2))
    assert last_step(after) == 2


def test_a_lease_is_renewed_by_use_and_ages_out_without(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url, lease_seconds=3)
    used, unused = claim(wal, "a"), claim(wal, "b")
    first = wal.log.lanes[used].lease
    assert first is not None
    before, until = first.seq, time.monotonic() + 4
    count = 0

    def later() -> bool:
        nonlocal count
        count += 1
        write(wal, used, event(wal, "a", f"e{count}"))
        return time.monotonic() > until

    wait_until(later, 20, "longer than a lease lives")
    assert first.seq > before
    with pytest.raises(AgentFenced, match="expired"):
        write(wal, unused, event(wal, "b", "late"))


def test_a_copy_of_a_write_that_was_given_up_is_refused_after_the_next_process_took_over(
    nats_server: NatsServer, open_wal: OpenWal
) -> None:
    one = open_wal(nats_server.url)
    other = open_wal(nats_server.url)
    owner = claim(one)
    write(one, owner, checkpoint(one, "a", 1))
    nats_server.pause()
    try:
        with pytest.raises(WalUnavailable, match="may or may not"):
            one.wait(handed(one, owner, [checkpoint(one, "a", 90)], seconds=1.0))
    finally:
        nats_server.resume()  # it reads what stands in its sockets, in any order
    adopt(other, owner)
    write(other, owner, checkpoint(other, "a", 2))
    with pytest.raises(LeaseMoved):
        write(one, owner, event(one, "a", "e"))
    assert last_step(other) == 2


def test_forgotten_lanes_are_taken_up_again(nats_url: str, open_wal: OpenWal, monkeypatch: pytest.MonkeyPatch) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    owners = [claim(wal, f"a{n}") for n in range(5)]
    monkeypatch.setattr(wal_log, "IDLE_LANES", 2)
    wait_until(lambda: len(wal.log.lanes) <= 2, 10, "the oldest lanes forgotten")
    with pytest.raises(LeaseMoved):
        write(wal, owners[0], event(wal, "a0", "e"))
    adopt(wal, owners[0])
    write(wal, owners[0], event(wal, "a0", "e"))


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_a_retry_of_the_same_call_is_one_record(two: tuple[Wal, Wal], size: int) -> None:
    one, other = two
    owner = claim(one)
    body = b"\xc6" + size.to_bytes(4, "big") + bytes(size)
    record = checkpoint(one, "a", 1, body)
    call = retry_id(record, "call-1")
    (first,) = write(one, owner, record, call=call)
    adopt(other, owner)
    again = checkpoint(other, "a", 1, body)
    assert again.key != record.key
    assert retry_id(again, "call-1") == call
    (second,) = write(other, owner, again, call=call)
    assert (second.seq, second.duplicate) == (first.seq, True)
    changed = checkpoint(other, "a", 2, body)
    (third,) = write(other, owner, changed, call=retry_id(changed, "call-1"))
    assert not third.duplicate
    assert third.seq > first.seq
