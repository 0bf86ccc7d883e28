"""skialith._fastpath against the plain Python oracle, on anything Hypothesis thinks of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ormsgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skialith import _fastpath

from . import oracle

int64 = st.integers(-(2**63), 2**63 - 1)
edges = st.sampled_from([0, 31, 32, 127, 128, 255, 256, 65535, 65536, 2**31, 2**32 - 1, 2**32, 2**63 - 1])
whole = st.one_of(int64, edges, edges.map(lambda n: -n), edges.map(lambda n: -n - 1))
# Unicode without lone surrogates, with lengths around the msgpack size classes.
text = st.one_of(st.text(max_size=40), st.sampled_from([0, 31, 32, 255, 256, 65535, 65536]).map(lambda n: "x" * n))
blob = st.one_of(st.binary(max_size=60), st.sampled_from([255, 256, 65535, 65536, 70000]).map(bytes))
key = st.binary(min_size=16, max_size=16)
byte = st.integers(0, 255)
manifest = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.binary(max_size=300))
tail = st.one_of(st.tuples(blob, st.none()), st.tuples(st.none(), manifest))
records = st.tuples(byte, text, text, key, whole, text, whole, byte, tail).map(lambda r: (*r[:8], *r[8]))
subjects = st.one_of(
    st.from_regex(r"[!-~]{1,60}", fullmatch=True), st.sampled_from(["x" * 2040, "x" * 4080, ""]), st.text()
)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or ValueError for any of its kind; anything else that is raised fails the test."""
    try:
        return function(*arguments)
    except ValueError:
        return ValueError


@given(text, text, text)
def test_event_key(namespace: str, agent_id: str, event_id: str) -> None:
    assert _fastpath.event_key(namespace, agent_id, event_id) == oracle.event_key(namespace, agent_id, event_id)


@given(st.one_of(text, st.text(min_size=20, max_size=255), st.text(alphabet="aé.~%", min_size=60, max_size=255)))
@example("a" * 167 + "." * 12)
@example("a" * 166 + "." * 12)
@example("a" * 200)
@example("a" * 201)
def test_subject_token(agent_id: str) -> None:
    token = outcome(_fastpath.subject_token, agent_id)
    assert token == outcome(oracle.subject_token, agent_id)
    if agent_id:
        assert len(token) <= 200
        assert set(token.encode()) <= oracle.PLAIN | set(b"%~")


@given(
    st.text(alphabet="aA.~%2E\x7f", min_size=1, max_size=12), st.text(alphabet="aA.~%2E\x7f", min_size=1, max_size=12)
)
def test_subject_tokens_differ(one: str, other: str) -> None:
    assert (_fastpath.subject_token(one) == _fastpath.subject_token(other)) == (one == other)


@given(records)
def test_record_round_trip(record: oracle.Fields) -> None:
    data = _fastpath.encode_record(*record)
    assert data == oracle.encode_record(record)
    assert _fastpath.decode_record(data) == record == oracle.decode_record(data)
    other = ormsgpack.unpackb(data)
    assert other[:9] == [1, *record[:8]]
    assert other[9] == (record[8] if record[9] is None else list(record[9]))


def in_other_form(value: Any, draw: st.DataObject) -> bytes:
    """A valid msgpack form of ``value`` that need not be the shortest."""
    if isinstance(value, list):
        head = {0: bytes([0x90 | len(value)]), 1: b"\xdc" + len(value).to_bytes(2, "big")}
        chosen = head.get(draw.draw(st.integers(0, 2)), b"\xdd" + len(value).to_bytes(4, "big"))
        return chosen + b"".join(in_other_form(item, draw) for item in value)
    if isinstance(value, int):
        if draw.draw(st.booleans()):
            return b"\xd3" + value.to_bytes(8, "big", signed=True)
        return b"\xcf" + value.to_bytes(8, "big") if value >= 0 else oracle.pack(value)
    data = value.encode() if isinstance(value, str) else value
    first = 0xD9 if isinstance(value, str) else 0xC4
    step = draw.draw(st.integers(0 if len(data) < 256 else 1 if len(data) < 65536 else 2, 2))
    return bytes([first + step]) + len(data).to_bytes(1 << step, "big") + data


