# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, autotestdict=False
"""The way into a database in C: records in key order, their rows, an INSERT's text, and a payload as JSON text.

Whatever takes long for a byte (escaping, JSON, sorting) runs without the GIL, so that a thread that saves an event need not
wait for the writer. Signatures and contracts stand in ``_rows.pyi``; ``stores/rows.py`` and ``trace_json.py`` say the same
in plain Python, and decide what is unusual.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.long cimport PyLong_AsLongLong, PyLong_AsUnsignedLongLong, PyLong_Check
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_SIZE
from cpython.unicode cimport PyUnicode_CheckExact, PyUnicode_DecodeASCII, PyUnicode_DecodeUTF8
from libc.math cimport isnormal
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, qsort, realloc, strtod
from libc.string cimport memcmp, memcpy
from libc.time cimport time_t, tm

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    long long PyLong_AsLongLongAndOverflow(object value, int* overflow) except? -1

cdef extern from "time.h" nogil:
    tm* gmtime_r(const time_t* seconds, tm* into)

cdef object _new = tuple.__new__


# ---- reading msgpack

cdef struct Reader:
    const uint8_t* data
    Py_ssize_t size
    Py_ssize_t at

cdef struct Span:
    const uint8_t* data
    Py_ssize_t size


cdef inline bint _there(const Reader* r, uint64_t count) noexcept nogil:
    return count <= <uint64_t> (r.size - r.at)


cdef inline bint _number(Reader* r, int width, uint64_t* value) noexcept nogil:
    if not _there(r, <uint64_t> width):
        return False
    value[0] = _big_endian(r.data + r.at, width)
    r.at += width
    return True


cdef inline uint64_t _big_endian(const uint8_t* p, int width) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(width):
        value = (value << 8) | p[i]
    return value


cdef bint _integer(Reader* r, int64_t* value) noexcept nogil:
    """An integer of 64 bits with a sign."""
    cdef uint8_t tag
    cdef uint64_t raw = 0
    if not _there(r, 1):
        return False
    tag = r.data[r.at]
    r.at += 1
    if tag <= 0x7F or tag >= 0xE0:
        value[0] = tag if tag <= 0x7F else <int64_t> tag - 256
        return True
    if not 0xCC <= tag <= 0xD3 or not _number(r, 1 << (tag & 3), &raw):
        return False
    value[0] = <int64_t> raw if tag <= 0xCF else _signed(raw, 1 << (tag & 3))
    return tag > 0xCF or raw <= <uint64_t> INT64_MAX


cdef inline int64_t _signed(uint64_t raw, int width) noexcept nogil:
    cdef int shift = 64 - 8 * width
    # Sign extension: up against the top bit, then an arithmetic shift back.
    return (<int64_t> (raw << shift)) >> shift


cdef bint _string(Reader* r, Span* span) noexcept nogil:
    cdef uint8_t tag
    cdef uint64_t size = 0
    if not _there(r, 1):
        return False
    tag = r.data[r.at]
    r.at += 1
    if tag >> 5 == 0x5:
        size = tag & 0x1F
    elif not 0xD9 <= tag <= 0xDB or not _number(r, 1 << (tag - 0xD9), &size):
        return False
    return _span(r, span, size)


cdef bint _binary(Reader* r, Span* span) noexcept nogil:
    cdef uint8_t tag
    cdef uint64_t size = 0
    if not _there(r, 1):
        return False
    tag = r.data[r.at]
    r.at += 1
    return 0xC4 <= tag <= 0xC6 and _number(r, 1 << (tag - 0xC4), &size) and _span(r, span, size)


cdef inline bint _span(Reader* r, Span* span, uint64_t size) noexcept nogil:
    if not _there(r, size):
        return False
    span.data = r.data + r.at
    span.size = <Py_ssize_t> size
    r.at += <Py_ssize_t> size
    return True


cdef inline bint _same(const Span* a, const Span* b) noexcept nogil:
    return a.size == b.size and memcmp(a.data, b.data, <size_t> a.size) == 0


# ---- records and their rows

cdef enum:
    RECORD_FIELDS = 12
    TRACE_FIELDS = 9


cdef tuple _fields(item, Py_ssize_t least):
    """``item`` with its fields, whatever subclass of tuple it is."""
    if not PyTuple_Check(item) or PyTuple_GET_SIZE(item) < least:
        raise TypeError(f"not a tuple of {least} fields: {type(item).__name__}")
    return <tuple> item


cdef struct Head:
    int64_t kind, step_index, created_us, codec
    Span agent_id, record_id, key, event_type, body


def records(type cls not None, str namespace not None, list messages not None, kinds not None):
    cdef list made = []
    cdef Reader r
    cdef Head head
    cdef Span known_agent, known_type
    cdef object agent_id = "", event_type = "", message
    cdef bytes data, agent_data = b"", type_data = b""
    known_agent.size = known_type.size = 0
    known_agent.data = known_type.data = <const uint8_t*> PyBytes_AS_STRING(agent_data)
    for message in messages:
        data = message.data
        r.data = <const uint8_t*> PyBytes_AS_STRING(data)
        r.size = PyBytes_GET_SIZE(data)
        r.at = 0
        if not _record_head(&r, &head):
            break
        try:
            # Records that follow each other are mostly of one agent: its id is made once.
            if not _same(&known_agent, &head.agent_id):
                agent_id = _str(&head.agent_id)
                known_agent, agent_data = head.agent_id, data
            if not _same(&known_type, &head.event_type):
                event_type = _str(&head.event_type)
                known_type, type_data = head.event_type, data
            record_id = _str(&head.record_id)
        except UnicodeDecodeError:
            break
        if head.kind not in kinds:
            made.append(None)
            continue
        made.append(
            _new(
                cls,
                (
                    head.kind, namespace, agent_id, record_id, _bytes(&head.key), head.step_index, event_type, head.created_us,
                    head.codec, _bytes(&head.body), message.position, None,
                ),
            )
        )
    return made


cdef inline str _str(const Span* span):
    return PyUnicode_DecodeUTF8(<const char*> span.data, span.size, NULL)


cdef inline bytes _bytes(const Span* span):
    return PyBytes_FromStringAndSize(<const char*> span.data, span.size)


cdef bint _record_head(Reader* r, Head* head) noexcept nogil:
    """The fields of a record with its body; False for anything else, which ``_fastpath.decode_record`` has to judge."""
    if not _there(r, 2) or r.data[0] != 0x9A or r.data[1] != 1:
        return False
    r.at = 2
    return (
        _integer(r, &head.kind)
        and _string(r, &head.agent_id)
        and _string(r, &head.record_id)
        and _binary(r, &head.key)
        and _integer(r, &head.step_index)
        and _string(r, &head.event_type)
        and _integer(r, &head.created_us)
        and _integer(r, &head.codec)
        and _binary(r, &head.body)
        and r.at == r.size
        and head.key.size == 16
        and 0 <= head.kind <= 255
        and 0 <= head.codec <= 255
    )


cdef struct Place:
    uint64_t high, low  # the key
    int64_t time_ns
    uint64_t seq
    Py_ssize_t index


def in_order(list items not None, Py_ssize_t key_at, Py_ssize_t position_at):
    cdef Py_ssize_t count = len(items), i
    cdef tuple item, position
    cdef bytes key
    if key_at < 0 or position_at < 0:
        raise ValueError("key_at and position_at must not be negative")
    cdef Place* places = <Place*> PyMem_Malloc(<size_t> (count + 1) * sizeof(Place))
    if places == NULL:
        raise MemoryError
    try:
        for i in range(count):
            item = _fields(items[i], max(key_at, position_at) + 1)
            key = item[key_at]
            position = _fields(item[position_at], 2)
            if key is None or PyBytes_GET_SIZE(key) != 16:
                raise ValueError("a key is not 16 bytes")
            places[i].high = _big_endian(<const uint8_t*> PyBytes_AS_STRING(key), 8)
            places[i].low = _big_endian(<const uint8_t*> PyBytes_AS_STRING(key) + 8, 8)
            places[i].time_ns = position[0]
            places[i].seq = position[1]
            places[i].index = i
        with nogil:
            qsort(places, <size_t> count, sizeof(Place), _compare)
        return [items[places[i].index] for i in range(count)]
    finally:
        PyMem_Free(places)


cdef int _compare(const void* left, const void* right) noexcept nogil:
    cdef const Place* a = <const Place*> left
    cdef const Place* b = <const Place*> right
    if a.high != b.high:
        return -1 if a.high < b.high else 1
    if a.low != b.low:
        return -1 if a.low < b.low else 1
    if a.time_ns != b.time_ns:
        return -1 if a.time_ns < b.time_ns else 1
    if a.seq != b.seq:
        return -1 if a.seq < b.seq else 1
    return -1 if a.index < b.index else 1 if a.index > b.index else 0


def of_records(list records not None, Py_ssize_t most_bytes, of_large not None):
    cdef list events = [], checkpoints = []
    cdef tuple record, position
    cdef object item, body
    for item in records:
        record = _fields(item, RECORD_FIELDS)
        body = record[9]
        if not PyBytes_CheckExact(body) or PyBytes_GET_SIZE(body) > most_bytes:
            row = of_large(item)
        else:
            position = _fields(record[10], 2)
            if record[0] == 1:
                row = (
                    record[4], record[1], record[2], record[3], record[5], record[6], record[7], position[0], position[1],
                    record[8], body, PyBytes_GET_SIZE(body), None,
                )
            else:
                row = (
                    record[4], record[1], record[2], record[5], record[7], position[0], position[1], record[8], body,
                    PyBytes_GET_SIZE(body), None,
                )
        (events if record[0] == 1 else checkpoints).append(row)
    return events, checkpoints


def having(list rows not None, Py_ssize_t column, str value not None):
    cdef list found = []
    cdef tuple row
    if column < 0:
        raise ValueError("column must not be negative")
    for item in rows:
        row = _fields(item, column + 1)
        if row[column] == value:
            found.append(item)
    return found


def of_traces(list traces not None):
    cdef list rows = []
    cdef tuple trace, position
    for item in traces:
        trace = _fields(item, TRACE_FIELDS)
        position = _fields(trace[8], 2)
        rows.append(
            (
                trace[0], trace[1], trace[2], trace[3], trace[4], trace[5], trace[6], _moment(trace[7]),
                _moment(position[0] // 1000), position[0], position[1],
            )
        )
    return rows


def traces(type cls not None, list records not None, list texts not None, Py_ssize_t most_characters):
    cdef list made = []
    cdef tuple record
    cdef str event_type
    cdef Py_ssize_t i
    if len(texts) != len(records):
        raise ValueError(f"{len(texts)} texts for {len(records)} records")
    for i in range(len(records)):
        record = _fields(records[i], RECORD_FIELDS)
        event_type = record[6]
        if len(event_type) > most_characters:
            event_type = event_type[:most_characters]
        made.append(
            _new(cls, (record[4], record[1], record[2], record[3], record[5], event_type, texts[i], record[7], record[10]))
        )
    return made


cdef enum:
    MOMENT_BYTES = 26

cdef int64_t FIRST_MOMENT = -30610224000000000  # 1000-01-01 00:00:00
cdef int64_t LAST_MOMENT = 253402300799999999  # 9999-12-31 23:59:59.999999


cdef str _moment(unix_us):
    """UTC as the databases write it; a time that they cannot hold becomes the nearest one that they can."""
    cdef int overflow = 0
    cdef int64_t us = PyLong_AsLongLongAndOverflow(unix_us, &overflow)
    if overflow != 0:
        us = INT64_MAX if overflow > 0 else INT64_MIN
    us = FIRST_MOMENT if us < FIRST_MOMENT else LAST_MOMENT if us > LAST_MOMENT else us
    cdef int64_t fraction = us % 1000000
    if fraction < 0:
        fraction += 1000000
    cdef time_t seconds = <time_t> ((us - fraction) // 1000000)
    cdef tm t
    gmtime_r(&seconds, &t)
    cdef char[MOMENT_BYTES] out
    _decimals(out, t.tm_year + 1900, 4, c"-")
    _decimals(out + 5, t.tm_mon + 1, 2, c"-")
    _decimals(out + 8, t.tm_mday, 2, c" ")
    _decimals(out + 11, t.tm_hour, 2, c":")
    _decimals(out + 14, t.tm_min, 2, c":")
    _decimals(out + 17, t.tm_sec, 2, c".")
    _decimals(out + 20, <int> fraction, 6, 0)
    return PyUnicode_DecodeASCII(out, MOMENT_BYTES, NULL)


cdef void _decimals(char* out, int value, int width, char behind) noexcept nogil:
    """``value`` in ``width`` digits, and ``behind`` after them unless it is 0."""
    cdef int i
    for i in range(width):
        out[width - 1 - i] = <char> (c"0" + value % 10)
        value //= 10
    if behind != 0:
        out[width] = behind


# ---- the text of an INSERT


cdef enum Kind:
    NOTHING
    NEGATIVE
    NATURAL
    TEXT
    BINARY

cdef struct Value:
    Kind kind
    const uint8_t* data
    Py_ssize_t size
    uint64_t number
    Py_ssize_t literal  # bytes of it in the statement


# What stands behind a backslash instead of the byte, 0 where a byte stands for itself: as mysql_real_escape_string does
# in a session without NO_BACKSLASH_ESCAPES. No byte of a longer UTF-8 sequence is among them.
cdef uint8_t[256] ESCAPED
for _byte in range(256):
    ESCAPED[_byte] = 0
for _byte, _stands in ((0, b"0"), (10, b"n"), (13, b"r"), (26, b"Z"), (34, b'"'), (39, b"'"), (92, b"\\")):
    ESCAPED[_byte] = <uint8_t> ord(_stands)


def insert(
    bytes head not None,
    bytes tail not None,
    list rows not None,
    Py_ssize_t start,
    Py_ssize_t most_rows,
    Py_ssize_t most_bytes,
    tuple repeated not None,
    Py_ssize_t most_characters,
):
    if not 0 <= start < len(rows) or most_rows < 1:
        raise ValueError(f"no rows to insert from {start} of {len(rows)}, at most {most_rows}")
    for repeat in repeated:
        if not 0 <= repeat < len(rows[start]):
            raise ValueError(f"no column {repeat} that could be repeated")
    cdef list chunk = rows[start : start + most_rows]  # keeps every value alive while the GIL is free
    cdef Py_ssize_t width = len(chunk[0]), columns = width + len(repeated), count = len(chunk)
    cdef Py_ssize_t size = 0, taken = 0, i, column
    cdef tuple row
    cdef bytes statement
    cdef char* out
    cdef Value before, behind
    _collect(head, &before)
    _collect(tail, &behind)
    cdef Value* values = <Value*> PyMem_Malloc(<size_t> (count * columns + 1) * sizeof(Value))
    if values == NULL:
        raise MemoryError
    try:
        for i in range(count):
            row = _fields(chunk[i], width)
            if len(row) != width:
                raise ValueError(f"row {start + i} has {len(row)} columns, the first one has {width}")
            for column in range(width):
                _collect(row[column], &values[i * columns + column])
            for column in range(width, columns):
                _collect(row[repeated[column - width]], &values[i * columns + column])
        with nogil:
            for i in range(count):
                for column in range(width, columns):
                    _cut(&values[i * columns + column], most_characters)
            size = before.size + behind.size
            taken = _measure(values, columns, count, most_bytes, &size)
        statement = PyBytes_FromStringAndSize(NULL, size)
        out = PyBytes_AS_STRING(statement)
        with nogil:
            _write(out, &before, &behind, values, columns, taken)
        return statement, start + taken
    finally:
        PyMem_Free(values)


cdef int _collect(value, Value* into) except -1:
    """Where the value's bytes are; ``value`` must live as long as ``into`` is used."""
    cdef long long number
    into.data = NULL
    into.size = 0
    into.number = 0
    if PyBytes_CheckExact(value):
        into.kind = Kind.BINARY
        into.data = <const uint8_t*> PyBytes_AS_STRING(value)
        into.size = PyBytes_GET_SIZE(value)
    elif PyUnicode_CheckExact(value):
        into.kind = Kind.TEXT
        into.data = <const uint8_t*> PyUnicode_AsUTF8AndSize(value, &into.size)
    elif value is None:
        into.kind = Kind.NOTHING
    elif PyLong_Check(value):
        if value >= 0:
            into.kind = Kind.NATURAL
            into.number = PyLong_AsUnsignedLongLong(value)
        else:
            number = PyLong_AsLongLong(value)
            into.kind = Kind.NEGATIVE
            into.number = 0 - <uint64_t> number
    else:
        raise TypeError(f"a column takes bytes, str, int or None, not {type(value).__name__}")
    return 0


