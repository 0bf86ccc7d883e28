# cython: language_level=3, boundscheck=False, wraparound=False, autotestdict=False, auto_pickle=False
"""One TCP connection in C: frames go out whole from any thread, bytes come in for whoever waits.

The GIL is the lock of everything here. It is let go of only around a system call that may take long, and then a flag
(``_sending``, ``reading``) keeps others out of what the call uses: they queue their frames behind it and go on, and
whoever is sending takes them along. Nothing between queueing a frame and handing it to the socket looks for signals, so
no exception can tear one.
"""

from cython cimport final
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec, timeval
from posix.unistd cimport close

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef extern from "<sys/socket.h>" nogil:
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL
    enum: SHUT_RDWR
    ssize_t send(int fd, const void* data, size_t size, int flags)
    ssize_t recv(int fd, void* data, size_t size, int flags)
    int shutdown(int fd, int how)
    enum: SOL_SOCKET
    enum: SO_RCVTIMEO
    int setsockopt(int fd, int level, int option, const void* value, unsigned int size)

cdef extern from "<sys/epoll.h>" nogil:
    enum: EPOLLIN
    enum: EPOLLOUT
    enum: EPOLL_CTL_ADD
    enum: EPOLL_CTL_MOD
    enum: EPOLL_CLOEXEC
    ctypedef union epoll_data:
        int fd
    struct epoll_event:
        uint32_t events
        epoll_data data
    int epoll_create1(int flags)
    int epoll_ctl(int poll, int operation, int fd, epoll_event* event)

cdef extern from "<poll.h>" nogil:
    enum: POLLIN
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int milliseconds)

cdef enum:
    READ_BYTES = 64 * 1024  # one read, so that what it holds is handled in a tenth of a millisecond
    KEPT_BYTES = 1024 * 1024  # a buffer that grew beyond this is given back when it is empty
    MOST_BYTES = 256 * 1024  # the same for a frame that is larger than a read
    QUICK_BYTES = 16 * 1024  # what is sent without letting go of the GIL: getting it back may take longer than sending


cdef double monotonic() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <double> now.tv_sec + 1e-9 * <double> now.tv_nsec


cdef char* extend(Buffer* buffer, Py_ssize_t size) except NULL:
    """Room for ``size`` bytes behind what is in the buffer."""
    cdef char* data
    cdef Py_ssize_t capacity
    if buffer.start == buffer.end:
        buffer.start = buffer.end = 0
        if buffer.capacity > KEPT_BYTES and size <= KEPT_BYTES:
            free(buffer.data)
            buffer.data = NULL
            buffer.capacity = 0
    if buffer.capacity - buffer.end < size and buffer.start > 0:
        memmove(buffer.data, buffer.data + buffer.start, <size_t> (buffer.end - buffer.start))
        buffer.end -= buffer.start
        buffer.start = 0
    if buffer.data == NULL or buffer.capacity - buffer.end < size:
        capacity = max(buffer.end + size, 2 * buffer.capacity if buffer.capacity < KEPT_BYTES else 0, 1)
        data = <char*> realloc(buffer.data, <size_t> capacity)
        if data == NULL:
            raise MemoryError(f"no memory for {capacity} bytes of a connection's buffer")
        buffer.data = data
        buffer.capacity = capacity
    return buffer.data + buffer.end


cpdef bint tell(object function, tuple arguments) except -1:
    """Call what wakes the loop, whatever signals come; False if the loop is closed.

    In the main thread a signal's handler may raise inside the call, before it has done its work. So it is made again,
    which does no harm, and the handler's exception is raised when somebody will come.
    """
    cdef object raised = None
    for _ in range(3):
        try:
            function(*arguments)
        except BaseException as error:
            raised = error
            continue
        if raised is not None:
            raise raised
        return True
    if isinstance(raised, RuntimeError):
        return False
    raise raised


