# cython: language_level=3, boundscheck=False, wraparound=False, autotestdict=False
"""The wire in C: record keys, subject tokens, the record's msgpack form, publish frames, PubAcks and ack subjects.

A record on the wire is one msgpack array of ten::

    [1, kind, agent_id, record_id, key, step_index, event_type, created_us, codec, body]

where ``body`` is bin, or ``[size, chunks, digest]`` when the body follows in chunk messages. Signatures and
contracts stand in ``_fastpath.pyi``; ``tests/property/oracle.py`` says the same in plain Python.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeASCII, PyUnicode_DecodeUTF8
from libc.stdint cimport INT64_MAX, UINT64_MAX, int64_t, uint8_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

import json
from hashlib import blake2b

cdef enum:
    VERSION = 1
    FIELDS = 10
    TOKEN_LIMIT = 200
    TOKEN_PREFIX = 167  # TOKEN_LIMIT less "~" and 32 hex digits
    ACK_TOKENS_V1 = 9
    ACK_TOKENS_V2 = 11

cdef const char* HEX_UPPER = b"0123456789ABCDEF"
cdef int64_t MSGPACK_LENGTH_LIMIT = 0xFFFFFFFF


# ---- keys and subject tokens


def event_key(str namespace not None, str agent_id not None, str event_id not None):
    cdef Py_ssize_t sizes[3]
    cdef const char* texts[3]
    texts[0] = PyUnicode_AsUTF8AndSize(namespace, &sizes[0])
    texts[1] = PyUnicode_AsUTF8AndSize(agent_id, &sizes[1])
    texts[2] = PyUnicode_AsUTF8AndSize(event_id, &sizes[2])
    cdef bytes joined = PyBytes_FromStringAndSize(NULL, 12 + sizes[0] + sizes[1] + sizes[2])
    cdef uint8_t* p = <uint8_t*> PyBytes_AS_STRING(joined)
    cdef int i
    for i in range(3):
        _check_length("id", sizes[i])
        p = _put_big_endian(p, <uint64_t> sizes[i], 4)
        p = _put_bytes(p, texts[i], sizes[i])
    return blake2b(joined, digest_size=KEY_BYTES).digest()


def subject_token(str agent_id not None):
    cdef Py_ssize_t size, i, length = 0, prefix = 0
    cdef const uint8_t* text = <const uint8_t*> PyUnicode_AsUTF8AndSize(agent_id, &size)
    if size == 0:
        raise ValueError("agent_id must not be empty: it would leave an empty token in the subject")
    for i in range(size):
        length += 1 if _is_plain(text[i]) else 3
        if length <= TOKEN_PREFIX:
            prefix = i + 1
    if length == size and length <= TOKEN_LIMIT:
        return agent_id if type(agent_id) is str else str.__str__(agent_id)
    if length <= TOKEN_LIMIT:
        return _percent_encode(text, size)
    digest = blake2b(text[:size], digest_size=KEY_BYTES).hexdigest()
    return f"{_percent_encode(text, prefix)}~{digest}"


cdef inline bint _is_plain(uint8_t c) noexcept nogil:
    return (c"a" <= c <= c"z") or (c"A" <= c <= c"Z") or (c"0" <= c <= c"9") or c == c"_" or c == c"-"


cdef str _percent_encode(const uint8_t* text, Py_ssize_t size):
    """Only for texts whose escaped form is at most TOKEN_LIMIT long."""
    cdef char out[TOKEN_LIMIT]
    cdef Py_ssize_t i, n = 0
    for i in range(size):
        if _is_plain(text[i]):
            out[n] = <char> text[i]
            n += 1
        else:
            out[n] = c"%"
            out[n + 1] = HEX_UPPER[text[i] >> 4]
            out[n + 2] = HEX_UPPER[text[i] & 15]
            n += 3
    return PyUnicode_DecodeASCII(out, n, NULL)


# ---- writing


cdef inline uint8_t* _put_bytes(uint8_t* p, const char* source, Py_ssize_t size) noexcept nogil:
    memcpy(p, source, <size_t> size)
    return p + size


cdef inline uint8_t* _put_big_endian(uint8_t* p, uint64_t value, int width) noexcept nogil:
    cdef int i
    for i in range(width):
        p[i] = <uint8_t> (value >> (8 * (width - 1 - i)))
    return p + width


cdef inline uint8_t* _put_tagged(uint8_t* p, uint8_t tag, uint64_t value, int width) noexcept nogil:
    p[0] = tag
    return _put_big_endian(p + 1, value, width)


cdef inline Py_ssize_t _int_size(int64_t value) noexcept nogil:
    if -32 <= value <= 127:
        return 1
    if value >= 0:
        return 2 if value <= 0xFF else 3 if value <= 0xFFFF else 5 if value <= 0xFFFFFFFFLL else 9
    return 2 if value >= -0x80 else 3 if value >= -0x8000 else 5 if value >= -0x80000000LL else 9


cdef inline uint8_t* _put_int(uint8_t* p, int64_t value) noexcept nogil:
    cdef Py_ssize_t size = _int_size(value)
    cdef uint8_t base = 0xCC if value >= 0 else 0xD0
    if size == 1:
        p[0] = <uint8_t> value
        return p + 1
    return _put_tagged(p, base + (0 if size == 2 else 1 if size == 3 else 2 if size == 5 else 3), <uint64_t> value, <int> size - 1)


cdef inline Py_ssize_t _bin_head(Py_ssize_t size) noexcept nogil:
    return 2 if size <= 0xFF else 3 if size <= 0xFFFF else 5


cdef inline Py_ssize_t _str_head(Py_ssize_t size) noexcept nogil:
    return 1 if size < 32 else _bin_head(size)


cdef inline uint8_t* _put_bin(uint8_t* p, const char* source, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t head = _bin_head(size)
    p = _put_tagged(p, 0xC4 if head == 2 else 0xC5 if head == 3 else 0xC6, <uint64_t> size, <int> head - 1)
    return _put_bytes(p, source, size)


cdef inline uint8_t* _put_str(uint8_t* p, const char* source, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t head = _str_head(size)
    if head == 1:
        p[0] = <uint8_t> (0xA0 | size)
        p += 1
    else:
        p = _put_tagged(p, 0xD9 if head == 2 else 0xDA if head == 3 else 0xDB, <uint64_t> size, <int> head - 1)
    return _put_bytes(p, source, size)


cdef int _check_length(str what, Py_ssize_t size) except -1:
    if size > MSGPACK_LENGTH_LIMIT:
        raise ValueError(f"{what} has {size} bytes; the wire carries at most {MSGPACK_LENGTH_LIMIT}")
    return 0


cdef int record_form(RecordForm* form, object fields) except -1:
    """Check the fields of a ``Record`` and measure its wire form, without the manifest that stands for a missing body.

    ``form`` points into the fields, so it is good as long as they are.
    """
    if not isinstance(fields, tuple) or len(fields) < FIELDS:
        raise TypeError("not a record")
    cdef tuple record = <tuple> fields  # a subclass: without the cast Cython takes tuple itself only
    cdef str agent_id = record[2]
    cdef str record_id = record[3]
    cdef bytes key = record[4]
    cdef str event_type = record[6]
    cdef bytes body = record[9]
    form.kind = record[0]
    form.step_index = record[5]
    form.created_us = record[7]
    form.codec = record[8]
    if key is None:
        raise TypeError("key must be bytes, not None")
    _check_head(form.kind, key, form.codec)
    form.agent = PyUnicode_AsUTF8AndSize(agent_id, &form.agent_size)
    form.ident = PyUnicode_AsUTF8AndSize(record_id, &form.id_size)
    form.etype = PyUnicode_AsUTF8AndSize(event_type, &form.type_size)
    form.key = PyBytes_AS_STRING(key)
    form.body = NULL if body is None else PyBytes_AS_STRING(body)
    form.body_size = 0 if body is None else PyBytes_GET_SIZE(body)
    _check_length("agent_id", form.agent_size)
    _check_length("record_id", form.id_size)
    _check_length("event_type", form.type_size)
    _check_length("body", form.body_size)
    form.size = 2 + _int_size(form.kind) + _int_size(form.step_index) + _int_size(form.created_us) + _int_size(form.codec)
    form.size += _str_head(form.agent_size) + form.agent_size + _str_head(form.id_size) + form.id_size
    form.size += _str_head(form.type_size) + form.type_size + 2 + KEY_BYTES
    if body is not None:
        form.size += _bin_head(form.body_size) + form.body_size
    return 0


cdef uint8_t* put_record(uint8_t* p, const RecordForm* form) noexcept nogil:
    """Write the ``form.size`` bytes that were measured; returns the end."""
    p[0] = 0x90 | FIELDS
    p[1] = VERSION
    p = _put_int(p + 2, form.kind)
    p = _put_str(p, form.agent, form.agent_size)
    p = _put_str(p, form.ident, form.id_size)
    p = _put_bin(p, form.key, KEY_BYTES)
    p = _put_int(p, form.step_index)
    p = _put_str(p, form.etype, form.type_size)
    p = _put_int(p, form.created_us)
    p = _put_int(p, form.codec)
    if form.body != NULL:
        p = _put_bin(p, form.body, form.body_size)
    return p


def encode_record(
    int64_t kind,
    str agent_id not None,
    str record_id not None,
    bytes key not None,
    int64_t step_index,
    str event_type not None,
    int64_t created_us,
    int64_t codec,
    bytes body,
    tuple manifest,
):
    if (body is None) == (manifest is None):
        raise ValueError("a record has either a body or a manifest")
    cdef RecordForm form
    cdef tuple record = (kind, None, agent_id, record_id, key, step_index, event_type, created_us, codec, body)
    record_form(&form, record)
    cdef bytes tail = b"" if manifest is None else _encode_manifest(manifest)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, form.size + PyBytes_GET_SIZE(tail))
    cdef uint8_t* p = put_record(<uint8_t*> PyBytes_AS_STRING(out), &form)
    _put_bytes(p, PyBytes_AS_STRING(tail), PyBytes_GET_SIZE(tail))
    return out


cdef int _check_head(int64_t kind, bytes key, int64_t codec) except -1:
    if not 0 <= kind <= 255:
        raise ValueError(f"kind is {kind}, not 0 to 255")
    if not 0 <= codec <= 255:
        raise ValueError(f"codec is {codec}, not 0 to 255")
    if PyBytes_GET_SIZE(key) != KEY_BYTES:
        raise ValueError(f"key has {PyBytes_GET_SIZE(key)} bytes, not {KEY_BYTES}")
    return 0


cdef bytes _encode_manifest(tuple manifest):
    if len(manifest) != 3:
        raise ValueError(f"manifest has {len(manifest)} parts, not size, chunks and digest")
    cdef int64_t size = manifest[0]
    cdef int64_t chunks = manifest[1]
    cdef bytes digest = manifest[2]
    if digest is None:
        raise TypeError("manifest: digest must be bytes, not None")
    if size < 0 or chunks < 0:
        raise ValueError(f"manifest: size {size} and chunks {chunks} must not be negative")
    cdef Py_ssize_t n = PyBytes_GET_SIZE(digest)
    _check_length("digest", n)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, 1 + _int_size(size) + _int_size(chunks) + _bin_head(n) + n)
    cdef uint8_t* p = <uint8_t*> PyBytes_AS_STRING(out)
    p[0] = 0x93
    p = _put_int(p + 1, size)
    p = _put_int(p, chunks)
    _put_bin(p, PyBytes_AS_STRING(digest), n)
    return out


# ---- reading


cdef struct Reader:
    const uint8_t* data
    Py_ssize_t size
    Py_ssize_t at


def decode_record(bytes data not None):
    cdef Reader r
    r.data = <const uint8_t*> PyBytes_AS_STRING(data)
    r.size = PyBytes_GET_SIZE(data)
    r.at = 0
    cdef Py_ssize_t fields = _read_array(&r, "record")
    cdef int64_t version = _read_int(&r, "version")
    if version != VERSION:
        raise ValueError(f"record: unknown version {version}; this Skialith reads version {VERSION}")
    if fields != FIELDS:
        raise ValueError(f"record: {fields} fields, not {FIELDS}")
    cdef int64_t kind = _read_int(&r, "kind")
    cdef str agent_id = _read_str(&r, "agent_id")
    cdef str record_id = _read_str(&r, "record_id")
    cdef bytes key = _read_bin(&r, "key")
    cdef int64_t step_index = _read_int(&r, "step_index")
    cdef str event_type = _read_str(&r, "event_type")
    cdef int64_t created_us = _read_int(&r, "created_us")
    cdef int64_t codec = _read_int(&r, "codec")
    _check_head(kind, key, codec)
    cdef bytes body = None
    cdef tuple manifest = None
    cdef uint8_t tag = _peek(&r, "body")
    if tag >> 4 == 0x9 or tag == 0xDC or tag == 0xDD:
        manifest = _read_manifest(&r)
    else:
        body = _read_bin(&r, "body")
    if r.at != r.size:
        raise ValueError(f"record: {r.size - r.at} bytes left over behind the last field")
    return kind, agent_id, record_id, key, step_index, event_type, created_us, codec, body, manifest


cdef tuple _read_manifest(Reader* r):
    cdef Py_ssize_t parts = _read_array(r, "manifest")
    if parts != 3:
        raise ValueError(f"record: manifest has {parts} parts, not 3")
    cdef int64_t size = _read_int(r, "manifest size")
    cdef int64_t chunks = _read_int(r, "manifest chunks")
    if size < 0 or chunks < 0:
        raise ValueError(f"record: manifest size {size} and chunks {chunks} must not be negative")
    return size, chunks, _read_bin(r, "manifest digest")


cdef int _need(Reader* r, uint64_t count, str what) except -1:
    if count > <uint64_t> (r.size - r.at):
        raise ValueError(f"record: cut short in {what} at byte {r.at}: {count} more bytes needed, {r.size - r.at} there")
    return 0


cdef int _peek(Reader* r, str what) except -1:
    _need(r, 1, what)
    return r.data[r.at]


cdef uint64_t _read_big_endian(Reader* r, int width, str what) except? 0:
    cdef uint64_t value = 0
    cdef int i
    _need(r, <uint64_t> width, what)
    for i in range(width):
        value = (value << 8) | r.data[r.at + i]
    r.at += width
    return value


cdef int64_t _read_int(Reader* r, str what) except? -1:
    cdef uint8_t tag = _peek(r, what)
    cdef uint64_t raw
    cdef int shift
    if tag <= 0x7F or tag >= 0xE0:
        r.at += 1
        return tag if tag <= 0x7F else <int64_t> tag - 256
    if not 0xCC <= tag <= 0xD3:
        raise ValueError(f"record: {what} is not an integer (byte 0x{tag:02x} at {r.at})")
    r.at += 1
    if tag <= 0xCF:
        raw = _read_big_endian(r, 1 << (tag - 0xCC), what)
        if raw > <uint64_t> INT64_MAX:
            raise ValueError(f"record: {what} {raw} is over 63 bits")
        return <int64_t> raw
    raw = _read_big_endian(r, 1 << (tag - 0xD0), what)
    shift = 64 - 8 * (1 << (tag - 0xD0))
    # Sign extension: up against the top bit, then an arithmetic shift back.
    return (<int64_t> (raw << shift)) >> shift


cdef Py_ssize_t _read_length(Reader* r, str what, uint8_t tag, uint8_t first) except -1:
    """The length behind a tag of a family of 1, 2 or 4 bytes that starts at ``first``; the bytes themselves are there."""
    r.at += 1
    cdef uint64_t size = _read_big_endian(r, 1 << (tag - first), what)
    _need(r, size, what)
    return <Py_ssize_t> size


cdef Py_ssize_t _read_array(Reader* r, str what) except -1:
    cdef uint8_t tag = _peek(r, what)
    if tag >> 4 != 0x9 and tag != 0xDC and tag != 0xDD:
        raise ValueError(f"record: {what} is not an array (byte 0x{tag:02x} at {r.at})")
    r.at += 1
    if tag >> 4 == 0x9:
        return tag & 0x0F
    return <Py_ssize_t> _read_big_endian(r, 2 if tag == 0xDC else 4, what)


cdef str _read_str(Reader* r, str what):
    cdef uint8_t tag = _peek(r, what)
    cdef Py_ssize_t size
    if tag >> 5 == 0x5:
        r.at += 1
        size = tag & 0x1F
        _need(r, <uint64_t> size, what)
    elif 0xD9 <= tag <= 0xDB:
        size = _read_length(r, what, tag, 0xD9)
    else:
        raise ValueError(f"record: {what} is not text (byte 0x{tag:02x} at {r.at})")
    r.at += size
    try:
        return PyUnicode_DecodeUTF8(<const char*> r.data + r.at - size, size, NULL)
    except UnicodeDecodeError as error:
        raise ValueError(f"record: {what} is not UTF-8 ({error.reason} at byte {r.at - size + error.start})") from None


cdef bytes _read_bin(Reader* r, str what):
    cdef uint8_t tag = _peek(r, what)
    if not 0xC4 <= tag <= 0xC6:
        raise ValueError(f"record: {what} is not binary (byte 0x{tag:02x} at {r.at})")
    cdef Py_ssize_t size = _read_length(r, what, tag, 0xC4)
    r.at += size
    return PyBytes_FromStringAndSize(<const char*> r.data + r.at - size, size)


# ---- publish frames


def pub(str subject not None, str reply not None, bytes payload not None):
    cdef Py_ssize_t n = PyBytes_GET_SIZE(payload)
    cdef bytes line = _control_line(b"PUB ", subject, reply, str(n))
    return _frame(line, b"", b"", payload)


def hpub(str subject not None, str reply not None, bytes headers not None, bytes payload not None):
    cdef Py_ssize_t n = PyBytes_GET_SIZE(headers)
    cdef const char* text = PyBytes_AS_STRING(headers)
    if n != 0 and (n < 2 or text[n - 2] != c"\r" or text[n - 1] != c"\n"):
        raise ValueError("headers must be lines that end with CRLF")
    cdef Py_ssize_t head = len(b"NATS/1.0\r\n") + n + 2
    cdef bytes line = _control_line(b"HPUB ", subject, reply, f"{head} {head + PyBytes_GET_SIZE(payload)}")
    return _frame(line, b"NATS/1.0\r\n", headers, payload)


cdef bytes _control_line(bytes verb, str subject, str reply, str sizes):
    _check_subject("subject", subject)
    cdef bytes line
    if reply:
        _check_subject("reply", reply)
        line = verb + f"{subject} {reply} {sizes}\r\n".encode("ascii")
    else:
        line = verb + f"{subject} {sizes}\r\n".encode("ascii")
    if PyBytes_GET_SIZE(line) > CONTROL_LINE_LIMIT:
        raise ValueError(f"control line has {PyBytes_GET_SIZE(line)} bytes; the server takes {CONTROL_LINE_LIMIT}")
    return line


cdef int _check_subject(str what, str subject) except -1:
    """Printable ASCII without spaces: anything else would end the line early or break another client's reader."""
    cdef Py_ssize_t size, i
    cdef const uint8_t* text = <const uint8_t*> PyUnicode_AsUTF8AndSize(subject, &size)
    if size == 0:
        raise ValueError(f"{what} must not be empty")
    for i in range(size):
        if text[i] <= 0x20 or text[i] >= 0x7F:
            raise ValueError(f"{what} {subject!r} holds a byte that is not printable ASCII")
    return 0


