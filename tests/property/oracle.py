"""What skialith._fastpath must do, said a second time in plain, slow Python that shares no code with it."""

from __future__ import annotations

import json
import re
import struct
from hashlib import blake2b
from typing import Any

PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
Fields = tuple[int, str, str, bytes, int, str, int, int, "bytes | None", "tuple[int, int, bytes] | None"]


# ---- keys and subject tokens


def event_key(namespace: str, agent_id: str, event_id: str) -> bytes:
    digest = blake2b(digest_size=16)
    for text in (namespace, agent_id, event_id):
        data = text.encode("utf-8")
        digest.update(struct.pack(">I", len(data)) + data)
    return digest.digest()


def subject_token(agent_id: str) -> str:
    if not agent_id:
        raise ValueError("empty")
    data = agent_id.encode("utf-8")
    pieces = [chr(byte) if byte in PLAIN else f"%{byte:02X}" for byte in data]
    whole = "".join(pieces)
    if len(whole) <= 200:
        return whole
    prefix = ""
    for piece in pieces:
        if len(prefix) + len(piece) > 167:
            break
        prefix += piece
    return f"{prefix}~{blake2b(data, digest_size=16).hexdigest()}"


# ---- msgpack


def pack(value: Any) -> bytes:
    """The shortest msgpack form of int, str, bytes and lists of them."""
    if isinstance(value, int):
        if -32 <= value <= 127:
            return struct.pack("b", value)
        forms = ((0xCC, "B"), (0xCD, "H"), (0xCE, "I"), (0xCF, "Q")) if value > 0 else ()
        forms = forms or ((0xD0, "b"), (0xD1, "h"), (0xD2, "i"), (0xD3, "q"))
        for tag, form in forms:
            try:
                return bytes([tag]) + struct.pack(">" + form, value)
            except struct.error:
                continue
        raise ValueError("too large")
    if isinstance(value, str):
        data = value.encode("utf-8")
        return (bytes([0xA0 | len(data)]) if len(data) < 32 else _sized(0xD9, data)) + data
    if isinstance(value, bytes):
        return _sized(0xC4, value) + value
    return bytes([0x90 | len(value)]) + b"".join(map(pack, value))


def _sized(first: int, data: bytes) -> bytes:
    for step, form in enumerate("BHI"):
        try:
            return bytes([first + step]) + struct.pack(">" + form, len(data))
        except struct.error:
            continue
    raise ValueError("too long")


class Ext:
    """An extension, whatever is in it."""


class Map(list[tuple[Any, Any]]):
    """The entries of a map as they stand."""


def unpack(data: bytes, max_depth: int = 1024) -> Any:
    """Any msgpack value that is the whole of ``data``; text is left as :class:`bytes` behind a marker of its own."""
    value, rest = _value(data, max_depth)
    if rest:
        raise ValueError("bytes left over")
    return value


class Text(bytes):
    """Text, not decoded."""


def _take(data: bytes, size: int) -> tuple[bytes, bytes]:
    if len(data) < size:
        raise ValueError("cut short")
    return data[:size], data[size:]


def _number(data: bytes, form: str) -> tuple[Any, bytes]:
    head, rest = _take(data, struct.calcsize(form))
    return struct.unpack(">" + form, head)[0], rest


def _value(data: bytes, levels: int) -> tuple[Any, bytes]:
    head, rest = _take(data, 1)
    tag = head[0]
    if tag <= 0x7F:
        return tag, rest
    if tag >= 0xE0:
        return tag - 256, rest
    if tag <= 0x8F:
        return _entries(tag & 15, rest, levels)
    if tag <= 0x9F:
        return _items(tag & 15, rest, levels)
    if tag <= 0xBF:
        text, rest = _take(rest, tag & 31)
        return Text(text), rest
    if 0xCA <= tag <= 0xD3:
        return _number(rest, "fdBHIQbhiq"[tag - 0xCA])
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], rest
    if tag == 0xC1:
        raise ValueError("no meaning")
    if 0xD4 <= tag <= 0xD8:
        return Ext(), _take(rest, 1 + 2 ** (tag - 0xD4))[1]
    first, forms = {0xC4: (0xC4, "BHI"), 0xC7: (0xC7, "BHI"), 0xD9: (0xD9, "BHI")}.get(
        next(k for k in (0xDE, 0xDC, 0xD9, 0xC7, 0xC4) if tag >= k), (tag & 0xFE, "HI")
    )
    size, rest = _number(rest, forms[tag - first])
    if first == 0xDC:
        return _items(size, rest, levels)
    if first == 0xDE:
        return _entries(size, rest, levels)
    body, rest = _take(rest, size + (first == 0xC7))
    return (Ext() if first == 0xC7 else Text(body) if first == 0xD9 else body), rest


def _items(count: int, rest: bytes, levels: int) -> tuple[list[Any], bytes]:
    if levels == 0:
        raise ValueError("too deep")
    items = []
    for _ in range(count):
        item, rest = _value(rest, levels - 1)
        items.append(item)
    return items, rest


def _entries(count: int, rest: bytes, levels: int) -> tuple[Map, bytes]:
    flat, rest = _items(2 * count, rest, levels)
    return Map(zip(flat[::2], flat[1::2], strict=True)), rest


