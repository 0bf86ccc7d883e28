"""Question: what does the client itself cost: import time, CPU per call and per record, memory per agent and record in flight?"""

from __future__ import annotations

import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skialith import Ack, SkialithAgent, _fastpath
from tests.fixtures.nats import NatsServer

from . import sides
from .child import LOOPS, Child, Loop
from .measure import ROUNDS, Call, scaled
from .report import Report, duration
from .sides import BODY, PAYLOAD

IMPORT = f"Import time (processes of their own, {ROUNDS} rounds of 3)"
CPU = f"CPU of the client process, all threads, per call ({ROUNDS} rounds)"
RECORD = "The compiled module, per record of 200 bytes (median of 100 rounds of 2000)"
MEMORY = "Memory of the client process (resident set, once)"
CALLS = scaled(5000)
AGENTS = scaled(2000)
FLIGHT = 5000

# ---- import


def test_import_time(benchmark: BenchmarkFixture, report: Report) -> None:
    taken: dict[str, list[float]] = {"import skialith": [], "import nats": [], "import asyncio": []}

    def take_round() -> None:
        for statement, _ in itertools.product(taken, range(3)):
            script = f"import time; began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
            taken[statement].append(float(done.stdout))

    benchmark.pedantic(take_round, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    for statement, seconds in taken.items():
        report.figure(IMPORT, statement, duration(statistics.median(seconds)))


# ---- CPU


class Cost(NamedTuple):
    """CPU seconds and passed seconds of one call."""

    cpu: float
    wall: float


def cpu_per_call(url: str, calls: int) -> dict[str, Cost]:
    """Cost of a call of each side. Runs in the child."""
    ways = {
        "raw socket: the floor": sides.floor(url),
        "save_event": sides.save_event(url),
        "run_coroutine_threadsafe(js.publish())": sides.bridge(url),
    }
    found = {}
    for name, way in ways.items():
        with way as call:
            _repeat(call, calls // 10)
            cpu, wall = time.process_time(), time.perf_counter()
            _repeat(call, calls)
            found[name] = Cost((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls)
    return found


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def test_cpu(benchmark: BenchmarkFixture, nats: NatsServer, report: Report) -> None:
    found: dict[tuple[Loop, str], list[Cost]] = {}
    children = {loop: Child(loop) for loop in LOOPS}

    def take_round() -> None:
        for loop, child in children.items():
            for name, cost in child.run(cpu_per_call, nats.url, CALLS).items():
                found.setdefault((loop, name), []).append(cost)

    benchmark.pedantic(take_round, rounds=ROUNDS, iterations=1)
    for child in children.values():
        child.close()
    for (loop, name), costs in found.items():
        cpu = statistics.median(cost.cpu for cost in costs)
        share = statistics.median(cost.cpu / cost.wall for cost in costs)
        report.figure(CPU, f"{name} ({loop})", duration(cpu), ratio=f"{share:.2f} of the time it takes")
        if name == "save_event" and loop == "uvloop":
            report.bar("cpu", cpu * 1e6)


# ---- encode and parse

_KEY = _fastpath.event_key("bench", "agent", "event")
_RECORD = _fastpath.encode_record(1, "agent", "event", _KEY, 1, "thought", 1_767_225_600_000_000, 0, BODY, None)
_HEADERS = _fastpath.record_headers(_KEY) + _fastpath.fence(7, "skialith.bench.lease.agent")
_PUBACK = b'{"stream":"SKIALITH_bench","seq":1767225600000001}'
_ACK_SUBJECT = "$JS.ACK.SKIALITH_bench.writer.1.1767225600000001.42.1767225600000000000.7"
_SUBJECT = "skialith.bench.log.event.agent"
STEPS: dict[str, Callable[[], object]] = {
    "event_key": lambda: _fastpath.event_key("bench", "agent", "event"),
    "encode_record": lambda: _fastpath.encode_record(
        1, "agent", "event", _KEY, 1, "thought", 1_767_225_600_000_000, 0, BODY, None
    ),
    "record_headers and fence": lambda: (
        _fastpath.record_headers(_KEY) + _fastpath.fence(7, "skialith.bench.lease.agent")
    ),
    "hpub": lambda: _fastpath.hpub(_SUBJECT, "_INBOX.bench.1", _HEADERS, _RECORD),
    "parse_puback": lambda: _fastpath.parse_puback(_PUBACK),
    "parse_ack_subject": lambda: _fastpath.parse_ack_subject(_ACK_SUBJECT),
    "decode_record": lambda: _fastpath.decode_record(_RECORD),
}


@pytest.mark.parametrize("step", STEPS)
def test_step(benchmark: BenchmarkFixture, step: str, report: Report) -> None:
    benchmark.pedantic(STEPS[step], rounds=100, iterations=2000, warmup_rounds=5)
    assert benchmark.stats is not None
    report.figure(RECORD, step, duration(benchmark.stats["median"]))


# ---- memory


def memory_per_agent(url: str, agents: int) -> float:
    """Bytes of one more open agent that owns itself. Runs in the child."""
    settings = {"nats_url": url, "namespace": "memory", "writer": "off", "wal_bytes": 2**28}
    opened = [SkialithAgent(f"warm-{n}", **settings) for n in range(50)]
    for agent in opened:
        agent.resume()
    before = _resident()
    for n in range(agents):
        opened.append(SkialithAgent(f"agent-{n}", **settings))
        opened[-1].resume()
    used = _resident() - before
    for agent in opened:
        agent.close()
    return used / agents


def open_for_flight(url: str) -> None:
    """An agent that has appended before. Runs in the child."""
    agent = SkialithAgent("flight", nats_url=url, namespace="flight", writer="off", wal_bytes=2**28, timeout=25)
    agent.resume()
    for future in [agent.save_event_nowait(f"warm-{n}", PAYLOAD) for n in range(FLIGHT)]:
        future.result()
    _agents.append(agent)


def take_off() -> float:
    """Bytes for each record that waits for its PubAck, its future included. Runs in the child."""
    before = _resident()
    _futures.extend(_agents[0].save_event_nowait(f"e{n}", PAYLOAD) for n in range(FLIGHT))
    used = _resident() - before
    assert not any(future.done() for future in _futures)
    return used / FLIGHT


def land() -> None:
    for future in _futures:
        future.result()
    _agents.pop().close()


_agents: list[SkialithAgent] = []
_futures: list[Future[Ack]] = []


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory(benchmark: BenchmarkFixture, tmp_path: Path, report: Report) -> None:
    with NatsServer(tmp_path / "nats") as nats, Child() as child:
        per_agent = benchmark.pedantic(child.run, args=(memory_per_agent, nats.url, AGENTS), rounds=1, iterations=1)
        child.run(open_for_flight, nats.url)
        nats.pause()
        try:
            per_record = child.run(take_off)
        finally:
            nats.resume()
        child.run(land)
    report.figure(MEMORY, f"an agent that owns itself, of {AGENTS:,}", f"{per_agent:,.0f} bytes")
    report.figure(MEMORY, f"a record in flight and its future, of {FLIGHT:,}", f"{per_record:,.0f} bytes")