cdef bytes _frame(bytes line, bytes version, bytes headers, bytes payload):
    """line, then version, headers and a blank line if there is a version, then payload and CRLF."""
    cdef Py_ssize_t a = PyBytes_GET_SIZE(line), b = PyBytes_GET_SIZE(version)
    cdef Py_ssize_t c = PyBytes_GET_SIZE(headers), d = PyBytes_GET_SIZE(payload)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, a + b + c + (2 if b else 0) + d + 2)
    cdef uint8_t* p = <uint8_t*> PyBytes_AS_STRING(out)
    p = _put_bytes(p, PyBytes_AS_STRING(line), a)
    if b:
        p = _put_bytes(p, PyBytes_AS_STRING(version), b)
        p = _put_bytes(p, PyBytes_AS_STRING(headers), c)
        p = _put_bytes(p, b"\r\n", 2)
    p = _put_bytes(p, PyBytes_AS_STRING(payload), d)
    _put_bytes(p, b"\r\n", 2)
    return out


def record_headers(bytes msg_id not None):
    if not msg_id:
        raise ValueError("msg_id must not be empty")
    return b"Nats-Msg-Id: " + msg_id.hex().encode("ascii") + b"\r\n"


def fence(uint64_t sequence, str subject not None):
    _check_subject("subject", subject)
    return (
        f"Nats-Expected-Last-Subject-Sequence: {sequence}\r\n"
        f"Nats-Expected-Last-Subject-Sequence-Subject: {subject}\r\n"
    ).encode("ascii")


