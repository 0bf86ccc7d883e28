"""Whatever does not answer, the user's loop runs on: a task that beats measures how long it could not."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from skialith import (
    AsyncSkialithAgent,
    Closed,
    FlushTimeout,
    SkialithAgent,
    SkialithError,
    StoreUnavailable,
    WalUnavailable,
    payloads,
)
from skialith.config import AWAITED_INLINE_BYTES, AWAITED_THREADS
from skialith.wal import transport
from tests.fixtures.loops import KINDS, Heartbeat, Kind, run, until
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer
from tests.fixtures.proxy_plugin import MakeProxy

each_loop = pytest.mark.parametrize("kind", KINDS)
FROZEN_SECONDS = 1.5
LONGEST_GAP = 0.5
"""Far below what is frozen for: on a busy machine a thread may wait for a processor as long as that, and nobody's call does."""


def wire_of(agent: AsyncSkialithAgent) -> Any:
    assert agent._hold is not None and agent._hold.engine is not None
    return agent._hold.engine.wal.connection.wire


@contextmanager
def silence() -> Iterator[str]:
    """The URL of a port that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"nats://127.0.0.1:{listener.getsockname()[1]}"


@each_loop
def test_while_an_address_does_not_answer(settings: dict[str, Any], kind: Kind) -> None:
    async def main(url: str) -> None:
        dead = {**settings, "nats_url": url, "timeout": FROZEN_SECONDS}
        async with Heartbeat() as beat:
            agents = [AsyncSkialithAgent(f"a{n}", **dead) for n in range(3)]
            began = time.monotonic()
            errors = await asyncio.gather(agents[0].open(), agents[1].save_event("e", 1), return_exceptions=True)
            with pytest.raises(WalUnavailable):
                async with SkialithAgent("b", **dead):
                    pass
            assert all(isinstance(error, WalUnavailable) for error in errors), errors
            assert time.monotonic() - began > FROZEN_SECONDS
            # Another runtime is not held up by it for ever.
            async with AsyncSkialithAgent("a", **settings) as agent:
                await agent.save_event("e", 1)
        assert beat.longest < LONGEST_GAP

    with silence() as url:
        run(kind, main(url))


@each_loop
def test_while_the_log_is_frozen(nats_server: NatsServer, settings: dict[str, Any], kind: Kind) -> None:
    settings = {**settings, "nats_url": nats_server.url, "timeout": FROZEN_SECONDS}

    async def main() -> None:
        async with AsyncSkialithAgent("a", **settings) as agent, AsyncSkialithAgent("b", **settings) as other:
            await agent.resume()
            await agent.save_event("first", 0)
            async with Heartbeat() as beat:
                nats_server.pause()
                try:
                    calls: list[Any] = [agent.save_event(f"e{n}", n) for n in range(100)]
                    calls += [
                        agent.checkpoint(1, {}),
                        agent.save_events([("b0", 1), ("b1", 1)]),
                        other.resume(),
                        other.peek(),
                    ]
                    calls += [_listed(other), agent.resume(), agent.flush(FROZEN_SECONDS)]
                    errors = await asyncio.gather(*calls, return_exceptions=True)
                finally:
                    nats_server.resume()
            assert beat.longest < LONGEST_GAP
            assert all(isinstance(error, SkialithError) for error in errors), errors
            assert isinstance(errors[-1], FlushTimeout)
            assert {error.outcome for error in errors[:100] if isinstance(error, SkialithError)} <= {
                "unknown",
                "not_written",
            }
            await until(lambda: wire_of(agent).queued == 0, 10, "nothing is counted any more")
            await _answers(agent)
            await asyncio.gather(*(agent.save_event(f"e{n}", n) for n in range(100)))
            assert len(await _listed(agent)) == len({*await _listed(agent)}) >= 101

    run(kind, main())


async def _answers(agent: AsyncSkialithAgent) -> None:
    """Return when the server takes records again."""
    for _ in range(20):
        try:
            await agent.save_event("again", 1)
        except WalUnavailable:
            continue
        return
    raise AssertionError("the server does not answer again")


async def _listed(agent: AsyncSkialithAgent) -> list[str]:
    return [event.event_id async for event in agent.history()]


@each_loop
def test_while_the_database_is_frozen(
    settings: dict[str, Any], mariadb_server: MariaDB, mariadb_url: str, proxy: MakeProxy, kind: Kind
) -> None:
    through = proxy(mariadb_server.port)
    settings = {
        **settings,
        "database_url": mariadb_url.replace(f":{mariadb_server.port}/", f":{through.port}/"),
        "timeout": FROZEN_SECONDS,
        "writer": "off",
    }

    async def main() -> None:
        async with AsyncSkialithAgent("a", **{**settings, "writer": "on"}) as agent:
            await agent.checkpoint(5, {"n": 5})
            await agent.flush(20)
        async with AsyncSkialithAgent("a", **settings) as agent:
            assert (await agent.resume()).source == "database"
            async with Heartbeat() as beat:
                through.stall()
                try:
                    with pytest.raises(StoreUnavailable):  # the log holds no checkpoint, and the database does not say
                        await agent.peek()
                    await asyncio.gather(
                        agent.checkpoint(6, {"n": 6}), *(agent.save_event(f"e{n}", n) for n in range(50))
                    )
                    state = await agent.resume()
                    assert (state.step_index, state.source, state.database_ok) == (6, "wal", False)
                finally:
                    through.stall(False)
            assert beat.longest < LONGEST_GAP
            assert (await agent.peek()).database_ok

    run(kind, main())


@each_loop
def test_while_too_much_is_waiting(
    nats_server: NatsServer, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Awaited calls wait for room without the loop's help: in order, bounded, and fewer than there are places."""
    monkeypatch.setattr(transport, "MAX_QUEUED_RECORDS", 50)
    settings = {**settings, "nats_url": nats_server.url, "timeout": 20.0, "writer": "off"}

    async def main() -> None:
        async with AsyncSkialithAgent("a", **settings) as agent, AsyncSkialithAgent("b", **settings) as other:
            await asyncio.gather(agent.save_event("first", 0), other.save_event("first", 0))
            wire, most = wire_of(agent), 0
            async with Heartbeat() as beat:
                nats_server.pause()
                try:
                    calls = [each.save_event(f"e{n}", n) for n in range(300) for each in (agent, other)]
                    waiting = asyncio.gather(*calls, agent.save_events([(f"b{n}", n) for n in range(40)]))
                    await until(lambda: wire.queued == 50, 10, "the queue is full")
                    for _ in range(20):
                        await asyncio.sleep(FROZEN_SECONDS / 20)
                        most = max(most, wire.queued)
                    assert not waiting.done()
                finally:
                    nats_server.resume()
                results: list[Any] = await waiting
                *acks, batch = results
            assert beat.longest < LONGEST_GAP and most == 50
            mine = [ack.seq for ack in acks[::2]] + [ack.seq for ack in batch]
            assert mine == sorted(set(mine))
            assert [ack.seq for ack in acks[1::2]] == sorted({ack.seq for ack in acks[1::2]})
            assert wire.queued == 0

    run(kind, main())


