"""Conversions that raise what nobody foresaw: the record alone is given up, and never for what its process lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from skialith import _rows, records, trace_json
from skialith.config import WRITER_MEMORY_TRIES
from skialith.errors import StoreDataError
from skialith.records import Message, Position, Record
from skialith.stores import rows
from skialith.stores.sqlite import SqliteStore
from skialith.writer import batch
from skialith.writer.batch import Undecodable, decode
from skialith.writer.dead_letters import key_of
from skialith.writer.sinks import TraceSink

from ..fixtures.writer_fakes import NAMESPACE, World, message, seqs

SURPRISES = [RuntimeError("surprise"), RecursionError("deep"), MemoryError(), KeyError("x"), SystemError("C")]
each_surprise = pytest.mark.parametrize("surprise", SURPRISES, ids=lambda error: type(error).__name__)
LOG = [message(seq) for seq in range(1, 100)]


def break_run(world: World, bad: int, error: Exception) -> None:
    original = world.drain.decode_run

    def decode_run(messages: Sequence[Message]) -> list[Record | None]:
        if bad in seqs(messages):
            raise error
        return original(messages)

    world.drain.decode_run = decode_run  # type: ignore[method-assign]


def decode_breaking(bad: int, error: Exception) -> Callable[..., Record]:
    original = records.decode_record

    def decode_record(namespace: str, data: bytes, position: Position) -> Record:
        if position.seq == bad:
            raise error
        return original(namespace, data, position)

    return decode_record


@each_surprise
def test_a_batch_decoder_that_raises_leaves_it_to_the_other_one(surprise: Exception) -> None:
    world = World(LOG)
    break_run(world, 41, surprise)
    world.drain.step()
    assert world.source.due == {} and world.database.stored_seqs() == seqs(LOG)
    assert [of for verb, of in world.database.calls if verb == "write"] == [seqs(LOG)], (
        "in one transaction and in order"
    )
    assert world.database.letters == {}


@each_surprise
def test_a_record_that_no_decoder_bears_is_given_up_alone(surprise: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(LOG)
    break_run(world, 41, surprise)
    monkeypatch.setattr(batch, "decode_record", decode_breaking(41, surprise))
    world.run_dry()
    assert world.database.stored_seqs() == [seq for seq in seqs(LOG) if seq != 41]
    (letter,) = world.database.letters.values()
    assert letter.position.seq == 41 and letter.raw == LOG[40].data and letter.key == key_of(LOG[40])
    assert type(surprise).__name__ in letter.error
    tries = len([of for of, _ in world.source.naks if of == [41]]) + 1
    assert tries == (WRITER_MEMORY_TRIES if isinstance(surprise, MemoryError) else 1)
    world.check_order()


def test_a_process_that_is_short_of_memory_for_a_moment_gives_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(LOG)
    short = decode_breaking(41, MemoryError())

    def decode_record(namespace: str, data: bytes, position: Position) -> Record:
        return (short if world.clock.now < 1002 else records.decode_record)(namespace, data, position)

    monkeypatch.setattr(batch, "decode_record", decode_record)
    break_run(world, 41, MemoryError())
    world.run_dry()
    assert world.database.stored_seqs() == seqs(LOG) and world.database.letters == {}


def test_other_failures_in_between_do_not_count_as_lack_of_memory() -> None:
    world = World(LOG[:1])
    errors = [MemoryError(), ValueError(), MemoryError(), MemoryError()]

    def refuse(verb: str, of: list[int]) -> Exception | None:
        if verb != "write" or not errors:
            return None
        error = errors.pop(0)
        if isinstance(error, ValueError):
            return RuntimeError("of the driver")
        refused = StoreDataError("no row can be made of it")
        refused.__cause__ = error
        return refused

    world.database.error = refuse
    world.run_dry()
    assert world.database.stored_seqs() == [1] and world.database.letters == {}


# ---- in the stores and sinks


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(f"sqlite:///{tmp_path / 'raises.db'}")
    made.migrate()
    yield made
    made.close()


RECORDS = [decode(NAMESPACE, each) for each in LOG[:3]]


@each_surprise
@pytest.mark.parametrize("name", ["of_records", "in_order", "of_steps", "by_tables"])
def test_rows_that_cannot_be_made_speak_against_the_record(
    store: SqliteStore, name: str, surprise: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise surprise

    monkeypatch.setattr(rows, name, fail)
    with pytest.raises(StoreDataError, match=type(surprise).__name__) as caught:
        store.write_records(RECORDS)
    assert caught.value.__cause__ is surprise
    monkeypatch.undo()
    assert store.stored(NAMESPACE, [record.key for record in RECORDS]) == set()


@each_surprise
@pytest.mark.parametrize(("owner", "name"), [(trace_json, "of_records"), (_rows, "traces"), (rows, "of_traces")])
def test_traces_that_cannot_be_made_speak_against_the_record(
    store: SqliteStore, owner: object, name: str, surprise: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise surprise

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(StoreDataError, match=type(surprise).__name__) as caught:
        TraceSink(store).write(RECORDS)
    assert caught.value.__cause__ is surprise


def test_what_does_not_decode_says_so_whatever_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "decode_record", decode_breaking(1, RecursionError("deep")))
    with pytest.raises(Undecodable, match="RecursionError: deep"):
        decode(NAMESPACE, LOG[0])
