"""Payloads: what comes back, what is refused and with which path; the table of docs/PAYLOADS.md."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import re
import typing
import uuid
from pathlib import Path

import numpy as np
import ormsgpack
import pydantic
import pytest
import zstandard

from skialith import _fastpath, config, payloads
from skialith.errors import InvalidPayload, RecordTooLarge
from skialith.records import Codec


class Colour(enum.Enum):
    RED = 1
    BLUE = "blue"
    BOTH = (1, "blue")
    BAD = frozenset({1})


class Point(typing.NamedTuple):
    x: int


@dataclasses.dataclass
class Note:
    text: object
    _private: int = 0


@dataclasses.dataclass(slots=True)
class Slotted:
    a: int
    b: int = dataclasses.field(init=False)


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    a: object = None


class Name(str):
    pass


class Nowhere(dt.tzinfo):
    def utcoffset(self, _: dt.datetime | None) -> dt.timedelta:
        raise OSError("no such zone")

    def dst(self, _: dt.datetime | None) -> None:
        return None

    def tzname(self, _: dt.datetime | None) -> str:
        return "nowhere"


UTC = dt.timezone.utc
DAY = dt.date(2020, 1, 2)
UID = uuid.UUID(int=5)

# The expressions and results of docs/PAYLOADS.md are checked against this namespace.
NAMES = {
    **globals(),
    "datetime": dt.datetime,
    "date": dt.date,
    "time": dt.time,
    "UUID": uuid.UUID,
    "Ext": ormsgpack.Ext,
}


def round_trip(value: object) -> typing.Any:
    return payloads.decode(Codec.MSGPACK, payloads.encode(value))


def refusal(value: object) -> str:
    with pytest.raises(InvalidPayload) as caught:
        payloads.encode(value)
    error = caught.value
    assert str(error).startswith(f"{error.path}: ")
    assert (error.argument, error.outcome, error.retryable) == ("data", "not_written", False)
    return str(error)


def documented() -> list[tuple[str, str]]:
    text = (Path(__file__).parents[2] / "docs" / "PAYLOADS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*?\| `(.+?)` \| `(.+?)` \|$", text, re.MULTILINE)
    if not hasattr(ormsgpack, "Fragment"):  # the last ormsgpack for Python 3.10
        rows = [row for row in rows if "Fragment" not in row[0] and "datetime64" not in row[0]]
    return rows


@pytest.mark.parametrize(("given", "back"), documented())
def test_the_documented_mapping(given: str, back: str) -> None:
    expected = eval(back, dict(NAMES))
    result = round_trip(eval(given, dict(NAMES)))
    assert result == expected
    assert type(result) is type(expected)


def test_the_document_has_its_table() -> None:
    assert len(documented()) > 25


def test_dict_order_and_64_bit_edges_survive() -> None:
    value = {"z": 2**64 - 1, "a": -(2**63), "m": [0.1, -0.0, float("inf")]}
    assert list(round_trip(value).items()) == list(value.items())
    assert str(round_trip(-0.0)) == "-0.0"
    assert str(round_trip(float("nan"))) == "nan"


def test_ext_survives_reading_and_writing_again() -> None:
    body = payloads.encode({"x": [ormsgpack.Ext(5, b"abc")]})
    again = payloads.encode(payloads.decode(Codec.MSGPACK, body))
    assert again == body == b"\x81\xa1x\x91\xc7\x03\x05abc"


@pytest.mark.parametrize(
    ("array", "back"),
    [
        (np.arange(3, dtype=">i4"), [0, 1, 2]),
        (np.arange(6).reshape(2, 3).T, [[0, 3], [1, 4], [2, 5]]),
        (np.arange(10)[::3], [0, 3, 6, 9]),
        (np.array(7), 7),
        (np.array(7, dtype=">u8"), 7),
        (np.zeros((2, 0)), [[], []]),
        (np.float32(0.5), 0.5),
    ],
)
def test_numpy_of_any_layout_and_byte_order(array: object, back: object) -> None:
    assert round_trip({"v": array}) == {"v": back}
    assert round_trip({1: array}) == {1: back}


PATHS = [
    ({1, 2}, "data: set is not serializable"),
    ({"messages": [0, 0, 0, {"content": {1}}]}, "data.messages[3].content: set is not serializable"),
    ({"my key": (1, [decimal.Decimal(1)])}, 'data["my key"][1][0]: Decimal is not serializable'),
    ({'a"b': 1j}, 'data["a\\"b"]: complex is not serializable'),
    ({"日 本": 1j}, 'data["日 本"]: complex is not serializable'),
    ({5: 1j}, "data[5]: complex is not serializable"),
    ([Note({"a": b"", "b": dt.timedelta(1)})], "data[0].text.b: timedelta is not serializable"),
    ({"m": Model.model_validate({"a": 1, "b": [object()]})}, "data.m.b[0]: object is not serializable"),
    ({"m": Model(a={1})}, "data.m.a: set is not serializable"),
    ([Colour.BAD], "data[0].value: frozenset is not serializable"),
    ([Slotted(1)], "data[0]: Slotted is not serializable"),
    ([Point(1)], "data[0]: Point is not serializable"),
    ({"n": 2**64}, "data.n: int is over 64 bits"),
    ({"n": -(2**63) - 1}, "data.n: int is over 64 bits"),
    (["ok\ud800"], "data[0]: text holds a lone surrogate at index 2"),
    ({"a": {"k\udfff": 1}}, "data.a: a key holds a lone surrogate at index 1: 'k\\udfff'"),
    ({"a": {frozenset(): 1}}, "data.a: frozenset cannot be a key: frozenset()"),
    ({"a": {2**64: 1}}, "data.a: int cannot be a key (Integer exceeds 64-bit range): 18446744073709551616"),
    ({"a": {Colour.RED: 1, 1: 2}}, "data.a: keys <Colour.RED: 1> and 1 both become 1"),
    ({Colour.BLUE: 1, "blue": 2}, "data: keys <Colour.BLUE: 'blue'> and 'blue' both become 'blue'"),
    ({DAY: 1, "2020-01-02": 2}, "data: keys datetime.date(2020, 1, 2) and '2020-01-02' both become '2020-01-02'"),
    (
        {(DAY,): 1, ("2020-01-02",): 2},
        "data: keys (datetime.date(2020, 1, 2),) and ('2020-01-02',) both become ('2020-01-02',)",
    ),
    ([Model], "data[0]: ModelMetaclass is not serializable"),
    ([Slotted], "data[0]: type is not serializable"),
    (dt.datetime(2020, 1, 2, tzinfo=Nowhere()), "data: datetime is not serializable"),
    (np.array([1j]), "data: ndarray of complex128 is not serializable"),
    (np.array([{1}], dtype=object), "data: ndarray of object is not serializable"),
    (np.array([1, 2]).view(np.matrix), "data: matrix is not serializable"),
    ([np.datetime64("NaT", "s")], "data[0]: datetime64 is not serializable"),
    (np.array([1, 2]).view(np.ma.MaskedArray), "data: MaskedArray is not serializable"),
]
if hasattr(ormsgpack, "Fragment"):  # not in the last ormsgpack for Python 3.10
    unreadable = ormsgpack.Fragment(b"\x81\xd4\x05x\x01")
    PATHS.append(([unreadable], "data[0]: Fragment is not serializable (invalid type FixExt1)"))


@pytest.mark.parametrize(("value", "text"), PATHS)
def test_refusals_name_the_path(value: object, text: str) -> None:
    assert refusal(value).startswith(text)


def test_refusal_names_the_argument() -> None:
    with pytest.raises(InvalidPayload, match=r"^payload\.a: set is not serializable$") as caught:
        payloads.encode({"a": set()}, "payload")
    assert (caught.value.argument, caught.value.path) == ("payload", "payload.a")


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"a": v}, lambda v: (v,), Note, lambda v: {1: v}])
def test_depth_limit(wrap: typing.Callable[[object], object]) -> None:
    value: object = 1
    for _ in range(config.MAX_PAYLOAD_DEPTH):
        value = wrap(value)
    assert round_trip(value) is not None
    for _ in range(2):
        value = wrap(value)
        assert refusal(value).endswith(f"nested deeper than {config.MAX_PAYLOAD_DEPTH} levels")
    for _ in range(3000):
        value = wrap(value)
    assert len(refusal(value)) < 700


def test_depth_that_the_walk_cannot_see_is_refused_too() -> None:
    value: object = np.zeros((1,) * 30)
    for _ in range(config.MAX_PAYLOAD_DEPTH - 29):
        value = [value]
    assert "nested deeper than 200 levels" in refusal(value)


def test_self_reference() -> None:
    loop: list[object] = [1]
    loop.append({"x": loop})
    assert refusal({"v": loop}) == "data.v[1].x: holds itself: it is the same object as data.v"
    shared = [1]
    assert round_trip([shared, shared]) == [[1], [1]]


def test_a_key_with_a_hostile_repr_hides_nothing() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert refusal({Hostile(): 1}) == "data: Hostile cannot be a key: <Hostile>"


def test_pack_compresses_only_what_gets_smaller() -> None:
    edge = "x" * (config.COMPRESS_ABOVE_BYTES - 5)
    assert payloads.pack(edge)[0] is Codec.MSGPACK
    codec, body = payloads.pack(edge + "xxx")
    assert codec is Codec.ZSTD_MSGPACK
    assert len(body) < 100
    assert payloads.decode(codec, body) == edge + "xxx"
    noise = np.random.default_rng(7).bytes(100_000)
    codec, body = payloads.pack(noise)
    assert codec is Codec.MSGPACK
    assert payloads.decode(codec, body) == noise


def test_pack_limits_the_size_before_compression() -> None:
    assert payloads.pack("x" * 995, limit=1000)[0] is Codec.MSGPACK
    with pytest.raises(RecordTooLarge, match="payload has 200005 bytes encoded; at most 1000 are allowed") as caught:
        payloads.pack("x" * 200_000, "payload", 1000)
    assert (caught.value.size, caught.value.limit, caught.value.argument) == (200_005, 1000, "payload")


FRAME = zstandard.ZstdCompressor().compress(payloads.encode(["x" * 1000]))


@pytest.mark.parametrize(
    ("codec", "body", "text"),
    [
        (0, b"", "cut short"),
        (0, b"\x91", "cut short"),
        (0, b"\xc1", "0xc1"),
        (0, b"\x01\x02", "left over"),
        (0, b"\xa1\xff", "invalid UTF-8"),
        (0, b"\x81\x80\x01", "not valid msgpack"),
        (0, b"\x91" * 1001 + b"\x01", "nested deeper"),
        (0, b"\xdd\xff\xff\xff\xff", "cut short"),
        (1, b"", "zstd"),
        (1, b"garbage", "zstd"),
        (1, FRAME[:-1], "zstd"),
        (1, FRAME + b"x", "zstd"),
        (1, zstandard.ZstdCompressor(write_content_size=False).compress(b"\x01"), "does not state its size"),
        (1, zstandard.ZstdCompressor().compress(b""), "cut short"),
        (2, b"\x01", "unknown codec 2"),
    ],
)
def test_corrupt_bodies(codec: int, body: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        payloads.decode(codec, body)


def test_a_bomb_is_not_decompressed() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(10_000_000))
    assert len(bomb) < 1000
    with pytest.raises(ValueError, match="10000000 bytes decompressed; at most 1000000 are taken here"):
        payloads.decode(Codec.ZSTD_MSGPACK, bomb, limit=1_000_000)


def test_plain_payloads_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(ormsgpack, name)

        def packb(self, *arguments: object, **options: object) -> bytes:
            calls.append(arguments)
            return ormsgpack.packb(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(payloads, "ormsgpack", Counting())
    payloads.encode({"kind": "thought", "n": [1, 2.5, None, DAY, UID, Note("x"), Model()]})
    assert len(calls) == 1


def test_depth_limit_is_under_what_the_scan_takes() -> None:
    assert _fastpath.scan_payload(b"\x91" * config.MAX_PAYLOAD_DEPTH + b"\x01", config.MAX_PAYLOAD_DEPTH)