cdef void _cut(Value* value, Py_ssize_t most_characters) noexcept nogil:
    """At most so many characters of a text."""
    cdef Py_ssize_t at = 0, seen = 0
    if value.kind != Kind.TEXT or value.size <= most_characters:
        return
    while at < value.size:
        if value.data[at] & 0xC0 != 0x80:
            if seen == most_characters:
                break
            seen += 1
        at += 1
    value.size = at


cdef Py_ssize_t _measure(Value* values, Py_ssize_t columns, Py_ssize_t count, Py_ssize_t most, Py_ssize_t* size) noexcept nogil:
    """How many rows fit into ``most`` bytes, at least one; ``size`` grows by what they take."""
    cdef Py_ssize_t row, column, literals
    cdef Value* value
    for row in range(count):
        literals = 2 * columns + (2 if row > 0 else 0)  # ", " between columns, "(" and ")", ", " between rows
        for column in range(columns):
            value = &values[row * columns + column]
            value.literal = _literal_size(value)
            literals += value.literal
        if row > 0 and size[0] + literals > most:
            return row
        size[0] += literals
    return count


cdef Py_ssize_t _literal_size(const Value* value) noexcept nogil:
    cdef Py_ssize_t i, size
    if value.kind == Kind.NOTHING:
        return 4
    if value.kind == Kind.NATURAL:
        return _digits(value.number)
    if value.kind == Kind.NEGATIVE:
        return 1 + _digits(value.number)
    size = value.size + (2 if value.kind == Kind.TEXT else 9)
    for i in range(value.size):
        size += ESCAPED[value.data[i]] != 0
    return size