# ---- PubAcks and ack subjects


cdef bint read_puback(const char* p, Py_ssize_t size, PubAck* ack) noexcept nogil:
    """The two answers nearly every record gets, as nats-server writes them; False for anything else."""
    cdef const char* end = p + size
    if not _skip(&p, end, b'{"stream":"', 11):
        return False
    ack.name = p
    while p < end and 0x20 <= <uint8_t> p[0] < 0x7F and p[0] != c'"' and p[0] != c"\\":
        p += 1
    ack.name_size = p - ack.name
    if _skip(&p, end, b'","domain":"', 12):
        while p < end and 0x20 <= <uint8_t> p[0] < 0x7F and p[0] != c'"' and p[0] != c"\\":
            p += 1
    if not (_skip(&p, end, b'", "seq":', 9) or _skip(&p, end, b'","seq":', 8)) or not read_digits(&p, end, &ack.seq):
        return False
    ack.duplicate = _skip(&p, end, b',"duplicate": true', 18) or _skip(&p, end, b',"duplicate":true', 17)
    return ack.seq != 0 and end - p == 1 and p[0] == c"}"


def parse_puback(bytes data not None):
    cdef PubAck ack
    if read_puback(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), &ack):
        return ack.seq, bool(ack.duplicate), PyUnicode_DecodeASCII(ack.name, ack.name_size, NULL), 0, 0, "", 0
    return _puback_from_json(data)


