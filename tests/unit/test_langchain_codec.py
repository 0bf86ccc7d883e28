"""LangGraph's values through a serializer: what is written again, errors that name the channel, the order of writes."""

from __future__ import annotations

import pickle
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, RESUME, SCHEDULED

from skialith.errors import ChannelValueMissing, InvalidArgument
from skialith.graph_past import Filled
from skialith.graphs import Put, Typed, blob_id, split_refs
from skialith.langchain_codec import Codec, KnownValues, place_of

from ..fixtures.graphs import at, checkpoint, metadata

SERDE = JsonPlusSerializer()


class Refusing(JsonPlusSerializer):
    """Refuses what the test names, going in or coming out."""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        if obj == "refused":
            raise TypeError("this value is refused")
        return super().dumps_typed(obj)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        value = super().loads_typed(data)
        if value == "unreadable":
            raise TypeError("this value is unreadable")
        return value


def made(
    codec: Codec, values: dict[str, Any], versions: dict[str, Any], new: dict[str, Any], known: KnownValues
) -> Put:
    return codec.put(at("t"), checkpoint(values, versions), metadata(), new, known)


def test_only_what_is_new_or_not_known_is_written() -> None:
    codec, known = Codec(SERDE), KnownValues()
    versions = {"a": "1", "b": "1", "c": "1"}
    first = made(codec, {"a": 1, "b": 2}, versions, {"a": "1"}, known)
    assert set(first.blobs) == {blob_id("a", "1"), blob_id("b", "1")}
    known.add(first, 7)
    second = made(codec, {"a": 1, "b": 2, "c": 3}, {**versions, "b": "2"}, {"b": "2"}, known)
    assert set(second.blobs) == {blob_id("b", "2"), blob_id("c", "1")}
    assert split_refs(second.refs) == [blob_id("a", "1"), blob_id("b", "2"), blob_id("c", "1")]
    assert codec.put(at("t"), checkpoint({"a": 1}, versions), metadata(), {}, known, 7).blobs == {}
    assert len(codec.put(at("t"), checkpoint({"a": 1}, versions), metadata(), {}, known, 8).blobs) == 1
    known.forget("t")
    assert len(made(codec, {"a": 1}, versions, {}, known).blobs) == 1
    assert len(codec.put(at("t", "other"), checkpoint({"a": 1}, versions), metadata(), {}, known).blobs) == 1


def test_values_without_a_version_travel_with_the_checkpoint() -> None:
    codec = Codec(SERDE)
    put = made(codec, {"a": 1, "free": 2}, {"a": "1"}, {"a": "1"}, KnownValues())
    found = codec.checkpoint_tuple(Filled(put, dict(put.blobs)))
    assert found.checkpoint["channel_values"] == {"a": 1, "free": 2}


def test_errors_name_the_channel() -> None:
    codec = Codec(Refusing())
    with pytest.raises(
        InvalidArgument, match=r"thread 't': channel_values\.bad cannot .* Refusing: this value"
    ) as caught:
        made(codec, {"good": 1, "bad": "refused"}, {"good": "1", "bad": "1"}, {}, KnownValues())
    assert caught.value.argument == "channel_values.bad"
    assert caught.value.outcome == "not_written"
    with pytest.raises(InvalidArgument, match=r"writes\[1\]\.bad"):
        codec.put_writes(at("t", "", "1"), [("good", 1), ("bad", "refused")], "task", "")
    put = made(codec, {"bad": "unreadable"}, {"bad": "1"}, {}, KnownValues())
    with pytest.raises(
        ValueError, match=r"thread 't', checkpoint '.*': channel_values\.bad \(.*\) cannot be deserialized"
    ):
        codec.checkpoint_tuple(Filled(put, dict(put.blobs)))


