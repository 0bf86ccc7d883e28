"""A checkpoint brought up to date by later operations is what a look at all of them would have found."""

from __future__ import annotations

import random
import secrets
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from skialith import graph_recent, graphs
from skialith.graph_past import Filled
from skialith.graph_recent import Recent, _Look, advanced
from skialith.graphs import Delete, Drop
from skialith.records import Record

from ..fixtures.graph_model import Model, at_position, blob, put, some_operation, value, writes

ROUNDS = 3000


def found_in(model: Model, thread: str, ns: str) -> Filled | None:
    """The latest checkpoint, as the model has it."""
    there = [cell for (t, n, _), cell in model.cells.items() if (t, n) == (thread, ns)]
    if not there:
        return None
    latest = max(there, key=lambda cell: cell.checkpoint_id)._replace(blobs={})
    values = {ref: model.blobs.get((thread, ns, ref)) for ref in graphs.split_refs(latest.refs)}
    name = (thread, ns, latest.checkpoint_id)
    pending = [w for w in model.writes.values() if (w.thread_id, w.checkpoint_ns, w.checkpoint_id) == name]
    return Filled(latest, {ref: each for ref, each in values.items() if each is not None}, pending)


def apply(model: Model, records: list[Record]) -> None:
    for record in records:
        model.apply(record.key, graphs.operation(record))


def test_it_is_never_something_else() -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    told = 0
    for _ in range(ROUNDS):
        model, records = Model(), [at_position(n, some_operation(dice)) for n in range(1, dice.randrange(2, 14))]
        seen = dice.randrange(1, len(records) + 1)
        apply(model, records[:seen])
        thread, ns = f"t{dice.randrange(2)}", dice.choice(["", "sub"])
        before = found_in(model, thread, ns)
        if before is None or not before.whole:
            continue
        after = advanced(before, records[seen:])
        apply(model, records[seen:])
        if after is not None:
            told += 1
            assert after == found_in(model, thread, ns)
    assert told > ROUNDS / 20


BEFORE = Filled(put(checkpoint_id="2", blobs={blob(1): value("1")})._replace(blobs={}), {blob(1): value("1")}, [])


def later(*changes: graphs.Operation) -> list[Record]:
    return [at_position(n, change) for n, change in enumerate(changes, start=9)]


def test_what_is_pending_at_it_is_added() -> None:
    pending = [writes(checkpoint_id="2", task=task) for task in ("one", "two")]
    assert advanced(BEFORE, later(*pending)) == Filled(BEFORE.put, BEFORE.values, pending)


def test_other_threads_namespaces_and_earlier_checkpoints_change_nothing() -> None:
    others = later(
        put("u", checkpoint_id="9"),
        put(ns="sub", checkpoint_id="9"),
        put(checkpoint_id="1", blobs={blob(7): value("7")}),
        writes(checkpoint_id="1"),
        writes(checkpoint_id="3"),
    )
    assert advanced(BEFORE, others) == BEFORE


def test_what_does_not_tell_is_looked_at_anew() -> None:
    for change in (
        Delete("t"),
        Drop("t", [("", "1")], []),
        put(checkpoint_id="2"),
        put(checkpoint_id="3"),
        put(checkpoint_id="1", blobs={blob(1): value("another")}),
    ):
        assert advanced(BEFORE, later(change)) is None
    assert advanced(BEFORE, [at_position(9, Delete("t"))._replace(body=b"\xc1")]) is None


# ---- what is kept


@pytest.fixture
def quick_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("quick_switches")
def test_the_size_of_what_is_kept_is_exact_whatever_threads_do() -> None:
    """Sizes that are never taken off again would in the end leave no room for anything."""
    never: Any = None
    recent = Recent(never, never, 1.0)
    looks = [_Look(0.0, 0.0, 1, 1, BEFORE, size) for size in (1, 10, 100)]

    def change(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(2000):
            place = str(dice.randrange(2)), ""
            recent.forget(place) if dice.random() < 0.2 else recent._keep(place, dice.choice(looks))

    threads = [threading.Thread(target=change, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recent._size == sum(look.size for look in recent._looks.values())


def test_the_oldest_go_when_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_recent, "GRAPH_CACHE_BYTES", 1000)
    never: Any = None
    recent = Recent(never, never, 1.0)
    for n in range(6):
        recent._keep((str(n), ""), _Look(0.0, 0.0, 1, 1, BEFORE, 250))
    recent._keep(("large", ""), _Look(0.0, 0.0, 1, 1, BEFORE, 251))
    assert [thread for thread, _ in recent._looks] == ["2", "3", "4", "5"]


def test_a_small_checkpoint_counts_as_what_it_takes() -> None:
    count = 200
    tracemalloc.start()
    try:
        kept = []
        for n in range(count):
            there = {blob(channel): value(str(channel)) for channel in range(8)}
            made = graphs.decode(graphs.encode(put(f"thread {n}", checkpoint_id=str(n), blobs=there)))
            assert isinstance(made, graphs.Put)
            kept.append(Filled(made._replace(blobs={}), made.blobs, []))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.5 < sum(found.size for found in kept) / taken < 2.5
