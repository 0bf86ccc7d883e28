"""The awaited verbs as a user calls them, on both kinds of loop, against a real nats-server and a real database."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import resource
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from skialith import (
    Ack,
    AgentFenced,
    AsyncSkialithAgent,
    BatchFailed,
    BlockingCallInEventLoop,
    Closed,
    ConfigurationError,
    InvalidArgument,
    InvalidPayload,
    SkialithAgent,
    SkialithError,
)
from skialith.config import AWAITED_INLINE_BYTES
from tests.fixtures.agents import OpenAgent
from tests.fixtures.loops import KINDS, Kind, in_thread, run

each_loop = pytest.mark.parametrize("kind", KINDS)

# The lines of the document that Skialith grew from, as they stand there; indentation alone is ours.
SEED = """\
from skialith import SkialithAgent
async with SkialithAgent(agent_id="my-agent") as agent:
    state = await agent.resume()
    await agent.checkpoint(
        step=state.step_index,
        data={"messages": messages}
    )
    await agent.save_event("step-1", {
        "kind": "thought", "text": "..."
    })
"""


def test_the_seed_runs_as_it_stands_with_nothing_configured(tmp_path: Path) -> None:
    code = "import asyncio\nmessages = ['hi']\nasync def main():\n" + textwrap.indent(SEED, "    ")
    code += "    print(state.step_index, state.data)\nasyncio.run(main())\n"
    env = {name: value for name, value in os.environ.items() if not name.startswith("SKIALITH_")}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert outputs == ["0 {}\n", "0 {'messages': ['hi']}\n"]


@pytest.fixture(params=["sqlite", "mariadb"])
def each_database(request: pytest.FixtureRequest, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with each database in turn."""
    if request.param == "mariadb":
        settings["database_url"] = request.getfixturevalue("mariadb_url")
    return settings


@each_loop
def test_every_verb(each_database: dict[str, Any], kind: Kind) -> None:
    async def main() -> None:
        async with SkialithAgent("agent", **each_database) as agent:
            assert isinstance(agent, AsyncSkialithAgent)
            state = await agent.resume()
            assert (state.agent_id, state.step_index, state.data, state.is_new) == ("agent", 0, {}, True)
            ack = await agent.checkpoint(step=3, data={"messages": ["hi"]})
            assert isinstance(ack, Ack) and ack.seq > 0
            first = await agent.save_event("e1", {"kind": "thought", "n": 1})
            assert (await agent.save_event("e1", {"n": 2})).duplicate and not first.duplicate
            acks = await agent.save_events([(f"b{n}", n) for n in range(700)], step=9)
            assert [each.seq for each in acks] == sorted({each.seq for each in acks})
            assert await agent.save_events([]) == []
            assert (await agent.peek()).data == {"messages": ["hi"]}
            assert (await agent.resume(exclusive=False)).step_index == 3
            assert await agent.flush(timeout=20) == 0
            state = await agent.resume()
            assert (state.step_index, state.source, state.database_ok) == (3, "database", True)
            events = [event async for event in agent.history()]
            assert [event.event_id for event in events] == ["e1", *(f"b{n}" for n in range(700))]
            assert (events[0].event_type, events[0].data, events[0].step_index) == (
                "thought",
                {"kind": "thought", "n": 1},
                3,
            )
            assert {event.step_index for event in events[1:]} == {9} and all(event.stored for event in events)
        assert repr(agent) == f"AsyncSkialithAgent('agent', namespace={each_database['namespace']!r})"

    run(kind, main())


@each_loop
def test_history_page_by_page_with_an_early_end(settings: dict[str, Any], kind: Kind) -> None:
    async def main() -> None:
        async with AsyncSkialithAgent("agent", writer="off", **settings) as agent:
            await agent.save_events([(f"e{n}", n) for n in range(600)])
            await agent.save_event("large", os.urandom(1_500_000))
            seen = []
            async for event in agent.history():
                seen.append(event)
                if len(seen) == 300:
                    break
            assert [event.data for event in seen] == list(range(300))
            rest = [event.event_id async for event in agent.history(after=seen[-1])]
            assert rest == [*(f"e{n}" for n in range(300, 600)), "large"]
            assert [event.data async for event in agent.history(after=seen[4].position.cursor(), limit=2)] == [5, 6]
            assert [event async for event in agent.history(limit=0)] == []
            with pytest.raises(InvalidArgument, match="limit"):
                agent.history(limit=-1)
            async with contextlib.aclosing(agent.history()) as events:
                assert (await events.__anext__()).event_id == "e0"

    run(kind, main())


@each_loop
def test_opened_by_hand_or_by_the_first_verb_and_closed_twice(settings: dict[str, Any], kind: Kind) -> None:
    async def main() -> None:
        agent, other = AsyncSkialithAgent("a", **settings), AsyncSkialithAgent("b", **settings)
        assert await agent.open() is agent and await agent.open() is agent
        acks = await asyncio.gather(*(other.save_event(f"e{n}", n) for n in range(20)))  # all of them open it, once
        assert [ack.seq for ack in acks] == sorted(ack.seq for ack in acks)
        for _ in range(2):
            await agent.close()
            await other.close()
        verbs: list[Any] = [agent.open, agent.resume, agent.peek, agent.flush, partial(agent.save_event, "e", 1)]
        for verb in verbs:
            with pytest.raises(Closed, match="'a' is closed"):
                await verb()
        with pytest.raises(Closed):
            agent.history()
        await AsyncSkialithAgent("never opened", **settings).close()

    run(kind, main())


