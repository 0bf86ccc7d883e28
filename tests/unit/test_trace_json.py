"""The JSON of a trace: real JSON for every payload, markers for what JSON cannot hold, and never an error."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import ormsgpack
import pytest

from skialith import payloads, trace_json
from skialith.config import MAX_PAYLOAD_DEPTH, TRACE_JSON_BYTES, TRACE_JSON_DEPTH
from skialith.errors import BodyMissing
from skialith.records import Codec, Kind, Manifest, Record


def strict(text: str) -> Any:
    """The value of real JSON: no NaN, no duplicate keys, and a database reads it too."""
    assert sqlite3.connect(":memory:").execute("SELECT json_valid(?)", (text,)).fetchone() == (1,)

    def refuse(name: str) -> Any:
        raise AssertionError(name)

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(entries)) == len(entries)
        return dict(entries)

    return json.loads(text, parse_constant=refuse, object_pairs_hook=pairs)


def record(codec: int, body: bytes | None, manifest: Manifest | None = None) -> Record:
    return Record(Kind.EVENT, "n", "a", "e", bytes(16), 0, "event", 0, codec, body, manifest=manifest)


def omitted(why: str) -> dict[str, str]:
    return {"skialith_omitted": why}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"kind": "thought", "n": [1, 2.5, None, True]}, {"kind": "thought", "n": [1, 2.5, None, True]}),
        ([2**64 - 1, -(2**63)], [2**64 - 1, -(2**63)]),
        (2**64, omitted("int over 64 bits")),
        ("é\0🙂\u2028", "é\0🙂\u2028"),
        (b"\x00\xff", {"skialith_base64": "AP8="}),
        ([float("nan"), float("inf"), float("-inf")], [omitted("NaN"), omitted("Infinity"), omitted("-Infinity")]),
        ({1: 1, None: 2, False: 3, 1.5: 4}, {"1": 1, "null": 2, "false": 3, "1.5": 4}),
        ({(1, "a"): 1, b"x": 2}, {'[1,"a"]': 1, '{"skialith_base64":"eA=="}': 2}),
        ({"x": {1: 1, "1": 2}}, {"x": omitted("two keys that are both '1' as JSON")}),
        ({"x": {"k\ud800": 1}}, {"x": omitted("a key with a lone surrogate")}),
        (["\ud800"], [omitted("text with a lone surrogate")]),
        ([{1}, ormsgpack.Ext(1, b"")], [omitted("a value of type set"), omitted("a value of type Ext")]),
    ],
)
def test_to_json(value: object, expected: object) -> None:
    assert strict(trace_json.to_json(value)) == expected


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@pytest.mark.parametrize("levels", [TRACE_JSON_DEPTH - 2, TRACE_JSON_DEPTH - 1, TRACE_JSON_DEPTH, 200, 5000])
@pytest.mark.parametrize("leaf", [1, b"x", float("nan")])
def test_depth(levels: int, leaf: object) -> None:
    value: Any = leaf
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    text = trace_json.to_json(value)
    assert depth(strict(text)) <= TRACE_JSON_DEPTH
    assert ("deeper than 30 levels" in text) == (levels >= TRACE_JSON_DEPTH)


def test_what_is_too_large_becomes_a_marker() -> None:
    exact = "x" * (TRACE_JSON_BYTES - 2)
    assert strict(trace_json.to_json(exact)) == exact
    marker = {"skialith_omitted": "larger than 1048576 bytes as JSON", "bytes": 77}
    assert strict(trace_json.to_json(exact + "x", 77)) == marker
    assert strict(trace_json.to_json("é" * (TRACE_JSON_BYTES // 2), 77)) == marker
    assert strict(trace_json.to_json([0] * TRACE_JSON_BYTES, 77)) == marker
    assert strict(trace_json.to_json([[0] * 10_000] * 10_000, 77)) == marker


def test_it_stops_early_in_a_value_that_refers_to_itself() -> None:
    loop: list[Any] = []
    loop.extend([loop, loop])
    assert strict(trace_json.to_json(loop))["skialith_omitted"].startswith("larger than")


def test_it_never_raises() -> None:
    class Hostile(str):
        def encode(self, *_: object, **__: object) -> bytes:
            raise RuntimeError("no")

    assert strict(trace_json.to_json({"a": Hostile("x")}, 5)) == {
        "skialith_omitted": "RuntimeError while it was made JSON",
        "bytes": 5,
    }


def test_of_record() -> None:
    codec, body = payloads.pack({"text": "x" * 100_000})
    assert codec == Codec.ZSTD_MSGPACK
    assert strict(trace_json.of_record(record(codec, body))) == {"text": "x" * 100_000}
    assert strict(trace_json.of_record(record(0, b"\x93\x01"))) == {
        "skialith_omitted": "cannot be decoded: payload: cut short at byte 2",
        "bytes": 2,
    }
    assert "unknown codec 9" in trace_json.of_record(record(9, b""))


def test_of_record_does_not_decode_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "decode", None)
    codec, body = payloads.pack(bytes(4 * TRACE_JSON_BYTES))
    expected = {"skialith_omitted": "larger than 1048576 bytes as JSON", "bytes": 4 * TRACE_JSON_BYTES + 5}
    assert strict(trace_json.of_record(record(codec, body))) == expected
    assert strict(trace_json.of_record(record(codec, None, Manifest(7_000_000, 7, b"")))) == {
        **expected,
        "bytes": 7_000_000,
    }


def nested(levels: int) -> Any:
    value: Any = "bottom"
    for n in range(levels):
        value = [value] if n % 2 else {"in": value}
    return value


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "thought", "n": [1, 2.5, None, True, 2**64 - 1, "é\0🙂\u2028"]},
        "x" * (3 * TRACE_JSON_BYTES),
        {f"k{n}": n for n in range(1000)},
        nested(MAX_PAYLOAD_DEPTH - 1),
        nested(65),
        [],
        {},
    ],
    ids=lambda value: repr(value)[:20],
)
def test_whole_payloads_are_whole(value: object) -> None:
    codec, body = payloads.pack(value)
    assert strict(trace_json.whole(record(codec, body))) == value


def test_whole_says_what_json_cannot_hold() -> None:
    codec, body = payloads.pack({"b": b"\x00\xff", "n": float("nan"), "k": {1: b""}})
    text = trace_json.whole(record(codec, body))
    assert strict(text) == {
        "b": {"skialith_base64": "AP8="},
        "n": omitted("NaN"),
        "k": {"1": {"skialith_base64": ""}},
    }
    at_the_bottom: Any = b"\xff"
    for _ in range(MAX_PAYLOAD_DEPTH - 1):
        at_the_bottom = [at_the_bottom]
    deep = trace_json.whole(record(*payloads.pack(at_the_bottom)))
    assert deep.strip("[]") == '{"skialith_base64":"/w=="}'


def test_whole_raises_for_what_is_lost_or_corrupt() -> None:
    with pytest.raises(BodyMissing):
        trace_json.whole(record(Codec.MSGPACK, None, Manifest(5, 1, b"")))
    for codec, body in ((0, b"\xc1"), (0, b"\x01\x01"), (1, b"no zstd"), (7, b"\xc0"), (0, b"")):
        with pytest.raises(ValueError, match="payload"):
            trace_json.whole(record(codec, body))