cdef inline int _digits(uint64_t number) noexcept nogil:
    cdef int digits = 1
    while number >= 10:
        number //= 10
        digits += 1
    return digits


cdef void _write(
    char* out, const Value* head, const Value* tail, const Value* values, Py_ssize_t columns, Py_ssize_t count
) noexcept nogil:
    cdef char* p = _put(out, <const char*> head.data, head.size)
    cdef Py_ssize_t row, column
    for row in range(count):
        p = _put(p, ", (", 3) if row > 0 else _put(p, "(", 1)
        for column in range(columns):
            if column > 0:
                p = _put(p, ", ", 2)
            p = _put_literal(p, &values[row * columns + column])
        p = _put(p, ")", 1)
    _put(p, <const char*> tail.data, tail.size)


cdef inline char* _put(char* p, const char* source, Py_ssize_t size) noexcept nogil:
    memcpy(p, source, <size_t> size)
    return p + size


cdef char* _put_literal(char* p, const Value* value) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint8_t byte, stands
    if value.kind == Kind.NOTHING:
        return _put(p, "NULL", 4)
    if value.kind == Kind.NATURAL or value.kind == Kind.NEGATIVE:
        return _put_number(p, value.number, value.kind == Kind.NEGATIVE)
    p = _put(p, "'", 1) if value.kind == Kind.TEXT else _put(p, "_binary'", 8)
    if value.literal == value.size + (2 if value.kind == Kind.TEXT else 9):
        p = _put(p, <const char*> value.data, value.size)
    else:
        for i in range(value.size):
            byte = value.data[i]
            stands = ESCAPED[byte]
            if stands != 0:
                p[0] = c"\\"
                p[1] = <char> stands
                p += 2
            else:
                p[0] = <char> byte
                p += 1
    return _put(p, "'", 1)


