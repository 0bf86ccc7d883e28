"""Lines of the NATS protocol as the wire uses them."""

from libc.stdint cimport uint64_t

from ._link cimport Link

cdef struct Line:
    const char* subject
    const char* reply
    Py_ssize_t subject_size, reply_size, head, total

cdef bint read_line(const char* p, Py_ssize_t size, bint headers, Line* line) noexcept nogil
cdef bint refuses(Line* line, const char* body) noexcept nogil
cdef char* put_head(Link link, bytes inbox, uint64_t token, str subject, key, bytes fence, Py_ssize_t size) except NULL
cdef Py_ssize_t put_number(char* p, uint64_t value) noexcept nogil
