# cython: language_level=3, boundscheck=False, wraparound=False, autotestdict=False, auto_pickle=False
"""One result that a thread waits for, in C: whatever a signal's handler raises, no lock stays held."""

from cython cimport final

from ._link cimport SLICE_MS, monotonic
from ._waiting cimport (
    PY_LOCK_ACQUIRED,
    PyLockStatus,
    PyThread_acquire_lock,
    PyThread_acquire_lock_timed,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
    PyThread_type_lock,
)

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1


@final
cdef class Promise:
    cdef readonly bint done, given_up
    cdef object _result, _error
    cdef PyThread_type_lock _lock  # made and held by the thread when it comes to sleep

    def __dealloc__(self):
        if self._lock != NULL:
            PyThread_free_lock(self._lock)

    def set(self, result):
        if self.done:
            return False
        self._result = result
        self._settle()
        return True

    def fail(self, error not None):
        if self.done:
            return False
        self._error = error
        self._settle()
        return True

    def give_up(self):
        if self.done:
            return False
        self.given_up = True
        self._settle()
        return True

    cdef void _settle(self) noexcept:
        self.done = True
        if self._lock != NULL:
            PyThread_release_lock(self._lock)

    def wait(self, double seconds):
        cdef double deadline = monotonic() + seconds, left
        cdef long long slice_us
        cdef PyLockStatus status
        if not self.done and self._lock == NULL:
            self._lock = PyThread_allocate_lock()
            if self._lock == NULL:
                raise MemoryError
            PyThread_acquire_lock(self._lock, 0)
        while not self.done:
            left = deadline - monotonic()
            if left <= 0:
                raise TimeoutError(f"not done within {seconds:.1f} s")
            slice_us = <long long> min(left * 1e6 + 1, SLICE_MS * 1e3)
            with nogil:
                status = PyThread_acquire_lock_timed(self._lock, slice_us, 1)
            if status != PY_LOCK_ACQUIRED:
                PyErr_CheckSignals()
        if self.given_up:
            raise RuntimeError("the promise was given up")
        if self._error is not None:
            raise self._error
        return self._result