cdef char* _put_number(char* p, uint64_t number, bint negative) noexcept nogil:
    cdef int digits = _digits(number), i
    if negative:
        p[0] = c"-"
        p += 1
    for i in range(digits):
        p[digits - 1 - i] = <char> (c"0" + number % 10)
        number //= 10
    return p + digits


# ---- msgpack to JSON text


cdef enum:
    MOST_KEYS = 64  # of one map; larger ones are left to Python, as each key is compared with all others
    MOST_LEVELS = 64

cdef struct Text:
    char* data
    Py_ssize_t size
    Py_ssize_t room
    Py_ssize_t most


def json_texts(list bodies not None, int depth, Py_ssize_t most_bytes):
    if not 0 <= depth <= MOST_LEVELS or most_bytes < 0:
        raise ValueError(f"depth is {depth}, not 0 to {MOST_LEVELS}, or most_bytes is {most_bytes}")
    cdef Py_ssize_t count = len(bodies), i, start = 0
    cdef list kept = list(bodies)  # keeps every body alive while the GIL is free
    cdef list texts = []
    cdef Text out
    cdef Reader* readers = <Reader*> PyMem_Malloc(<size_t> (count + 1) * sizeof(Reader))
    if readers == NULL:
        raise MemoryError
    out.data = NULL
    out.size = 0
    out.room = 0
    try:
        for i in range(count):
            readers[i].data = <const uint8_t*> PyBytes_AS_STRING(<bytes?> kept[i])
            readers[i].size = PyBytes_GET_SIZE(<bytes?> kept[i])
        with nogil:
            for i in range(count):
                start = out.size
                out.most = start + most_bytes
                readers[i].at = 0
                if not _value(&readers[i], &out, depth) or readers[i].at != readers[i].size:
                    out.size = start
                readers[i].at = out.size  # where its text ends; an empty text is none
        start = 0
        for i in range(count):
            texts.append(PyUnicode_DecodeUTF8(out.data + start, readers[i].at - start, NULL) if readers[i].at > start else None)
            start = readers[i].at
        return texts
    finally:
        free(out.data)
        PyMem_Free(readers)