@each_loop
def test_too_much_waiting_ends_at_the_deadline_or_when_the_agent_is_closed(
    nats_server: NatsServer, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr(transport, "MAX_QUEUED_RECORDS", 5)
    settings = {**settings, "nats_url": nats_server.url, "writer": "off"}

    async def main() -> None:
        short = {**settings, "timeout": FROZEN_SECONDS}
        async with AsyncSkialithAgent("a", **short) as agent, AsyncSkialithAgent("b", **short) as other:
            await agent.save_event("first", 0)
            nats_server.pause()
            try:
                third = AsyncSkialithAgent("c", **short)
                monkeypatch.setattr(third, "_deadline", lambda: time.monotonic() + 20)
                with monkeypatch.context() as patch:
                    patch.setattr(agent, "_deadline", lambda: time.monotonic() + 20)  # none of them makes room
                    filling = [asyncio.create_task(agent.save_event(f"e{n}", n)) for n in range(5)]
                    await until(lambda: wire_of(agent).queued == 5, 10, "the queue is full")
                refused = [
                    asyncio.create_task(agent.save_event("more", 1)),
                    asyncio.create_task(other.save_event("more", 1)),
                ]
                closed = asyncio.create_task(third.save_event("more", 1))
                await asyncio.sleep(0.1)
                await third.close()
                errors = await asyncio.gather(*refused, return_exceptions=True)
            finally:
                nats_server.resume()
            for error in errors:
                assert isinstance(error, WalUnavailable), errors
                assert error.outcome == "not_written"
            with pytest.raises(Closed) as caught:
                await closed
            assert caught.value.outcome == "not_written"
            await asyncio.gather(*filling)
            assert wire_of(agent).queued == 0
            assert "more" not in {*await _listed(agent), *await _listed(other)}

    run(kind, main())


@each_loop
def test_while_a_large_payload_is_packed_and_read(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """Compressing, cutting and hashing do not happen on the loop, and neither does reading all of it again."""
    text = "".join(f"{n:x}" for n in range(4_000_000))[: 24 * 1024 * 1024]
    compressed, decode = payloads.compressed, payloads.decode

    def slow(body: bytes) -> Any:
        time.sleep(FROZEN_SECONDS if len(body) > AWAITED_INLINE_BYTES else 0)
        return compressed(body)

    def slow_too(codec: int, body: bytes) -> Any:
        time.sleep(FROZEN_SECONDS if len(body) > AWAITED_INLINE_BYTES else 0)
        return decode(codec, body)

    monkeypatch.setattr(payloads, "compressed", slow)
    monkeypatch.setattr(payloads, "decode", slow_too)

    async def main() -> None:
        async with AsyncSkialithAgent("a", **settings) as agent, Heartbeat() as beat:
            await asyncio.gather(
                agent.checkpoint(1, {"text": text}), *(agent.save_event(f"e{n}", n) for n in range(100))
            )
            await agent.save_event("large", text)
            assert (await agent.resume()).data["text"] == text
            assert [event.data async for event in agent.history()][-1] == text
        assert beat.longest < LONGEST_GAP

    run(kind, main())


def test_no_thread_per_call(settings: dict[str, Any]) -> None:
    async def main() -> None:
        agents = [AsyncSkialithAgent(f"a{n}", writer="off", **settings) for n in range(100)]
        before = threading.active_count()
        most = 0
        for step in range(5):
            tasks = [asyncio.gather(a.resume(), a.save_event(f"e{step}", 1), a.peek(), _listed(a)) for a in agents]
            while not all(task.done() for task in tasks):
                most = max(most, threading.active_count())
                await asyncio.sleep(0.001)
            await asyncio.gather(*tasks)
        assert most <= before + AWAITED_THREADS + 3  # and those of the runtime: loop, trimmer, futures
        await asyncio.gather(*(agent.close() for agent in agents))

    run("asyncio", main())


def test_a_thread_that_hangs_does_not_keep_the_process(
    settings: dict[str, Any], mariadb_server: MariaDB, mariadb_url: str, proxy: MakeProxy
) -> None:
    through = proxy(mariadb_server.port)
    url = mariadb_url.replace(f":{mariadb_server.port}/", f":{through.port}/")
    code = f"""
import asyncio
from skialith import AsyncSkialithAgent
async def main():
    agent = AsyncSkialithAgent("a", **{{**{settings!r}, "database_url": {url!r}, "writer": "off"}})
    await agent.save_event("e", 1)
    print("open", flush=True)
    await asyncio.to_thread(input)
    try:
        await asyncio.wait_for(agent.peek(), 0.5)
    except asyncio.TimeoutError:
        print("timeout", flush=True)
asyncio.run(main())
"""
    SkialithAgent("a", **{**settings, "database_url": url}).close()  # migrates and binds
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "open\n", child.communicate(timeout=10)
        through.stall()
        began = time.monotonic()
        out, err = child.communicate("\n", timeout=25)
        assert (out, child.returncode) == ("timeout\n", 0), err
        assert time.monotonic() - began < 15
    finally:
        child.kill()
        through.stall(False)


def test_a_loop_that_ended_is_told_nothing(nats_server: NatsServer, settings: dict[str, Any]) -> None:
    """What it left behind is written or not; nobody else is disturbed."""
    settings = {**settings, "nats_url": nats_server.url, "writer": "off", "timeout": 20.0}
    agent = AsyncSkialithAgent("a", **settings)

    async def leave() -> None:
        await agent.save_event("first", 1)
        nats_server.pause()
        for n in range(10):
            asyncio.create_task(agent.save_event(f"e{n}", os.urandom(1000)))  # noqa: RUF006 - that nobody waits for it is the point
        await asyncio.sleep(0.05)

    async def come_back() -> None:
        await agent.save_event("last", 1)
        ids = await _listed(agent)
        assert ids[0] == "first" and ids[-1] == "last" and {*ids} <= {"first", "last", *(f"e{n}" for n in range(10))}
        await agent.close()

    run("asyncio", leave())
    nats_server.resume()
    run("asyncio", come_back())
