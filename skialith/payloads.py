"""Payloads: any value ormsgpack can carry, encoded and compressed into a record's body, and back."""

from __future__ import annotations

import sys
from datetime import date, datetime, time
from typing import Any, NoReturn

import ormsgpack
import zstandard

from . import _fastpath, payload_faults
from .config import COMPRESS_ABOVE_BYTES, LARGEST_RECORD_BYTES, MAX_PAYLOAD_DEPTH, MAX_RECORD_BYTES
from .errors import InvalidPayload, RecordTooLarge
from .records import Codec

# Times go through _foreign because ormsgpack rounds offsets to minutes (+00:19:32 to +00:20, +23:59:59 to +23:60).
_TEXT_KEYS = ormsgpack.OPT_PASSTHROUGH_DATETIME
_TIMES = (datetime, date, time)
# The last ormsgpack for Python 3.10 is 1.12. It ends the whole process at a dataclass with an unset field, a pydantic
# class and numpy's NaT, so there they go through _foreign too; and it has no Fragment (packed bytes taken as they are).
_SOUND = hasattr(ormsgpack, "Fragment")
_TEXT_KEYS |= ormsgpack.OPT_SERIALIZE_PYDANTIC if _SOUND else ormsgpack.OPT_PASSTHROUGH_DATACLASS
_ANY_KEYS = _TEXT_KEYS | ormsgpack.OPT_NON_STR_KEYS
COMPRESSION_LEVEL = 3
# What encode() lets through is far below ormsgpack's own limit of 1022 when it reads.
_DECODE_DEPTH = 1000


def encode(value: Any, argument: str = "data") -> bytes:
    """``value`` as msgpack. ``argument`` is the name the caller knows it by, for the error.

    Raises :class:`~skialith.errors.InvalidPayload` (nothing was sent) with the path to the first value that cannot be
    carried or would not come back: a type ormsgpack does not know, an int over 64 bits, a lone surrogate, nesting over
    ``MAX_PAYLOAD_DEPTH``, a value that holds itself, keys that become the same key.

    Cost: one ormsgpack call and one linear scan (half as long) when all keys are ``str``. Other keys can collide once
    converted (``{date(2020, 1, 1): 1, "2020-01-01": 2}``), so such a payload is also read back: four to six times the
    cost.
    """
    try:
        body = ormsgpack.packb(value, default=_foreign, option=_TEXT_KEYS)
        if _fastpath.scan_payload(body, MAX_PAYLOAD_DEPTH):
            return body
    except (TypeError, ValueError):
        pass  # keys that are not str, or a fault: both need a closer look
    return _encode_any_keys(value, argument)


def _encode_any_keys(value: Any, argument: str) -> bytes:
    try:
        body = _pack(value)
        _fastpath.scan_payload(body, MAX_PAYLOAD_DEPTH)
        same = _pack(_unpack(body)) == body
    except (TypeError, ValueError) as error:
        _refuse(value, argument, error)
    # A body may differ after the detour and be right (numpy's float32 comes back as a double), so the walk decides.
    if not same and payload_faults.find(value, argument, _pack, _unpack) is not None:
        _refuse(value, argument, None)
    return body


def _refuse(value: Any, argument: str, error: Exception | None) -> NoReturn:
    path, reason = payload_faults.find(value, argument, _pack, _unpack) or (argument, f"cannot be carried ({error})")
    raise InvalidPayload(f"{path}: {reason}", argument=argument, path=path) from error


def _pack(value: Any) -> bytes:
    return ormsgpack.packb(value, default=_foreign, option=_ANY_KEYS)


def _unpack(body: bytes) -> Any:
    return ormsgpack.unpackb(body, ext_hook=ormsgpack.Ext, option=ormsgpack.OPT_NON_STR_KEYS)


def _foreign(value: Any) -> Any:
    """What ormsgpack does not pack itself: times, numpy's arrays and scalars (on Python 3.10 also objects with fields).

    Not ormsgpack's own option for numpy: it reads big-endian arrays as if they were little-endian (wrong numbers, no
    error) and refuses views that are not contiguous.
    """
    if type(value) in _TIMES:
        return value.isoformat()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _numbers(numpy, value)
    fields = payload_faults.fields_of(value)
    if fields is None:
        raise TypeError
    return fields


def _numbers(numpy: Any, value: Any) -> Any:
    if value.dtype.hasobject or (value.dtype.kind == "M" and not _SOUND):
        raise TypeError
    if type(value) is numpy.ndarray:
        value = numpy.ascontiguousarray(value, value.dtype.newbyteorder("=")) if value.ndim else value[()]
    packed = ormsgpack.packb(value, option=ormsgpack.OPT_SERIALIZE_NUMPY)
    return ormsgpack.Fragment(packed) if _SOUND else ormsgpack.unpackb(packed)


def pack(value: Any, argument: str = "data", limit: int = MAX_RECORD_BYTES) -> tuple[Codec, bytes]:
    """A record's codec and body: :func:`encode`, then zstd above ``COMPRESS_ABOVE_BYTES`` if that is smaller.

    Raises what :func:`encode` raises, and :class:`~skialith.errors.RecordTooLarge` if the encoded size before
    compression is over ``limit`` bytes; nothing was sent.
    """
    return compressed(plain(value, argument, limit)[1])


def plain(value: Any, argument: str = "data", limit: int = MAX_RECORD_BYTES) -> tuple[Codec, bytes]:
    """As :func:`pack`, without the compression."""
    body = encode(value, argument)
    size = len(body)
    if size > limit:
        raise RecordTooLarge(
            f"{argument} has {size} bytes encoded; at most {limit} are allowed (max_record_bytes)",
            argument=argument,
            size=size,
            limit=limit,
        )
    return Codec.MSGPACK, body


def compressed(body: bytes) -> tuple[Codec, bytes]:
    """Codec and body of a record from its msgpack: zstd above ``COMPRESS_ABOVE_BYTES`` if that is smaller."""
    if len(body) > COMPRESS_ABOVE_BYTES:
        smaller = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(body)
        if len(smaller) < len(body):
            return Codec.ZSTD_MSGPACK, smaller
    return Codec.MSGPACK, body


def decode(codec: int, body: bytes, limit: int = LARGEST_RECORD_BYTES) -> Any:
    """The value of a record's body: what :func:`encode` was given, up to the mapping in docs/PAYLOADS.md.

    ``limit``: largest decompressed size in bytes that is let through. Raises ``ValueError`` saying what is wrong with
    the body; the record itself is as durable as before.
    """
    body = uncompressed(codec, body, limit)
    _fastpath.scan_payload(body, _DECODE_DEPTH)  # ormsgpack ignores bytes behind the value
    try:
        return _unpack(body)
    except ValueError as error:
        raise ValueError(f"payload is not valid msgpack: {error}") from None


def uncompressed(codec: int, body: bytes, limit: int = LARGEST_RECORD_BYTES) -> bytes:
    """The msgpack of a record's body.

    Raises ``ValueError`` for an unknown codec, a corrupt frame, a size over ``limit`` bytes.
    """
    if codec == Codec.MSGPACK:
        return body
    if codec != Codec.ZSTD_MSGPACK:
        raise ValueError(f"payload has the unknown codec {codec}; this Skialith reads 0 (msgpack) and 1 (zstd msgpack)")
    try:
        size = zstandard.frame_content_size(body)
        if size < 0:
            raise ValueError("payload is a zstd frame that does not state its size")
        if size > limit:
            raise ValueError(f"payload has {size} bytes decompressed; at most {limit} are taken here")
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"payload is not a valid zstd frame: {error}") from None
