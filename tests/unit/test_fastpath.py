"""skialith._fastpath by hand-written examples: known bytes, and errors that say what is wrong."""

from __future__ import annotations

import pytest

from skialith import _fastpath, config

KEY = bytes(range(16))
RECORD = (1, "agent", "step-1", KEY, 7, "thought", 1_700_000_000_000_000, 0, b"body", None)


def test_event_key_is_blake2b_of_length_prefixed_texts() -> None:
    assert _fastpath.event_key("default", "a", "b").hex() == "6c2d661b04e2354d66cb2020d56a396d"
    assert _fastpath.event_key("default", "ab", "c") != _fastpath.event_key("default", "a", "bc")


@pytest.mark.parametrize(
    ("agent_id", "token"),
    [
        ("my-agent_1", "my-agent_1"),
        ("a.b", "a%2Eb"),
        ("*", "%2A"),
        (">", "%3E"),
        ("a ", "a%20"),
        ("~", "%7E"),
        ("%2E", "%252E"),
        ("é", "%C3%A9"),
        ("\x0b\x0c\x7f\0", "%0B%0C%7F%00"),
        ("x" * 200, "x" * 200),
        ("." * 66 + "xx", "%2E" * 66 + "xx"),
        ("x" * 201, "x" * 167 + "~12bf1cc881648017342067435dc826c6"),
    ],
)
def test_subject_token(agent_id: str, token: str) -> None:
    assert _fastpath.subject_token(agent_id) == token


def test_subject_token_of_a_long_id_cuts_no_escape_and_keeps_the_limit() -> None:
    token = _fastpath.subject_token("é" * 255)
    prefix, _, digest = token.partition("~")
    assert prefix == "%C3%A9" * 27 + "%C3"
    assert len(digest) == 32
    assert len(token) <= config.MAX_SUBJECT_TOKEN


def test_subject_token_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        _fastpath.subject_token("")


def test_record_bytes_are_msgpack() -> None:
    data = _fastpath.encode_record(*RECORD)
    assert data.hex() == (
        "9a0101a56167656e74a6737465702d31c410000102030405060708090a0b0c0d0e0f07a774686f75676874cf00060a24181e400000c404626f6479"
    )
    assert _fastpath.decode_record(data) == RECORD


def test_large_record_has_a_manifest_in_place_of_the_body() -> None:
    record = (*RECORD[:8], None, (5_000_000, 6, b"d" * 16))
    data = _fastpath.encode_record(*record)
    assert data.endswith(bytes.fromhex("93ce004c4b4006c410") + b"d" * 16)
    assert _fastpath.decode_record(data) == record


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({8: None}, ValueError, "either a body or a manifest"),
        ({9: (1, 1, b"")}, ValueError, "either a body or a manifest"),
        ({8: None, 9: (1, 1)}, ValueError, "2 parts"),
        ({8: None, 9: (-1, 1, b"")}, ValueError, "must not be negative"),
        ({8: None, 9: (1, 1, None)}, TypeError, "digest"),
        ({3: b"short"}, ValueError, "key has 5 bytes"),
        ({0: 256}, ValueError, "kind is 256"),
        ({7: -1}, ValueError, "codec is -1"),
        ({4: 2**63}, OverflowError, "too large|too big"),
        ({1: "\ud800"}, UnicodeEncodeError, "surrogates"),
        ({1: None}, TypeError, "agent_id"),
        ({8: bytearray(b"x")}, TypeError, "body"),
    ],
)
def test_encode_record_refuses(change: dict[int, object], error: type[Exception], text: str) -> None:
    fields = [change.get(index, value) for index, value in enumerate(RECORD)]
    with pytest.raises(error, match=text):
        _fastpath.encode_record(*fields)  # type: ignore[arg-type]


