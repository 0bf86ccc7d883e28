"""Any payload: what encode() lets through comes back equal up to the documented mapping; the rest is refused."""

from __future__ import annotations

import datetime as dt
import enum
import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from skialith import payloads, trace_json
from skialith.errors import InvalidPayload


class Letter(enum.Enum):
    A = "a"
    ONE = 1
    PAIR = ("a", 1)


offsets = st.timedeltas(dt.timedelta(hours=-23.9), dt.timedelta(hours=23.9)).map(dt.timezone)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.integers(0, 3),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["a", "1", "2020-01-01", "00:00:00"]),
    st.binary(max_size=20),
    st.dates(),
    st.just(dt.date(2020, 1, 1)),
    st.datetimes(timezones=st.one_of(st.none(), st.timezones(), offsets)),
    st.times(),
    st.uuids(),
    st.sampled_from(Letter),
)
refused = st.one_of(
    st.sets(st.integers(), max_size=2),
    st.integers(2**64, 2**70),
    st.text(alphabet=st.characters(categories=["Cs"]), min_size=1, max_size=3),
    st.decimals(),
    st.complex_numbers(),
    st.timedeltas(),
)


def in_whole_minutes(key: Any) -> bool:
    """Keys go past Skialith's own conversion of times, and ormsgpack rounds offsets (docs/PAYLOADS.md)."""
    offset = key.utcoffset() if isinstance(key, dt.datetime) else None
    return offset is None or offset % dt.timedelta(minutes=1) == dt.timedelta(0)


keys = st.one_of(
    scalars.filter(in_whole_minutes),
    st.tuples(st.one_of(st.integers(0, 2), st.just(Letter.A), st.just("a"))),
)


def nested(leaves: st.SearchStrategy[Any], names: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(names, inner, max_size=4)
        ),
        max_leaves=12,
    )


def mapped(value: Any, *, key: bool = False) -> Any:
    """The documented mapping, said once more in Python."""
    if isinstance(value, enum.Enum):
        return mapped(value.value, key=key)
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    if isinstance(value, tuple) and key:
        return tuple(mapped(item, key=True) for item in value)
    if isinstance(value, (list, tuple)):
        return [mapped(item) for item in value]
    if isinstance(value, dict):
        return {mapped(k, key=True): mapped(v) for k, v in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str, bytes)) else str(value)


def same(one: Any, other: Any) -> bool:
    """Equal, of the same types and in the same order, with NaN equal to itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (
            math.isnan(one) and math.isnan(other)
            if math.isnan(one) or math.isnan(other)
            else one == other and math.copysign(1, one) == math.copysign(1, other)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    return bool(one == other)


def collides(value: Any) -> bool:
    if isinstance(value, dict):
        return len({mapped(key, key=True) for key in value}) < len(value) or any(map(collides, value.values()))
    return isinstance(value, (list, tuple)) and any(map(collides, value))


@given(nested(scalars, keys))
def test_round_trip_or_colliding_keys(value: Any) -> None:
    try:
        body = payloads.encode(value)
    except InvalidPayload as error:
        assert collides(value), error
        assert "both become" in str(error)
        return
    assert not collides(value)
    back = payloads.decode(0, body)
    assert same(back, mapped(value))
    assert payloads.encode(back) == body


@given(nested(scalars, st.text(max_size=4)))
def test_text_keys_always_pass(value: Any) -> None:
    codec, body = payloads.pack(value)
    assert same(payloads.decode(codec, body), mapped(value))


@given(
    nested(scalars, st.text(max_size=4)),
    refused,
    st.lists(st.one_of(st.text(max_size=3), st.integers(0, 2)), max_size=6),
)
def test_what_is_refused_is_found(good: Any, bad: Any, way: list[str | int]) -> None:
    value, path = bad, ""
    for step in reversed(way):
        if isinstance(step, int):
            value, path = [good] * step + [value, good], f"[{step}]{path}"
        else:
            value = {step: value, f"{step}+": good}
            path = (
                f".{step}" if step.isidentifier() else f"[{json.dumps(step, ensure_ascii=not step.isprintable())}]"
            ) + path
    try:
        payloads.encode(value)
    except InvalidPayload as error:
        assert error.path == f"data{path}"
        return
    assert not isinstance(bad, (set, int, str)), bad
    raise AssertionError(f"{bad!r} went through")


@given(st.binary(max_size=80), st.integers(0, 3))
def test_decode_of_anything(body: bytes, codec: int) -> None:
    try:
        payloads.decode(codec, body)
    except ValueError as error:
        assert str(error).startswith("payload")


@given(nested(st.one_of(scalars, refused), st.one_of(keys, st.text(alphabet=st.characters(), max_size=2))))
def test_trace_json_of_anything(value: Any) -> None:
    text = trace_json.to_json(value)
    json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))
    text.encode("utf-8")
