"""Operations on graphs' threads: their bytes, and that what they come to does not depend on the order they are noted in."""

from __future__ import annotations

import random

import ormsgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skialith import graphs
from skialith.config import GRAPH_COMPRESS_ABOVE_BYTES, MAX_ID_CHARACTERS
from skialith.errors import InvalidArgument, RecordTooLarge
from skialith.graphs import Changes, Delete, Drop, Operation, Put, PutWrites, Typed, Write
from skialith.records import Codec, Kind, Record

from ..fixtures.graph_model import Model, Tables, at_position, blob, put, some_operation, writes
from ..fixtures.stores import NAMESPACE, noise

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.builds(Typed, texts, st.integers(0, 1), st.binary(max_size=20))
keys = st.binary(min_size=16, max_size=16)
operations: st.SearchStrategy[Operation] = st.one_of(
    st.builds(
        Put,
        texts,
        texts,
        texts,
        st.none() | texts,
        st.none() | keys,
        st.lists(keys).map(b"".join),
        values,
        values,
        st.dictionaries(keys, values, max_size=4),
    ),
    st.builds(
        PutWrites,
        texts,
        texts,
        texts,
        texts,
        texts,
        st.lists(st.builds(Write, st.integers(-4, 2**31), texts, values), max_size=4),
    ),
    st.builds(Delete, texts),
    st.builds(Drop, texts, st.lists(st.tuples(texts, texts)), st.lists(st.tuples(texts, keys))),
)


@given(operations)
def test_an_operation_comes_back_as_it_was(operation: Operation) -> None:
    body = graphs.encode(operation)
    assert graphs.decode(body) == operation
    assert type(graphs.decode(body)) is type(operation)


@given(
    st.binary(max_size=40)
    | st.recursive(st.none() | st.integers(-9, 9) | st.binary(max_size=4), st.lists).map(ormsgpack.packb)
)
@example(ormsgpack.packb({"a": 1}))
def test_what_is_no_operation_is_a_value_error(body: bytes) -> None:
    try:
        graphs.decode(body)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_operation_is_a_value_error(cut: int) -> None:
    body = graphs.encode(put(blobs={blob(1): Typed("bytes", 0, b"value")}))
    with pytest.raises(ValueError, match=r".+"):
        graphs.decode(body[:-cut])


@given(
    operations, st.integers(1, 9), st.none() | st.integers(-9, 9) | st.binary(max_size=3) | texts | st.lists(st.none())
)
def test_a_field_of_another_type_is_refused_or_makes_no_difference_to_who_reads(
    operation: Operation, place: int, wrong: object
) -> None:
    fields = ormsgpack.unpackb(graphs.encode(operation))
    if place < len(fields):
        fields[place] = wrong
    body = ormsgpack.packb(fields)
    try:
        changes = Changes(NAMESPACE)
        changes.note(at_position(1, operation)._replace(body=body))
    except ValueError:
        return
    assert graphs.decode(graphs.encode(graphs.decode(body))) == graphs.decode(body)


def test_an_operation_of_a_newer_version_says_so() -> None:
    with pytest.raises(ValueError, match=r"operation 9 .* newer Skialith"):
        graphs.decode(ormsgpack.packb([9, "t"]))


# ---- what operations come to


def come_to(changes: Changes) -> Tables:
    """What stands in ``changes`` when all was noted."""
    changes.forget_before(changes.deleted)
    changes.forget_pending_before({key: cell.ended for key, cell in changes.cells.items()})
    cells = {cell.put[:3]: cell.put for cell in changes.cells.values() if cell.put is not None}
    blobs = {key: each.value for key, each in changes.blobs.items() if each.value is not None}
    return Tables(cells, blobs, {key: each.writes for key, each in changes.writes.items()})


@given(st.integers(0, 2**32), st.integers(1, 25), st.randoms(use_true_random=False))
def test_changes_commute_and_repeat(seed: int, count: int, order: random.Random) -> None:
    dice = random.Random(seed)
    made = [some_operation(dice) for _ in range(count)]
    records = [at_position(n, change) for n, change in enumerate(made, 1)]
    model = Model()
    for record, change in zip(records, made, strict=True):
        model.apply(record.key, change)
    again = [*records, *order.sample(records, order.randrange(len(records) + 1))]
    order.shuffle(again)
    changes = Changes(NAMESPACE)
    for record in again:
        changes.note(record)
    assert come_to(changes).difference(model.keyed(NAMESPACE)) == ""


