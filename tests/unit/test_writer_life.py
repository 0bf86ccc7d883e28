"""A drain as threads: start, stop in every state, and the ack wait of a transaction that runs long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from random import Random

import pytest

from skialith.errors import StoreUnavailable, WalUnavailable
from skialith.records import DeadLetter, Message
from skialith.writer import drain as drain_module
from skialith.writer.drain import Drain
from skialith.writer.sinks import EventSink, TraceSink

from ..fixtures.writer_fakes import NAMESPACE, Clock, FakeDatabase, FakeSource, Journal, message

SECONDS = 20.0


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {SECONDS} s: {what}"
        time.sleep(0.002)


class RealTime(Clock):
    def __call__(self) -> float:
        return time.monotonic()


class BlockingSource(FakeSource):
    """As the real one it blocks for ``wait`` seconds when there is nothing."""

    def __init__(self, messages: list[Message], journal: Journal) -> None:
        super().__init__(RealTime(), messages, journal)
        self.arrived = threading.Event()

    def pull(self, rows: int, size: int, linger: float, wait: float) -> list[Message]:
        self.clock.now = time.monotonic()
        pulled = super().pull(rows, size, linger, 0.0)
        if not pulled:
            self.arrived.wait(wait)
        return pulled


class Ends:
    def __init__(self, count: int) -> None:
        self.journal: Journal = []
        self.source = BlockingSource([message(seq) for seq in range(1, count + 1)], self.journal)
        self.database = FakeDatabase(self.journal)
        self.drain = Drain(self.source, EventSink(self.database), NAMESPACE, random=Random(1))


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends(5)
    yield made
    made.drain.stop(SECONDS)


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_it_runs_on_named_daemon_threads_and_leaves_none_behind(ends: Ends) -> None:
    before = names()
    ends.drain.start()
    wait_for(lambda: not ends.source.due, "everything acknowledged")
    new = [thread for thread in threading.enumerate() if thread.name not in before]
    assert {thread.name for thread in new} == {"skialith-writer", "skialith-writer-keep"}
    assert all(thread.daemon for thread in new)
    assert ends.drain.status().running
    assert ends.drain.stop(SECONDS)
    assert not ends.drain.status().running
    assert names() <= before


def test_the_trace_drain_has_its_own_name() -> None:
    database = FakeDatabase([])
    traces = Drain(BlockingSource([message(1)], []), TraceSink(database), NAMESPACE)
    traces.start()
    wait_for(lambda: database.traces, "the trace stored")
    assert "skialith-trace-ingest" in names()
    assert traces.status().name == "trace_ingest"
    assert traces.stop(SECONDS)


def test_it_may_be_stopped_before_it_started_and_twice_and_then_does_not_start(ends: Ends) -> None:
    assert ends.drain.stop(0.0)
    assert ends.drain.stop(0.0)
    ends.drain.start()
    assert not ends.drain.status().running
    assert ends.journal == []


def test_starting_twice_is_starting_once(ends: Ends) -> None:
    ends.drain.start()
    ends.drain.start()
    wait_for(lambda: not ends.source.due, "everything acknowledged")
    assert sum(thread.name == "skialith-writer" for thread in threading.enumerate()) == 1


def test_an_idle_drain_stops_at_once(ends: Ends) -> None:
    ends.drain.start()
    wait_for(lambda: not ends.source.due, "everything acknowledged")
    began = time.monotonic()
    assert ends.drain.stop(SECONDS)
    assert time.monotonic() - began < 5.0


def test_stopping_finishes_the_running_transaction(ends: Ends) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow(verb: str, of: list[int]) -> None:
        if verb == "write":
            inside.set()
            assert go.wait(SECONDS)

    ends.database.error = slow
    ends.drain.start()
    assert inside.wait(SECONDS)
    stopped: list[bool] = []
    stopper = threading.Thread(target=lambda: stopped.append(ends.drain.stop(SECONDS)))
    stopper.start()
    go.set()
    stopper.join(SECONDS)
    assert stopped == [True]
    assert ends.database.stored_seqs() == [1, 2, 3, 4, 5]
    assert ends.source.due == {} and ends.source.naks == []


def test_stopping_gives_back_what_a_hanging_transaction_holds_and_does_not_wait_for_it(ends: Ends) -> None:
    inside, go = threading.Event(), threading.Event()

    def hang(verb: str, of: list[int]) -> None:
        inside.set()
        assert go.wait(SECONDS)

    ends.database.error = hang
    ends.drain.start()
    assert inside.wait(SECONDS)
    began = time.monotonic()
    assert not ends.drain.stop(0.2)
    assert time.monotonic() - began < 5.0
    assert ends.source.naks == [([1, 2, 3, 4, 5], 0.0)]
    go.set()
    assert ends.drain.stop(SECONDS)


@pytest.mark.parametrize("away", ["database", "log", "preparation"])
def test_stopping_while_something_is_away_is_prompt_and_gives_everything_back(ends: Ends, away: str) -> None:
    failed = threading.Event()

    def fail(*_: object) -> Exception:
        failed.set()
        return (WalUnavailable if away == "log" else StoreUnavailable)("away")

    def prepare() -> None:
        raise fail()

    drain = ends.drain
    if away == "database":
        ends.database.error = fail
    elif away == "log":
        ends.source.pull_error = fail
    else:
        drain = Drain(ends.source, EventSink(ends.database), NAMESPACE, before_first=prepare)
    drain.start()
    assert failed.wait(SECONDS)
    began = time.monotonic()
    assert drain.stop(SECONDS)
    assert time.monotonic() - began < 5.0
    assert ends.database.stored_seqs() == []
    assert [of for of, _ in ends.source.naks] == ([[1, 2, 3, 4, 5]] if away == "database" else [])


def test_nothing_is_pulled_before_the_preparation_succeeds(ends: Ends) -> None:
    errors: list[Exception] = [StoreUnavailable("down"), RuntimeError("bug")]

    def prepare() -> None:
        assert ends.journal == []
        if errors:
            raise errors.pop()
        ends.journal.append(("prepared", []))

    drain = Drain(ends.source, EventSink(ends.database), NAMESPACE, before_first=prepare, random=Random(1))
    drain.start()
    wait_for(lambda: not ends.source.due, "everything acknowledged")
    assert drain.stop(SECONDS)
    assert [verb for verb, _ in ends.journal[:3]] == ["prepared", "pull", "commit"]
    assert drain.status().database_ok and drain.status().retries == 2


def test_a_bug_outside_a_batch_does_not_end_the_thread(ends: Ends) -> None:
    class Buggy(Drain):
        bugs = 3

        def step(self) -> None:
            if self.bugs:
                self.bugs -= 1
                raise ZeroDivisionError("a bug")
            super().step()

    drain = Buggy(ends.source, EventSink(ends.database), NAMESPACE, random=Random(1))
    drain.start()
    wait_for(lambda: not ends.source.due, "everything acknowledged")
    status = drain.status()
    assert drain.stop(SECONDS)
    assert status.retries == 3 and status.running and "a bug" in status.last_error


def test_a_long_transaction_renews_the_ack_wait_of_all_it_holds(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "_KEEP_SECONDS", 0.01)
    go = threading.Event()

    def slow(verb: str, of: list[int]) -> None:
        assert go.wait(SECONDS)

    ends.database.error = slow
    ends.drain.start()
    wait_for(lambda: ends.journal.count(("in_progress", [1, 2, 3, 4, 5])) > 3, "several renewals")
    go.set()
    wait_for(lambda: not ends.source.due, "everything acknowledged")
    assert ends.drain.stop(SECONDS)
    after = ends.journal.index(("ack", [1, 2, 3, 4, 5]))
    assert all(verb == "pull" for verb, _ in ends.journal[after + 1 :])


def test_a_drain_that_merely_tries_again_renews_nothing(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "_KEEP_SECONDS", 0.005)
    ticks = [0]
    pausing = threading.Event()

    class Pausing(Drain):
        def pause(self, seconds: float) -> bool:
            pausing.set()
            return self._stopping.wait(SECONDS)

    ends.database.error = lambda verb, of: StoreUnavailable("down")
    drain = Pausing(ends.source, EventSink(ends.database), NAMESPACE)
    waits = drain._ended.wait

    def counted(timeout: float | None = None) -> bool:
        ticks[0] += 1
        return waits(timeout)

    monkeypatch.setattr(drain._ended, "wait", counted)
    drain.start()
    assert pausing.wait(SECONDS)
    seen = ticks[0]
    wait_for(lambda: ticks[0] > seen + 10, "ten looks of the second thread")
    assert drain.stop(SECONDS)
    assert "in_progress" not in [verb for verb, _ in ends.journal]


def test_a_letter_names_the_sink_that_refused() -> None:
    database = FakeDatabase([])
    source = BlockingSource([message(1, data=b"?")], [])
    drain = Drain(source, TraceSink(database), NAMESPACE)
    drain.start()
    wait_for(lambda: not source.due, "acknowledged")
    assert drain.stop(SECONDS)
    letter: DeadLetter = next(iter(database.letters.values()))
    assert letter.sink == "trace_ingest" and drain.status().dead_letters == 1
