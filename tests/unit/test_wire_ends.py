"""The wire by single cases: whoever waits is always settled, whatever raises, ends or comes in between."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import closing, nullcontext
from typing import Any

import pytest

from skialith.wal._waiting import Reply, Tally, Turn, Window
from skialith.wal._wire import LoopClosed, Unsettled
from tests.fixtures.wires import INBOX, HandDriven, LoopDriven, permitted, record

KEY = bytes(16)


class Interrupted(BaseException):
    """What a signal's handler raises."""


def message(token: int, data: bytes) -> bytes:
    return b"MSG %s.%d 1 %d\r\n%s\r\n" % (INBOX.encode(), token, len(data), data)


# ---- turns


def test_a_turn_that_was_given_back_meanwhile_is_taken_at_once() -> None:
    turn = Turn()
    assert turn.try_take()
    turn.give()
    assert turn.take_later(lambda _: pytest.fail("nobody gives it"))
    assert turn.taken


def test_whoever_queues_for_a_turn_gets_it_when_an_append_ends() -> None:
    with closing(LoopDriven()) as rig:
        given = threading.Event()
        turn = permitted()

        def queue_up(_: object) -> None:
            assert not turn.take_later(lambda _: given.set())
            rig.peer.sendall(message(token + 1, b'{"stream":"S","seq":7}'))

        def serve() -> None:
            assert rig.peer.recv(1 << 16).startswith(b"HPUB s ")
            rig.peer.sendall(message(token, b"x"))

        token = rig.wire.expect(queue_up)
        server = threading.Thread(target=serve)
        server.start()
        assert rig.wire.append(turn, Tally(), "s", record(1), time.monotonic() + 30) == (7, False)
        assert given.wait(30) and turn.taken
        server.join()


def test_a_record_that_is_durable_counts_although_a_handler_raises_behind_its_puback() -> None:
    with closing(HandDriven()) as rig:
        rig.peer.sendall(b"PING\r\n" + message(1, b'{"stream":"S","seq":7}'))  # of the PING the loop must be told
        rig.failures.append(Interrupted())
        turn, tally = permitted(b"Fence: 1\r\n", 1), Tally()
        with pytest.raises(Interrupted):
            rig.wire.append(turn, tally, "s", record(1), time.monotonic() + 30)
        assert tally.last_seq == 7, "a flush() would not wait for it"
        assert tally.appended_bytes > 0
        assert not turn.taken
        assert rig.wire.appending == 0


# ---- what belongs on the loop gets there


def test_replies_for_others_reach_the_loop_while_a_thread_waits_for_its_own() -> None:
    with closing(LoopDriven()) as rig:
        answered = threading.Event()
        token = rig.wire.expect(lambda _: answered.set())
        ended: list[object] = []
        turn = permitted()

        def work() -> None:
            ended.append(rig.wire.append(turn, Tally(), "s", record(1), time.monotonic() + 30))

        thread = threading.Thread(target=work)
        thread.start()
        assert rig.peer.recv(1 << 16).startswith(b"HPUB s ")
        rig.peer.sendall(message(token, b"first"))
        assert answered.wait(5), "the reply waits for another one's PubAck"
        assert not ended
        rig.peer.sendall(message(token + 1, b'{"stream":"S","seq":7}'))
        thread.join(10)
        assert ended == [(7, False)]


def test_a_callback_that_raises_keeps_nobody_else_waiting() -> None:
    with closing(HandDriven()) as rig:
        got: list[Reply | None] = []

        def fail(_: Reply | None) -> None:
            raise Interrupted

        tokens = [rig.wire.expect(got.append), rig.wire.expect(fail), rig.wire.expect(got.append)]
        rig.peer.sendall(b"".join(message(token, b"x") for token in tokens))
        with pytest.raises(Interrupted):
            rig.wire.on_ready()
        rig.turn()
        assert len(got) == 2


def test_the_end_of_a_connection_is_made_known_although_a_handler_raised() -> None:
    with closing(HandDriven()) as rig:
        got: list[Reply | None] = []
        rig.wire.expect(got.append)
        source = rig.wire.deliveries("S", "writer")
        rig.peer.close()
        rig.failures.append(Interrupted())
        with pytest.raises(Interrupted):
            rig.wire.append(permitted(), Tally(), "s", record(1), time.monotonic() + 5)
        rig.turn()
        assert rig.lost == [1] and got == [None] and source.arrived.is_set()


