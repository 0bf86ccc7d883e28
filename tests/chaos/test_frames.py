"""What can happen to the frames of a connection: cut, in pieces, late, slow, spoilt, and lines that nobody asked for."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.fixtures.nats import wait_until
from tests.fixtures.nats_proxy import NatsProxy

from .behind import UNAVAILABLE, finish, spawn
from .conftest import Report
from .evidence import APPENDS
from .world import ROUNDS, Child, World, rounds

pytestmark = pytest.mark.chaos
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


def test_cut_inside_a_frame(sqlite_world: World, nats_proxy: NatsProxy, report: Report) -> None:
    """The connection ends inside a PubAck, at each of its bytes in the long run, or inside a record that a writer pulls."""
    world, dice, cuts = sqlite_world, sqlite_world.dice, rounds(10)
    child = spawn(world, nats_proxy, agents=["one", "two"], threads=2, batches=0.4, pace=0.01)
    places = [
        place for _ in range(1 + cuts // PUBACK_BYTES) for place in dice.sample(range(PUBACK_BYTES), PUBACK_BYTES)
    ]
    for number, place in enumerate(places[:cuts]):
        if dice.random() < 0.7:
            nats_proxy.cut_inside("PUBACK", place, reset=dice.random() < 0.5)
        else:
            nats_proxy.cut_inside("HMSG", dice.randrange(1 << 20), reset=dice.random() < 0.5)
        wait_until(lambda number=number: nats_proxy.cuts > number, 20, "the cut")  # type: ignore[misc]
        child.wait_writes(3)
    finish(world, report, "15 cut inside a frame", cuts, UNAVAILABLE)


def test_frames_in_pieces(sqlite_world: World, nats_proxy: NatsProxy, report: Report) -> None:
    """All that the server says comes in pieces, down to single bytes, connecting included."""
    world, pieces = sqlite_world, [(1, 2), (7, 40)] * rounds(1)
    for smallest, longer in pieces:
        nats_proxy.dribble(smallest)
        settings = {"writer": "off"} if smallest == 1 else {}
        child = spawn(world, nats_proxy, agents=["one", "two"], threads=2, batches=0.3, settings=settings)
        child.wait_writes(20)
        nats_proxy.dribble(longer)
        child.wait_writes(20)
        assert child.stop() == 0, child.tail()
    nats_proxy.dribble(0)
    finish(world, report, "15 frames in pieces", len(pieces), set())


def test_a_server_that_answers_late(sqlite_world: World, nats_proxy: NatsProxy, report: Report) -> None:
    """PubAcks come after their callers gave up, some twice: every later call gets its own Ack."""
    world, late = sqlite_world, rounds(2)
    hasty = {"timeout": 1.0, "writer": "off"}
    children = [
        spawn(world, nats_proxy, agents=["one", "two"], threads=3, batches=0.3, retries=False, settings=hasty),
        spawn(world, nats_proxy, agents=["three"], threads=2, batches=0.3, settings={"timeout": 1.5}),
    ]
    nats_proxy.twice(0.3)
    for _ in range(late):
        nats_proxy.hold()
        for child in children:
            child.wait_for(lambda _, child=child: gave_up(child) > 0, "gives up")  # type: ignore[misc]
        print("late:", nats_proxy.release(shuffled=world.dice.random() < 0.5))
        for child in children:
            child.wait_writes(10)
    finish(world, report, "15 answers after the caller gave up", late, UNAVAILABLE)
    assert world.evidence().errors(*APPENDS)


def gave_up(child: Child) -> int:
    """How many of the last calls failed."""
    lines = [line for line in child.lines() if line["op"] in ("done", "fail")]
    return sum(line["op"] == "fail" for line in lines[-3:])


def test_a_slow_reader(sqlite_world: World, nats_proxy: NatsProxy, report: Report) -> None:
    """The server does not take what 64 threads push: calls fail by their deadlines, and all goes on when it reads again."""
    world, stops = sqlite_world, rounds(1)
    nats_proxy.held_bytes = 64 * 1024
    settings = {"timeout": 2.0, "writer": "off"}
    child = spawn(
        world, nats_proxy, agents=["one", "two", "three", "four"], threads=16, large=0.1, most=400, settings=settings
    )
    for _ in range(stops):
        nats_proxy.stall(True, "up")
        child.wait_for(lambda _: gave_up(child) > 0, "gives up")
        nats_proxy.rate(4e6, "up")
        nats_proxy.stall(False)
        child.wait_writes(30)
        nats_proxy.rate(0, "up")
        child.wait_writes(30)
    finish(world, report, "15 a slow reader", stops, UNAVAILABLE)


def test_a_slow_sender(sqlite_world: World, nats_proxy: NatsProxy, report: Report) -> None:
    """PubAcks come behind records that a writer pulls, all at 100 kB/s: late, but nothing is taken for lost."""
    world = sqlite_world
    child = spawn(world, nats_proxy, agents=["one", "two"], threads=4, batches=0.05, pace=0.02)
    nats_proxy.rate(1e5, "down")
    child.wait_writes(rounds(40))
    nats_proxy.rate(0, "down")
    finish(world, report, "15 a slow sender", 1, UNAVAILABLE)


def test_lines_between_the_frames(sqlite_world: World, nats_proxy: NatsProxy, report: Report) -> None:
    """Lines that mean nothing to an append leave the connection as it is; an error that ends it ends in a new one."""
    world, dice = sqlite_world, sqlite_world.dice
    child = spawn(world, nats_proxy, agents=["one", "two"], threads=3, batches=0.3, large=0.02, pace=0.01)
    connections = nats_proxy.accepted
    for line in LINES_THAT_CHANGE_NOTHING * rounds(1):
        assert nats_proxy.say(line) == 1
        child.wait_writes(5)
    told: list[dict[str, Any]] = [{}, {"ldm": True}, {"connect_urls": []}]
    for changes in told:
        assert nats_proxy.say_info(**changes) == 1
        child.wait_writes(5)
    assert nats_proxy.accepted == connections
    errors = dice.sample(ERRORS_OF_A_SERVER, 3) if ROUNDS <= 1 else ERRORS_OF_A_SERVER * rounds(1)
    for line in errors:
        assert renewed(nats_proxy, line), line
        child.wait_writes(5)
    finish(world, report, "15 lines between the frames", len(errors), UNAVAILABLE)


def renewed(nats_proxy: NatsProxy, raw: bytes) -> bool:
    """Whether what is put in ends in a new connection."""
    before = nats_proxy.accepted
    wait_until(lambda: nats_proxy.say(raw) == 1, RENEWED_SECONDS, "a connection to speak on")
    wait_until(lambda: nats_proxy.accepted > before, 2 * RENEWED_SECONDS, f"a new connection after {raw[:60]!r}")
    return True


def test_garbage_ends_in_a_clean_reconnect(sqlite_world: World, nats_proxy: NatsProxy, report: Report) -> None:
    """So do PubAcks that hold random bytes, or at least they end no call but their own."""
    world, dice = sqlite_world, random.Random(sqlite_world.seed)
    # Behind garbage in a buffer of over 4 KiB, as a writer's pulls fill it, nats-py's parser waits for the pings to fail.
    settings = {"writer": "off"} if ROUNDS <= 1 else {}
    child = spawn(world, nats_proxy, agents=["one", "two"], threads=3, batches=0.3, pace=0.01, settings=settings)
    garbage = [*dice.sample(GARBAGE, 4), dice.randbytes(dice.randrange(1, 300))]
    if ROUNDS > 1:
        garbage = [*GARBAGE, *(dice.randbytes(dice.randrange(1, 300)) for _ in range(rounds(3)))]
        garbage += GARBAGE_THAT_TAKES_A_PING_TIMEOUT
    for raw in garbage:
        assert renewed(nats_proxy, raw), raw
        child.wait_writes(5)
    spoilt = rounds(10)
    nats_proxy.spoil(spoilt)
    wait_until(lambda: nats_proxy.spoilt == spoilt, 30, "spoilt PubAcks")
    child.wait_writes(20)
    finish(world, report, "15 garbage", len(garbage), UNAVAILABLE)


def test_pubacks_that_are_swapped_are_caught(sqlite_world: World, nats_proxy: NatsProxy, report: Report) -> None:
    """A canary: the server is made to lie, as a client would seem that gives one caller another one's PubAck."""
    world = sqlite_world
    child = spawn(world, nats_proxy, agents=[f"a{n}" for n in range(6)], threads=2, batches=0.0)
    nats_proxy.hold()
    wait_until(lambda: nats_proxy.held >= 4, 20, "PubAcks to swap")
    nats_proxy.release(swapped=True)
    child.wait_writes(10)
    assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    report("canary: PubAcks swapped", 1, verdict)
    assert any("was acknowledged at" in text for text in verdict.problems), verdict
