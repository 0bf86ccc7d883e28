"""The verbs of SkialithAgent as a user calls them, against a real nats-server and a real database."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import os
import pickle
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

import skialith
from skialith import (
    Ack,
    BatchFailed,
    BlockingCallInEventLoop,
    Closed,
    ConfigurationError,
    InvalidArgument,
    InvalidPayload,
    RecordTooLarge,
    SkialithAgent,
)
from tests.fixtures.agents import OpenAgent
from tests.fixtures.nats import wait_until


@pytest.fixture(params=["sqlite", "mariadb"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every test here runs on both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'skialith.db'}"
    return str(request.getfixturevalue("mariadb_url"))


STRANGE_IDS = [
    "a",
    "A",
    "a ",
    "a  ",
    " a",
    "a.b",
    "a*b",
    "a>b",
    ">",
    "*",
    "a\x00b",
    "a\x0bb",
    "a\x0cb",
    "a\x7fb",
    "a\r\nb",
    "\u00e9",
    "e\u0301",
    "\U0001f9e0" * 255,
    "x" * 255,
    "%41",
    "~",
    "ß",
    "ss",
]


def test_a_new_agent_begins_at_zero_and_resumes_its_last_checkpoint(open_agent: OpenAgent) -> None:
    agent = open_agent()
    state = agent.resume()
    assert (state.agent_id, state.step_index, state.data, state.is_new) == ("agent", 0, {}, True)
    ack = agent.checkpoint(step=3, data={"messages": ["hi"]})
    assert isinstance(ack, Ack)
    assert ack.seq > 0
    state = agent.resume()
    assert (state.step_index, state.data, state.is_new) == (3, {"messages": ["hi"]}, False)
    agent.flush(timeout=20)
    state = agent.peek()
    assert (state.step_index, state.source, state.database_ok) == (3, "database", True)


def test_writing_an_earlier_state_again_makes_it_current(open_agent: OpenAgent) -> None:
    agent = open_agent()
    agent.resume()
    for data in ("A", "B", "A"):
        agent.checkpoint(3, data)
    assert agent.peek().data == "A"
    agent.flush(timeout=20)
    assert agent.peek().data == "A"


def test_history_is_the_same_before_and_after_the_database_has_it(open_agent: OpenAgent) -> None:
    reader, writer_off = open_agent(), None
    reader.close()
    writer_off = open_agent(writer="off")
    writer_off.resume()
    writer_off.save_events([(f"e{n}", {"kind": "thought", "n": n}) for n in range(600)])
    before = [(event.event_id, event.event_type, event.data, event.position) for event in writer_off.history()]
    assert [entry[0] for entry in before] == [f"e{n}" for n in range(600)]
    assert not any(event.stored for event in writer_off.history(limit=5))
    writer_on = open_agent()
    writer_off.flush(timeout=20)
    after = [(event.event_id, event.event_type, event.data, event.position) for event in writer_on.history()]
    assert after == before
    assert all(event.stored for event in writer_on.history())
    tenth = next(iter(writer_on.history(after=before[9][3].cursor(), limit=1)))
    assert tenth.event_id == "e10"
    assert [event.event_id for event in writer_on.history(after=tenth, limit=2)] == ["e11", "e12"]


def test_history_while_records_move(open_agent: OpenAgent) -> None:
    agent = open_agent()
    stop = threading.Event()
    saved: list[str] = []

    def work() -> None:
        while not stop.is_set() and len(saved) < 3000:
            agent.save_event(f"e{len(saved)}", {"n": len(saved)})
            saved.append(f"e{len(saved)}")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(15):
            known = len(saved)
            ids = [event.event_id for event in agent.history()]
            assert ids == [f"e{n}" for n in range(len(ids))]
            assert len(ids) >= known
    finally:
        stop.set()
        thread.join(60)


def test_the_first_event_under_an_id_wins_for_ever(open_agent: OpenAgent) -> None:
    agent = open_agent()
    assert not agent.save_event("e", {"n": 1}).duplicate
    assert agent.save_event("e", {"n": 2}).duplicate
    agent.flush(timeout=20)
    agent.save_event("e", {"n": 3})
    agent.flush(timeout=20)
    assert [event.data for event in agent.history()] == [{"n": 1}]


def test_ids_of_any_text_are_distinct_and_round_trip(open_agent: OpenAgent) -> None:
    agents = {agent_id: open_agent(agent_id) for agent_id in STRANGE_IDS}
    for agent_id, agent in agents.items():
        agent.resume()
        agent.checkpoint(1, agent_id)
        agent.save_events([(event_id, [agent_id, event_id]) for event_id in STRANGE_IDS])
    for stored in (False, True):
        if stored:
            agents["a"].flush(timeout=30)
        for agent_id, agent in agents.items():
            assert agent.peek().data == agent_id
            assert [event.data for event in agent.history()] == [[agent_id, event_id] for event_id in STRANGE_IDS]


@pytest.mark.parametrize("bad", ["", "x" * 256, None, 5, b"bytes", "\ud800"])
def test_a_bad_id_is_refused_by_name(open_agent: OpenAgent, bad: Any) -> None:
    with pytest.raises(ValueError, match="agent_id") as caught:
        SkialithAgent(bad)
    assert isinstance(caught.value, InvalidArgument)
    with pytest.raises(InvalidArgument, match="event_id"):
        open_agent().save_event(bad, {})


def test_a_bad_payload_is_refused_with_its_path_before_anything_is_sent(open_agent: OpenAgent) -> None:
    agent = open_agent()
    with pytest.raises(InvalidPayload) as caught:
        agent.save_event("e", {"messages": [{}, {"content": {1, 2}}]})
    assert str(caught.value).startswith("data.messages[1].content: set")
    assert caught.value.outcome == "not_written"
    with pytest.raises(InvalidPayload) as caught:
        agent.save_events([("a", {}), ("b", {"x": object()})])
    assert "events[1].data.x" in str(caught.value)
    assert list(agent.history()) == []


@dataclasses.dataclass
class Point:
    x: int
    y: int


def test_payloads_come_back_as_ormsgpack_maps_them(open_agent: OpenAgent) -> None:
    moment = dt.datetime(2026, 1, 2, 3, 4, 5, 678, dt.timezone.utc)
    name = uuid.uuid4()
    agent = open_agent()
    agent.save_event(
        "e", {"p": Point(1, 2), "t": moment, "u": name, "b": b"\x00\xff", "i": 2**64 - 1, 7: (1, 2.5, None)}
    )
    expected = {
        "p": {"x": 1, "y": 2},
        "t": "2026-01-02T03:04:05.000678+00:00",
        "u": str(name),
        "b": b"\x00\xff",
        "i": 2**64 - 1,
        7: [1, 2.5, None],
    }
    for _ in range(2):
        assert next(iter(agent.history())).data == expected
        agent.flush(timeout=20)


def test_large_records(open_agent: OpenAgent) -> None:
    agent = open_agent(max_record_bytes=8 * 1024 * 1024)
    data = {"blob": os.urandom(6 * 1024 * 1024), "text": "x" * 1_000_000}
    agent.checkpoint(1, data)
    agent.save_event("big", data)
    assert agent.peek().data == data
    assert next(iter(agent.history())).data == data
    agent.flush(timeout=30)
    assert agent.peek().data == data
    assert next(iter(agent.history())).data == data
    with pytest.raises(RecordTooLarge) as caught:
        agent.save_event("bigger", os.urandom(9 * 1024 * 1024))
    assert caught.value.limit == 8 * 1024 * 1024
    assert caught.value.outcome == "not_written"


def test_threads_share_one_agent(open_agent: OpenAgent) -> None:
    agent = open_agent()
    agent.resume()

    def work(number: int) -> None:
        for n in range(60):
            agent.save_event(f"{number}-{n}", {"n": n})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    agent.flush(timeout=20)
    events = list(agent.history())
    assert len({event.event_id for event in events}) == len(events) == 600
    for number in range(10):
        mine = [event.data["n"] for event in events if event.event_id.startswith(f"{number}-")]
        assert mine == list(range(60))


def test_calls_after_close_say_so(open_agent: OpenAgent) -> None:
    agent = open_agent()
    agent.close()
    agent.close()
    for call in (lambda: agent.save_event("e", {}), agent.resume, agent.peek, agent.flush, agent.history):
        with pytest.raises(Closed, match="closed"):
            call()


def test_an_exception_inside_with_closes_and_keeps_what_was_acknowledged(
    settings: dict[str, Any], open_agent: OpenAgent
) -> None:
    with pytest.raises(RuntimeError, match="boom"), SkialithAgent("agent", **settings) as agent:
        agent.save_event("e", {})
        raise RuntimeError("boom")
    assert [event.event_id for event in open_agent().history()] == ["e"]


def test_two_runtimes_with_different_settings(open_agent: OpenAgent) -> None:
    one, two = (
        open_agent("a", namespace="one-" + os.urandom(4).hex()),
        open_agent("a", namespace="two-" + os.urandom(4).hex()),
    )
    one.save_event("e", 1)
    two.save_event("e", 2)
    one.flush(timeout=20)
    two.flush(timeout=20)
    assert [event.data for event in one.history()] == [1]
    assert [event.data for event in two.history()] == [2]


def test_inside_a_running_loop_the_error_names_the_async_spelling(open_agent: OpenAgent) -> None:
    agent = open_agent()

    async def main() -> None:
        with pytest.raises(BlockingCallInEventLoop, match=r"async with SkialithAgent\(.*await agent\.save_event\("):
            agent.save_event("e", {})
        ack = await asyncio.to_thread(agent.save_event, "e", {})
        assert ack.seq > 0

    asyncio.run(main())


def test_a_failed_batch_tells_what_is_durable(open_agent: OpenAgent) -> None:
    agent = open_agent(writer="off", wal_bytes=3 * 1024 * 1024)
    events = [(f"e{n}", os.urandom(60_000)) for n in range(100)]
    with pytest.raises(BatchFailed) as caught:
        agent.save_events(events)
    failed = caught.value
    assert len(failed.acks) == failed.failed < 100
    assert failed.outcome == "not_written"
    assert [event.event_id for event in agent.history()] == [f"e{n}" for n in range(failed.failed)]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("nats_url", "http://x"),
        ("database_url", "postgres://x"),
        ("namespace", "a b"),
        ("writer", "maybe"),
        ("durability", "never"),
        ("timeout", 0),
        ("timeout", "soon"),
        ("no_such_setting", 1),
    ],
)
def test_a_bad_setting_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=setting):
        SkialithAgent("a", **{setting: value})


def test_every_public_error_survives_pickle() -> None:
    errors = [getattr(skialith, name) for name in skialith.__all__]
    kinds = [kind for kind in errors if isinstance(kind, type) and issubclass(kind, skialith.SkialithError)]
    assert len(kinds) > 15
    for kind in kinds:
        error = kind("what happened", outcome="unknown", retryable=True, owner="me", size=3)
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == "what happened"
        assert (copy.outcome, copy.retryable) == ("unknown", True)
        assert copy.__dict__ == error.__dict__ | {"owner": "me", "size": 3}


def test_history_in_the_database_is_seen_when_the_log_is_new_and_empty(open_agent: OpenAgent) -> None:
    agent = open_agent()
    agent.save_events([(f"e{n}", n) for n in range(5)])
    agent.flush(timeout=20)
    wal = agent._runtime.wal
    wal.call(lambda: wal.stream.api.call(f"STREAM.DELETE.{wal.stream.name}"), 5)
    agent.close()
    anew = open_agent("other", writer="off")._runtime
    anew.store.bind_wal(agent.config.namespace, anew.wal.stream.wal_id, adopt=True)
    assert [event.data for event in open_agent("agent", writer="off").history()] == list(range(5))


def test_reading_while_the_first_writer_begins(open_agent: OpenAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is bound when the reader asks; then a writer binds the database and stores all; then the reader asks the log."""
    reader = open_agent(writer="off")
    reader.save_event("e", 1)
    engine = reader._runtime
    ask, answers = engine.store.bound_wal, list[str | None]()

    def bound_wal(namespace: str) -> str | None:
        answers.append(ask(namespace))
        if len(answers) == 1:
            open_agent("writer")
            engine.wal.flush(20)
        return answers[-1]

    monkeypatch.setattr(engine.store, "bound_wal", bound_wal)
    assert [event.data for event in reader.history()] == [1]
    assert answers[0] is None


