"""What can happen to the frames of a connection: cut, late, mixed, spoilt, too many, and lines that nobody asked for."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.fixtures.nats import wait_until
from tests.fixtures.nats_proxy import NatsProxy

from .conftest import Report
from .evidence import APPENDS
from .world import ROUNDS, Child, World, rounds

pytestmark = pytest.mark.chaos
UNAVAILABLE = {"WalUnavailable", "BatchFailed"}
PUBACK_BYTES = 160
"""Longer than any PubAck here, so that every place inside one is met."""
RENEWED_SECONDS = 15.0

LINES_THAT_CHANGE_NOTHING = [
    b"+OK\r\n",
    b"PING\r\n",
    b"PONG\r\n",
    b"-ERR 'Permissions Violation for Publish to \"skialith.other\"'\r\n",
    b"-ERR 'Permissions Violation for Subscription to \"other.>\"'\r\n",
    b"MSG _INBOX.nobody.1 99999 2\r\n{}\r\n",
    b"HMSG _INBOX.nobody.1 99999 12 14\r\nNATS/1.0\r\n\r\n{}\r\n",
]
ERRORS_OF_A_SERVER = [
    b"-ERR 'Maximum Payload Violation'\r\n",
    b"-ERR 'maximum control line exceeded'\r\n",
    b"-ERR 'Parser Error'\r\n",
    b"-ERR 'Stale Connection'\r\n",
    b"-ERR 'Slow Consumer'\r\n",
    b"-ERR 'Secure Connection - TLS Required'\r\n",
    b"-ERR 'Invalid Subject'\r\n",
]
GARBAGE = [
    b"\r\n",
    b"MSG\r\n",
    b"MSG a b c\r\n",
    b"MSG _INBOX.x 1 -5\r\n",
    b"MSG _INBOX.x 1 10\r\nabc",
    b"HMSG _INBOX.x 1 9\r\n",
    b"HMSG _INBOX.x 1 50 10\r\nNATS/1.0\r\n\r\n\r\n",
    b"-ERR\r\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"\x00" * 64,
    b"\xff\xfe\r\n",
]
GARBAGE_THAT_TAKES_A_PING_TIMEOUT = [b"x" * 8192, b"MSG _INBOX.x 1 999999999\r\n", b"INFO {not json}\r\n"]
"""nats-py waits for the end of a frame that has none, or stops reading, until its pings fail; too slow for the short run."""


@pytest.fixture
def proxy(sqlite_world: World) -> Iterator[NatsProxy]:
    server = urlsplit(sqlite_world.nats_url)
    with NatsProxy(server.hostname or "", server.port or 0, sqlite_world.seed) as each:
        yield each


def spawn(world: World, proxy: NatsProxy, *, settings: dict[str, Any] | None = None, **given: Any) -> Child:
    """A child whose connection goes through the proxy."""
    through = {"nats_url": f"nats://127.0.0.1:{proxy.port}", **(settings or {})}
    child = world.spawn(settings=through, **given)
    child.wait_ready()
    return child


def finish(world: World, report: Report, scenario: str, runs: int, allowed: set[str], **expected: Any) -> None:
    """Stop the children in order and judge; ``allowed``: the errors that calls may have had."""
    world.hurry()  # a writer's last flush waits for what was delivered on a connection that is gone
    for child in list(world.children):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(**expected)
    report(scenario, runs, verdict)
    assert not verdict.problems, str(verdict)
    errors = world.evidence().errors(*APPENDS)
    assert errors <= allowed, errors


def test_cut_inside_a_frame(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """The connection ends inside a PubAck, at each of its bytes in the long run, or inside a record that a writer pulls."""
    world, dice, cuts = sqlite_world, sqlite_world.dice, rounds(10)
    child = spawn(world, proxy, agents=["one", "two"], threads=2, batches=0.4, pace=0.01)
    places = [
        place for _ in range(1 + cuts // PUBACK_BYTES) for place in dice.sample(range(PUBACK_BYTES), PUBACK_BYTES)
    ]
    for number, place in enumerate(places[:cuts]):
        if dice.random() < 0.7:
            proxy.cut_inside("PUBACK", place, reset=dice.random() < 0.5)
        else:
            proxy.cut_inside("HMSG", dice.randrange(1 << 20), reset=dice.random() < 0.5)
        wait_until(lambda number=number: proxy.cuts > number, 20, "the cut")  # type: ignore[misc]
        child.wait_writes(3)
    finish(world, report, "15 cut inside a frame", cuts, set(), steady=True)


def test_frames_in_pieces(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """All that the server says comes in pieces, down to single bytes, connecting included."""
    world, pieces = sqlite_world, [(1, 2), (7, 40)] * rounds(1)
    for smallest, longer in pieces:
        proxy.dribble(smallest)
        settings = {"writer": "off"} if smallest == 1 else {}
        child = spawn(world, proxy, agents=["one", "two"], threads=2, batches=0.3, settings=settings)
        child.wait_writes(20)
        proxy.dribble(longer)
        child.wait_writes(20)
        assert child.stop() == 0, child.tail()
    proxy.dribble(0)
    finish(world, report, "15 frames in pieces", len(pieces), set(), steady=True)


def test_reconnects_with_hundreds_in_flight(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """What is cut off was stored and its PubAck is lost, or it never arrived: both are sent again, and stored once."""
    world, dice, cuts = sqlite_world, sqlite_world.dice, rounds(6)
    child = spawn(world, proxy, agents=["one", "two", "three"], threads=4, batches=0.4, most=900)
    most = 0
    for _ in range(cuts):
        if dice.random() < 0.5:
            proxy.hold()
        else:
            proxy.stall(True, "up")
        time.sleep(dice.uniform(0.02, 0.3))
        most = max(most, child.in_flight())
        proxy.cut(reset=dice.random() < 0.5)
        proxy.release()
        proxy.stall(False)
        child.wait_writes(12)
    print(f"at most {most} in flight")
    assert most >= 300
    finish(world, report, "15 reconnect with hundreds in flight", cuts, set(), steady=True)


def test_a_server_that_answers_late(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """PubAcks come after their callers gave up, some twice: every later call gets its own Ack."""
    world, late = sqlite_world, rounds(2)
    hasty = {"timeout": 1.0, "writer": "off"}
    children = [
        spawn(world, proxy, agents=["one", "two"], threads=3, batches=0.3, retries=False, settings=hasty),
        spawn(world, proxy, agents=["three"], threads=2, batches=0.3, settings={"timeout": 1.5}),
    ]
    proxy.twice(0.3)
    for _ in range(late):
        proxy.hold()
        for child in children:
            child.wait_for(lambda _, child=child: gave_up(child) > 0, "gives up")  # type: ignore[misc]
        print("late:", proxy.release(shuffled=world.dice.random() < 0.5))
        for child in children:
            child.wait_writes(10)
    finish(world, report, "15 answers after the caller gave up", late, UNAVAILABLE, steady=True)
    assert world.evidence().errors(*APPENDS)


def gave_up(child: Child) -> int:
    """How many of the last calls failed."""
    lines = [line for line in child.lines() if line["op"] in ("done", "fail")]
    return sum(line["op"] == "fail" for line in lines[-3:])


def test_pubacks_out_of_order_and_twice(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """Nobody gets another one's Ack, and nobody waits for ever."""
    world, mixes = sqlite_world, rounds(60)
    spawn(world, proxy, agents=[f"a{n}" for n in range(6)], threads=3, batches=0.1, most=300)
    proxy.twice(0.2)
    proxy.hold()
    most = 0
    for _ in range(mixes):
        time.sleep(world.dice.uniform(0.001, 0.04))
        most = max(most, proxy.release(shuffled=True, on=True))
    proxy.release()
    print(f"at most {most} PubAcks mixed")
    assert most >= 4
    finish(world, report, "15 PubAcks out of order and twice", mixes, set(), steady=True)


