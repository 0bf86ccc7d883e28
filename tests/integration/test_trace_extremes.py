"""Payloads at the edge of what JSON and databases hold: exact in ``agent_events``, real JSON or a marker in traces, no block."""

from __future__ import annotations

import asyncio
import json
import math
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nats
import ormsgpack
import pytest

from skialith import _fastpath, payloads
from skialith.config import TRACE_JSON_BYTES, TRACE_JSON_DEPTH
from tests.fixtures.agents import OpenAgent
from tests.fixtures.nats import wait_until
from tests.fixtures.stores import outside


@pytest.fixture(params=["sqlite", "mariadb"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every test here runs on both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'skialith.db'}"
    return str(request.getfixturevalue("mariadb_url"))


def nested(depth: int, *, lists: bool = False) -> Any:
    """A value with so many lists or maps inside each other."""
    value: Any = "bottom"
    for _ in range(depth):
        value = [value] if lists else {"d": value}
    return value


def omitted(why: str) -> dict[str, str]:
    return {"skialith_omitted": why}


DEEP = omitted(f"deeper than {TRACE_JSON_DEPTH} levels")
LARGE = f"larger than {TRACE_JSON_BYTES} bytes as JSON"
NOISE = random.Random(1).randbytes(3_400_000).decode("utf-16-be", "replace").replace("\0", "")
"""Over 5 MB as JSON that hardly gets smaller."""

SAVED: dict[str, tuple[Any, Any]] = {
    "29 deep": (nested(29), nested(29)),
    "32 deep": (nested(32), None),
    "32 lists deep": (nested(32, lists=True), None),
    "199 deep": (nested(199), None),
    "nan": ([math.nan, {"x": math.inf}, -math.inf], [omitted("NaN"), {"x": omitted("Infinity")}, omitted("-Infinity")]),
    "minus zero": (
        {"x": -0.0, "y": 5e-324, "z": 1.7976931348623157e308},
        {"x": -0.0, "y": 5e-324, "z": 1.7976931348623157e308},
    ),
    "integers": ([2**64 - 1, -(2**63), 2**53 + 1], [2**64 - 1, -(2**63), 2**53 + 1]),
    "keys": ({1: "a", "1": "b"}, omitted("two keys that are both '1' as JSON")),
    "NUL": ({"a\0b": "\0", "kind": "\0kind"}, {"a\0b": "\0", "kind": "\0kind"}),
    "planes": ({"🧠": "\U0010ffff\uffff\ufffe\u2028"}, {"🧠": "\U0010ffff\uffff\ufffe\u2028"}),
    "quotes": ("'\"\\'); DROP TABLE agent_traces; --\n\t\x1a\x7f", "'\"\\'); DROP TABLE agent_traces; --\n\t\x1a\x7f"),
    "bytes": ({"raw": b"\xff\xfe\x00"}, {"raw": {"skialith_base64": "//4A"}}),
    "5 MB": ({"text": NOISE}, LARGE),
    "5 MB that shrink": ({"text": "x" * 5_000_000}, LARGE),
    "5 MB of lists": ([[]] * 1_700_000, LARGE),
    "just fits": ("x" * (TRACE_JSON_BYTES - 2), "x" * (TRACE_JSON_BYTES - 2)),
    "just not": ("x" * (TRACE_JSON_BYTES - 1), LARGE),
    "empty": ({}, {}),
    "null": (None, None),
}
"""By event id: what is saved, and what the trace is; a text that begins as ``LARGE``: a marker of the whole."""

RAW: dict[str, tuple[bytes, str]] = {
    "duplicate keys": (b"\x82\xa1k\x01\xa1k\x02", "2"),
    "lone surrogate": (b"\xa3\xed\xa0\x80", "cannot be decoded"),
    "no UTF-8": (b"\x81\xa1k\xa2\xff\xfe", "cannot be decoded"),
    "cut off": (b"\x93\x01", "cannot be decoded"),
    "nothing": (b"", "cannot be decoded"),
    "a length of 4 GiB": (b"\xdd\xff\xff\xff\xff", "cannot be decoded"),
    "an extension": (b"\xd4\x7f\x00", "Ext"),
    "200,000 deep": (b"\x91" * 200_000 + b"\x01", "cannot be decoded"),
    "not compressed": (b"no zstd", "cannot be decoded"),
}
"""Bodies that no ``save_event`` makes, and what the trace says of them."""


def publish(url: str, namespace: str, bodies: dict[str, bytes]) -> None:
    """Append events with these bodies as they are."""

    async def append() -> None:
        client = await nats.connect(url, allow_reconnect=False)
        for name, body in bodies.items():
            key = _fastpath.event_key(namespace, "raw", name)
            codec = int(name == "not compressed")
            data = _fastpath.encode_record(1, "raw", name, key, 0, "event", 1, codec, body, None)
            await client.jetstream().publish(f"skialith.{namespace}.log.event.raw", data)
        await client.close()

    asyncio.run(append())


def same(one: Any, other: Any) -> bool:
    """Equal to the bit: NaN is itself, and 0.0 is not -0.0."""
    if isinstance(one, float) and isinstance(other, float):
        return struct.pack(">d", one) == struct.pack(">d", other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list) and len(one) < 1000:
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def strict(text: str | bytes) -> Any:
    def refuse(name: str) -> Any:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def bodies_of(url: str, agent: str) -> dict[str, bytes]:
    with outside(url) as sql:
        parts: dict[bytes, bytes] = {}
        for key, _, data in sorted(sql("SELECT parts_key, n, data FROM payload_parts"), key=lambda part: part[:2]):
            parts[bytes(key)] = parts.get(bytes(key), b"") + data
        found: Sequence[Any] = sql("SELECT event_id, agent_id, codec, body, body_parts FROM agent_events")
    exact = {}
    for event_id, agent_id, codec, body, key in found:
        whole = parts[bytes(key)] if body is None else bytes(body)
        if text(agent_id) == agent:
            exact[text(event_id)] = payloads.uncompressed(codec, whole) if codec and agent != "raw" else whole
    return exact


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def test_extremes(open_agent: OpenAgent, settings: dict[str, Any], database_url: str) -> None:
    agent = open_agent("saved", timeout=20.0)
    for event_id, (value, _) in SAVED.items():
        agent.save_event(event_id, value)
    publish(settings["nats_url"], settings["namespace"], {name: body for name, (body, _) in RAW.items()})
    agent.save_event("last", {"n": 1})
    assert agent.flush(20) == 0

    count = len(SAVED) + len(RAW) + 1
    with outside(database_url) as sql:
        wait_until(lambda: sql("SELECT COUNT(*) FROM agent_traces")[0][0] == count, 20, "every event has its trace")
        assert sql("SELECT COUNT(*) FROM dead_letters")[0][0] == 0
        assert sql("SELECT COUNT(*) FROM agent_traces WHERE NOT JSON_VALID(payload)")[0][0] == 0
        traces = {text(name): payload for name, payload in sql("SELECT event_id, payload FROM agent_traces")}

    history = {event.event_id: event.data for event in agent.history()}
    assert list(history) == [*SAVED, "last"]
    stored = bodies_of(database_url, "saved")
    for event_id, (value, expected) in SAVED.items():
        assert same(history[event_id], value), event_id
        assert same(ormsgpack.unpackb(stored[event_id], option=ormsgpack.OPT_NON_STR_KEYS), value), event_id
        _check_trace(event_id, strict(traces[event_id]), value, expected)
    assert bodies_of(database_url, "raw") == {name: body for name, (body, _) in RAW.items()}
    for name, (_, says) in RAW.items():
        assert says in traces[name], (name, traces[name])


def _check_trace(event_id: str, trace: Any, value: Any, expected: Any) -> None:
    if event_id.endswith("deep") and event_id != "29 deep":
        depth = 0
        while trace != DEEP:
            assert trace != "bottom", event_id
            (trace,) = trace.values() if isinstance(trace, dict) else trace
            depth += 1
        assert depth == TRACE_JSON_DEPTH - 1, event_id
    elif expected is LARGE:
        assert trace["skialith_omitted"] == LARGE and trace["bytes"] > TRACE_JSON_BYTES // 2, event_id
    else:
        assert same(trace, expected), (event_id, trace)