def test_traces_follow_the_namespace_while_a_writer_runs(open_agent: OpenAgent) -> None:
    agent = open_agent()
    engine = agent._runtime

    def switch(enabled: bool) -> None:
        engine.wal.call(lambda: engine.wal.stream.set_traces(enabled, time.monotonic() + 5), 5)

    def traces() -> int:
        return engine.store.counts(agent.config.namespace).traces

    agent.save_event("with", 1)
    wait_until(lambda: traces() == 1, 20, "the first trace")
    switch(False)
    agent.save_event("without", 2)
    agent.flush(timeout=20)
    wait_until(lambda: engine.wal.status(5).messages == 0, 20, "the log trimmed without traces")
    assert traces() == 1
    switch(True)
    agent.save_event("with again", 3)
    wait_until(lambda: traces() == 2, 30, "the trace after switching on")


def test_a_second_database_does_not_take_the_rest_of_a_log(open_agent: OpenAgent, tmp_path: Path) -> None:
    agent = open_agent()
    agent.checkpoint(1, {})
    agent.flush(timeout=20)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    with pytest.raises(ConfigurationError, match="SKIALITH_DATABASE_URL"):
        open_agent(database_url=other)
    reader = open_agent(database_url=other, writer="off")
    with pytest.raises(ConfigurationError, match="SKIALITH_DATABASE_URL"):
        reader.resume()


def test_the_first_writer_ever_starts_while_history_is_read(open_agent: OpenAgent) -> None:
    agent = open_agent(writer="off")
    agent.save_events([(f"e{n}", n) for n in range(600)])
    events = agent.history()
    seen = [next(events).data]
    open_agent("other")
    agent.flush(timeout=20)
    wait_until(lambda: agent._runtime.wal.status(5).messages == 0, 20, "everything stored and trimmed")
    seen.extend(event.data for event in events)
    assert seen == list(range(600))