cdef inline bint _skip(const char** p, const char* end, const char* text, Py_ssize_t size) noexcept nogil:
    if end - p[0] < size or memcmp(p[0], text, <size_t> size) != 0:
        return False
    p[0] += size
    return True


cdef bint read_digits(const char** p, const char* end, uint64_t* value) noexcept nogil:
    """A decimal number without sign or leading zeros that fits 64 bits."""
    cdef const char* start = p[0]
    cdef uint64_t digit
    value[0] = 0
    while p[0] < end and c"0" <= p[0][0] <= c"9":
        digit = <uint64_t> (p[0][0] - c"0")
        if value[0] > (UINT64_MAX - digit) // 10:
            return False
        value[0] = value[0] * 10 + digit
        p[0] += 1
    return p[0] > start and (start[0] != c"0" or p[0] - start == 1)


cdef tuple _puback_from_json(bytes data):
    try:
        answer = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"PubAck is not JSON ({error}): {data[:80]!r}") from None
    if type(answer) is not dict:
        raise ValueError(f"PubAck is not a JSON object: {data[:80]!r}")
    stream = _field(answer, "stream", str, "", data)
    duplicate = _field(answer, "duplicate", bool, False, data)
    count = _field(answer, "count", int, 0, data)
    failure = _field(answer, "error", dict, None, data)
    seq = _field(answer, "seq", int, 0, data)
    if failure is None:
        if seq == 0:
            raise ValueError(f"PubAck has neither a sequence nor an error: {data[:80]!r}")
        return seq, duplicate, stream, 0, 0, "", count
    err_code = _field(failure, "err_code", int, 0, data)
    code = _field(failure, "code", int, 0, data)
    if err_code == 0 and code == 0:
        raise ValueError(f"PubAck has an error without a code: {data[:80]!r}")
    return seq, duplicate, stream, err_code, code, _field(failure, "description", str, "", data), count


