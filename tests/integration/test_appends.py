"""The ways to append to a real server: by the calling thread, handed over without waiting, and in windows."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from concurrent.futures import Future, wait
from typing import Any

import pytest

from skialith import AgentFenced, BatchFailed, Closed, InvalidPayload, SkialithAgent, WalUnavailable
from skialith.config import APPEND_BATCH_RECORDS
from skialith.records import Ack
from skialith.wal import frames, log, transport
from skialith.wal.lease import Lease
from tests.fixtures.agents import OpenAgent
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.wal import OpenWal, append, event, new_namespace, soon


def seqs(futures: list[Future[Ack]]) -> list[int]:
    return [future.result(20).seq for future in futures]


def test_events_handed_over_keep_the_order_of_the_calls(open_agent: OpenAgent) -> None:
    agent = open_agent("a", writer="off")
    agent.resume()
    futures = [agent.save_event_nowait(f"e{n}", {"n": n}) for n in range(3000)]
    between = agent.save_event("between", {})
    futures.append(agent.save_event_nowait("last", {}))
    found = seqs(futures)
    assert found == sorted(found)
    assert found[-2] < between.seq < found[-1]
    assert [event.event_id for event in agent.history()] == [*(f"e{n}" for n in range(3000)), "between", "last"]


def test_a_call_never_overtakes_what_its_thread_handed_over_before(open_agent: OpenAgent) -> None:
    agent = open_agent("a", writer="off")
    agent.resume()
    agent.save_event("first", {})
    for n in range(50):
        handed_over = agent.save_event_nowait(f"n{n}", {})
        called = agent.checkpoint(n, {}) if n % 2 else agent.save_event(f"e{n}", {})
        assert handed_over.result(20).seq < called.seq


def test_what_waits_when_an_agent_is_closed_is_still_written_as_its_owner(
    open_agent: OpenAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, other = open_agent("a", writer="off"), open_agent("b", writer="off")
    agent.resume()
    owned: list[bool] = []
    fence = frames.fence

    def noted(lease: Lease | None) -> bytes:
        owned.append(lease is not None)
        return fence(lease)

    monkeypatch.setattr(frames, "fence", noted)
    futures = [agent.save_event_nowait(f"e{n}", {}) for n in range(6000)]
    agent.close()
    assert len(set(seqs(futures))) == 6000
    assert all(owned)
    lane = other._runtime.wal.log.lanes["a"]
    assert lane.lease is None


def test_an_agent_closed_while_the_server_is_away_is_given_up_later(
    nats_server: NatsServer, open_agent: OpenAgent, settings: dict[str, Any]
) -> None:
    settings["nats_url"] = nats_server.url
    agent, other = open_agent("a", writer="off", timeout=20.0), open_agent("b", writer="off", timeout=20.0)
    agent.resume()
    nats_server.pause()
    try:
        future = agent.save_event_nowait("e", {})
        agent.close()
        lane = other._runtime.wal.log.lanes["a"]
        assert lane.lease is not None and not future.done()
    finally:
        nats_server.resume()
    assert future.result(20).seq > 0
    wait_until(lambda: lane.lease is None, 20, "the agent is given up")


def test_agents_that_nobody_owns_are_forgotten(
    open_wal: OpenWal, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "IDLE_LANES", 10)
    wal = open_wal(nats_url, namespace=new_namespace())
    wal.claim("owned", soon())
    for n in range(100):
        wal.log.append_one(event(wal, f"a{n}", "e"), soon())
    wait_until(lambda: len(wal.log.lanes) <= 10, 20, "most agents are forgotten")
    assert "owned" in wal.log.lanes
    seqs = [wal.log.append_one(event(wal, f"a{n}", "again"), soon()).seq for n in range(100)]
    assert seqs == sorted(seqs)


def test_an_event_handed_over_twice_is_there_once(open_agent: OpenAgent) -> None:
    agent = open_agent("a", writer="off")
    acks = [agent.save_event_nowait("same", {"n": n}).result(20) for n in range(2)]
    assert [ack.duplicate for ack in acks] == [False, True]
    assert acks[0].seq == acks[1].seq
    assert [event.data for event in agent.history()] == [{"n": 0}]


def test_what_cannot_be_carried_is_refused_by_the_call_itself(open_agent: OpenAgent) -> None:
    agent = open_agent("a", writer="off")
    with pytest.raises(InvalidPayload, match=r"data.x\[1\]"):
        agent.save_event_nowait("e", {"x": [1, {2}]})
    agent.close()
    with pytest.raises(Closed):
        agent.save_event_nowait("e", {})


def test_a_future_says_what_became_of_its_record(
    nats_server: NatsServer, open_agent: OpenAgent, settings: dict[str, Any]
) -> None:
    settings["nats_url"] = nats_server.url
    agent = open_agent("a", writer="off", timeout=1.0)
    agent.save_event("first", {})
    nats_server.pause()
    futures = [agent.save_event_nowait(f"e{n}", {}) for n in range(20)]
    assert not futures[0].cancel()
    errors = [future.exception(20) for future in futures]
    nats_server.resume()
    assert all(isinstance(error, WalUnavailable) and error.retryable for error in errors)
    assert {error.outcome for error in errors if isinstance(error, WalUnavailable)} == {"unknown"}
    wait_until(lambda: agent.save_event("later", {}).seq > 0, 20, "the server answers again")
    for n in range(20):
        agent.save_event(f"e{n}", {})
    assert sorted(event.event_id for event in agent.history()) == sorted(
        ["first", "later", *(f"e{n}" for n in range(20))]
    )


def test_a_full_window_blocks_the_caller_and_never_grows(
    nats_server: NatsServer, open_agent: OpenAgent, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_QUEUED_RECORDS", 50)
    settings["nats_url"] = nats_server.url
    agent = open_agent("a", writer="off", timeout=20.0)
    agent.save_event("first", {})
    nats_server.pause()
    futures: list[Future[Ack]] = []

    def submit() -> None:
        futures.extend(agent.save_event_nowait(f"e{n}", {}) for n in range(120))

    thread = threading.Thread(target=submit)
    thread.start()
    wire = agent._runtime.wal.connection.wire
    wait_until(lambda: wire.queued == 50, 10, "the window is full")
    thread.join(0.3)
    assert thread.is_alive()
    assert wire.queued == 50
    nats_server.resume()
    thread.join(20)
    assert not thread.is_alive()
    found = seqs(futures)
    assert found == sorted(found)
    assert len(set(found)) == 120
    wait_until(lambda: wire.queued == 0, 10, "nothing is counted any more")


def test_a_full_window_gives_up_at_the_deadline(
    nats_server: NatsServer, open_wal: OpenWal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_QUEUED_RECORDS", 5)
    wal = open_wal(nats_server.url)
    append(wal, event(wal, "a", "first"))
    nats_server.pause()
    try:
        tickets = [wal.append("a", [event(wal, "a", f"e{n}")], soon(10)) for n in range(5)]
        with pytest.raises(WalUnavailable, match="wait for PubAcks") as caught:
            wal.append("a", [event(wal, "a", "one more")], soon(0.3))
        assert caught.value.outcome == "not_written"
    finally:
        nats_server.resume()
    assert [len(wal.wait(ticket)) for ticket in tickets] == [1] * 5


def test_whoever_was_taken_over_is_fenced_with_records_in_flight(
    open_agent: OpenAgent, settings: dict[str, Any]
) -> None:
    old = open_agent("a", writer="off")
    old.resume()
    futures: list[Future[Ack]] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            futures.append(old.save_event_nowait(f"old-{len(futures)}", {}))

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: len(futures) > 500, 20, "records in flight")
    new = SkialithAgent("a", **{**settings, "writer": "off", "timeout": 9.5})  # another runtime
    try:
        new.resume()
        first = new.save_event("new-0", {}).seq
        stop.set()
        thread.join(20)
        wait(futures, 20)
        durable = [future.result().seq for future in futures if future.exception() is None]
        assert all(isinstance(future.exception(), AgentFenced | None) for future in futures)
        assert len(durable) < len(futures)
        assert max(durable) < first
        with pytest.raises(AgentFenced):
            old.save_event("again", {})
        with pytest.raises(BatchFailed) as caught:
            old.save_events([(f"b{n}", {}) for n in range(5)])
        assert isinstance(caught.value.__cause__, AgentFenced)
        assert caught.value.outcome == "not_written"
    finally:
        new.close()


def test_threads_with_agents_of_their_own_share_the_connection(open_agent: OpenAgent) -> None:
    agents = [open_agent(f"a{n}", writer="off") for n in range(16)]
    found: dict[str, list[int]] = {}

    def work(agent: SkialithAgent) -> None:
        agent.resume()
        found[agent.agent_id] = [agent.save_event(f"e{n}", {"n": n}).seq for n in range(200)]

    threads = [threading.Thread(target=work, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 16
    assert all(each == sorted(each) for each in found.values())
    assert len({seq for each in found.values() for seq in each}) == 3200


def test_a_window_that_meets_a_restarted_server_is_stored_once_and_in_order(
    nats_server: NatsServer, open_agent: OpenAgent, settings: dict[str, Any]
) -> None:
    settings["nats_url"] = nats_server.url
    agent = open_agent("a", writer="off", timeout=20.0)
    agent.resume()
    done = threading.Event()

    def restart() -> None:
        while not done.wait(0.05):
            nats_server.restart()

    thread = threading.Thread(target=restart)
    thread.start()
    acks: list[Ack] = []
    began = time.monotonic()
    try:
        while len(acks) < 3000 or time.monotonic() - began < 3:
            acks += agent.save_events([(f"e{len(acks) + n}", {}) for n in range(1000)])
    finally:
        done.set()
        thread.join(20)
    assert [ack.seq for ack in acks] == sorted(ack.seq for ack in acks)
    assert [event.event_id for event in agent.history()] == [f"e{n}" for n in range(len(acks))]


def test_a_callback_that_ends_its_thread_costs_no_other_future(open_agent: OpenAgent) -> None:
    agent = open_agent("a", writer="off")
    first = agent.save_event_nowait("first", {})
    first.add_done_callback(lambda _: sys.exit("not the end"))
    assert first.result(20).seq < agent.save_event_nowait("second", {}).result(20).seq


def test_what_the_loop_took_and_did_not_begin_is_refused_at_the_close(open_wal: OpenWal, nats_url: str) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())

    async def hand_over_and_close() -> Future[Ack]:
        future = wal.log.append_nowait(event(wal, "a", "e"), soon())
        await asyncio.sleep(0)
        assert len(wal.log.lanes["a"].queue) == 1
        await wal.log.close()
        return future

    error = wal.call(hand_over_and_close, 10).exception(5)
    assert isinstance(error, Closed) and error.outcome == "not_written"
    assert wal.connection.wire.queued == 0


def _submit_until_closed(agent: SkialithAgent, futures: list[Future[Ack]], begun: threading.Event) -> None:
    with contextlib.suppress(Closed):
        while True:
            futures.append(agent.save_event_nowait(f"e{len(futures)}", {}))
            if len(futures) > 50:
                begun.set()


def test_every_future_is_settled_although_the_runtime_is_closed_meanwhile(settings: dict[str, Any]) -> None:
    for _ in range(30):
        agent = SkialithAgent("a", **{**settings, "writer": "off"})
        futures: list[Future[Ack]] = []
        begun = threading.Event()
        thread = threading.Thread(target=_submit_until_closed, args=(agent, futures, begun))
        thread.start()
        assert begun.wait(20)
        agent.close()
        thread.join(20)
        assert not thread.is_alive()
        assert not wait(futures, 20).not_done


def test_a_part_that_is_not_sent_says_that_those_before_it_may_be_written(
    nats_server: NatsServer, open_agent: OpenAgent, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["nats_url"] = nats_server.url
    agent = open_agent("a", writer="off", timeout=5.0)
    agent.save_event("first", {})
    append_part, parts = agent._runtime.wal.log.append, iter(range(9))

    def append_one_part(*arguments: Any) -> None:
        if next(parts):
            raise WalUnavailable("no room", outcome="not_written")
        append_part(*arguments)

    monkeypatch.setattr(agent._runtime.wal.log, "append", append_one_part)
    nats_server.pause()
    try:
        with pytest.raises(BatchFailed) as caught:
            agent.save_events([(f"e{n}", {}) for n in range(APPEND_BATCH_RECORDS + 1)])
    finally:
        nats_server.resume()
    assert caught.value.outcome == "unknown"
    assert caught.value.failed == 0