def test_the_loop_is_told_although_a_handler_raised() -> None:
    with closing(HandDriven()) as rig:
        got: list[int] = []
        rig.failures.append(Interrupted())
        with pytest.raises(Interrupted):
            rig.wire.hand_over(Turn(), 1, 1, got.append, 1)
        rig.turn()
        assert got == [1] and rig.wire.queued == 1
        assert rig.wire.hand_over(Turn(), 1, 1, got.append, 2)
        rig.turn()
        assert got == [1, 2]


def test_a_closed_loop_is_an_error_for_who_hands_over_and_for_nobody_else() -> None:
    with closing(HandDriven()) as rig:
        rig.failures.extend([RuntimeError("Event loop is closed")] * 99)
        with pytest.raises(LoopClosed):
            rig.wire.hand_over(Turn(), 1, 1, lambda _: None, None)
        rig.peer.sendall(message(1, b'{"stream":"S","seq":7}') + b"PING\r\n")
        assert rig.wire.append(permitted(), Tally(), "s", record(1), time.monotonic() + 5) == (7, False)


def test_what_waits_under_tls_is_taken_out_although_a_handler_raised() -> None:
    with closing(HandDriven(tls=True)) as rig:
        rig.failures.append(Interrupted())
        with pytest.raises(Interrupted):
            rig.wire.put(b"PING\r\n")
        assert len(rig.calls) == 1 and rig.sent() == b"PING\r\n"
        rig.wire.put(b"PONG\r\n")
        assert len(rig.calls) == 2 and rig.sent() == b"PONG\r\n"


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("tls", [False, True])
def test_a_record_that_is_on_its_way_stays_so_although_a_handler_raised(tls: bool, lost: bool) -> None:
    """Its turn is not free before its answer came, or the end of the connection, and it is counted out once."""
    with closing(HandDriven(tls=tls)) as rig:
        turn, answers = permitted(b"Fence: 1\r\n", 1), []

        def answered(_: None) -> None:
            answers.extend(window.answers())
            rig.wire.leave(turn, 1, 1)
            turn.give()

        window = Window(0, 1, answered)
        if lost:
            rig.peer.close()
        if lost or tls:
            rig.failures.append(Interrupted())  # else the loop need not be told
        with pytest.raises(Interrupted) if rig.failures else nullcontext():
            rig.wire.send(window, turn, "s", record(1), KEY, 1)
        assert window.sent
        assert (turn.taken, turn.waiting, rig.wire.queued) == (True, 1, 1)
        if not lost:
            assert rig.sent().startswith(b"HPUB s ")
            rig.give(message(1, b'{"stream":"S","seq":7}'))
        elif tls:
            rig.wire.detach(1)
        rig.turn()
        assert answers == [None if lost else (7, False)]
        assert (turn.taken, turn.waiting, rig.wire.queued) == (False, 0, 0)


def test_tls_without_a_loop_is_a_lost_connection() -> None:
    with closing(HandDriven(tls=True)) as rig:
        rig.failures.extend([RuntimeError("Event loop is closed")] * 3)
        with pytest.raises(Unsettled):
            rig.wire.append(permitted(), Tally(), "s", record(1), time.monotonic() + 5)
        rig.turn()
        assert rig.lost == [1] and not rig.wire.is_open


# ---- windows


def test_tokens_of_a_window_are_its_own_whatever_the_collector_runs() -> None:
    """Finalizers run, and other threads with them, wherever an object is made."""
    with closing(HandDriven()) as rig:
        got: list[object] = []

        class Registers:
            def __init__(self) -> None:
                self.itself = self

            def __del__(self) -> None:
                rig.wire.expect(got.append)

        threshold = gc.get_threshold()
        gc.set_threshold(1, 1, 1)
        messages = [("s", KEY, b"x"), ("s", KEY, b"y")]
        callback = got.append
        try:
            for _ in range(20):
                gc.collect()
                gc.disable()
                for _ in range(20):
                    Registers()
                gc.enable()
                window = rig.wire.pipeline(messages, b"", callback)
                assert window is not None
                lines = [line for line in rig.sent().split(b"\r\n") if line.startswith(b"HPUB")]
                tokens = [int(line.split()[2].rpartition(b".")[2]) for line in lines]
                rig.peer.sendall(b"".join(message(token, b'{"stream":"S","seq":%d}' % token) for token in tokens))
                rig.wire.on_ready()
                assert window.answers() == [(token, False) for token in tokens]
        finally:
            gc.set_threshold(*threshold)


@pytest.mark.parametrize("bad", [("s", None, b"x"), ("s", b"short", b"x"), ("s", KEY, None), (None, KEY, b"x")])
def test_a_window_that_cannot_be_sent_leaves_nothing_behind(bad: Any) -> None:
    with closing(HandDriven()) as rig:
        ended: list[None] = []
        with pytest.raises((TypeError, ValueError)):
            rig.wire.pipeline([("s", KEY, b"x"), bad], b"", ended.append)
        assert rig.wire.put(b"PING\r\n")
        assert rig.sent().endswith(b"\r\n\r\nx\r\nPING\r\n")
        rig.peer.close()
        rig.turn()
        assert rig.lost == [1] and not ended