@final
cdef class Link:
    def __cinit__(self):
        self._fd = self._poll = -1

    def __init__(self, long long epoch, int fd, object pass_on=None):
        cdef epoll_event event
        self.epoch = epoch
        self.last_received = monotonic()
        self._fd = fd
        self._pass_on = pass_on
        if fd >= 0:
            self._block(True)
            self._poll = epoll_create1(EPOLL_CLOEXEC)
            self._armed = EPOLLIN
            event.events = EPOLLIN
            event.data.fd = fd
            if self._poll < 0 or epoll_ctl(self._poll, EPOLL_CTL_ADD, fd, &event) != 0:
                raise OSError(errno, "the connection cannot be watched")

    def __dealloc__(self):
        if self._poll >= 0:
            close(self._poll)
        if self._fd >= 0:
            close(self._fd)
        free(self.received.data)
        free(self._queued.data)
        free(self._going.data)

    @property
    def poll_fd(self):
        return self._poll

    # ---- out

    cdef char* room(self, Py_ssize_t size) except NULL:
        """Where the next ``size`` bytes to be sent are written; they count as queued at once."""
        cdef char* p = extend(&self._queued, size)
        self._queued.end += size
        return p

    cdef int flush(self) except -1:
        """Send what is queued, as far as the socket takes it."""
        if self.broken or self._sending or self.blocked:
            return 0
        self._sending = True
        if self._fd < 0:
            return self._have_taken_out()
        try:
            self._send()
        finally:
            self._sending = False
        return 0

    cdef int _have_taken_out(self) except -1:
        cdef bint told = False
        try:
            told = tell(self._pass_on, ())
        except BaseException:
            self._sending = False
            raise
        if not told:
            self.fail()
        return 0

    cdef int _send(self) except -1:
        cdef Buffer* going = &self._going
        cdef Buffer swap
        cdef ssize_t count
        cdef int fd = self._fd, error
        while not self.broken:
            if going.start == going.end:
                if self._queued.start == self._queued.end:
                    return 0
                swap = self._queued
                self._queued = going[0]
                self._queued.start = self._queued.end = 0
                going[0] = swap
            if going.end - going.start <= QUICK_BYTES:
                count = send(fd, going.data + going.start, <size_t> (going.end - going.start), MSG_DONTWAIT | MSG_NOSIGNAL)
                error = errno
            else:
                with nogil:
                    count = send(fd, going.data + going.start, <size_t> (going.end - going.start), MSG_DONTWAIT | MSG_NOSIGNAL)
                    error = errno
            if count >= 0:
                going.start += count
            elif error == EAGAIN:
                self.blocked = True
                return self._arm()
            elif error != EINTR:
                self.fail()
        return 0

    def take_out(self):
        cdef bytes data = (<char*> self._queued.data)[self._queued.start:self._queued.end]
        self._queued.start = self._queued.end = 0
        self._sending = False
        return data

    # ---- in

    cdef bint may_wait(self) noexcept:
        """Whether a thread may wait here for bytes itself: nobody else does, and they do not come through TLS."""
        return not self.reading and not self.broken and self._fd >= 0

    cdef int listen(self, bint on) except -1:
        """Begin or end to be the one who waits for bytes; the loop is not told of them meanwhile."""
        self.reading = on
        return self._arm()

    cdef Py_ssize_t receive(self, int patience_ms) except -1:
        """Take in what the socket has, one read at most, or what comes within ``patience_ms`` (SLICE_MS at most); 0 if that is
        nothing, or the connection has ended. A wait raises what a signal's handler raises."""
        cdef Buffer* into = &self.received
        cdef Py_ssize_t missing = self.wanted - (into.end - into.start)
        cdef Py_ssize_t size = min(max(<Py_ssize_t> READ_BYTES, missing), <Py_ssize_t> MOST_BYTES)
        cdef ssize_t count
        cdef int error
        cdef pollfd item
        cdef char* p = extend(into, max(<Py_ssize_t> READ_BYTES, missing))
        if patience_ms < SLICE_MS:
            if patience_ms > 0:
                item.fd = self._fd
                item.events = POLLIN
                with nogil:
                    poll(&item, 1, patience_ms)
            count = recv(self._fd, p, <size_t> size, MSG_DONTWAIT)
            error = errno
        else:
            with nogil:
                count = recv(self._fd, p, <size_t> size, 0)  # SLICE_MS at most, see SO_RCVTIMEO
                error = errno
        if count > 0:
            into.end += count
            self.last_received = monotonic()
            return count
        if count == 0 or (error != EAGAIN and error != EINTR):
            self.fail()
        elif patience_ms > 0:
            PyErr_CheckSignals()
        return 0

    cdef int take_in(self, const char* data, Py_ssize_t size) except -1:
        """Bytes that came through TLS."""
        memcpy(extend(&self.received, size), data, <size_t> size)
        self.received.end += size
        self.last_received = monotonic()
        return 0

    # ---- the loop's part

    cdef int _arm(self) except -1:
        """Tell the loop of bytes, unless somebody else waits for them, and of a socket that takes more again."""
        cdef epoll_event event
        cdef unsigned int events = (0 if self.reading else EPOLLIN) | (EPOLLOUT if self.blocked else 0)
        if events == self._armed or self._poll < 0:
            return 0
        event.events = events
        event.data.fd = self._fd
        if epoll_ctl(self._poll, EPOLL_CTL_MOD, self._fd, &event) != 0:
            self.fail()
        self._armed = events
        return 0

    # ---- the end

    cdef void fail(self) noexcept:
        self.broken = True
        if self._fd >= 0:
            shutdown(self._fd, SHUT_RDWR)

    cdef int _block(self, bint on) except -1:
        """Let a read that asks for it wait, in slices: a wait of its own in front would be a second system call."""
        cdef timeval slice
        cdef int flags = fcntl(self._fd, F_GETFL, 0)
        slice.tv_sec = 0
        slice.tv_usec = SLICE_MS * 1000
        if (
            fcntl(self._fd, F_SETFL, flags & ~O_NONBLOCK if on else flags | O_NONBLOCK) != 0
            or setsockopt(self._fd, SOL_SOCKET, SO_RCVTIMEO, &slice, sizeof(slice)) != 0
        ):
            raise OSError(errno, "the connection cannot be set up")
        return 0

    def hand_over(self):
        cdef int fd = self._fd
        self._block(False)
        self.broken = True
        self._fd = -1
        return fd

    def end(self):
        self.fail()
