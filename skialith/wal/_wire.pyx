# cython: language_level=3, boundscheck=False, wraparound=False, autotestdict=False, auto_pickle=False
"""The NATS byte stream in C: appends and their PubAcks, replies to whoever waits, deliveries to consumers, the rest to nats-py.

Signatures and contracts stand in ``_wire.pyi``. The protocol is https://docs.nats.io/reference/reference-protocols/nats-protocol.
The GIL is the lock, as in ``_link.pyx``.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_AsStringAndSize, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from .._fastpath cimport (
    AckSubject,
    PubAck,
    PyUnicode_AsUTF8AndSize,
    RecordForm,
    put_record,
    read_ack_subject,
    read_digits,
    read_puback,
    record_form,
)
from ._link cimport SLICE_MS, Buffer, Link, monotonic, tell
from ._protocol cimport Line, put_head, put_number, read_line, refuses
from ._waiting cimport (
    ACKED,
    LOST,
    PY_LOCK_ACQUIRED,
    REFUSED,
    WAITING,
    Deliveries,
    Pull,
    PyLockStatus,
    PyThread_acquire_lock,
    PyThread_acquire_lock_timed,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
    PyThread_type_lock,
    Reply,
    Tally,
    Turn,
    Waiter,
    Window,
)

from collections import deque

from ..records import Message, Position

# What runs while a thread receives must be C throughout: in Python code a signal's handler could raise, and the GIL pass on.
cdef object new_tuple = tuple.__new__

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef enum:
    HEADER_ROOM = 1024  # the longest headers of a record
    FLUSH_BYTES = 64 * 1024  # a run of messages goes out in pieces, so that the server begins with the first


class Unsettled(Exception):
    pass


class LoopClosed(Exception):
    pass


cdef class Wire:
    cdef readonly long long epoch
    cdef readonly bint is_open, takes_records
    cdef readonly Py_ssize_t appending
    cdef readonly Py_ssize_t max_payload
    cdef readonly double heard_last
    cdef Link _link
    cdef bytes _inbox
    cdef dict _waiting, _consumers
    cdef uint64_t _token
    cdef bytearray _rest
    cdef object _ready  # callbacks that are to run on the loop, each with its argument
    cdef object _call_soon, _on_rest, _on_lost
    cdef bint _told, _over
    cdef long long _ended  # the last connection whose end was made known
    cdef readonly Py_ssize_t queued
    cdef Py_ssize_t _longest_line, _longest_message, _most_records, _most_bytes, _queued_bytes
    cdef PyThread_type_lock _left  # released for each thread that found too many waiting, when some left
    cdef Py_ssize_t _refused
    cdef dict _roomless  # callbacks of those who wait for room without a thread

    def __cinit__(self):
        self._left = PyThread_allocate_lock()
        if self._left == NULL:
            raise MemoryError
        PyThread_acquire_lock(self._left, 0)

    def __dealloc__(self):
        if self._left != NULL:
            PyThread_free_lock(self._left)

    def __init__(self, str inbox, call_soon, on_rest, on_lost, limits not None):
        self._inbox = inbox.encode() + b"."
        self._call_soon, self._on_rest, self._on_lost = call_soon, on_rest, on_lost
        self._longest_line, self._longest_message, self._most_records, self._most_bytes = limits
        self._waiting = {}
        self._consumers = {}
        self._rest = bytearray()
        self._ready = deque()
        self._roomless = {}

    # ---- connections

    @property
    def last_received(self):
        return 0.0 if self._link is None else self._link.last_received

    def attach(self, Link link not None):
        if self._link is not None:
            self.detach(self._link.epoch)
        self._rest.clear()
        self.epoch = link.epoch
        self._ended = 0
        self._link = link

    def detach(self, long long epoch):
        cdef Link link = self._link
        if link is not None and link.epoch == epoch:
            self._lose(link)
            self._link = None
            self._tell_loop()

    def open(self, Py_ssize_t max_payload, bint records=True):
        self.max_payload = max_payload
        self.is_open = self._link is not None and not self._link.broken
        self.takes_records = records and self.is_open

    def admit(self, bint records):
        self.takes_records = records and self.is_open

    cdef bint _lose(self, Link link) except -1:
        """End the current connection: everybody who waits on it learns it, on the loop at the latest. False if it had ended."""
        cdef Window window
        cdef dict waiting, nobody = {}
        link.fail()
        if link is not self._link or self._ended == link.epoch:
            return False
        self._ended = link.epoch
        if self.is_open:
            self.heard_last = link.last_received
        self.is_open = self.takes_records = False
        waiting, self._waiting = self._waiting, nobody
        for item in waiting.values():
            if type(item) is Waiter:
                (<Waiter> item).settle(LOST)
            elif type(item) is Window:
                window = <Window> item
                if not window.lost:
                    window.lost = True
                    self._ready.append((window._callback, None))
            elif type(item) is not Pull:
                self._ready.append((item, None))
        for deliveries in list(self._consumers.values()):
            (<Deliveries> deliveries)._end()
            self._announce(<Deliveries> deliveries)
        return True

    cdef int _ended_by_itself(self, Link link) except -1:
        if self._lose(link):
            self._ready.append((self._on_lost, link.epoch))
        return 0

    cdef int _announce(self, Deliveries deliveries) except -1:
        if not deliveries._calling:
            deliveries._calling = True
            self._ready.append((deliveries._set_arrived, None))
        return 0

    cdef bint _tell_loop(self) except -1:
        """Have done on the loop what belongs there; False if it is closed."""
        cdef bint told = False
        if self._over:
            return False
        if self._told or not (self._ready or self._rest):
            return True
        self._told = True
        try:
            told = tell(self._call_soon, (self._run,))
        finally:
            if not told:
                self._told = False
        return told

    def _run(self):
        cdef Py_ssize_t left = len(self._ready)
        self._told = False
        try:
            while left > 0 and self._ready:
                left -= 1
                callback, argument = self._ready.popleft()
                callback(argument)
        except BaseException:
            self._tell_loop()  # of the others
            raise
        if self._rest:
            self._on_rest()

    def end(self):
        self._over = True
        left, self._ready = list(self._ready), deque()
        return left

    # ---- in

    def on_ready(self):
        cdef Link link = self._link
        if link is None or link.broken:
            if link is not None:
                self._ended_by_itself(link)
                self._run()
            return
        if link.blocked:
            link.blocked = False
            link.flush()
            link.listen(link.reading)
        if not link.reading and not link.broken:
            link.reading = True
            try:
                if link.receive(0) > 0:
                    self._handle(link)
            finally:
                link.reading = False
        if link.broken:
            self._ended_by_itself(link)
        self._run()

    def feed(self, bytes data not None):
        cdef Link link = self._link
        if link is None or link.broken:
            return
        link.take_in(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        self._handle(link)
        if link.broken:
            self._ended_by_itself(link)
        self._run()

    def take_rest(self):
        rest = bytes(self._rest)
        self._rest.clear()
        return rest

    cdef int _handle(self, Link link) except -1:
        """Handle every whole frame that was received; what breaks the protocol breaks the connection."""
        try:
            if not self._frames(link):
                link.fail()
        except BaseException:
            link.fail()
            raise
        return 0

    cdef bint _frames(self, Link link) except -1:
        cdef Buffer* b = &link.received
        cdef const char* p
        cdef const char* newline
        cdef Py_ssize_t size, line_size, whole
        cdef Line line
        cdef bint headers
        link.wanted = 0
        while b.start < b.end and link is self._link:
            p = b.data + b.start
            size = b.end - b.start
            newline = <const char*> memchr(p, c"\n", <size_t> min(size, self._longest_line))
            if newline == NULL:
                return size < self._longest_line
            line_size = newline - p + 1
            headers = line_size > 5 and memcmp(p, b"HMSG ", 5) == 0
            if not headers and not (line_size > 4 and memcmp(p, b"MSG ", 4) == 0):
                self._rest += p[:line_size]
                b.start += line_size
                continue
            if p[line_size - 2] != c"\r" or not read_line(p + 4 + headers, line_size - 6 - headers, headers, &line):
                return False
            if line.total > self._longest_message:
                return False
            whole = line_size + line.total + 2
            if size < whole:
                link.wanted = whole
                return True
            if memcmp(p + whole - 2, b"\r\n", 2) != 0:
                return False
            if not self._message(link, &line, newline + 1):
                self._rest += p[:whole]
            b.start += whole
        return True

    cdef bint _message(self, Link link, Line* line, const char* body) except -1:
        """Give a message to whom it is for; False if that is nobody here."""
        cdef Py_ssize_t n = PyBytes_GET_SIZE(self._inbox)
        cdef const char* p
        cdef uint64_t token
        if line.subject_size > n and memcmp(line.subject, PyBytes_AS_STRING(self._inbox), <size_t> n) == 0:
            p = line.subject + n
            if read_digits(&p, line.subject + line.subject_size, &token) and p == line.subject + line.subject_size:
                self._reply(token, line, body)
            # A reply to somebody who gave up is nobody's any more.
            return True
        if line.reply_size > 8 and memcmp(line.reply, b"$JS.ACK.", 8) == 0:
            return self._delivery(link, line, body)
        return False

    cdef int _reply(self, uint64_t token, Line* line, const char* body) except -1:
        cdef PubAck ack
        cdef bint acked
        item = self._waiting.get(token)
        if item is None:
            return 0
        if type(item) is Waiter and (<Waiter> item).asks:
            del self._waiting[token]
            (<Waiter> item).reply = _reply_of(line, body)
            (<Waiter> item).settle(ACKED)
        elif type(item) is Waiter or type(item) is Window:
            del self._waiting[token]
            acked = line.head == 0 and read_puback(body, line.total, &ack)
            if type(item) is Waiter:
                (<Waiter> item).seq = ack.seq if acked else 0
                (<Waiter> item).duplicate = acked and ack.duplicate
                (<Waiter> item).settle(ACKED if acked else REFUSED if refuses(line, body) else LOST)
            else:
                self._answer(<Window> item, token, &ack if acked else NULL, body + line.head, line.total - line.head)
        elif type(item) is Pull:
            self._status(<Pull> item, _reply_of(line, body))
        else:
            self._ready.append((item, _reply_of(line, body)))
        return 0

    cdef int _answer(self, Window window, uint64_t token, PubAck* ack, const char* data, Py_ssize_t size) except -1:
        cdef Py_ssize_t i = <Py_ssize_t> (token - window._first)
        if ack != NULL:
            window._states[i] = ACKED
            window._seqs[i] = ack.seq
            window._duplicates[i] = ack.duplicate
        else:
            window._states[i] = REFUSED
            window._refusals[i] = PyBytes_FromStringAndSize(data, size)
        window._open -= 1
        if window._open == 0:
            self._ready.append((window._callback, None))
        return 0

    cdef int _status(self, Pull pull, Reply reply) except -1:
        """A status ends a pull request; without one it is a notice (the consumer's heartbeat) that ends nothing."""
        cdef Deliveries deliveries = pull.deliveries
        headers = reply.headers or {}
        code = headers.get("Status", "")
        if not code or code == "100":
            return 0
        self._waiting.pop(pull.token, None)
        if pull in deliveries._pulls:
            deliveries._pulls.remove(pull)
            deliveries.expected -= pull.left
        deliveries._status = code, headers.get("Description", "")
        return self._announce(deliveries)

    cdef bint _delivery(self, Link link, Line* line, const char* body) except -1:
        cdef AckSubject ack
        cdef Deliveries deliveries
        cdef Pull pull
        cdef Py_ssize_t size
        if not read_ack_subject(line.reply, line.reply_size, &ack):
            return False
        deliveries = self._consumers.get(ack.consumer[:ack.consumer_size])
        if deliveries is None:
            return False
        data = PyBytes_FromStringAndSize(body + line.head, line.total - line.head)
        message = new_tuple(Message, (
            PyUnicode_DecodeUTF8(line.subject, line.subject_size, "replace"),
            data,
            new_tuple(Position, (ack.time_ns, ack.seq)),
            PyUnicode_DecodeUTF8(line.reply, line.reply_size, "replace"),
            link.epoch,
            ack.deliveries,
        ))
        if link is not self._link:
            return True
        deliveries._messages.append((link.last_received, message))
        deliveries.size += PyBytes_GET_SIZE(data)
        if deliveries._pulls:
            # The server takes turns among a consumer's requests and says nothing of one that is served, so which request a
            # message was for is a guess; only the sum counts.
            pull = deliveries._pulls[0]
            pull.left -= 1
            deliveries.expected -= 1
            if pull.left == 0:
                deliveries._pulls.popleft()
                self._waiting.pop(pull.token, None)
        # Whoever pulls wakes up for the first message and for a whole batch; each time would cost whoever appends the GIL.
        size = len(deliveries._messages)
        if size == 1 or size >= deliveries.enough_rows or deliveries.size >= deliveries.enough_bytes:
            self._announce(deliveries)
        return True

    # ---- out

    def put(self, bytes frames not None):
        cdef Link link = self._link
        if link is None or link.broken:
            return False
        memcpy(link.room(PyBytes_GET_SIZE(frames)), PyBytes_AS_STRING(frames), <size_t> PyBytes_GET_SIZE(frames))
        self._flush(link)
        return True

    cdef int _flush(self, Link link) except -1:
        link.flush()
        if link.broken:
            self._ended_by_itself(link)
            self._tell_loop()
        return 0

    def expect(self, callback not None):
        return self._register(callback)

    cdef uint64_t _register(self, object item) except 0:
        self._token += 1
        self._waiting[self._token] = item
        return self._token

    def forget(self, uint64_t token):
        self._waiting.pop(token, None)

    def reply_subject(self, uint64_t token):
        return f"{self._inbox.decode()}{token}"

    # ---- handing over to the loop

    def hand_over(self, Turn turn not None, Py_ssize_t records, Py_ssize_t size, callback not None, payload):
        if turn.retired:
            return False
        if records and self.queued and (self.queued + records > self._most_records or self._queued_bytes + size > self._most_bytes):
            self._refused += 1
            return False
        item = (callback, payload)
        if turn.retired:  # making the pair may have run a collector, and others meanwhile
            return False
        self._ready.append(item)
        turn.waiting += records
        self.queued += records
        self._queued_bytes += size
        if not self._tell_loop():
            raise LoopClosed
        return True

    def leave(self, Turn turn not None, Py_ssize_t records, Py_ssize_t size):
        turn.waiting -= records
        self.queued -= records
        self._queued_bytes -= size
        # Not at the first that leaves: whoever waits would wake up for each one, and fill the place again.
        if self.queued <= self._most_records // 2 and self._queued_bytes <= self._most_bytes // 2:
            while self._refused:
                self._refused -= 1
                PyThread_release_lock(self._left)
            if self._roomless:
                roomless, self._roomless = self._roomless, {}
                for callback in roomless:
                    callback(None)

    def wait_for_room(self, double seconds):
        cdef long long most_us = <long long> max(0.0, min(seconds, 1.0) * 1e6)
        cdef PyLockStatus status
        with nogil:
            status = PyThread_acquire_lock_timed(self._left, most_us, 1)
        if status != PY_LOCK_ACQUIRED:
            PyErr_CheckSignals()

    def when_room(self, callback not None):
        if not self.queued:
            return False
        self._roomless[callback] = None
        return True

    def forget_room(self, callback not None):
        self._roomless.pop(callback, None)

    # ---- appends

    def append(self, Turn turn not None, Tally tally not None, str subject not None, record not None, double deadline):
        cdef Link link = self._link
        cdef Waiter waiter
        cdef uint64_t token
        cdef Py_ssize_t size = 0
        cdef bint reading
        if turn.taken or turn.waiting or turn._fence is None or (turn._epoch != 0 and turn._epoch != self.epoch):
            return None
        if not self.takes_records or link is None or link.broken:
            return None
        waiter = Waiter.__new__(Waiter)
        token = self._register(waiter)
        turn.taken = True
        self.appending += 1
        # Before it is sent: the answer is not to wake the loop.
        reading = link.may_wait()
        try:
            if reading:
                link.listen(True)
            size = self.post(link, token, subject, turn._fence, record)
            if reading:
                reading = False
                self._read(link, waiter, deadline if size else 0.0)
            if size:
                self._wait(link, waiter, deadline)
        except BaseException:
            if turn._epoch != 0:
                turn.suspect = True
                turn._fence = None
            raise
        finally:
            if reading:
                link.listen(False)
            self._waiting.pop(token, None)
            self.appending -= 1
            if waiter.state == ACKED:
                tally.note(waiter.seq, size)
            if size and turn._epoch != 0 and (waiter.state == WAITING or waiter.state == LOST):
                turn.suspect = True
                turn._fence = None
            self._pass_on(turn)
        if waiter.state == ACKED:
            return waiter.seq, bool(waiter.duplicate)
        if size and waiter.state != REFUSED:
            raise Unsettled
        return None

    cdef int _pass_on(self, Turn turn) except -1:
        """The turn goes to the next who waits for it, on the loop, or is free."""
        if turn._queue:
            self._ready.append((turn._queue.popleft(), None))
        else:
            turn.taken = False
        self._tell_loop()
        return 0

    def send(
        self, Window window not None, Turn turn not None, str subject not None, record not None, bytes message_id not None,
        Py_ssize_t size,
    ):
        cdef Link link = self._link
        if turn.taken or turn.waiting or turn._fence is None or (turn._epoch != 0 and turn._epoch != self.epoch):
            return False
        if not self.takes_records or link is None or link.broken or link.blocked:
            return False
        if self.queued and (self.queued >= self._most_records or self._queued_bytes + size > self._most_bytes):
            return False
        window._first = self._register(window)
        turn.taken = True
        turn.waiting += 1
        self.queued += 1
        self._queued_bytes += size
        try:
            window.sent = self._queue(link, window._first, subject, turn._fence, record, message_id) > 0
        finally:
            if not window.sent:
                self.give_up(window)
                try:
                    self.leave(turn, 1, size)
                finally:
                    self._pass_on(turn)
        if window.sent:
            # What a signal's handler raises in here comes too late: it is on its way, and the window gets its answer.
            self._flush(link)
        return window.sent

    cpdef Py_ssize_t post(
        self, Link link, uint64_t token, str subject, bytes fence, object record, bytes message_id=None
    ) except -1:
        """Write a record to the socket; its size, or 0 if it is too large for one message of this server."""
        cdef Py_ssize_t size = self._queue(link, token, subject, fence, record, message_id)
        if size:
            self._flush(link)
        return size

    cdef Py_ssize_t _queue(
        self, Link link, uint64_t token, str subject, bytes fence, object record, bytes message_id
    ) except -1:
        cdef RecordForm form
        cdef char* p
        record_form(&form, record)
        if form.body == NULL or form.size + HEADER_ROOM > self.max_payload:
            return 0
        p = put_head(link, self._inbox, token, subject, message_id or record[4], fence, form.size)
        put_record(<uint8_t*> p, &form)
        memcpy(p + form.size, b"\r\n", 2)
        return form.size

    cdef int _wait(self, Link link, Waiter waiter, double deadline) except -1:
        """Until the waiter is settled, or the deadline; the calling thread reads the socket itself if nobody else does."""
        cdef double left
        cdef long long slice_us
        cdef PyLockStatus status
        while waiter.state == WAITING:
            left = deadline - monotonic()
            if left <= 0:
                return 0
            if link.may_wait():
                link.listen(True)
                self._read(link, waiter, deadline)
                continue
            if waiter.lock == NULL:
                waiter.lock = PyThread_allocate_lock()
                if waiter.lock == NULL:
                    raise MemoryError
                PyThread_acquire_lock(waiter.lock, 0)
            slice_us = <long long> min(left * 1e6 + 1, SLICE_MS * 1e3)
            with nogil:
                status = PyThread_acquire_lock_timed(waiter.lock, slice_us, 1)
            if status != PY_LOCK_ACQUIRED:
                PyErr_CheckSignals()
        return 0

    cdef int _read(self, Link link, Waiter waiter, double deadline) except -1:
        """Receive for everybody until the waiter is settled, or the deadline; ends what ``link.listen(True)`` began."""
        cdef double left
        try:
            while waiter.state == WAITING and not link.broken:
                left = deadline - monotonic()
                if left <= 0:
                    break
                if link.receive(<int> min(left * 1e3 + 1, <double> SLICE_MS)) > 0:
                    self._handle(link)
                    if waiter.state == WAITING:
                        self._tell_loop()
        finally:
            link.listen(False)
            if link.broken:
                self._ended_by_itself(link)
            self._tell_loop()
        return 0

    def ask(self, str subject not None, bytes payload not None, double deadline):
        cdef Link link = self._link
        cdef Waiter waiter
        cdef uint64_t token
        cdef bytes frame
        cdef bint reading
        if not self.is_open or link is None or link.broken:
            return None
        waiter = Waiter.__new__(Waiter)
        waiter.asks = True
        token = self._register(waiter)
        reading = False
        try:
            frame = b"PUB %b %b%d %d\r\n%b\r\n" % (subject.encode(), self._inbox, token, len(payload), payload)
            # Before it is sent: the answer is not to wake the loop.
            reading = link.may_wait()
            if reading:
                link.listen(True)
            memcpy(link.room(PyBytes_GET_SIZE(frame)), PyBytes_AS_STRING(frame), <size_t> PyBytes_GET_SIZE(frame))
            self._flush(link)
            if reading:
                reading = False
                self._read(link, waiter, deadline)
            self._wait(link, waiter, deadline)
        finally:
            if reading:
                link.listen(False)
            self._waiting.pop(token, None)
            self._tell_loop()
        return waiter.reply

    def pipeline(self, list messages not None, bytes fence not None, callback not None):
        cdef Link link
        cdef Window window
        cdef Py_ssize_t count = len(messages), i
        cdef uint64_t first = self._token + 1
        self._token += <uint64_t> count
        window = Window(first, count, callback)
        # Nothing lets another thread in between here and the registration.
        link = self._link
        if not self.takes_records or link is None or link.broken:
            return None
        for i in range(count):
            self._waiting[first + <uint64_t> i] = window
        try:
            self._send_all(link, first, messages, fence)
        except BaseException:
            self.give_up(window)
            raise
        return window

    cdef int _send_all(self, Link link, uint64_t token, list messages, bytes fence) except -1:
        cdef Py_ssize_t size, queued = 0
        cdef char* p
        cdef char* data
        for subject, key, item in messages:
            PyBytes_AsStringAndSize(item, &data, &size)
            p = put_head(link, self._inbox, token, subject, key, fence, size)
            memcpy(p, data, <size_t> size)
            memcpy(p + size, b"\r\n", 2)
            token += 1
            queued += size
            if queued >= FLUSH_BYTES:
                queued = 0
                self._flush(link)
        return self._flush(link)

    def give_up(self, Window window not None):
        cdef Py_ssize_t i
        for i in range(window._count):
            self._waiting.pop(window._first + i, None)

    # ---- consumers

    def deliveries(self, str stream not None, str consumer not None):
        key = f"{stream}.{consumer}".encode()
        found = self._consumers.get(key)
        if found is None:
            found = self._consumers[key] = Deliveries()
        return found

    def pull(self, Deliveries deliveries not None, str subject not None, bytes request not None, Py_ssize_t batch):
        cdef Pull pull = Pull.__new__(Pull)
        cdef bytes frame
        self._token += 1
        pull.deliveries = deliveries
        pull.left = batch
        pull.token = self._token
        head = f"PUB {subject} {self.reply_subject(pull.token)} {len(request)}\r\n".encode()
        frame = b"%b%b\r\n" % (head, request)
        # Nothing lets another thread in between here and the frame's place in the queue.
        if not self.is_open:
            return False
        self._waiting[pull.token] = pull
        deliveries._pulls.append(pull)
        deliveries.expected += batch
        return self.put(frame)

    def forget_pulls(self, Deliveries deliveries not None):
        for pull in deliveries._pulls:
            self._waiting.pop((<Pull> pull).token, None)
        deliveries._pulls.clear()
        deliveries.expected = 0

    def tell(self, messages not None, bytes word not None):
        cdef Link link = self._link
        cdef const char* reply
        cdef char* p
        cdef char tail[24]
        cdef Py_ssize_t size, word_size = PyBytes_GET_SIZE(word), digits
        if link is None or link.broken or not self.is_open:
            return
        tail[0] = c" "
        digits = 1 + put_number(tail + 1, <uint64_t> word_size)
        memcpy(tail + digits, b"\r\n", 2)
        digits += 2
        for message in messages:
            if message[4] != link.epoch:
                continue
            reply = PyUnicode_AsUTF8AndSize(message[3], &size)
            p = link.room(4 + size + digits + word_size + 2)
            memcpy(p, b"PUB ", 4)
            memcpy(p + 4, reply, <size_t> size)
            p += 4 + size
            memcpy(p, tail, <size_t> digits)
            p += digits
            memcpy(p, PyBytes_AS_STRING(word), <size_t> word_size)
            memcpy(p + word_size, b"\r\n", 2)
        self._flush(link)


cdef Reply _reply_of(Line* line, const char* body):
    cdef Reply reply = Reply.__new__(Reply)
    reply.data = PyBytes_FromStringAndSize(body + line.head, line.total - line.head)
    if line.head:
        reply._head = PyBytes_FromStringAndSize(body, line.head)
    return reply