cdef object _field(dict source, str name, type kind, object default, bytes data):
    if name not in source:
        return default
    value = source[name]
    if type(value) is not kind or (kind is int and not 0 <= value <= UINT64_MAX):
        raise ValueError(f"PubAck: {name} is not {kind.__name__} in range: {data[:80]!r}")
    return value


cdef bint read_ack_subject(const char* start, Py_ssize_t size, AckSubject* ack) noexcept nogil:
    """The parts of a consumer message's reply subject; False for anything that is not one."""
    cdef const char* p = start
    cdef const char* end = start + size
    cdef const char* tokens[ACK_TOKENS_V2 + 1]
    cdef Py_ssize_t first, i
    cdef uint64_t numbers[5]
    ack.tokens = 0
    ack.wrong = 0
    if not _skip(&p, end, b"$JS.ACK.", 8):
        return False
    tokens[0] = start
    tokens[1] = start + 4
    ack.tokens = 2
    while p != NULL:
        if ack.tokens <= ACK_TOKENS_V2:
            tokens[ack.tokens] = p
        ack.tokens += 1
        p = <const char*> memchr(p, c".", <size_t> (end - p))
        if p != NULL:
            p += 1
    if ack.tokens != ACK_TOKENS_V1 and ack.tokens < ACK_TOKENS_V2:
        return False
    first = 4 if ack.tokens == ACK_TOKENS_V1 else 6
    for i in range(5):
        p = tokens[first + i]
        if not read_digits(&p, end, &numbers[i]) or not (p == end or p[0] == c"."):
            ack.wrong = first + i + 1
            return False
    ack.consumer = tokens[first - 2]
    ack.consumer_size = tokens[first] - 1 - ack.consumer
    # delivered, stream sequence, consumer sequence, time, pending
    ack.seq, ack.time_ns, ack.deliveries, ack.pending = numbers[1], numbers[3], numbers[0], numbers[4]
    return True


