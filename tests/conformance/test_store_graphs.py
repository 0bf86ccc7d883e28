"""What every store promises about graphs' threads: the same tables whatever the order, batches and repetitions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from skialith.config import PAYLOAD_PART_BYTES
from skialith.errors import StoreDataError
from skialith.graphs import Delete, Drop, Operation, Put, blob_key, cell_key, ns_key, thread_key
from skialith.records import Codec, Manifest, Record
from skialith.stores import Store
from skialith.stores.base import Scope
from skialith.stores.sql import SqlStore

from ..fixtures.graph_model import (
    Model,
    at_position,
    blob,
    put,
    some_operation,
    tables,
    value,
    writes,
)
from ..fixtures.stores import NAMESPACE, Run, event, letter, noise
from ..fixtures.writer_fakes import seeds
from .test_store import at_once

BIG = 2 * PAYLOAD_PART_BYTES + 17


def logged(*changes: Operation) -> list[Record]:
    """The records of operations that follow each other in the log."""
    return [at_position(n, change) for n, change in enumerate(changes, 1)]


def modelled(records: Sequence[Record], changes: Sequence[Operation]) -> Model:
    model = Model()
    for record, change in zip(records, changes, strict=True):
        model.apply(record.key, change)
    return model


def check(sql: Run, model: Model) -> None:
    assert tables(sql, NAMESPACE).difference(model.keyed(NAMESPACE)) == ""


def keys(thread: str = "t", ns: str = "", checkpoint_id: str = "1") -> tuple[bytes, bytes, bytes]:
    """Of the thread, the namespace and the checkpoint."""
    of_thread = thread_key(NAMESPACE, thread)
    of_ns = ns_key(of_thread, ns)
    return of_thread, of_ns, cell_key(of_ns, checkpoint_id)


# ---- order, batches, repetition


@pytest.mark.parametrize("seed", seeds(3))
def test_any_order_of_any_batches_ends_at_the_same_tables(store: Store, sql: Run, seed: int) -> None:
    dice = random.Random(seed)
    for n in range(12):
        changes = [some_operation(dice) for _ in range(dice.randrange(2, 40))]
        changes = [change._replace(thread_id=f"{n}.{change.thread_id}") for change in changes]
        records = logged(*changes)
        deliveries = [record for record in records for _ in range(dice.choice([1, 1, 2, 3]))]
        dice.shuffle(deliveries)
        while deliveries:
            size = dice.randrange(1, 12)
            store.write_records([*deliveries[:size], event(1)])
            del deliveries[:size]
        found = tables(sql, NAMESPACE)
        found.cells = {name: cell for name, cell in found.cells.items() if name[0].startswith(f"{n}.")}
        model = modelled(records, changes).keyed(NAMESPACE)
        mine = {change.thread_id for change in changes}
        found.writes = {key: made for key, made in found.writes.items() if made.thread_id in mine}
        model.blobs.update({key: each for key, each in found.blobs.items() if key not in _blob_keys(mine)})
        assert found.difference(model) == "", f"round {n}"


def _blob_keys(threads: set[str]) -> set[bytes]:
    return {blob_key(keys(thread, ns)[1], blob(n)) for thread in threads for ns in ("", "sub") for n in range(5)}


@pytest.mark.parametrize("seed", seeds(1))
def test_writers_at_once_end_at_the_same_tables(store: Store, sql: Run, seed: int) -> None:
    dice = random.Random(seed)
    changes = [some_operation(dice, threads=3) for _ in range(240)]
    records = logged(*changes)
    halves: list[list[list[Record]]] = []
    for _ in range(3):
        order = [*records]
        for start in range(0, len(order), 30):  # as a log delivers them: nearly in order
            piece = order[start : start + 30]
            dice.shuffle(piece)
            order[start : start + 30] = piece
        halves.append([order[start : start + 20] for start in range(0, len(order), 20)])

    def write(batches: list[list[Record]]) -> None:
        for batch in batches:
            store.write_records(batch)

    assert at_once(*(lambda some=some: write(some) for some in halves)) == [None] * 3
    check(sql, modelled(records, changes))


@pytest.mark.parametrize("seed", seeds(1))
def test_writers_of_many_threads_do_not_wait_for_each_other_in_circles(store: Store, sql: Run, seed: int) -> None:
    """A deadlock would be an error of one of them."""
    dice = random.Random(seed)
    changes = [some_operation(dice, threads=150, largest=3000) for _ in range(3000)]
    records = logged(*changes)
    batches = [records[start : start + 300] for start in range(0, len(records), 200)]  # some of them twice
    orders = [dice.sample(batches, len(batches)) for _ in range(4)]

    def write(order: list[list[Record]]) -> None:
        for batch in order:
            store.write_records(batch)

    assert at_once(*(lambda order=order: write(order) for order in orders)) == [None] * 4
    check(sql, modelled(records, changes))


LATE: dict[str, list[Operation]] = {
    "a put behind its deletion": [put(blobs={blob(1): value("x")}), Drop("t", [("", "1")], [("", blob(1))])],
    "a put behind its thread's deletion": [put(blobs={blob(1): value("x")}), Delete("t")],
    "a put behind a newer one": [put(blobs={blob(1): value("x")}), put(blobs={blob(1): value("y")})],
    "writes behind their checkpoint's deletion": [writes(), Drop("t", [("", "1")], [])],
    "writes behind their checkpoint's deletion and return": [writes(), Drop("t", [("", "1")], []), put()],
    "a deletion behind its checkpoint's return": [
        writes(),
        put(),
        Drop("t", [("", "1")], []),
        put(),
        writes(text="new"),
    ],
    "a thread's deletion behind its return": [put(), writes(), Delete("t"), put(), writes(text="new")],
    "a value's deletion behind its return": [
        put(blobs={blob(1): value("x")}),
        Drop("t", [], [("", blob(1))]),
        put(blobs={blob(1): value("y")}),
    ],
}


@pytest.mark.parametrize("late", range(5))
@pytest.mark.parametrize("name", LATE)
def test_nothing_comes_back_from_the_dead(store: Store, sql: Run, name: str, late: int) -> None:
    changes = LATE[name]
    records = logged(*changes)
    if late < len(records):
        # A writer that was stopped before its commit commits now, after another one did all the rest.
        store.write_records([*records[:late], *records[late + 1 :]])
        store.write_records(records[late : late + 1])
    else:
        store.write_records(records)
    check(sql, modelled(records, changes))
    for record in [*records, *reversed(records)]:
        store.write_records([record])
        check(sql, modelled(records, changes))


def test_large_bodies_leave_with_their_rows(store: Store, sql: Run) -> None:
    made = put(blobs={blob(1): value(noise(BIG, 1))}, head=value(noise(BIG, 2)))
    records = logged(made, writes(text="x" * BIG), put(checkpoint_id="2", blobs={blob(2): value(noise(BIG, 3))}))
    store.write_records(records)
    check(
        sql,
        modelled(
            records, [made, writes(text="x" * BIG), put(checkpoint_id="2", blobs={blob(2): value(noise(BIG, 3))})]
        ),
    )
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(12,)]
    store.write_records([at_position(5, Drop("t", [("", "1")], [("", blob(1))]))])
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(3,)]
    store.write_records([at_position(6, put(checkpoint_id="2", blobs={blob(2): value(noise(BIG + 1, 4))}))])
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(3,)]
    store.write_records([at_position(7, Delete("t"))])
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(0,)]
    assert [row[0] for row in sql("SELECT live FROM graph_checkpoints")] == []


def test_a_long_thread_goes_in_short_statements(store: Store, sql: Run) -> None:
    """Each must end within the driver's timeout, or the deletion is tried for ever."""
    assert isinstance(store, SqlStore)
    count, limit = 1200, 500
    store.write_records(
        [at_position(n, put("t", "", str(n), blobs={blob(n): value("x")})) for n in range(1, count + 1)]
    )
    store.write_records([at_position(count + n, writes("t", "", str(n))) for n in range(1, count + 1)])
    with store.reading() as session:
        kind = type(session)
    run, changed = kind.run, []

    def counted(self: Any, query: str, args: Sequence[Any] = ()) -> int:
        changed.append(run(self, query, args))
        return changed[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "run", counted)
        store.write_records([at_position(2 * count + 1, Delete("t"))])
    assert 3 * count <= sum(changed) and max(changed) <= limit
    check(sql, Model())


