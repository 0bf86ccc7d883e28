"""What the other compiled modules share of skialith._fastpath: the wire's forms as C functions."""

from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL

cdef enum:
    KEY_BYTES = 16
    CONTROL_LINE_LIMIT = 4096  # nats-server's default max_control_line; it ends the connection of a client over it

cdef struct RecordForm:
    int64_t kind, step_index, created_us, codec
    const char* agent
    const char* ident
    const char* key
    const char* etype
    const char* body
    Py_ssize_t agent_size, id_size, type_size, body_size, size

cdef struct PubAck:
    const char* name
    Py_ssize_t name_size
    uint64_t seq
    bint duplicate

cdef struct AckSubject:
    const char* consumer
    Py_ssize_t consumer_size
    uint64_t seq, time_ns, deliveries, pending
    Py_ssize_t tokens, wrong

cdef int record_form(RecordForm* form, object fields) except -1
cdef uint8_t* put_record(uint8_t* p, const RecordForm* form) noexcept nogil
cdef bint read_puback(const char* p, Py_ssize_t size, PubAck* ack) noexcept nogil
cdef bint read_ack_subject(const char* start, Py_ssize_t size, AckSubject* ack) noexcept nogil
cdef bint read_digits(const char** p, const char* end, uint64_t* value) noexcept nogil