cdef bint _grow(Text* out, Py_ssize_t more) noexcept nogil:
    """Make room for ``more`` bytes; False if the text gets too large or there is no memory."""
    cdef Py_ssize_t room
    cdef char* data
    if more > out.most - out.size:
        return False
    if out.size + more > out.room:
        room = 2 * (out.size + more) + 4096
        data = <char*> realloc(out.data, <size_t> room)
        if data == NULL:
            return False
        out.data = data
        out.room = room
    return True


cdef bint _add(Text* out, const char* text, Py_ssize_t size) noexcept nogil:
    if not _grow(out, size):
        return False
    memcpy(out.data + out.size, text, <size_t> size)
    out.size += size
    return True


cdef bint _value(Reader* r, Text* out, int levels) noexcept nogil:
    """Write the next value; False if it is malformed or anything that the Python form of this has to decide."""
    cdef uint8_t tag
    cdef uint64_t number = 0
    cdef int width
    if not _there(r, 1):
        return False
    tag = r.data[r.at]
    r.at += 1
    if tag <= 0x7F:
        return _add_number(out, tag, False)
    if tag >= 0xE0:
        return _add_number(out, 256 - <uint64_t> tag, True)
    if tag <= 0x8F:
        return _map(r, out, tag & 0x0F, levels)
    if tag <= 0x9F:
        return _list(r, out, tag & 0x0F, levels)
    if tag <= 0xBF:
        return _text(r, out, tag & 0x1F)
    if tag == 0xC0:
        return _add(out, "null", 4)
    if tag == 0xC2:
        return _add(out, "false", 5)
    if tag == 0xC3:
        return _add(out, "true", 4)
    if 0xC4 <= tag <= 0xC6:
        return _number(r, 1 << (tag - 0xC4), &number) and _base64(r, out, number)
    if tag == 0xCA or tag == 0xCB:
        return _float(r, out, 4 if tag == 0xCA else 8)
    if 0xCC <= tag <= 0xCF:
        return _number(r, 1 << (tag - 0xCC), &number) and _add_number(out, number, False)
    if 0xD0 <= tag <= 0xD3:
        width = 1 << (tag - 0xD0)
        return _number(r, width, &number) and _add_signed(out, number, width)
    if 0xD9 <= tag <= 0xDB:
        return _number(r, 1 << (tag - 0xD9), &number) and _text(r, out, number)
    if tag == 0xDC or tag == 0xDD:
        return _number(r, 2 << (tag - 0xDC), &number) and _list(r, out, number, levels)
    if tag == 0xDE or tag == 0xDF:
        return _number(r, 2 << (tag - 0xDE), &number) and _map(r, out, number, levels)
    return False