def test_a_batch_of_which_one_cannot_be_read_leaves_nothing(store: Store, sql: Run) -> None:
    good = at_position(1, put())
    for body in (b"", b"\xc0", b"\x90", b"\x91\x09", b"\xff", good.body):
        codec = Codec.ZSTD_MSGPACK if body == good.body else Codec.MSGPACK
        with pytest.raises(StoreDataError, match="cannot be read"):
            store.write_records([good, good._replace(body=body, codec=codec, key=bytes(16))])
        assert tables(sql, NAMESPACE).cells == {}


def test_namespaces_have_threads_of_their_own(store: Store, sql: Run) -> None:
    made = put(blobs={blob(1): value("x")})
    store.write_records([at_position(1, made)])
    store.write_records([at_position(2, made, "other"), at_position(3, writes(), "other")])
    store.write_records([at_position(4, Delete("t"), "other")])
    assert len(tables(sql, NAMESPACE).cells) == len(tables(sql, NAMESPACE).blobs) == 1
    assert tables(sql, "other").cells == {}


# ---- reading back


def test_checkpoints_come_back_in_pages_by_any_scope(store: Store) -> None:
    names = [(f"t{t}", ns, f"{n:02}") for t in range(2) for ns in ("", "a|b:1") for n in range(7)]
    made = [put(*name, blobs={blob(1): value("x")}, run_key=bytes([int(name[2])]) * 16) for name in names]
    store.write_records([at_position(n, change) for n, change in enumerate(made, 1)])
    store.write_records([at_position(100, Drop("t0", [("", "03")], []))])
    left = [change for change in made if change[:3] != ("t0", "", "03")]
    scopes: list[tuple[Scope, list[Put]]] = [
        (("namespace", NAMESPACE), left),
        (("thread_key", keys("t0")[0]), [change for change in left if change.thread_id == "t0"]),
        (("ns_key", keys("t1", "a|b:1")[1]), [change for change in left if change[:2] == ("t1", "a|b:1")]),
    ]
    with store.graphs(NAMESPACE) as threads:
        for scope, wanted in scopes:
            found: list[Put] = []
            before: tuple[str, bytes] | None = None
            while page := threads.cells(scope, before, 3):
                assert len(page) <= 3
                found += [cell.put for cell in page]
                before = page[-1].put.checkpoint_id, page[-1].key
            in_order = sorted(wanted, key=lambda p: (p.checkpoint_id, keys(*p[:3])[2]), reverse=True)
            assert found == [each._replace(blobs={}) for each in in_order]
        some = threads.cells(scopes[0][0], None, 100, [b"\x01" * 16, b"\x03" * 16])
        assert sorted(cell.put.checkpoint_id for cell in some) == ["01"] * 4 + ["03"] * 3


