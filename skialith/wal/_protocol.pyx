# cython: language_level=3, boundscheck=False, wraparound=False, autotestdict=False, auto_pickle=False
"""Lines of the NATS protocol in C: what a server sends, and the head of a record's message.

The protocol is https://docs.nats.io/reference/reference-protocols/nats-protocol.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_AsStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from .._fastpath cimport CONTROL_LINE_LIMIT, KEY_BYTES, PyUnicode_AsUTF8AndSize, read_digits
from ._link cimport Link

cdef extern from "<string.h>" nogil:
    void* memmem(const void* haystack, size_t size, const void* needle, size_t needle_size)

cdef const char* HEX = b"0123456789abcdef"


# ---- in


cdef bint read_line(const char* p, Py_ssize_t size, bint headers, Line* line) noexcept nogil:
    """The words of a MSG or HMSG line behind its verb, CRLF left out; False if it is not one."""
    cdef const char* end = p + size
    cdef const char* words[6]
    cdef Py_ssize_t sizes[6]
    cdef uint64_t number = 0, head = 0
    cdef int count = 0, last
    while p < end:
        if p[0] == c" " or p[0] == c"\t":
            p += 1
            continue
        if count == 6:
            return False
        words[count] = p
        while p < end and p[0] != c" " and p[0] != c"\t":
            p += 1
        sizes[count] = p - words[count]
        count += 1
    # subject, sid, maybe reply, then one size or (with headers) two
    last = count - 1
    if count < (4 if headers else 3) or count > (5 if headers else 4):
        return False
    p = words[last]
    if not read_digits(&p, words[last] + sizes[last], &number) or p != words[last] + sizes[last] or number > (<uint64_t> 1 << 40):
        return False
    line.head = 0
    if headers:
        last -= 1
        p = words[last]
        if not read_digits(&p, words[last] + sizes[last], &head) or p != words[last] + sizes[last] or head > number:
            return False
        line.head = <Py_ssize_t> head
    line.total = <Py_ssize_t> number
    line.subject = words[0]
    line.subject_size = sizes[0]
    line.reply = words[2] if last == 3 else NULL
    line.reply_size = sizes[2] if last == 3 else 0
    return True


cdef bint refuses(Line* line, const char* body) noexcept nogil:
    """Whether an answer says that nothing was written: an error, or that nobody listens."""
    cdef Py_ssize_t size = line.total - line.head
    return size == 0 or memmem(body + line.head, <size_t> size, b'"error"', 7) != NULL


# ---- out


cdef char* put_head(Link link, bytes inbox, uint64_t token, str subject, key, bytes fence, Py_ssize_t size) except NULL:
    """Queue all of a message's frame but its data and the CRLF behind; returns where they go."""
    cdef Py_ssize_t subject_size, key_size, i
    cdef char* key_bytes
    cdef const char* text = PyUnicode_AsUTF8AndSize(subject, &subject_size)
    cdef Py_ssize_t headers = 10 + 13 + 2 * KEY_BYTES + 2 + PyBytes_GET_SIZE(fence) + 2
    cdef char numbers[64]
    cdef Py_ssize_t inbox_size = PyBytes_GET_SIZE(inbox)
    cdef Py_ssize_t digits = 0, line
    cdef char* p
    PyBytes_AsStringAndSize(key, &key_bytes, &key_size)
    if key_size != KEY_BYTES:
        raise ValueError(f"key has {key_size} bytes, not {KEY_BYTES}")
    digits = put_number(numbers, token)
    numbers[digits] = c" "
    digits += 1
    digits += put_number(numbers + digits, <uint64_t> headers)
    numbers[digits] = c" "
    digits += 1
    digits += put_number(numbers + digits, <uint64_t> (headers + size))
    line = 5 + subject_size + 1 + inbox_size + digits + 2
    if line > CONTROL_LINE_LIMIT:
        raise ValueError(f"control line has {line} bytes; the server takes {CONTROL_LINE_LIMIT}")
    p = link.room(line + headers + size + 2)
    memcpy(p, b"HPUB ", 5)
    p += 5
    memcpy(p, text, <size_t> subject_size)
    p[subject_size] = c" "
    p += subject_size + 1
    memcpy(p, PyBytes_AS_STRING(inbox), <size_t> inbox_size)
    p += inbox_size
    memcpy(p, numbers, <size_t> digits)
    p += digits
    memcpy(p, b"\r\nNATS/1.0\r\nNats-Msg-Id: ", 25)
    p += 25
    for i in range(KEY_BYTES):
        p[0] = HEX[<uint8_t> key_bytes[i] >> 4]
        p[1] = HEX[<uint8_t> key_bytes[i] & 15]
        p += 2
    memcpy(p, b"\r\n", 2)
    p += 2
    memcpy(p, PyBytes_AS_STRING(fence), <size_t> PyBytes_GET_SIZE(fence))
    p += PyBytes_GET_SIZE(fence)
    memcpy(p, b"\r\n", 2)
    return p + 2


cdef Py_ssize_t put_number(char* p, uint64_t value) noexcept nogil:
    """A decimal number; returns its length, at most 20."""
    cdef char digits[20]
    cdef Py_ssize_t count = 0, i
    while True:
        digits[count] = <char> (c"0" + value % 10)
        count += 1
        value //= 10
        if value == 0:
            break
    for i in range(count):
        p[i] = digits[count - 1 - i]
    return count