HEAD = _fastpath.encode_record(*RECORD)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "cut short in record at byte 0"),
        (b"\x80", "record is not an array"),
        (b"\x90", "cut short in version"),
        (b"\x92\x02\x01", "unknown version 2; this Skialith reads version 1"),
        (b"\x91\x01", "1 fields, not 10"),
        (b"\x9a\x01\xa1x", "kind is not an integer"),
        (b"\x9a\x01\xcd\x01\x00", "cut short in agent_id"),
        (b"\x9a\x01\xcf" + b"\xff" * 8, "kind 18446744073709551615 is over 63 bits"),
        (b"\x9a\x01\x01\xa2\xff\xff", "agent_id is not UTF-8"),
        (b"\x9a\x01\x01\xdb\xff\xff\xff\xff", "cut short in agent_id at byte 8: 4294967295 more bytes needed"),
        (b"\x9a\x01\x01\xc4\x01x", "agent_id is not text"),
        (HEAD[:-6] + b"\xa4body", "body is not binary"),
        (HEAD[:-6] + b"\x92\x01\x01", "manifest has 2 parts"),
        (HEAD[:-6] + b"\x93\xff\x01\xc4\x00", "must not be negative"),
        (HEAD[:-1], "cut short in body"),
        (HEAD + b"\x00", "1 bytes left over"),
        (HEAD.replace(b"\xc4\x10", b"\xc4\x0f").replace(b"\x0f\x07\xa7", b"\x07\xa7"), "key has 15 bytes"),
        (HEAD[:1] + b"\x01\xcd\x01\x00" + HEAD[3:], "kind is 256"),
    ],
)
def test_decode_record_says_what_is_wrong(data: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _fastpath.decode_record(data)


def test_frames() -> None:
    headers = _fastpath.record_headers(KEY)
    assert headers == b"Nats-Msg-Id: 000102030405060708090a0b0c0d0e0f\r\n"
    assert _fastpath.pub("a.b", "", b"xy") == b"PUB a.b 2\r\nxy\r\n"
    assert _fastpath.pub("a", "r", b"") == b"PUB a r 0\r\n\r\n"
    assert _fastpath.hpub("a.b", "r", b"K: v\r\n", b"xy") == b"HPUB a.b r 18 20\r\nNATS/1.0\r\nK: v\r\n\r\nxy\r\n"
    assert _fastpath.hpub("a", "", b"", b"") == b"HPUB a 12 12\r\nNATS/1.0\r\n\r\n\r\n"


def test_fence() -> None:
    assert _fastpath.fence(41, "s.lease.a").splitlines() == [
        b"Nats-Expected-Last-Subject-Sequence: 41",
        b"Nats-Expected-Last-Subject-Sequence-Subject: s.lease.a",
    ]
    with pytest.raises(OverflowError):
        _fastpath.fence(-1, "s")


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB b 0", "a\x0b", "a\x7f", "é"])
def test_frames_refuse_subjects_that_would_break_the_protocol(subject: str) -> None:
    with pytest.raises(ValueError, match="subject"):
        _fastpath.hpub(subject, "", b"", b"")
    with pytest.raises(ValueError, match="subject"):
        _fastpath.fence(1, subject)


def test_frames_refuse_what_the_server_would_close_the_connection_for() -> None:
    with pytest.raises(ValueError, match="4096"):
        _fastpath.pub("x" * 4090, "", b"")
    with pytest.raises(ValueError, match="CRLF"):
        _fastpath.hpub("a", "", b"K: v\n", b"")


@pytest.mark.parametrize(
    ("data", "parsed"),
    [
        (b'{"stream":"S","seq":5}', (5, False, "S", 0, 0, "", 0)),
        (b'{"stream":"S", "seq":1700000000000000}', (1700000000000000, False, "S", 0, 0, "", 0)),
        (b'{"stream":"S", "seq":5,"duplicate": true}', (5, True, "S", 0, 0, "", 0)),
        (b'{"stream":"S","domain":"d","seq":5}', (5, False, "S", 0, 0, "", 0)),
        (b'{"stream":"S","seq":12,"batch":"id","count":10}', (12, False, "S", 0, 0, "", 10)),
        (
            b'{"error":{"code":503,"err_code":10077,"description":"full"},"stream":"S","seq":0}',
            (0, False, "S", 10077, 503, "full", 0),
        ),
    ],
)
def test_parse_puback(data: bytes, parsed: tuple[object, ...]) -> None:
    assert _fastpath.parse_puback(data) == parsed


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"seq":0}', b'{"seq":"5"}', b'{"error":{}}', b'{"seq":5', b"\xff", b"+OK"]
)
def test_parse_puback_refuses(data: bytes) -> None:
    with pytest.raises(ValueError, match="PubAck"):
        _fastpath.parse_puback(data)


def test_parse_ack_subject() -> None:
    short = "$JS.ACK.S.C.2.22.3.1700000000000000000.7"
    long = "$JS.ACK.hub.ABCDEF.S.C.2.22.3.1700000000000000000.7"
    for reply in (short, long, f"{long}.token"):
        assert _fastpath.parse_ack_subject(reply) == (22, 1700000000000000000, 2, 7)
        assert _fastpath.parse_ack_subject(reply.encode()) == (22, 1700000000000000000, 2, 7)


@pytest.mark.parametrize(
    "reply", ["", "$JS.ACK", "_INBOX.a.b", "$JS.ACK.S.C.1.2.3.4", "$JS.ACK.S.C.1.2.3.4.x", "$JS.ACK.a.S.C.1.2.3.4.5"]
)
def test_parse_ack_subject_refuses(reply: str) -> None:
    with pytest.raises(ValueError, match="ack subject"):
        _fastpath.parse_ack_subject(reply)


def test_scan_payload() -> None:
    assert _fastpath.scan_payload(b"\x81\xa1a\x93\x01\xc0\xcb" + bytes(8), 2) is True
    assert _fastpath.scan_payload(b"\x81\x01\x01", 1) is False
    assert _fastpath.scan_payload(b"\xd4\x05x", 0) is False
    with pytest.raises(ValueError, match="nested deeper than 1 levels at byte 1"):
        _fastpath.scan_payload(b"\x91\x90", 1)
    with pytest.raises(ValueError, match="1 bytes left over"):
        _fastpath.scan_payload(b"\x01\x02", 1)
    with pytest.raises(ValueError, match="max_depth"):
        _fastpath.scan_payload(b"\x01", 1025)
