"""Awaited records that their callers wrote to the socket themselves: whatever becomes of those, the agent's lane goes on."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from skialith import AsyncSkialithAgent, SkialithAgent, WalUnavailable
from skialith.config import load
from skialith.records import NOWHERE
from skialith.runtime import Runtime, acquire
from tests.fixtures.loops import until
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.nats_proxy import NatsProxy


def idle(engine: Runtime) -> bool:
    """Whether nothing is under way, and every lane is free."""
    wire = engine.wal.connection.wire
    lanes = engine.wal.log.lanes.values()
    return not wire.queued and not any(lane.turn.taken or lane.turn.waiting or lane.queue for lane in lanes)


def test_a_lost_puback_of_a_loop_that_stands_still(nats_server: NatsServer, settings: dict[str, Any]) -> None:
    """Its caller's loop looks at no clock any more, and others append for the same agent."""
    with NatsProxy("127.0.0.1", nats_server.port, 1) as proxy:
        settings = {**settings, "nats_url": f"nats://127.0.0.1:{proxy.port}", "writer": "off"}
        engine = acquire(load({}, **settings))
        loop = asyncio.new_event_loop()
        try:
            agent = AsyncSkialithAgent("a", **settings)
            loop.run_until_complete(agent.save_event("first", 0))
            proxy.lose(1)
            saving = loop.create_task(agent.save_event("left", 1))
            loop.run_until_complete(asyncio.sleep(0.01))
            wait_until(lambda: proxy.lost == 1, 10, "its PubAck is lost")
            assert not saving.done()
            with SkialithAgent("a", **settings) as other:
                other.save_event("behind it", 2)
            wait_until(lambda: idle(engine), 10, "nothing is under way")
            assert loop.run_until_complete(saving).seq > 0
            loop.run_until_complete(agent.close())
            found = [record.record_id for record, _, _ in engine.history("a").entries(NOWHERE)]
            assert found == ["first", "left", "behind it"]
        finally:
            loop.close()
            engine.release()


@pytest.mark.parametrize("max_payload", [8192, 8300])
def test_the_next_server_takes_too_little(nats_server: NatsServer, settings: dict[str, Any], max_payload: int) -> None:
    """A record without an answer cannot be sent again: its call says ``unknown``, and the agent's lane goes on."""
    with NatsProxy("127.0.0.1", nats_server.port, 1) as proxy:
        settings = {**settings, "nats_url": f"nats://127.0.0.1:{proxy.port}", "writer": "off"}

        async def main() -> None:
            engine = acquire(load({}, **settings))
            try:
                async with AsyncSkialithAgent("a", **settings) as agent:
                    await agent.save_event("first", 0)
                    proxy.lose(1)
                    saving = asyncio.create_task(agent.save_event("large", os.urandom(20_000)))
                    await until(lambda: proxy.lost == 1, 10, "its PubAck is lost")
                    nats_server.config = f"max_payload: {max_payload}"
                    await asyncio.to_thread(nats_server.restart)
                    with pytest.raises(WalUnavailable, match="max_payload") as caught:
                        await saving
                    assert caught.value.outcome == "unknown"
                    await agent.save_event("behind it", 2)
                    await until(lambda: idle(engine), 10, "nothing is under way")
            finally:
                engine.release()

        asyncio.run(main())
