"""Processes: Ctrl-C, fork, interpreter exit, threads that are not the main one, a database that is away."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from skialith import SkialithAgent
from skialith.config import ACK_WAIT_SECONDS
from tests.fixtures.agents import OpenAgent
from tests.fixtures.nats import NatsServer, wait_until


def run(code: str, settings: dict[str, Any], *, seconds: float = 60, **popen: Any) -> subprocess.Popen[str]:
    """Start a Python child that has ``settings`` and ``SkialithAgent``."""
    head = "import json, os, sys\nfrom skialith import SkialithAgent\n"
    head += f"settings = json.loads({json.dumps(json.dumps(settings))})\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def finish(child: subprocess.Popen[str], seconds: float = 60) -> str:
    out, err = child.communicate(timeout=seconds)
    assert child.returncode == 0, err
    return out


def test_leaving_without_close_stores_everything(settings: dict[str, Any]) -> None:
    finish(run("a = SkialithAgent('a', **settings)\nfor n in range(50): a.save_event(f'e{n}', n)\n", settings))
    with sqlite3.connect(settings["database_url"].removeprefix("sqlite:///")) as database:
        assert database.execute("SELECT COUNT(*) FROM agent_events").fetchone() == (50,)


def test_an_abrupt_exit_leaves_everything_to_the_next_process(settings: dict[str, Any], open_agent: OpenAgent) -> None:
    finish(
        run(
            "a = SkialithAgent('a', **settings)\na.save_events([(f'e{n}', n) for n in range(50)])\nos._exit(0)",
            settings,
        )
    )
    agent = open_agent("a")
    assert [event.data for event in agent.history()] == list(range(50))
    agent.save_event("last", 50)
    agent.flush(timeout=25)
    assert all(event.stored for event in agent.history())


def test_ctrl_c_during_a_call_returns_promptly(nats_server: NatsServer, settings: dict[str, Any]) -> None:
    settings["nats_url"] = nats_server.url
    child = run(
        "a = SkialithAgent('a', timeout=20, **settings)\na.save_event('e', 1)\nprint('ready', flush=True)\nsys.stdin.read(1)\n"
        "try:\n    a.save_event('f', 2)\nexcept KeyboardInterrupt:\n    print('interrupted', flush=True)\n    os._exit(0)\n",
        settings,
        stdin=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "ready\n"
    nats_server.pause()
    try:
        child.stdin.write("x")
        child.stdin.flush()
        time.sleep(0.3)  # only the child knows that it waits; an early signal would interrupt the read instead
        began = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
        assert time.monotonic() - began < 3
    finally:
        nats_server.resume()
        child.wait(30)


_FORK = """
agent = SkialithAgent('shared', **settings)
agent.save_event('parent-0', 0)
pids = []
for number in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            for n in range(20):
                agent.save_event(f'child-{number}-{n}', n)
            with SkialithAgent(f'own-{number}', **settings) as own:
                own.resume()
                own.checkpoint(number, {})
            agent.flush(timeout=20)
            os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
    pids.append(pid)
for n in range(1, 30):
    agent.save_event(f'parent-{n}', n)
for pid in pids:
    assert os.waitpid(pid, 0)[1] == 0