def parse_ack_subject(reply not None):
    cdef Py_ssize_t size
    cdef const char* start
    cdef AckSubject ack
    if isinstance(reply, str):
        start = PyUnicode_AsUTF8AndSize(reply, &size)
    elif isinstance(reply, bytes):
        start = PyBytes_AS_STRING(reply)
        size = PyBytes_GET_SIZE(reply)
    else:
        raise TypeError(f"reply must be str or bytes, not {type(reply).__name__}")
    if read_ack_subject(start, size, &ack):
        return ack.seq, ack.time_ns, ack.deliveries, ack.pending
    if ack.tokens == 0:
        raise ValueError(f"not an ack subject: {reply!r}")
    if ack.wrong == 0:
        raise ValueError(f"ack subject has {ack.tokens} tokens, not {ACK_TOKENS_V1}, {ACK_TOKENS_V2} or more: {reply!r}")
    raise ValueError(f"ack subject: token {ack.wrong} is not a 64-bit number: {reply!r}")


# ---- payload bodies


cdef enum:
    DEEPEST = 1024


def scan_payload(bytes data not None, int max_depth):
    if not 0 <= max_depth <= DEEPEST:
        raise ValueError(f"max_depth is {max_depth}, not 0 to {DEEPEST}")
    cdef Reader r
    r.data = <const uint8_t*> PyBytes_AS_STRING(data)
    r.size = PyBytes_GET_SIZE(data)
    r.at = 0
    cdef uint64_t left[DEEPEST + 1]  # values still to come on each level
    cdef bint is_map[DEEPEST + 1]
    cdef int depth = 0
    cdef bint plain = True
    cdef bint is_key
    cdef uint64_t count = 0
    cdef Item item
    left[0] = 1
    is_map[0] = False
    while True:
        is_key = is_map[depth] and left[depth] % 2 == 0
        left[depth] -= 1
        item = _next_item(&r, &count)
        if item == EXT or (is_key and item != TEXT):
            plain = False
        if item == LIST or item == MAP:
            if depth == max_depth:
                raise ValueError(f"payload: nested deeper than {max_depth} levels at byte {r.at - 1}")
            depth += 1
            left[depth] = count if item == LIST else 2 * count
            is_map[depth] = item == MAP
        while left[depth] == 0:
            if depth == 0:
                if r.at != r.size:
                    raise ValueError(f"payload: {r.size - r.at} bytes left over behind the value")
                return bool(plain)
            depth -= 1