@each_loop
def test_in_a_running_loop_nothing_is_opened_and_the_blocking_verbs_are_refused(tmp_path: Path, kind: Kind) -> None:
    async def main() -> None:
        agent = SkialithAgent("a", directory=str(tmp_path / "none"))
        spellings: dict[str, tuple[Any, str]] = {
            "resume": (agent.resume, "await agent.resume("),
            "peek": (agent.peek, "await agent.peek("),
            "save_event": (partial(agent.save_event, "e", 1), "await agent.save_event("),
            "save_event_nowait": (partial(agent.save_event_nowait, "e", 1), "create_task(agent.save_event("),
            "save_events": (partial(agent.save_events, [("e", 1)]), "await agent.save_events("),
            "checkpoint": (partial(agent.checkpoint, 1, {}), "await agent.checkpoint("),
            "history": (agent.history, "async for event in agent.history("),
            "flush": (agent.flush, "await agent.flush("),
            "with": (agent.__enter__, "as agent:`;"),
        }
        for verb, (call, spelling) in spellings.items():
            with pytest.raises(BlockingCallInEventLoop, match="async with SkialithAgent") as caught:
                call()
            assert str(caught.value).startswith(f"{verb} blocks") and spelling in str(caught.value)
            assert caught.value.outcome == "not_written"
        with pytest.raises(BlockingCallInEventLoop, match="was made"):
            await asyncio.to_thread(agent.save_event, "e", 1)
        agent.close()
        with pytest.raises(Closed):
            async with agent:
                pass
        with pytest.raises(ConfigurationError, match="writer"):
            SkialithAgent("a", writer="sometimes")
        with pytest.raises(InvalidArgument, match="agent_id"):
            SkialithAgent("")

    run(kind, main())
    assert not (tmp_path / "none").exists()


def test_an_agent_that_was_opened_outside_goes_on_inside_and_is_closed_there(open_agent: OpenAgent) -> None:
    agent, other = open_agent("a"), open_agent("b")
    agent.resume()
    agent.checkpoint(7, {"n": 7})

    async def main() -> None:
        async with agent as inside:
            await inside.save_event("e", 1)
            assert [event.step_index async for event in inside.history()] == [7]
            assert (await inside.resume()).step_index == 7

    asyncio.run(main())
    with pytest.raises(Closed):
        agent.save_event("f", 1)
    log = other._runtime.wal.log
    assert log.lanes["a"].lease is None and other._runtime.users == 1


@each_loop
def test_calls_keep_their_order_whatever_their_size(settings: dict[str, Any], kind: Kind) -> None:
    sizes = [10, 100_000, AWAITED_INLINE_BYTES + 1, 10, 1_500_000, 10, 10, 3_000_000, 10]

    async def main() -> None:
        async with AsyncSkialithAgent("a", writer="off", **settings) as agent:
            await agent.resume()
            calls: list[Any] = [agent.save_event(f"e{n}", os.urandom(size)) for n, size in enumerate(sizes)]
            calls.insert(4, agent.checkpoint(4, {"n": 4}))
            calls.insert(6, agent.save_events([(f"b{n}", n) for n in range(1200)]))
            done = await asyncio.gather(*calls, *(agent.save_event(f"n{n}", n) for n in range(2000)))
            seqs = [each.seq for ack in done for each in (ack if isinstance(ack, list) else [ack])]
            assert seqs == sorted(set(seqs))
            ids = [event.event_id async for event in agent.history()]
            assert len(ids) == len(sizes) + 1200 + 2000
            assert ids[:5] == ["e0", "e1", "e2", "e3", "e4"] and ids[-1] == "n1999"

    run(kind, main())


def test_two_loops_in_two_threads_at_once(settings: dict[str, Any]) -> None:
    async def main(name: str) -> None:
        agents = [AsyncSkialithAgent(f"{name}-{n}", writer="off", **settings) for n in range(5)]
        shared = AsyncSkialithAgent("shared", writer="off", **settings)
        for agent in (*agents, shared):
            await agent.resume()
        for step in range(40):
            await asyncio.gather(
                *(agent.save_event(f"e{step}", step) for agent in agents),
                *(agent.checkpoint(step, step) for agent in agents),
                shared.save_event(f"{name}.{step}", step),
            )
        for agent in agents:
            assert (await agent.peek()).step_index == 39
            assert [event.data async for event in agent.history()] == list(range(40))
        for agent in (*agents, shared):
            await agent.close()

    with in_thread(lambda: run("asyncio", main("one"))):
        run("uvloop", main("two"))
    agent = SkialithAgent("shared", **settings)
    try:
        ids = [event.event_id for event in agent.history()]
    finally:
        agent.close()
    for name in ("one", "two"):
        assert [each for each in ids if each.startswith(name)] == [f"{name}.{n}" for n in range(40)]


