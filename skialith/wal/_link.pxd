"""One TCP connection as the wire uses it."""

from cython cimport final

cdef enum:
    SLICE_MS = 50  # a signal that comes just before a wait is seen after this

cdef struct Buffer:
    char* data
    Py_ssize_t start, end, capacity

@final
cdef class Link:
    cdef readonly long long epoch
    cdef readonly bint broken
    """Nothing more is sent or received."""
    cdef readonly double last_received
    """When the last byte came, on the clock of ``time.monotonic()``; when the connection was made, before the first."""
    cdef bint reading
    """Somebody waits for bytes, or handles them: nobody else may."""
    cdef bint blocked
    """The socket takes no more for now; the loop goes on when it does."""
    cdef Buffer received
    cdef Py_ssize_t wanted
    """Size of the frame that ``received`` begins with, once it is known; else 0."""
    cdef Buffer _queued, _going
    cdef int _fd, _poll
    cdef unsigned int _armed
    cdef bint _sending
    cdef object _pass_on

    cdef char* room(self, Py_ssize_t size) except NULL
    cdef int flush(self) except -1
    cdef bint may_wait(self) noexcept
    cdef int listen(self, bint on) except -1
    cdef Py_ssize_t receive(self, int patience_ms) except -1
    cdef int take_in(self, const char* data, Py_ssize_t size) except -1
    cdef void fail(self) noexcept
    cdef int _send(self) except -1
    cdef int _have_taken_out(self) except -1
    cdef int _arm(self) except -1
    cdef int _block(self, bint on) except -1

cpdef bint tell(object function, tuple arguments) except -1
cdef char* extend(Buffer* buffer, Py_ssize_t size) except NULL
cdef double monotonic() noexcept nogil