def test_a_checkpoint_that_returned_has_none_of_its_old_writes() -> None:
    made: list[Operation] = [writes(), Drop("t", [("", "1")], []), put(), writes()]
    records = [at_position(n, change) for n, change in enumerate(made, 1)]
    for order in (records, records[::-1]):
        changes = Changes(NAMESPACE)
        for record in order:
            changes.note(record)
        assert list(come_to(changes).writes) == [records[3].key]


# ---- identities and records


def test_everything_that_differs_has_a_key_of_its_own() -> None:
    found = [graphs.thread_key(ns, thread) for ns in ("a", "ab") for thread in ("", "b", "bc", "\0", " ")]
    found += [graphs.ns_key(found[0], ns) for ns in ("", "a", "a|b", "a|b:1")]
    found += [graphs.cell_key(found[0], each) for each in ("", "a")] + [graphs.blob_key(found[0], b"a" * 16)]
    found += [graphs.blob_id("c", version) for version in ("1", 1, 1.0, "1.0", "2")] + [graphs.blob_id("c1", "")]
    found += [graphs.run_key("a")]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "thread_id", ["", "x" * (MAX_ID_CHARACTERS + 1), "x" * MAX_ID_CHARACTERS, "a.b*c>", "\0", "🦜" * 10_000, "a ", "A"]
)
def test_a_threads_name_can_be_an_id(thread_id: str) -> None:
    name = graphs.thread_name(thread_id)
    assert 0 < len(name) <= MAX_ID_CHARACTERS
    assert (name == thread_id) == (0 < len(thread_id) <= MAX_ID_CHARACTERS)
    assert name != graphs.thread_name(thread_id + "x")


def test_a_record_names_its_thread_and_checkpoint() -> None:
    record = graphs.record(NAMESPACE, put("t", "ns", "id"), 10_000)
    thread = graphs.thread_key(NAMESPACE, "t")
    assert graphs.named_keys(record) == (thread, graphs.cell_key(graphs.ns_key(thread, "ns"), "id"))
    assert (record.kind, record.agent_id, record.event_type) == (Kind.GRAPH, "t", graphs.PUT)
    assert graphs.operation(record) == put("t", "ns", "id")
    assert record.key != graphs.record(NAMESPACE, put("t", "ns", "id"), 10_000).key


def test_a_record_over_the_limit_is_refused() -> None:
    with pytest.raises(RecordTooLarge, match=r"thread 't': Put has .*max_record_bytes") as caught:
        graphs.record(NAMESPACE, put(blobs={blob(1): Typed("bytes", 0, bytes(2000))}), 2000)
    assert caught.value.limit == 2000 < caught.value.size < 2300


@pytest.mark.parametrize(
    "data", [b"", b"x" * GRAPH_COMPRESS_ABOVE_BYTES, b"x" * (GRAPH_COMPRESS_ABOVE_BYTES + 1), noise(600_000, 1)]
)
def test_a_value_is_compressed_when_that_helps(data: bytes) -> None:
    value = graphs.typed("msgpack", data)
    assert graphs.plain(value) == ("msgpack", data)
    helps = len(data) > GRAPH_COMPRESS_ABOVE_BYTES and data[:1] == b"x"
    assert value.codec == (Codec.ZSTD_MSGPACK if helps else Codec.MSGPACK)
    assert (len(value.data) < len(data)) == helps


@pytest.mark.parametrize(
    ("value", "message"), [("a\ud800", "lone surrogate at index 1"), (1, "not int"), (None, "not NoneType")]
)
def test_what_is_no_text_is_refused(value: object, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        graphs.checked_text("thread_id", value)
    assert caught.value.argument == "thread_id"


def test_a_record_whose_operation_cannot_be_read_changes_nothing() -> None:
    bad: Record = at_position(1, put())._replace(body=b"\xc0")
    changes = Changes(NAMESPACE)
    with pytest.raises(ValueError, match="not an operation"):
        changes.note(bad)
    assert changes == Changes(NAMESPACE)
