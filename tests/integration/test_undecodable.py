"""Records that the writer cannot decode, though others can: counted, kept, and stored when they are replayed by who can."""

from __future__ import annotations

from typing import Any

import pytest

from skialith import letters, records
from skialith.errors import InvalidArgument
from skialith.records import Position, Record
from skialith.writer import batch
from tests.chaos import outside
from tests.fixtures.agents import OpenAgent

BAD = ("e3", "e7")


def break_decoder(patch: pytest.MonkeyPatch) -> None:
    """The decoder of single messages does not bear some events, nor that of runs anything."""

    def decode_record(namespace: str, data: bytes, position: Position) -> Record:
        if any(b"\xa2" + name.encode() in data for name in BAD):
            raise RecursionError("in the test")
        return records.decode_record(namespace, data, position)

    patch.setattr(batch, "decode_record", decode_record)
    patch.setattr("skialith.writer.drain.decode_run", lambda *_: [])


@pytest.mark.parametrize("place", ["table", "stream"])
def test_what_no_writer_decodes(
    open_agent: OpenAgent, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    agent, other = open_agent("one"), open_agent("two")
    agent.save_event("first", 1)
    other.save_event("first", 1)
    assert agent.flush(20) == 0
    url, namespace = settings["database_url"], settings["namespace"]
    with monkeypatch.context() as patch:
        break_decoder(patch)
        if place == "stream":
            with outside.database(url) as run:
                run("CREATE TRIGGER no_letters BEFORE INSERT ON dead_letters BEGIN SELECT RAISE(ABORT, 'no'); END")
        for n in range(10):
            agent.save_event(f"e{n}", n)
            other.save_event(f"f{n}", n)
        assert agent.flush(20) == len(BAD), "of this process's agents, by subject"
    with outside.database(url) as run:
        run("DROP TRIGGER IF EXISTS no_letters")
    engine = agent._engine("replay")
    found, _ = letters.every(engine, None)
    writers = [each for each in found if each.letter.sink == "writer"]
    assert [(each.place, each.letter.record) for each in writers] == [(place, None)] * len(BAD)
    assert all("RecursionError: in the test" in each.letter.error for each in writers)

    with monkeypatch.context() as patch:
        patch.setattr(letters, "decode_record", fail)
        with pytest.raises(InvalidArgument, match="does not decode"):
            letters.replay(engine, found[0])
    for each in found:
        letters.replay(engine, each)
        letters.replay(engine, each)  # once more, as after a kill
    assert letters.every(engine, None) == ([], None)
    tables = outside.read_tables(url, namespace)
    assert len(tables.events) == len({row.key for row in tables.events}) == 22
    assert len(tables.traces) == len(set(tables.traces)) == 22
    assert [event.event_id for event in agent.history()] == ["first", *(f"e{n}" for n in range(10))]


def fail(*_: object) -> Record:
    raise ValueError("not a record")