@given(records, st.data())
def test_record_in_any_msgpack_form(record: oracle.Fields, draw: st.DataObject) -> None:
    last = record[8] if record[9] is None else list(record[9])
    data = in_other_form([1, *record[:8], last], draw)
    assert _fastpath.decode_record(data) == record == oracle.decode_record(data)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An encoded record with bytes changed, dropped, doubled or cut off."""
    data = bytearray(oracle.encode_record(draw(records))[:200])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 3)):
            case 0:
                data[at : at + 1] = bytes([draw(byte)])
            case 1:
                del data[at : at + draw(st.integers(1, 9))]
            case 2:
                data[at:at] = draw(st.binary(max_size=9))
            case _:
                del data[at:]
    return bytes(data)


@given(st.one_of(damaged(), st.binary(max_size=80)))
@example(b"")
@example(b"\x9a\x02")
@example(b"\x91\x02")
@example(b"\xdd\xff\xff\xff\xff\x01")
@example(b"\x9a\x01\x01\xdb\xff\xff\xff\xff")
@example(b"\x9a\x01\x01\xdb\x7f\xff\xff\xff")
@example(b"\x9a\x01\xcf\xff\xff\xff\xff\xff\xff\xff\xff")
def test_decode_agrees_on_damage(data: bytes) -> None:
    result = outcome(_fastpath.decode_record, data)
    assert result == outcome(oracle.decode_record, data)


@given(records)
def test_every_cut_is_refused(record: oracle.Fields) -> None:
    data = oracle.encode_record(record)
    for size in {*range(min(len(data), 120)), len(data) - 1}:
        assert outcome(_fastpath.decode_record, data[:size]) is ValueError
    assert outcome(_fastpath.decode_record, data + b"\x00") is ValueError


@given(subjects, st.one_of(st.just(""), subjects), blob)
def test_pub(subject: str, reply: str, payload: bytes) -> None:
    assert outcome(_fastpath.pub, subject, reply, payload) == outcome(oracle.pub, subject, reply, payload)


@given(subjects, st.one_of(st.just(""), subjects), st.one_of(st.just(b"K: v\r\n"), st.binary(max_size=9)), blob)
def test_hpub(subject: str, reply: str, headers: bytes, payload: bytes) -> None:
    frame = outcome(_fastpath.hpub, subject, reply, headers, payload)
    assert frame == outcome(oracle.hpub, subject, reply, headers, payload)


@given(st.binary(max_size=20))
def test_record_headers(msg_id: bytes) -> None:
    assert outcome(_fastpath.record_headers, msg_id) == outcome(oracle.record_headers, msg_id)


@given(st.integers(0, 2**64 - 1), subjects)
def test_fence(sequence: int, subject: str) -> None:
    assert outcome(_fastpath.fence, sequence, subject) == outcome(oracle.fence, sequence, subject)


seqs = st.one_of(
    st.integers(0, 2**64 + 1), st.sampled_from([0, 1, 2**63, 2**64 - 1, 2**64, -1]), st.just("5"), st.just(5.0)
)
odd = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.text(max_size=3), st.just([]), st.just({}))
errors = st.fixed_dictionaries({}, optional={"code": seqs | odd, "err_code": seqs, "description": st.text() | odd})
answers = st.fixed_dictionaries(
    {},
    optional={
        "stream": st.text(max_size=9) | odd,
        "seq": seqs,
        "duplicate": st.booleans() | odd,
        "count": seqs,
        "batch": st.text(max_size=5),
        "error": errors | odd,
        "domain": st.text(max_size=5),
    },
)
json_forms = st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 1}, {"ensure_ascii": False}])
as_written = st.builds(
    lambda name, gap, seq, tail: f'{{"stream":"{name}",{gap}"seq":{seq}{tail}'.encode("utf-8", "surrogatepass"),
    st.text(alphabet='Sé"\\_\x00\x7f', max_size=4),
    st.sampled_from(["", " "]),
    st.one_of(seqs, st.sampled_from(["01", "-0", "1e3", "", "18446744073709551616"])),
    st.sampled_from(
        ["}", "} ", ',"duplicate": true}', ',"duplicate":true}', ',"duplicate":false}', ',"count":3}', "", "}}"]
    ),
)


@given(
    st.one_of(
        st.builds(lambda a, form: json.dumps(a, **form).encode("utf-8", "surrogatepass"), answers, json_forms),
        as_written,
    )
)
@example(b'{"stream":"S", "seq":5}')
@example(b'{"stream":"S","seq":5,"duplicate": true}')
@example(b'{"stream":"S","seq":NaN}')
@example(b'{"stream":"S","seq":18446744073709551615}')
@example(b'{"stream":"S","seq":18446744073709551616}')
@example(b'{"stream":"S","domain":"hub","seq":5}')
@example(b'{"stream":"S","domain":"hub","seq":5,"duplicate": true}')
@example(b'{"seq":1,"error":null}')
@example(b"[" * 100_000)
@example(b'\xff\xfe{\x00"\x00')
@example(b'{"stream":"S","seq":1' + b"0" * 5000 + b"}")
def test_parse_puback(data: bytes) -> None:
    try:
        expected = oracle.parse_puback(data)
    except (ValueError, RecursionError):
        with pytest.raises(ValueError, match="PubAck"):
            _fastpath.parse_puback(data)
        return
    assert _fastpath.parse_puback(data) == expected


numbers = st.one_of(
    st.integers(0, 2**64 + 9).map(str),
    st.sampled_from(["", "0", "00", "01", "-1", "+1", "1 ", "x", "٣", "18446744073709551616"]),
)
ack_subjects = st.builds(
    lambda head, names, numbers, rest: ".".join([head, *names, *numbers, *rest]),
    st.sampled_from(["$JS.ACK"] * 5 + ["$JS.ACKS", "$JS", "", "$JS.ACK."]),
    st.one_of(
        st.lists(st.text(alphabet="ab_é", max_size=4), min_size=2, max_size=2), st.lists(st.just("x"), max_size=5)
    ),
    st.one_of(st.lists(st.integers(0, 2**64 - 1).map(str), min_size=5, max_size=5), st.lists(numbers, max_size=6)),
    st.one_of(st.just([]), st.just(["t"]), st.lists(st.just("1"), max_size=3)),
)


@given(st.one_of(ack_subjects, st.text(max_size=60)))
@example("$JS.ACK.S.C.1.22.3.1700000000000000000.7")
@example("$JS.ACK.d.h.S.C.1.22.3.1700000000000000000.7.tok")
@example("$JS.ACK")
@example("$JS.ACK.")
@example("$JS.ACK.S.C.1.2.3.4.")
@example("$JS.ACK.S.C.1.2.3.4.18446744073709551615")
@example("$JS.ACK.S.C.1.2.3.4.18446744073709551616")
@example("$JS.ACK.S.C.1.2.3.4.18446744073709551619")
@example("." * 5000)
def test_parse_ack_subject(reply: str) -> None:
    expected = outcome(oracle.parse_ack_subject, reply)
    assert outcome(_fastpath.parse_ack_subject, reply) == expected
    assert outcome(_fastpath.parse_ack_subject, reply.encode("utf-8", "surrogatepass")) == expected


msgpack_values = st.recursive(
    st.one_of(st.none(), st.booleans(), whole, st.floats(), st.text(max_size=40), st.binary(max_size=40)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=20), st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner)
    ),
    max_leaves=20,
)


@given(msgpack_values, st.integers(0, 6), st.data())
def test_scan_payload(value: Any, depth: int, draw: st.DataObject) -> None:
    try:
        data = ormsgpack.packb(value, option=ormsgpack.OPT_NON_STR_KEYS)
    except TypeError:
        data = b"\x81\x01\xd4\x05x"
    cut = draw.draw(st.integers(0, len(data)))
    for sample in (data, data[:cut], data + b"\xc0", data[:cut] + draw.draw(st.binary(max_size=6)) + data[cut:]):
        assert outcome(_fastpath.scan_payload, sample, depth) == outcome(oracle.scan_payload, sample, depth)


@given(st.binary(max_size=60), st.integers(0, 5))
@example(b"\xc7\x00\x05", 0)
@example(b"\xc9\xff\xff\xff\xff\x05", 0)
@example(b"\xdf\xff\xff\xff\xff", 5)
@example(b"\x81\x91\x01\x02", 5)
def test_scan_payload_of_anything(data: bytes, depth: int) -> None:
    assert outcome(_fastpath.scan_payload, data, depth) == outcome(oracle.scan_payload, data, depth)
