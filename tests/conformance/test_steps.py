"""The index of recorded steps on real databases: what is in it, pages of it, dead letters, and that it never misses one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from skialith.config import PAYLOAD_PART_BYTES
from skialith.records import STEP, Kind, Position, Record
from skialith.stores import Store, read
from skialith.stores.base import StepEntry

from ..fixtures.stores import NAMESPACE, Run, event, letter, manifest, noise, step

START = Position(0, 0)


def steps(store: Store, agent: str = "agent", **options: Any) -> list[StepEntry]:
    """All steps of an agent in one page."""
    return store.steps(NAMESPACE, agent, START, 1000, **options)


def whole(records: Sequence[Record]) -> list[StepEntry]:
    return [StepEntry(record.key, record.position, record) for record in records]


def test_steps_are_found_among_other_events(store: Store) -> None:
    mine = [step(n) for n in (2, 5, 9)]
    store.write_records([event(n) for n in (1, 3, 4, 8)] + mine[1:] + [step(6, agent="other")])
    store.write_records([*mine[:1], step(7, namespace="elsewhere")])
    assert steps(store) == whole(mine)
    assert [entry.key for entry in steps(store, "other")] == [step(6, agent="other").key]
    assert steps(store, "nobody") == []


def test_an_event_that_only_says_so_is_no_step(store: Store, sql: Run) -> None:
    real = step(1)
    store.write_records([real, event(2, event_type=STEP), event(3, event_id=real.record_id, event_type=STEP)])
    store.write_dead_letter(letter(event(4, event_type=STEP)))
    assert steps(store) == whole([real])
    assert sql("SELECT COUNT(*) FROM agent_steps") == [(1,)]


def test_the_first_of_a_step_wins_whole(store: Store) -> None:
    first, again = step(1, body=b"one", step_id="s"), step(2, body=b"two", step_id="s")
    store.write_records([again, first])
    assert steps(store) == whole([first])
    store.write_records([step(3, body=b"three", step_id="s")])
    assert steps(store) == whole([first])


def test_pages(store: Store) -> None:
    wrote = [step(n) for n in range(1, 31)]
    store.write_records(wrote)
    found: list[StepEntry] = []
    after = START
    while page := store.steps(NAMESPACE, "agent", after, 7):
        assert len(page) == min(7, 30 - len(found))
        found += page
        after = page[-1].position
    assert found == whole(wrote)


def test_what_passes_the_limit_of_bytes_is_left_out(store: Store) -> None:
    wrote = [step(1, body=b"x" * 10), step(2, body=noise(PAYLOAD_PART_BYTES + 1, 2)), step(3, body=b"y" * 10)]
    store.write_records(wrote)
    assert steps(store) == whole(wrote)
    assert steps(store, max_bytes=PAYLOAD_PART_BYTES + 21) == whole(wrote)
    for most, count in ((PAYLOAD_PART_BYTES + 20, 2), (PAYLOAD_PART_BYTES, 1), (10, 1), (9, 0), (0, 0), (-5, 0)):
        assert steps(store, max_bytes=most) == whole(wrote[:count]) + [
            StepEntry(record.key, record.position, None) for record in wrote[count:]
        ]


def test_dead_steps_stand_among_the_others(store: Store) -> None:
    wrote = [step(n, body=b"x" * (PAYLOAD_PART_BYTES + n if n == 4 else n)) for n in range(1, 7)]
    store.write_records([record for record in wrote if record.position.seq % 2])
    for record in wrote:
        if record.position.seq % 2 == 0:
            store.write_dead_letter(letter(record))
    assert steps(store) == whole(wrote)
    assert store.steps(NAMESPACE, "agent", wrote[1].position, 3) == whole(wrote[2:5])


def test_a_step_that_is_stored_and_dead_is_the_stored_one(store: Store) -> None:
    record = step(1)
    store.write_dead_letter(letter(step(2, step_id="s1")))
    store.write_records([record])
    assert steps(store) == whole([record])


def test_a_dead_step_without_body_is_still_listed(store: Store) -> None:
    lost = step(1)._replace(body=None, manifest=manifest())
    store.write_dead_letter(letter(lost))
    (entry,) = steps(store)
    assert entry.record is not None
    assert (entry.key, entry.record.body) == (lost.key, None)


def test_a_replayed_step_is_in_the_index(store: Store, sql: Run) -> None:
    record = step(1)
    store.write_dead_letter(letter(record))
    store.replay_dead_letter(letter(record), record, None)
    assert sql("SELECT COUNT(*) FROM agent_steps") == [(1,)]
    assert steps(store) == whole([record])


@pytest.mark.parametrize("body", [b"small", noise(PAYLOAD_PART_BYTES + 1, 7)], ids=["small", "large"])
@pytest.mark.parametrize("n", range(1, 5))
def test_what_is_replayed_between_two_queries_is_not_missed(store: Store, n: int, body: bytes) -> None:
    """At the ``n``-th query of a reader the dead letter is replayed."""
    record = step(1, body=body)
    store.write_dead_letter(letter(record))
    store.write_records([step(2)])
    queries = 0

    class Replaying:
        by = ""

        def __init__(self, session: Any) -> None:
            self._session = session

        def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Any]:
            nonlocal queries
            queries += 1
            if queries == n:
                store.replay_dead_letter(letter(record), record, None)
            found: list[Any] = self._session.rows(sql, args)
            return found

    with store.reading() as session:  # type: ignore[attr-defined]
        found = read.steps(Replaying(session), (NAMESPACE, "agent"), START, 10, None)
    assert found == whole([record, step(2)])


def test_a_step_whose_event_was_deleted_ends_no_page(store: Store, sql: Run) -> None:
    wrote = [step(n) for n in range(1, 8)]
    store.write_records(wrote)
    sql("DELETE FROM agent_events WHERE record_key = ?", wrote[1].key)
    assert store.steps(NAMESPACE, "agent", START, 4) == whole([wrote[0], *wrote[2:5]])


def test_a_refused_batch_leaves_nothing_in_the_index(store: Store, sql: Run) -> None:
    with pytest.raises(Exception, match=r"refuses|cannot take|data"):
        store.write_records([step(1), event(2)._replace(agent_id="x" * 1021)])
    assert sql("SELECT COUNT(*) FROM agent_steps") == [(0,)]
    store.write_records([step(1)])
    assert len(steps(store)) == 1


def test_a_missing_index_is_not_the_records_fault(store: Store, sql: Run) -> None:
    sql("DROP TABLE agent_steps")
    for call in (lambda: store.write_records([step(1)]), lambda: store.probe("writer"), lambda: steps(store)):
        with pytest.raises(Exception, match="skialith migrate"):
            call()
    assert sql("SELECT COUNT(*) FROM agent_events") == [(0,)]
    store.write_records([event(1)])


def test_checkpoints_are_no_steps(store: Store) -> None:
    store.write_records([step(1)._replace(kind=Kind.CHECKPOINT)])
    assert steps(store) == []