def scan_payload(data: bytes, max_depth: int) -> bool:
    return _plain(unpack(data, max_depth))


def _plain(value: Any) -> bool:
    if isinstance(value, Map):
        return all(isinstance(key, Text) and _plain(item) for key, item in value)
    if isinstance(value, list):
        return all(map(_plain, value))
    return not isinstance(value, Ext)


# ---- records


def encode_record(fields: Fields) -> bytes:
    kind, agent_id, record_id, key, step_index, event_type, created_us, codec, body, manifest = fields
    last: Any = body if manifest is None else list(manifest)
    return pack([1, kind, agent_id, record_id, key, step_index, event_type, created_us, codec, last])


def decode_record(data: bytes) -> Fields:
    value = unpack(data)
    if type(value) is not list or len(value) != 10 or _int(value[0]) != 1:
        raise ValueError("not a record")
    _, kind, agent_id, record_id, key, step_index, event_type, created_us, codec, last = value
    if not (0 <= _int(kind) <= 255 and 0 <= _int(codec) <= 255):
        raise ValueError("out of range")
    if len(_bin(key)) != 16:
        raise ValueError("key")
    manifest = None
    if type(last) is list:
        size, chunks, digest = last
        if _int(size) < 0 or _int(chunks) < 0:
            raise ValueError("negative")
        manifest = (size, chunks, _bin(digest))
    body = _bin(last) if manifest is None else None
    head = (kind, _text(agent_id), _text(record_id), key, _int(step_index), _text(event_type), _int(created_us), codec)
    return (*head, body, manifest)


def _int(value: Any) -> int:
    if type(value) is not int or value >= 2**63:
        raise ValueError("not an integer")
    return value


def _bin(value: Any) -> bytes:
    if type(value) is not bytes:
        raise ValueError("not binary")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, Text):
        raise ValueError("not text")
    return value.decode("utf-8")


# ---- publish frames


def _check(subject: str) -> None:
    if not re.fullmatch(r"[\x21-\x7e]+", subject):
        raise ValueError("subject")


def _line(verb: str, subject: str, reply: str, *sizes: int) -> bytes:
    _check(subject)
    if reply:
        _check(reply)
    line = " ".join([verb, subject, *([reply] if reply else []), *map(str, sizes)]) + "\r\n"
    if len(line) > 4096:
        raise ValueError("control line")
    return line.encode("ascii")


def pub(subject: str, reply: str, payload: bytes) -> bytes:
    return _line("PUB", subject, reply, len(payload)) + payload + b"\r\n"


def hpub(subject: str, reply: str, headers: bytes, payload: bytes) -> bytes:
    if headers and not headers.endswith(b"\r\n"):
        raise ValueError("headers")
    head = b"NATS/1.0\r\n" + headers + b"\r\n"
    return _line("HPUB", subject, reply, len(head), len(head) + len(payload)) + head + payload + b"\r\n"


def record_headers(msg_id: bytes) -> bytes:
    if not msg_id:
        raise ValueError("empty")
    return f"Nats-Msg-Id: {msg_id.hex()}\r\n".encode("ascii")


def fence(sequence: int, subject: str) -> bytes:
    _check(subject)
    lines = [
        f"Nats-Expected-Last-Subject-Sequence: {sequence}",
        f"Nats-Expected-Last-Subject-Sequence-Subject: {subject}",
    ]
    return "".join(line + "\r\n" for line in lines).encode("ascii")


# ---- PubAcks and ack subjects


def parse_puback(data: bytes) -> tuple[int, bool, str, int, int, str, int]:
    answer = json.loads(data.decode("utf-8"))
    if type(answer) is not dict:
        raise ValueError("not an object")
    seq, count = _json_int(answer, "seq"), _json_int(answer, "count")
    duplicate, stream = answer.get("duplicate", False), answer.get("stream", "")
    if type(duplicate) is not bool or type(stream) is not str:
        raise ValueError("types")
    if "error" not in answer:
        if seq == 0:
            raise ValueError("no sequence")
        return seq, duplicate, stream, 0, 0, "", count
    error = answer["error"]
    if type(error) is not dict:
        raise ValueError("error")
    err_code, code, description = _json_int(error, "err_code"), _json_int(error, "code"), error.get("description", "")
    if type(description) is not str or err_code == code == 0:
        raise ValueError("error")
    return seq, duplicate, stream, err_code, code, description, count


def _json_int(source: dict[str, Any], name: str) -> int:
    value = source.get(name, 0)
    if type(value) is not int or not 0 <= value < 2**64:
        raise ValueError(name)
    return value


def parse_ack_subject(reply: str) -> tuple[int, int, int, int]:
    tokens = reply.split(".")
    if tokens[:2] != ["$JS", "ACK"] or not (len(tokens) == 9 or len(tokens) >= 11):
        raise ValueError("not an ack subject")
    numbers = tokens[4:9] if len(tokens) == 9 else tokens[6:11]
    if not all(re.fullmatch(r"0|[1-9][0-9]*", number) and int(number) < 2**64 for number in numbers):
        raise ValueError("numbers")
    delivered, stream_seq, _, time_ns, pending = map(int, numbers)
    return stream_seq, time_ns, delivered, pending
