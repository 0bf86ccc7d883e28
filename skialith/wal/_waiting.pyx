# cython: language_level=3, boundscheck=False, wraparound=False, autotestdict=False, auto_pickle=False
"""Who waits for what on the wire: one thread for one PubAck, a window for many, a consumer's pulls, and whose turn it is.

Signatures and contracts stand in ``_waiting.pyi``. The GIL is the lock, as in ``_link.pyx``.
"""

from cython cimport final
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from collections import deque
from threading import Event


@final
cdef class Reply:
    @property
    def headers(self):
        if self._head is None:
            return None
        lines = self._head.decode("utf-8", "replace").split("\r\n")
        headers = {}
        words = lines[0].split(" ", 2)
        if len(words) > 1:
            headers["Status"] = words[1]
        if len(words) > 2:
            headers["Description"] = words[2]
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if colon:
                headers[name] = value.strip()
        return headers


cdef enum:
    MOST_RUNS = 4096


@final
cdef class Tally:
    def __cinit__(self):
        self._runs = <Run*> calloc(MOST_RUNS, sizeof(Run))
        if self._runs == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self._runs)

    def note(self, uint64_t seq, long long size):
        cdef Run* run
        self.last_seq = max(self.last_seq, seq)
        self.appended_bytes += size
        if self._used:
            run = &self._runs[self._used - 1]
            if seq == run.last + 1:
                run.last = seq
                run.count += 1
                return
            if run.first <= seq <= run.last:  # a duplicate's
                return
            if self._used == MOST_RUNS:
                self._coarsen()
        run = &self._runs[self._used]
        run.first = run.last = seq
        run.count = 1
        self._used += 1

    cdef void _coarsen(self) noexcept:
        """Of two runs make one, in the older half; what is between them is not known to be anybody's."""
        cdef Py_ssize_t i, kept = 0
        cdef Run merged
        for i in range(self._used):
            if i < MOST_RUNS // 2 and i % 2:
                continue
            merged = self._runs[i]
            if i < MOST_RUNS // 2:
                merged.first = min(merged.first, self._runs[i + 1].first)
                merged.last = max(merged.last, self._runs[i + 1].last)
                merged.count += self._runs[i + 1].count
            self._runs[kept] = merged
            kept += 1
        self._used = kept

    def take(self):
        cdef Py_ssize_t i, used = self._used
        cdef list runs = [(self._runs[i].first, self._runs[i].last, self._runs[i].count) for i in range(used)]
        if self._used != used:  # making the list may have run a collector, and others meanwhile
            return self.take()
        self._used = 0
        self._before = self.last_seq
        return runs

    def set_back(self, uint64_t last):
        cdef Py_ssize_t i
        self.last_seq = min(self._before, last)
        for i in range(self._used):
            self.last_seq = max(self.last_seq, self._runs[i].last)


@final
cdef class Turn:
    def try_take(self):
        if self.taken:
            return False
        self.taken = True
        return True

    def retire(self):
        if self.taken or self.waiting:
            return False
        self.taken = self.retired = True
        return True

    def take_later(self, callback):
        if self._queue is None:  # first of all, since making it may run a collector, and others meanwhile
            self._queue = deque()
        if not self.taken:
            self.taken = True
            return True
        self._queue.append(callback)
        return False

    def withdraw(self, callback):
        if self._queue is None:
            return False
        try:
            self._queue.remove(callback)
        except ValueError:
            return False
        return True

    def give(self):
        if self._queue:
            self._queue.popleft()(None)
        else:
            self.taken = False

    def permit(self, bytes fence, long long epoch):
        self._fence = fence
        self._epoch = epoch


@final
cdef class Waiter:
    """One thread that waits for one PubAck, or for one reply."""


    def __dealloc__(self):
        if self.lock != NULL:
            PyThread_free_lock(self.lock)

    cdef void settle(self, int state) noexcept:
        self.state = state
        if self.lock != NULL:
            PyThread_release_lock(self.lock)


@final
cdef class Window:
    def __cinit__(self, uint64_t first, Py_ssize_t count, object callback):
        self._first = first
        self._count = self._open = count
        self._callback = callback
        self._refusals = {}
        self._seqs = <uint64_t*> calloc(count, sizeof(uint64_t))
        self._states = <uint8_t*> calloc(count, sizeof(uint8_t))
        self._duplicates = <bint*> calloc(count, sizeof(bint))
        if self._seqs == NULL or self._states == NULL or self._duplicates == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self._seqs)
        free(self._states)
        free(self._duplicates)

    def answers(self):
        cdef Py_ssize_t i
        cdef list found = []
        for i in range(self._count):
            if self._states[i] == ACKED:
                found.append((self._seqs[i], bool(self._duplicates[i])))
            else:
                found.append(self._refusals.get(i))
        return found


@final
cdef class Pull:
    """One pull request: how many messages it may still bring."""


@final
cdef class Deliveries:
    def __cinit__(self):
        self.arrived = Event()
        self._messages = deque()
        self._pulls = deque()

    def __len__(self):
        return len(self._messages)

    @property
    def pulls(self):
        return len(self._pulls)

    def take(self, Py_ssize_t rows, Py_ssize_t size, double not_before):
        cdef list taken = []
        cdef Py_ssize_t total = 0, length
        while self._messages and len(taken) < rows:
            came, message = self._messages[0]
            length = len(message[1])
            if came >= not_before:
                total += length
                if taken and total > size:
                    break
                taken.append(message)
            self._messages.popleft()
            self.size -= length
        return taken

    def release(self):
        held = [message for _, message in self._messages]
        self._messages.clear()
        self.size = 0
        return held

    def take_status(self):
        status, self._status = self._status, None
        return status

    cdef int _end(self) except -1:
        """The connection ended: what was delivered on it cannot be acknowledged any more."""
        self._messages.clear()
        self._pulls.clear()
        self.size = self.expected = 0
        return 0

    def _set_arrived(self, _):
        self._calling = False
        self.arrived.set()