agent.flush(timeout=20)
agent.close()
"""


def test_fork_with_an_agent_open(settings: dict[str, Any], open_agent: OpenAgent) -> None:
    finish(run(_FORK, settings))
    events = list(open_agent("shared").history())
    expected = {f"parent-{n}" for n in range(30)} | {f"child-{c}-{n}" for c in range(3) for n in range(20)}
    assert {event.event_id for event in events} == expected
    assert len(events) == len(expected)
    assert [open_agent(f"own-{n}").peek().step_index for n in range(3)] == [0, 1, 2]


def test_an_agent_opened_and_used_on_other_threads(settings: dict[str, Any]) -> None:
    result: list[object] = []

    def work() -> None:
        with SkialithAgent("a", **settings) as agent:
            result.append(agent.save_event("e", 1))
            agent.flush(timeout=20)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(result) == 1


def test_a_database_that_is_away_does_not_stop_the_agent(
    settings: dict[str, Any], tmp_path: Path, open_agent: OpenAgent
) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    database = blocked / "db.sqlite"
    database.mkdir()  # a directory where the file should be: the database cannot be opened
    agent = open_agent("a", database_url=f"sqlite:///{database}")
    agent.checkpoint(4, {"x": 1})
    agent.save_event("e", 1)
    state = agent.peek()
    assert (state.step_index, state.database_ok) == (4, False)
    database.rmdir()
    agent.flush(timeout=25)
    assert agent.peek().source == "database"


def test_steps_need_no_database_while_the_log_holds_everything(tmp_path: Path, open_agent: OpenAgent) -> None:
    (tmp_path / "skialith.db").mkdir()
    agent = open_agent()
    agent.checkpoint(1, {})
    agent.resume()
    assert agent.step("s", int, 1) == 1
    agent.resume()
    assert agent.step("s", int) == 1
    (tmp_path / "skialith.db").rmdir()
    agent.flush(timeout=25)
    agent._runtime.wal.trim()
    agent.resume()
    assert agent.step("s", int) == 1


def test_an_embedded_agent_needs_no_settings(tmp_path: Path) -> None:
    code = "with SkialithAgent('a') as a:\n    s = a.resume()\n    a.checkpoint(s.step_index + 1, {})\n    print(s.step_index)\n"
    env = {k: v for k, v in os.environ.items() if not k.startswith("SKIALITH_")}
    outs = [finish(run(code, {}, cwd=tmp_path, env=env)) for _ in range(3)]
    assert outs == ["0\n", "1\n", "2\n"]
    wait_until(lambda: _server_gone(tmp_path), 30, "the embedded server ended with its last user")


def _server_gone(directory: Path) -> bool:
    from skialith.wal.local import inspect

    return inspect(directory / ".skialith") is None


def test_gevent_is_refused() -> None:
    code = (
        "import sys, types\nm = types.ModuleType('gevent.monkey')\nm.is_module_patched = lambda name: True\n"
        "sys.modules['gevent.monkey'] = m\n"
        "from skialith import UnsupportedEnvironment\n"
        "try:\n    SkialithAgent('a')\nexcept UnsupportedEnvironment as error:\n    print(error)\n"
    )
    assert "real threads" in finish(run(code, {}))


def test_leaving_without_close_gives_the_agent_up(settings: dict[str, Any], open_agent: OpenAgent) -> None:
    finish(run("a = SkialithAgent('a', **settings)\na.resume()\na.checkpoint(1, {})\n", settings))
    agent = open_agent("a")
    lease = agent._runtime.wal.stream.subjects.lease("a")
    assert agent._runtime.wal.call(lambda: agent._runtime.wal.stream.next_message(1, lease), 5) is None
    assert agent.resume().step_index == 1


def test_a_writer_that_closes_hands_on_what_it_was_sent(settings: dict[str, Any], open_agent: OpenAgent) -> None:
    busy = open_agent("busy", writer="off")
    published: list[int] = []
    stopping = threading.Event()

    def publish() -> None:
        while not stopping.is_set():
            published.append(busy.save_event(f"e{len(published)}", {}).seq)

    publisher = threading.Thread(target=publish)
    publisher.start()
    longest = 0.0
    try:
        for n in range(10):
            agent = SkialithAgent("brief", **settings)
            agent.save_event(f"b{n}", {})
            began = time.monotonic()
            agent.close()  # waits until the event is stored, behind what the writer before it had been sent
            longest = max(longest, time.monotonic() - began)
    finally:
        stopping.set()
        publisher.join()
    assert longest < ACK_WAIT_SECONDS / 2
    assert len(published) > 100