def test_an_agent_belongs_to_its_loop_and_outlives_it(settings: dict[str, Any]) -> None:
    agent = AsyncSkialithAgent("a", writer="off", **settings)

    async def main() -> None:
        await agent.save_event("first", 1)

        async def elsewhere() -> None:
            with pytest.raises(SkialithError, match="another event loop"):
                await agent.save_event("elsewhere", 1)

        await asyncio.to_thread(lambda: asyncio.run(elsewhere()))

    async def later() -> None:
        await agent.save_event("second", 2)
        assert [event.event_id async for event in agent.history()] == ["first", "second"]
        await agent.close()

    run("asyncio", main())
    run("uvloop", later())


@each_loop
def test_errors_arrive_as_from_the_blocking_verbs_and_survive_pickle(settings: dict[str, Any], kind: Kind) -> None:
    async def main() -> None:
        async with AsyncSkialithAgent("a", writer="off", **settings) as old:
            await old.resume()
            with pytest.raises(InvalidPayload, match=r"^data\.x\[1\]: set"):
                await old.save_event("e", {"x": [1, {2}]})
            with pytest.raises(InvalidPayload, match=r"^events\[1\]\.data\.x"):
                await old.save_events([("a", {}), ("b", {"x": object()})])
            with pytest.raises(InvalidArgument, match="step"):
                await old.checkpoint(-1, {})
            # Another runtime: as another process.
            async with AsyncSkialithAgent("a", writer="off", **{**settings, "timeout": 9.5}) as new:
                await new.resume()
                await new.save_event("new", 1)
                errors: list[SkialithError] = []
                for call in (old.save_event("e", 1), old.checkpoint(1, {}), old.save_events([("f", 1), ("g", 2)])):
                    with pytest.raises(SkialithError) as caught:
                        await call
                    errors.append(caught.value)
            assert [type(error) for error in errors] == [AgentFenced, AgentFenced, BatchFailed]
            assert isinstance(errors[2].__cause__, AgentFenced)
            for error in errors:
                again = pickle.loads(pickle.dumps(error))
                assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)
                assert again.outcome == "not_written"
            assert [event.event_id async for event in old.history()] == ["new"]
            await old.resume()
            await old.save_event("e", 1)

    run(kind, main())


def test_a_forked_child_opens_its_own(settings: dict[str, Any]) -> None:
    code = f"""
import asyncio, json, os, sys
from skialith import AsyncSkialithAgent
settings = json.loads({json.dumps(json.dumps(settings))})
agent = AsyncSkialithAgent("a", **settings)

async def child():
    await asyncio.gather(*(agent.save_event(f"child{{n}}", n) for n in range(50)))
    assert (await agent.peek()).step_index == 1
    async with AsyncSkialithAgent("b", **settings) as own:
        await own.resume()
        await own.checkpoint(2, {{}})
    await agent.flush(20)
    await agent.close()

async def parent():
    await agent.resume()
    await agent.checkpoint(1, {{}})
    waiting = [asyncio.create_task(agent.save_event(f"parent{{n}}", n)) for n in range(500)]
    await asyncio.sleep(0)
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(child())
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
        os._exit(0)
    await asyncio.gather(*waiting)
    status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert status[1] == 0, status
    await agent.save_event("last", 0)
    ids = [event.event_id async for event in agent.history()]
    assert sorted(ids) == sorted([*(f"child{{n}}" for n in range(50)), *(f"parent{{n}}" for n in range(500)), "last"])
    await agent.close()

asyncio.run(parent())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr


@each_loop
def test_a_thousand_agents_at_once(settings: dict[str, Any], kind: Kind) -> None:
    """40 MB go through; what the process holds of it at any time does not grow with it."""
    settings = {**settings, "writer": "off", "timeout": 25.0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    async def one(number: int) -> int:
        async with AsyncSkialithAgent(f"agent-{number}", **settings) as agent:
            state = await agent.resume()
            seqs = [(await agent.save_event(f"e{n}", {"n": number, "b": os.urandom(5000)})).seq for n in range(8)]
            await agent.checkpoint(state.step_index + 1, {"n": number})
            assert seqs == sorted(set(seqs))
            assert (await agent.peek()).data == {"n": number}
            return [event.data["n"] async for event in agent.history()].count(number)

    async def main() -> None:
        async with AsyncSkialithAgent(
            "keeper", **settings
        ) as keeper:  # or one that is alone would start and end the runtime
            assert await asyncio.gather(*(one(n) for n in range(1000))) == [8] * 1000
            assert keeper._hold is not None and keeper._hold.engine is not None
            log = keeper._hold.engine.wal.log
            assert log._connection.wire.queued == 0
            assert not any(lane.lease or lane.queue or lane.holders or lane.running for lane in log.lanes.values())

    run(kind, main())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{grown:.0f} MB more at most")
    assert grown < 60