def test_one_checkpoint_and_what_belongs_to_it(store: Store) -> None:
    big = put(blobs={blob(1): value(noise(BIG, 1)), blob(2): value(b"")}, parent_id="0")
    first, second = at_position(2, writes(text="a")), at_position(3, writes(text="b"))
    store.write_records([second, at_position(1, big), first, at_position(4, writes(checkpoint_id="other"))])
    _, of_ns, cell = keys()
    with store.graphs(NAMESPACE) as threads:
        found = threads.cell(cell)
        assert found is not None
        assert (found.key, found.position, found.put) == (cell, at_position(1, big).position, big._replace(blobs={}))
        assert threads.cell(bytes(16)) is None
        values, pending = threads.contents([cell], [blob_key(of_ns, blob(n)) for n in (1, 2, 3)])
        assert {key: each for key, (_, each) in values.items()} == {
            blob_key(of_ns, blob(1)): value(noise(BIG, 1)),
            blob_key(of_ns, blob(2)): value(b""),
        }
        assert [record.body for record in pending] == [first.body, second.body]
        assert [record.position for record in pending] == [first.position, second.position]
        assert threads.contents([], []) == ({}, [])


def test_a_deleted_value_is_not_there(store: Store) -> None:
    store.write_records(logged(put(blobs={blob(1): value("x")}), Drop("t", [], [("", blob(1))])))
    with store.graphs(NAMESPACE) as threads:
        assert threads.contents([], [blob_key(keys()[1], blob(1))]) == ({}, [])


