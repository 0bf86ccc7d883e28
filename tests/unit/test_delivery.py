"""What the answers to a window of pipelined records mean for each of them, and whose turn it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skialith.errors import WalError, WalFull
from skialith.wal._waiting import Tally, Turn
from skialith.wal.delivery import Delivery
from skialith.wal.lane import Entry, Lane, Ticket, holding

FULL = json.dumps({"error": {"code": 503, "err_code": 10077, "description": "maximum bytes exceeded"}}).encode()


class Wire:
    """Counts what left."""

    def __init__(self) -> None:
        self.left = 0

    def leave(self, turn: Turn, records: int, size: int) -> None:
        self.left += records


class Calls:
    """A delivery without a server, and the entries of calls that wait in one lane."""

    def __init__(self, *counts: int) -> None:
        self.wire, self.tally = Wire(), Tally()
        connection, stream = SimpleNamespace(wire=self.wire), SimpleNamespace(tally=self.tally, name="S", max_bytes=1)
        self.delivery = Delivery(cast(Any, connection), cast(Any, stream), cast(Any, None), cast(Any, None))
        self.lane = Lane("a", ("s", "c"))
        self.tickets = [Ticket("a", count) for count in counts]
        for ticket in self.tickets:
            self.lane.queue.extend(Entry("s", b"k" * 16, b"", "", [], 10, ticket, 1e9) for _ in range(ticket.count))
        self.group = list(self.lane.queue)

    def settle(self, *answers: Any) -> list[bytes | None]:
        return self.delivery._settle(self.lane, self.group, list(answers))

    def error(self, number: int) -> WalError:
        with pytest.raises(WalError) as caught:
            self.tickets[number].promise.wait(0)
        return caught.value


def acked(*seqs: int) -> list[tuple[int, bool]]:
    return [(seq, False) for seq in seqs]


def test_a_window_that_is_stored_leaves_nothing() -> None:
    calls = Calls(2, 1)
    assert calls.settle(*acked(5, 6), (7, True)) == []
    assert [[ack.seq for ack in ticket.promise.wait(0)] for ticket in calls.tickets] == [[5, 6], [7]]
    assert not calls.lane.queue
    assert (calls.wire.left, calls.tally.last_seq) == (3, 7)


def test_what_has_no_answer_at_the_end_is_sent_again() -> None:
    calls = Calls(4)
    assert calls.settle(*acked(5, 6), None, None) == [None, None]
    assert [entry.unknown for entry in calls.lane.queue] == [True, True]
    assert not calls.tickets[0].promise.done
    assert [ack.seq for ack in calls.tickets[0].acks] == [5, 6]


def test_what_was_refused_at_the_end_may_be_sent_again_and_is_known_not_to_be_written() -> None:
    calls = Calls(3)
    assert calls.settle(*acked(5), FULL, FULL) == [FULL, FULL]
    assert [entry.unknown for entry in calls.lane.queue] == [False, False]


def test_a_fate_that_was_unknown_stays_so_when_it_is_refused_later() -> None:
    calls = Calls(1)
    calls.group[0].unknown = True
    assert calls.settle(FULL) == [FULL]
    assert calls.group[0].unknown


@pytest.mark.parametrize(("answer", "outcome"), [(FULL, "not_written"), (None, "unknown")])
def test_a_record_that_a_later_one_overtook_is_reported_and_never_sent_again(answer: Any, outcome: str) -> None:
    calls = Calls(1, 1, 1)
    assert calls.settle((5, False), answer, (6, False)) == []
    assert calls.error(1).outcome == outcome
    assert calls.error(1).retryable
    assert isinstance(calls.error(1), WalFull) == (answer is FULL)
    assert [calls.tickets[n].promise.wait(0)[0].seq for n in (0, 2)] == [5, 6]
    assert not calls.lane.queue


def test_a_call_that_was_overtaken_inside_gives_the_acks_up_to_there_and_may_be_written_behind() -> None:
    calls = Calls(4)
    calls.lane.queue.append(Entry("s", b"k" * 16, b"", "", [], 10, calls.tickets[0], 1e9))  # not sent yet
    assert calls.settle((5, False), FULL, (6, False), (7, False)) == []
    assert [ack.seq for ack in calls.tickets[0].acks] == [5]
    assert calls.error(0).outcome == "unknown"
    assert not calls.lane.queue
    assert (calls.wire.left, calls.tally.last_seq) == (5, 7)


# ---- turns


def test_a_turn_goes_to_whoever_waits_before_a_thread_gets_it() -> None:
    async def play() -> list[str]:
        turn, order = Turn(), list[str]()

        async def hold(name: str) -> None:
            async with holding(turn):
                order.append(name)
                await asyncio.sleep(0)
                assert not turn.try_take()

        assert turn.try_take()
        tasks = [asyncio.create_task(hold(name)) for name in "ab"]
        await asyncio.sleep(0)
        assert order == []
        turn.give()
        assert not turn.try_take()
        await asyncio.gather(*tasks)
        assert turn.try_take()
        return order

    assert asyncio.run(play()) == ["a", "b"]


def _while_queued(turn: Turn) -> None:
    """The turn is not given before the task is cancelled."""


def _given_but_not_noticed(turn: Turn) -> None:
    turn.give()


@pytest.mark.parametrize("meanwhile", [_while_queued, _given_but_not_noticed])
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_task_that_is_cancelled_while_it_waits_keeps_no_turn(meanwhile: Callable[[Turn], None], rounds: int) -> None:
    async def play() -> None:
        turn = Turn()

        async def hold() -> None:
            async with holding(turn):
                pass

        assert turn.try_take()
        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        meanwhile(turn)
        for _ in range(rounds):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        if meanwhile is _while_queued:
            turn.give()
        for _ in range(3):
            await asyncio.sleep(0)
        assert turn.try_take()

    asyncio.run(play())
