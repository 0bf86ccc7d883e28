"""Who waits for what on the wire, as the wire uses it."""

from cython cimport final
from libc.stdint cimport uint8_t, uint64_t

cdef extern from "pythread.h" nogil:
    ctypedef void* PyThread_type_lock
    enum PyLockStatus:
        PY_LOCK_FAILURE
        PY_LOCK_ACQUIRED
        PY_LOCK_INTR
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock lock)
    int PyThread_acquire_lock(PyThread_type_lock lock, int wait)
    PyLockStatus PyThread_acquire_lock_timed(PyThread_type_lock lock, long long microseconds, int interruptible)
    void PyThread_release_lock(PyThread_type_lock lock)

cdef enum:
    WAITING = 0
    ACKED
    REFUSED
    LOST

@final
cdef class Reply:
    cdef readonly bytes data
    cdef bytes _head

cdef struct Run:
    uint64_t first
    uint64_t last
    uint64_t count

@final
cdef class Tally:
    cdef readonly uint64_t last_seq
    cdef public long long appended_bytes
    cdef uint64_t _before
    cdef Run* _runs
    cdef Py_ssize_t _used
    cdef void _coarsen(self) noexcept

@final
cdef class Turn:
    cdef readonly bint taken, retired
    cdef readonly Py_ssize_t waiting
    cdef public bint suspect
    cdef bytes _fence
    cdef long long _epoch
    cdef object _queue  # None until somebody queues up: most agents of a process never see that

@final
cdef class Waiter:
    cdef int state
    cdef uint64_t seq
    cdef bint duplicate
    cdef bint asks  # wants the reply itself, whatever it says
    cdef Reply reply
    cdef PyThread_type_lock lock  # made and held by the thread when it comes to sleep
    cdef void settle(self, int state) noexcept

@final
cdef class Window:
    cdef readonly bint lost, sent
    cdef uint64_t _first
    cdef Py_ssize_t _count, _open
    cdef uint64_t* _seqs
    cdef uint8_t* _states
    cdef bint* _duplicates
    cdef dict _refusals
    cdef object _callback

@final
cdef class Pull:
    cdef Deliveries deliveries
    cdef Py_ssize_t left
    cdef uint64_t token

@final
cdef class Deliveries:
    cdef readonly object arrived
    cdef readonly Py_ssize_t expected, size
    cdef public Py_ssize_t enough_rows, enough_bytes
    cdef object _messages, _pulls, _status
    cdef bint _calling  # the loop has been asked to set ``arrived``
    cdef int _end(self) except -1
