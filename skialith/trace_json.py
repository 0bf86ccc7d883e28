"""The JSON of a trace: what an event's payload looks like in ``agent_traces``, for people's SQL; never fails.

What JSON (or a database's JSON) cannot hold becomes an object that says so: ``{"skialith_base64": "..."}`` for bytes,
``{"skialith_omitted": "<why>"}`` for a value, with ``"bytes"`` (size as msgpack) where it stands for a whole payload.
The exact payload is in ``agent_events``.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from . import _rows, payloads
from .config import MAX_PAYLOAD_DEPTH, MAX_RECORD_BYTES, TRACE_JSON_BYTES, TRACE_JSON_DEPTH
from .errors import BodyMissing
from .records import Codec, Record

_TOO_LARGE = f"larger than {TRACE_JSON_BYTES} bytes as JSON"
# A float takes 9 bytes as msgpack and at least 3 characters and a comma as JSON; nothing shrinks more than that.
_LARGEST_BODY = 3 * TRACE_JSON_BYTES


_PLAIN = int(Codec.MSGPACK)
_QUICK_DEPTH = 64
"""Levels that _rows.json_texts goes down at most."""
_WHOLE_DEPTH = MAX_PAYLOAD_DEPTH + 2  # and the level of a marker at the bottom


class _TooLarge(Exception):
    """The document is over TRACE_JSON_BYTES already, so the rest need not be looked at."""


def of_records(records: Sequence[Record]) -> list[str]:
    """:func:`of_record` of each."""
    packed = [record.body if record.codec == _PLAIN and record.body is not None else b"" for record in records]
    texts = _rows.json_texts(packed, TRACE_JSON_DEPTH, TRACE_JSON_BYTES)
    return [of_record(record) if text is None else text for record, text in zip(records, texts, strict=True)]


def of_record(record: Record) -> str:
    """The JSON text of an event's payload. A payload that is too large, not there or corrupt becomes a marker."""
    if record.body is None:
        return omitted(_TOO_LARGE, record.manifest.size if record.manifest is not None else 0)
    size = len(record.body)
    try:
        body = payloads.uncompressed(record.codec, record.body, MAX_RECORD_BYTES)
        size = len(body)
        if size > _LARGEST_BODY:
            return omitted(_TOO_LARGE, size)
        (text,) = _rows.json_texts([body], TRACE_JSON_DEPTH, TRACE_JSON_BYTES)
        if text is not None:
            return text
        value = payloads.decode(0, body)
    except (ValueError, MemoryError) as error:
        return omitted(f"cannot be decoded: {error}"[:200], size)
    return to_json(value, size)


def whole(record: Record) -> str:
    """The JSON text of a record's payload, however large and deep it is.

    Raises ``BodyMissing`` when the record came without its body, ``ValueError`` when that cannot be decoded.
    """
    if record.body is None:
        raise BodyMissing(
            f"agent {record.agent_id!r}: the payload at sequence {record.position.seq} is lost: its head is a dead letter "
            "without a body, see `skialith dead-letters list`"
        )
    body = payloads.uncompressed(record.codec, record.body)
    (text,) = _rows.json_texts([body], _QUICK_DEPTH, sys.maxsize)
    return whole_value(payloads.decode(_PLAIN, body)) if text is None else text


def whole_value(value: Any) -> str:
    """The JSON text of a payload that is decoded already, however large and deep it is."""
    return to_json(value, limit=sys.maxsize, depth=_WHOLE_DEPTH)


def shown(record: Record) -> str:
    """As :func:`whole`, with a marker for what that raises."""
    try:
        return whole(record)
    except BodyMissing:
        return omitted("lost", 0 if record.manifest is None else record.manifest.size)
    except ValueError as error:
        return omitted(f"cannot be decoded: {error}", len(record.body or b""))


def to_json(value: Any, size: int = 0, *, limit: int = TRACE_JSON_BYTES, depth: int = TRACE_JSON_DEPTH) -> str:
    """``value`` as JSON text with ``str`` keys, at most ``limit`` bytes in UTF-8 and ``depth`` levels deep.

    ``size``: its size as msgpack, named in the marker that takes its place if it is too large. Never raises.
    """
    try:
        text = json.dumps(
            _Document(limit, depth).convert(value, 0), ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
        if len(text.encode("utf-8")) > limit:
            raise _TooLarge
        return text
    except _TooLarge:
        return omitted(_TOO_LARGE, size)
    except Exception as error:  # noqa: BLE001 - a trace must never stop the queue behind it; the marker says what happened
        return omitted(f"{type(error).__name__} while it was made JSON", size)


def omitted(why: str, size: int) -> str:
    """The marker that stands for a whole payload of ``size`` bytes."""
    return json.dumps({"skialith_omitted": why, "bytes": size})


def _mark(why: str) -> dict[str, Any]:
    return {"skialith_omitted": why}


class _Document:
    """One conversion, its limits, and the characters it has seen so far."""

    def __init__(self, limit: int, depth: int) -> None:
        self.characters = 0
        self._limit = limit
        self._depth = depth

    def convert(self, value: Any, depth: int) -> Any:
        """``value`` in JSON's own types. Markers nest one level, so containers stop one short of the limit."""
        self._count(2)
        if value is None or value is True or value is False:
            return value
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int):
            # MySQL's JSON keeps integers exact up to here.
            return int(value) if -(2**63) <= value < 2**64 else _mark("int over 64 bits")
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else _mark(json.dumps(float(value)))
        if isinstance(value, bytes):
            self._count(len(value) * 4 // 3)
            return {"skialith_base64": base64.b64encode(value).decode("ascii")}
        if isinstance(value, (list, tuple, dict)):
            if depth >= self._depth - 1:
                return _mark(f"deeper than {self._depth} levels")
            if isinstance(value, dict):
                return self._object(value, depth + 1)
            return [self.convert(item, depth + 1) for item in value]
        return _mark(f"a value of type {type(value).__name__}")

    def _object(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for key, item in value.items():
            name = self._key(key)
            if name is None:
                return _mark("a key with a lone surrogate")
            if name in converted:
                return _mark(f"two keys that are both {name[:80]!r} as JSON")
            converted[name] = self.convert(item, depth)
        return converted

    def _key(self, key: Any) -> str | None:
        if isinstance(key, str):
            name = self._text(key)
            return name if isinstance(name, str) else None
        return json.dumps(self.convert(key, 0), ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    def _text(self, value: str) -> str | dict[str, Any]:
        self._count(len(value))
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return _mark("text with a lone surrogate")
        return str.__str__(value)

    def _count(self, characters: int) -> None:
        self.characters += characters
        if self.characters > self._limit + 1:  # a lower bound of the text, plus one
            raise _TooLarge
