"""skialith.wal._wire against the plain Python oracle, on any bytes a server may send, cut anywhere, through both ways in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skialith.wal._waiting import Deliveries, Reply, Tally, Turn, Window
from skialith.wal._wire import Unsettled
from tests.fixtures.wires import INBOX, HandDriven, permitted, record

from .stream_oracle import Pull, Routing, Source

EXAMPLES = max(100, round(25 * float(os.environ.get("SKIALITH_CHAOS_ROUNDS", "1"))))
LONGEST_LINE, LONGEST_MESSAGE = 220, 2000
KEY = bytes(16)

# Tokens as the rig below registers them.
CALLBACKS, WINDOW, PULLS, APPEND = range(1, 4), range(4, 8), range(8, 11), 11

digits = st.integers(0, 2**64 + 1).map(lambda n: b"%d" % n)
word = st.binary(min_size=1, max_size=12).map(lambda data: data.translate(None, b" \t\n") or b"x")
odd_word = st.one_of(word, digits, st.sampled_from([b"00", b"01", b"+1", b"", b"18446744073709551616"]))
token = st.one_of(st.integers(0, 12), st.integers(0, 2**64 + 1)).map(lambda n: b"%s.%d" % (INBOX.encode(), n))
subject = st.one_of(token, token, word, odd_word.map(lambda w: INBOX.encode() + b"." + w))
numbers = st.lists(st.one_of(st.integers(1, 9).map(lambda n: b"%d" % n), digits), min_size=5, max_size=5)
consumer = st.sampled_from([b"S.writer", b"S.writer", b"S.traces", b"S.other", b"S", b"S.writer.more"])
ack_subject = st.one_of(
    st.builds(lambda name, ends: b".".join([b"$JS.ACK", name, *ends]), consumer, numbers),
    st.builds(
        lambda name, ends, tail: b".".join([b"$JS.ACK._.hash", name, *ends, *tail]),
        consumer,
        numbers,
        st.lists(word, max_size=2),
    ),
)
reply = st.one_of(st.none(), ack_subject, ack_subject, word, st.just(b"$JS.ACK."))
body = st.one_of(
    st.builds(
        lambda domain, gap, seq, tail: b'{"stream":"S"%s,%s"seq":%d%s}' % (domain, gap, seq, tail),
        st.sampled_from([b"", b',"domain":"hub"', b',"domain":"h\xc3\xa9"']),
        st.sampled_from([b"", b" "]),
        st.integers(0, 2**64),
        st.sampled_from([b"", b"", b',"duplicate": true', b',"duplicate":true', b',"count":2']),
    ),
    st.just(b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"},"stream":"S","seq":0}'),
    st.binary(max_size=40),
    st.sampled_from([b"", b"\r\n", b"MSG a 1 0\r\n\r\n", bytes(1500)]),
)
head = st.one_of(
    st.sampled_from(
        [
            b"NATS/1.0 503\r\n\r\n",
            b"NATS/1.0 100 Idle Heartbeat\r\n\r\n",
            b"NATS/1.0 404 No Messages\r\n\r\n",
            b"NATS/1.0 409 Message Size Exceeds MaxBytes\r\nNats-Pending-Messages: 3\r\n\r\n",
            b"NATS/1.0\r\nNats-Time-Stamp: x:y\r\nBad\r\n\r\n",
        ]
    ),
    st.binary(max_size=20),
)
gap = st.sampled_from([b" ", b" ", b" ", b"\t", b"  ", b" \t "])


def msg(subject: bytes, reply: bytes | None, body: bytes, gap: bytes = b" ") -> bytes:
    words = [b"MSG", subject, b"1", *([reply] if reply is not None else []), b"%d\r\n" % len(body)]
    return b"MSG " + gap.join(words)[4:].lstrip(b" \t") + body + b"\r\n"


def hmsg(subject: bytes, reply: bytes | None, head: bytes, body: bytes, gap: bytes = b" ") -> bytes:
    sizes = b"%d%s%d\r\n" % (len(head), gap, len(head) + len(body))
    words = [b"HMSG", subject, b"1", *([reply] if reply is not None else []), sizes]
    return gap.join(words).replace(b"HMSG" + gap, b"HMSG ", 1) + head + body + b"\r\n"


others = st.sampled_from(
    [
        b"PING\r\n",
        b"PONG\r\n",
        b"+OK\r\n",
        b"-ERR 'Slow Consumer'\r\n",
        b'INFO {"server_id":"X","ldm":true}\r\n',
        b"\r\n",
        b"msg a 1 0\r\n\r\n",
        b"MSGS 1\r\n",
        b"PING\n",
        b"x" * (LONGEST_LINE - 2) + b"\r\n",
    ]
)
good = st.one_of(
    st.builds(msg, subject, reply, body, gap), st.builds(hmsg, subject, reply, head, body, gap), others, others
)
bad = st.one_of(
    st.builds(lambda words: b"MSG " + b" ".join(words) + b"\r\n", st.lists(odd_word, max_size=7)),
    st.builds(lambda words, end: b"HMSG " + b" ".join(words) + end, st.lists(odd_word, max_size=7), others),
    st.sampled_from(
        [
            b"MSG \r\n",
            b"MSG \n",
            b"HMSG \r\n",
            b"HMSG \n",
            b"MSG a 1 2\n",
            b"MSG a 1 0\r\nxx",
            b"HMSG a 1 3 2\r\n",
            b"MSG a 1 2001\r\n",
            b"MSG a 1 1099511627777\r\n",
            b"x" * LONGEST_LINE,
            b"MSG " + b"x" * LONGEST_LINE + b" 1 0\r\n\r\n",
        ]
    ),
    st.binary(max_size=30),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Valid frames with bytes changed, dropped, doubled or put in."""
    data = bytearray(b"".join(draw(st.lists(good, min_size=1, max_size=8))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 2)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                del data[at : at + draw(st.integers(1, 9))]
            case _:
                data[at:at] = draw(st.binary(max_size=9))
    return bytes(data)


valid = st.lists(good, max_size=12).map(b"".join)
anything = st.one_of(
    valid, damaged(), st.lists(st.one_of(good, bad), max_size=10).map(b"".join), st.binary(max_size=300)
)
ways = pytest.mark.parametrize("tls", [False, True], ids=["socket", "TLS"])


class Rig(HandDriven):
    """Somebody waits for everything there is to wait for."""

    def __init__(self, tls: bool) -> None:
        super().__init__(tls=tls, limits=(LONGEST_LINE, LONGEST_MESSAGE, 10, 1000))
        self.replies: list[tuple[int, dict[str, str] | None, bytes]] = []
        self.ends: list[int] = []
        self.settled = 0
        for number in CALLBACKS:
            assert self.wire.expect(self._callback(number)) == number
        window = self.wire.pipeline([("s", KEY, b"x")] * len(WINDOW), b"", self._on_window)
        assert window is not None
        self.window: Window = window
        self.sources: dict[bytes, Deliveries] = {
            b"S.writer": self.wire.deliveries("S", "writer"),
            b"S.traces": self.wire.deliveries("S", "traces"),
        }
        for (name, batch), _ in zip(((b"S.writer", 1), (b"S.writer", 3), (b"S.traces", 2)), PULLS, strict=True):
            assert self.wire.pull(self.sources[name], "next", b"{}", batch)
        self.oracle = Routing(
            INBOX.encode(),
            {*CALLBACKS, *WINDOW},
            set(WINDOW),
            {b"S.writer": Source([Pull(8, 1), Pull(9, 3)]), b"S.traces": Source([Pull(10, 2)])},
            LONGEST_LINE,
            LONGEST_MESSAGE,
        )
        self.sent()

    def _callback(self, number: int) -> Callable[[Reply | None], None]:
        def on_reply(reply: Reply | None) -> None:
            if reply is None:
                self.ends.append(number)
            else:
                self.replies.append((number, reply.headers, reply.data))

        return on_reply

    def _on_window(self, _: None) -> None:
        self.settled += 1

    def compare(self) -> None:
        """The wire and the oracle, after the same bytes."""
        oracle = self.oracle
        assert self.link.broken == oracle.broken
        assert self.lost == [1] * oracle.broken
        assert self.rest == oracle.rest
        assert self.replies == oracle.replies
        assert self.window.answers() == [oracle.answers.get(number) for number in WINDOW]
        complete = all(number in oracle.answers for number in WINDOW)
        assert self.settled == (complete or oracle.broken)
        assert self.window.lost == (oracle.broken and not complete)
        assert self.ends == (list(CALLBACKS) if oracle.broken else [])
        for name, source in self.sources.items():
            expected = Source(status=oracle.sources[name].status) if oracle.broken else oracle.sources[name]
            messages = source.take(1000, 1 << 20, 0.0)
            assert [tuple(message) for message in messages] == expected.messages
            assert (source.pulls, source.expected) == (len(expected.pulls), expected.expected)
            assert source.take_status() == expected.status
            assert source.arrived.is_set() == (oracle.broken or expected.arrived)
            assert (len(source), source.size) == (0, 0)

    def compare_ends(self) -> None:
        """Nobody waits any more once the connection is gone."""
        self.wire.detach(1)
        self.turn()
        self.turn()
        assert self.ends == list(CALLBACKS) and self.settled == 1
        assert self.lost == [1] * self.oracle.broken
        assert not self.wire.is_open and not self.wire.put(b"PING\r\n")


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


@ways
@settings(max_examples=EXAMPLES)
@given(data=anything, places=st.lists(st.integers(0, 4000), max_size=12))
@example(data=b"MSG \r\n", places=[])
@example(data=b"x" * LONGEST_LINE, places=[LONGEST_LINE - 1])
@example(data=msg(b"_INBOX.abc.4", None, b'{"stream":"S", "seq":5}') * 2, places=list(range(80)))
@example(data=b"HMSG _INBOX.abc.8 1 0 0\r\n\r\n", places=[])
def test_any_stream_cut_anywhere(tls: bool, data: bytes, places: list[int]) -> None:
    with closing(Rig(tls)) as rig:
        for piece in cut(data, places):
            rig.give(piece)
        rig.oracle.take(data)
        rig.compare()
        rig.compare_ends()


@ways
@settings(max_examples=EXAMPLES // 4)
@given(data=valid)
def test_every_single_cut(tls: bool, data: bytes) -> None:
    """Byte by byte: every boundary at once."""
    with closing(Rig(tls)) as rig:
        for at in range(min(len(data), 600)):
            rig.give(data[at : at + 1])
        rig.give(data[600:])
        rig.oracle.take(data)
        rig.compare()


def outcome(append: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return append(*arguments)
    except Unsettled:
        return Unsettled


@settings(max_examples=EXAMPLES)
@given(
    before=st.lists(st.one_of(good, good, good, bad), max_size=5).map(b"".join),
    answer=st.one_of(
        st.builds(msg, st.just(b"_INBOX.abc.11"), reply, body),
        st.builds(hmsg, st.just(b"_INBOX.abc.11"), reply, head, body),
        st.just(b""),
    ),
    after=st.lists(st.one_of(good, bad), max_size=5).map(b"".join),
)
def test_an_append_finds_its_answer_in_any_stream(before: bytes, answer: bytes, after: bytes) -> None:
    with closing(Rig(tls=False)) as rig:
        data = before + answer + after
        rig.oracle.waiting.add(APPEND)
        rig.oracle.single.add(APPEND)
        rig.oracle.take(data)
        rig.peer.sendall(data)
        turn, tally = permitted(b"Fence: 1\r\n", 1), Tally()
        expected = rig.oracle.answers.get(APPEND)
        seconds = 0.002 if expected is None and not rig.oracle.broken else 60.0
        found = outcome(rig.wire.append, turn, tally, "s", record(1), time.monotonic() + seconds)
        rig.turn()
        refused = isinstance(expected, bytes) and (not expected or b'"error"' in expected)
        if isinstance(expected, tuple):
            assert found == expected
            assert tally.last_seq == expected[0]
        else:
            # What is neither a PubAck nor a refusal says no more than no answer.
            assert found is (None if refused else Unsettled)
            assert tally.last_seq == 0
        if isinstance(expected, tuple) or refused:
            assert not turn.suspect
        else:
            assert turn.suspect and outcome(rig.wire.append, turn, tally, "s", record(1), 0.0) is None
        assert not turn.taken and rig.wire.appending == 0
        rig.compare()
        rig.compare_ends()


@ways
@settings(max_examples=EXAMPLES // 4)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 1000, 65_000, 70_000, 300_000, 1_100_000]), min_size=1, max_size=4),
    piece=st.sampled_from([1000, 4096, 65_536, 100_000, 1 << 22]),
)
def test_large_messages_come_whole(tls: bool, sizes: list[int], piece: int) -> None:
    with closing(HandDriven(tls=tls)) as rig:
        source = rig.wire.deliveries("S", "writer")
        bodies = [bytes([n + 1]) * size for n, size in enumerate(sizes)]
        data = b"".join(msg(b"s.%d" % n, b"$JS.ACK.S.writer.1.2.3.4.5", body) for n, body in enumerate(bodies))
        rig.peer.setblocking(False)
        while data:
            sent = piece if tls else 0
            if tls:
                rig.wire.feed(data[:piece])
            else:
                try:
                    sent = rig.peer.send(data[:piece])
                except BlockingIOError:
                    rig.turn()
            data = data[sent:]
        rig.turn()
        taken = source.take(10, 1 << 30, 0.0)
        assert [message.data for message in taken] == bodies
        assert [message.subject for message in taken] == [f"s.{n}" for n in range(len(sizes))]


def test_a_turn_that_waits_is_not_taken_from_a_thread() -> None:
    turn = Turn()
    given: list[None] = []
    assert turn.take_later(given.append)
    assert not turn.take_later(given.append) and not turn.try_take()
    turn.give()
    assert given == [None] and turn.taken
    turn.give()
    assert not turn.taken