cdef bint _list(Reader* r, Text* out, uint64_t count, int levels) noexcept nogil:
    cdef uint64_t i
    if levels <= 1 or not _add(out, "[", 1):
        return False
    for i in range(count):
        if (i > 0 and not _add(out, ",", 1)) or not _value(r, out, levels - 1):
            return False
    return _add(out, "]", 1)


cdef bint _map(Reader* r, Text* out, uint64_t count, int levels) noexcept nogil:
    cdef Span[MOST_KEYS] names
    cdef uint64_t i, j
    cdef Span* name
    if levels <= 1 or count > MOST_KEYS or not _add(out, "{", 1):
        return False
    for i in range(count):
        if i > 0 and not _add(out, ",", 1):
            return False
        name = &names[i]
        if not _string(r, name):
            return False
        for j in range(i):
            if _same(&names[j], name):
                return False
        if not _add_text(out, name.data, name.size) or not _add(out, ":", 1) or not _value(r, out, levels - 1):
            return False
    return _add(out, "}", 1)


cdef bint _text(Reader* r, Text* out, uint64_t size) noexcept nogil:
    if not _there(r, size):
        return False
    r.at += <Py_ssize_t> size
    return _add_text(out, r.data + r.at - size, <Py_ssize_t> size)


cdef bint _add_text(Text* out, const uint8_t* text, Py_ssize_t size) noexcept nogil:
    """``text`` in quotes; False if it is not UTF-8."""
    cdef Py_ssize_t i = 0, more = 2
    cdef int length
    while i < size:
        if text[i] < 0x80:
            more += _json_size(text[i])
            i += 1
        else:
            length = _sequence(text + i, size - i)
            if length == 0:
                return False
            more += length
            i += length
    if not _grow(out, more):
        return False
    cdef char* p = out.data + out.size
    p[0] = c'"'
    if more == size + 2:
        memcpy(p + 1, text, <size_t> size)
    else:
        _escape(p + 1, text, size)
    p[more - 1] = c'"'
    out.size += more
    return True