def test_a_record_without_a_key_is_refused() -> None:
    with closing(HandDriven()) as rig:
        no_key: Any = None
        bad = record(1)._replace(key=no_key)
        turn = permitted()
        with pytest.raises(TypeError, match="key"):
            rig.wire.append(turn, Tally(), "s", bad, time.monotonic() + 1)
        assert not turn.taken and rig.sent() == b""


# ---- small things


@pytest.mark.parametrize("tls", [False, True])
def test_nothing_is_nothing(tls: bool) -> None:
    with closing(HandDriven(tls=tls)) as rig:
        assert rig.wire.put(b"")
        rig.wire.feed(b"")
        assert rig.sent() == b""


def test_a_notice_ends_no_pull() -> None:
    with closing(HandDriven()) as rig:
        source = rig.wire.deliveries("S", "writer")
        assert rig.wire.pull(source, "next", b"{}", 5)
        rig.give(message(1, b"") + b"HMSG %s.1 1 26 26\r\nNATS/1.0 100 Heartbeat\r\n\r\n\r\n" % INBOX.encode())
        assert (source.pulls, source.expected, source.take_status()) == (1, 5, None)
        rig.give(b"HMSG %s.1 1 28 28\r\nNATS/1.0 404 No Messages\r\n\r\n\r\n" % INBOX.encode())
        assert (source.pulls, source.expected, source.take_status()) == (0, 0, ("404", "No Messages"))


@pytest.mark.parametrize("deadline", [1e300, float("inf")])
def test_any_deadline_leaves_room_for_signals(deadline: float) -> None:
    with closing(HandDriven()) as rig:
        threading.Timer(0.05, rig.peer.sendall, [message(1, b'{"stream":"S","domain":"hub","seq":7}')]).start()
        assert rig.wire.append(permitted(), Tally(), "s", record(1), deadline) == (7, False)


def test_a_thread_waits_for_room_until_records_leave() -> None:
    with closing(HandDriven()) as rig:
        taken: list[int] = []
        wire, turn = rig.wire, Turn()
        assert wire.hand_over(turn, 1000, 1, lambda _: None, None)
        assert not wire.hand_over(Turn(), 1, 1, taken.append, 1)
        threading.Timer(0.05, wire.leave, [turn, 500, 1]).start()  # half of them: not at the first that leaves
        begun = time.monotonic()
        wire.wait_for_room(1.0)
        assert time.monotonic() - begun < 0.9
        assert wire.hand_over(Turn(), 1, 1, taken.append, 1)
        begun = time.monotonic()
        wire.wait_for_room(0.02)
        assert time.monotonic() - begun >= 0.02


def test_nothing_overtakes_what_was_handed_over_with_its_turn() -> None:
    with closing(HandDriven()) as rig:
        turn, deadline = permitted(), time.monotonic() + 5
        assert rig.wire.hand_over(turn, 1, 1, lambda _: None, None)
        assert rig.wire.append(turn, Tally(), "s", record(1), deadline) is None
        assert not turn.retire()
        rig.wire.leave(turn, 1, 1)
        rig.peer.sendall(message(1, b'{"stream":"S","seq":7}'))
        assert rig.wire.append(turn, Tally(), "s", record(1), deadline) == (7, False)
        assert turn.retire()
        assert rig.wire.append(turn, Tally(), "s", record(1), deadline) is None
        assert not rig.wire.hand_over(turn, 1, 1, lambda _: None, None)
        assert rig.wire.queued == 0


def test_a_handler_that_raises_what_a_closed_loop_raises_is_not_taken_for_one() -> None:
    with closing(HandDriven()) as rig:
        rig.failures.append(RuntimeError("of a signal's handler"))
        with pytest.raises(RuntimeError, match="handler"):
            rig.wire.hand_over(Turn(), 1, 1, lambda _: None, None)
        assert rig.wire.queued == 1


def test_what_the_loop_did_not_see_before_it_ended_is_given_back() -> None:
    with closing(HandDriven()) as rig:
        got: list[int] = []
        assert rig.wire.hand_over(Turn(), 1, 1, got.append, 1)
        assert rig.wire.end() == [(got.append, 1)]
        with pytest.raises(LoopClosed):  # although the loop was told and did not come
            rig.wire.hand_over(Turn(), 1, 1, got.append, 2)
        assert got == []
