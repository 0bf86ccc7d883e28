"""The sidecar's engine on a loop of the test's: what is sent again for an owner whose requests come by several processes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from skialith import awaiting
from skialith.base_agent import checkpoint_record
from skialith.config import load
from skialith.payloads import plain
from skialith.records import Record
from skialith.sidecar import config
from skialith.sidecar.engine import Engine
from skialith.sidecar.problems import Gone
from skialith.wal.lane import Owner
from tests.fixtures.loops import run, until
from tests.fixtures.nats import wait_until
from tests.fixtures.wal import OpenWal, checkpoint, soon
from tests.integration.test_owners import adopt, handed, last_step


def no() -> bool:
    return False


def made(step: int, namespace: str) -> Record:
    return checkpoint_record(namespace, "a", step, plain({}, "state"))


@contextlib.asynccontextmanager
async def opened(settings: dict[str, Any]) -> Any:
    engine = Engine(load({}, **settings), config.load({}))
    await engine.open()
    try:
        yield engine
    finally:
        await engine.close()


def test_an_owner_takes_turns_at_two_sidecars(settings: dict[str, Any]) -> None:
    async def main() -> None:
        there = {**settings, "directory": f"{settings['directory']}-2"}
        async with opened(settings) as one, opened(there) as other:
            owner = await one.claim("a", "me", no)
            for n in range(20):
                await (one, other)[n % 2].append(owner, made(n, settings["namespace"]), no, "checkpoint")
            assert (await one.newest_checkpoint("a"))[0].step_index == 19
            # Many at once by both: none is lost, each is written once.
            both = [
                (one, other)[n % 2].append(owner, made(n, settings["namespace"]), no, "checkpoint") for n in range(100)
            ]
            acks = await asyncio.gather(*both)
            assert len({ack.seq for ack in acks}) == 100

    run("uvloop", main())


def test_a_request_that_was_given_up_is_not_sent_after_the_owners_next_one(
    settings: dict[str, Any], open_wal: OpenWal
) -> None:
    other = open_wal(settings["nats_url"], namespace=settings["namespace"])

    async def main() -> None:
        async with opened(settings) as engine:
            owner: Owner = await engine.claim("a", "me", no)
            await engine.append(owner, made(1, settings["namespace"]), no, "checkpoint")
            lanes = engine.runtime.wal.log.lanes
            turn, gone = lanes[owner].turn, False
            assert turn.try_take()  # as while an earlier record waits for its PubAck
            stalled = asyncio.create_task(
                engine.append(owner, made(2, settings["namespace"]), lambda: gone, "checkpoint")
            )
            await until(lambda: turn.waiting == 1, 10, "it waits")
            await awaiting.in_thread(lambda: adopt(other, owner))
            gone = True
            turn.give()
            following = asyncio.create_task(engine.append(owner, made(3, settings["namespace"]), no, "checkpoint"))
            await following
            with pytest.raises(Gone) as caught:
                await stalled
            assert caught.value.outcome == "not_written"
            assert (await engine.newest_checkpoint("a"))[0].step_index == 3

    run("uvloop", main())


def test_leases_are_those_of_the_owners_when_it_ends(settings: dict[str, Any], open_wal: OpenWal) -> None:
    other = open_wal(settings["nats_url"], namespace=settings["namespace"])

    async def main() -> Owner:
        async with opened(settings) as engine:
            owner: Owner = await engine.claim("a", "me", no)
            await engine.append(owner, made(1, settings["namespace"]), no, "checkpoint")
            return owner

    owner = run("uvloop", main())
    adopt(other, owner)
    other.wait(handed(other, owner, [checkpoint(other, "a", 2)]))
    wait_until(lambda: other.last_checkpoint("a", soon()) is not None, 10, "the checkpoint is there")
    assert last_step(other) == 2


def test_what_found_its_lease_gone_waits_behind_no_later_adoption(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later request of the owner has the lease adopted again; what was given up before that one was sent is not written."""

    async def main() -> None:
        async with opened(settings) as engine:
            log, gone = engine.runtime.wal.log, False
            owner = await engine.claim("a", "me", no)
            lane = log.lanes[owner]
            assert lane.turn.try_take()  # as while an earlier record waits for its PubAck
            lane.lease = None  # as when that one learned that the owner wrote elsewhere
            adopting = asyncio.create_task(engine.runtime.wal.ask(lambda: log.owning.adopt(owner, soon()), soon()))
            await until(lambda: lane.holders == 1, 10, "a later request waits for the turn to adopt")
            held, looks = engine._held, 0

            async def over_already(name: Owner, deadline: float) -> Any:
                nonlocal looks
                looks += 1
                return None if looks == 1 else await held(name, deadline)

            monkeypatch.setattr(engine, "_held", over_already)
            older = asyncio.create_task(
                engine.append(owner, made(1, settings["namespace"]), lambda: gone, "checkpoint")
            )
            await until(lambda: looks == 2 or len(lane.queue) == 1, 10, "it waits")
            gone = True
            lane.turn.give()
            await adopting
            with pytest.raises(Gone):
                await older
            assert (await engine.newest_checkpoint("a"))[0] is None

    run("asyncio", main())