cdef inline int _json_size(uint8_t byte) noexcept nogil:
    if byte >= 0x20:
        return 2 if byte == c'"' or byte == c"\\" else 1
    return 2 if byte == 8 or byte == 9 or byte == 10 or byte == 12 or byte == 13 else 6


cdef const char* HEX = b"0123456789abcdef"


cdef void _escape(char* p, const uint8_t* text, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint8_t byte
    cdef int length
    for i in range(size):
        byte = text[i]
        length = 1 if byte >= 0x80 else _json_size(byte)
        if length == 1:
            p[0] = <char> byte
        else:
            p[0] = c"\\"
            if length == 6:
                memcpy(p + 1, "u00", 3)
                p[4] = HEX[byte >> 4]
                p[5] = HEX[byte & 15]
            else:
                p[1] = (
                    c"b" if byte == 8 else c"t" if byte == 9 else c"n" if byte == 10 else c"f" if byte == 12
                    else c"r" if byte == 13 else <char> byte
                )
        p += length


cdef int _sequence(const uint8_t* p, Py_ssize_t left) noexcept nogil:
    """Length of the UTF-8 sequence of a character beyond ASCII at ``p``, 0 if there is none."""
    cdef uint8_t lead = p[0]
    cdef uint8_t least = 0x80, most = 0xBF
    cdef int length, i
    if 0xC2 <= lead <= 0xDF:
        length = 2
    elif 0xE0 <= lead <= 0xEF:
        length = 3
        if lead == 0xE0:
            least = 0xA0  # not a longer form of a shorter sequence
        elif lead == 0xED:
            most = 0x9F  # not a surrogate
    elif 0xF0 <= lead <= 0xF4:
        length = 4
        if lead == 0xF0:
            least = 0x90
        elif lead == 0xF4:
            most = 0x8F  # not beyond U+10FFFF
    else:
        return 0
    if left < length or not least <= p[1] <= most:
        return 0
    for i in range(2, length):
        if p[i] & 0xC0 != 0x80:
            return 0
    return length


cdef bint _add_number(Text* out, uint64_t number, bint negative) noexcept nogil:
    cdef Py_ssize_t size = _digits(number) + (1 if negative else 0)
    if not _grow(out, size):
        return False
    _put_number(out.data + out.size, number, negative)
    out.size += size
    return True


cdef bint _add_signed(Text* out, uint64_t raw, int width) noexcept nogil:
    cdef int64_t value = _signed(raw, width)
    return _add_number(out, 0 - <uint64_t> value if value < 0 else <uint64_t> value, value < 0)


cdef const char* BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


cdef bint _base64(Reader* r, Text* out, uint64_t size) noexcept nogil:
    if not _there(r, size) or not _add(out, '{"skialith_base64":"', 20):
        return False
    cdef const uint8_t* data = r.data + r.at
    cdef Py_ssize_t i = 0, left
    cdef uint32_t three
    cdef char* p
    if not _grow(out, (<Py_ssize_t> size + 2) // 3 * 4):
        return False
    p = out.data + out.size
    while i < <Py_ssize_t> size:
        left = <Py_ssize_t> size - i
        three = <uint32_t> data[i] << 16
        if left > 1:
            three |= <uint32_t> data[i + 1] << 8
        if left > 2:
            three |= data[i + 2]
        p[0] = BASE64[three >> 18]
        p[1] = BASE64[(three >> 12) & 63]
        p[2] = BASE64[(three >> 6) & 63] if left > 1 else c"="
        p[3] = BASE64[three & 63] if left > 2 else c"="
        p += 4
        i += 3
    out.size = p - out.data
    r.at += <Py_ssize_t> size
    return _add(out, '"}', 2)


cdef uint64_t FRACTION = 0xFFFFFFFFFFFFF  # the bits of a double's fraction


cdef bint _float(Reader* r, Text* out, int width) noexcept nogil:
    """As ``repr`` writes it: the fewest digits that give the number back, and of those the nearest."""
    cdef uint64_t raw = 0
    cdef uint32_t single
    cdef float narrow
    cdef double number
    if not _number(r, width, &raw):
        return False
    if width == 4:
        single = <uint32_t> raw
        memcpy(&narrow, &single, 4)
        number = narrow
        memcpy(&raw, &number, 8)
    else:
        memcpy(&number, &raw, 8)
    return _add_float(out, number, raw)


cdef bint _add_float(Text* out, double number, uint64_t bits) noexcept nogil:
    cdef char[40] scientific
    cdef int digits, length, exponent, kept, i
    cdef char* p
    if not isnormal(number) and number != 0:
        return False
    for digits in range(15, 18):
        length = snprintf(scientific, 40, "%+.*e", digits - 1, number)
        if strtod(scientific, NULL) == number:
            break
    else:
        return False
    # At a power of two the next number down is nearer than the next one up, and more than 15 digits may not be the fewest.
    if digits > 15 and bits & FRACTION == 0:
        return False
    # Sign, one digit, point, the others, "e", sign, two or three digits: unless a locale writes it in another way.
    if length < digits + 6 or scientific[2] != c"." or scientific[digits + 2] != c"e":
        return False
    exponent = 0
    for i in range(digits + 4, length):
        exponent = 10 * exponent + (scientific[i] - c"0")
    if scientific[digits + 3] == c"-":
        exponent = -exponent
    scientific[2] = scientific[1]  # the digits stand together now, behind the point's place
    p = scientific + 2
    kept = digits
    while kept > 1 and p[kept - 1] == c"0":
        kept -= 1
    if scientific[0] == c"-" and not _add(out, "-", 1):
        return False
    if -4 <= exponent < 16:
        return _add_fixed(out, p, kept, exponent)
    return _add_scientific(out, p, kept, exponent)


cdef bint _add_fixed(Text* out, const char* digits, int kept, int exponent) noexcept nogil:
    cdef int whole = exponent + 1, i
    if whole <= 0:
        return _add(out, "0.000", 2 - whole) and _add(out, digits, kept)
    if kept > whole:
        return _add(out, digits, whole) and _add(out, ".", 1) and _add(out, digits + whole, kept - whole)
    if not _add(out, digits, kept):
        return False
    for i in range(whole - kept):
        if not _add(out, "0", 1):
            return False
    return _add(out, ".0", 2)


cdef bint _add_scientific(Text* out, const char* digits, int kept, int exponent) noexcept nogil:
    cdef uint64_t size = <uint64_t> (-exponent if exponent < 0 else exponent)
    if not _add(out, digits, 1):
        return False
    if kept > 1 and not (_add(out, ".", 1) and _add(out, digits + 1, kept - 1)):
        return False
    if not _add(out, "e-" if exponent < 0 else "e+", 2) or (size < 10 and not _add(out, "0", 1)):
        return False
    return _add_number(out, size, False)
