"""skialith._rows against the plain Python oracle: order, rows, the text of an INSERT, and the JSON of any payload."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import ormsgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skialith import _fastpath, _rows, payloads, trace_json
from skialith.config import LARGEST_RECORD_BYTES, PAYLOAD_PART_BYTES, TRACE_JSON_BYTES, TRACE_JSON_DEPTH
from skialith.records import Codec, Kind, Message, Position, Record, Trace
from skialith.stores import rows
from skialith.writer.batch import Undecodable, decode, decode_run

from . import rows_oracle
from .test_payloads import keys, nested, scalars

NAMESPACE = "n"
int64 = st.integers(-(2**63), 2**63 - 1)
uint64 = st.integers(0, 2**64 - 1)
key = st.one_of(st.sampled_from([bytes(16), b"\xff" * 16]), st.binary(min_size=16, max_size=16))
positions = st.builds(Position, st.one_of(st.integers(0, 2), int64), st.one_of(st.integers(0, 2), uint64))
ids = st.text(max_size=300)
bodies = st.binary(max_size=40)
records = st.builds(
    Record,
    kind=st.sampled_from(Kind),
    namespace=st.text(max_size=5),
    agent_id=ids,
    record_id=ids,
    key=key,
    step_index=int64,
    event_type=ids,
    created_us=int64,
    codec=st.sampled_from(Codec),
    body=bodies,
    position=positions,
    manifest=st.none(),
)
made_traces = st.builds(
    Trace, key, st.text(max_size=5), ids, ids, int64, ids, st.text(), st.integers(-(2**70), 2**70), positions
)
values = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 9, 10, -1, -(2**63), 2**64 - 1]),
    st.text(max_size=30),
    st.binary(max_size=30),
    st.text(alphabet="'\"\\\0\n\r\x1aé🦜a", max_size=20),
    st.lists(st.sampled_from([b"'", b'"', b"\\", b"\0", b"\xc3", b"\xf0\x9f", b"%", b"\x1a"]), max_size=9).map(
        b"".join
    ),
)


# ---- records

text = st.one_of(st.text(max_size=40), st.sampled_from([31, 32, 255, 256, 65536]).map(lambda n: "x" * n))
wire = st.builds(
    _fastpath.encode_record,
    st.sampled_from([1, 1, 1, 2, 3, 255]),
    st.one_of(st.sampled_from(["a", "b"]), text),
    text,
    key,
    int64,
    st.one_of(st.sampled_from(["thought", "tool"]), text),
    int64,
    st.integers(0, 255),
    st.one_of(st.binary(max_size=40), st.sampled_from([255, 256, 65536]).map(bytes)),
    st.none(),
)
heads = st.builds(
    lambda key, manifest: _fastpath.encode_record(1, "a", "e", key, 0, "t", 0, 0, None, manifest),
    key,
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.binary(max_size=9)),
)


def delivered(n: int, data: bytes) -> Message:
    return Message("s", data, Position(n, n), "r", 1, 1)


def one_by_one(messages: list[Message], kinds: set[int]) -> list[Record | None]:
    """What ``decode_run`` may return: the records up to the first one that needs a closer look."""
    found: list[Record | None] = []
    for message in messages:
        try:
            record = decode(NAMESPACE, message)
        except Undecodable:
            break
        if record.manifest is not None:
            break
        found.append(record if record.kind in kinds else None)
    return found


@given(st.lists(st.one_of(wire, wire, wire, heads, st.binary(max_size=5)), max_size=12), st.sets(st.integers(1, 3)))
def test_a_run_of_messages_becomes_their_records(datas: list[bytes], kinds: set[int]) -> None:
    messages = [delivered(n, data) for n, data in enumerate(datas)]
    assert decode_run(NAMESPACE, messages, kinds) == one_by_one(messages, kinds)


@given(wire, st.data())
def test_a_damaged_message_is_left_to_the_closer_look_or_means_the_same(sound: bytes, data: st.DataObject) -> None:
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, min(len(sound) - 1, 60)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(sound)))
    for each in (bytes(damaged), bytes(damaged[:cut]), sound[:cut], sound + b"\0"):
        assert decode_run(NAMESPACE, [delivered(1, each)], {1}) in ([], one_by_one([delivered(1, each)], {1}))


# ---- order and rows


@given(st.lists(records, max_size=20))
def test_order(items: list[Record]) -> None:
    assert rows.in_order(iter(items)) == rows_oracle.in_order(items)


@given(st.lists(records, max_size=5), st.lists(st.integers(0, 5), max_size=3))
def test_rows_of_records(items: list[Record], large: list[int]) -> None:
    for n in large:
        if n < len(items):
            items[n] = items[n]._replace(body=bytes(PAYLOAD_PART_BYTES + n % 2))
    events, checkpoints, payloads_ = rows.of_records(items)
    assert (events, checkpoints) == rows_oracle.of_records(items)
    expected = [rows.of_record(item)[1] for item in items]
    assert [payload for _, payload in payloads_] == [payload for payload in expected if payload is not None]


@given(st.lists(made_traces, max_size=5))
@example(
    [Trace(bytes(16), "n", "a", "e", 0, "t", "{}", n, Position(n, 0)) for n in (-1, -999_999, 951_782_399_999_999)]
)
@example([Trace(bytes(16), "n", "a", "e", 0, "t", "{}", n, Position(0, 0)) for n in (-(2**63), 2**63 - 1, 2**63)])
@example(
    [Trace(bytes(16), "n", "a", "e", 0, "t", "{}", -30_610_224_000_000_000 + n, Position(0, 0)) for n in (-1, 0, 1)]
)
@example([Trace(bytes(16), "n", "a", "e", 0, "t", "{}", 253_402_300_800_000_000 + n, Position(0, 0)) for n in (-1, 0)])
def test_rows_of_traces(items: list[Trace]) -> None:
    assert rows.of_traces(rows.in_order(items)) == [
        rows_oracle.of_trace(trace) for trace in rows_oracle.in_order(items)
    ]


@pytest.mark.parametrize(
    "bad",
    [("short",), object(), None, Record(1, "n", "a", "e", b"k", 0, "t", 0, 0, b""), (None,) * 12, (b"x" * 16,) * 12],
)
def test_what_is_no_record_is_refused(bad: Any) -> None:
    for call in (
        lambda: _rows.in_order([bad], 4, 10),
        lambda: _rows.of_records([bad[:-1] if isinstance(bad, tuple) else bad], 10, lambda item: item),
        lambda: _rows.of_traces([bad]),
        lambda: _rows.traces(Trace, [bad[:-1] if isinstance(bad, tuple) else bad], ["{}"], 5),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


# ---- the text of an INSERT


def inserted(table: list[Any], *limits: Any, head: bytes = b"INSERT ", tail: bytes = b" TAIL") -> list[bytes]:
    made, done = [], 0
    while done < len(table):
        statement, done = _rows.insert(head, tail, table, done, *limits)
        made.append(statement)
    return made


@given(
    st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[values] * width), max_size=9)),
    st.integers(1, 5),
    st.integers(0, 400),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 12),
)
def test_insert(table: list[Any], most_rows: int, most_bytes: int, repeated: list[int], most_characters: int) -> None:
    repeated = [n for n in repeated if table and n < len(table[0])]
    limits = (most_rows, most_bytes, tuple(repeated), most_characters)
    assert inserted(table, *limits) == rows_oracle.statements(b"INSERT ", b" TAIL", table, *limits)


def test_every_byte() -> None:
    table = [(bytes([n]), chr(n)) for n in range(256)]
    assert inserted(table, 1000, 1 << 20, (), 0) == rows_oracle.statements(
        b"INSERT ", b" TAIL", table, 1000, 1 << 20, (), 0
    )


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ((2**64,), OverflowError),
        ((-(2**63) - 1,), OverflowError),
        (("\ud800",), UnicodeEncodeError),
        ((1.5,), TypeError),
        ((bytearray(b"x"),), TypeError),
        ([1], TypeError),
        (None, TypeError),
    ],
)
def test_what_no_statement_can_hold(row: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        inserted([row], 1, 100, (), 0)


def test_rows_of_one_width_and_columns_that_are_there() -> None:
    for arguments in (
        ([(1, 2), (1,)], 0, 2, 100, (), 0),
        ([(1,), (1, 2)], 0, 2, 100, (), 0),
        ([(1,)], 0, 1, 100, (1,), 0),
        ([(1,)], 0, 1, 100, (-1,), 0),
        ([(1,)], 1, 1, 100, (), 0),
        ([(1,)], -1, 1, 100, (), 0),
        ([(1,)], 0, 0, 100, (), 0),
        ([], 0, 1, 100, (), 0),
    ):
        with pytest.raises((TypeError, ValueError)):
            _rows.insert(b"", b"", *arguments)


# ---- JSON


def in_c(body: bytes, depth: int = TRACE_JSON_DEPTH, limit: int = TRACE_JSON_BYTES) -> str | None:
    (text,) = _rows.json_texts([body], depth, limit)
    return text


def in_python(body: bytes, depth: int = TRACE_JSON_DEPTH, limit: int = TRACE_JSON_BYTES) -> str | None:
    """What the Python form makes of it; None if it does not decode."""
    try:
        value = payloads.decode(0, body, LARGEST_RECORD_BYTES)
    except ValueError:
        return None
    return trace_json.to_json(value, len(body), depth=depth, limit=limit)


def is_short(number: float) -> bool:
    """What the C form writes itself: neither subnormal nor a power of two with over 15 digits."""
    return number == 0 or (
        math.isfinite(number)
        and abs(number) >= 2.0**-1022
        and (abs(math.frexp(number)[0]) != 0.5 or float(f"{number:.14e}") == number)
    )


plain_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats().filter(is_short), st.text(), st.binary()
)
plain = st.recursive(
    plain_scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=20), st.dictionaries(st.text(), inner, max_size=40)),
    max_leaves=30,
)


@given(plain)
@example({f"k{n}": n for n in range(64)})
@example([0.1, -0.0, 1e16, 1e-5, 123456789012345680.0, 1e22, 1.7976931348623157e308, 5.0, 100.0, 0.0001, 2.0**-10])
@example('\0\x1f\x7f"\\\n\t\r\b\f/é🙂\u2028\uffff\ud7ff\U0010ffff')
def test_json_of_what_is_ordinary_is_written_in_c(value: Any) -> None:
    body = payloads.encode(value)
    text = in_c(body)
    assert text is not None
    assert text == in_python(body)


@given(nested(scalars, keys))
def test_json_of_any_payload(value: Any) -> None:
    try:
        body = payloads.encode(value)
    except ValueError:
        return
    record = Record(1, "n", "a", "e", bytes(16), 0, "t", 0, Codec.MSGPACK, body)
    assert in_c(body) in (None, in_python(body))
    assert trace_json.of_records([record, record]) == [in_python(body)] * 2
    assert trace_json.of_record(record) == in_python(body)


@given(
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=9).flatmap(lambda b: st.integers(0x80, 0xFF).map(lambda n: bytes([n]) + b)),
    )
)
@example(b"\x82\xa1a\x01\xa1a\x02")  # one key twice
@example(b"\xa2\xc0\x80")  # UTF-8 longer than need be
@example(b"\xa3\xed\xa0\x80")  # a surrogate
@example(b"\xa4\xf4\x90\x80\x80")  # beyond Unicode
@example(b"\x81\xa2\xc3\x28\x01")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xdb\xff\xff\xff\xff")
@example(b"\xc1")
@example(b"\xca\x7f\xc0\x00\x00")
@example(b"\xcb\xff\xf0\x00\x00\x00\x00\x00\x00")
@example(b"\x01\x01")
@example(b"")
def test_json_of_any_bytes(body: bytes) -> None:
    expected = in_python(body)
    text = in_c(body)
    assert text is None or text == expected


@given(plain, st.data())
def test_json_of_a_damaged_payload(value: Any, data: st.DataObject) -> None:
    body = bytearray(payloads.encode(value))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(body[: data.draw(st.integers(0, len(body)))])
    for each in (bytes(body), damaged):
        text = in_c(each)
        assert text is None or text == in_python(each)


@given(st.one_of(st.floats(), st.floats(width=32), st.decimals(allow_nan=False, allow_infinity=False).map(float)))
@example(5e-324)
@example(2.2250738585072014e-308)
@example(2.0**60)
@example(9007199254740993.0)
def test_json_of_a_float(number: float) -> None:
    text = in_c(b"\xcb" + struct.pack(">d", number))
    assert text == (repr(number) if is_short(number) else None)
    if math.isfinite(number) and abs(number) < 3e38:
        single = struct.pack(">f", number)
        (wide,) = struct.unpack(">f", single)
        assert in_c(b"\xca" + single) == (repr(wide) if is_short(wide) else None)


@given(plain, st.integers(0, 60))
def test_json_over_the_limit_is_left_to_python(value: Any, limit: int) -> None:
    body = payloads.encode(value)
    whole = in_c(body)
    assert whole is not None
    assert in_c(body, limit=limit) == (whole if len(whole.encode()) <= limit else None)


@pytest.mark.parametrize("leaf", [1, b"x", [], {}])
@pytest.mark.parametrize("depth", [0, 1, 2, TRACE_JSON_DEPTH, 64])
@pytest.mark.parametrize("beyond", [-2, -1, 0, 1])
def test_json_depth(leaf: Any, depth: int, beyond: int) -> None:
    value = leaf
    for level in range(depth + beyond):
        value = [value] if level % 2 else {"a": value}
    body = ormsgpack.packb(value)
    text = in_c(body, depth)
    expected = in_python(body, depth)
    assert text == (expected if "deeper than" not in str(expected) else None)


def test_a_text_that_fails_leaves_nothing_in_its_neighbours() -> None:
    good = ormsgpack.packb(["x" * 5000])
    for bad in (b"\x92\xa3abc\xc1", b"\x92\xa3abc", b"", b"\xa1\xff"):
        text = json.dumps(["x" * 5000], separators=(",", ":"))
        assert _rows.json_texts([bad, good, bad, good, bad], 30, 10_000) == [None, text, None, text, None]
    assert _rows.json_texts([], 30, 10_000) == []


def test_json_texts_refuses_other_arguments() -> None:
    for arguments in (([b""], 65, 1), ([b""], -1, 1), ([b""], 1, -1)):
        with pytest.raises(ValueError, match="depth is"):
            _rows.json_texts(*arguments)
    with pytest.raises(TypeError):
        _rows.json_texts([bytearray(b"\x01")], 1, 1)  # type: ignore[list-item]
