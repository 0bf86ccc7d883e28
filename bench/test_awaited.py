"""Question: what does an awaited save_event cost beside the blocking one, and beside nats-py awaited on the same loop?

The sides take turns in short blocks; a block of awaited calls is one run of the loop, in which each call is timed.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import nats as nats_py
from pytest_benchmark.fixture import BenchmarkFixture

from skialith import AsyncSkialithAgent, SkialithAgent
from tests.fixtures.nats import NatsServer

from .child import LOOPS, Child, Loop
from .measure import BLOCK, BLOCK_WARM_UP, FEW_ROUNDS, Samples, collect, median_ratio, scaled, timed
from .report import NO_SYNC, Report, rate
from .sides import BODY, PAYLOAD, _new_loop

CALLS = scaled(2000)
TOGETHER = scaled(5000)
QUESTION = f"Awaited on the caller's loop ({FEW_ROUNDS} rounds of {CALLS} calls of each)"
BLOCKING, AWAITED, NATS = "save_event, blocking", "await save_event", "await js.publish() of nats-py"
MANY = f"{TOGETHER} in one asyncio.gather"


async def _timed(call: Callable[[], Awaitable[object]]) -> list[float]:
    clock = time.perf_counter
    taken = []
    for _ in range(BLOCK_WARM_UP + BLOCK):
        began = clock()
        await call()
        taken.append(clock() - began)
    return taken[BLOCK_WARM_UP:]


def one_round(url: str, calls: int, together: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each call of each side, and events per second of one gather. Runs in the child."""
    settings: dict[str, Any] = {
        "nats_url": url,
        "namespace": f"b{secrets.token_hex(6)}",
        "writer": "off",
        "wal_bytes": 2**30,
    }
    numbers = itertools.count()
    loop = _new_loop()
    with ExitStack() as stack:
        blocking = stack.enter_context(SkialithAgent("blocking", **settings))
        blocking.resume()
        awaited = AsyncSkialithAgent("awaited", **settings)
        loop.run_until_complete(awaited.resume())
        client = loop.run_until_complete(nats_py.connect(url))
        context, stream = client.jetstream(), f"AWAITED_{secrets.token_hex(6)}"
        loop.run_until_complete(context.add_stream(name=stream, subjects=[f"{stream}.*"]))

        def publish() -> Awaitable[object]:
            return context.publish(f"{stream}.a", BODY, headers={"Nats-Msg-Id": secrets.token_hex(16)})

        def save() -> Awaitable[object]:
            return awaited.save_event(f"e{next(numbers)}", PAYLOAD)

        taken: dict[str, list[float]] = {BLOCKING: [], AWAITED: [], NATS: []}
        for _ in range(calls // BLOCK):
            seconds = timed(lambda: blocking.save_event(f"e{next(numbers)}", PAYLOAD), BLOCK_WARM_UP + BLOCK)
            taken[BLOCKING] += seconds[BLOCK_WARM_UP:]
            taken[AWAITED] += loop.run_until_complete(_timed(save))
            taken[NATS] += loop.run_until_complete(_timed(publish))

        async def gather() -> float:
            began = time.perf_counter()
            await asyncio.gather(*(save() for _ in range(together)))
            return together / (time.perf_counter() - began)

        per_second = loop.run_until_complete(gather())
        loop.run_until_complete(context.delete_stream(stream))
        loop.run_until_complete(client.close())
        loop.run_until_complete(awaited.close())
    loop.close()
    return taken, per_second


def test_awaited(benchmark: BenchmarkFixture, nats: NatsServer, report: Report) -> None:
    measured: dict[Loop, dict[str, Samples]] = {loop: {} for loop in LOOPS}
    rates: dict[Loop, list[float]] = {loop: [] for loop in LOOPS}
    with ExitStack() as stack:
        children = {loop: stack.enter_context(Child(loop)) for loop in LOOPS}

        def take_round() -> None:
            for loop, child in children.items():
                taken, per_second = child.run(one_round, nats.url, CALLS, TOGETHER)
                collect(measured[loop], taken)
                rates[loop].append(per_second)

        benchmark.pedantic(take_round, rounds=FEW_ROUNDS, iterations=1)
    for loop, sides in measured.items():
        for name, samples in sides.items():
            ratio = f"{samples.over(sides[BLOCKING], 50):.2f} x blocking, {samples.over(sides[NATS], 50):.2f} x nats-py"
            report.latency(QUESTION, f"{name} ({loop})", samples, NO_SYNC, ratio)
        figure = rate(statistics.median(rates[loop]), "events")
        ratio = f"{median_ratio(rates[loop], [1 / statistics.mean(each) for each in sides[AWAITED].rounds]):.1f} x one by one"
        report.figure(QUESTION, f"await save_event, {MANY} ({loop})", figure, NO_SYNC, ratio)