def test_a_slow_reader(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """The server does not take what 64 threads push: calls fail by their deadlines, and all goes on when it reads again."""
    world, stops = sqlite_world, rounds(1)
    proxy.held_bytes = 64 * 1024
    settings = {"timeout": 2.0, "writer": "off"}
    child = spawn(
        world, proxy, agents=["one", "two", "three", "four"], threads=16, large=0.1, most=400, settings=settings
    )
    for _ in range(stops):
        proxy.stall(True, "up")
        child.wait_for(lambda _: gave_up(child) > 0, "gives up")
        proxy.rate(4e6, "up")
        proxy.stall(False)
        child.wait_writes(30)
        proxy.rate(0, "up")
        child.wait_writes(30)
    finish(world, report, "15 a slow reader", stops, UNAVAILABLE, steady=True)


def test_a_slow_sender(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """PubAcks come behind records that a writer pulls, all at 100 kB/s: late, but nothing is taken for lost."""
    world = sqlite_world
    child = spawn(world, proxy, agents=["one", "two"], threads=4, batches=0.05, pace=0.02)
    proxy.rate(1e5, "down")
    child.wait_writes(rounds(40))
    proxy.rate(0, "down")
    finish(world, report, "15 a slow sender", 1, UNAVAILABLE, steady=True)


def test_lines_between_the_frames(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """Lines that mean nothing to an append leave the connection as it is; an error that ends it ends in a new one."""
    world, dice = sqlite_world, sqlite_world.dice
    child = spawn(world, proxy, agents=["one", "two"], threads=3, batches=0.3, large=0.02)
    connections = proxy.accepted
    for line in LINES_THAT_CHANGE_NOTHING * rounds(1):
        assert proxy.say(line) == 1
        child.wait_writes(5)
    told: list[dict[str, Any]] = [{}, {"ldm": True}, {"connect_urls": []}]
    for changes in told:
        assert proxy.say_info(**changes) == 1
        child.wait_writes(5)
    assert proxy.accepted == connections
    errors = dice.sample(ERRORS_OF_A_SERVER, 3) if ROUNDS <= 1 else ERRORS_OF_A_SERVER * rounds(1)
    for line in errors:
        assert renewed(proxy, line), line
        child.wait_writes(5)
    finish(world, report, "15 lines between the frames", len(errors), UNAVAILABLE, steady=True)


def renewed(proxy: NatsProxy, raw: bytes) -> bool:
    """Whether what is put in ends in a new connection."""
    before = proxy.accepted
    wait_until(lambda: proxy.say(raw) == 1, RENEWED_SECONDS, "a connection to speak on")
    wait_until(lambda: proxy.accepted > before, 2 * RENEWED_SECONDS, f"a new connection after {raw[:60]!r}")
    return True


def test_garbage_ends_in_a_clean_reconnect(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """So do PubAcks that hold random bytes, or at least they end no call but their own."""
    world, dice = sqlite_world, random.Random(sqlite_world.seed)
    child = spawn(world, proxy, agents=["one", "two"], threads=3, batches=0.3)
    garbage = [*dice.sample(GARBAGE, 4), dice.randbytes(dice.randrange(1, 300))]
    if ROUNDS > 1:
        garbage = [*GARBAGE, *(dice.randbytes(dice.randrange(1, 300)) for _ in range(rounds(3)))]
        garbage += GARBAGE_THAT_TAKES_A_PING_TIMEOUT
    for raw in garbage:
        assert renewed(proxy, raw), raw
        child.wait_writes(5)
    spoilt = rounds(10)
    proxy.spoil(spoilt)
    wait_until(lambda: proxy.spoilt == spoilt, 30, "spoilt PubAcks")
    child.wait_writes(20)
    finish(world, report, "15 garbage", len(garbage), UNAVAILABLE, steady=True)


def test_pubacks_that_are_swapped_are_caught(sqlite_world: World, proxy: NatsProxy, report: Report) -> None:
    """A canary: the server is made to lie, as a client would seem that gives one caller another one's PubAck."""
    world = sqlite_world
    child = spawn(world, proxy, agents=[f"a{n}" for n in range(6)], threads=2, batches=0.0)
    proxy.hold()
    wait_until(lambda: proxy.held >= 4, 20, "PubAcks to swap")
    proxy.release(swapped=True)
    child.wait_writes(10)
    assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report("canary: PubAcks swapped", 1, verdict)
    assert any("was acknowledged at" in text for text in verdict.problems), verdict