def test_a_missing_value_is_named_and_the_error_travels() -> None:
    codec = Codec(SERDE)
    put = made(codec, {"a": 1, "b": 2}, {"a": "1", "b": "1"}, {}, KnownValues())
    with pytest.raises(ChannelValueMissing, match="values of 'b' that were deleted") as caught:
        codec.checkpoint_tuple(Filled(put, {blob_id("a", "1"): put.blobs[blob_id("a", "1")]}))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.thread_id, copy.checkpoint_id, copy.channels) == ("t", put.checkpoint_id, ("b",))
    assert (str(copy), copy.outcome) == (str(caught.value), "durable")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "thread_id.* is missing"),
        ({"configurable": {"thread_id": None}}, "thread_id.* is missing"),
        (at("t\ud800"), "thread_id holds a lone surrogate"),
        (at("t", "ns\udfff"), "checkpoint_ns holds a lone surrogate"),
        (at("t", "", "id\ud800"), "checkpoint_id holds a lone surrogate"),
        (at("t", "", "x" * 300), "checkpoint_id has 300 characters"),
        (at("t", 5), "checkpoint_ns must be a str"),  # type: ignore[arg-type]
    ],
)
def test_a_config_that_points_nowhere_is_refused(config: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        place_of(config)
    assert type(pickle.loads(pickle.dumps(caught.value))) is InvalidArgument


def test_ids_that_are_no_text_become_text() -> None:
    assert place_of(at(7)) == place_of(at("7"))


def test_writes_pend_where_a_checkpoint_is() -> None:
    with pytest.raises(InvalidArgument, match="checkpoint_id"):
        Codec(SERDE).put_writes(at("t"), [("a", 1)], "task", "")


def test_of_a_tasks_writes_the_first_stands_and_of_special_ones_the_last() -> None:
    codec, where = Codec(SERDE), at("t", "", "1")
    calls = [
        codec.put_writes(where, [("a", 1), ("b", 2)], "task-2", "~p2"),
        codec.put_writes(where, [(INTERRUPT, "i"), (ERROR, "e")], "task-1", "~p1"),
        codec.put_writes(where, [("a", 9), ("b", 9), ("c", 3)], "task-2", "~p2"),
        codec.put_writes(where, [(INTERRUPT, "i2")], "task-1", "~p1"),
        codec.put_writes(where, [(RESUME, "r"), (SCHEDULED, "s")], "task-0", ""),
    ]
    put = made(codec, {}, {}, {}, KnownValues())
    found = codec.pending(put, calls)
    assert sorted(found[:2]) == [("task-0", RESUME, "r"), ("task-0", SCHEDULED, "s")]
    assert sorted(found[2:4]) == [("task-1", ERROR, "e"), ("task-1", INTERRUPT, "i2")]
    assert found[4:] == [("task-2", "a", 1), ("task-2", "b", 2), ("task-2", "c", 3)]
    assert codec.pending(put, calls, ["b"]) == [("task-2", "b", 2)]


# ---- what is known to be durable


def holding(thread_id: str, values: int) -> Put:
    """A put with so many values."""
    blobs = {blob_id("c", n): Typed("bytes", 0, b"") for n in range(values)}
    return Put(thread_id, "", "1", None, None, b"".join(blobs), Typed("", 0, b""), Typed("", 0, b""), blobs)


def test_the_threads_used_last_are_remembered() -> None:
    known = KnownValues(limit=10)
    for n in range(30):
        known.add(holding(f"t{n}", 4), 1)
        known.add(holding("always", 2), 1)
    assert known.has("always", ("", blob_id("c", 1)), 0)
    assert not known.has("t0", ("", blob_id("c", 1)), 0)
    assert known.has("t29", ("", blob_id("c", 1)), 0)
    known.forget("always")
    known.forget("never seen")
    assert not known.has("always", ("", blob_id("c", 1)), 0)


def test_any_threads_may_use_what_is_known() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    known = KnownValues(limit=60)
    failed: list[BaseException] = []
    before = sys.getswitchinterval()

    def work(dice: random.Random) -> None:
        try:
            for _ in range(4000):
                name = f"t{dice.randrange(4)}"
                if dice.random() < 0.3:
                    known.forget(name)
                else:
                    known.add(holding(name, dice.randrange(40)), 1)
        except BaseException as error:  # noqa: BLE001 - shown below
            failed.append(error)

    threads = [threading.Thread(target=work, args=(random.Random(seed + n),)) for n in range(6)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(before)
    assert failed == []
    # However the threads met, what is remembered stays within the limit.
    for n in range(100):
        known.add(holding(f"more{n}", 1), 1)
    assert sum(map(len, known._threads.values())) <= 60


@pytest.mark.parametrize("bad", ["\ud800", 5, None])
def test_names_that_are_no_text_are_refused(bad: Any) -> None:
    """Two of them could not be sorted any more when they are read."""
    codec, config = Codec(SERDE), at("t", "", "1")
    calls: dict[str, Callable[[], object]] = {
        "channel": lambda: codec.put_writes(config, [("a", 1), (bad, 2)], "task", ""),
        "task_id": lambda: codec.put_writes(config, [("a", 1)], bad, ""),
        "task_path": lambda: codec.put_writes(config, [("a", 1)], "task", bad),
    }
    for name, call in calls.items():
        with pytest.raises(InvalidArgument, match=name) as caught:
            call()
        assert caught.value.argument == name and caught.value.outcome == "not_written"
    with pytest.raises(InvalidArgument, match="channel"):
        made(codec, {bad: 1}, {bad: "1"}, {bad: "1"}, KnownValues())
