"""Answers whose payloads are JSON text already: it is put in as it is, so nothing is parsed to be written again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from .. import payloads, trace_json
from ..awaiting import in_thread
from ..config import AWAITED_INLINE_BYTES
from ..history import FoundStep
from ..records import Codec, Record

MEDIA_TYPE = "application/json"


def document(fields: Mapping[str, Any], **texts: str) -> str:
    """The JSON text of an object: ``fields``, and behind them ``texts``, whose values are JSON text already."""
    parts = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in fields.items()]
    parts += [f"{json.dumps(name)}: {text}" for name, text in texts.items()]
    return "{" + ", ".join(parts) + "}"


def listed(texts: list[str]) -> str:
    """The JSON text of a list of JSON texts."""
    return "[" + ", ".join(texts) + "]"


def page(name: str, texts: list[str], following: str | None) -> bytes:
    """A page of a list: its entries, which are JSON text already, and the cursor of the next one."""
    return document({"next": following}, **{name: listed(texts)}).encode()


def step(step_id: str, found: FoundStep) -> str:
    """The JSON text of a recorded step, which has its body. Raises ``ValueError`` when that cannot be decoded."""
    recorded = payloads.decode(found.codec, found.body or b"")
    outcome = "error" if "error" in recorded else "result"
    fields = {"step_id": step_id, "function": recorded["function"]}
    return document(fields, **{outcome: trace_json.whole_value(recorded[outcome])})


def answer(text: str | bytes) -> Response:
    """A JSON text as an answer. Of a large one give the bytes, made in a thread."""
    return Response(text, media_type=MEDIA_TYPE)


async def of_record(fields: Mapping[str, Any], name: str, record: Record) -> Response:
    """The answer with ``fields`` and, as ``name``, the record's whole payload; a large one is made in a thread.

    Raises ``BodyMissing`` when the payload is lost, ``ValueError`` when it cannot be decoded.
    """

    def make() -> bytes:
        return document(fields, **{name: trace_json.whole(record)}).encode()

    small = record.codec == Codec.MSGPACK and len(record.body or b"") <= AWAITED_INLINE_BYTES
    return answer(make() if small else await in_thread(make))
