"""What every store tells of where its rows stand in the log, after the log went back and handed sequences out again."""

from __future__ import annotations

from skialith.losses import Loss, losses
from skialith.records import Position
from skialith.stores.base import Store
from tests.fixtures.stores import NAMESPACE, TIME_NS, checkpoint, event, letter

ALWAYS = (0, TIME_NS * 2)


def at(seq: int, time: int) -> Position:
    return Position(TIME_NS + time, seq)


def fill(store: Store) -> None:
    """Sequences 10 to 16 without 13 and 15, then back: 12 and 13 again, one as a checkpoint and one as a dead letter."""
    first = [event(n, time_ns=TIME_NS + n) for n in (10, 11, 14, 16)]
    again = checkpoint(12, time_ns=TIME_NS + 100)
    dead = event(113, time_ns=TIME_NS + 110)._replace(position=at(13, 110))
    store.write_records(
        [*first, again, checkpoint(12, time_ns=TIME_NS + 12), event(99, namespace="other", time_ns=TIME_NS + 500)]
    )
    store.write_dead_letter(letter(dead))
    store.write_dead_letter(letter(event(15, time_ns=TIME_NS + 15), sink="trace_ingest"))


def test_the_newest_row_is_that_of_the_log_s_last_time(store: Store) -> None:
    assert store.newest(NAMESPACE) is None
    fill(store)
    assert store.newest(NAMESPACE) == at(13, 110)


def test_turns_are_where_the_next_row_has_no_greater_sequence(store: Store) -> None:
    assert store.turns(NAMESPACE, 0, 10) == []
    store.write_records([event(n, time_ns=TIME_NS + n) for n in (1, 2, 3)])
    assert store.turns(NAMESPACE, 0, 10) == []
    fill(store)
    assert store.turns(NAMESPACE, 0, 10) == [(at(16, 16), at(12, 100))]
    assert store.turns(NAMESPACE, TIME_NS + 17, 10) == []
    store.write_records([event(213, time_ns=TIME_NS + 200)._replace(position=at(13, 200))])
    assert store.turns(NAMESPACE, 0, 10) == [(at(16, 16), at(12, 100)), (at(13, 110), at(13, 200))]
    assert store.turns(NAMESPACE, 0, 1) == [(at(16, 16), at(12, 100))]


def test_sequences_that_have_rows(store: Store) -> None:
    fill(store)
    assert store.sequences(NAMESPACE, 11, 16, ALWAYS, 100) == [11, 12, 13, 14, 16]
    assert store.sequences(NAMESPACE, 11, 16, (0, TIME_NS + 16), 100) == [11, 12, 14, 16]
    assert store.sequences(NAMESPACE, 11, 16, (TIME_NS + 17, TIME_NS + 100), 100) == [12]
    assert store.sequences(NAMESPACE, 11, 16, ALWAYS, 2) == [11, 12]


def test_losses_are_the_sequences_between_that_have_no_row_of_before(store: Store) -> None:
    assert list(losses(store, NAMESPACE, lambda _: at(1, 0))) == []
    fill(store)
    known = Loss(at(16, 16), at(12, 100), [(13, 13, 1), (15, 15, 1)], True)
    assert list(losses(store, NAMESPACE, lambda _: at(14, 300))) == [known]
    gone = Loss(at(13, 110), at(11, 300), [(11, 11, 1)], True)
    assert list(losses(store, NAMESPACE, lambda _: at(11, 300))) == [known, gone]