cdef enum Item:
    FAILED = -1
    OTHER
    TEXT
    EXT
    LIST
    MAP


cdef Item _next_item(Reader* r, uint64_t* count) except FAILED:
    """Step over one scalar, or over the head of a list or map, whose entries are then counted in ``count``."""
    cdef uint8_t tag
    if r.at >= r.size:
        raise ValueError(f"payload: cut short at byte {r.at}")
    tag = r.data[r.at]
    r.at += 1
    if tag <= 0x7F or tag >= 0xE0 or tag == 0xC0 or tag == 0xC2 or tag == 0xC3:
        return OTHER
    if tag <= 0x9F:
        count[0] = tag & 0x0F
        return MAP if tag <= 0x8F else LIST
    if tag <= 0xBF:
        _step(r, tag & 0x1F)
        return TEXT
    if tag == 0xC1:
        raise ValueError(f"payload: byte 0xc1 at {r.at - 1} has no meaning")
    if tag <= 0xC6:
        _step(r, _step_length(r, 1 << (tag - 0xC4)))
        return OTHER
    if tag <= 0xC9:
        _step(r, _step_length(r, 1 << (tag - 0xC7)) + 1)
        return EXT
    if tag <= 0xCB:
        _step(r, 4 << (tag - 0xCA))
        return OTHER
    if tag <= 0xD3:
        _step(r, 1 << ((tag - 0xCC) & 3))
        return OTHER
    if tag <= 0xD8:
        _step(r, (1 << (tag - 0xD4)) + 1)
        return EXT
    if tag <= 0xDB:
        _step(r, _step_length(r, 1 << (tag - 0xD9)))
        return TEXT
    count[0] = <uint64_t> _step_length(r, 2 << ((tag - 0xDC) & 1))
    return LIST if tag <= 0xDD else MAP


cdef int _step(Reader* r, int64_t size) except -1:
    if size > r.size - r.at:
        raise ValueError(f"payload: cut short at byte {r.at}: {size} more bytes needed, {r.size - r.at} there")
    r.at += <Py_ssize_t> size
    return 0


cdef int64_t _step_length(Reader* r, int width) except -1:
    cdef int64_t value = 0
    cdef int i
    _step(r, width)
    for i in range(width):
        value = (value << 8) | r.data[r.at - width + i]
    return value
