"""Steps on a real nats-server and real databases: replay after any end of a process, wherever the record stands."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from skialith import (
    AgentFenced,
    BlockingCallInEventLoop,
    RunEnded,
    SkialithAgent,
    StepFailed,
    StoreUnavailable,
    WalUnavailable,
    current_step,
)
from skialith.errors import StoreDataError
from skialith.history import StepPast
from skialith.records import NOWHERE
from skialith.stores.sql import SqlStore
from tests.fixtures.agents import OpenAgent
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.proxy_plugin import MakeProxy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["sqlite", "mariadb"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every test here runs on both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'skialith.db'}"
    return str(request.getfixturevalue("mariadb_url"))


class Calls:
    """A function that returns its argument and remembers its calls."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __call__(self, value: Any) -> Any:
        self.made.append(value)
        return value


def never(*_: Any) -> None:
    pytest.fail("a recorded step was called")


never.__module__, never.__qualname__ = Calls.__module__, Calls.__qualname__


def trimmed(agent: SkialithAgent) -> None:
    """Wait until the database has everything and the log nothing."""
    agent.flush(timeout=20)
    wal = agent._runtime.wal

    def empty() -> bool:
        wal.trim()
        return not wal.events(agent.agent_id, NOWHERE, time.monotonic() + 5)[0]

    wait_until(empty, 20, "the log is trimmed")


# ---- where the record stands


@pytest.mark.parametrize("where", ["log", "database", "both"])
def test_a_later_run_gets_the_results_and_calls_nothing(open_agent: OpenAgent, where: str) -> None:
    agent = open_agent(writer="off" if where == "log" else "on")
    agent.resume()
    calls = Calls()
    values = [agent.step("ask", calls, {"n": n, "text": "x" * n}) for n in range(30)]
    if where != "log":
        trimmed(agent)
    agent.close()
    again = open_agent(writer="off")
    if where == "both":
        again.resume()
        for n in range(30):
            again.step("ask", never, n)
        values += [again.step("ask", calls, {"n": n}) for n in range(30, 40)]
    last = open_agent(writer="off")
    last.resume()
    assert [last.step("ask", never, n) for n in range(len(values))] == values
    assert last.step("ask", calls, "new") == "new"
    assert len(calls.made) == len(values) + 1


def test_results_of_any_size(open_agent: OpenAgent) -> None:
    agent = open_agent(writer="off")
    agent.resume()
    results = [os.urandom(size) for size in (0, 1000, 70_000, 1_048_576, 3_500_000)]
    for result in results:
        assert agent.step("large", Calls(), result) == result
    agent.resume()
    assert [agent.step("large", never) for _ in results] == results
    writer = open_agent()
    trimmed(writer)
    agent.resume()
    assert [agent.step("large", never) for _ in results] == results


