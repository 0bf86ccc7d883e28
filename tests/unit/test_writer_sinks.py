"""The two sinks: what they load, what they write, and what a missing body means."""

from __future__ import annotations

import json

import pytest

from skialith import payloads
from skialith.config import MAX_EVENT_TYPE_CHARACTERS, WRITER_BATCH_BYTES
from skialith.errors import BodyMissing
from skialith.records import Kind, Record
from skialith.writer.batch import Batch, Undecodable, decode
from skialith.writer.sinks import EventSink, TraceSink, trace_of

from ..fixtures.writer_fakes import NAMESPACE, Clock, FakeDatabase, FakeSource, message, seqs

DIGEST = b"d" * 16


def make(seq: int = 1, **options: object) -> Record:
    return decode(NAMESPACE, message(seq, **options))  # type: ignore[arg-type]


def test_a_message_becomes_a_record_at_its_position() -> None:
    record = make(5, event_type="thought", body=b"\x01")
    assert (record.namespace, record.agent_id, record.record_id) == (NAMESPACE, "a", "e5")
    assert (record.event_type, record.body, record.manifest) == ("thought", b"\x01", None)
    assert record.position == message(5).position


def test_a_manifest_becomes_a_record_without_a_body() -> None:
    record = make(1, body=None, manifest=(9, 2, DIGEST))
    assert record.body is None
    assert record.manifest is not None and record.manifest.size == 9 and record.manifest.chunks == 2


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x9a", b"hello", message(1).data[:-1], message(1).data + b"\xc0"])
def test_what_is_not_a_record_is_undecodable(data: bytes) -> None:
    with pytest.raises(Undecodable):
        decode(NAMESPACE, message(1, data=data))


def test_halves_keep_order_and_leave_nothing_out() -> None:
    messages = [message(seq) for seq in range(7)]
    one, other = Batch(messages, [decode(NAMESPACE, m) for m in messages], losses=1).halves()
    assert seqs(one.messages + other.messages) == list(range(7))
    assert seqs(one.rows() + other.rows()) == list(range(7))
    assert one.losses == other.losses == 0
    with pytest.raises(ValueError, match="halved"):
        Batch(messages[:1], None).halves()


class Ends:
    def __init__(self) -> None:
        self.database = FakeDatabase([])
        self.source = FakeSource(Clock(), [], [])


def test_the_event_sink_reads_the_body_of_a_large_record() -> None:
    ends = Ends()
    ends.source.bodies[1] = b"x" * 9
    loaded = EventSink(ends.database).load(make(1, body=None, manifest=(9, 1, DIGEST)), ends.source)
    assert loaded is not None and loaded.body == b"x" * 9


def test_a_missing_body_means_nothing_to_do_only_when_the_record_is_stored() -> None:
    ends = Ends()
    sink = EventSink(ends.database)
    head = make(1, body=None, manifest=(9, 1, DIGEST))
    with pytest.raises(BodyMissing):
        sink.load(head, ends.source)
    ends.database.rows[head.key] = head
    assert sink.load(head, ends.source) is None


def test_the_trace_sink_takes_events_only_and_never_fetches_a_body() -> None:
    ends = Ends()
    sink = TraceSink(ends.database)
    assert sink.load(make(1, kind=Kind.CHECKPOINT), ends.source) is None
    head = make(2, body=None, manifest=(123_456, 1, DIGEST))
    assert sink.load(head, ends.source) is head
    sink.write([head])
    marker = json.loads(ends.database.traces[head.key].payload_json)
    assert marker["bytes"] == 123_456 and marker["skialith_omitted"]
    assert ends.source.body_reads == []


def test_a_trace_is_the_event_as_json_with_its_type_cut() -> None:
    codec, body = payloads.pack({"kind": "thought", "n": [1, None]})
    record = make(3, body=body, codec=int(codec), event_type="t" * 400)
    trace = trace_of(record)
    assert json.loads(trace.payload_json) == {"kind": "thought", "n": [1, None]}
    assert trace.event_type == "t" * MAX_EVENT_TYPE_CHARACTERS
    assert (trace.key, trace.event_id, trace.agent_id) == (record.key, "e3", "a")
    assert trace.position == record.position


def test_traces_that_are_large_as_json_are_written_in_several_transactions() -> None:
    ends = Ends()
    codec, body = payloads.pack({"text": "x" * 1_000_000})
    assert len(body) < 10_000, "this test wants a payload that compresses well"
    records = [make(seq, body=body, codec=int(codec)) for seq in range(10)]
    TraceSink(ends.database).write(records)
    writes = [of for verb, of in ends.database.calls if verb == "write"]
    assert len(writes) > 1
    assert max(len(of) for of in writes) <= WRITER_BATCH_BYTES // 1_000_000 + 1
    assert [seq for of in writes for seq in of] == list(range(10))