def test_when_threads_and_checkpoints_changed_last(store: Store) -> None:
    records = logged(put(), put("u"), Delete("t"), put(checkpoint_id="2"), Drop("u", [("", "1")], []))
    store.write_records(records)
    thread, _, gone = keys()
    there, dropped = keys(checkpoint_id="2")[2], keys("u")[2]
    with store.graphs(NAMESPACE) as threads:
        deleted, changed, *_ = threads.ends([thread, keys("u")[0], bytes(16)], [gone, there, dropped, bytes(16)])
    assert deleted[thread] == records[2].position
    assert bytes(16) not in deleted and bytes(16) not in changed and gone not in changed
    assert (changed[there], changed[dropped]) == (records[3].position, records[4].position)


def test_dead_letters_of_a_thread(store: Store) -> None:
    mine, others = at_position(1, put(blobs={blob(1): value(noise(BIG, 1))})), at_position(2, put("u"))
    for record in (mine, others, event(3)):
        store.write_dead_letter(letter(record))
    store.write_dead_letter(letter(at_position(4, put())._replace(body=None, manifest=Manifest(5, 1, b"d" * 16))))
    with store.graphs(NAMESPACE) as threads:
        assert threads.dead("t") == [mine]
        assert sorted(record.agent_id for record in threads.dead(None)) == ["t", "u"]
    with store.graphs("other") as threads:
        assert threads.dead(None) == []


SETTLED = {
    "nothing": ([], False, False),
    "itself": ([1], True, True),
    "a newer put": ([3], True, False),
    "an older put": ([0], False, False),
    "a later deletion of the checkpoint": ([4], True, True),
    "a later deletion and return of the checkpoint": ([4, 5], True, True),
    "an earlier deletion of the checkpoint": ([-1], False, False),
    "a later deletion of the thread": ([6], True, True),
}


@pytest.mark.parametrize("name", SETTLED)
def test_what_is_settled_without_its_body(store: Store, name: str) -> None:
    records = {
        -1: at_position(10, Drop("t", [("", "1")], [])),
        0: at_position(11, put()),
        1: at_position(12, put()),
        2: at_position(13, writes()),
        3: at_position(14, put()),
        4: at_position(15, Drop("t", [("", "1")], [])),
        5: at_position(16, put()),
        6: at_position(17, Delete("t")),
    }
    stored, put_settled, writes_settled = SETTLED[name]
    store.write_records([event(1), *(records[n] for n in stored)])
    if name == "itself":
        store.write_records([records[2]])
    lost = Manifest(9, 1, b"d" * 16)
    assert store.graph_settled(records[1]._replace(body=None, manifest=lost)) is put_settled
    assert store.graph_settled(records[2]._replace(body=None, manifest=lost)) is writes_settled


@pytest.mark.parametrize(
    "deletion", [Delete("t"), Drop("t", [("", "1"), ("", "2")], []), Drop("t", [], [("", blob(1))])]
)
def test_a_deletion_is_settled_without_its_body(store: Store, deletion: Operation) -> None:
    """Or a large one that is delivered twice would become a dead letter."""
    value_of = {blob(1): value("x")}
    before, made, after = at_position(10, put(blobs=value_of)), at_position(13, deletion), at_position(16, Delete("u"))
    lost = made._replace(body=None, manifest=Manifest(9, 1, b"d" * 16))
    store.write_records([before, after])
    assert not store.graph_settled(lost)
    store.write_records([made])
    assert store.graph_settled(lost)