@pytest.mark.parametrize("stored", [False, True])
def test_what_does_not_fit_in_memory_is_read_when_it_is_asked_for(
    open_agent: OpenAgent, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    monkeypatch.setattr(StepPast.load, "__defaults__", (10_000,))
    agent = open_agent(writer="on" if stored else "off")
    agent.resume()
    results = [os.urandom(1000 * n) for n in range(1, 9)]
    for result in results:
        agent.save_event(f"e{len(result)}", result)
        agent.step("s", Calls(), result)
    if stored:
        trimmed(agent)
    agent.resume()
    run = agent._steps.run(agent._engine("step"), lambda: None)
    assert 0 < sum(len(found.body or b"") for found in run.recorded.values()) <= 10_000
    assert [agent.step("s", never) for _ in results] == results
    assert run.recorded == {}


def test_steps_are_read_while_the_writer_moves_them(open_agent: OpenAgent) -> None:
    agent = open_agent()
    agent.resume()
    for n in range(400):
        agent.step("s", Calls(), n)
        if n % 80 == 79:
            agent.resume()
            assert [agent.step("s", never) for _ in range(n + 1)] == list(range(n + 1))


def test_dead_steps_are_found(open_agent: OpenAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them the database refuses, and of these some its table of dead letters too."""
    insert, bury = SqlStore._insert_records, SqlStore.write_dead_letter

    def refuse(self: Any, session: Any, records: Any) -> None:
        if any(record.record_id in ("s#2", "s#3") for record in records):
            raise StoreDataError("refused by the test", code=1406)
        insert(self, session, records)

    def refuse_letter(self: Any, letter: Any) -> None:
        if letter.record.record_id == "s#3":
            raise StoreDataError("refused by the test", code=1406)
        bury(self, letter)

    monkeypatch.setattr(SqlStore, "_insert_records", refuse)
    monkeypatch.setattr(SqlStore, "write_dead_letter", refuse_letter)
    agent = open_agent()
    agent.resume()
    for n in range(1, 5):
        agent.step("s", Calls(), n)
    trimmed(agent)
    agent.resume()
    assert [agent.step("s", never) for _ in range(4)] == [1, 2, 3, 4]
    assert [(event.event_id, event.dead) for event in agent.history()] == [
        ("s", False), ("s#2", True), ("s#3", True), ("s#4", False),
    ]  # fmt: skip


def test_events_of_the_same_id_and_kind_are_no_steps(open_agent: OpenAgent) -> None:
    agent = open_agent()
    agent.resume()
    forged = {"kind": "step", "name": "s", "n": 1, "function": "x", "result": "forged"}
    agent.save_event("s", forged)
    assert agent.step("s", Calls(), "real") == "real"
    agent.save_event("s#2", forged)
    for _ in range(2):
        agent.resume()
        assert agent.step("s", never) == "real"
        trimmed(agent)
    assert [(event.event_id, event.event_type, event.data["result"]) for event in agent.history()] == [
        ("s", "step", "forged"), ("s", "step", "real"), ("s#2", "step", "forged"),
    ]  # fmt: skip


def test_a_step_stands_in_the_history_and_the_traces(open_agent: OpenAgent) -> None:
    agent = open_agent()
    agent.resume()
    agent.checkpoint(4, {})
    agent.step("ask", Calls(), {"answer": 42})
    with pytest.raises(StepFailed):
        agent.step("ask", int, "no number", record_errors=(ValueError,))
    trimmed(agent)
    name = f"{__name__}.Calls"
    assert [(event.event_id, event.step_index, event.data) for event in agent.history()] == [
        ("ask", 4, {"kind": "step", "name": "ask", "n": 1, "function": name, "result": {"answer": 42}}),
        ("ask#2", 4, {"kind": "step", "name": "ask", "n": 2, "function": "builtins.int", "error": {
            "type": "builtins.ValueError", "message": "invalid literal for int() with base 10: 'no number'"}}),
    ]  # fmt: skip


# ---- how much it costs


def test_ten_thousand_steps(open_agent: OpenAgent) -> None:
    agent = open_agent()
    agent.resume()
    for n in range(10_000):
        agent.step("s", Calls(), n)
    trimmed(agent)
    agent.resume()
    assert [agent.step("s", never) for _ in range(10_000)] == list(range(10_000))
    assert agent.step("s", Calls(), "new") == "new"


def test_finding_steps_costs_their_number_and_not_that_of_the_events(open_agent: OpenAgent) -> None:
    """Pages are counted, and times compared: 40 steps alone, and among 60,000 events."""
    few, many = open_agent("few"), open_agent("many")
    for agent, events in ((few, 0), (many, 60_000)):
        agent.resume()
        for n in range(40):
            agent.step("s", Calls(), n)
            agent.save_events([(f"{n}.{k}", {"kind": "step", "text": "x" * 20}) for k in range(events // 40)])
        trimmed(agent)
    times: dict[SkialithAgent, list[float]] = {few: [], many: []}
    for _ in range(9):
        for agent, measured in times.items():
            agent.resume()
            began = time.perf_counter()
            agent.step("s", never)
            measured.append(time.perf_counter() - began)
    assert [many.step("s", never) for _ in range(39)] == list(range(1, 40))
    alone, among = (statistics.median(measured) for measured in times.values())
    print(f"first step of a run: {alone * 1e3:.2f} ms alone, {among * 1e3:.2f} ms among the events")
    assert among < 3 * alone


# ---- who owns


def test_the_first_step_owns_the_agent(open_agent: OpenAgent) -> None:
    first, second = open_agent(), open_agent(writer="off")  # two runtimes, as in two processes
    assert first.step("s", Calls(), 1) == 1
    assert second.step("s", never) == 1
    calls = Calls()
    with pytest.raises(AgentFenced, match="the function has run"):
        first.step("t", calls, 1)
    with pytest.raises(RunEnded):
        first.step("t", calls, 1)
    assert calls.made == [1]
    assert second.step("t", Calls(), 2) == 2
    first.resume()
    assert [first.step(name, never) for name in ("s", "t")] == [1, 2]


def test_a_forked_child_begins_a_run_of_its_own(open_agent: OpenAgent, tmp_path: Path) -> None:
    agent = open_agent()
    agent.resume()
    agent.step("s", Calls(), 1)
    child = os.fork()
    if child == 0:
        try:
            values = [agent.step("s", never), agent.step("s", Calls(), 2)]
            agent.close()
            (tmp_path / "child").write_text(json.dumps(values))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / "child").read_text()) == [1, 2]
    with pytest.raises(AgentFenced):
        agent.step("s", Calls(), 3)
    agent.resume()
    assert [agent.step("s", never) for _ in range(2)] == [1, 2]


def test_threads_with_names_of_their_own_repeat(open_agent: OpenAgent) -> None:
    agent = open_agent()
    for calls in (Calls(), Calls()):
        agent.resume()
        found: dict[str, list[Any]] = {}

        def work(name: str, calls: Calls = calls, found: dict[str, list[Any]] = found) -> None:
            found[name] = [agent.step(name, calls, (name, n)) for n in range(25)]

        threads = [threading.Thread(target=work, args=(f"thread-{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == {f"thread-{n}": [[f"thread-{n}", k] for k in range(25)] for n in range(8)}
    assert calls.made == []


def test_decorated(open_agent: OpenAgent) -> None:
    agent = open_agent()

    @agent.step_fn("flaky", retries=2, backoff=0)
    def flaky(text: str, *, retries: int) -> list[Any]:
        """Fails at first."""
        here = current_step()
        assert here is not None
        if here.attempt < 3:
            raise OSError(text)
        return [text, retries, here.attempt]

    assert (flaky.__name__, flaky.__doc__) == ("flaky", "Fails at first.")
    assert flaky("a", retries=7) == ["a", 7, 3]
    agent.resume()
    assert flaky("ignored", retries=0) == ["a", 7, 3]
    assert [event.event_id for event in agent.history()] == ["flaky"]


def test_a_step_blocks_and_says_so_on_a_loop(open_agent: OpenAgent) -> None:
    import asyncio

    agent = open_agent()

    async def main() -> int:
        with pytest.raises(BlockingCallInEventLoop, match="step"):
            agent.step("s", int)
        return int(await asyncio.to_thread(agent.step, "s", int, "5"))

    assert asyncio.run(main()) == 5


# ---- what is away


def test_without_the_database_it_cannot_be_told_what_is_recorded(
    settings: dict[str, Any], proxy: MakeProxy, open_agent: OpenAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings["database_url"].startswith("mysql"):
        parts = urlsplit(settings["database_url"])
        between = proxy(parts.port or 0)
        url = settings["database_url"].replace(f":{parts.port}/", f":{between.port}/")
        away, back = between.stop, between.start
    else:
        url, file = settings["database_url"], Path(settings["database_url"].removeprefix("sqlite:///"))
        away, back = lambda: _hide(file), lambda: _show(file)
    agent = open_agent(database_url=url)
    agent.resume()
    agent.checkpoint(1, {})
    agent.step("s", Calls(), 1)
    trimmed(agent)
    agent.checkpoint(2, {})
    away()
    calls = Calls()
    assert agent.resume().step_index == 2
    with pytest.raises(StoreUnavailable, match="cannot be told which steps are recorded") as caught:
        agent.step("s", calls, 2)
    assert (caught.value.retryable, calls.made) == (True, [])
    back()
    wait_until(lambda: agent.peek().database_ok, 20, "the database is back")
    assert agent.step("s", never) == 1
    away()
    assert agent.step("s", calls, 2) == 2  # the run has read what it needs
    back()


def _hide(file: Path) -> None:
    file.rename(file.with_suffix(".hidden"))
    file.mkdir()


def _show(file: Path) -> None:
    file.rmdir()
    file.with_suffix(".hidden").rename(file)


def test_a_result_that_the_log_did_not_take_is_recorded_in_the_next_run(
    open_agent: OpenAgent, nats_server: NatsServer, tmp_path: Path
) -> None:
    with NatsServer(tmp_path / "own") as server:
        agent = open_agent(
            nats_url=server.url, timeout=1.5, writer="off", database_url=f"sqlite:///{tmp_path / 'own.db'}"
        )
        agent.resume()
        calls = Calls()
        assert agent.step("s", calls, 1) == 1
        server.kill()
        with pytest.raises(WalUnavailable, match="the function has run, but its result"):
            agent.step("s", calls, 2)
        with pytest.raises(RunEnded):
            agent.step("s", calls, 3)
        server.start()
        wait_until(lambda: _answers(agent), 20, "the log is back")
        assert [agent.step("s", calls, n) for n in (4, 5, 6)] == [1, 2, 6]
        assert calls.made == [1, 2, 6]
        assert [event.data["result"] for event in agent.history()] == [1, 2, 6]


def _answers(agent: SkialithAgent) -> bool:
    try:
        agent.resume()
    except WalUnavailable:
        return False
    return True


# ---- killed

PROGRAM = """
import json, os, sys
from skialith import SkialithAgent, current_step
from tests.chaos import faults
settings, die, place = json.loads(sys.argv[1])
faults.install(die, {})
def work(n):
    with open(place, "a") as file:
        file.write(f"{n} {os.getpid()} {current_step().idempotency_key}\\n")
    return [n, os.getpid()]
with SkialithAgent("agent", **settings) as agent:
    agent.resume()
    print(json.dumps([agent.step("work", work, n) for n in range(6)]))
"""


def launch(settings: dict[str, Any], place: Path, die: dict[str, int], writer: str = "off") -> tuple[int, int, Any]:
    """Run the program; its process id, its exit code and the values that it got."""
    settings = {**settings, "writer": writer}
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps([settings, die, str(place)])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = child.communicate(timeout=60)
    assert child.returncode in (0, -signal.SIGKILL), err
    return child.pid, child.returncode, json.loads(out) if out else None


@pytest.mark.parametrize(
    ("point", "again"), [("after function", True), ("after record", False), ("before function", False)]
)
def test_killed_around_the_record(settings: dict[str, Any], tmp_path: Path, point: str, again: bool) -> None:
    """Killed with SIGKILL at the third step: its function runs again only if it had run and the record was not there."""
    place = tmp_path / "calls"
    first, code, _ = launch(settings, place, {point: 3})
    assert code == -signal.SIGKILL
    second, code, values = launch(settings, place, {})
    assert code == 0
    mine = 3 if point == "after record" else 2
    assert values == [[n, first if n < mine else second] for n in range(6)]
    called = [line.split() for line in place.read_text().splitlines()]
    assert [int(n) for n, _, _ in called] == [0, 1, 2, 2, 3, 4, 5] if again else list(range(6))
    keys = {n: {key for other, _, key in called if other == n} for n, _, _ in called}
    assert all(len(found) == 1 for found in keys.values())
    assert len(set.union(*keys.values())) == 6
    for writer in ("on", "off"):  # from the log, and from the database
        assert launch(settings, place, {}, writer)[2] == values
    assert len(place.read_text().splitlines()) == len(called)
