"""A runtime on a server's own loop: it appends, reconnects and ends there, and the loop goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from skialith import awaiting
from skialith.config import load
from skialith.errors import BlockingCallInEventLoop, Closed, SkialithError
from skialith.records import NOWHERE
from skialith.runtime import Runtime, acquire
from skialith.wal import client
from tests.fixtures.loops import KINDS, Kind, run, until
from tests.fixtures.nats import NatsServer
from tests.fixtures.wal import event

each_loop = pytest.mark.parametrize("kind", KINDS)


async def opened(settings: dict[str, Any]) -> Runtime:
    loop = asyncio.get_running_loop()
    return await awaiting.in_thread(lambda: acquire(load({}, **settings), loop=loop))


async def save(engine: Runtime, event_id: str, seconds: float = 20.0) -> None:
    await awaiting.append(engine, event(engine.wal, "a", event_id), time.monotonic() + seconds)


async def ended(engine: Runtime, others: set[Any]) -> None:
    """Close it, and see that nothing of it is left on the loop."""
    await awaiting.in_thread(engine.release)
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == others


@each_loop
def test_it_appends_stores_and_ends(settings: dict[str, Any], kind: Kind) -> None:
    async def main() -> None:
        others = asyncio.all_tasks()
        engine = await opened(settings)
        assert engine.wal._thread.loop is asyncio.get_running_loop()
        await asyncio.gather(*(save(engine, f"e{n}") for n in range(500)))
        await awaiting.in_thread(partial(engine.flush, 20.0))
        found = await awaiting.in_thread(lambda: list(engine.history("a").entries(NOWHERE)))
        assert [record.record_id for record, _, _ in found] == [f"e{n}" for n in range(500)]
        assert all(stored for _, stored, _ in found)
        with pytest.raises(BlockingCallInEventLoop):
            engine.wal.dead_count(time.monotonic() + 1)
        await ended(engine, others)

    run(kind, main())


@each_loop
def test_the_server_restarts_under_load(nats_server: NatsServer, settings: dict[str, Any], kind: Kind) -> None:
    settings = {**settings, "nats_url": nats_server.url, "timeout": 20.0}

    async def main() -> None:
        others = asyncio.all_tasks()
        engine = await opened(settings)
        saving = [asyncio.create_task(_several(partial(save, engine), name)) for name in "abcd"]
        await asyncio.sleep(0.1)
        await awaiting.in_thread(nats_server.restart)
        await asyncio.gather(*saving)
        await awaiting.in_thread(partial(engine.flush, 20.0))
        found = await awaiting.in_thread(lambda: list(engine.history("a").entries(NOWHERE)))
        assert {record.record_id for record, _, _ in found} == {f"{name}{n}" for name in "abcd" for n in range(200)}
        assert len(found) == 800
        await ended(engine, others)

    run(kind, main())


async def _several(write: Callable[[str], Any], name: str) -> None:
    for n in range(200):
        await write(f"{name}{n}")


@each_loop
def test_it_is_closed_while_the_server_does_not_answer(
    nats_server: NatsServer, settings: dict[str, Any], kind: Kind
) -> None:
    """Whoever waits learns it, and whether the record may be written; the loop was never blocked."""
    settings = {**settings, "nats_url": nats_server.url, "writer": "off", "timeout": 20.0}

    async def main() -> None:
        engine = await opened(settings)
        await save(engine, "first")
        nats_server.pause()
        try:
            waiting = [asyncio.create_task(save(engine, f"e{n}")) for n in range(3)]
            await asyncio.sleep(0.1)
            closing = asyncio.create_task(awaiting.in_thread(engine.release))
            errors = await asyncio.gather(*waiting, return_exceptions=True)
            await closing
        finally:
            nats_server.resume()
        assert all(isinstance(error, SkialithError) for error in errors), errors
        assert {error.outcome for error in errors if isinstance(error, SkialithError)} <= {"unknown", "not_written"}
        assert isinstance(errors[0], SkialithError) and errors[0].outcome == "unknown"  # it was sent
        with pytest.raises(Closed):
            await save(engine, "late")

    run(kind, main())


@each_loop
def test_it_is_closed_while_the_loop_is_blocked(
    settings: dict[str, Any], kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closes it does not wait for longer than a close may take, and nothing of it stays behind all the same."""
    monkeypatch.setattr(client, "CLOSE_SECONDS", 0.3)

    async def main() -> None:
        others = asyncio.all_tasks()
        engine = await opened({**settings, "writer": "off"})
        await save(engine, "first")
        closing = threading.Thread(target=engine.release)
        closing.start()
        closing.join(30)  # on the loop
        assert not closing.is_alive()
        await until(lambda: asyncio.all_tasks() == others, 10, "nothing of it is left on the loop")
        assert not engine.wal.connection.is_open

    run(kind, main())
